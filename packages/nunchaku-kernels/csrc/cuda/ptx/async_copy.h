// Copies from global to shared memory that pass no registers (sm_80).
#pragma once

#include <cstdint>

#include "shared.h"

namespace nk::cuda::ptx {

// 16 bytes through L2 only; zeros where `valid` is false, and then `source` is not read.
__device__ __forceinline__ void copy_16(uint32_t destination, const void* source, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(destination), "l"(source), "r"(valid ? 16 : 0)
                 : "memory");
}

// The same where `wanted`; nothing happens elsewhere.
__device__ __forceinline__ void copy_16_if(bool wanted, uint32_t destination, const void* source) {
    asm volatile(
        "{\n"
        ".reg .pred wanted;\n"
        "setp.ne.u32 wanted, %2, 0;\n"
        "@wanted cp.async.cg.shared.global [%0], [%1], 16;\n"
        "}" ::"r"(destination),
        "l"(source), "r"(static_cast<uint32_t>(wanted))
        : "memory");
}

// 4, 8 or 16 bytes through both caches; zeros where `valid` is false, and then `source` is not read.
template <int bytes>
__device__ __forceinline__ void copy_few(uint32_t destination, const void* source, bool valid) {
    static_assert(bytes == 4 || bytes == 8 || bytes == 16);
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(destination), "l"(source), "n"(bytes),
                 "r"(valid ? bytes : 0)
                 : "memory");
}

// Brings the line of this address to L2, which sees every write: what is read later is never old.
__device__ __forceinline__ void prefetch_to_l2(const void* source) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(source) : "memory");
}

__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most `pending` of this thread's groups are unfinished.
template <int pending>
__device__ __forceinline__ void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

}  // namespace nk::cuda::ptx
