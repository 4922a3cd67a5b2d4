// quantize_stream (sm_90): 16-bit x with aligned rows, at most 15360 channels and a rank of at most 32; optionally
// behind a layer norm and a modulation.
//
// A cluster of CTAs splits the channels. Each of its warps keeps the same kBlocks blocks of 32 channels from the first
// tile of 8 tokens to the last: 1 / smooth in registers, its part of the low-rank factor in shared memory. Of a block a
// lane holds 16 bytes of one token, which are the B operand of two products (the channels of a sum come in any order,
// if the factor has the same) and two words of permuted codes.
//
// What a token needs from all its channels (maximum, low-rank sums, moments) warps leave in shared memory; a few of
// them add up what the CTA has and send it to the others, on a barrier that counts bytes. It is used one step later:
// until then the warps do the first half of the next tile. So a step has the products of one tile and the codes of the
// one before, and behind a norm the moments of the one after.
#pragma once

#include <cuda_bf16.h>

#include "../ptx/cluster.h"
#include "../ptx/hopper.h"
#include "common.cuh"

namespace nk::cuda::quantize {

constexpr int kStreamWarps = 12;  // at most
constexpr int kStreamTokens = 8, kBlockChannels = 32, kBlockBytes = kBlockChannels * 2;
constexpr int kStreamCtas = 8;    // the largest cluster that every device with clusters can hold
constexpr int kStreamStages = 4;  // tiles in shared memory, at most: more only delay the first
constexpr int kSumPairs = kStreamTokens * kRankTiles * 16 / 2;  // low-rank sums of a tile, two tokens at once
constexpr int kFactorBytes = 2 * kRankTiles * 512;              // of a block, A operands of a warp

// Of a tile; rows that follow each other begin in different halves of the banks.
__host__ __device__ constexpr int stream_row_bytes(int warps, int blocks) { return warps * blocks * kBlockBytes + 64; }

struct StreamParameters {
    Parameters common;
    int cta_blocks;  // of 32 channels
    int stages;
    int tiles, tiles_per_row;
    int64_t row_tokens;  // that share a row of the modulation; no tile has tokens of two rows
    const char *scale, *shift;
    float eps;
};

// Tokens of a tile.
struct StreamTile {
    int64_t first, row;  // of x, of the modulation
    int tokens;
};

struct StreamShared {
    uint64_t received[2], arrived[kStreamStages];  // barriers; [step % 2] for what CTAs send
    StreamTile tiles[kStreamStages];
    alignas(16) uint32_t maxima[2][kStreamCtas][kStreamTokens];
    float2 sums[2][kSumPairs];                      // this CTA's share of them, one CTA's after the other's
    float2 own_sums[2][kSumPairs];                  // this CTA's part of all of them
    float2 moments[2][kStreamCtas][kStreamTokens];  // mean, and part of the variance around it
    uint32_t warp_maxima[2][kStreamWarps][kStreamTokens];
    float2 warp_moments[2][kStreamWarps][kStreamTokens];
    float cta_weights[kStreamCtas], warp_weights[kStreamWarps];  // of their means
};

constexpr int kStreamHeadBytes = (sizeof(StreamShared) + 127) / 128 * 128;

// CTAs of a multiprocessor: while one waits for its warps to meet, the other computes.
__host__ __device__ constexpr int stream_ctas_per_processor(int warps, int blocks, bool low_rank, bool norm) {
    const bool plain = !low_rank && !norm;
    return warps <= 6 ? (plain ? 3 : 2) : blocks <= 4 && plain ? 2 : 1;
}

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

// Element i of lane 4 g + j becomes element j of lane 4 g + i.
__device__ __forceinline__ void transpose_in_quad(uint2 (&elements)[4]) {
#pragma unroll
    for (int bit = 1; bit <= 2; bit *= 2) {
        const bool upper = threadIdx.x & bit;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if (i & bit) continue;
            uint2 &low = elements[i], &high = elements[i | bit];
            const uint2 sent = upper ? low : high;
            const uint2 got{__shfl_xor_sync(~0u, sent.x, bit), __shfl_xor_sync(~0u, sent.y, bit)};
            low = upper ? got : low, high = upper ? high : got;
        }
    }
}

template <class T, class Combine>
__device__ __forceinline__ T over_quad(T value, Combine combine) {
    value = combine(value, __shfl_xor_sync(~0u, value, 1));
    return combine(value, __shfl_xor_sync(~0u, value, 2));
}

