// 4-bit weights in AWQ order times 16-bit or fp32 activations: which kernel serves.
#include "../kernels.h"
#include "../w4a16.cuh"

namespace nk::cuda::sm80 {

void w4a16_linear(const AwqArguments& a, cudaStream_t stream) {
    constexpr int64_t kLimit = INT32_MAX - 256;  // what a kernel counts, up to a last tile
    if (a.tokens > kLimit || a.out_features > kLimit || a.in_features > kMaxInputs)
        throw std::invalid_argument("M, N, K: expected less than 2^31 - 256 and K at most 2^21, given " +
                                    std::to_string(a.tokens) + ", " + std::to_string(a.out_features) + " and " +
                                    std::to_string(a.in_features));
    if (a.x.dtype != a.scales_dtype || static_cast<DType>(a.x.dtype) == DType::f32) return w4a16_fp32(a, stream);
    if (a.tokens <= 16) return w4a16_gemv(a, stream);
    w4a16_gemm(a, stream);
}

}  // namespace nk::cuda::sm80
