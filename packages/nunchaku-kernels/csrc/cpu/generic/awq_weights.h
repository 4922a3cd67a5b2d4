// The sixteen possible values of a 4-bit weight of one (channel, group): round(code * scale + zero) in the scales' dtype.
#pragma once

#include <cmath>

#include "vec.h"

namespace nk::cpu {
namespace {

template <class T>
NK_INLINE void awq_values(T scale, T zero, float values[16]) {
    T rounded[16];
    for (size_t half = 0; half < 2; ++half) {
        const float first = static_cast<float>(8 * half);
        const vf codes = vf{0, 1, 2, 3, 4, 5, 6, 7} + first;
        vf exact;
        if constexpr (sizeof(T) == 2) {
            // A 4-bit code times an 11-bit or 8-bit significand is exact in fp32: only the sum rounds, fused or not.
            exact = codes * to_float(scale) + to_float(zero);
        } else {
            for (size_t i = 0; i < kLanes; ++i) exact[i] = std::fma(codes[i], to_float(scale), to_float(zero));
        }
        store_floats(rounded + half * kLanes, exact);
    }
    for (size_t i = 0; i < 16; ++i) values[i] = to_float(rounded[i]);
}

}  // namespace
}  // namespace nk::cpu
