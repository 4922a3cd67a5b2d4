// Sums of the warps of a block that share out the inputs.
#pragma once

namespace nk::cuda::sm80 {

// Adds them up in the first such warp, in a fixed order. S says how warps are arranged; a lane has its share in `sums`.
template <class S, class Sum, int strips, int blocks>
__device__ __forceinline__ void add_up(Sum* scratch, int n_warp, int k_warp, int lane, Sum (&sums)[strips][blocks][4]) {
    static_assert(strips * blocks * 4 == S::kAccumulators);
    if constexpr (S::kKWarps > 1) {
        Sum* flat = &sums[0][0][0];
        if (k_warp) {
            Sum* mine = scratch + ((k_warp - 1) * S::kNWarps + n_warp) * S::kAccumulators * 32 + lane;
#pragma unroll
            for (int i = 0; i < S::kAccumulators; ++i) mine[32 * i] = flat[i];
        }
        __syncthreads();
        if (!k_warp) {
#pragma unroll
            for (int other = 0; other < S::kKWarps - 1; ++other)
#pragma unroll
                for (int i = 0; i < S::kAccumulators; ++i)
                    flat[i] += scratch[((other * S::kNWarps + n_warp) * S::kAccumulators + i) * 32 + lane];
        }
        __syncthreads();
    }
}

}  // namespace nk::cuda::sm80
