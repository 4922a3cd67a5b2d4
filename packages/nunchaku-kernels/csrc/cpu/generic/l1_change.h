// How far a row of activations has moved: sums of magnitudes, in one pass. The order of additions is the same for all
// instruction sets and rows are summed apart, so that a sample's sum does not depend on what stands beside it.
#pragma once

#include "vec.h"

namespace nk::cpu {
namespace {

NK_INLINE vf magnitude(vf value) { return reinterpret_cast<vf>(reinterpret_cast<vi>(value) & 0x7fffffff); }

NK_INLINE float sum_lanes(vf value) {
    float sum = 0;
    for (size_t i = 0; i < kLanes; ++i) sum += value[i];
    return sum;
}

template <class T>
struct L1Sums {
    vf change{}, size{};

    NK_INLINE void add(const T* current, const T* origin, const T* previous) {
        vf residual = load_floats(current);
        if (origin) residual = round_to(T{}, residual - load_floats(origin));
        const vf old = load_floats(previous);
        change += magnitude(old - residual);
        size += magnitude(old);
    }
};

template <class T>
NK_INLINE void l1_change_of(const T* current, const T* origin, const T* previous, size_t channels, float* sums) {
    L1Sums<T> row;
    size_t k = 0;
    for (; k + kLanes <= channels; k += kLanes) row.add(current + k, origin ? origin + k : nullptr, previous + k);
    if (const size_t rest = (channels - k) * sizeof(T)) {
        T padded[3][kLanes] = {};
        memcpy(padded[0], current + k, rest);
        if (origin) memcpy(padded[1], origin + k, rest);
        memcpy(padded[2], previous + k, rest);
        row.add(padded[0], origin ? padded[1] : nullptr, padded[2]);
    }
    sums[0] = sum_lanes(row.change);
    sums[1] = sum_lanes(row.size);
}

void l1_change(const void* current, const void* origin, const void* previous, DType dtype, size_t channels,
               float* sums) {
    with_element_type(dtype, [&](auto type) {
        using T = decltype(type);
        l1_change_of(static_cast<const T*>(current), static_cast<const T*>(origin), static_cast<const T*>(previous),
                     channels, sums);
    });
}

}  // namespace
}  // namespace nk::cpu
