// Copies of fewer than 16 bytes from global to shared memory that pass no registers (sm_80).
#pragma once

#include <cstdint>

namespace nk::cuda::ptx {

// 4 or 8 bytes; zeros where `valid` is false, and then `source` is not read.
template <int bytes>
__device__ __forceinline__ void copy_few(uint32_t destination, const void* source, bool valid) {
    static_assert(bytes == 4 || bytes == 8);
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(destination), "l"(source), "n"(bytes),
                 "r"(valid ? bytes : 0)
                 : "memory");
}

}  // namespace nk::cuda::ptx
