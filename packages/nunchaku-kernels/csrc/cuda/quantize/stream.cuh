// quantize_stream (sm_90): 16-bit x with aligned rows of whole 64-groups, at most 16384 channels and a rank of at most
// 32; optionally behind a layer norm and a modulation.
//
// A cluster of CTAs, a team, splits the channels: each keeps 1 / smooth and its part of the low-rank factor in shared
// memory from its first tile of 16 tokens to the last. Of a tile, chunks of 64 channels arrive by tensor copies in the
// swizzle that wgmma wants; a slice of them, the chunks of two warps, is what copies are awaited and places are freed
// by. Three kinds of warps share them:
//
// - a lane of the last warpgroup asks for slices;
// - groups of eight warps take half tiles in turn, and hold them in registers, as fp32: places in shared memory are
//   free for the next tile while a group waits for what other CTAs know of its tokens (moments, maxima);
// - a warpgroup multiplies tiles by the factor, both straight from shared memory, and sends its sums to the CTA which
//   adds up those of a token.
//
// What CTAs send each other arrives on barriers that count bytes, in two places in turn. Nobody sends a third time
// before all have read the first: each sends only after it has got everyone's part of the one before.
#pragma once

#include <cuda_bf16.h>

#include "../ptx/cluster.h"
#include "../ptx/hopper.h"
#include "../ptx/wgmma.h"
#include "common.cuh"

namespace nk::cuda::quantize {

constexpr int kStreamTokens = 16, kHalfTokens = 8, kGroupWarps = 8;
constexpr int kStreamCtas = 8;    // the largest cluster that every device with clusters can hold
constexpr int kStreamSlots = 16;  // slices in shared memory, at most
constexpr int kStreamRanks = kRankTiles * 16;
constexpr int kLargestChunks = 4;                                 // of a warp
constexpr int kRowBytes = kGroupSize * 2;                         // of a chunk
constexpr int kChunkBytes = kStreamTokens * kRowBytes;            // of x
constexpr int kFactorChunkBytes = kStreamRanks * kRowBytes;       // of the factor
constexpr int kSumValues = 2 * kStreamTokens * kStreamRanks;      // parts of a tile's sums that a CTA gets
static_assert(kGroupWarps == kStreamCtas);                        // weights of both are filled by the same threads

struct StreamParameters {
    Parameters common;
    int cta_chunks;  // of 64 channels, even: two of them are multiplied at once
    int box_chunks;  // of a copy, even
    int slots;
    int row_tokens;  // that share a row of the modulation; no tile has tokens of two rows
    const char *scale, *shift;
    float eps;
};

// CTAs share a multiprocessor with no other, so groups hide each other's waiting; registers limit their number.
__host__ __device__ constexpr int stream_groups(int chunks, bool low_rank, bool norm) {
#ifdef GROUPS
    return GROUPS;
#endif
    return 2;
}

__host__ __device__ constexpr int stream_warps(int chunks, bool low_rank, bool norm) {
    return stream_groups(chunks, low_rank, norm) * kGroupWarps + (low_rank ? 4 : 0) + 4;
}

// A team's tiles, one after the other: neighbouring tokens of one row of the modulation.
struct StreamTiles {
    int first, tokens, row;
    int end, row_end, row_tokens;

    __device__ StreamTiles(const StreamParameters& stream, int team, int teams) : row_tokens(stream.row_tokens) {
        first = static_cast<int>(stream.common.tokens * team / teams);
        end = static_cast<int>(stream.common.tokens * (team + 1) / teams);
        row = first / row_tokens, row_end = (row + 1) * row_tokens;
        measure();
    }
    __device__ void measure() { tokens = min(kStreamTokens, min(end, row_end) - first); }
    __device__ bool left() const { return first < end; }
    __device__ void advance() {
        first += tokens;
        if (first == row_end) ++row, row_end += row_tokens;
        measure();
    }
};

// A place in a ring of so many slots, and the parity of its phase.
struct StreamSlot {
    int index, parity, slots;

