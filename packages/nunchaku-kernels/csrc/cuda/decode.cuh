// 4-bit weights to int8 in registers, bit-identical to w4a8_decode (numerics/w4a8.h).
#pragma once

#include <cstdint>

namespace nk::cuda {

// The codes of a word that are decoded together, at their place after a shift.
__device__ __forceinline__ uint32_t code_mask() {
    uint32_t mask;
    asm volatile("mov.u32 %0, 0x000f000f;" : "=r"(mask));
    return mask;
}

// The multiplier of one group of one output channel, and the constant that goes with it for codes raised by 8.
struct GroupMultiplier {
    uint32_t factor, offset, mask;

    // The mask is that of `code_mask`.
    __device__ __forceinline__ GroupMultiplier(uint32_t multiplier, uint32_t code_mask)
        : factor(multiplier), offset((129u - 8u * multiplier) * 0x10001u), mask(code_mask) {}
};

// Eight codes of one word to eight int8 values: inputs 0, 4, 1, 5 in `low`, inputs 2, 6, 3, 7 in `high`.
//
// Two codes at a time, one in each 16-bit half: (q + 8) m + (129 - 8 m) = q m + 129, whose upper byte is the value. The
// lower half may borrow one from the upper, whose upper byte that cannot change: m is even and 129 odd.
__device__ __forceinline__ void decode(uint32_t codes, GroupMultiplier m, uint32_t& low, uint32_t& high) {
    const auto pair = [&](int shift) {
        uint32_t raised;  // (codes & mask) ^ 8, in one instruction only if the mask is in a register
        asm("lop3.b32 %0, %1, %2, %3, 0x6a;" : "=r"(raised) : "r"(codes >> shift), "r"(m.mask), "n"(0x00080008));
        return raised * m.factor + m.offset;
    };
    low = __byte_perm(pair(0), pair(4), 0x7531);
    high = __byte_perm(pair(8), pair(12), 0x7531);
}

}  // namespace nk::cuda
