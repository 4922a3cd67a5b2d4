// Group scales of 16 output channels folded into row scales and multipliers: the formulas of numerics/w4a8.h, on
// vectors. In the published order the 16 scales of a group lie together, channels 2i, 2i + 1, 2i + 8, 2i + 9 at 4i.
#pragma once

#include "../../numerics/layout.h"
#include "vec.h"

namespace nk::cpu {
namespace {

typedef uint8_t bytes16 __attribute__((vector_size(16)));
typedef uint8_t bytes32 __attribute__((vector_size(32)));
typedef uint64_t words2 __attribute__((vector_size(16)));
typedef uint8_t bytes4 __attribute__((vector_size(4)));
typedef int32_t vi4 __attribute__((vector_size(16)));
typedef float vf4 __attribute__((vector_size(16)));
typedef double vd __attribute__((vector_size(32)));
typedef int64_t vl __attribute__((vector_size(32)));

template <class V>
NK_INLINE V larger(V a, V b) {
    return a > b ? a : b;
}

// |code| of 4-bit codes, one in each byte: 0 .. 7 are themselves, 8 .. 15 stand for -8 .. -1.
NK_INLINE bytes32 magnitudes(bytes32 codes) {
    const bytes32 negated = 16 - codes;
    return codes < negated ? codes : negated;
}

// Largest |code| of each channel in a (16 channels x 64 inputs) sub-tile, in published order.
NK_INLINE void largest_codes(const uint8_t* strip, uint8_t* largest) {
    for (size_t c = 0; c < 8; ++c) {  // 64 bytes of channels c and c + 8, eight bytes of each in turn
        bytes32 most{};
        for (size_t i = 0; i < 64; i += 32) {
            const bytes32 packed = load<bytes32>(strip + c * 64 + i);
            most = larger(most, larger(magnitudes(packed & 15), magnitudes(packed >> 4)));
        }
        const uint8_t* halves = reinterpret_cast<const uint8_t*>(&most);
        bytes16 both = larger(load<bytes16>(halves), load<bytes16>(halves + 16));
        for (int distance = 32; distance >= 8; distance /= 2)
            both = larger(both, reinterpret_cast<bytes16>(reinterpret_cast<words2>(both) >> distance));
        largest[c / 2 * 4 + c % 2] = both[0];
        largest[c / 2 * 4 + c % 2 + 2] = both[8];
    }
}

NK_INLINE vd select(vl mask, vd yes, vd no) {
    return reinterpret_cast<vd>((mask & reinterpret_cast<vl>(yes)) | (~mask & reinterpret_cast<vl>(no)));
}

NK_INLINE vd absolute(vd value) { return reinterpret_cast<vd>(reinterpret_cast<vl>(value) & INT64_MAX); }

NK_INLINE vd load_doubles(const float* src) { return __builtin_convertvector(load<vf4>(src), vd); }
NK_INLINE vd load_doubles(const uint8_t* src) {
    return __builtin_convertvector(__builtin_convertvector(load<bytes4>(src), vi4), vd);
}

void fold_strip(const uint8_t* qweight, const void* wscales, DType dtype, size_t groups, float* scales,
                uint8_t* largest, float* row_scales, int16_t* multipliers) {
    for (size_t g = 0; g < groups; ++g) largest_codes(qweight + g * (kChannelBlock * kGroup / 2), largest + g * kStrip);
    with_element_type(dtype, [&](auto type) {
        for (size_t g = 0; g < groups; ++g)
            copy_to_float(static_cast<const decltype(type)*>(wscales) + g * kChannelBlock, kStrip, scales + g * kStrip);
    });
    for (size_t p = 0; p < kStrip; p += 4) {
        vd row_maximum{};
        for (size_t at = p; at < groups * kStrip; at += kStrip) {
            const vd magnitude = absolute(load_doubles(largest + at) * load_doubles(scales + at));
            row_maximum =
                select((magnitude > row_maximum) | (magnitude != magnitude), magnitude, row_maximum);  // NaN stays
        }
        const vd row_scale = select(row_maximum == 0.0, vd{} + 1.0, row_maximum / 127.0);
        constexpr size_t kChannel[4] = {0, 1, 8, 9};
        for (size_t i = 0; i < 4; ++i) row_scales[p / 2 + kChannel[i]] = static_cast<float>(row_scale[i]);
        for (size_t g = 0; g < groups; ++g) {
            const vd codes = load_doubles(largest + g * kStrip + p);
            const vd steps = 128.0 * load_doubles(scales + g * kStrip + p) / row_scale;
            const vd shifter = vd{} + 6755399441055744.0;  // 1.5 * 2^52: the rounded integer lands in the low bits
            const vd shifted = steps + shifter;
            const vl usable = (absolute(shifted - shifter) < 16384.0) & (codes != 0.0);  // not so for NaN
            const vl multiplier = 2 * (reinterpret_cast<vl>(shifted) - reinterpret_cast<vl>(shifter)) & usable;
            for (size_t i = 0; i < 4; ++i)
                multipliers[(p / 2 + kChannel[i]) * groups + g] = static_cast<int16_t>(multiplier[i]);
        }
    }
}

}  // namespace
}  // namespace nk::cpu
