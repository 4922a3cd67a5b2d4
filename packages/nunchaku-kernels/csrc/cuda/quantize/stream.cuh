// quantize_stream (sm_90): 16-bit x with aligned rows of whole 64-groups, at most 16384 channels and a rank of at most
// 32; optionally behind a layer norm and a modulation.
//
// A cluster of CTAs, a team, splits the channels: each keeps 1 / smooth and its part of the low-rank factor in shared
// memory from its first tile of 16 tokens to the last. Of a tile, chunks of 64 channels arrive by tensor copies in the
// swizzle that wgmma wants; a slice of them, the chunks of two warps, is what copies are awaited and places are freed
// by. Three kinds of warps share them:
//
// - a lane of the last warpgroup asks for slices;
// - two groups of eight warps take a half of every tile each, and hold it in registers, as fp32: places in shared
//   memory are free for the next tile while a group waits for what other CTAs know of its tokens (moments, maxima);
// - a warpgroup multiplies tiles by the factor, both straight from shared memory, and sends its sums to the CTA which
//   adds up those of a token.
//
// What CTAs send each other arrives on barriers that count bytes, in two places in turn. Nobody sends a third time
// before all have read the first: each sends only after it has got everyone's part of the one before.
#pragma once

#include "stream_codes.cuh"
#include "stream_low_rank.cuh"

namespace nk::cuda::quantize {

template <class Place>
struct StreamCopies {
    const Place& place;
    const CUtensorMap* map;
    StreamTiles tiles;
    StreamSlot slot;
    int slice;

    __device__ StreamCopies(const Place& place, const CUtensorMap* map)
        : place(place), map(map), tiles(place.tiles()), slot{0, 0, place.stream.slots}, slice(0) {}

    __device__ void copy_slice() {
        const uint32_t barrier = place.barrier(place.shared.arrived, slot.index);
        const int chunks = place.slice_chunks(slice), first = slice * Place::kSliceChunks;
        ptx::arrive_expecting(barrier, chunks * kChunkBytes);
        for (int chunk = 0; chunk < chunks; chunk += place.stream.box_chunks)
            ptx::tensor_load_3d(place.ring + slot.index * Place::kSliceBytes + chunk * kChunkBytes, map, 0, tiles.first,
                                place.cta * place.stream.cta_chunks + first + chunk, barrier);
        slot.advance(1);
        if (++slice == place.slices) slice = 0, tiles.advance();
    }
    // What fits at once.
    __device__ void start() {
        for (int i = 0; i < slot.slots && tiles.left(); ++i) copy_slice();
    }
    __device__ void finish() {
        while (tiles.left()) {
            ptx::wait(place.barrier(place.shared.freed, slot.index), slot.parity ^ 1);
            copy_slice();
        }
    }
};

// 1 / smooth of this CTA's channels, zeros beyond them: in halves of 8 channels, so that 8 lanes read other banks.
template <int kChunks, class Place>
__device__ void store_reciprocals(const Place& place) {
    const Parameters& p = place.stream.common;
    const int thread = threadIdx.x;
    constexpr int kEach = kGroupWarps * kChunks * kGroupSize / kQuantizingThreads;
    const int first = place.cta * place.stream.cta_chunks * kGroupSize, channels = static_cast<int>(p.channels);
    const int end = min(channels, first + place.stream.cta_chunks * kGroupSize);
    float smooth[kEach];
#pragma unroll
    for (int i = 0; i < kEach; ++i) {  // branchless, so that loads overlap
        const int k = min(first + thread + i * kQuantizingThreads, channels - 1);
        smooth[i] = p.smooth ? load_smooth_at(p, k / 16 * 16 + k % 8 / 2 * 4 + k % 16 / 8 * 2 + k % 2) : 1.0f;
    }
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
        const int k = thread + i * kQuantizingThreads;
        const uint32_t at = place.reciprocals + ((k / 64 * 2 + k % 8 / 4) * 8 + k % 64 / 8) * 16 + k % 4 * 4;
        ptx::store_shared_4(at, __float_as_uint(first + k < end ? __frcp_rn(smooth[i]) : 0.0f));
    }
}

