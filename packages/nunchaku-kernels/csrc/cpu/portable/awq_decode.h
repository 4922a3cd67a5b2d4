// AWQ-ordered 4-bit weights to fp32 through a table of sixteen values per (channel, group).
#pragma once

#include "../../numerics/layout.h"
#include "../generic/awq_weights.h"
#include "../kernels.h"

namespace nk::cpu {
namespace {

template <class T>
void decode_quad(const uint16_t* quad, const T* scales, const T* zeros, size_t scale_stride, size_t inputs,
                 size_t group_size, float* dst, size_t ld) {
    float values[16] = {};
    for (size_t n = 0; n < 4; ++n)
        for (size_t k = 0; k < inputs; ++k) {
            if (k % group_size == 0) {
                const size_t position = k / group_size * scale_stride + n;
                awq_values(scales[position], zeros[position], values);
            }
            dst[k * ld + n] = values[quad[awq_word(n, k, inputs)] >> (4 * awq_nibble(k)) & 15];
        }
}

void awq_decode(const uint16_t* quad, const void* scales, const void* zeros, DType dtype, size_t scale_stride,
                size_t inputs, size_t group_size, float* dst, size_t ld) {
    const auto decode = [&](auto type) {
        using T = decltype(type);
        decode_quad(quad, static_cast<const T*>(scales), static_cast<const T*>(zeros), scale_stride, inputs,
                    group_size, dst, ld);
    };
    if (dtype == DType::f32) return decode(float{});
    if (dtype == DType::f16) return decode(F16{});
    decode(BF16{});
}

}  // namespace
}  // namespace nk::cpu
