// int8 tokens times a W4A8 panel with vpdpbusd. It multiplies unsigned by signed bytes, so weights are given as w + 128
// and every token's sum starts at -128 * sum(t); int32 wraps, the result is exact.
#pragma once

#include <immintrin.h>

#include "../../numerics/layout.h"
#include "../generic/vec.h"
#include "../kernels.h"

namespace nk::cpu {
namespace {

NK_INLINE int32_t code_sum(const int8_t* codes, size_t inputs) {
    __m512i sum = _mm512_setzero_si512();
    for (size_t k = 0; k < inputs; k += 64)
        sum = _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(1), load<__m512i>(codes + k));
    return _mm512_reduce_add_epi32(sum);
}

// kCount tokens x kStrips strips of 16 channels.
template <size_t kCount, size_t kStrips>
NK_INLINE void accumulate_strips(const int8_t* codes, size_t stride, const int32_t* offsets, const int8_t* panel,
                                 size_t inputs, bool accumulate, int32_t* sums, size_t sums_stride) {
    __m512i acc[kCount][kStrips];
    for (size_t m = 0; m < kCount; ++m)
        for (size_t s = 0; s < kStrips; ++s) acc[m][s] = _mm512_set1_epi32(offsets[m]);
    for (size_t k = 0; k < inputs; k += 4) {
        __m512i w[kStrips];
        for (size_t s = 0; s < kStrips; ++s)
            w[s] = _mm512_xor_si512(load<__m512i>(panel + s * kStrip * inputs + k * kStrip), _mm512_set1_epi8(-128));
#pragma GCC unroll 6
        for (size_t m = 0; m < kCount; ++m) {
            const __m512i t = _mm512_set1_epi32(load<int32_t>(codes + m * stride + k));
#pragma GCC unroll 4
            for (size_t s = 0; s < kStrips; ++s) acc[m][s] = _mm512_dpbusd_epi32(acc[m][s], w[s], t);
        }
    }
    for (size_t m = 0; m < kCount; ++m)
        for (size_t s = 0; s < kStrips; ++s) {
            int32_t* out = sums + m * sums_stride + s * kStrip;
            store(out, accumulate ? _mm512_add_epi32(acc[m][s], load<__m512i>(out)) : acc[m][s]);
        }
}

template <size_t kCount>
NK_INLINE void accumulate_tokens(const int8_t* codes, size_t stride, const int8_t* panel, size_t channels,
                                 size_t inputs, bool accumulate, int32_t* sums) {
    int32_t offsets[kCount];
    for (size_t m = 0; m < kCount; ++m) offsets[m] = -128 * code_sum(codes + m * stride, inputs);
    size_t n = 0;
    for (; n + 4 * kStrip <= channels; n += 4 * kStrip)
        accumulate_strips<kCount, 4>(codes, stride, offsets, panel + n * inputs, inputs, accumulate, sums + n,
                                     channels);
    for (; n < channels; n += kStrip)
        accumulate_strips<kCount, 1>(codes, stride, offsets, panel + n * inputs, inputs, accumulate, sums + n,
                                     channels);
}

void accumulate_panel(const int8_t* codes, size_t stride, size_t tokens, const int8_t* panel, size_t channels,
                      size_t inputs, bool accumulate, int32_t* sums) {
    size_t m = 0;
    for (; m + 6 <= tokens; m += 6)
        accumulate_tokens<6>(codes + m * stride, stride, panel, channels, inputs, accumulate, sums + m * channels);
    for (; m + 2 <= tokens; m += 2)
        accumulate_tokens<2>(codes + m * stride, stride, panel, channels, inputs, accumulate, sums + m * channels);
    if (m < tokens)
        accumulate_tokens<1>(codes + m * stride, stride, panel, channels, inputs, accumulate, sums + m * channels);
}

}  // namespace
}  // namespace nk::cpu
