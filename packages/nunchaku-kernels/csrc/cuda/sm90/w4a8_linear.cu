// The W4A8 product with wgmma (sm_90a): Y^T = W X^T, with the same int32 sums as the portable kernel.
//
// Persistent pairs of blocks (clusters of two) share a token tile: each loads half of it for both. A block has three
// warpgroups. The first one moves data: one warp loads tokens and one weights, 128 inputs per stage; two bring what the
// end of a tile needs, and store it when it is finished. The other two multiply 64 channels each with all tokens of the tile;
// weights are decoded in registers, straight from the published order, into the A operand of wgmma. Sums become fp32 in
// place, and the low-rank up projection is accumulated onto them by 16-bit wgmmas.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <type_traits>

#include "../../numerics/layout.h"
#include "../decode.cuh"
#include "../kernels.h"
#include "../ptx/arithmetic.h"
#include "../ptx/cluster.h"
#include "../ptx/hopper.h"
#include "../ptx/shared.h"
#include "../ptx/wgmma.h"
#include "../tail.cuh"
#include "tensor_map.h"

namespace nk::cuda::sm90 {
namespace {

constexpr int kPair = 2;       // blocks of a cluster
constexpr int kConsumers = 2;  // warpgroups that multiply
constexpr int kThreads = 128 * (1 + kConsumers);
constexpr int kChannels = 64 * kConsumers;  // of a tile
constexpr int kBand = 6;                    // token tiles
constexpr int kChunk = 128;                 // inputs of a stage
constexpr int kCodeBytes = kChannels * kChunk / 2;
constexpr int kMultiplierBytes = kChannels * (kChunk / kGroup) * 2;
constexpr int kWeightBytes = kCodeBytes + kMultiplierBytes;  // of a stage: codes, then multipliers
constexpr int kRow = 128;  // bytes of a token in a stage, and in an output or hidden tile
constexpr int kSharedLimit = 232448;
constexpr int kRankBlock = 64;  // ranks of the low-rank branch that are staged together
constexpr int kFactThreads = 64;
constexpr int kFewTokens = 64;  // up to here the portable kernel is the better one
// What the producers give up must cover what the consumers take, of the 168 that every thread starts with.
constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;
static_assert((168 - kProducerRegisters) >= kConsumers * (kConsumerRegisters - 168));

struct Arguments {
    const uint8_t* qweight;
    const int16_t* multipliers;
    int tokens, padded_n, padded_k, tiles, channel_pairs;
    int32_t* sums;  // if given, the bare product goes there, and nothing below is read
    const float *ascales, *row_scales, *lora_act, *rank_scale;
    const void *proj_up, *wcscales, *bias, *gate, *residual;
    DType up_dtype, wcscales_dtype, bias_dtype, gate_dtype, out_dtype;  // the residual has out_dtype
    int rank, activation, out_features, tokens_per_gate;
    bool plain;  // bf16 outputs without activation, gate or residual
};

// Shared memory: stages of tokens, one output tile per consumer, stages of weights, barriers. What the end of a tile
// needs lies where its outputs go afterwards: the hidden state of the low-rank branch in the first consumer's tile,
// everything else (`Facts`) in the second's.
template <int tokens>
struct Facts {
    float ascales[tokens];
    float scales[kChannels], biases[kChannels];
    int token, channel;  // the tile's first ones
    uint4 up[kChannels / kStrip][kRankBlock / 16][32];  // factors of a block of ranks, as a strip's lanes take them
};

template <int tokens>
struct Layout {
    static constexpr int kTokenBytes = tokens * kRow, kStageBytes = kTokenBytes + kWeightBytes;
    static constexpr int kOutputBytes =
        std::max(kConsumers * tokens * kRow, tokens * kRow + static_cast<int>(sizeof(Facts<tokens>)));
    static constexpr int kBarrierBytes = 320;
    static constexpr int kStages = std::min(8, (kSharedLimit - kOutputBytes - kBarrierBytes) / kStageBytes);
    // The swizzle of tokens and outputs counts from multiples of 1024.
    static constexpr int kOutput = kStages * kTokenBytes, kFacts = kOutput + tokens * kRow;
    static constexpr int kWeights = kOutput + kOutputBytes, kBarriers = kWeights + kStages * kWeightBytes;
    static constexpr int kBytes = kBarriers + kBarrierBytes;
    static_assert(kTokenBytes % 1024 == 0 && kStages >= 3 && (4 * kStages + 3 + kConsumers) * 8 <= kBarrierBytes);
    static_assert(kOutputBytes % 16 == 0);
};

// Where the barriers are. `full` and `empty` guard the stages of tokens, `weights_full` and `weights_empty` those of
// weights, which are free again as soon as they are decoded, `facts_full` and `facts_empty` what the end of a tile
// needs, with one block of ranks,
// `output_full` (one per consumer) and `output_empty` the output tiles.
template <int stages>
struct Barriers {
    uint32_t base;
    __device__ uint32_t full(int stage) const { return base + 8 * stage; }
    __device__ uint32_t empty(int stage) const { return base + 8 * (stages + stage); }
    __device__ uint32_t weights_full(int stage) const { return base + 8 * (2 * stages + stage); }
    __device__ uint32_t weights_empty(int stage) const { return base + 8 * (3 * stages + stage); }
    __device__ uint32_t facts_full() const { return base + 8 * (4 * stages); }
    __device__ uint32_t facts_empty() const { return base + 8 * (4 * stages + 1); }
    __device__ uint32_t output_empty() const { return base + 8 * (4 * stages + 2); }
    __device__ uint32_t output_full(int consumer) const { return base + 8 * (4 * stages + 3 + consumer); }
};

// A position in a ring of stages and the parity of its current phase.
template <int stages>
struct Ring {
    int stage = 0;
    uint32_t parity = 0;
    __device__ __forceinline__ void advance() {
        if (++stage == stages) stage = 0, parity ^= 1;
    }
};

// The tile of a block; tiles are counted in pairs of blocks. With an odd number of channel tiles the last one of a pair
// does not exist: its block computes what `existing_channel` says, so that it can do its share of the copies, and its
// outputs lie outside of the matrix.
struct Tile {
    int token, channel, existing_channel;

