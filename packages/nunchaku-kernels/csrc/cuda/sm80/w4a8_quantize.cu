// Activations to int8 with one scale per token, and the low-rank down projection of the same tokens, in one pass over
// x.
#include "../w4a8_quantize.cuh"

namespace nk::cuda::sm80 {
namespace {

// A CTA by itself: its barrier is the only one, and its shared memory the only one to read.
struct Alone {
    static constexpr int kLargest = 1;

    static __device__ uint32_t size() { return 1; }
    static __device__ uint32_t rank() { return 0; }
    static __device__ void arrive() {}
    static __device__ void wait() { __syncthreads(); }
    static __device__ void raise(uint32_t* word, uint32_t value) { atomicMax(word, value); }
    static __device__ float4 load(const char* address, uint32_t) { return *reinterpret_cast<const float4*>(address); }
};

}  // namespace

void w4a8_quantize(const QuantizeArguments& arguments, cudaStream_t stream) { quantize::run<Alone>(arguments, stream); }

}  // namespace nk::cuda::sm80