template <class Element, int kWarps, int kBlocks, bool low_rank, bool norm>
__global__ void __launch_bounds__(kWarps * 32, stream_ctas_per_processor(kWarps, kBlocks, low_rank, norm))
    quantize_stream(const __grid_constant__ StreamParameters stream) {
    const Parameters& p = stream.common;
    static_assert(kBlocks >= 2, "a warp's sums fit where its x was");
    static_assert(kWarps >= kSumPairs / 32 + 2 && kWarps <= kStreamWarps, "each has at most one kind to add up");
    constexpr int kRowBytes = stream_row_bytes(kWarps, kBlocks), kStageBytes = kStreamTokens * kRowBytes;
    constexpr int kWarpBytes = kBlocks * kBlockBytes;                         // of a row
    constexpr int kProductsLag = norm ? 1 : 0, kCodesLag = kProductsLag + 1;  // steps behind the arrival of a tile
    constexpr int kAddingWarps = kSumPairs / 32, kMaximaWarp = kWarps - 1, kMomentsWarp = kWarps - 2;
    extern __shared__ __align__(128) char shared_bytes[];
    StreamShared& shared = *reinterpret_cast<StreamShared*>(shared_bytes);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, u = lane % 4;
    const int cta = static_cast<int>(ptx::cluster_rank()), ctas = static_cast<int>(ptx::cluster_size());
    const int team = blockIdx.x / ctas, teams = gridDim.x / ctas;
    const int count = (stream.tiles - team + teams - 1) / teams;

    const int64_t cta_k = int64_t{cta} * stream.cta_blocks * kBlockChannels;
    const auto clamped = [](int64_t value, int most) {
        return static_cast<int>(max(int64_t{0}, min(value, int64_t{most})));
    };
    const int cta_channels = clamped(p.channels - cta_k, stream.cta_blocks * kBlockChannels);
    const int warp_channels = clamped(cta_channels - warp * kBlocks * kBlockChannels, kBlocks * kBlockChannels);
    const int first_block = cta * stream.cta_blocks + warp * kBlocks;
    const int blocks = min(kBlocks, min(stream.cta_blocks - warp * kBlocks, p.groups * 2 - first_block));  // or less
    const int pieces = (warp_channels - u * 8 + kBlockChannels - 1) / kBlockChannels;                      // of x
    const int64_t first_k = int64_t{first_block} * kBlockChannels + u * 8;

    char* const ring = shared_bytes + kStreamHeadBytes;
    const uint32_t own_ring = ptx::shared_address(ring) + g * kRowBytes + warp * kWarpBytes + u * 16;
    const uint32_t factors =
        ptx::shared_address(ring) + stream.stages * kStageBytes + warp * kBlocks * kFactorBytes + lane * 16;
    const uint32_t received = ptx::shared_address(shared.received), arrived = ptx::shared_address(shared.arrived);
    const auto copy_tile = [&](int n, int stage) {  // for one warp: a lane per token
        const int index = team + n * teams, row = norm ? index / stream.tiles_per_row : 0;
        const int64_t inside = int64_t{index - row * stream.tiles_per_row} * kStreamTokens;
        const int64_t first = row * stream.row_tokens + inside;
        const int tokens = static_cast<int>(min(int64_t{kStreamTokens}, stream.row_tokens - inside));
        const uint32_t barrier = arrived + stage * 8;
        if (lane == 0) {
            shared.tiles[stage] = {first, row, tokens};
            ptx::arrive_expecting(barrier, tokens * cta_channels * 2);
        }
        __syncwarp();
        if (lane < tokens && cta_channels)
            ptx::bulk_load(ptx::shared_address(ring) + stage * kStageBytes + lane * kRowBytes,
                           p.x + (first + lane) * p.row_bytes + cta_k * 2, cta_channels * 2, barrier);
    };
    if (warp == 0) {
        if (lane == 0) {
            // One arrival announces what other CTAs send, the others say that this CTA's own part is there.
            for (int i = 0; i < 2; ++i) ptx::init_barrier(received + i * 8, 2 + (norm ? 1 : 0) + (low_rank ? 1 : 0));
            for (int i = 0; i < stream.stages; ++i) ptx::init_barrier(arrived + i * 8, 1);
            ptx::fence_barrier_init();
        }
        __syncwarp();
        for (int n = 0; n < min(count, stream.stages - kCodesLag); ++n) copy_tile(n, n);
    }
    if constexpr (norm) {
        if (threadIdx.x < kStreamCtas) {
            const int64_t k = int64_t{threadIdx.x} * stream.cta_blocks * kBlockChannels;
            shared.cta_weights[threadIdx.x] =
                static_cast<float>(clamped(p.channels - k, stream.cta_blocks * kBlockChannels)) / p.channels;
        }
        if (lane == 0) shared.warp_weights[warp] = static_cast<float>(warp_channels) / max(1, cta_channels);
    }

    // A lane computes every 32nd; loads are branchless, so that they overlap.
    float reciprocals[kBlocks][8];
    {
        float smooth[kBlocks];
#pragma unroll
        for (int j = 0; j < kBlocks; ++j) {
            const int64_t k = min(first_block + j, p.groups * 2 - 1) * int64_t{kBlockChannels} + lane;
            smooth[j] = p.smooth ? load_smooth_at(p, k / 16 * 16 + k % 8 / 2 * 4 + k % 16 / 8 * 2 + k % 2) : 1.0f;
        }
#pragma unroll
        for (int j = 0; j < kBlocks; ++j) {
            const float reciprocal = j * kBlockChannels + lane < warp_channels ? __frcp_rn(smooth[j]) : 0.0f;
#pragma unroll
            for (int i = 0; i < 8; ++i) reciprocals[j][i] = __shfl_sync(~0u, reciprocal, u * 8 + i);
        }
    }
    if constexpr (low_rank) {
        const int tiles = p.rank / 16;
        uint4 half[kBlocks][kRankTiles][2];
#pragma unroll
        for (int j = 0; j < kBlocks; ++j)
#pragma unroll
            for (int ranks = 0; ranks < kRankTiles; ++ranks)
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    const int64_t step = min(first_block + j, p.groups * 2 - 1) * int64_t{2} + i;
                    half[j][ranks][i] = __ldg(p.proj_down + (step * tiles + min(ranks, tiles - 1)) * 32 + lane);
                }
#pragma unroll
        for (int j = 0; j < kBlocks; ++j)
#pragma unroll
            for (int ranks = 0; ranks < kRankTiles; ++ranks) {
                // Published order: channels 2 u, 2 u + 1 of each 8. Wanted: all channels of the u-th 8.
                const uint4 &even = half[j][ranks][0], &odd = half[j][ranks][1];
                uint2 words[4] = {{even.x, even.z}, {even.y, even.w}, {odd.x, odd.z}, {odd.y, odd.w}};
                transpose_in_quad(words);
                const uint32_t to = factors + j * kFactorBytes + ranks * 512;
                ptx::store_shared_16(to, {words[0].x, words[0].y, words[1].x, words[1].y});
                ptx::store_shared_16(to + kRankTiles * 512, {words[2].x, words[2].y, words[3].x, words[3].y});
            }
    }
    __syncthreads();
    ptx::cluster_arrive_relaxed();
    ptx::cluster_wait();  // all barriers are there

    // The first half of a tile behind a norm.
    float2 moments{};
    const float inverse_warp_channels = 1.0f / static_cast<float>(max(1, warp_channels));
    const float inverse_channels = 1.0f / static_cast<float>(p.channels);
    const auto find_moments = [&](int stage) {
        // Around the warp's first channel, so that a large mean does not drown the variance.
        const uint32_t slot = own_ring + stage * kStageBytes;
        const uint32_t first =
            *reinterpret_cast<const uint32_t*>(ring + stage * kStageBytes + g * kRowBytes + warp * kWarpBytes);
        const float pivot = warp_channels ? unpacked<Element>(first).x : 0.0f;
        float2 sum{}, squares{};
#pragma unroll
        for (int j = 0; j < kBlocks; ++j) {
            const uint4 x = ptx::load_shared_16(slot + j * kBlockBytes, j < pieces);
            const float around = j < pieces ? pivot : 0.0f;
            for (const uint32_t word : {x.x, x.y, x.z, x.w}) {
                const float2 pair = unpacked<Element>(word);
                const float a = pair.x - around, b = pair.y - around;
                sum.x += a, sum.y += b;
                squares.x = fmaf(a, a, squares.x), squares.y = fmaf(b, b, squares.y);
            }
        }
        const auto add = [](float a, float b) { return a + b; };
        const float total = over_quad(sum.x + sum.y, add), mean = total * inverse_warp_channels;
        const float around_mean = over_quad(squares.x + squares.y, add) - total * mean;
        moments = {pivot + mean, around_mean * inverse_channels};
    };

    // Maxima and products of a tile; behind a norm the modulated tile takes the place of x.
    float largest = 0;
    float sums[kRankTiles][4] = {};
    const auto multiply = [&](uint32_t slot, int64_t row, int from) {
        float mean = 0, deviation = 1;  // the latter's reciprocal
        uint4 x[kBlocks], scales[kBlocks], shifts[kBlocks];
        if constexpr (norm) {
            const int64_t offset = (row * p.channels + (pieces > 0 ? first_k : 0)) * 2;
#pragma unroll
            for (int j = 0; j < kBlocks; ++j) {  // branchless, so that loads overlap
                const int of = max(0, min(j, pieces - 1)) * kBlockBytes;
                scales[j] = __ldg(reinterpret_cast<const uint4*>(stream.scale + offset + of));
                shifts[j] = __ldg(reinterpret_cast<const uint4*>(stream.shift + offset + of));
            }
#pragma unroll 2
            for (int of = 0; of < ctas; ++of) mean += shared.cta_weights[of] * shared.moments[from][of][g].x;
            float variance = stream.eps;
#pragma unroll 2
            for (int of = 0; of < ctas; ++of) {
                const float2 part = shared.moments[from][of][g];
                variance += part.y + shared.cta_weights[of] * (part.x - mean) * (part.x - mean);
            }
            deviation = rsqrtf(variance);
        }
        float even = 0, odd = 0;
#pragma unroll
        for (int ranks = 0; ranks < kRankTiles; ++ranks)
#pragma unroll
            for (int i = 0; i < 4; ++i) sums[ranks][i] = 0;
#pragma unroll
        for (int j = 0; j < kBlocks; ++j) x[j] = ptx::load_shared_16(slot + j * kBlockBytes, j < pieces);
#pragma unroll
        for (int j = 0; j < kBlocks; ++j) {
            uint32_t words[4] = {x[j].x, x[j].y, x[j].z, x[j].w};
            if constexpr (norm) {
                const uint32_t scale_words[4] = {scales[j].x, scales[j].y, scales[j].z, scales[j].w};
                const uint32_t shift_words[4] = {shifts[j].x, shifts[j].y, shifts[j].z, shifts[j].w};
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const float2 raw = unpacked<Element>(words[i]);
                    const float2 a = unpacked<Element>(scale_words[i]), b = unpacked<Element>(shift_words[i]);
                    const uint32_t modulated = packed<Element>(fmaf((raw.x - mean) * deviation, 1.0f + a.x, b.x),
                                                               fmaf((raw.y - mean) * deviation, 1.0f + a.y, b.y));
                    words[i] = j < pieces ? modulated : 0;
                }
                ptx::store_shared_16(slot + j * kBlockBytes, {words[0], words[1], words[2], words[3]});
            }
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float2 pair = unpacked<Element>(words[i]);
                even = ptx::max_magnitude(even, smoothed(pair.x, p.shift, reciprocals[j][2 * i]));
                odd = ptx::max_magnitude(odd, smoothed(pair.y, p.shift, reciprocals[j][2 * i + 1]));
            }
            if constexpr (low_rank) {
#pragma unroll
                for (int i = 0; i < 2; ++i)
#pragma unroll
                    for (int ranks = 0; ranks < kRankTiles; ++ranks) {
                        const uint4 a =
                            ptx::load_shared_16(factors + j * kFactorBytes + (i * kRankTiles + ranks) * 512);
                        ptx::mma_16<std::is_same_v<Element, BF16>>(sums[ranks], {a.x, a.y, a.z, a.w}, words[2 * i],
                                                                   words[2 * i + 1]);
                    }
            }
        }
        largest = ptx::max_magnitude(even, odd);
    };
    // A warp's sums lie where its x of the tile was whose codes are done: a row is 8 lanes' accumulators of 16 ranks.
    const auto sums_place = [&](int stage, int of_warp, int ranks, int of_lane) {
        return ring + stage * kStageBytes + (ranks * 4 + of_lane / 8) * kRowBytes + of_warp * kWarpBytes +
               of_lane % 8 * 16;
    };

    // Sends what the CTA's warps have left, and stores this CTA's own part. Each kind is the work of other warps.
    const int share = kSumPairs / ctas;
    // A warp puts four words of each lane to this place in CTA `to`, if there is one.
    const auto send_or_store = [&](uint32_t place, int to, const uint32_t(&four)[4], uint32_t barrier) {
        const uint4 words = {four[0], four[1], four[2], four[3]};
        if (to == cta)
            ptx::store_shared_16(place, words);
        else if (to < ctas)
            ptx::send_16(ptx::address_in_cta(place, to), words, ptx::address_in_cta(barrier, to));
        __syncwarp();
        if (lane == 0) ptx::arrive(barrier);
    };
    const auto send = [&](int step, int freed_stage) {
        const int to = step % 2;
        const uint32_t barrier = received + to * 8;
        const int token = lane % kStreamTokens, part = lane / kStreamTokens;  // of four
        if (threadIdx.x == 0)
            ptx::arrive_expecting(barrier, (ctas - 1) * (kStreamTokens * (norm ? 12 : 4) + (low_rank ? share * 8 : 0)));
        if (warp < kAddingWarps) {
            if constexpr (low_rank) {
                const int pair = static_cast<int>(threadIdx.x);
                float2 sum{};
#pragma unroll
                for (int of = 0; of < kWarps; ++of) {
                    const float2 v = *reinterpret_cast<const float2*>(
                        sums_place(freed_stage, of, pair / 64, pair / 2 % 32) + pair % 2 * 8);
                    sum.x += v.x, sum.y += v.y;
                }
                (pair / share == cta ? shared.sums : shared.own_sums)[to][pair] = sum;
                ptx::sync_threads<kSumPairs>(1);
                if (warp == 0) ptx::fence_async_proxy();  // sends read what was stored, copies overwrite what was read
                if (threadIdx.x == 0) ptx::arrive(barrier);
                if (static_cast<int>(threadIdx.x) < ctas && static_cast<int>(threadIdx.x) != cta)
                    ptx::bulk_send(ptx::address_in_cta(ptx::shared_address(&shared.sums[to][cta * share]), threadIdx.x),
                                   ptx::shared_address(&shared.own_sums[to][threadIdx.x * share]), share * 8,
                                   ptx::address_in_cta(barrier, threadIdx.x));
            }
            if constexpr (norm && !low_rank) ptx::fence_async_proxy();
            const int next = step - kCodesLag + stream.stages;
            if (warp == 0 && next < count) copy_tile(next, freed_stage);
        } else if (warp == kMaximaWarp) {
            uint32_t bits = 0;
#pragma unroll
            for (int of = 0; of < kWarps; of += 4)
                if (of + part < kWarps) bits = max(bits, shared.warp_maxima[to][of + part][token]);
            bits = max(bits, __shfl_xor_sync(~0u, bits, 8));
            bits = max(bits, __shfl_xor_sync(~0u, bits, 16));
            uint32_t four[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) four[i] = __shfl_sync(~0u, bits, lane % 2 * 4 + i);
            send_or_store(ptx::shared_address(&shared.maxima[to][cta][lane % 2 * 4]), lane / 2, four, barrier);
        } else if (norm && warp == kMomentsWarp) {
            const auto over_parts = [](float value) {
                value += __shfl_xor_sync(~0u, value, 8);
                return value + __shfl_xor_sync(~0u, value, 16);
            };
            constexpr int kParts = (kWarps + 3) / 4;
            float2 v[kParts];
            float weights[kParts], mean = 0, variance = 0;
#pragma unroll
            for (int i = 0; i < kParts; ++i) {
                const int of = min(i * 4 + part, kWarps - 1);
                v[i] = shared.warp_moments[to][of][token];
                weights[i] = of == i * 4 + part ? shared.warp_weights[of] : 0.0f;
                if (of != i * 4 + part) v[i].y = 0;
                mean += weights[i] * v[i].x;
            }
            mean = over_parts(mean);
#pragma unroll
            for (int i = 0; i < kParts; ++i)
                variance += v[i].y + shared.cta_weights[cta] * weights[i] * (v[i].x - mean) * (v[i].x - mean);
            variance = over_parts(variance);
            uint32_t four[4];
#pragma unroll
            for (int i = 0; i < 4; ++i)
                four[i] = __float_as_uint(__shfl_sync(~0u, i % 2 ? variance : mean, lane % 4 * 2 + i / 2));
            send_or_store(ptx::shared_address(&shared.moments[to][cta][lane % 4 * 2]), lane / 4, four, barrier);
        }
    };

    const int64_t code_row = int64_t{p.groups} * kGroupSize;
    const auto finish = [&](uint32_t slot, const StreamTile tile, int from) {
        uint32_t bits = 0;
#pragma unroll 2
        for (int of = 0; of < ctas; ++of) bits = max(bits, shared.maxima[from][of][g]);
        const TokenScale token(bits);
        if (cta == 0 && warp == 0 && u == 0 && g < tile.tokens) p.ascales[tile.first + g] = token.activation;
        // Lanes of a pair swap words: the even one stores the first 16 bytes of a block's codes, the odd one the
        // others.
        int8_t* const out =
            p.codes + (tile.first + g) * code_row + int64_t{first_block} * kBlockChannels + u % 2 * 16 + u / 2 * 8;
        uint4 x[kBlocks];
#pragma unroll
        for (int j = 0; j < kBlocks; ++j) x[j] = ptx::load_shared_16(slot + j * kBlockBytes, j < pieces);
        uint2 bytes[kBlocks];
#pragma unroll
        for (int j = 0; j < kBlocks; ++j) {
            const uint32_t words[4] = {x[j].x, x[j].y, x[j].z, x[j].w};
            uint32_t codes[8];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float2 pair = unpacked<Element>(words[i]);
                codes[2 * i] = rounded(smoothed(pair.x, p.shift, reciprocals[j][2 * i]), token.inverse);
                codes[2 * i + 1] = rounded(smoothed(pair.y, p.shift, reciprocals[j][2 * i + 1]), token.inverse);
            }
            const uint32_t low = low_bytes({codes[0], codes[4], codes[1], codes[5]}) & token.keep;
            const uint32_t high = low_bytes({codes[2], codes[6], codes[3], codes[7]}) & token.keep;
            const uint32_t got = __shfl_xor_sync(~0u, u % 2 ? low : high, 1);
            bytes[j] = u % 2 ? make_uint2(got, high) : make_uint2(low, got);
        }
        if (g < tile.tokens)