    // Bands of a few token tiles are walked along the channels: blocks that run at the same time then share both tokens
    // and weights, and L2 holds what they read.
    __device__ Tile(const Arguments& a, int index, int rank, int tokens) {
        const int band = index / (kBand * a.channel_pairs), first = band * kBand;
        const int height = min(kBand, a.tiles / a.channel_pairs - first), place = index - first * a.channel_pairs;
        token = (first + place % height) * tokens;
        channel = (place / height * kPair + rank) * kChannels;
        existing_channel = min(channel, a.padded_n - kChannels);
    }
};

// Index of a block's first tile, and how far it is to the next one.
__device__ __forceinline__ int first_tile() { return blockIdx.x / kPair; }
__device__ __forceinline__ int tile_step() { return gridDim.x / kPair; }

template <int tokens>
__device__ void load_tokens(const CUtensorMap* codes, const Arguments& a, uint32_t shared,
                            Barriers<Layout<tokens>::kStages> barriers) {
    using L = Layout<tokens>;
    const int rank = ptx::cluster_rank(), half = rank * (tokens / kPair);
    Ring<L::kStages> ring;
    for (int index = first_tile(); index < a.tiles; index += tile_step()) {
        const Tile tile(a, index, rank, tokens);
        for (int k = 0; k < a.padded_k; k += kChunk) {
            ptx::wait(barriers.empty(ring.stage), ring.parity ^ 1);
            const uint32_t full = barriers.full(ring.stage);
            ptx::arrive_expecting(full, L::kTokenBytes);
            ptx::tensor_load_multicast(shared + ring.stage * L::kTokenBytes + half * kRow, codes, k, tile.token + half,
                                       full, (1 << kPair) - 1);
            ring.advance();
        }
    }
}

template <int tokens>
__device__ void load_weights(const Arguments& a, uint32_t shared, Barriers<Layout<tokens>::kStages> barriers) {
    using L = Layout<tokens>;
    const int rank = ptx::cluster_rank();
    Ring<L::kStages> ring;
    for (int index = first_tile(); index < a.tiles; index += tile_step()) {
        const Tile tile(a, index, rank, tokens);
        const uint8_t* codes = a.qweight + qweight_strip_offset(tile.existing_channel, 0, a.padded_k);
        const int16_t* multipliers =
            a.multipliers + w4a8_multiplier_position(tile.existing_channel, 0, a.padded_k / kGroup);
        for (int k = 0; k < a.padded_k; k += kChunk) {
            ptx::wait(barriers.weights_empty(ring.stage), ring.parity ^ 1);
            const uint32_t full = barriers.weights_full(ring.stage);
            const uint32_t weights = shared + L::kWeights + ring.stage * kWeightBytes;
            ptx::arrive_expecting(full, kWeightBytes);
            ptx::bulk_load(weights, codes + k * (kChannels / 2), kCodeBytes, full);
            ptx::bulk_load(weights + kCodeBytes, multipliers + k * (kChannels / kGroup), kMultiplierBytes, full);
            ring.advance();
        }
    }
}

// A number that may be one of a vector in published order.
__device__ __forceinline__ float vector_element(const void* vector, DType dtype, int n, float otherwise) {
    return vector ? load_float(vector, dtype, vector_position(n)) : otherwise;
}

// Brings what the end of a tile needs: long before it does, and so that the threads that multiply load nothing. Stores
// the tile when it is finished, and makes room for what the next one needs.
template <int tokens>
__device__ void load_facts_and_store(const CUtensorMap* out, const Arguments& a, uint8_t* memory, int thread,
                                     Barriers<Layout<tokens>::kStages> barriers) {
    using L = Layout<tokens>;
    uint8_t* hidden = memory + L::kOutput;  // rows of 64 ranks, in the 128-byte swizzle
    Facts<tokens>& facts = *reinterpret_cast<Facts<tokens>*>(memory + L::kFacts);
    const int cluster_rank = ptx::cluster_rank();
    uint32_t parity = 0, empty_parity = 1;
    for (int index = first_tile(); index < a.tiles; index += tile_step(), parity ^= 1) {
        const Tile tile(a, index, cluster_rank, tokens);
        if (thread == 0) facts.token = tile.token, facts.channel = tile.channel;
#pragma unroll 4
        for (int i = thread; i < tokens; i += kFactThreads)
            facts.ascales[i] = tile.token + i < a.tokens ? __ldg(a.ascales + tile.token + i) : 0.0f;
        for (int i = thread; i < kChannels; i += kFactThreads) {
            const int n = tile.existing_channel + i;
            facts.scales[i] = __ldg(a.row_scales + n) * vector_element(a.wcscales, a.wcscales_dtype, n, 1.0f);
            facts.biases[i] = vector_element(a.bias, a.bias_dtype, n, 0.0f);
        }
        for (int first = 0; first == 0 || first < a.rank; first += kRankBlock) {
            ptx::wait(barriers.facts_empty(), empty_parity);  // the block before was multiplied
            empty_parity ^= 1;
            const int ranks = min(kRankBlock, a.rank - first);
            if (thread < kChannels / kStrip && ranks) {
                const uint32_t bytes = ranks / 16 * sizeof(facts.up[0][0]);
                const size_t steps = static_cast<size_t>(tile.existing_channel / kStrip + thread) * (a.rank / 16);
                ptx::expect_bytes(barriers.facts_full(), bytes);
                ptx::bulk_load(ptx::shared_address(facts.up[thread]),
                               static_cast<const uint4*>(a.proj_up) + (steps + first / 16) * 32, bytes,
                               barriers.facts_full());
            }
            const int pieces = ranks / 8;  // of 16 bytes, in a row
#pragma unroll 4
            for (int i = thread; i < tokens * pieces; i += kFactThreads) {
                const int token = i / pieces, piece = i % pieces, rank = first + 8 * piece;
                float values[8] = {};
                if (tile.token + token < a.tokens) {
                    load_8(a.lora_act, DType::f32, static_cast<size_t>(tile.token + token) * a.rank + rank, values);
                    if (a.rank_scale) {
                        float scales[8];
                        load_8(a.rank_scale, DType::f32, rank, scales);
#pragma unroll
                        for (int r = 0; r < 8; ++r) values[r] *= scales[r];
                    }
                }
                store_8(hidden, a.up_dtype, (token * kRow + 16 * (piece ^ token % 8)) / 2, values);
            }
            ptx::fence_async_proxy();
            ptx::arrive(barriers.facts_full());
        }
        if (thread == 0) {
#pragma unroll
            for (int c = 0; c < kConsumers; ++c) {
                ptx::wait(barriers.output_full(c), parity);
                ptx::tensor_store(out, ptx::shared_address(memory) + L::kOutput + c * tokens * kRow,
                                  tile.channel + 64 * c, tile.token);
            }
            ptx::finish_reading_stores();
            ptx::arrive(barriers.output_empty());
        }
        ptx::wait(barriers.output_empty(), parity);
    }
}

// The A operands of a chunk for a warp's 16 channels, and the multipliers of its two groups for the lane's two
// channels.
struct Operands {
    uint32_t steps[4][4];
};
struct Multipliers {
    uint32_t groups[2];  // of the upper channel, and in the upper half of the word of the lower one
};

__device__ __forceinline__ void decode_chunk(const uint4 (&codes)[2], Multipliers m, uint32_t mask, Operands& a) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const GroupMultiplier upper(m.groups[half] & 0xffff, mask), lower(m.groups[half] >> 16, mask);
        decode(codes[half].x, upper, a.steps[2 * half][0], a.steps[2 * half][2]);
        decode(codes[half].y, upper, a.steps[2 * half + 1][0], a.steps[2 * half + 1][2]);
        decode(codes[half].z, lower, a.steps[2 * half][1], a.steps[2 * half][3]);
        decode(codes[half].w, lower, a.steps[2 * half + 1][1], a.steps[2 * half + 1][3]);
    }
}

