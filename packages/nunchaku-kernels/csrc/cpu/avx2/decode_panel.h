// Published 4-bit weights to a W4A8 panel. Within a group a channel's code can become only 16 int8 values: they are
// computed once and looked up by byte shuffles.
#pragma once

#include "../../numerics/layout.h"
#include "../kernels.h"
#include "transpose.h"

namespace nk::cpu {
namespace {

// q8 of codes 0..7, -8..-1 under one multiplier, in both halves: numerics/w4a8.h, w4a8_decode, sixteen at a time.
NK_INLINE __m256i decoded_values(int16_t multiplier) {
    const __m256i codes = _mm256_setr_epi16(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1);
    const __m256i products = _mm256_mullo_epi16(codes, _mm256_set1_epi16(multiplier));
    const __m256i high = _mm256_srai_epi16(_mm256_add_epi16(products, _mm256_set1_epi16(129)), 8);
    return _mm256_permute4x64_epi64(_mm256_packs_epi16(high, high), 0x88);
}

// 64 codes of a channel, as they come out of its four lanes, to int8 in input order: [k / 8 in 0 4 1 5] [2 6 3 7].
NK_INLINE void decode_channel(__m256i packed, __m256i values, __m256i& first, __m256i& second) {
    const __m256i low_nibbles = _mm256_set1_epi8(15);
    const __m256i even = _mm256_shuffle_epi8(values, _mm256_and_si256(packed, low_nibbles));
    const __m256i odd = _mm256_shuffle_epi8(values, _mm256_and_si256(_mm256_srli_epi16(packed, 4), low_nibbles));
    first = _mm256_unpacklo_epi8(even, odd);
    second = _mm256_unpackhi_epi8(even, odd);
}

// While a panel is multiplied, memory would idle: ask for the weights of the next small panel (128 x 128 codes).
constexpr size_t kPrefetchBytes = kChannelBlock * 128 / 2;

// One 16-channel x 64-input sub-tile (512 bytes) to its 1024 bytes of the panel.
NK_INLINE void decode_strip(const uint8_t* strip, const int16_t* multipliers, size_t groups, int8_t* panel) {
    // Word j of a transposed row holds the inputs 4 * kWord[half][j] ... + 3 of eight channels.
    constexpr size_t kWord[2][8] = {{0, 1, 8, 9, 2, 3, 10, 11}, {4, 5, 12, 13, 6, 7, 14, 15}};
    __m256i words[2][2][8];  // [channels 0-7, 8-15][first, second half][channel]
    for (size_t c = 0; c < 8; ++c) {
        _mm_prefetch(reinterpret_cast<const char*>(strip + c * 64 + kPrefetchBytes), _MM_HINT_T0);
        const __m256i a = load<__m256i>(strip + c * 64), b = load<__m256i>(strip + c * 64 + 32);
        decode_channel(_mm256_unpacklo_epi64(a, b), decoded_values(multipliers[c * groups]), words[0][0][c],
                       words[0][1][c]);
        decode_channel(_mm256_unpackhi_epi64(a, b), decoded_values(multipliers[(c + 8) * groups]), words[1][0][c],
                       words[1][1][c]);
    }
    for (size_t channels = 0; channels < 2; ++channels)
        for (size_t half = 0; half < 2; ++half) {
            transpose_8x8(words[channels][half]);
            for (size_t j = 0; j < 8; ++j) store(panel + kWord[half][j] * 64 + channels * 32, words[channels][half][j]);
        }
}

void decode_panel(const uint8_t* qweight, const int16_t* multipliers, size_t padded_k, size_t n0, size_t channels,
                  size_t k0, size_t inputs, int8_t* panel) {
    const size_t groups = padded_k / kGroup;
    // Inputs outside: the published order stores all strips of 128 channels next to each other.
    for (size_t k = 0; k < inputs; k += kGroup)
        for (size_t n = 0; n < channels; n += kStrip)
            decode_strip(qweight + qweight_strip_offset(n0 + n, k0 + k, padded_k),
                         multipliers + (n0 + n) * groups + (k0 + k) / kGroup, groups, panel + n * inputs + k * kStrip);
}

}  // namespace
}  // namespace nk::cpu
