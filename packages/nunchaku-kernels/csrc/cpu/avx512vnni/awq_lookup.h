// Lookup of AWQ codes in a table of sixteen values by one sixteen-lane permute.
#pragma once

#include <immintrin.h>

#include "../generic/awq_weights.h"

namespace nk::cpu {
namespace {

// A 16-bit word holds inputs j, j + 8, j + 16, j + 24.
NK_INLINE void lookup(const uint16_t* words, const ValueTable& table, vf weights[8]) {
    const __m512 values = _mm512_insertf32x8(_mm512_castps256_ps512(reinterpret_cast<__m256>(table.low)),
                                             reinterpret_cast<__m256>(table.high), 1);
    const __m512i codes = _mm512_cvtepu16_epi32(load<__m256i>(words));
#pragma GCC unroll 4
    for (int nibble = 0; nibble < 4; ++nibble) {  // the permute reads four bits
        const __m512 found = _mm512_permutexvar_ps(_mm512_srli_epi32(codes, 4 * nibble), values);
        weights[nibble] = reinterpret_cast<vf>(_mm512_castps512_ps256(found));
        weights[4 + nibble] = reinterpret_cast<vf>(_mm512_extractf32x8_ps(found, 1));
    }
}

}  // namespace
}  // namespace nk::cpu