// y += (lora_act * rank_scale) proj_up^T for the strip of 16 channels of this warp. The first block of ranks is there.
template <int tokens, bool is_bf16>
__device__ __forceinline__ void add_low_rank(int rank, uint32_t shared, int strip, int lane, uint32_t& parity,
                                             Barriers<Layout<tokens>::kStages> barriers, float (&y)[tokens / 2]) {
    const uint64_t b = ptx::wgmma_operand(shared + Layout<tokens>::kOutput);
    const uint32_t up = shared + Layout<tokens>::kFacts +
                        static_cast<uint32_t>(offsetof(Facts<tokens>, up) + sizeof(Facts<tokens>::up[0]) * strip);
#pragma unroll 1
    for (int first = 0; first < rank; first += kRankBlock) {
        if (first) {
            if (lane == 0) ptx::arrive(barriers.facts_empty());
            ptx::wait(barriers.facts_full(), parity);
            parity ^= 1;
        }
        uint32_t factors[kRankBlock / 16][4];
#pragma unroll
        for (int step = 0; step < kRankBlock / 16; ++step) {
            const uint4 words = ptx::load_shared_16(up + (32 * step + lane) * 16);
            factors[step][0] = words.x, factors[step][1] = words.z, factors[step][2] = words.y, factors[step][3] = words.w;
        }
        ptx::wgmma_fence();
#pragma unroll
        for (int step = 0; step < kRankBlock / 16; ++step)
            if (first + 16 * step < rank)
                ptx::Wgmma<tokens>::template half<is_bf16>(y, factors[step], b + 2 * step);
        ptx::wgmma_commit();
        ptx::wgmma_wait<0>();
    }
}