    __device__ void advance(int by) {  // by no more than there are
        index += by;
        if (index >= slots) index -= slots, parity ^= 1;
    }
};

template <int kGroups, bool norm>
struct StreamShared {
    uint64_t arrived[kStreamSlots], modulated[kStreamSlots], freed[kStreamSlots];  // barriers
    uint64_t sums_received[2], maxima_received[kGroups][2], moments_received[kGroups][2];
    float cta_weights[kStreamCtas], warp_weights[kGroupWarps];  // of means
    alignas(16) uint32_t warp_maxima[kGroups][kGroupWarps][kHalfTokens];
    alignas(16) uint32_t maxima[kGroups][2][kStreamCtas][kHalfTokens];  // of each CTA; zeros of those that are not there
    alignas(16) float2 warp_moments[norm ? kGroups : 1][kGroupWarps][kHalfTokens];  // mean, part of the variance
    alignas(16) float2 moments[norm ? kGroups : 1][2][kStreamCtas][kHalfTokens];
    alignas(16) float sums[2][kSumValues];
};

template <class Element>
__device__ __forceinline__ uint32_t packed(float low, float high) {
    if constexpr (std::is_same_v<Element, BF16>) {
        const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
        return reinterpret_cast<const uint32_t&>(pair);
    } else {
        const __half2 pair = __floats2half2_rn(low, high);
        return reinterpret_cast<const uint32_t&>(pair);
    }
}

__device__ __forceinline__ float4 load_shared_float4(uint32_t address) {
    const uint4 v = ptx::load_shared_16(address);
    return {__uint_as_float(v.x), __uint_as_float(v.y), __uint_as_float(v.z), __uint_as_float(v.w)};
}

// Where a thread finds everything; the same for all roles.
template <int kChunks, int kGroups, bool low_rank, bool norm>
struct StreamPlace {
    static constexpr int kSliceChunks = 2 * kChunks, kSliceBytes = kSliceChunks * kChunkBytes;
    static constexpr int kReciprocalsBytes = kGroupWarps * kChunks * kGroupSize * 4;

    const StreamParameters& stream;
    StreamShared<kGroups, norm>& shared;
    uint32_t ring, factors, reciprocals;
    int cta, ctas, team, teams, slices;

    __device__ StreamPlace(const StreamParameters& stream, char* memory)
        : stream(stream),
          shared(*reinterpret_cast<StreamShared<kGroups, norm>*>(
              memory + stream.slots * kSliceBytes + (low_rank ? stream.cta_chunks * kFactorChunkBytes : 0) +
              kReciprocalsBytes)),
          ring(ptx::shared_address(memory)),
          factors(ring + stream.slots * kSliceBytes),
          reciprocals(factors + (low_rank ? stream.cta_chunks * kFactorChunkBytes : 0)),
          cta(static_cast<int>(ptx::cluster_rank())),
          ctas(static_cast<int>(ptx::cluster_size())),
          team(blockIdx.x / ctas),
          teams(gridDim.x / ctas),
          slices((stream.cta_chunks + kSliceChunks - 1) / kSliceChunks) {}

    // A barrier, by its index in an array of them.
    static __device__ uint32_t barrier(const uint64_t* first, int index) {
        return ptx::shared_address(first) + index * 8;
    }
    __device__ int slice_chunks(int slice) const {  // even
        return min(kSliceChunks, stream.cta_chunks - slice * kSliceChunks);
    }
    __device__ StreamTiles tiles() const { return {stream, team, teams}; }
};

// ---- The lane that asks for slices ----------------------------------------------------------------------------------

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

// ---- The warpgroup of the low-rank sums -----------------------------------------------------------------------------

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
            const uint32_t low = (k % 4 * 2 ^ lane / 4) * 16, high = low ^ 16;
            ptx::store_shared_4(row + low, words[i].x), ptx::store_shared_4(row + high, words[i].y);
            ptx::store_shared_4(row + 8 * kRowBytes + low, words[i].z);
            ptx::store_shared_4(row + 8 * kRowBytes + high, words[i].w);
        }
    }
    ptx::fence_async_proxy();  // wgmma reads what was stored
}

