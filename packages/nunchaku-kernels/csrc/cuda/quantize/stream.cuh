// quantize_stream (sm_90): 16-bit x with aligned rows, at most 15360 channels and a rank of at most 32; optionally
// behind a layer norm and a modulation.
//
// A cluster of CTAs splits the channels. Each of its warps keeps the same kBlocks blocks of 32 channels from the first
// tile of 8 tokens to the last: 1 / smooth in registers, its part of the low-rank factor in shared memory. Of a block a
// lane holds 16 bytes of one token, which it copies to shared memory and back by itself, so that x needs no barrier,
// and which are the B operand of two products (the channels of a sum come in any order, if the factor has the same) and
// two words of permuted codes.
//
// What a token needs from all its channels (maximum, low-rank sums, moments) warps leave in shared memory; a few of
// them add up what the CTA has and send it to the others, on a barrier that counts bytes. Meanwhile the warps do the
// first half of the next tile.
#pragma once

#include <cuda_bf16.h>

#include "../ptx/cluster.h"
#include "../ptx/hopper.h"
#include "common.cuh"

namespace nk::cuda::quantize {

constexpr int kStreamWarps = 12, kStreamThreads = 32 * kStreamWarps;
constexpr int kStreamTokens = 8, kBlockChannels = 32, kBlockBytes = kStreamTokens * kBlockChannels * 2;
constexpr int kStreamCtas = 8;  // the largest cluster that every device with clusters can hold
constexpr int kSumPairs = kStreamTokens * kRankTiles * 16 / 2;  // low-rank sums of a tile, two tokens at once

struct StreamParameters {
    Parameters common;
    int cta_blocks;  // of 32 channels
    int stages;      // tiles in shared memory
    int tiles, tiles_per_row;
    int64_t row_tokens;  // that share a row of the modulation; no tile has tokens of two rows
    const char *scale, *shift;
    float eps;
};

struct StreamShared {
    uint64_t barriers[2];  // of odd and even steps, like what the other CTAs send
    uint32_t maxima[2][kStreamCtas][kStreamTokens];
    float2 moments[2][kStreamCtas][kStreamTokens];  // mean, and sum of squares around it
    float2 sums[2][kSumPairs];                      // this CTA's share of them, one CTA's after the other's
    uint32_t warp_maxima[kStreamWarps][kStreamTokens];
    float2 warp_moments[kStreamWarps][kStreamTokens];
    float4 warp_sums[kStreamWarps][kRankTiles][32];  // as accumulators of mma lanes
};
constexpr int kStreamHeadBytes = (sizeof(StreamShared) + 127) / 128 * 128;

// Tokens of a tile.
struct StreamTile {
    int64_t first, row;
    int tokens;

