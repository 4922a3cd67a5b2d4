// Lookup of AWQ codes in a table of sixteen values by one sixteen-lane permute.
#pragma once

#include <immintrin.h>

#include "../generic/awq_weights.h"

namespace nk::cpu {
namespace {

NK_INLINE __m512 sixteen_values(const ValueTable& table) {
    return _mm512_insertf32x8(_mm512_castps256_ps512(reinterpret_cast<__m256>(table.low)),
                              reinterpret_cast<__m256>(table.high), 1);
}

// Weights of one channel for inputs 8 nibble + 0..7 and 32 + 8 nibble + 0..7.
NK_INLINE __m512 lookup_sixteen(const uint16_t* words, __m512 values, int nibble) {
    const __m512i codes = _mm512_srli_epi32(_mm512_cvtepu16_epi32(load<__m256i>(words)), 4 * nibble);
    return _mm512_permutexvar_ps(codes, values);  // the permute reads four bits
}

NK_INLINE void lookup(const uint16_t* words, const ValueTable& table, vf weights[8]) {
    const __m512 values = sixteen_values(table);
#pragma GCC unroll 4
    for (int nibble = 0; nibble < 4; ++nibble) {
        const __m512 found = lookup_sixteen(words, values, nibble);
        weights[nibble] = reinterpret_cast<vf>(_mm512_castps512_ps256(found));
        weights[4 + nibble] = reinterpret_cast<vf>(_mm512_extractf32x8_ps(found, 1));
    }
}

}  // namespace
}  // namespace nk::cpu
