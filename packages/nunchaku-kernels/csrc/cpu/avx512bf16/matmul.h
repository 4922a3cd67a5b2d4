// bf16 tokens times panels of bf16 pairs with vdpbf16ps: products exact, sums in fp32.
#pragma once

#include <immintrin.h>

#include "../../numerics/layout.h"
#include "../generic/vec.h"

namespace nk::cpu {
namespace {

template <size_t kCount>
NK_INLINE void matmul_bf16_tile(const uint16_t* x, size_t stride, const uint16_t* panel, size_t inputs, float* y,
                                size_t ldy) {
    __m512 sums[kCount];
    for (size_t m = 0; m < kCount; ++m) sums[m] = _mm512_loadu_ps(y + m * ldy);
    for (size_t k = 0; k < inputs; k += 2) {
        const __m512bh w = reinterpret_cast<__m512bh>(load<__m512i>(panel + k * kStrip));
#pragma GCC unroll 12
        for (size_t m = 0; m < kCount; ++m) {
            const __m512i t = _mm512_set1_epi32(load<int32_t>(x + m * stride + k));
            sums[m] = _mm512_dpbf16_ps(sums[m], w, reinterpret_cast<__m512bh>(t));
        }
    }
    for (size_t m = 0; m < kCount; ++m) _mm512_storeu_ps(y + m * ldy, sums[m]);
}

void matmul_bf16(const uint16_t* x, size_t stride, size_t tokens, const uint16_t* panel, size_t inputs, float* y,
                 size_t ldy) {
    size_t m = 0;
    for (; m + 12 <= tokens; m += 12) matmul_bf16_tile<12>(x + m * stride, stride, panel, inputs, y + m * ldy, ldy);
    for (; m + 4 <= tokens; m += 4) matmul_bf16_tile<4>(x + m * stride, stride, panel, inputs, y + m * ldy, ldy);
    for (; m < tokens; ++m) matmul_bf16_tile<1>(x + m * stride, stride, panel, inputs, y + m * ldy, ldy);
}

}  // namespace
}  // namespace nk::cpu
