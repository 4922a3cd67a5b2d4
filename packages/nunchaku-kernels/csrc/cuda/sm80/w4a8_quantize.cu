// Activations to int8 with one scale per token, and the low-rank down projection of the same tokens, in one pass over
// x.
#include "../quantize/launch.cuh"

namespace nk::cuda::sm80 {

void w4a8_quantize(const QuantizeArguments& arguments, cudaStream_t stream) {
    quantize::run<quantize::Alone>(arguments, stream);
}

}  // namespace nk::cuda::sm80