// Starts the products of so many chunks, which go onto earlier ones if there were any.
template <bool is_bf16>
__device__ __forceinline__ void multiply_slice(float (&sums)[16], uint64_t a, uint64_t b, int chunks, bool onto) {
    ptx::wgmma_fence();
#pragma unroll 1
    for (int chunk = 0; chunk < chunks; chunk += 2) {
#pragma unroll
        for (int k = 0; k < 4; ++k)  // of 16 channels, 32 bytes
            ptx::wgmma_64x32<is_bf16>(sums, a + k * 2, b + k * 2, onto || chunk + k > 0);
        a += 2 * kFactorChunkBytes / 16, b += 2 * kChunkBytes / 16;
    }
    ptx::wgmma_commit();
}

template <class Element, bool norm, class Place>
__device__ void sum_low_rank(const Place& place) {
    const StreamParameters& stream = place.stream;
    const Parameters& p = stream.common;
    auto& shared = place.shared;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, index = threadIdx.x % 128;
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
        for (int i = index; i < share * kStreamRanks; i += 128) {
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
            multiply_slice<std::is_same_v<Element, BF16>>(
                sums, ptx::wgmma_operand<kRowBytes>(place.factors + slice * Place::kSliceChunks * kFactorChunkBytes),
                ptx::wgmma_operand<kRowBytes>(place.ring + slot.index * Place::kSliceBytes), place.slice_chunks(slice),
                slice > 0);
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

// ---- The warps that quantise ----------------------------------------------------------------------------------------

// In chunk c of a warp, a lane has channels 8 (lane % 8) .. + 7 of tokens lane / 8 and lane / 8 + 4. What is known of a
// whole token, lanes with lane % 8 < 4 know of the first one, the others of the second.
template <class T, class Combine>
__device__ __forceinline__ T over_lanes(T first, T second, Combine combine) {
    const bool upper = threadIdx.x & 4;
    T value = upper ? second : first;
    value = combine(value, __shfl_xor_sync(~0u, upper ? first : second, 4));
    value = combine(value, __shfl_xor_sync(~0u, value, 1));
    return combine(value, __shfl_xor_sync(~0u, value, 2));
}

// The other way: values of both tokens.
template <class T>
__device__ __forceinline__ void of_both(T value, T (&both)[2]) {
    const T other = __shfl_xor_sync(~0u, value, 4);
    const bool upper = threadIdx.x & 4;
    both[0] = upper ? other : value, both[1] = upper ? value : other;
}

__device__ __forceinline__ uint32_t& word(uint4& words, int i) { return i == 0 ? words.x : i == 1 ? words.y : i == 2 ? words.z : words.w; }
__device__ __forceinline__ uint32_t word(const uint4& words, int i) { return i == 0 ? words.x : i == 1 ? words.y : i == 2 ? words.z : words.w; }

// The maxima, or behind a norm the moments, of a tile's tokens over all channels: each warp leaves its own in shared
// memory, a warp adds up what the CTA has and sends it to all CTAs.
template <class Place>
struct StreamExchange {
    const Place& place;
    int id, warp;  // of the group, in the group

    __device__ void meet() const { ptx::sync_threads<kGroupWarps * 32>(2 + id); }

    __device__ uint32_t maximum(uint32_t own, int turn) const {
        const int lane = threadIdx.x % 32, token = lane / 8 + lane % 8 / 4 * 4;
        const int to = turn % 2;
        auto& shared = place.shared;
        const uint32_t barrier = place.barrier(shared.maxima_received[id], to);
        if (lane % 4 == 0) shared.warp_maxima[id][warp][token] = own;
        meet();
        if (warp == 0) {
            if (lane == 0) ptx::arrive_expecting(barrier, place.ctas * kHalfTokens * 4);
            // A lane has four tokens of one warp, at the end those of all warps, for one CTA.
            const int half = lane % 2, of_cta = lane / 2;
            uint4 largest = *reinterpret_cast<const uint4*>(&shared.warp_maxima[id][of_cta % kGroupWarps][half * 4]);
#pragma unroll
            for (int bit = 2; bit < 16; bit *= 2)
                for (int i = 0; i < 4; ++i)
                    word(largest, i) = max(word(largest, i), __shfl_xor_sync(~0u, word(largest, i), bit));
            if (of_cta < place.ctas)
                ptx::send_16(ptx::address_in_cta(ptx::shared_address(&shared.maxima[id][to][place.cta][half * 4]), of_cta),
                             largest, ptx::address_in_cta(barrier, of_cta));
        }
        ptx::wait(barrier, turn / 2 % 2);
        uint32_t bits = max(shared.maxima[id][to][lane % 4][token], shared.maxima[id][to][lane % 4 + 4][token]);
        bits = max(bits, __shfl_xor_sync(~0u, bits, 1));
        return max(bits, __shfl_xor_sync(~0u, bits, 2));
    }

    // From the warp's mean and its part of the variance around that: mean and variance of the token.
    __device__ float2 moments(float2 own, int turn) const {
        const int lane = threadIdx.x % 32, token = lane / 8 + lane % 8 / 4 * 4;
        const int to = turn % 2;
        auto& shared = place.shared;
        const uint32_t barrier = place.barrier(shared.moments_received[id], to);
        if (lane % 4 == 0) shared.warp_moments[id][warp][token] = own;
        meet();
        if (warp == 0) {
            if (lane == 0) ptx::arrive_expecting(barrier, place.ctas * kHalfTokens * 8);
            // A lane has two tokens of one warp, at the end those of all warps, for one CTA.
            const int two = lane % 4, of_cta = lane / 4;
            const auto over_warps = [](float2 v) {
#pragma unroll
                for (int bit = 4; bit < 32; bit *= 2)
                    v.x += __shfl_xor_sync(~0u, v.x, bit), v.y += __shfl_xor_sync(~0u, v.y, bit);
                return v;
            };
            const float4 part = *reinterpret_cast<const float4*>(&shared.warp_moments[id][of_cta][two * 2]);
            const float weight = shared.warp_weights[of_cta], of_all = shared.cta_weights[place.cta] * weight;
            const float2 mean = over_warps({weight * part.x, weight * part.z});
            const float2 variance = over_warps({part.y + of_all * (part.x - mean.x) * (part.x - mean.x),
                                                part.w + of_all * (part.z - mean.y) * (part.z - mean.y)});
            const uint4 words{__float_as_uint(mean.x), __float_as_uint(variance.x), __float_as_uint(mean.y),
                              __float_as_uint(variance.y)};
            if (of_cta < place.ctas)
                ptx::send_16(ptx::address_in_cta(ptx::shared_address(&shared.moments[id][to][place.cta][two * 2]), of_cta),
                             words, ptx::address_in_cta(barrier, of_cta));
        }
        ptx::wait(barrier, turn / 2 % 2);
        const auto over_ctas = [](float value) {
            value += __shfl_xor_sync(~0u, value, 1);
            return value + __shfl_xor_sync(~0u, value, 2);
        };
        const int one = lane % 4, other = one + 4;
        const float2 a = shared.moments[id][to][one][token], b = shared.moments[id][to][other][token];
        const float a_weight = shared.cta_weights[one], b_weight = shared.cta_weights[other];
        const float mean = over_ctas(a_weight * a.x + b_weight * b.x);
        return {mean, over_ctas(a.y + b.y + a_weight * (a.x - mean) * (a.x - mean) +
                                b_weight * (b.x - mean) * (b.x - mean))};
    }
};

template <class Element, int kChunks, int kGroups, bool low_rank, bool norm>
__device__ void quantize_halves(const StreamPlace<kChunks, kGroups, low_rank, norm>& place) {
    const StreamParameters& stream = place.stream;
    const Parameters& p = stream.common;
    auto& shared = place.shared;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % kGroupWarps, id = threadIdx.x / 32 / kGroupWarps;
    const int row = lane / 8, piece = lane % 8, slice = warp / 2;
    const int cta_chunk = place.cta * stream.cta_chunks, first_chunk = cta_chunk + warp * kChunks;
    const auto chunks_until = [&](int end) {
        return max(0, min(kChunks, min(end, cta_chunk + stream.cta_chunks) - first_chunk));
    };
    const int stored = chunks_until(p.groups), given = chunks_until(static_cast<int>(p.channels) / kGroupSize);
    const bool has_slice = slice < place.slices;
    const StreamExchange<StreamPlace<kChunks, kGroups, low_rank, norm>> exchange{place, id, warp};
    const int64_t code_row = int64_t{p.groups} * kGroupSize;
    // Of a block of 32 channels, lanes of a pair swap words: the even one stores from the first 16 bytes of the codes,
    // the odd one from the others.
    int8_t* const codes =
        p.codes + int64_t{first_chunk} * kGroupSize + piece / 4 * 32 + piece % 2 * 16 + piece % 4 / 2 * 8;
    const uint32_t own_reciprocals = place.reciprocals + (warp * kChunks * 16 + piece) * 16;
    const uint32_t own_x = place.ring + warp % 2 * kChunks * kChunkBytes + row * kRowBytes + (piece ^ row) * 16;
    const auto x_at = [&](uint32_t place_of_x, int c, int i) {  // the swizzle of a row four below differs in one bit
        return (i ? place_of_x + 4 * kRowBytes ^ 64 : place_of_x) + c * kChunkBytes;
    };

    StreamTiles tiles = place.tiles();
    StreamSlot slot{0, 0, stream.slots};
    slot.advance(min(slice, place.slices - 1));
    int half = 0, turn = 0;
    // A barrier tells the phase before from the one after, no more: a group awaits the tiles, too, that it skips.
    const auto advance = [&](int halves, bool skips) {
        half += halves;
#pragma unroll 1
        for (; half >= 2; half -= 2, skips = true) {
            if (kGroups > 2 && skips && has_slice && tiles.left())
                ptx::wait(place.barrier(shared.arrived, slot.index), slot.parity);
            tiles.advance(), slot.advance(place.slices);
        }
    };
#pragma unroll 1
    for (advance(id, true); tiles.left(); advance(kGroups, false)) {
        const int first = tiles.first + half * kHalfTokens, tokens = tiles.tokens - half * kHalfTokens;
        const uint32_t freed = place.barrier(shared.freed, slot.index);
        if (has_slice) ptx::wait(place.barrier(shared.arrived, slot.index), slot.parity);
        if (tokens <= 0) {
            if (has_slice && lane == 0) {
                ptx::arrive(freed);
                if (norm && low_rank) ptx::arrive(place.barrier(shared.modulated, slot.index));
            }
            continue;
        }
        const uint32_t place_of_x =
            own_x + slot.index * StreamPlace<kChunks, kGroups, low_rank, norm>::kSliceBytes + half * kHalfTokens * kRowBytes;
        float values[kChunks][2][8];
        {
            uint4 x[kChunks][2];
#pragma unroll
            for (int c = 0; c < kChunks; ++c)
#pragma unroll
                for (int i = 0; i < 2; ++i) x[c][i] = ptx::load_shared_16(x_at(place_of_x, c, i), c < given);
            if (!(norm && low_rank) && has_slice) {
                __syncwarp();
                if (lane == 0) ptx::arrive(freed);
            }
#pragma unroll
            for (int c = 0; c < kChunks; ++c)
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    const uint32_t words[4] = {x[c][i].x, x[c][i].y, x[c][i].z, x[c][i].w};
#pragma unroll
                    for (int j = 0; j < 4; ++j) {
                        const float2 pair = unpacked<Element>(words[j]);
                        values[c][i][2 * j] = pair.x, values[c][i][2 * j + 1] = pair.y;
                    }
                }
        }

        if constexpr (norm) {
            const auto add = [](float a, float b) { return a + b; };
            float sums[2]{}, means[2], squares[2]{};
#pragma unroll
            for (int c = 0; c < kChunks; ++c)
#pragma unroll
                for (int j = 0; j < 8; ++j)
#pragma unroll
                    for (int i = 0; i < 2; ++i) sums[i] += values[c][i][j];
            const float inverse_channels = given ? 1.0f / static_cast<float>(given * kGroupSize) : 0.0f;
            const float mean = over_lanes(sums[0], sums[1], add) * inverse_channels;
            of_both(mean, means);
#pragma unroll
            for (int c = 0; c < kChunks; ++c)
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    const float centre = c < given ? means[i] : 0.0f;  // what is not there is zero
#pragma unroll
                    for (int j = 0; j < 8; ++j) {
                        const float around = values[c][i][j] - centre;
                        squares[i] = fmaf(around, around, squares[i]);
                    }
                }
            const float variance = over_lanes(squares[0], squares[1], add) * (1.0f / static_cast<float>(p.channels));
            const int64_t offset =
                (int64_t{tiles.row} * p.channels + (given ? int64_t{first_chunk} * kGroupSize + piece * 8 : 0)) * 2;
            const float2 moments = exchange.moments({mean, variance}, turn);
            float deviations[2];  // their reciprocals
            const float deviation = rsqrtf(moments.y + stream.eps);
            of_both(deviation, deviations), of_both(-moments.x * deviation, means);
#pragma unroll
            for (int c = 0; c < kChunks; ++c) {
                const int of = max(0, min(c, given - 1)) * kRowBytes;  // branchless, so that loads overlap
                const uint4 scales = __ldg(reinterpret_cast<const uint4*>(stream.scale + offset + of));
                const uint4 shifts = __ldg(reinterpret_cast<const uint4*>(stream.shift + offset + of));
                const uint32_t scale[4] = {scales.x, scales.y, scales.z, scales.w};
                const uint32_t shift[4] = {shifts.x, shifts.y, shifts.z, shifts.w};
                uint32_t words[2][4];
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    const float2 a = unpacked<Element>(scale[j]), b = unpacked<Element>(shift[j]);
#pragma unroll
                    for (int i = 0; i < 2; ++i) {
                        float(&v)[8] = values[c][i];
                        words[i][j] =
                            packed<Element>(fmaf(fmaf(v[2 * j], deviations[i], means[i]), 1.0f + a.x, b.x),
                                            fmaf(fmaf(v[2 * j + 1], deviations[i], means[i]), 1.0f + a.y, b.y));
                        const float2 pair = unpacked<Element>(words[i][j]);
                        v[2 * j] = pair.x, v[2 * j + 1] = pair.y;
                    }
                }
                if (low_rank && c < given)
#pragma unroll
                    for (int i = 0; i < 2; ++i)
                        ptx::store_shared_16(x_at(place_of_x, c, i),
                                             {words[i][0], words[i][1], words[i][2], words[i][3]});
            }
            if (low_rank && has_slice) {
                ptx::fence_async_proxy();  // wgmma reads what was stored
                __syncwarp();
                if (lane == 0) ptx::arrive(place.barrier(shared.modulated, slot.index)), ptx::arrive(freed);
            }
        }

        float largest[2][2]{};
#pragma unroll
        for (int c = 0; c < kChunks; ++c)
#pragma unroll
            for (int quad = 0; quad < 2; ++quad) {
                const float4 four = load_shared_float4(own_reciprocals + (c * 16 + quad * 8) * 16);
                const float reciprocals[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
                for (int j = 0; j < 4; ++j)
#pragma unroll
                    for (int i = 0; i < 2; ++i) {
                        float& value = values[c][i][quad * 4 + j];
                        // Behind a norm there is no shift.
                        value = norm ? __fmul_rn(value, reciprocals[j]) : smoothed(value, p.shift, reciprocals[j]);
                        largest[i][j % 2] = ptx::max_magnitude(largest[i][j % 2], value);
                    }
            }
        const auto maximum = [](uint32_t a, uint32_t b) { return max(a, b); };
        const uint32_t own = over_lanes(__float_as_uint(ptx::max_magnitude(largest[0][0], largest[0][1])),
                                        __float_as_uint(ptx::max_magnitude(largest[1][0], largest[1][1])), maximum);
        const TokenScale token(exchange.maximum(own, turn));
        const int own_token = row + piece / 4 * 4;
        if (place.cta == 0 && warp == 0 && piece % 4 == 0 && own_token < tokens)
            p.ascales[first + own_token] = token.activation;
        float inverses[2];
        uint32_t keep[2];
        of_both(token.inverse, inverses), of_both(token.keep, keep);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            int8_t* const out = codes + (int64_t{first} + row + i * 4) * code_row;
#pragma unroll
            for (int c = 0; c < kChunks; ++c) {
                uint32_t bytes[8];
#pragma unroll
                for (int j = 0; j < 8; ++j) bytes[j] = rounded(values[c][i][j], inverses[i]);
                const uint32_t low = low_bytes({bytes[0], bytes[4], bytes[1], bytes[5]}) & keep[i];
                const uint32_t high = low_bytes({bytes[2], bytes[6], bytes[3], bytes[7]}) & keep[i];
                const uint32_t got = __shfl_xor_sync(~0u, piece % 2 ? low : high, 1);
                if (row + i * 4 < tokens && c < stored)
                    *reinterpret_cast<uint2*>(out + c * kGroupSize) =
                        piece % 2 ? make_uint2(got, high) : make_uint2(low, got);
            }
        }
        ++turn;
    }
}

