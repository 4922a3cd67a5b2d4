// fp32 activations of one token to int8, as generic/quantize_token.h in every bit, sixteen at a time.
#pragma once

#include <immintrin.h>

#include "../generic/quantize_token.h"

namespace nk::cpu {
namespace {

float quantize_token_wide(const float* x, size_t channels, float shift, const float* reciprocal, float* t,
                          int8_t* codes) {
    if (channels % 16) return quantize_token(x, channels, shift, reciprocal, t, codes);
    __m512i largest = _mm512_setzero_si512();  // of the bits of magnitudes, which compare like magnitudes
    for (size_t k = 0; k < channels; k += 16) {
        __m512 value = _mm512_add_ps(_mm512_loadu_ps(x + k), _mm512_set1_ps(shift));
        if (reciprocal) value = _mm512_mul_ps(value, _mm512_loadu_ps(reciprocal + k));
        _mm512_storeu_ps(t + k, value);
        largest =
            _mm512_max_epi32(largest, _mm512_and_si512(_mm512_castps_si512(value), _mm512_set1_epi32(0x7fffffff)));
    }
    const uint32_t maximum_bits = static_cast<uint32_t>(_mm512_reduce_max_epi32(largest));
    const TokenScale token(maximum_bits);
    if (!token.has_codes) {
        memset(codes, 0, channels);
        return token.scale;
    }
    for (size_t k = 0; k < channels; k += 16) {
        const __m512 scaled = _mm512_mul_ps(_mm512_loadu_ps(t + k), _mm512_set1_ps(token.factor));
        const __m512i rounded = _mm512_castps_si512(_mm512_add_ps(scaled, _mm512_set1_ps(kRounder)));
        store(codes + k, _mm512_cvtepi32_epi8(rounded));
    }
    return token.scale;
}

}  // namespace
}  // namespace nk::cpu