// Sums to fp32 outputs without the low-rank branch, for the lane's channels `channel` and eight on, of the tile's.
template <int tokens>
__device__ __forceinline__ void scale_sums(uint32_t facts, int channel, int lane, const int32_t (&sums)[tokens / 2],
                                           float (&y)[tokens / 2]) {
    float scale[2], bias[2];
#pragma unroll
    for (int row = 0; row < 2; ++row) {
        const uint32_t place = facts + 4 * (channel + 8 * row);
        scale[row] = ptx::load_shared_float(place + offsetof(Facts<tokens>, scales));
        bias[row] = ptx::load_shared_float(place + offsetof(Facts<tokens>, biases));
    }
    const uint32_t ascales = facts + offsetof(Facts<tokens>, ascales) + lane % 4 * 8;
#pragma unroll
    for (int block = 0; block < tokens / 8; ++block) {
        const float2 pair = ptx::load_shared_floats(ascales + 32 * block);
        const float ascale[2] = {pair.x, pair.y};
#pragma unroll
        for (int i = 0; i < 4; ++i)
            y[4 * block + i] = static_cast<float>(sums[4 * block + i]) * ascale[i % 2] * scale[i / 2] + bias[i / 2];
    }
}

// y *= gate, of the lane's two channels. A tile has tokens of at most two gate rows.
template <int tokens>
__device__ __forceinline__ void apply_gate(const Arguments& a, int tile_token, int channel, int first_token,
                                           float (&y)[tokens / 2]) {
    const int row = tile_token / a.tokens_per_gate, last_row = (a.tokens - 1) / a.tokens_per_gate;
    const int boundary = (row + 1) * a.tokens_per_gate;
    float gates[2][2];
#pragma unroll
    for (int later = 0; later < 2; ++later)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int n = min(channel + 8 * i, a.out_features - 1);
            gates[later][i] =
                load_float(a.gate, a.gate_dtype, static_cast<size_t>(min(row + later, last_row)) * a.out_features + n);
        }
