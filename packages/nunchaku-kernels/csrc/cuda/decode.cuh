// 4-bit weights to int8 in registers, bit-identical to w4a8_decode (numerics/w4a8.h).
#pragma once

#include <cstdint>

#include "ptx/arithmetic.h"

namespace nk::cuda {

// The codes of a word that are decoded together, at their place after a shift. In a register: (codes & mask) ^ 8 is one
// instruction only if the mask is no constant.
__device__ __forceinline__ uint32_t code_mask() { return ptx::opaque(0x000f000fu); }

// The multiplier of one group of one output channel, and the constant that goes with it for codes raised by 8.
struct GroupMultiplier {
    uint32_t factor, offset, mask;

    // The mask is that of `code_mask`.
    __device__ __forceinline__ GroupMultiplier(uint32_t multiplier, uint32_t code_mask)
        : factor(multiplier), offset(multiplier * (0u - 0x80008u) + 0x810081u), mask(code_mask) {}  // (129 - 8 m) twice
};

// Eight codes of one word to eight int8 values: inputs 0, 4, 1, 5 in `low`, inputs 2, 6, 3, 7 in `high`.
//
// Two codes at a time, one in each 16-bit half: (q + 8) m + (129 - 8 m) = q m + 129, whose upper byte is the value. The
// lower half may borrow one from the upper, whose upper byte that cannot change: m is even and 129 odd.
__device__ __forceinline__ void decode(uint32_t codes, GroupMultiplier m, uint32_t& low, uint32_t& high) {
    const auto pair = [&](int shift) {
        return ptx::and_xor(codes >> shift, m.mask, 0x00080008u) * m.factor + m.offset;
    };
    low = __byte_perm(pair(0), pair(4), 0x7531);
    high = __byte_perm(pair(8), pair(12), 0x7531);
}

}  // namespace nk::cuda
