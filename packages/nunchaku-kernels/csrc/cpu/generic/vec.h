// Eight fp32 lanes as a compiler vector type: the same source serves every instruction set. Everything under generic/
// has internal linkage, because each translation unit compiles it with other flags.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__FMA__) || defined(__F16C__)
#include <immintrin.h>
#endif

#include "../../numerics/dtype.h"

#define NK_INLINE inline __attribute__((always_inline))

namespace nk::cpu {
namespace {

constexpr size_t kLanes = 8;

typedef float vf __attribute__((vector_size(32)));
typedef int32_t vi __attribute__((vector_size(32)));
typedef uint32_t vu __attribute__((vector_size(32)));
typedef uint16_t vh __attribute__((vector_size(16)));
typedef int8_t vb __attribute__((vector_size(8)));

NK_INLINE vf splat(float value) { return vf{} + value; }

template <class V>
NK_INLINE V load(const void* src) {
    V value;
    memcpy(&value, src, sizeof value);
    return value;
}

template <class V>
NK_INLINE void store(void* dst, V value) {
    memcpy(dst, &value, sizeof value);
}

NK_INLINE vf select(vi mask, vf yes, vf no) {
    return reinterpret_cast<vf>((mask & reinterpret_cast<vi>(yes)) | (~mask & reinterpret_cast<vi>(no)));
}

// a * b + c; fused where the processor can, which only the fp32 tail of a product may use.
NK_INLINE vf multiply_add(vf a, vf b, vf c) {
#if defined(__FMA__)
    return reinterpret_cast<vf>(
        _mm256_fmadd_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b), reinterpret_cast<__m256>(c)));
#else
    return a * b + c;
#endif
}

NK_INLINE vf load_floats(const float* src) { return load<vf>(src); }
NK_INLINE vf load_floats(const BF16* src) {
    return reinterpret_cast<vf>(__builtin_convertvector(load<vh>(src), vu) << 16);
}
NK_INLINE vf load_floats(const F16* src) {
#if defined(__F16C__)
    return reinterpret_cast<vf>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(src))));
#else
    vf value;
    for (size_t i = 0; i < kLanes; ++i) value[i] = to_float(src[i]);
    return value;
#endif
}

// Nearest 16-bit value, half to even, in the low (f16: packed) bits.
NK_INLINE vu bf16_bits(vf value) {
    const vu bits = reinterpret_cast<vu>(value);
    const vu rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const vu quiet = (bits >> 16) | 0x40;
    const vu is_nan = reinterpret_cast<vu>(value != value);
    return (is_nan & quiet) | (~is_nan & rounded);
}
NK_INLINE vh f16_bits(vf value) {
#if defined(__F16C__)
    return reinterpret_cast<vh>(_mm256_cvtps_ph(reinterpret_cast<__m256>(value), _MM_FROUND_TO_NEAREST_INT));
#else
    vh bits;
    for (size_t i = 0; i < kLanes; ++i) bits[i] = f16_from_float(value[i]);
    return bits;
#endif
}

NK_INLINE void store_floats(float* dst, vf value) { store(dst, value); }
NK_INLINE void store_floats(BF16* dst, vf value) { store(dst, __builtin_convertvector(bf16_bits(value), vh)); }
NK_INLINE void store_floats(F16* dst, vf value) { store(dst, f16_bits(value)); }

// The values a store in that type would leave, still as fp32. For bf16, NaN must be one that arithmetic makes of bf16
// values: its low bits are 0.
NK_INLINE vf round_to(float, vf value) { return value; }
NK_INLINE vf round_to(BF16, vf value) {
    const vu bits = reinterpret_cast<vu>(value);
    return reinterpret_cast<vf>((bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000u);
}
NK_INLINE vf round_to(F16, vf value) {
    const vh bits = f16_bits(value);
    return load_floats(reinterpret_cast<const F16*>(&bits));
}

template <class T>
NK_INLINE void copy_to_float(const T* src, size_t count, float* dst) {
    size_t i = 0;
    for (; i + kLanes <= count; i += kLanes) store(dst + i, load_floats(src + i));
    for (; i < count; ++i) dst[i] = to_float(src[i]);
}

template <class T>
NK_INLINE void copy_from_float(const float* src, size_t count, T* dst) {
    size_t i = 0;
    for (; i + kLanes <= count; i += kLanes) store_floats(dst + i, load<vf>(src + i));
    if (i < count) {
        float padded[kLanes] = {};
        T rounded[kLanes];
        memcpy(padded, src + i, (count - i) * sizeof(float));
        store_floats(rounded, load<vf>(padded));
        memcpy(dst + i, rounded, (count - i) * sizeof(T));
    }
}

// Calls function(T{}) with the C++ type of a dtype.
template <class Function>
NK_INLINE void with_element_type(DType dtype, const Function& function) {
    if (dtype == DType::f32)
        function(float{});
    else if (dtype == DType::f16)
        function(F16{});
    else
        function(BF16{});
}

void to_float_array(const void* src, DType dtype, size_t count, float* dst) {
    with_element_type(dtype, [&](auto type) { copy_to_float(static_cast<const decltype(type)*>(src), count, dst); });
}

void from_float_array(const float* src, DType dtype, size_t count, void* dst) {
    with_element_type(dtype, [&](auto type) { copy_from_float(src, count, static_cast<decltype(type)*>(dst)); });
}

}  // namespace
}  // namespace nk::cpu
