// Group scales folded into one fp32 scale per output channel and an int16 multiplier per group. One warp per channel.
#include "../../numerics/layout.h"
#include "../../numerics/w4a8.h"
#include "../kernels.h"

namespace nk::cuda::sm80 {
namespace {

constexpr int kWarps = 8;

// max |code| of one group of channel n: eight words of eight codes.
__device__ int largest_code(const uint8_t* qweight, size_t n, size_t group, size_t padded_k) {
    const uint8_t* strip = qweight + qweight_strip_offset(n, group * kGroup, padded_k);
    int largest = 0;
    for (size_t k = 0; k < kGroup; k += 8) {
        const uint32_t word = *reinterpret_cast<const uint32_t*>(strip + qweight_strip_nibble(n % kStrip, k) / 2);
#pragma unroll
        for (int i = 0; i < 8; ++i) largest = max(largest, abs(sign_extend_nibble(word >> 4 * i & 15)));
    }
    return largest;
}

__global__ void fold_scales(const uint8_t* qweight, const void* wscales, DType dtype, size_t padded_k,
                            float* row_scales, int16_t* multipliers) {
    const size_t n = blockIdx.x * size_t{kWarps} + threadIdx.x / 32, lane = threadIdx.x % 32;
    const size_t groups = padded_k / kGroup;
    const auto scale = [&](size_t g) {
        return static_cast<double>(load_float(wscales, dtype, group_scale_position(n, g, groups)));
    };
    double row_maximum = 0;
    for (size_t g = lane; g < groups; g += 32) {
        const double magnitude = fabs(largest_code(qweight, n, g, padded_k) * scale(g));
        if (magnitude > row_maximum || isnan(magnitude)) row_maximum = magnitude;
    }
    for (int distance = 16; distance; distance /= 2) {
        const double other = __shfl_xor_sync(~0u, row_maximum, distance);
        if (other > row_maximum || isnan(other)) row_maximum = other;
    }
    const double row_scale = w4a8_row_scale(row_maximum);
    if (lane == 0) row_scales[n] = static_cast<float>(row_scale);
    for (size_t g = lane; g < groups; g += 32)
        multipliers[w4a8_multiplier_position(n, g, groups)] =
            largest_code(qweight, n, g, padded_k) ? w4a8_group_multiplier(scale(g), row_scale) : int16_t{0};
}

}  // namespace

void w4a8_fold_scales(const FoldArguments& a, cudaStream_t stream) {
    launch(fold_scales, dim3(static_cast<unsigned>(a.padded_n / kWarps)), dim3(32 * kWarps), 0, stream,
           "w4a8_fold_scales", a.qweight, a.wscales.data, static_cast<DType>(a.wscales.dtype),
           static_cast<size_t>(a.padded_k), a.row_scales, a.multipliers);
}

}  // namespace nk::cuda::sm80
