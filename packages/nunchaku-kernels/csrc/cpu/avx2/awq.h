// AWQ-ordered 4-bit weights times tokens, and decoded into panels.
#pragma once

#include "../../numerics/layout.h"
#include "../generic/awq_weights.h"
#include "../kernels.h"

namespace nk::cpu {
namespace {

// Weights of one channel for 64 inputs, in order; awq_lookup.h of each instruction set defines it.
NK_INLINE void lookup(const uint16_t* words, const ValueTable& table, vf weights[8]);

// Four channels x eight inputs to dst[input * ld + channel].
NK_INLINE void store_transposed(const vf rows[4], float* dst, size_t ld) {
    const __m256 a = reinterpret_cast<__m256>(rows[0]), b = reinterpret_cast<__m256>(rows[1]);
    const __m256 c = reinterpret_cast<__m256>(rows[2]), d = reinterpret_cast<__m256>(rows[3]);
    const __m256 ab[2] = {_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b)};
    const __m256 cd[2] = {_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d)};
    for (size_t i = 0; i < 4; ++i) {  // inputs i and i + 4
        const __m256 even = _mm256_shuffle_ps(ab[i / 2], cd[i / 2], 0x44),
                     odd = _mm256_shuffle_ps(ab[i / 2], cd[i / 2], 0xee);
        const __m256 pair = i % 2 ? odd : even;
        _mm_storeu_ps(dst + i * ld, _mm256_castps256_ps128(pair));
        _mm_storeu_ps(dst + (i + 4) * ld, _mm256_extractf128_ps(pair, 1));
    }
}

void awq_decode(const AwqQuad& quad, float* dst, size_t ld) {
    with_element_type(quad.dtype, [&](auto type) {
        ValueTable tables[4] = {};
        for (size_t k = 0; k < quad.inputs; k += kGroup) {
            if (k % quad.group_size == 0)
                for (size_t n = 0; n < 4; ++n) tables[n] = value_table<decltype(type)>(quad, n, k / quad.group_size);
            vf weights[4][8];
            for (size_t n = 0; n < 4; ++n) lookup(quad.words + k + n * 16, tables[n], weights[n]);
            for (size_t i = 0; i < 8; ++i) {
                const vf rows[4] = {weights[0][i], weights[1][i], weights[2][i], weights[3][i]};
                store_transposed(rows, dst + (k + i * 8) * ld, ld);
            }
        }
    });
}

template <size_t kCount, class T>
NK_INLINE void product_tokens(const AwqQuad& quad, const float* x, float* y, size_t ldy) {
    constexpr size_t kChains = kCount == 1 ? 4 : 2;  // independent sums hide the latency of the multiply-add
    for (size_t n = 0; n < 4; ++n) {
        vf acc[kCount][kChains] = {};
        for (size_t k = 0, group = 0; k < quad.inputs; ++group) {
            const ValueTable table = value_table<T>(quad, n, group);
            const size_t end = k + quad.group_size < quad.inputs ? k + quad.group_size : quad.inputs;
            for (; k < end; k += kGroup) {
                // A channel reads a quarter of each 128-byte block: prefetch its share of the next quad.
                _mm_prefetch(reinterpret_cast<const char*>(quad.words + quad.inputs + k + n * 16), _MM_HINT_T0);
                vf weights[8];
                lookup(quad.words + k + n * 16, table, weights);
                for (size_t m = 0; m < kCount; ++m)
                    for (size_t i = 0; i < 8; ++i) {
                        vf& sum = acc[m][i % kChains];
                        sum = multiply_add(weights[i], load<vf>(x + m * quad.inputs + k + i * 8), sum);
                    }
            }
        }
        for (size_t m = 0; m < kCount; ++m) {
            vf sum = acc[m][0];
            for (size_t i = 1; i < kChains; ++i) sum += acc[m][i];
            for (size_t i = 0; i < kLanes; ++i) y[m * ldy + n] += sum[i];
        }
    }
}

void awq_product(const AwqQuad& quad, const float* x, size_t tokens, float* y, size_t ldy) {
    with_element_type(quad.dtype, [&](auto type) {
        size_t m = 0;
        for (; m + 2 <= tokens; m += 2) product_tokens<2, decltype(type)>(quad, x + m * quad.inputs, y + m * ldy, ldy);
        if (m < tokens) product_tokens<1, decltype(type)>(quad, x + m * quad.inputs, y + m * ldy, ldy);
    });
}

}  // namespace
}  // namespace nk::cpu
