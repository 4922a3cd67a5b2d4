// Arithmetic that C++ cannot ask for in one instruction (sm_80).
#pragma once

#include <cstdint>

namespace nk::cuda::ptx {

// max(a, |b|); NaN if one of them is.
__device__ __forceinline__ float max_magnitude(float a, float b) {
    float largest;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(largest) : "f"(a), "f"(fabsf(b)));
    return largest;
}

// (a & b) | c in one instruction, also where b and c are constants.
__device__ __forceinline__ uint32_t and_or(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t result;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(result) : "r"(a), "r"(b), "r"(c));
    return result;
}

// (a & b) ^ c, likewise.
__device__ __forceinline__ uint32_t and_xor(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t result;
    asm("lop3.b32 %0, %1, %2, %3, 0x6a;" : "=r"(result) : "r"(a), "r"(b), "r"(c));
    return result;
}

// A value that the compiler keeps in a register, instead of seeing through it or computing it again where it is needed.
__device__ __forceinline__ uint32_t opaque(uint32_t value) {
    uint32_t result;
    asm volatile("mov.u32 %0, %1;" : "=r"(result) : "r"(value));
    return result;
}

}  // namespace nk::cuda::ptx
