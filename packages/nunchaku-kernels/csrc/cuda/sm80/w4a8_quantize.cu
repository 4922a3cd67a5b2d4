// Activations to int8 with one scale per token, and the low-rank down projection of the same tokens, in one pass over x.
#include "../kernels.h"

namespace nk::cuda::sm80 {
void w4a8_quantize(const QuantizeArguments&, cudaStream_t) { throw std::runtime_error("not yet"); }
}  // namespace nk::cuda::sm80
