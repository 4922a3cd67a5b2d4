// The sixteen possible values of a 4-bit weight in one (channel, group): code * scale + zero, rounded to the scales'
// dtype.
#pragma once

#include "../kernels.h"
#include "vec.h"

namespace nk::cpu {
namespace {

struct ValueTable {
    vf low, high;  // of codes 0-7 and 8-15
};

template <class T>
NK_INLINE ValueTable value_table(const AwqQuad& quad, size_t channel, size_t group) {
    const size_t position = group * quad.scale_stride + channel;
    const float scale = quad.scales[position], zero = quad.zeros[position];
    // A 4-bit code times a 16-bit scale is exact in fp32: only the sum rounds, fused or not.
    const vf codes = {0, 1, 2, 3, 4, 5, 6, 7};
    return {round_to(T{}, codes * scale + zero), round_to(T{}, (codes + 8.0f) * scale + zero)};
}

}  // namespace
}  // namespace nk::cpu