// For one warp.
template <bool low_rank, class Place>
__device__ void init_barriers(const Place& place) {
    const int lane = threadIdx.x % 32;
    auto& shared = place.shared;
    if (lane < place.stream.slots) {
        ptx::init_barrier(place.barrier(shared.arrived, lane), 1);
        ptx::init_barrier(place.barrier(shared.modulated, lane), 4);                   // two warps of either half
        ptx::init_barrier(place.barrier(shared.freed, lane), 4 + (low_rank ? 4 : 0));  // these, and those that sum
    }
    if (lane == 0) ptx::init_barrier(ptx::shared_address(&shared.factor_arrived), 1);
    if (lane < 2) {
        ptx::init_barrier(place.barrier(shared.sums_received, lane), 1);
        for (int half = 0; half < 2; ++half) {
            ptx::init_barrier(place.barrier(shared.maxima_received[half], lane), 1);
            ptx::init_barrier(place.barrier(shared.moments_received[half], lane), 1);
        }
    }
    ptx::fence_barrier_init();
    __syncwarp();
}

// Zeros where CTAs that are not there would send to, and the weights of means.
template <int kChunks, bool norm, class Place>
__device__ void prepare_exchange(const Place& place) {
    auto& shared = place.shared;
    constexpr int kPlaces = 2 * 2 * kStreamCtas * kHalfTokens;
    static_assert(kPlaces <= kQuantizingThreads);
    if (const int i = threadIdx.x, of = i / kHalfTokens % kStreamCtas; i < kPlaces && of >= place.ctas) {
        const int at = i / kHalfTokens / kStreamCtas, token = i % kHalfTokens;
        shared.maxima[at / 2][at % 2][of][token] = 0;
        if constexpr (norm) shared.moments[at / 2][at % 2][of][token] = {};
    }
    if (norm && threadIdx.x < kStreamCtas) {
        const int of = threadIdx.x, all = static_cast<int>(place.stream.common.channels);
        const int cta_channels = place.stream.cta_chunks * kGroupSize, warp_channels = kChunks * kGroupSize;
        const int first = place.cta * cta_channels, end = first + cta_channels;
        const auto channels = [&](int from, int to) { return static_cast<float>(min(to, all) - min(from, all)); };
        shared.cta_weights[of] = of < place.ctas ? channels(of * cta_channels, (of + 1) * cta_channels) / all : 0.0f;
        shared.warp_weights[of] =
            channels(min(first + of * warp_channels, end), min(first + (of + 1) * warp_channels, end)) /
            max(1.0f, channels(first, end));
    }
}

template <class Element, int kChunks, bool low_rank, bool norm>
__global__ void __launch_bounds__(stream_threads(low_rank), 1)
    quantize_stream(const __grid_constant__ CUtensorMap x, const __grid_constant__ StreamParameters stream) {
    constexpr int kFirstCopying = stream_threads(low_rank) - kCopyingThreads;
    // Together no more than what 64 K registers are when all threads have the same multiple of 8.
    constexpr int kQuantizeRegisters = low_rank ? 96 : 104, kOtherRegisters = low_rank ? 48 : 64;
    extern __shared__ __align__(1024) char stream_memory[];  // the swizzle counts from multiples of 1024
    const StreamPlace<kChunks, low_rank, norm> place(stream, stream_memory);
    const int warp = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / 32, 0);  // so that the compiler sees it uniform

    if (warp == kFirstCopying / 32) init_barriers<low_rank>(place);
    ptx::cluster_arrive_relaxed();
    if (warp >= kFirstCopying / 32) {
        ptx::give_up_registers<kOtherRegisters>();
        const bool copies = threadIdx.x == kFirstCopying;
        StreamCopies copying(place, &x);
        if (copies) {  // nobody waits for this: it takes as long as the memory
            if constexpr (low_rank) copy_factor(place);
            copying.start();
        }
        ptx::cluster_wait();
        if (copies) copying.finish();
    } else if (warp < kQuantizingThreads / 32) {
        prepare_exchange<kChunks, norm>(place);
        store_reciprocals<kChunks>(place);
        ptx::sync_threads<kQuantizingThreads>(1);
        ptx::cluster_wait();  // all barriers are there
        ptx::take_registers<kQuantizeRegisters>();
        quantize_halves<Element>(place);
    } else if constexpr (low_rank) {
        ptx::give_up_registers<kOtherRegisters>();
        ptx::cluster_wait();
        sum_low_rank<Element, norm>(place);
    }
    ptx::cluster_arrive_relaxed();  // no CTA ends before the others have what it sent
    ptx::cluster_wait();
}

}  // namespace nk::cuda::quantize
