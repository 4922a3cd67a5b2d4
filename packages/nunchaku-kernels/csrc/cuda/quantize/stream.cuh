// quantize_stream (sm_90): 16-bit x with aligned rows of whole 64-groups, at most 16384 channels and a rank of at most
// 32; optionally behind a layer norm and a modulation.
//
// A cluster of CTAs, a team, splits the channels: each keeps 1 / smooth and its part of the low-rank factor in shared
// memory from its first tile of 8 tokens to the last. Tiles arrive by tensor copies, in chunks of 64 channels swizzled
// as wgmma wants them. Three kinds of warps share them:
//
// - a lane of the last warp asks for tiles;
// - groups of eight warps take them in turn: a group holds a tile in registers, as fp32, so that its place in shared
//   memory is free for the next one while the group waits for what other CTAs know of the tokens (moments, maxima);
// - one warpgroup multiplies them by the factor, both straight from shared memory, and sends its sums to the CTA which
//   adds up those of a token.
//
// What CTAs send each other arrives on barriers that count bytes, in two places in turn. Nobody sends a third time
// before all have read the first: each sends only after it has got everyone's part of the tile before.
#pragma once

#include <cuda_bf16.h>

#include "../ptx/cluster.h"
#include "../ptx/hopper.h"
#include "../ptx/wgmma.h"
#include "common.cuh"

