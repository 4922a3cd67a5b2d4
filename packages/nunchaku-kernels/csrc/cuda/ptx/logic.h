// Bitwise operations that the compiler does not merge by itself.
#pragma once

#include <cstdint>

namespace nk::cuda::ptx {

// (a & b) | c in one instruction, also where b and c are constants.
__device__ __forceinline__ uint32_t and_or(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t result;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(result) : "r"(a), "r"(b), "r"(c));
    return result;
}

}  // namespace nk::cuda::ptx
