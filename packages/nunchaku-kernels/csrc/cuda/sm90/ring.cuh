// Rings of stages in shared memory, which barriers hand from those who fill them to those who read them.
#pragma once

#include <cstdint>

namespace nk::cuda::sm90 {

// A position in a ring of stages and the parity of its current phase.
template <int stages>
struct Ring {
    int stage = 0;
    uint32_t parity = 0;
    __device__ __forceinline__ void advance() {
        if (++stage == stages) stage = 0, parity ^= 1;
    }
};

}  // namespace nk::cuda::sm90