#pragma unroll
            for (int j = 0; j < kBlocks; ++j)
                if (j < blocks) *reinterpret_cast<uint2*>(out + j * kBlockChannels) = bytes[j];
        const int index = static_cast<int>(threadIdx.x) - kSumPairs;  // warps that do not add up
        if (low_rank && index >= 0 && index < share) {
            float2 sum{};
#pragma unroll 2
            for (int of = 0; of < ctas; ++of) {
                const float2 v = shared.sums[from][of * share + index];
                sum.x += v.x, sum.y += v.y;
            }
            const int pair = cta * share + index, of_lane = pair / 2 % 32;
            const int rank = pair / 64 * 16 + pair % 2 * 8 + of_lane / 4, of_token = of_lane % 4 * 2;
            if (rank < p.rank && of_token < tile.tokens) store_sum(p, tile.first + of_token, rank, sum.x);
            if (rank < p.rank && of_token + 1 < tile.tokens) store_sum(p, tile.first + of_token + 1, rank, sum.y);
        }
    };

    int stage = 0, parity = 0;  // of the tile that arrives in this step
    const auto before = [&](int by) { return stage - by + (stage < by ? stream.stages : 0); };
#pragma unroll 1
    for (int step = 0; step < count + kCodesLag; ++step) {
        if (step < count) {
            ptx::wait(arrived + stage * 8, parity);
            if constexpr (norm)
                find_moments(stage);
            else
                multiply(own_ring + stage * kStageBytes, 0, 0);
        }
        const int from = (step + 1) % 2;
        if (step > 0) ptx::wait(received + from * 8, (step - 1) / 2 % 2);
        if constexpr (norm) {
            if (u == 0) shared.warp_moments[step % 2][warp][g] = moments;
            const int of = before(1);
            if (step > 0 && step <= count) multiply(own_ring + of * kStageBytes, shared.tiles[of].row, from);
        }
        const uint32_t bits = over_quad(__float_as_uint(largest), [](uint32_t a, uint32_t b) { return max(a, b); });
        if (u == 0) shared.warp_maxima[step % 2][warp][g] = bits;
        const int freed = before(kCodesLag);
        if (step >= kCodesLag) finish(own_ring + freed * kStageBytes, shared.tiles[freed], from);
        if (step < count + kProductsLag) {
            if constexpr (low_rank) {
                __syncwarp();
#pragma unroll
                for (int ranks = 0; ranks < kRankTiles; ++ranks)
                    *reinterpret_cast<float4*>(sums_place(freed, warp, ranks, lane)) = {sums[ranks][0], sums[ranks][1],
                                                                                        sums[ranks][2], sums[ranks][3]};
            }
            __syncthreads();
            send(step, freed);
        }
        if (++stage == stream.stages) stage = 0, parity ^= 1;
    }
    ptx::cluster_arrive_relaxed();  // no CTA ends before the others have what it sent
    ptx::cluster_wait();
}

}  // namespace nk::cuda::quantize
