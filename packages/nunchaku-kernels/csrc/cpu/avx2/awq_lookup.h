// Lookup of AWQ codes in a table of sixteen values by two eight-lane permutes.
#pragma once

#include <immintrin.h>

#include "../generic/awq_weights.h"

namespace nk::cpu {
namespace {

// A 16-bit word holds inputs j, j + 8, j + 16, j + 24.
NK_INLINE void lookup(const uint16_t* words, const ValueTable& table, vf weights[8]) {
    for (size_t half = 0; half < 2; ++half) {
        const __m256 low = reinterpret_cast<__m256>(table.low), high = reinterpret_cast<__m256>(table.high);
        const __m256i codes = _mm256_cvtepu16_epi32(load<__m128i>(words + half * 8));
#pragma GCC unroll 4
        for (int nibble = 0; nibble < 4; ++nibble) {
            const __m256i index = _mm256_srli_epi32(codes, 4 * nibble);             // the permutes read three bits
            const __m256i select_high = _mm256_slli_epi32(codes, 28 - 4 * nibble);  // the fourth, as sign bit
            weights[half * 4 + nibble] = reinterpret_cast<vf>(_mm256_blendv_ps(_mm256_permutevar8x32_ps(low, index),
                                                                               _mm256_permutevar8x32_ps(high, index),
                                                                               _mm256_castsi256_ps(select_high)));
        }
    }
}

}  // namespace
}  // namespace nk::cpu