namespace nk::cuda::quantize {

constexpr int kStreamTokens = 8, kGroupWarps = 8;
constexpr int kStreamCtas = 8;    // the largest cluster that every device with clusters can hold
constexpr int kStreamStages = 8;  // tiles in shared memory, at most
constexpr int kStreamRanks = 32;
constexpr int kChunkBytes = kStreamTokens * kGroupSize * 2;         // of x
constexpr int kFactorChunkBytes = kStreamRanks * kGroupSize * 2;    // of the factor
constexpr int kSumValues = 2 * kStreamTokens * kStreamRanks;        // sums of one tile that a CTA gets
constexpr int kLargestChunks = 4;                                   // of a warp

struct StreamParameters {
    Parameters common;
    int cta_chunks;  // of 64 channels, even: two of them are multiplied at once
    int stages;
    int row_tokens;  // that share a row of the modulation; no tile has tokens of two rows
    const char *scale, *shift;
    float eps;
};

// CTAs share a multiprocessor with no other, so groups hide each other's waiting; registers limit their number.
__host__ __device__ constexpr int stream_groups(int chunks, bool low_rank) { return chunks <= 3 && !low_rank ? 3 : 2; }

__host__ __device__ constexpr int stream_warps(int chunks, bool low_rank) {
    return stream_groups(chunks, low_rank) * kGroupWarps + (low_rank ? 4 : 0) + 4;
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

// A place in a ring of so many stages, and the parity of its phase.
struct StreamStage {
    int index, parity, stages;

    __device__ void advance() {
        if (++index == stages) index = 0, parity ^= 1;
    }
};

struct StreamShared {
    uint64_t arrived[kStreamStages], modulated[kStreamStages], freed[kStreamStages];  // barriers
    uint64_t sums_received[2];
    struct Group {
        uint64_t maxima_received[2], moments_received[2];
        alignas(16) uint32_t warp_maxima[kGroupWarps][kStreamTokens];
        uint32_t maxima[2][kStreamCtas][kStreamTokens];  // of each CTA; zeros of CTAs that are not there
        alignas(16) float2 warp_moments[kGroupWarps][kStreamTokens];  // mean, and part of the variance around it
        float2 moments[2][kStreamCtas][kStreamTokens];
    } groups[3];
    float cta_weights[kStreamCtas], warp_weights[kGroupWarps];  // of their means
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
struct StreamPlace {
    StreamShared& shared;
    uint32_t ring, factors, reciprocals;
    int cta, ctas, team, teams;

    __device__ StreamPlace(const StreamParameters& stream, char* memory, int stage_bytes, int factor_bytes,
                           int reciprocal_bytes)
        : shared(*reinterpret_cast<StreamShared*>(memory + stream.stages * stage_bytes + factor_bytes +
                                                  reciprocal_bytes)),
          ring(ptx::shared_address(memory)),
          factors(ring + stream.stages * stage_bytes),
          reciprocals(factors + factor_bytes),
          cta(static_cast<int>(ptx::cluster_rank())),
          ctas(static_cast<int>(ptx::cluster_size())),
          team(blockIdx.x / ctas),
          teams(gridDim.x / ctas) {}

    // A barrier, by its index in an array of them.
    static __device__ uint32_t barrier(const uint64_t* first, int index) {
        return ptx::shared_address(first) + index * 8;
    }
    __device__ uint32_t stage(const StreamParameters& stream, int index) const {
        return ring + index * stream.cta_chunks * kChunkBytes;
    }
};

// ---- The lane that asks for tiles -----------------------------------------------------------------------------------

struct StreamCopies {
    const StreamParameters& stream;
    const StreamPlace& place;
    const CUtensorMap* map;
    StreamTiles tiles;
    StreamStage stage;

    __device__ void start_one() {
        const uint32_t barrier = place.barrier(place.shared.arrived, stage.index);
        ptx::arrive_expecting(barrier, stream.cta_chunks * kChunkBytes);
        ptx::tensor_load_3d(place.stage(stream, stage.index), map, 0, tiles.first, place.cta * stream.cta_chunks,
                            barrier);
        tiles.advance(), stage.advance();
    }
    // What fits at once.
    __device__ void start() {
        for (int i = 0; i < stream.stages && tiles.left(); ++i) start_one();
    }
    __device__ void finish() {
        while (tiles.left()) {
            ptx::wait(place.barrier(place.shared.freed, stage.index), stage.parity ^ 1);
            start_one();
        }
    }
};

// ---- The warpgroup of the low-rank sums -----------------------------------------------------------------------------

// This CTA's part of the factor, rank-major in chunks of 64 channels, swizzled. For 128 threads.
__device__ inline void load_factor(const StreamParameters& stream, const StreamPlace& place) {
    const Parameters& p = stream.common;
    constexpr int kBatch = 4;  // loads in flight
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, tiles = p.rank / 16;
    const int steps = stream.cta_chunks * 4 * kRankTiles;  // of 16 channels and 16 ranks
    const int64_t first = int64_t{place.cta} * stream.cta_chunks * 4;
#pragma unroll 1
    for (int from = warp; from < steps; from += 4 * kBatch) {
        uint4 words[kBatch];
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {  // branchless, so that loads overlap
            const int step = from + i * 4, tile = min(step % kRankTiles, tiles - 1);
            const int64_t of = min(first + step / kRankTiles, int64_t{p.groups} * 4 - 1);
            words[i] = __ldg(p.proj_down + (of * tiles + tile) * 32 + lane);
        }
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
            const int step = from + i * 4, tile = step % kRankTiles, k = step / kRankTiles;
            if (step >= steps) continue;
            if (tile >= tiles || first + k >= int64_t{p.groups} * 4) words[i] = {};
            // Published order has the two halves of a row's 16 channels together, then the row eight below.
            const uint32_t row = place.factors + k / 4 * kFactorChunkBytes + (tile * 16 + lane / 4) * 128 + lane % 4 * 4;
            const uint32_t low = (k % 4 * 2 ^ lane / 4) * 16, high = low ^ 16;
            ptx::store_shared_4(row + low, words[i].x), ptx::store_shared_4(row + high, words[i].y);
            ptx::store_shared_4(row + 1024 + low, words[i].z), ptx::store_shared_4(row + 1024 + high, words[i].w);
        }
    }
    ptx::fence_async_proxy();
    ptx::sync_threads<128>(1);
}

template <class Element, bool norm>
__device__ void sum_low_rank(const StreamParameters& stream, const StreamPlace& place) {
    const Parameters& p = stream.common;
    StreamShared& shared = place.shared;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, index = threadIdx.x % 128;
    const int share = kStreamTokens / place.ctas;  // tokens whose sums this CTA adds up

    load_factor(stream, place);

    // Sums of a tile lie in registers as [64 x 16]: those of the first 32 rows and 8 columns are ranks and tokens of
    // even chunks, of the last ones of odd chunks; the other half means nothing.
    const int half = warp / 2, rank = warp % 2 * 16 + lane / 4, part = place.cta * 2 + half;
    uint32_t sums_at[2], barrier_at[2];  // of this lane's two tokens, in the CTA that adds them up
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int token = lane % 4 * 2 + i, to = token / share;
        sums_at[i] = ptx::address_in_cta(
            ptx::shared_address(&shared.sums[0][(part * share + token % share) * kStreamRanks + rank]), to);
        barrier_at[i] = ptx::address_in_cta(ptx::shared_address(shared.sums_received), to);
    }
    const auto send = [&](int n, const float(&sums)[8]) {
        const int to = n % 2;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float sum = half ? sums[4 + i] : sums[i];
            ptx::send_4(sums_at[i % 2] + (to * kSumValues + i / 2 * 8) * 4, __float_as_uint(sum),
                        barrier_at[i % 2] + to * 8);
        }
    };
    const auto add_up = [&](int n, const StreamTiles& tile) {
        const int from = n % 2;
        ptx::wait(place.barrier(shared.sums_received, from), n / 2 % 2);
        const int token = place.cta * share + index / kStreamRanks, of_rank = index % kStreamRanks;
        if (index >= share * kStreamRanks) return;
        float sum = 0;
        for (int i = 0; i < place.ctas * 2; ++i) sum += shared.sums[from][i * share * kStreamRanks + index];
        if (token < tile.tokens && of_rank < p.rank) store_sum(p, int64_t{tile.first} + token, of_rank, sum);
    };

