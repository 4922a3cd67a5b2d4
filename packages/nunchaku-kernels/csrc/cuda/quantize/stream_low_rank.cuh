// The warpgroup of quantize_stream that multiplies tiles by the low-rank factor.
#pragma once

#include "../ptx/wgmma.h"
#include "stream_place.cuh"

namespace nk::cuda::quantize {

// This CTA's part of the factor, rank-major in chunks of 64 channels, swizzled. For the CTA's first warps.
template <int kWarps, class Place>
__device__ void load_factor(const Place& place) {
    const Parameters& p = place.stream.common;
    constexpr int kBatch = 8;  // loads in flight
    const int lane = threadIdx.x % 32, tiles = p.rank / 16;
    const int steps = place.stream.cta_chunks * 4 * kRankTiles;  // of 16 channels and 16 ranks
    const int first = place.cta * place.stream.cta_chunks * 4, end = p.groups * 4;
#pragma unroll 1
    for (int from = threadIdx.x / 32; from < steps; from += kWarps * kBatch) {
        uint4 words[kBatch];
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {  // branchless, so that loads overlap
            const int step = from + i * kWarps, tile = min(step % kRankTiles, tiles - 1);
            words[i] = __ldg(p.proj_down + (min(first + step / kRankTiles, end - 1) * tiles + tile) * 32 + lane);
        }
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
            const int step = from + i * kWarps, tile = step % kRankTiles, k = step / kRankTiles;
            if (step >= steps) continue;
            if (tile >= tiles || first + k >= end) words[i] = {};
            // Published order has the two halves of a row's 16 channels together, then the row eight below.
            const uint32_t row =
                place.factors + k / 4 * kFactorChunkBytes + (tile * 16 + lane / 4) * kRowBytes + lane % 4 * 4;
            const uint32_t low = ((k % 4 * 2) ^ (lane / 4)) * 16, high = low ^ 16;
            ptx::store_shared_4(row + low, words[i].x), ptx::store_shared_4(row + high, words[i].y);
            ptx::store_shared_4(row + 8 * kRowBytes + low, words[i].z);
            ptx::store_shared_4(row + 8 * kRowBytes + high, words[i].w);
        }
    }
    ptx::fence_async_proxy();  // wgmma reads what was stored
}

// Starts the products of so many chunks, which go onto earlier ones if there were any.
template <bool is_bf16, int chunks>
__device__ __forceinline__ void multiply_chunks(float (&sums)[16], uint64_t a, uint64_t b, bool onto) {
    ptx::wgmma_fence();
#pragma unroll
    for (int chunk = 0; chunk < chunks; chunk += 2)
#pragma unroll
        for (int k = 0; k < 4; ++k)  // of 16 channels, 32 bytes
            ptx::wgmma_64x32<is_bf16>(sums, a + chunk * (kFactorChunkBytes / 16) + k * 2,
                                      b + chunk * (kChunkBytes / 16) + k * 2, onto || chunk + k > 0);
    ptx::wgmma_commit();
}

template <class Element, bool norm, class Place>
__device__ void sum_low_rank(const Place& place) {
    const StreamParameters& stream = place.stream;
    const Parameters& p = stream.common;
    auto& shared = place.shared;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, index = threadIdx.x % kSummingThreads;
    const int share = kStreamTokens / place.ctas;  // tokens whose sums this CTA adds up

    // Sums of a tile lie in registers as [64 x 32]: those of the first half of rows and columns are ranks and tokens of
    // even chunks, of the second half of odd chunks; the other quarters mean nothing.
    const int half = warp / 2, rank = warp % 2 * 16 + lane / 4, part = place.cta * 2 + half;
    const auto send = [&](int n, const float(&sums)[16]) {
        const int to = n % 2;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int token = i / 2 * 8 + lane % 4 * 2 + i % 2, to_cta = token / share;
            const uint32_t at = ptx::address_in_cta(
                ptx::shared_address(&shared.sums[to][(part * share + token % share) * kStreamRanks + rank]), to_cta);
            const uint32_t barrier = ptx::address_in_cta(place.barrier(shared.sums_received, to), to_cta);
#pragma unroll
            for (int below = 0; below < 2; ++below) {
                const int of = i / 2 * 4 + below * 2 + i % 2;
                ptx::send_4(at + below * 8 * 4, __float_as_uint(half ? sums[8 + of] : sums[of]), barrier);
            }
        }
    };
    const auto add_up = [&](int n, const StreamTiles& tile) {
        const int from = n % 2;
        ptx::wait(place.barrier(shared.sums_received, from), n / 2 % 2);
        for (int i = index; i < share * kStreamRanks; i += kSummingThreads) {
            float sum = 0;
            for (int of = 0; of < place.ctas * 2; ++of) sum += shared.sums[from][of * share * kStreamRanks + i];
            const int token = place.cta * share + i / kStreamRanks, of_rank = i % kStreamRanks;
            if (token < tile.tokens && of_rank < p.rank) store_sum(p, int64_t{tile.first} + token, of_rank, sum);
        }
    };

    StreamTiles tiles = place.tiles(), before = tiles;
    StreamSlot slot{0, 0, stream.slots};
    float sums[16]{};
    int n = 0;
#pragma unroll 1
    for (; tiles.left(); ++n) {
        if (index == 0) ptx::arrive_expecting(place.barrier(shared.sums_received, n % 2), kSumValues * 4);
#pragma unroll 1
        for (int slice = 0; slice < place.slices; ++slice) {
            ptx::wait(place.barrier(norm ? shared.modulated : shared.arrived, slot.index), slot.parity);
            constexpr bool is_bf16 = std::is_same_v<Element, BF16>;
            const uint64_t a =
                ptx::wgmma_operand<kRowBytes>(place.factors + slice * Place::kSliceChunks * kFactorChunkBytes);
            const uint64_t b = ptx::wgmma_operand<kRowBytes>(place.ring + slot.index * Place::kSliceBytes);
            if (place.slice_chunks(slice) == Place::kSliceChunks)
                multiply_chunks<is_bf16, Place::kSliceChunks>(sums, a, b, slice > 0);
            else
#pragma unroll 1
                for (int chunk = 0; chunk < place.slice_chunks(slice); chunk += 2)
                    multiply_chunks<is_bf16, 2>(sums, a + chunk * (kFactorChunkBytes / 16),
                                                b + chunk * (kChunkBytes / 16), slice + chunk > 0);
            if (slice == 0 && n) add_up(n - 1, before);
            ptx::wgmma_wait<0>();
            if (lane == 0) ptx::arrive(place.barrier(shared.freed, slot.index));
            slot.advance(1);
        }
        send(n, sums);
        before = tiles;
        tiles.advance();
    }
    if (n) add_up(n - 1, before);
}

}  // namespace nk::cuda::quantize
