// AWQ-ordered weights with bf16 scales to panels of bf16 pairs.
#pragma once

#include <immintrin.h>

#include "../../numerics/layout.h"
#include "../avx512vnni/awq_lookup.h"
#include "../kernels.h"

namespace nk::cpu {
namespace {

// Four channels of a quad to panel[inputs / 2][16][2].
void awq_decode_bf16(const AwqQuad& quad, uint16_t* panel) {
    __m512 tables[4] = {};
    for (size_t k = 0; k < quad.inputs; k += kGroup) {
        if (k % quad.group_size == 0)
            for (size_t n = 0; n < 4; ++n) tables[n] = sixteen_values(value_table<BF16>(quad, n, k / quad.group_size));
        for (int nibble = 0; nibble < 4; ++nibble) {  // inputs 8 nibble + 0..7 and 32 + 8 nibble + 0..7
            __m256i pairs[4];
            for (size_t n = 0; n < 4; ++n) {
                const __m512i found = _mm512_castps_si512(lookup_sixteen(quad.words + k + n * 16, tables[n], nibble));
                pairs[n] = _mm512_cvtepi32_epi16(_mm512_srli_epi32(found, 16));
            }
            const __m256i low01 = _mm256_unpacklo_epi32(pairs[0], pairs[1]),
                          low23 = _mm256_unpacklo_epi32(pairs[2], pairs[3]);
            const __m256i high01 = _mm256_unpackhi_epi32(pairs[0], pairs[1]),
                          high23 = _mm256_unpackhi_epi32(pairs[2], pairs[3]);
            const __m256i rows[4] = {_mm256_unpacklo_epi64(low01, low23), _mm256_unpackhi_epi64(low01, low23),
                                     _mm256_unpacklo_epi64(high01, high23), _mm256_unpackhi_epi64(high01, high23)};
            uint16_t* dst = panel + (k / 2 + nibble * 4) * 2 * kStrip;
            for (size_t pair = 0; pair < 4; ++pair) {
                store(dst + pair * 2 * kStrip, _mm256_castsi256_si128(rows[pair]));
                store(dst + (16 + pair) * 2 * kStrip, _mm256_extracti128_si256(rows[pair], 1));
            }
        }
    }
}

}  // namespace
}  // namespace nk::cpu