#pragma unroll
    for (int block = 0; block < tokens / 8; ++block)
#pragma unroll
        for (int i = 0; i < 4; ++i)
            y[4 * block + i] *= first_token + 8 * block + i % 2 < boundary ? gates[0][i / 2] : gates[1][i / 2];
}

// Reads a consumer's tile of the residual into its output tile: whole rows, so that memory sees 128 bytes at a time.
template <int tokens>
__device__ __forceinline__ void load_residual(const Arguments& a, uint32_t output, int first_token, int first_channel) {
#pragma unroll 4
    for (int i = threadIdx.x % 128; i < tokens * 8; i += 128) {
        const int token = i / 8, piece = i % 8, n = first_channel + 8 * piece;
        if (first_token + token >= a.tokens || n >= a.out_features) continue;
        const uint4 bits = __ldg(reinterpret_cast<const uint4*>(
            static_cast<const uint16_t*>(a.residual) + static_cast<size_t>(first_token + token) * a.out_features + n));
        ptx::store_shared_16(output + token * kRow + 16 * (piece ^ token % 8), bits);
    }
}

// Rounds y into the consumer's output tile (rows of 64 channels, swizzled), onto the residual if it lies there already.
template <int tokens, bool is_bf16, bool has_residual>
__device__ __forceinline__ void stage_output(uint32_t output, const float (&y)[tokens / 2]) {
    const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
    const uint32_t row = output + (lane / 16 * 8 + lane % 8) * kRow + 16 * ((2 * warp + lane / 8 % 2) ^ lane % 8);
#pragma unroll
    for (int pair = 0; pair < tokens / 16; ++pair) {
        uint32_t before[4], packed[4];
        if (has_residual) ptx::ldmatrix_x4_trans(before, row + pair * 16 * kRow);
#pragma unroll
        for (int m = 0; m < 4; ++m) {  // matrices of 8 channels x 8 tokens: two of channels, then of the next tokens
            float first = y[8 * pair + 2 * m], second = y[8 * pair + 2 * m + 1];
            if (has_residual) {
                const float2 added = unpack_half(before[m], is_bf16 ? DType::bf16 : DType::f16);
                first += added.x, second += added.y;
            }
            packed[m] = is_bf16 ? pack_bf16(first, second) : pack_f16(first, second);
        }
        ptx::stmatrix_x4_trans(row + pair * 16 * kRow, packed);
    }
}

// Activation, gate and residual, and the rounding. Every step is a pass of its own under one branch: together in one
// unrolled loop they would not fit the instruction cache.
template <int tokens>
__device__ __forceinline__ void finish(const Arguments& a, uint32_t output, int tile_token, int consumer,
                                       int consumer_channel, float (&y)[tokens / 2]) {
    const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
    if (a.activation == 1) {
#pragma unroll
        for (int i = 0; i < tokens / 2; ++i) y[i] = activate(y[i], 1);
    } else if (a.activation == 2) {
#pragma unroll
        for (int i = 0; i < tokens / 2; ++i) y[i] = activate(y[i], 2);
    }
    if (a.gate)
        apply_gate<tokens>(a, tile_token, consumer_channel + 16 * warp + lane / 4, tile_token + lane % 4 * 2, y);
    if (a.residual) {
        load_residual<tokens>(a, output, tile_token, consumer_channel);
        ptx::sync_threads<128>(2 + consumer);
        if (a.out_dtype == DType::bf16)
            stage_output<tokens, true, true>(output, y);
        else
            stage_output<tokens, false, true>(output, y);
    } else if (a.out_dtype == DType::bf16) {
        stage_output<tokens, true, false>(output, y);
    } else {
        stage_output<tokens, false, false>(output, y);
    }
}

// The bare int32 sums of a warp's 16 channels, from `strip` on.
template <int tokens>
__device__ __forceinline__ void store_sums(const Arguments& a, const Tile& tile, int strip,
                                           const int32_t (&sums)[tokens / 2]) {
    if (tile.channel != tile.existing_channel) return;
    const int lane = threadIdx.x % 32, channel = tile.channel + strip + lane / 4;
#pragma unroll
    for (int block = 0; block < tokens / 8; ++block)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int token = tile.token + lane % 4 * 2 + 8 * block + i % 2;
            if (token < a.tokens)
                a.sums[static_cast<size_t>(token) * a.padded_n + channel + i / 2 * 8] = sums[4 * block + i];
        }
}

