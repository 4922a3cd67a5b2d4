// Barriers in shared memory at which warps of a block arrive before they wait (sm_80).
#pragma once

#include <cstdint>

namespace nk::cuda::ptx {

__device__ __forceinline__ void init_block_barrier(uint32_t barrier, int arrivals) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// What this thread read and wrote before comes before everything behind a wait for the same phase.
__device__ __forceinline__ void arrive_at_block_barrier(uint32_t barrier) {
    asm volatile(
        "{\n"
        ".reg .b64 state;\n"
        "mbarrier.arrive.shared.b64 state, [%0];\n"
        "}" ::"r"(barrier)
        : "memory");
}

// Waits for the end of the phase of this parity; the first phase has parity 0.
__device__ __forceinline__ void wait_for_block_barrier(uint32_t barrier, uint32_t parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.test_wait.parity.shared.b64 done, [%0], %1;\n"
        "@!done bra again;\n"
        "}" ::"r"(barrier),
        "r"(parity)
        : "memory");
}

}  // namespace nk::cuda::ptx