    StreamTiles tiles(stream, place.team, place.teams), before = tiles;
    StreamStage stage{0, 0, stream.stages};
    float sums[8]{};
    int n = 0;
#pragma unroll 1
    for (; tiles.left(); ++n) {
        if (index == 0) ptx::arrive_expecting(place.barrier(shared.sums_received, n % 2), kSumValues * 4);
        ptx::wait(place.barrier(norm ? shared.modulated : shared.arrived, stage.index), stage.parity);
        uint64_t a = ptx::wgmma_operand<128>(place.factors);
        uint64_t b = ptx::wgmma_operand<128>(place.stage(stream, stage.index));
        ptx::wgmma_fence();
        int chunk = 0;
#pragma unroll 1
        do {
#pragma unroll
            for (int k = 0; k < 4; ++k)  // of 16 channels, 32 bytes
                ptx::wgmma_64x16<std::is_same_v<Element, BF16>>(sums, a + k * 2, b + k * 2, chunk + k > 0);
            a += 2 * kFactorChunkBytes / 16, b += 2 * kChunkBytes / 16;
            chunk += 2;
        } while (chunk < stream.cta_chunks);
        ptx::wgmma_commit();
        if (n) add_up(n - 1, before);
        ptx::wgmma_wait<0>();
        if (lane == 0) ptx::arrive(place.barrier(shared.freed, stage.index));
        send(n, sums);
        before = tiles;
        tiles.advance(), stage.advance();
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

// The maxima, or behind a norm the moments, of a tile's tokens over all channels: each warp leaves its own in shared
// memory, a warp adds up what the CTA has and sends it to all CTAs.
struct StreamExchange {
    const StreamPlace& place;
    StreamShared::Group& group;
    int id, warp;  // of the group, in the group

    __device__ void meet() const { ptx::sync_threads<kGroupWarps * 32>(2 + id); }

    __device__ uint32_t maximum(uint32_t own, int turn) const {
        const int lane = threadIdx.x % 32, token = lane / 8 + lane % 8 / 4 * 4;
        const int to = turn % 2;
        const uint32_t barrier = place.barrier(group.maxima_received, to);
        if (lane % 4 == 0) group.warp_maxima[warp][token] = own;
        meet();
        if (warp == 0) {
            if (lane == 0) ptx::arrive_expecting(barrier, place.ctas * kStreamTokens * 4);
            const int of_cta = lane / 2, half = lane % 2;
            uint4 largest{};
#pragma unroll
            for (int of = 0; of < kGroupWarps; ++of) {
                const uint4 v = *reinterpret_cast<const uint4*>(&group.warp_maxima[of][half * 4]);
                largest = {max(largest.x, v.x), max(largest.y, v.y), max(largest.z, v.z), max(largest.w, v.w)};
            }
            if (of_cta < place.ctas)
                ptx::send_16(ptx::address_in_cta(ptx::shared_address(&group.maxima[to][place.cta][half * 4]), of_cta),
                             largest, ptx::address_in_cta(barrier, of_cta));
        }
        ptx::wait(barrier, turn / 2 % 2);
        uint32_t bits = max(group.maxima[to][lane % 4][token], group.maxima[to][lane % 4 + 4][token]);
        bits = max(bits, __shfl_xor_sync(~0u, bits, 1));
        return max(bits, __shfl_xor_sync(~0u, bits, 2));
    }

    // From the warp's mean and its part of the variance around that: mean and variance of the token.
    __device__ float2 moments(float2 own, int turn) const {
        const int lane = threadIdx.x % 32, token = lane / 8 + lane % 8 / 4 * 4;
        const int to = turn % 2;
        const StreamShared& shared = place.shared;
        const uint32_t barrier = place.barrier(group.moments_received, to);
        if (lane % 4 == 0) group.warp_moments[warp][token] = own;
        meet();
        if (warp == 0) {
            if (lane == 0) ptx::arrive_expecting(barrier, place.ctas * kStreamTokens * 8);
            const int of_cta = lane / 4, two = lane % 4;
            float4 parts[kGroupWarps];
            float2 mean{}, variance{};
#pragma unroll
            for (int of = 0; of < kGroupWarps; ++of) {
                parts[of] = *reinterpret_cast<const float4*>(&group.warp_moments[of][two * 2]);
                mean.x += shared.warp_weights[of] * parts[of].x, mean.y += shared.warp_weights[of] * parts[of].z;
            }
#pragma unroll
            for (int of = 0; of < kGroupWarps; ++of) {
                const float weight = shared.cta_weights[place.cta] * shared.warp_weights[of];
                variance.x += parts[of].y + weight * (parts[of].x - mean.x) * (parts[of].x - mean.x);
                variance.y += parts[of].w + weight * (parts[of].z - mean.y) * (parts[of].z - mean.y);
            }
            const uint4 words{__float_as_uint(mean.x), __float_as_uint(variance.x), __float_as_uint(mean.y),
                              __float_as_uint(variance.y)};
            if (of_cta < place.ctas)
                ptx::send_16(ptx::address_in_cta(ptx::shared_address(&group.moments[to][place.cta][two * 2]), of_cta),
                             words, ptx::address_in_cta(barrier, of_cta));
        }
        ptx::wait(barrier, turn / 2 % 2);
        const auto over_ctas = [](float value) {
            value += __shfl_xor_sync(~0u, value, 1);
            return value + __shfl_xor_sync(~0u, value, 2);
        };
        const int one = lane % 4, other = one + 4;
        const float2 a = group.moments[to][one][token], b = group.moments[to][other][token];
        const float a_weight = shared.cta_weights[one], b_weight = shared.cta_weights[other];
        const float mean = over_ctas(a_weight * a.x + b_weight * b.x);
        return {mean, over_ctas(a.y + b.y + a_weight * (a.x - mean) * (a.x - mean) +
                                b_weight * (b.x - mean) * (b.x - mean))};
    }
};

template <class Element, int kChunks, int kGroups, bool low_rank, bool norm>
__device__ void quantize_tiles(const StreamParameters& stream, const StreamPlace& place) {
    const Parameters& p = stream.common;
    StreamShared& shared = place.shared;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % kGroupWarps, id = threadIdx.x / 32 / kGroupWarps;
    const int row = lane / 8, piece = lane % 8;
    const int cta_chunk = place.cta * stream.cta_chunks, first_chunk = cta_chunk + warp * kChunks;
    const auto chunks_until = [&](int end) {
        return max(0, min(kChunks, min(end, cta_chunk + stream.cta_chunks) - first_chunk));
    };
    const int stored = chunks_until(p.groups), given = chunks_until(static_cast<int>(p.channels) / kGroupSize);
    const StreamExchange exchange{place, shared.groups[id], id, warp};
    const int64_t code_row = int64_t{p.groups} * kGroupSize;
    // Of a block of 32 channels, lanes of a pair swap words: the even one stores from the first 16 bytes of the codes,
    // the odd one from the others.
    int8_t* const codes =
        p.codes + int64_t{first_chunk} * kGroupSize + piece / 4 * 32 + piece % 2 * 16 + piece % 4 / 2 * 8;
    const uint32_t own_reciprocals = place.reciprocals + (warp * kChunks * 16 + piece) * 16;
    const uint32_t own_x = warp * kChunks * kChunkBytes + row * 128 + (piece ^ row) * 16;
    const auto x_at = [&](uint32_t slot, int c, int i) {  // the swizzle of a row four below differs in one bit
        return (i ? slot + 512 ^ 64 : slot) + c * kChunkBytes;
    };

    StreamTiles tiles(stream, place.team, place.teams);
    StreamStage stage{0, 0, stream.stages};
    for (int i = 0; i < id; ++i) tiles.advance(), stage.advance();
#pragma unroll 1
    for (int turn = 0; tiles.left(); ++turn) {
        const uint32_t slot = place.stage(stream, stage.index) + own_x;
        const uint32_t freed = place.barrier(shared.freed, stage.index);
        uint4 x[kChunks][2];
        float values[kChunks][2][8];
        ptx::wait(place.barrier(shared.arrived, stage.index), stage.parity);
#pragma unroll
        for (int c = 0; c < kChunks; ++c)
#pragma unroll
            for (int i = 0; i < 2; ++i) x[c][i] = ptx::load_shared_16(x_at(slot, c, i), c < given);
        if (!(norm && low_rank)) {
            __syncwarp();
            if (lane == 0) ptx::arrive(freed);
        }
        const auto unpack = [&] {
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
        };
        unpack();

        if constexpr (norm) {
            const auto add = [](float a, float b) { return a + b; };
            float sums[2]{}, means[2], squares[2]{};
#pragma unroll
            for (int i = 0; i < 2; ++i)
#pragma unroll
                for (int c = 0; c < kChunks; ++c)
#pragma unroll
                    for (int j = 0; j < 8; ++j) sums[i] += values[c][i][j];
            const float inverse_channels = given ? 1.0f / static_cast<float>(given * kGroupSize) : 0.0f;
            const float mean = over_lanes(sums[0], sums[1], add) * inverse_channels;
            of_both(mean, means);
#pragma unroll
            for (int i = 0; i < 2; ++i)
#pragma unroll
                for (int c = 0; c < kChunks; ++c) {
                    if (c >= given) continue;
#pragma unroll
                    for (int j = 0; j < 8; ++j) {
                        const float around = values[c][i][j] - means[i];
                        squares[i] = fmaf(around, around, squares[i]);
                    }
                }
            const float variance = over_lanes(squares[0], squares[1], add) / static_cast<float>(p.channels);
            const float2 moments = exchange.moments({mean, variance}, turn);
            float deviations[2];  // their reciprocals
            of_both(moments.x, means), of_both(rsqrtf(moments.y + stream.eps), deviations);
            const int64_t offset = (int64_t{tiles.row} * p.channels + int64_t{first_chunk} * kGroupSize + piece * 8) * 2;
#pragma unroll
            for (int c = 0; c < kChunks; ++c) {
                if (c >= given) continue;
                const uint4 scale = __ldg(reinterpret_cast<const uint4*>(stream.scale + offset + c * kGroupSize * 2));
                const uint4 shift = __ldg(reinterpret_cast<const uint4*>(stream.shift + offset + c * kGroupSize * 2));
                const uint32_t scales[4] = {scale.x, scale.y, scale.z, scale.w};
                const uint32_t shifts[4] = {shift.x, shift.y, shift.z, shift.w};
                uint32_t words[2][4];
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    const float2 a = unpacked<Element>(scales[j]), b = unpacked<Element>(shifts[j]);
#pragma unroll
                    for (int i = 0; i < 2; ++i) {
                        float(&v)[8] = values[c][i];
                        words[i][j] =
                            packed<Element>(fmaf((v[2 * j] - means[i]) * deviations[i], 1.0f + a.x, b.x),
                                            fmaf((v[2 * j + 1] - means[i]) * deviations[i], 1.0f + a.y, b.y));
                        const float2 pair = unpacked<Element>(words[i][j]);
                        v[2 * j] = pair.x, v[2 * j + 1] = pair.y;
                    }
                }
                if constexpr (low_rank) {
#pragma unroll
                    for (int i = 0; i < 2; ++i)
                        ptx::store_shared_16(x_at(slot, c, i), {words[i][0], words[i][1], words[i][2], words[i][3]});
                }
            }
            if constexpr (low_rank) {
                ptx::fence_async_proxy();  // wgmma reads what was stored
                __syncwarp();
                if (lane == 0) ptx::arrive(place.barrier(shared.modulated, stage.index)), ptx::arrive(freed);
            }
        }

        float largest[2][2]{};
#pragma unroll
        for (int c = 0; c < kChunks; ++c)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const float4 four = load_shared_float4(own_reciprocals + (c * 16 + half * 8) * 16);
                const float reciprocals[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
                for (int j = 0; j < 4; ++j)
#pragma unroll
                    for (int i = 0; i < 2; ++i) {
                        float& value = values[c][i][half * 4 + j];
                        value = smoothed(value, p.shift, reciprocals[j]);
                        largest[i][j % 2] = ptx::max_magnitude(largest[i][j % 2], value);
                    }
            }
        const auto maximum = [](uint32_t a, uint32_t b) { return max(a, b); };
        const uint32_t own =
            over_lanes(__float_as_uint(ptx::max_magnitude(largest[0][0], largest[0][1])),
                       __float_as_uint(ptx::max_magnitude(largest[1][0], largest[1][1])), maximum);
        const TokenScale token(exchange.maximum(own, turn));
        const int own_token = row + piece / 4 * 4;
        if (place.cta == 0 && warp == 0 && piece % 4 == 0 && own_token < tiles.tokens)
            p.ascales[tiles.first + own_token] = token.activation;
        float inverses[2];
        uint32_t keep[2];
        of_both(token.inverse, inverses), of_both(token.keep, keep);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            int8_t* const out = codes + (int64_t{tiles.first} + row + i * 4) * code_row;
#pragma unroll
            for (int c = 0; c < kChunks; ++c) {
                uint32_t bytes[8];
#pragma unroll
                for (int j = 0; j < 8; ++j) bytes[j] = rounded(values[c][i][j], inverses[i]);
                const uint32_t low = low_bytes({bytes[0], bytes[4], bytes[1], bytes[5]}) & keep[i];
                const uint32_t high = low_bytes({bytes[2], bytes[6], bytes[3], bytes[7]}) & keep[i];
                const uint32_t got = __shfl_xor_sync(~0u, piece % 2 ? low : high, 1);
                if (row + i * 4 < tiles.tokens && c < stored)
                    *reinterpret_cast<uint2*>(out + c * kGroupSize) =
                        piece % 2 ? make_uint2(got, high) : make_uint2(low, got);
            }
        }
#pragma unroll
        for (int i = 0; i < kGroups; ++i) tiles.advance(), stage.advance();
    }
}

