// 8 x 8 transposition of 32-bit elements, the step from fragment order to panels.
#pragma once

#include <immintrin.h>

#include "../generic/vec.h"

namespace nk::cpu {
namespace {

// On return row[j] holds the former column j.
NK_INLINE void transpose_8x8(__m256i row[8]) {
    __m256i pair[8], quad[8];
    for (int i = 0; i < 8; i += 2) {
        pair[i] = _mm256_unpacklo_epi32(row[i], row[i + 1]);
        pair[i + 1] = _mm256_unpackhi_epi32(row[i], row[i + 1]);
    }
    for (int i = 0; i < 8; i += 4)
        for (int j = 0; j < 2; ++j) {
            quad[i + 2 * j] = _mm256_unpacklo_epi64(pair[i + j], pair[i + j + 2]);
            quad[i + 2 * j + 1] = _mm256_unpackhi_epi64(pair[i + j], pair[i + j + 2]);
        }
    for (int j = 0; j < 4; ++j) {
        row[j] = _mm256_permute2x128_si256(quad[j], quad[j + 4], 0x20);
        row[j + 4] = _mm256_permute2x128_si256(quad[j], quad[j + 4], 0x31);
    }
}

}  // namespace
}  // namespace nk::cpu