    template <bool norm>
    static __device__ StreamTile at(const StreamParameters& p, int index) {
        const int row = norm ? index / p.tiles_per_row : 0;
        const int64_t inside = int64_t{index - row * p.tiles_per_row} * kStreamTokens;
        return {row * p.row_tokens + inside, row, static_cast<int>(min(int64_t{kStreamTokens}, p.row_tokens - inside))};
    }
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

template <class Element, int kBlocks, bool low_rank, bool norm>
__global__ void __launch_bounds__(kStreamThreads, 1) quantize_stream(const __grid_constant__ StreamParameters stream) {
    const Parameters& p = stream.common;
    constexpr int kStageBytes = kStreamWarps * kBlocks * kBlockBytes;
    constexpr int kFactorBytes = 2 * kRankTiles * 512;  // of a block: A operands of a warp
    constexpr int kLag = norm ? 1 : 0;                  // steps that the moments take before a tile's products
    extern __shared__ __align__(128) char shared_bytes[];
    StreamShared& shared = *reinterpret_cast<StreamShared*>(shared_bytes);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, u = lane % 4;
    const int cta = static_cast<int>(ptx::cluster_rank()), ctas = static_cast<int>(ptx::cluster_size());
    const int team = blockIdx.x / ctas, teams = gridDim.x / ctas;
    const int count = (stream.tiles - team + teams - 1) / teams;

    const int cta_channels = stream.cta_blocks * kBlockChannels;
    const auto channels_of_cta = [&](int of) {
        return static_cast<int>(max(int64_t{0}, min(int64_t{cta_channels}, p.channels - int64_t{of} * cta_channels)));
    };
    const auto channels_of_warp = [&](int of) {
        return max(0, min(kBlocks * kBlockChannels, channels_of_cta(cta) - of * kBlocks * kBlockChannels));
    };
    const int first_block = cta * stream.cta_blocks + warp * kBlocks;
    const int blocks = min(kBlocks, min(stream.cta_blocks - warp * kBlocks, p.groups * 2 - first_block));  // or less
    const int pieces = (channels_of_warp(warp) - u * 8 + kBlockChannels - 1) / kBlockChannels;             // of x
    const int64_t first_k = int64_t{first_block} * kBlockChannels + u * 8;

    const uint32_t ring = ptx::shared_address(shared_bytes) + kStreamHeadBytes + (warp * kBlocks * 32 + lane) * 16;
    const uint32_t factors = ptx::shared_address(shared_bytes) + kStreamHeadBytes + stream.stages * kStageBytes +
                             warp * kBlocks * kFactorBytes + lane * 16;
    const auto tile_at = [&](int n) { return StreamTile::at<norm>(stream, team + n * teams); };
    const auto copy_tile = [&](int n, uint32_t slot) {
        if (n < count) {
            const StreamTile tile = tile_at(n);
            const char* source = p.x + (tile.first + g) * p.row_bytes + first_k * 2;
#pragma unroll
            for (int j = 0; j < kBlocks; ++j)
                ptx::copy_16(slot + j * kBlockBytes, source + j * kBlockChannels * 2, g < tile.tokens && j < pieces);
        }
        ptx::commit_copies();
    };
    for (int n = 0; n < stream.stages; ++n) copy_tile(n, ring + n * kStageBytes);

    const uint32_t barriers = ptx::shared_address(shared.barriers);
    if (threadIdx.x == 0) {
        ptx::init_barrier(barriers, 1);
        ptx::init_barrier(barriers + 8, 1);
        ptx::fence_barrier_init();
    }
    ptx::cluster_arrive_relaxed();

    float reciprocals[kBlocks][8];
#pragma unroll
    for (int j = 0; j < kBlocks; ++j)
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const int64_t k = first_k + j * kBlockChannels;
            const int64_t position = k / 16 * 16 + i / 2 * 4 + k % 16 / 8 * 2 + i % 2;
            const float smooth = p.smooth && j < blocks ? load_smooth_at(p, position) : 1.0f;
            reciprocals[j][i] = j < pieces ? __fdiv_rn(1.0f, smooth) : 0.0f;
        }
    if constexpr (low_rank) {
        const int tiles = p.rank / 16;
#pragma unroll
        for (int j = 0; j < kBlocks; ++j)
#pragma unroll
            for (int ranks = 0; ranks < kRankTiles; ++ranks) {
                uint4 half[2]{};
                if (j < blocks && ranks < tiles)
#pragma unroll
                    for (int i = 0; i < 2; ++i)
                        half[i] = __ldg(p.proj_down + (int64_t{(first_block + j) * 2 + i} * tiles + ranks) * 32 + lane);
                // Published order: channels 2 u, 2 u + 1 of each 8. Wanted: all channels of the u-th 8.
                uint2 words[4] = {
                    {half[0].x, half[0].z}, {half[0].y, half[0].w}, {half[1].x, half[1].z}, {half[1].y, half[1].w}};
                transpose_in_quad(words);
                const uint32_t to = factors + j * kFactorBytes + ranks * 512;
                ptx::store_shared_16(to, {words[0].x, words[0].y, words[1].x, words[1].y});
                ptx::store_shared_16(to + kRankTiles * 512, {words[2].x, words[2].y, words[3].x, words[3].y});
            }
    }
    ptx::cluster_wait();  // all barriers are there

    // The first half of a tile behind a norm.
    float2 moments{};
    const float warp_channels = static_cast<float>(channels_of_warp(warp));
    const auto find_moments = [&](uint32_t slot) {
        const auto add = [](float a, float b) { return a + b; };
        uint4 x[kBlocks];
        float sum = 0;
#pragma unroll
        for (int j = 0; j < kBlocks; ++j) {
            x[j] = ptx::load_shared_16(slot + j * kBlockBytes);
            for (const uint32_t word : {x[j].x, x[j].y, x[j].z, x[j].w}) {
                const float2 pair = unpacked<Element>(word);
                sum += pair.x + pair.y;
            }
        }
        const float mean = over_quad(sum, add) / fmaxf(1.0f, warp_channels);
        float squares = 0;
#pragma unroll
        for (int j = 0; j < kBlocks; ++j) {
            float own = 0;
            for (const uint32_t word : {x[j].x, x[j].y, x[j].z, x[j].w}) {
                const float2 pair = unpacked<Element>(word);
                own += (pair.x - mean) * (pair.x - mean) + (pair.y - mean) * (pair.y - mean);
            }
            squares += j < pieces ? own : 0.0f;
        }
        moments = {mean, over_quad(squares, add)};
    };

