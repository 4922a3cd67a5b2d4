// Arithmetic that C++ cannot ask for in one instruction (sm_80).
#pragma once

namespace nk::cuda::ptx {

// max(a, |b|); NaN if one of them is.
__device__ __forceinline__ float max_magnitude(float a, float b) {
    float largest;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(largest) : "f"(a), "f"(fabsf(b)));
    return largest;
}

}  // namespace nk::cuda::ptx
