// Element types that cross the Python boundary, and their exact conversion to and from fp32.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

// Internal linkage: several translation units compile these headers with different instruction sets, and the linker
// must not keep one of the copies for all.
#if defined(__CUDACC__)
#define NK_FUNCTION __host__ __device__ static inline
#else
#define NK_FUNCTION static inline
#endif

namespace nk {

// The numbers are the dtype codes of the Python side (nunchaku_kernels._C).
enum class DType : int { f32 = 0, f16 = 1, bf16 = 2 };

NK_FUNCTION bool is_dtype(int code) { return code >= 0 && code <= 2; }
NK_FUNCTION size_t size_of(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

NK_FUNCTION float float_from_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

NK_FUNCTION uint32_t bits_from_float(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

NK_FUNCTION float bf16_to_float(uint16_t bits) { return float_from_bits(static_cast<uint32_t>(bits) << 16); }

NK_FUNCTION uint16_t bf16_from_float(float value) {
    const uint32_t bits = bits_from_float(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>(bits >> 16 | 0x40);  // keep NaN a NaN
    return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

NK_FUNCTION float f16_to_float(uint16_t bits) {
    const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16;
    const uint32_t magnitude = bits & 0x7fffu;
    if (magnitude >= 0x7c00u) return float_from_bits(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
    if (magnitude >= 0x0400u) return float_from_bits(sign | ((magnitude << 13) + (112u << 23)));
    const float subnormal = static_cast<float>(magnitude) * 5.9604644775390625e-8f;  // 2^-24, exact
    return sign ? -subnormal : subnormal;
}

NK_FUNCTION uint16_t f16_from_float(float value) {
    const uint32_t bits = bits_from_float(value);
    const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000u);
    const uint32_t magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u | (magnitude >> 13 & 0x3ffu));
    if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // 65520 and above round to infinity
    if (magnitude < 0x38800000u) {  // below 2^-14 the spacing is 2^-24: adding 0.5 aligns the bits, rounding to even
        const float aligned = float_from_bits(magnitude) + 0.5f;
        return static_cast<uint16_t>(sign | (bits_from_float(aligned) - 0x3f000000u));
    }
    const uint32_t rebased = magnitude - (112u << 23);
    return static_cast<uint16_t>(sign | ((rebased + 0xfffu + (rebased >> 13 & 1)) >> 13));
}

NK_FUNCTION float load_float(const void* data, DType dtype, size_t index) {
    if (dtype == DType::f32) return static_cast<const float*>(data)[index];
    const uint16_t bits = static_cast<const uint16_t*>(data)[index];
    return dtype == DType::f16 ? f16_to_float(bits) : bf16_to_float(bits);
}

// Distinct C++ types for the two 16-bit formats, so that templates can tell them apart.
struct F16 {
    uint16_t bits;
};
struct BF16 {
    uint16_t bits;
};

NK_FUNCTION float to_float(float value) { return value; }
NK_FUNCTION float to_float(F16 value) { return f16_to_float(value.bits); }
NK_FUNCTION float to_float(BF16 value) { return bf16_to_float(value.bits); }

}  // namespace nk