// ---- The kernel -----------------------------------------------------------------------------------------------------

// 1 / smooth of this CTA's channels, zeros beyond them: in halves of 8 channels, so that 8 lanes read other banks.
template <int kChunks, int kThreads, class Place>
__device__ void store_reciprocals(const Place& place, int thread) {
    const Parameters& p = place.stream.common;
    constexpr int kEach = (kGroupWarps * kChunks * kGroupSize + kThreads - 1) / kThreads;
    const int first = place.cta * place.stream.cta_chunks * kGroupSize, channels = static_cast<int>(p.channels);
    const int end = min(channels, first + place.stream.cta_chunks * kGroupSize);
    float smooth[kEach];
#pragma unroll
    for (int i = 0; i < kEach; ++i) {  // branchless, so that loads overlap
        const int k = min(first + thread + i * kThreads, channels - 1);
        smooth[i] = p.smooth ? load_smooth_at(p, k / 16 * 16 + k % 8 / 2 * 4 + k % 16 / 8 * 2 + k % 2) : 1.0f;
    }
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
        const int k = thread + i * kThreads;
        if (k >= kGroupWarps * kChunks * kGroupSize) break;
        const uint32_t at = place.reciprocals + ((k / 64 * 2 + k % 8 / 4) * 8 + k % 64 / 8) * 16 + k % 4 * 4;
        ptx::store_shared_4(at, __float_as_uint(first + k < end ? __frcp_rn(smooth[i]) : 0.0f));
    }
}