// Multiplies and finishes tiles: warpgroup `consumer` has channels 64 * consumer and on of each.
template <int tokens>
__device__ void consume(const Arguments& a, uint32_t shared, int consumer, Barriers<Layout<tokens>::kStages> barriers) {
    using L = Layout<tokens>;
    const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
    const int chunks = a.padded_k / kChunk;
    const uint32_t strip = shared + L::kWeights + (4 * consumer + warp) * kStripBytes + 16 * lane;
    const uint32_t strip_multipliers =
        shared + L::kWeights + kCodeBytes + 2 * (kStrip * (4 * consumer + warp) + lane / 4 * 2);
    // Stages are filled by both blocks of the pair: both must know that they are free.
    const auto release = [&](int stage) {
        if (lane < kPair) ptx::arrive_in_cluster(ptx::address_in_cta(barriers.empty(stage), lane));
    };
    const uint64_t tokens_operand = ptx::wgmma_operand(shared);
    const uint32_t facts = shared + L::kFacts;
    const uint32_t mask = code_mask();
    Ring<L::kStages> ring;
    uint32_t facts_parity = 0;

    for (int index = first_tile(); index < a.tiles; index += tile_step()) {
        int32_t sums[tokens / 2];
        // Of the next stage, once it is there.
        const auto read_weights = [&](uint4(&codes)[2], Multipliers& multipliers) {
            ptx::wait(barriers.weights_full(ring.stage), ring.parity);
            const uint32_t offset = ring.stage * kWeightBytes;
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                codes[half] = ptx::load_shared_16(strip + offset + half * (kCodeBytes / 2));
                multipliers.groups[half] = ptx::load_shared_4(strip_multipliers + offset + half * (kMultiplierBytes / 2));
            }
        };
        const auto release_weights = [&] {
            if (lane == 0) ptx::arrive(barriers.weights_empty(ring.stage));
        };
        // The first product of a tile overwrites the sums. Known at compile time: else ptxas would keep the registers alive
        // from tile to tile.
        const auto issue = [&](auto is_first, const Operands& a_operands) {
            const uint64_t b = tokens_operand + ring.stage * (L::kTokenBytes >> 4);
            ptx::wait(barriers.full(ring.stage), ring.parity);
            ptx::wgmma_fence();
#pragma unroll
            for (int step = 0; step < 4; ++step)
                if (decltype(is_first)::value && step == 0)
                    ptx::Wgmma<tokens>::template s8<true>(sums, a_operands.steps[step], b);
                else
                    ptx::Wgmma<tokens>::s8(sums, a_operands.steps[step], b + 2 * step);
            ptx::wgmma_commit();
        };
        // Starts a chunk's products, and decodes the next chunk while they run.
        int chunk = 0, finished = 0;
        const auto step = [&](auto is_first, const Operands& current, Operands& next) {
            issue(is_first, current);
            const int stage = ring.stage;
            ring.advance();
            uint4 codes[2];
            Multipliers multipliers;
            read_weights(codes, multipliers);
            ++chunk;
            ptx::wgmma_wait<1>();
            if (!decltype(is_first)::value) release(finished);
            finished = stage;
            decode_chunk(codes, multipliers, mask, next);
            release_weights();
        };
        const auto last = [&](auto is_first, const Operands& current) {
            issue(is_first, current);
            ptx::wgmma_wait<0>();
            if (!decltype(is_first)::value) release(finished);
            release(ring.stage);
            ring.advance();
        };
        Operands even, odd;
        {
            uint4 codes[2];
            Multipliers multipliers;
            read_weights(codes, multipliers);
            decode_chunk(codes, multipliers, mask, even);
            release_weights();
        }
        constexpr std::true_type first;
        constexpr std::false_type later;
        if (chunks == 1) {
            last(first, even);
        } else {
            step(first, even, odd);
#pragma unroll 1
            while (chunk + 2 < chunks) {
                step(later, odd, even);
                step(later, even, odd);
            }
            if (chunk + 1 < chunks) {
                step(later, odd, even);
                last(later, even);
            } else {
                last(later, odd);
            }
        }
        if (a.sums) {
            store_sums<tokens>(a, Tile(a, index, ptx::cluster_rank(), tokens), 64 * consumer + 16 * warp, sums);
            continue;
        }
        ptx::wait(barriers.facts_full(), facts_parity);
        facts_parity ^= 1;
        float y[tokens / 2];
        scale_sums<tokens>(facts, 64 * consumer + 16 * warp + lane / 4, lane, sums, y);
        if (a.rank) {
            if (a.up_dtype == DType::bf16)
                add_low_rank<tokens, true>(a.rank, shared, 4 * consumer + warp, lane, facts_parity, barriers, y);
            else
                add_low_rank<tokens, false>(a.rank, shared, 4 * consumer + warp, lane, facts_parity, barriers, y);
        }
        const int tile_token = ptx::load_shared_4(facts + offsetof(Facts<tokens>, token));
        const int tile_channel = ptx::load_shared_4(facts + offsetof(Facts<tokens>, channel));
        ptx::sync_threads<128 * kConsumers>(1);  // what the end of the tile needed makes room for outputs
        if (lane == 0) ptx::arrive(barriers.facts_empty());
        const uint32_t output = shared + L::kOutput + consumer * tokens * kRow;
        if (a.plain)  // first and in one piece: jumps over code that is not needed cost as much as a tenth of a tile's end
            stage_output<tokens, true, false>(output, y);
        else
            finish<tokens>(a, output, tile_token, consumer, tile_channel + 64 * consumer, y);
        ptx::fence_async_proxy();
        ptx::arrive(barriers.output_full(consumer));
    }
}

