// The warpgroup of quantize_stream that multiplies tiles by the low-rank factor.
#pragma once

#include "../ptx/wgmma.h"
#include "stream_place.cuh"

namespace nk::cuda::quantize {

// Asks for this CTA's part of the factor, as it is published: a chunk of 64 channels to where it will be arranged.
template <class Place>
__device__ void copy_factor(const Place& place) {
    const Parameters& p = place.stream.common;
    const uint32_t barrier = ptx::shared_address(&place.shared.factor_arrived);
    const int chunk_words = kGroupSize / 16 * (p.rank / 16) * 32, chunks = place.factor_chunks();
    const uint4* const first = p.proj_down + int64_t{place.cta} * place.stream.cta_chunks * chunk_words;
    ptx::arrive_expecting(barrier, chunks * chunk_words * 16);
    for (int chunk = 0; chunk < chunks; ++chunk)
        ptx::bulk_load(place.factors + chunk * kFactorChunkBytes, first + chunk * chunk_words, chunk_words * 16,
                       barrier);
}

// Rank-major in chunks of 64 channels, swizzled; zeros where nothing was copied. A warp takes a chunk at a time.
template <class Place>
__device__ void arrange_factor(const Place& place) {
    constexpr int kSteps = kGroupSize / 16;
    const int lane = threadIdx.x % 32, tiles = place.stream.common.rank / 16, chunks = place.factor_chunks();
    ptx::wait(ptx::shared_address(&place.shared.factor_arrived), 0);
#pragma unroll 1
    for (int chunk = threadIdx.x / 32 % 4; chunk < place.stream.cta_chunks; chunk += kSummingThreads / 32) {
        const uint32_t at = place.factors + chunk * kFactorChunkBytes;
        uint4 words[kSteps][kRankTiles];
#pragma unroll
        for (int k = 0; k < kSteps; ++k)
#pragma unroll
            for (int tile = 0; tile < kRankTiles; ++tile)
                words[k][tile] =
                    ptx::load_shared_16(at + ((k * tiles + tile) * 32 + lane) * 16, chunk < chunks && tile < tiles);
        __syncwarp();
#pragma unroll
        for (int k = 0; k < kSteps; ++k)
#pragma unroll
            for (int tile = 0; tile < kRankTiles; ++tile) {
                // Published order has the two halves of a row's 16 channels together, then the row eight below.
                const uint32_t row = at + (tile * 16 + lane / 4) * kRowBytes + lane % 4 * 4;
                const uint32_t low = ((k * 2) ^ (lane / 4)) * 16, high = low ^ 16;
                const uint4& four = words[k][tile];
                ptx::store_shared_4(row + low, four.x), ptx::store_shared_4(row + high, four.y);
                ptx::store_shared_4(row + 8 * kRowBytes + low, four.z);
                ptx::store_shared_4(row + 8 * kRowBytes + high, four.w);
            }
    }
    ptx::fence_async_proxy();  // wgmma reads what was stored
    ptx::sync_threads<kSummingThreads>(4);
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

    arrange_factor(place);
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
