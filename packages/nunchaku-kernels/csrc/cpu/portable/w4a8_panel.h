// W4A8 panel kernels in plain C++: the fallback, and the twin every other instruction set is tested against.
#pragma once

#include "../../numerics/layout.h"
#include "../../numerics/w4a8.h"
#include "../kernels.h"

namespace nk::cpu {
namespace {

void decode_panel(const uint8_t* qweight, const int16_t* multipliers, size_t padded_k, size_t n0, size_t channels,
                  size_t k0, size_t inputs, int8_t* panel) {
    for (size_t n = 0; n < channels; ++n)
        for (size_t k = 0; k < inputs; ++k) {
            const uint8_t* strip = qweight + qweight_strip_offset(n0 + n, k0 + k, padded_k);
            const size_t nibble = qweight_strip_nibble(n, k);
            const int code = sign_extend_nibble(strip[nibble / 2] >> (nibble % 2 * 4) & 15);
            const int multiplier = multipliers[(n0 + n) * (padded_k / kGroup) + (k0 + k) / kGroup];
            panel[n / kStrip * kStrip * inputs + (k / 4 * kStrip + n % kStrip) * 4 + k % 4] =
                w4a8_decode(code, multiplier);
        }
}

void accumulate_panel(const int8_t* codes, size_t stride, size_t tokens, const int8_t* panel, size_t channels,
                      size_t inputs, bool accumulate, int32_t* sums) {
    for (size_t m = 0; m < tokens; ++m)
        for (size_t n0 = 0; n0 < channels; n0 += kStrip) {
            const int8_t* strip = panel + n0 * inputs;
            int32_t* out = sums + m * channels + n0;
            int32_t partial[kStrip] = {};
            for (size_t k = 0; k < inputs; k += 4) {
                const int8_t* t = codes + m * stride + k;
                for (size_t n = 0; n < kStrip; ++n)
                    for (size_t i = 0; i < 4; ++i) partial[n] += t[i] * strip[(k * kStrip) + n * 4 + i];
            }
            for (size_t n = 0; n < kStrip; ++n) out[n] = accumulate ? out[n] + partial[n] : partial[n];
        }
}

}  // namespace
}  // namespace nk::cpu