template <int tokens>
__global__ void __launch_bounds__(kThreads, 1)
    product(const __grid_constant__ CUtensorMap codes, const __grid_constant__ CUtensorMap out,
            const __grid_constant__ Arguments a) {
    using L = Layout<tokens>;
    extern __shared__ __align__(1024) uint8_t memory[];  // the swizzle counts from multiples of 1024
    const uint32_t shared = ptx::opaque(ptx::shared_address(memory));
    const Barriers<L::kStages> barriers{shared + L::kBarriers};
    const int warpgroup = threadIdx.x / 128, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (threadIdx.x == 0) {
        ptx::prefetch_map(&codes);
        for (int stage = 0; stage < L::kStages; ++stage) {
            ptx::init_barrier(barriers.full(stage), 1);
            ptx::init_barrier(barriers.empty(stage), kPair * 4 * kConsumers);
            ptx::init_barrier(barriers.weights_full(stage), 1);
            ptx::init_barrier(barriers.weights_empty(stage), 4 * kConsumers);
        }
        ptx::init_barrier(barriers.facts_full(), kFactThreads);
        ptx::init_barrier(barriers.facts_empty(), 4 * kConsumers);
        ptx::init_barrier(barriers.output_empty(), 1);
        for (int c = 0; c < kConsumers; ++c) ptx::init_barrier(barriers.output_full(c), 128);
        ptx::fence_barrier_init();
    }
    ptx::cluster_arrive();
    ptx::cluster_wait();
    ptx::wait_for_earlier_kernels();
    ptx::allow_next_kernel();
    if (warpgroup == 0) {
        ptx::give_up_registers<kProducerRegisters>();
        if (warp == 0) {
            if (lane == 0) load_tokens<tokens>(&codes, a, shared, barriers);
        } else if (warp == 1) {
            if (lane == 0) load_weights<tokens>(a, shared, barriers);
        } else if (!a.sums) {
            load_facts_and_store<tokens>(&out, a, memory, threadIdx.x - 64, barriers);
        }
    } else {
        ptx::take_registers<kConsumerRegisters>();
        consume<tokens>(a, shared, warpgroup - 1, barriers);
    }
    // The other block may still copy into this one's memory, or arrive at its barriers.
    ptx::cluster_arrive();
    ptx::cluster_wait();
}

template <int tokens>
void run(Arguments a, const int8_t* codes, void* out, int processors, cudaStream_t stream) {
    a.tiles = (a.tokens + tokens - 1) / tokens * a.channel_pairs;
    const CUtensorMap codes_map =
        make_tensor_map(codes, CU_TENSOR_MAP_DATA_TYPE_UINT8, 1, a.tokens, a.padded_k, tokens / kPair);
    const CUtensorMap out_map =
        out ? make_tensor_map(out, CU_TENSOR_MAP_DATA_TYPE_UINT16, 2, a.tokens, a.out_features, tokens) : codes_map;
    launch_clusters(kPair, product<tokens>, dim3(kPair * std::min(a.tiles, processors / kPair)), dim3(kThreads),
                    Layout<tokens>::kBytes, stream, "w4a8_linear (sm90)", codes_map, out_map, a);
}