template <class Element, int kChunks, bool low_rank, bool norm>
__global__ void __launch_bounds__(stream_warps(kChunks, low_rank, norm) * 32, 1)
    quantize_stream(const __grid_constant__ CUtensorMap x, const __grid_constant__ StreamParameters stream) {
    constexpr int kGroups = stream_groups(kChunks, low_rank, norm), kQuantizing = kGroups * kGroupWarps * 32;
    constexpr int kThreads = stream_warps(kChunks, low_rank, norm) * 32, kPreparing = kThreads - 128;
    // Together no more than what 64 K registers are when all threads have the same multiple of 8.
    constexpr int kQuantizeRegisters = kGroups == 3 ? 80 : low_rank ? 96 : 104;
    constexpr int kOtherRegisters = kGroups == 3 ? 24 : low_rank ? 48 : 64;
    using Place = StreamPlace<kChunks, kGroups, low_rank, norm>;
    extern __shared__ __align__(1024) char stream_memory[];  // the swizzle counts from multiples of 1024
    const Parameters& p = stream.common;
    const Place place(stream, stream_memory);
    auto& shared = place.shared;
    const int lane = threadIdx.x % 32;
    const bool copies = threadIdx.x == blockDim.x - 128;
    if (threadIdx.x / 32 == blockDim.x / 32 - 4) {
        if (lane < stream.slots) {
            ptx::init_barrier(place.barrier(shared.arrived, lane), 1);
            ptx::init_barrier(place.barrier(shared.modulated, lane), 4);  // two warps of either half
            ptx::init_barrier(place.barrier(shared.freed, lane), 4 + (low_rank ? 4 : 0));
        }
        if (lane < 2) {
            ptx::init_barrier(place.barrier(shared.sums_received, lane), 1);
            for (int group = 0; group < kGroups; ++group) {
                ptx::init_barrier(place.barrier(shared.maxima_received[group], lane), 1);
                ptx::init_barrier(place.barrier(shared.moments_received[group], lane), 1);
            }
        }
        ptx::fence_barrier_init();
        __syncwarp();
    }
    ptx::cluster_arrive_relaxed();
    const int role = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / 128, 0);  // of a warpgroup
    if (role == kThreads / 128 - 1) {
        ptx::give_up_registers<kOtherRegisters>();
        StreamCopies<Place> copying(place, &x);
        if (copies) copying.start();
        ptx::cluster_wait();  // all barriers are there
        if (copies) copying.finish();
    } else {
        if (role < kQuantizing / 128 && low_rank)
            load_factor<kQuantizing / 32>(place);
        else
            store_reciprocals<kChunks, low_rank ? 128 : kQuantizing>(place, threadIdx.x % (low_rank ? 128 : kQuantizing));
        for (int i = threadIdx.x; i < kGroups * 2 * kStreamCtas * kHalfTokens; i += kPreparing) {
            const int token = i % kHalfTokens, of = i / kHalfTokens % kStreamCtas, at = i / kHalfTokens / kStreamCtas;
            if (of < place.ctas) continue;
            shared.maxima[at / 2][at % 2][of][token] = 0;
            if constexpr (norm) shared.moments[at / 2][at % 2][of][token] = {};
        }
        if (norm && threadIdx.x < kStreamCtas) {
            const int of = threadIdx.x, cta_channels = stream.cta_chunks * kGroupSize;
            const int first = place.cta * cta_channels, warp_channels = kChunks * kGroupSize;
            const auto channels = [&](int from, int end) {
                const int all = static_cast<int>(p.channels);
                return static_cast<float>(min(end, all) - min(from, all));
            };
            shared.cta_weights[of] =
                of < place.ctas ? channels(of * cta_channels, (of + 1) * cta_channels) / p.channels : 0.0f;
            shared.warp_weights[of] = channels(first + min(of * warp_channels, cta_channels),
                                               first + min((of + 1) * warp_channels, cta_channels)) /
                                      max(1.0f, channels(first, first + cta_channels));
        }
        ptx::sync_threads<kPreparing>(1);
        ptx::cluster_wait();  // all barriers are there
        if (role < kQuantizing / 128) {
            ptx::take_registers<kQuantizeRegisters>();
            quantize_halves<Element>(place);
        } else if (low_rank) {
            ptx::give_up_registers<kOtherRegisters>();
            sum_low_rank<Element, norm>(place);
        }
    }
    ptx::cluster_arrive_relaxed();  // no CTA ends before the others have what it sent
    ptx::cluster_wait();
}

}  // namespace nk::cuda::quantize