// ---- The kernel -----------------------------------------------------------------------------------------------------

// 1 / smooth of this CTA's channels, zeros beyond them: in halves of 8 channels, so that 8 lanes read other banks.
template <int kChunks>
__device__ void store_reciprocals(const StreamParameters& stream, const StreamPlace& place, int threads) {
    const Parameters& p = stream.common;
    constexpr int kChannels = kGroupWarps * kChunks * kGroupSize;
    const int64_t first = int64_t{place.cta} * stream.cta_chunks * kGroupSize;
    const int64_t end = min(p.channels, first + stream.cta_chunks * kGroupSize);
    for (int i = threadIdx.x; i < kChannels; i += threads) {
        const int64_t k = first + i, read = min(k, end - 1);
        const int64_t position = read / 16 * 16 + read % 8 / 2 * 4 + read % 16 / 8 * 2 + read % 2;
        const float smooth = p.smooth && end > first ? load_smooth_at(p, position) : 1.0f;
        const uint32_t at = place.reciprocals + ((i / 64 * 2 + i % 8 / 4) * 8 + i % 64 / 8) * 16 + i % 4 * 4;
        ptx::store_shared_4(at, __float_as_uint(k < end ? __frcp_rn(smooth) : 0.0f));
    }
}

template <class Element, int kChunks, bool low_rank, bool norm>
__global__ void __launch_bounds__(stream_warps(kChunks, low_rank) * 32, 1)
    quantize_stream(const __grid_constant__ CUtensorMap x, const __grid_constant__ StreamParameters stream) {
    constexpr int kGroups = stream_groups(kChunks, low_rank), kQuantizing = kGroups * kGroupWarps * 32;
    // Together no more than what 64 K registers are when all threads have the same multiple of 8.
    constexpr int kQuantizeRegisters = kGroups == 3 ? 80 : low_rank ? 96 : 104;
    constexpr int kOtherRegisters = kGroups == 3 ? 24 : low_rank ? 48 : 64;
    extern __shared__ __align__(1024) char stream_memory[];  // the swizzle counts from multiples of 1024
    const Parameters& p = stream.common;
    const StreamPlace place(stream, stream_memory, stream.cta_chunks * kChunkBytes,
                            low_rank ? stream.cta_chunks * kFactorChunkBytes : 0,
                            kGroupWarps * kChunks * kGroupSize * 4);
    StreamShared& shared = place.shared;
    const bool copies = threadIdx.x == blockDim.x - 128;
    StreamCopies copying{stream, place, &x, StreamTiles(stream, place.team, place.teams), {0, 0, stream.stages}};
    if (copies) {
        for (int i = 0; i < stream.stages; ++i) {
            ptx::init_barrier(place.barrier(shared.arrived, i), 1);
            ptx::init_barrier(place.barrier(shared.modulated, i), kGroupWarps);
            ptx::init_barrier(place.barrier(shared.freed, i), kGroupWarps + (low_rank ? 4 : 0));
        }
        for (int i = 0; i < 2; ++i) {
            ptx::init_barrier(place.barrier(shared.sums_received, i), 1);
            for (int group = 0; group < kGroups; ++group) {
                ptx::init_barrier(place.barrier(shared.groups[group].maxima_received, i), 1);
                ptx::init_barrier(place.barrier(shared.groups[group].moments_received, i), 1);
            }
        }
        ptx::fence_barrier_init();
        copying.start();
    }
    ptx::cluster_arrive_relaxed();
    if (threadIdx.x < kQuantizing) {
        store_reciprocals<kChunks>(stream, place, kQuantizing);
        // Of CTAs that are not there.
        for (int i = threadIdx.x; i < kGroups * 2 * kStreamCtas * kStreamTokens; i += kQuantizing) {
            const int of = i / kStreamTokens % kStreamCtas, slot = i / kStreamTokens / kStreamCtas;
            if (of < place.ctas) continue;
            shared.groups[slot / 2].maxima[slot % 2][of][i % kStreamTokens] = 0;
            shared.groups[slot / 2].moments[slot % 2][of][i % kStreamTokens] = {};
        }
        if (norm && threadIdx.x < kStreamCtas) {
            const auto channels = [&](int64_t first, int64_t end) {
                return static_cast<float>(max(int64_t{0}, min(end, p.channels) - min(first, p.channels)));
            };
            const int64_t cta_channels = stream.cta_chunks * kGroupSize, of = threadIdx.x;
            shared.cta_weights[of] =
                of < place.ctas ? channels(of * cta_channels, (of + 1) * cta_channels) / p.channels : 0.0f;
            const int64_t first = place.cta * cta_channels, warp_channels = kChunks * kGroupSize;
            shared.warp_weights[of] =
                channels(first + min(of * warp_channels, cta_channels), first + min((of + 1) * warp_channels, cta_channels)) /
                max(1.0f, channels(first, first + cta_channels));
        }
    }
    __syncthreads();
    ptx::cluster_wait();  // all barriers are there

    if (threadIdx.x < kQuantizing) {
        ptx::take_registers<kQuantizeRegisters>();
        quantize_tiles<Element, kChunks, kGroups, low_rank, norm>(stream, place);
    } else {
        ptx::give_up_registers<kOtherRegisters>();
        if (copies)
            copying.finish();
        else if (low_rank && threadIdx.x < kQuantizing + 128)
            sum_low_rank<Element, norm>(stream, place);
    }
    ptx::cluster_arrive_relaxed();  // no CTA ends before the others have what it sent
    ptx::cluster_wait();
}

}  // namespace nk::cuda::quantize