void choose_and_run(const Arguments& a, const int8_t* codes, void* out, cudaStream_t stream) {
    const int processors = device_attribute(cudaDevAttrMultiProcessorCount);
    // Tiles that one pair of blocks works off, times the cost of one, in tokens. Measured: what is not hidden of
    // decoding costs as much as 60 tokens, and what comes after the products as much as 30 at K = 3072.
    const auto cost = [&](int tokens) {
        const int64_t tiles = static_cast<int64_t>((a.tokens + tokens - 1) / tokens) * a.channel_pairs;
        const int pairs = processors / kPair;
        return static_cast<double>((tiles + pairs - 1) / pairs) * (tokens + 60 + 30.0 * 3072 / a.padded_k);
    };
    int best = 256;
    for (const int tokens : {224, 208, 192, 128})
        if (cost(tokens) < cost(best)) best = tokens;
    switch (best) {
        case 256:
            return run<256>(a, codes, out, processors, stream);
        case 224:
            return run<224>(a, codes, out, processors, stream);
        case 208:
            return run<208>(a, codes, out, processors, stream);
        case 192:
            return run<192>(a, codes, out, processors, stream);
        default:
            return run<128>(a, codes, out, processors, stream);
    }
}

Arguments product_arguments(const ProductArguments& p) {
    Arguments a{};
    a.qweight = p.qweight;
    a.multipliers = p.multipliers;
    a.tokens = static_cast<int>(p.tokens);
    a.padded_n = static_cast<int>(p.padded_n);
    a.padded_k = static_cast<int>(p.padded_k);
    a.channel_pairs = (a.padded_n / kChannels + kPair - 1) / kPair;
    return a;
}

bool fits(const ProductArguments& p) {
    return p.padded_k % kChunk == 0 && p.tokens < (1 << 30) && p.padded_n < (1 << 30) &&
           (p.tokens / 128 + 1) * (p.padded_n / kChannels) < (1 << 30);
}

}  // namespace

bool serves(const ProductArguments& product) { return fits(product) && product.tokens > kFewTokens; }

bool serves(const LinearArguments& a) {
    const bool half_output = a.out_dtype != static_cast<int>(DType::f32);
    const bool half_branch = !a.proj_up.data || !a.rank || a.proj_up.dtype != static_cast<int>(DType::f32);
    return serves(a.product) && half_output && half_branch && a.out_features % 8 == 0 && aligned(a.out) &&
           (!a.residual.data || (a.residual.dtype == a.out_dtype && aligned(a.residual.data))) &&
           (!a.gate.data || a.gate_rows == 1 || a.product.tokens / a.gate_rows >= 256);
}

void w4a8_accumulate(const ProductArguments& product, int32_t* sums, cudaStream_t stream) {
    Arguments a = product_arguments(product);
    a.sums = sums;
    choose_and_run(a, product.codes, nullptr, stream);
}

void w4a8_linear(const LinearArguments& linear, cudaStream_t stream) {
    Arguments a = product_arguments(linear.product);
    a.rank = linear.proj_up.data ? static_cast<int>(linear.rank) : 0;
    a.ascales = linear.ascales;
    a.row_scales = linear.row_scales;
    a.lora_act = linear.lora_act;
    a.rank_scale = linear.rank_scale;
    a.proj_up = linear.proj_up.data;
    a.wcscales = linear.wcscales.data;
    a.bias = linear.bias.data;
    a.gate = linear.gate.data;
    a.residual = linear.residual.data;
    a.up_dtype = static_cast<DType>(linear.proj_up.dtype);
    a.wcscales_dtype = static_cast<DType>(linear.wcscales.dtype);
    a.bias_dtype = static_cast<DType>(linear.bias.dtype);
    a.gate_dtype = static_cast<DType>(linear.gate.dtype);
    a.out_dtype = static_cast<DType>(linear.out_dtype);
    a.activation = linear.activation;
    a.out_features = static_cast<int>(linear.out_features);
    a.plain = a.out_dtype == DType::bf16 && !a.activation && !a.gate && !a.residual;
    a.tokens_per_gate = linear.gate.data ? static_cast<int>(linear.product.tokens / linear.gate_rows) : 1;
    choose_and_run(a, linear.product.codes, linear.out, stream);
}

}  // namespace nk::cuda::sm90
