// AWQ-ordered weights with bf16 scales to tiles of bf16 pairs. Codes are transposed while they are still four bits;
// then a permute makes numbers of them, and a fused multiply-add with two roundings (to fp32, to bf16) the weights.
#pragma once

#include <immintrin.h>

#include "../../numerics/layout.h"
#include "../avx2/transpose.h"
#include "../kernels.h"

namespace nk::cpu {
namespace {

// Eight values, each for the two inputs of a pair.
NK_INLINE __m512 twice(const float* values) {
    const __m512i index = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
    return _mm512_permutexvar_ps(index, _mm512_castps256_ps512(_mm256_loadu_ps(values)));
}

// While a block of inputs is multiplied, memory would idle: ask for the next block's codes.
constexpr size_t kPrefetchWords = kTileInputBytes / sizeof(uint16_t);

void awq_decode_tiles(const AwqQuad& quad, size_t quads, size_t k0, size_t inputs, uint16_t* panel) {
    const __m512 numbers = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    __m512 scales[2] = {}, zeros[2] = {};
    for (size_t k = k0; k < k0 + inputs; k += kGroup, panel += kGroup * kStrip) {
        if (k == k0 || k % quad.group_size == 0)
            for (size_t half = 0; half < 2; ++half) {
                const size_t position = k / quad.group_size * quad.scale_stride + half * 8;
                scales[half] = twice(quad.scales + position);
                zeros[half] = twice(quad.zeros + position);
            }
        __m256i words[2][8];  // [channels 0-7, 8-15][channel], transposed: [pair of inputs % 8, half of inputs]
        for (size_t n = 0; n < kStrip; ++n) {
            const size_t row = n / 4 < quads ? n / 4 : quads - 1;
            const uint16_t* channel = quad.words + row * quad.inputs + k + n % 4 * 16;
            if (n % 2 == 0) _mm_prefetch(reinterpret_cast<const char*>(channel + kPrefetchWords), _MM_HINT_T0);
            words[n / 8][n % 8] = load<__m256i>(channel);
        }
        transpose_8x8(words[0]);
        transpose_8x8(words[1]);
        for (size_t i = 0; i < 8; ++i) {
            const __m512i codes[2] = {_mm512_cvtepu16_epi32(words[0][i]), _mm512_cvtepu16_epi32(words[1][i])};
#pragma GCC unroll 4
            for (int nibble = 0; nibble < 4; ++nibble) {
                __m512 weights[2];
                for (size_t half = 0; half < 2; ++half) {
                    const __m512i index = _mm512_srli_epi32(codes[half], 4 * nibble);  // the permute reads four bits
                    weights[half] = _mm512_fmadd_ps(_mm512_permutexvar_ps(index, numbers), scales[half], zeros[half]);
                }
                const size_t pair = i / 4 * 16 + static_cast<size_t>(nibble) * 4 + i % 4;
                store(panel + pair * 2 * kStrip, _mm512_cvtne2ps_pbh(weights[1], weights[0]));
            }
        }
    }
}

}  // namespace
}  // namespace nk::cpu
