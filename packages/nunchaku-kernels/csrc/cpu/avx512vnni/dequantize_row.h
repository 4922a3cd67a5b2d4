// From exact int32 sums to fp32, as generic/epilogue.h, sixteen at a time.
#pragma once

#include <immintrin.h>

#include "../generic/vec.h"

namespace nk::cpu {
namespace {

void dequantize_row_wide(const int32_t* sums, float ascale, const float* row_scales, const float* wcscales,
                         const float* bias, size_t channels, float* y) {
    for (size_t n = 0; n < channels; n += 16) {
        const __m512 sum = _mm512_mul_ps(_mm512_cvtepi32_ps(load<__m512i>(sums + n)), _mm512_set1_ps(ascale));
        __m512 value = _mm512_mul_ps(sum, _mm512_loadu_ps(row_scales + n));
        if (wcscales) value = _mm512_mul_ps(value, _mm512_loadu_ps(wcscales + n));
        if (bias) value = _mm512_add_ps(value, _mm512_loadu_ps(bias + n));
        _mm512_storeu_ps(y + n, value);
    }
}

}  // namespace
}  // namespace nk::cpu
