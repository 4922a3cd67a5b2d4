// Kernels that start before the one in front of them has ended (sm_90; elsewhere they never do).
#pragma once

namespace nk::cuda::ptx {

// Waits until the kernels in front have ended and their writes are visible.
__device__ __forceinline__ void wait_for_kernels_before() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the next kernel start, if it was launched as `launch_early` does.
__device__ __forceinline__ void allow_next_kernel() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

}  // namespace nk::cuda::ptx