    // Maxima and products of a tile; behind a norm the modulated tile takes the place of x.
    float largest = 0;
    float sums[kRankTiles][4] = {};
    const auto multiply = [&](uint32_t slot, StreamTile tile, int parity) {
        float mean = 0, deviation = 1;  // the latter's reciprocal
        const char* scale = nullptr;
        const char* shift = nullptr;
        if constexpr (norm) {
            for (int of = 0; of < ctas; ++of)
                mean += static_cast<float>(channels_of_cta(of)) * shared.moments[parity][of][g].x;
            mean /= static_cast<float>(p.channels);
            float squares = 0;
            for (int of = 0; of < ctas; ++of) {
                const float2 part = shared.moments[parity][of][g];
                squares += part.y + static_cast<float>(channels_of_cta(of)) * (part.x - mean) * (part.x - mean);
            }
            deviation = rsqrtf(squares / static_cast<float>(p.channels) + stream.eps);
            const int64_t offset = (tile.row * p.channels + first_k) * 2;
            scale = stream.scale + offset, shift = stream.shift + offset;
        }
        float even = 0, odd = 0;
#pragma unroll
        for (int ranks = 0; ranks < kRankTiles; ++ranks)
#pragma unroll
            for (int i = 0; i < 4; ++i) sums[ranks][i] = 0;
#pragma unroll
        for (int j = 0; j < kBlocks; ++j) {
            const uint4 x = ptx::load_shared_16(slot + j * kBlockBytes);
            uint32_t words[4] = {x.x, x.y, x.z, x.w};
            if constexpr (norm) {
                uint4 scales{}, shifts{};
                if (j < pieces) {
                    scales = __ldg(reinterpret_cast<const uint4*>(scale + j * kBlockChannels * 2));
                    shifts = __ldg(reinterpret_cast<const uint4*>(shift + j * kBlockChannels * 2));
                }
                const uint32_t scale_words[4] = {scales.x, scales.y, scales.z, scales.w};
                const uint32_t shift_words[4] = {shifts.x, shifts.y, shifts.z, shifts.w};
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
    const auto leave_products = [&] {
        const uint32_t bits = over_quad(__float_as_uint(largest), [](uint32_t a, uint32_t b) { return max(a, b); });
        if (u == 0) shared.warp_maxima[warp][g] = bits;
        if constexpr (low_rank)
#pragma unroll
            for (int ranks = 0; ranks < kRankTiles; ++ranks)
                shared.warp_sums[warp][ranks][lane] = {sums[ranks][0], sums[ranks][1], sums[ranks][2], sums[ranks][3]};
    };

    // Sends what the CTA's warps have left. Each kind is the work of other warps.
    const int share = kSumPairs / ctas;
    const auto send = [&](int parity) {
        const uint32_t barrier = barriers + parity * 8;
        if (threadIdx.x == 0)
            ptx::arrive_expecting(barrier, ctas * kStreamTokens * (norm ? 12 : 4) + (low_rank ? kSumPairs * 8 : 0));
        const auto send_pair = [&](int to, const float2* place, float2 value) {
            ptx::send_8(ptx::address_in_cta(ptx::shared_address(place), to), value, ptx::address_in_cta(barrier, to));
        };
        const int token = lane % kStreamTokens, part = lane / kStreamTokens;  // of four
        if (low_rank && threadIdx.x < kSumPairs) {
            float2 sum{};
#pragma unroll
            for (int of = 0; of < kStreamWarps; ++of) {
                const float2 v = reinterpret_cast<const float2*>(shared.warp_sums[of])[threadIdx.x];
                sum.x += v.x, sum.y += v.y;
            }
            const int to = threadIdx.x / share;
            send_pair(to, &shared.sums[parity][cta * share + threadIdx.x % share], sum);
        } else if (warp == kStreamWarps - 1) {
            uint32_t bits = 0;
#pragma unroll
            for (int of = 0; of < kStreamWarps; of += 4) bits = max(bits, shared.warp_maxima[of + part][token]);
            bits = max(bits, __shfl_xor_sync(~0u, bits, 8));
            bits = max(bits, __shfl_xor_sync(~0u, bits, 16));
            for (int to = part; to < ctas; to += 4)
                ptx::send_4(ptx::address_in_cta(ptx::shared_address(&shared.maxima[parity][cta][token]), to), bits,
                            ptx::address_in_cta(barrier, to));
        } else if (norm && warp == kStreamWarps - 2) {
            const auto over_parts = [](float value) {
                value += __shfl_xor_sync(~0u, value, 8);
                return value + __shfl_xor_sync(~0u, value, 16);
            };
            float mean = 0, squares = 0;
            for (int of = part; of < kStreamWarps; of += 4)
                mean += static_cast<float>(channels_of_warp(of)) * shared.warp_moments[of][token].x;
            mean = over_parts(mean) / fmaxf(1.0f, static_cast<float>(channels_of_cta(cta)));
            for (int of = part; of < kStreamWarps; of += 4) {
                const float2 v = shared.warp_moments[of][token];
                squares += v.y + static_cast<float>(channels_of_warp(of)) * (v.x - mean) * (v.x - mean);
            }
            squares = over_parts(squares);
            for (int to = part; to < ctas; to += 4) send_pair(to, &shared.moments[parity][cta][token], {mean, squares});
        }
    };

    const int64_t code_row = int64_t{p.groups} * kGroupSize;
    const auto finish = [&](uint32_t slot, StreamTile tile, int parity) {
        uint32_t bits = 0;
        for (int of = 0; of < ctas; ++of) bits = max(bits, shared.maxima[parity][of][g]);
        const TokenScale token(bits);
        if (cta == 0 && warp == 0 && u == 0 && g < tile.tokens) p.ascales[tile.first + g] = token.activation;
        // The lanes of a pair swap words: the even one stores the first 16 bytes of a block's codes, the odd one the
        // rest.
        int8_t* const out =
            p.codes + (tile.first + g) * code_row + int64_t{first_block} * kBlockChannels + u % 2 * 16 + u / 2 * 8;
#pragma unroll
        for (int j = 0; j < kBlocks; ++j) {
            const uint4 x = ptx::load_shared_16(slot + j * kBlockBytes);
            const uint32_t words[4] = {x.x, x.y, x.z, x.w};
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
            if (g < tile.tokens && j < blocks)
                *reinterpret_cast<uint2*>(out + j * kBlockChannels) =
                    u % 2 ? make_uint2(got, high) : make_uint2(low, got);
        }
        if (low_rank && static_cast<int>(threadIdx.x) < share) {
            float2 sum{};
            for (int of = 0; of < ctas; ++of) {
                const float2 v = shared.sums[parity][of * share + threadIdx.x];
                sum.x += v.x, sum.y += v.y;
            }
            const int pair = cta * share + threadIdx.x, of_lane = pair / 2 % 32;
            const int rank = pair / 64 * 16 + pair % 2 * 8 + of_lane / 4, of_token = of_lane % 4 * 2;
            if (rank < p.rank && of_token < tile.tokens) store_sum(p, tile.first + of_token, rank, sum.x);
            if (rank < p.rank && of_token + 1 < tile.tokens) store_sum(p, tile.first + of_token + 1, rank, sum.y);
        }
    };

    const auto before = [&](int stage, int by) {
        return ring + (stage - by + (stage < by ? stream.stages : 0)) * kStageBytes;
    };
    int stage = 0;  // of the tile that has arrived last
#pragma unroll 1
    for (int step = 0; step <= count + kLag; ++step) {
        if (step < count) {
            wait_until_pending(stream.stages - 1 - min(step, 1 + kLag));
            if constexpr (norm)
                find_moments(before(stage, 0));
            else
                multiply(before(stage, 0), {}, 0);
        }
        const int parity = step % 2;
        if (step > 0) ptx::wait(barriers + (parity ^ 1) * 8, (step - 1) / 2 % 2);
        if constexpr (norm) {
            if (u == 0) shared.warp_moments[warp][g] = moments;
            if (step > 0 && step <= count) multiply(before(stage, 1), tile_at(step - 1), parity ^ 1);
        }
        leave_products();  // the sums of the step before have been read: they were sent
        if (step > kLag) {
            const uint32_t slot = before(stage, 1 + kLag);
            finish(slot, tile_at(step - 1 - kLag), parity ^ 1);
            copy_tile(step - 1 - kLag + stream.stages, slot);
        }
        if (step < count + kLag) {
            __syncthreads();
            send(parity);
        }
        if (++stage == stream.stages) stage = 0;
    }
}

}  // namespace nk::cuda::quantize
