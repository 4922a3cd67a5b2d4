// int8 tokens times a W4A8 panel. Both sides are widened to int16 for vpmaddwd: the byte product vpmaddubsw would need
// |t| and sign(w, t) to stay exact, and vpsignb shares the two multiplier ports of current AMD cores (measured: 0.6x).
#pragma once

#include "../../numerics/layout.h"
#include "../generic/vec.h"
#include "../kernels.h"

namespace nk::cpu {
namespace {

// kCount tokens x 8 channels. `tokens` holds [inputs / 4][kCount] words of four int16 codes; `panel` is a half strip.
template <size_t kCount>
NK_INLINE void accumulate_half_strip(const int64_t* tokens, const int8_t* panel, size_t inputs, bool accumulate,
                                     int32_t* sums, size_t stride) {
    __m256i acc[kCount][2];  // four channels each, the sums over inputs 0-1 and 2-3 of every word side by side
    for (size_t m = 0; m < kCount; ++m) acc[m][0] = acc[m][1] = _mm256_setzero_si256();
    for (size_t k = 0; k < inputs / 4; ++k) {
        const __m256i w0 = _mm256_cvtepi8_epi16(load<__m128i>(panel + k * 64));
        const __m256i w1 = _mm256_cvtepi8_epi16(load<__m128i>(panel + k * 64 + 16));
#pragma GCC unroll 6
        for (size_t m = 0; m < kCount; ++m) {
            const __m256i t = _mm256_set1_epi64x(tokens[k * kCount + m]);
            acc[m][0] = _mm256_add_epi32(acc[m][0], _mm256_madd_epi16(w0, t));
            acc[m][1] = _mm256_add_epi32(acc[m][1], _mm256_madd_epi16(w1, t));
            asm("" : "+x"(acc[m][0]), "+x"(acc[m][1]));  // keeps GCC from hoisting all products and spilling the sums
        }
    }
    for (size_t m = 0; m < kCount; ++m) {
        // Adding neighbours interleaves the two quads of channels by 128-bit lane.
        const __m256i total = _mm256_permute4x64_epi64(_mm256_hadd_epi32(acc[m][0], acc[m][1]), 0xd8);
        int32_t* out = sums + m * stride;
        store(out, accumulate ? _mm256_add_epi32(total, load<__m256i>(out)) : total);
    }
}

template <size_t kCount>
NK_INLINE void accumulate_tokens(const int8_t* codes, size_t stride, const int8_t* panel, size_t channels,
                                 size_t inputs, bool accumulate, int32_t* sums) {
    alignas(32) int64_t tokens[kPanelInputs / 4 * kCount];
    for (size_t k = 0; k < inputs / 4; ++k)
        for (size_t m = 0; m < kCount; ++m) {
            const __m128i word = _mm_cvtsi32_si128(load<int32_t>(codes + m * stride + k * 4));
            tokens[k * kCount + m] = _mm_cvtsi128_si64(_mm_cvtepi8_epi16(word));
        }
    for (size_t n = 0; n < channels; n += 8)
        accumulate_half_strip<kCount>(tokens, panel + n / kStrip * kStrip * inputs + n % kStrip * 4, inputs, accumulate,
                                      sums + n, channels);
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
