// fp32 activations of one token to int8. Every operation is rounded by itself (the build forbids contraction), so that
// all instruction sets give the same bits.
#pragma once

#include "vec.h"

namespace nk::cpu {
namespace {

// In [2^23, 2^24) the spacing is 1: adding this rounds to an integer, half to even, and leaves it in the low bits.
constexpr float kRounder = 12582912.0f;  // 1.5 * 2^23
constexpr uint32_t kInfinityBits = 0x7f800000u;

// What a token's largest magnitude, as bits, makes of it: its scale, and the factor to its codes if any is not zero.
// Without codes are a token that is not finite, which gets NaN, zeros, and maxima below 2^-121.
struct TokenScale {
    explicit TokenScale(uint32_t maximum_bits) {
        const float maximum = float_from_bits(maximum_bits);
        factor = 127.0f / maximum;
        const bool finite = maximum_bits < kInfinityBits;
        has_codes = finite && bits_from_float(factor) != kInfinityBits;
        scale = has_codes ? maximum / 127.0f : finite ? 1.0f : float_from_bits(0x7fc00000u);
    }
    float factor, scale;
    bool has_codes;
};

float quantize_token(const float* x, size_t channels, float shift, const float* reciprocal, float* t, int8_t* codes) {
    const size_t whole = channels / kLanes * kLanes;
    // Magnitudes compare like their bit patterns, and Inf and NaN are the largest ones.
    vi largest{};
    for (size_t k = 0; k < whole; k += kLanes) {
        vf value = load<vf>(x + k) + shift;
        if (reciprocal) value *= load<vf>(reciprocal + k);
        store(t + k, value);
        const vi magnitude = reinterpret_cast<vi>(value) & 0x7fffffff;
        const vi greater = magnitude > largest;
        largest = (greater & magnitude) | (~greater & largest);
    }
    uint32_t maximum_bits = 0;
    for (size_t i = 0; i < kLanes; ++i)
        if (static_cast<uint32_t>(largest[i]) > maximum_bits) maximum_bits = static_cast<uint32_t>(largest[i]);
    for (size_t k = whole; k < channels; ++k) {
        t[k] = x[k] + shift;
        if (reciprocal) t[k] *= reciprocal[k];
        const uint32_t magnitude = bits_from_float(t[k]) & 0x7fffffffu;
        if (magnitude > maximum_bits) maximum_bits = magnitude;
    }

    const TokenScale token(maximum_bits);
    if (!token.has_codes) {
        memset(codes, 0, channels);
        return token.scale;
    }
    for (size_t k = 0; k < whole; k += kLanes) {
        const vf rounded = load<vf>(t + k) * token.factor + kRounder;
        store(codes + k, __builtin_convertvector(reinterpret_cast<vi>(rounded), vb));
    }
    for (size_t k = whole; k < channels; ++k)
        codes[k] = static_cast<int8_t>(bits_from_float(t[k] * token.factor + kRounder));
    return token.scale;
}

}  // namespace
}  // namespace nk::cpu
