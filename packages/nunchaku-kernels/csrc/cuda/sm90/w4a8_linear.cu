// The W4A8 product with wgmma (sm_90a): Y^T = W X^T, with the same int32 sums as the portable kernel.
//
// Persistent pairs of blocks (clusters of two) share a token tile: each loads half of it for both. A block has three
// warpgroups. The first one moves data, each of its warps of one kind: tokens, weights, what the end of a tile needs of
// its rows and columns, the low-rank branch and finished outputs. The other two multiply 64 channels each with all
// tokens of the tile; weights are decoded in registers, straight from the published order, into the A operand of wgmma,
// one chunk ahead, also across tiles. Sums become fp32 in place, and the low-rank up projection is accumulated onto
// them by 16-bit wgmmas.
//
// Token tiles come in two widths that differ by 16, wide ones first, so that tiles fill whole rounds of the grid.
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
#include "heads.cuh"
#include "ring.cuh"
#include "tensor_map.h"

namespace nk::cuda::sm90 {
namespace {

constexpr int kPair = 2;       // blocks of a cluster
constexpr int kConsumers = 2;  // warpgroups that multiply
constexpr int kThreads = 128 * (1 + kConsumers);
constexpr int kChannels = 64 * kConsumers;  // of a tile
constexpr int kBand = 6;                    // token tiles
constexpr int kNarrower = 16;               // tokens that a narrow tile has less
constexpr int kChunk = 128;                 // inputs of a stage
constexpr int kCodeBytes = kChannels * kChunk / 2;
constexpr int kMultiplierBytes = kChannels * (kChunk / kGroup) * 2;
constexpr int kWeightBytes = kCodeBytes + kMultiplierBytes;  // of a stage: codes, then multipliers
constexpr int kRow = 128;                                    // bytes of a token in a stage, and in an output tile
constexpr int kSharedLimit = 232448;
constexpr int kRankBlock = 32;            // ranks of the low-rank branch that are staged together
constexpr int kRankRow = 2 * kRankBlock;  // bytes of a token in a hidden tile
constexpr int kMaxRank = 1024;
constexpr int kFewTokens = 64;  // up to here the portable kernel is the better one
// What the producers give up must cover what the consumers take, of the 168 that every thread starts with.
constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;
static_assert((168 - kProducerRegisters) >= kConsumers * (kConsumerRegisters - 168));

struct Arguments {
    const uint8_t* qweight;
    const int16_t* multipliers;
    int tokens, padded_n, padded_k, channel_pairs;
    int samples;            // equal shares of the tokens, which have tiles of their own
    int wide_tokens;        // of a sample, in wide tiles; the tokens behind are in narrow ones
    int wide_tiles, tiles;  // counted in pairs of blocks; all, and those of them that are wide
    int32_t* sums;          // if given, the bare product goes there, and nothing below is read
    const float *ascales, *row_scales, *rank_scale;
    const void *proj_up, *wcscales, *bias, *gate, *residual;
    DType up_dtype, wcscales_dtype, bias_dtype, gate_dtype, out_dtype;  // the residual has out_dtype
    int rank, activation, out_features, tokens_per_gate;
    bool plain;  // bf16 outputs without activation, gate or residual
    Heads heads;
    const void* norms[2];  // of q and k
    DType norms_dtype[2];
};

// What the end of a tile needs of its rows and columns.
template <int tokens>
struct Facts {
    float ascales[tokens];
    float scales[kChannels], biases[kChannels];
    int token, channel;  // the tile's first ones
};

// A block of ranks: the hidden state of the tile's tokens in rows of 64 bytes, swizzled, and the factors of its
// channels as the lanes of a strip take them.
template <int tokens>
struct RankBlock {
    uint8_t hidden[tokens * kRankRow];
    uint4 up[kChannels / kStrip][kRankBlock / 16][32];
};

// Shared memory: stages of tokens, one output tile per consumer, stages of weights, facts, scales of ranks, weights of
// norms, barriers.
// Two blocks of ranks lie where outputs go afterwards.
template <int tokens>
struct Layout {
    static constexpr int kTokenBytes = tokens * kRow, kStageBytes = kTokenBytes + kWeightBytes;
    static constexpr int kOutputBytes =
        std::max(kConsumers * tokens * kRow, 2 * static_cast<int>(sizeof(RankBlock<tokens>)));
    static constexpr int kFactBytes = (sizeof(Facts<tokens>) + 15) / 16 * 16, kRankScaleBytes = kMaxRank * 4,
                         kNormBytes = 2 * kHeadChannels * 4;
    static constexpr int kBarrierBytes = 320;
    static constexpr int kOtherBytes = kOutputBytes + kFactBytes + kRankScaleBytes + kNormBytes + kBarrierBytes;
    // Weights are free again once they are decoded: one stage less of them does.
    static constexpr int kStages = std::min(8, (kSharedLimit - kOtherBytes + kWeightBytes) / kStageBytes);
    static constexpr int kWeightStages = kStages - 1;
    // The swizzles count from multiples of 1024.
    static constexpr int kOutput = kStages * kTokenBytes, kWeights = kOutput + kOutputBytes;
    static constexpr int kFacts = kWeights + kWeightStages * kWeightBytes, kRankScales = kFacts + kFactBytes;
    static constexpr int kNorms = kRankScales + kRankScaleBytes;
    static constexpr int kBarriers = kNorms + kNormBytes, kBytes = kBarriers + kBarrierBytes;
    static_assert(kTokenBytes % 1024 == 0 && sizeof(RankBlock<tokens>) % 512 == 0 && kOutputBytes % 128 == 0);
    static_assert(kStages >= 3 && kBytes <= kSharedLimit);
};

// Where the barriers are. Stages of tokens and weights, facts, and the two blocks of ranks are `full` or `empty`;
// `output_full` (one per consumer) and `output_empty` guard the output tiles.
template <int tokens>
struct Barriers {
    static constexpr int kStages = Layout<tokens>::kStages, kWeightStages = Layout<tokens>::kWeightStages;
    static constexpr int kWeights = 2 * kStages, kOthers = kWeights + 2 * kWeightStages;
    static_assert(8 * (kOthers + 7 + kConsumers) <= Layout<tokens>::kBarrierBytes);
    uint32_t base;
    __device__ uint32_t tokens_full(int stage) const { return base + 8 * stage; }
    __device__ uint32_t tokens_empty(int stage) const { return base + 8 * (kStages + stage); }
    __device__ uint32_t weights_full(int stage) const { return base + 8 * (kWeights + stage); }
    __device__ uint32_t weights_empty(int stage) const { return base + 8 * (kWeights + kWeightStages + stage); }
    __device__ uint32_t facts_full() const { return base + 8 * kOthers; }
    __device__ uint32_t facts_empty() const { return base + 8 * (kOthers + 1); }
    __device__ uint32_t ranks_full(int block) const { return base + 8 * (kOthers + 2 + block); }
    __device__ uint32_t ranks_empty(int block) const { return base + 8 * (kOthers + 4 + block); }
    __device__ uint32_t output_empty() const { return base + 8 * (kOthers + 6); }
    __device__ uint32_t output_full(int consumer) const { return base + 8 * (kOthers + 7 + consumer); }
};

// The tile of a block; tiles are counted in pairs of blocks. With an odd number of channel tiles the last one of a pair
// does not exist: its block computes what `existing_channel` says, so that it can do its share of the copies, and its
// outputs lie outside of the matrix. A tile has tokens of one sample; what lies behind them is not stored.
struct Tile {
    int token, channel, existing_channel;

    // Bands of a few token tiles are walked along the channels: blocks that run at the same time then share both tokens
    // and weights, and L2 holds what they read.
    __device__ Tile(const Arguments& a, int index, int rank, int wide) {
        const bool is_wide = index < a.wide_tiles;
        if (!is_wide) index -= a.wide_tiles;
        const int token_tiles = (is_wide ? a.wide_tiles : a.tiles - a.wide_tiles) / a.channel_pairs;
        const int band = index / (kBand * a.channel_pairs), first = band * kBand;
        const int height = min(kBand, token_tiles - first), place = index - first * a.channel_pairs;
        const int of_sample = token_tiles / a.samples, token_tile = first + place % height;
        token = token_tile / of_sample * (a.tokens / a.samples) +
                (is_wide ? token_tile % of_sample * wide : a.wide_tokens + token_tile % of_sample * (wide - kNarrower));
        channel = (place / height * kPair + rank) * kChannels;
        existing_channel = min(channel, a.padded_n - kChannels);
    }
};

// Index of a block's first tile, and how far it is to the next one.
__device__ __forceinline__ int first_tile() { return blockIdx.x / kPair; }
__device__ __forceinline__ int tile_step() { return gridDim.x / kPair; }

template <int tokens>
__device__ void load_tokens(const CUtensorMap* codes, const Arguments& a, uint32_t shared, Barriers<tokens> barriers) {
    using L = Layout<tokens>;
    const int rank = ptx::cluster_rank(), half = rank * (tokens / kPair);
    Ring<L::kStages> ring;
    for (int index = first_tile(); index < a.tiles; index += tile_step()) {
        const Tile tile(a, index, rank, tokens);
        for (int k = 0; k < a.padded_k; k += kChunk) {
            ptx::wait(barriers.tokens_empty(ring.stage), ring.parity ^ 1);
            const uint32_t full = barriers.tokens_full(ring.stage);
            ptx::arrive_expecting(full, L::kTokenBytes);
            ptx::tensor_load_multicast(shared + ring.stage * L::kTokenBytes + half * kRow, codes, k, tile.token + half,
                                       full, (1 << kPair) - 1);
            ring.advance();
        }
    }
}

// The chunks of all tiles, and one more: consumers decode one ahead, whatever comes.
template <int tokens>
__device__ void load_weights(const Arguments& a, uint32_t shared, Barriers<tokens> barriers) {
    using L = Layout<tokens>;
    const int rank = ptx::cluster_rank();
    Ring<L::kWeightStages> ring;
    const auto load = [&](const Tile& tile, int k) {
        ptx::wait(barriers.weights_empty(ring.stage), ring.parity ^ 1);
        const uint32_t full = barriers.weights_full(ring.stage);
        const uint32_t weights = shared + L::kWeights + ring.stage * kWeightBytes;
        ptx::arrive_expecting(full, kWeightBytes);
        ptx::bulk_load(weights, a.qweight + qweight_strip_offset(tile.existing_channel, k, a.padded_k), kCodeBytes,
                       full);
        ptx::bulk_load(weights + kCodeBytes,
                       a.multipliers + w4a8_multiplier_position(tile.existing_channel, k / kGroup, a.padded_k / kGroup),
                       kMultiplierBytes, full);
        ring.advance();
    };
    for (int index = first_tile(); index < a.tiles; index += tile_step()) {
        const Tile tile(a, index, rank, tokens);
        for (int k = 0; k < a.padded_k; k += kChunk) load(tile, k);
    }
    load(Tile(a, first_tile(), rank, tokens), 0);
}

// A number that may be one of a vector in published order.
__device__ __forceinline__ float vector_element(const void* vector, DType dtype, int n, float otherwise) {
    return vector ? load_float(vector, dtype, vector_position(n)) : otherwise;
}

// A warp brings what the end of a tile needs of its rows and columns: long before it does, and so that the threads that
// multiply load nothing from global memory.
template <int tokens>
__device__ void load_facts(const Arguments& a, uint8_t* memory, int lane, Barriers<tokens> barriers) {
    Facts<tokens>& facts = *reinterpret_cast<Facts<tokens>*>(memory + Layout<tokens>::kFacts);
    float* rank_scales = reinterpret_cast<float*>(memory + Layout<tokens>::kRankScales);
    const int cluster_rank = ptx::cluster_rank();
    if (a.rank_scale)
        for (int i = lane; i < a.rank; i += 32) rank_scales[i] = __ldg(a.rank_scale + i);
    if (a.heads.has_norm) {
        float* norms = reinterpret_cast<float*>(memory + Layout<tokens>::kNorms);
        for (int i = lane; i < 2 * kHeadChannels; i += 32)
            norms[i] = load_float(a.norms[i / kHeadChannels], a.norms_dtype[i / kHeadChannels], i % kHeadChannels);
    }
    uint32_t parity = 1;
    for (int index = first_tile(); index < a.tiles; index += tile_step(), parity ^= 1) {
        const Tile tile(a, index, cluster_rank, tokens);
        ptx::wait(barriers.facts_empty(), parity);
        if (lane == 0) facts.token = tile.token, facts.channel = tile.channel;
#pragma unroll
        for (int i = lane; i < tokens; i += 32)
            facts.ascales[i] = tile.token + i < a.tokens ? __ldg(a.ascales + tile.token + i) : 0.0f;
#pragma unroll
        for (int i = lane; i < kChannels; i += 32) {
            const int n = tile.existing_channel + i;
            facts.scales[i] = __ldg(a.row_scales + n) * vector_element(a.wcscales, a.wcscales_dtype, n, 1.0f);
            facts.biases[i] = vector_element(a.bias, a.bias_dtype, n, 0.0f);
        }
        ptx::arrive(barriers.facts_full());
    }
}

// Brings the low-rank branch block by block, and stores tiles that are finished.
template <int tokens, bool has_heads>
__device__ void load_ranks_and_store(const CUtensorMap* hidden, const CUtensorMap* wide_out,
                                     const CUtensorMap* narrow_out, const Arguments& a, uint32_t shared,
                                     Barriers<tokens> barriers) {
    using L = Layout<tokens>;
    using Block = RankBlock<tokens>;
    const int cluster_rank = ptx::cluster_rank();
    Ring<2> ring;
    uint32_t parity = 0;
    for (int index = first_tile(); index < a.tiles; index += tile_step(), parity ^= 1) {
        const Tile tile(a, index, cluster_rank, tokens);
        for (int first = 0; first < a.rank; first += kRankBlock) {
            ptx::wait(barriers.ranks_empty(ring.stage), ring.parity ^ 1);
            const uint32_t full = barriers.ranks_full(ring.stage);
            const uint32_t block = shared + L::kOutput + ring.stage * sizeof(Block);
            const int steps = min(kRankBlock, a.rank - first) / 16, all_steps = a.rank / 16;
            const uint32_t bytes = steps * sizeof(Block::up[0][0]);  // of a strip
            ptx::arrive_expecting(full, sizeof(Block::hidden) + kChannels / kStrip * bytes);
            ptx::tensor_load(block + offsetof(Block, hidden), hidden, first, tile.token, full);
            for (int strip = 0; strip < kChannels / static_cast<int>(kStrip); ++strip) {
                const size_t step =
                    static_cast<size_t>(tile.existing_channel / kStrip + strip) * all_steps + first / 16;
                ptx::bulk_load(block + offsetof(Block, up) + strip * sizeof(Block::up[0]),
                               static_cast<const uint8_t*>(a.proj_up) + step * sizeof(Block::up[0][0]), bytes, full);
            }
            ring.advance();
        }
#pragma unroll
        for (int c = 0; c < kConsumers; ++c) {
            ptx::wait(barriers.output_full(c), parity);
            const CUtensorMap* out = index < a.wide_tiles ? wide_out : narrow_out;
            const uint32_t source = shared + L::kOutput + c * tokens * kRow;
            if (!has_heads) {
                ptx::tensor_store(out, source, tile.channel + 64 * c, tile.token, 0);
                continue;
            }
            // Planes are heads: of q, k and v, and of the samples in each of them.
            const int head = tile.channel / kHeadChannels, sample = tile.token / a.heads.tokens;
            ptx::tensor_store(out, source, 64 * c, tile.token - sample * a.heads.tokens,
                              (head / a.heads.count * a.samples + sample) * a.heads.count + head % a.heads.count);
        }
        ptx::finish_reading_stores();
        ptx::arrive(barriers.output_empty());
    }
}

// The A operands of a chunk for a warp's 16 channels.
struct Operands {
    uint32_t steps[4][4];
};

// A lane's share of the weights of a chunk: for each group of 64 inputs the codes of its two channels, and their
// multipliers, those of the lower channel in the upper half of the word.
struct Weights {
    uint4 codes[2];
    uint32_t multipliers[2];
};

// Of the next stage, once it is there.
template <int tokens>
__device__ __forceinline__ void read_weights(uint32_t shared, int strip, int lane, Barriers<tokens> barriers,
                                             const Ring<Layout<tokens>::kWeightStages>& ring, Weights& weights) {
    const uint32_t stage = shared + Layout<tokens>::kWeights + ring.stage * kWeightBytes;
    const uint32_t codes = stage + strip * kStripBytes + 16 * lane;
    const uint32_t multipliers = stage + kCodeBytes + 2 * (strip * kStrip + lane / 4 * 2);
    ptx::wait(barriers.weights_full(ring.stage), ring.parity);
#pragma unroll
    for (int group = 0; group < 2; ++group) {
        weights.codes[group] = ptx::load_shared_16(codes + group * (kCodeBytes / 2));
        weights.multipliers[group] = ptx::load_shared_4(multipliers + group * (kMultiplierBytes / 2));
    }
}

// Behind something that all lanes of the warp do together after they have read. Another __syncwarp would cost 2 %.
template <int tokens>
__device__ __forceinline__ void release_weights(int lane, Barriers<tokens> barriers,
                                                Ring<Layout<tokens>::kWeightStages>& ring) {
    if (lane == 0) ptx::arrive(barriers.weights_empty(ring.stage));
    ring.advance();
}

__device__ __forceinline__ void decode_chunk(const Weights& weights, uint32_t mask, Operands& a) {
#pragma unroll
    for (int group = 0; group < 2; ++group) {
        const uint4 codes = weights.codes[group];
        const GroupMultiplier upper(weights.multipliers[group] & 0xffff, mask);
        const GroupMultiplier lower(weights.multipliers[group] >> 16, mask);
        decode(codes.x, upper, a.steps[2 * group][0], a.steps[2 * group][2]);
        decode(codes.y, upper, a.steps[2 * group + 1][0], a.steps[2 * group + 1][2]);
        decode(codes.z, lower, a.steps[2 * group][1], a.steps[2 * group][3]);
        decode(codes.w, lower, a.steps[2 * group + 1][1], a.steps[2 * group + 1][3]);
    }
}

// Two factors of ranks `rank` and the next, times their scales.
template <bool is_bf16>
__device__ __forceinline__ uint32_t scale_factors(uint32_t factors, uint32_t rank_scales, int rank) {
    const float2 scales = ptx::load_shared_floats(rank_scales + 4 * rank);
    const float2 pair = unpack_half(factors, is_bf16 ? DType::bf16 : DType::f16);
    return is_bf16 ? pack_bf16(pair.x * scales.x, pair.y * scales.y) : pack_f16(pair.x * scales.x, pair.y * scales.y);
}

// y += (lora_act * rank_scale) proj_up^T for a strip of 16 channels and `columns` tokens.
template <int tokens, int columns, bool is_bf16>
__device__ __forceinline__ void add_low_rank(const Arguments& a, uint32_t shared, int strip, int lane, Ring<2>& ring,
                                             Barriers<tokens> barriers, float (&y)[columns / 2]) {
    using Block = RankBlock<tokens>;
#pragma unroll 1
    for (int first = 0; first < a.rank; first += kRankBlock) {
        ptx::wait(barriers.ranks_full(ring.stage), ring.parity);
        const uint32_t block = shared + Layout<tokens>::kOutput + ring.stage * sizeof(Block);
        const uint64_t hidden = ptx::wgmma_operand<kRankRow>(block + offsetof(Block, hidden));
        const uint32_t up = block + offsetof(Block, up) + strip * sizeof(Block::up[0]) + 16 * lane;
        const uint32_t scales = shared + Layout<tokens>::kRankScales + 4 * (first + lane % 4 * 2);
        uint32_t factors[kRankBlock / 16][4];
#pragma unroll
        for (int step = 0; step < kRankBlock / 16; ++step) {
            const uint4 words = ptx::load_shared_16(up + step * sizeof(Block::up[0][0]));
            factors[step][0] = words.x, factors[step][1] = words.z;  // two ranks of the upper channel, of the lower
            factors[step][2] = words.y, factors[step][3] = words.w;  // eight ranks on
            if (a.rank_scale) {
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    factors[step][i] = scale_factors<is_bf16>(factors[step][i], scales, 16 * step + i / 2 * 8);
            }
        }
        ptx::wgmma_fence();
#pragma unroll
        for (int step = 0; step < kRankBlock / 16; ++step)
            if (first + 16 * step < a.rank)
                ptx::Wgmma<columns>::template half<is_bf16>(y, factors[step], hidden + 2 * step);
        ptx::wgmma_commit();
        ptx::wgmma_wait<0>();
        __syncwarp();
        if (lane == 0) ptx::arrive(barriers.ranks_empty(ring.stage));
        ring.advance();
    }
}

// Sums to fp32 outputs without the low-rank branch, for the lane's channels `channel` and eight on, of the tile's.
template <int tokens, int columns>
__device__ __forceinline__ void scale_sums(uint32_t facts, int channel, int lane, const int32_t (&sums)[columns / 2],
                                           float (&y)[columns / 2]) {
    float scale[2], bias[2];
#pragma unroll
    for (int row = 0; row < 2; ++row) {
        const uint32_t place = facts + 4 * (channel + 8 * row);
        scale[row] = ptx::load_shared_float(place + offsetof(Facts<tokens>, scales));
        bias[row] = ptx::load_shared_float(place + offsetof(Facts<tokens>, biases));
    }
    const uint32_t ascales = facts + offsetof(Facts<tokens>, ascales) + lane % 4 * 8;
#pragma unroll
    for (int block = 0; block < columns / 8; ++block) {
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

// What a thread that multiplies keeps from tile to tile.
template <int tokens>
struct State {
    Ring<Layout<tokens>::kStages> token_ring;
    Ring<Layout<tokens>::kWeightStages> weight_ring;
    Ring<2> rank_ring;
    uint32_t parity;    // of what happens once a tile
    Operands operands;  // the first chunk of the next tile, decoded
};

// Multiplies and finishes a tile of `columns` tokens: warpgroup `consumer` has its channels from 64 * consumer on.
template <int tokens, int columns, bool has_heads>
__device__ __forceinline__ void consume_tile(const Arguments& a, uint32_t shared, int consumer, int index,
                                             Barriers<tokens> barriers, State<tokens>& state) {
    using L = Layout<tokens>;
    const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
    const int chunks = a.padded_k / kChunk;
    const uint32_t mask = code_mask();
    int32_t sums[columns / 2];

    // The first product of a tile overwrites the sums. Known at compile time: else ptxas would keep the registers alive
    // from tile to tile.
    const auto issue = [&](auto is_first, const Operands& operands) {
        const int stage = state.token_ring.stage;
        const uint64_t b = ptx::wgmma_operand<kRow>(shared) + stage * (L::kTokenBytes >> 4);
        ptx::wait(barriers.tokens_full(stage), state.token_ring.parity);
        ptx::wgmma_fence();
#pragma unroll
        for (int step = 0; step < 4; ++step)
            if (decltype(is_first)::value && step == 0)
                ptx::Wgmma<columns>::template s8<true>(sums, operands.steps[step], b);
            else
                ptx::Wgmma<columns>::s8(sums, operands.steps[step], b + 2 * step);
        ptx::wgmma_commit();
        state.token_ring.advance();
        return stage;
    };
    // Stages of tokens are filled by both blocks of the pair: both must know that they are free.
    const auto release = [&](int stage) {
        if (lane < kPair) ptx::arrive_in_cluster(ptx::address_in_cta(barriers.tokens_empty(stage), lane));
    };
    // Starts a chunk's products, and decodes the next chunk while they run.
    int chunk = 0, running = 0;
    const auto step = [&](auto is_first, const Operands& current, Operands& next) {
        const int stage = issue(is_first, current);
        Weights weights;
        read_weights(shared, 4 * consumer + warp, lane, barriers, state.weight_ring, weights);
        ptx::wgmma_wait<1>();
        if (!decltype(is_first)::value) release(running);
        running = stage;
        decode_chunk(weights, mask, next);
        release_weights(lane, barriers, state.weight_ring);
        ++chunk;
    };
    constexpr std::true_type first;
    constexpr std::false_type later;
    Operands& even = state.operands;
    Operands odd;
    step(first, even, odd);
#pragma unroll 1
    while (chunk + 2 <= chunks) {
        step(later, odd, even);
        step(later, even, odd);
    }
    if (chunk < chunks) step(later, odd, even);
    ptx::wgmma_wait<0>();
    if (chunks % 2) even = odd;  // not before: ptxas would let every product wait for the one before it
    release(running);

    const int strip = 4 * consumer + warp;
    const uint32_t parity = state.parity;
    state.parity ^= 1;
    if (a.sums) {
        store_sums<columns>(a, Tile(a, index, ptx::cluster_rank(), tokens), kStrip * strip, sums);
        return;
    }
    float y[columns / 2];
    const uint32_t facts = shared + L::kFacts;
    ptx::wait(barriers.facts_full(), parity);
    scale_sums<tokens, columns>(facts, kStrip * strip + lane / 4, lane, sums, y);
    const int tile_token = ptx::load_shared_4(facts + offsetof(Facts<tokens>, token));
    const int tile_channel = ptx::load_shared_4(facts + offsetof(Facts<tokens>, channel));
    __syncwarp();
    if (lane == 0) ptx::arrive(barriers.facts_empty());
    if (a.rank) {
        if (a.up_dtype == DType::bf16)
            add_low_rank<tokens, columns, true>(a, shared, strip, lane, state.rank_ring, barriers, y);
        else
            add_low_rank<tokens, columns, false>(a, shared, strip, lane, state.rank_ring, barriers, y);
        ptx::sync_threads<128 * kConsumers>(1);  // blocks of ranks make room for outputs
    }
    ptx::wait(barriers.output_empty(), parity ^ 1);
    const uint32_t output = shared + L::kOutput + consumer * tokens * kRow;
    if (a.plain)  // first and in one piece: jumps over code that is not needed cost as much as a tenth of a tile's end
        stage_output<columns, true, false>(output, y);
    else
        finish<columns>(a, output, tile_token, consumer, tile_channel + 64 * consumer, y);
    if (const int head = tile_channel / kHeadChannels;
        has_heads && head < 2 * a.heads.count) {  // of q or k; both consumers work on both halves of it
        ptx::sync_threads<128 * kConsumers>(1);
        const uint32_t rows = shared + L::kOutput;
        const uint32_t weights = shared + L::kNorms + head / a.heads.count * kHeadChannels * 4;
        constexpr int warps = 4 * kConsumers;
        if (a.out_dtype == DType::bf16)
            finish_head<columns, warps, true>(a.heads, rows, tokens * kRow, weights, tile_token, a.tokens, strip, lane);
        else
            finish_head<columns, warps, false>(a.heads, rows, tokens * kRow, weights, tile_token, a.tokens, strip,
                                               lane);
        // Each consumer's half is complete only when both are done.
        ptx::fence_async_proxy();
        ptx::sync_threads<128 * kConsumers>(1);
    }
    ptx::fence_async_proxy();
    ptx::arrive(barriers.output_full(consumer));
}

// Heads have kernels of their own: with what they need behind it, ptxas keeps no uniform registers in the main loop.
template <int tokens, bool has_heads>
__global__ void __launch_bounds__(kThreads, 1)
    product(const __grid_constant__ CUtensorMap codes, const __grid_constant__ CUtensorMap hidden,
            const __grid_constant__ CUtensorMap wide_out, const __grid_constant__ CUtensorMap narrow_out,
            const __grid_constant__ Arguments a) {
    using L = Layout<tokens>;
    extern __shared__ __align__(1024) uint8_t memory[];  // the swizzle counts from multiples of 1024
    const uint32_t shared = ptx::opaque(ptx::shared_address(memory));
    const Barriers<tokens> barriers{shared + L::kBarriers};
    const int warpgroup = threadIdx.x / 128, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (threadIdx.x == 0) {
        ptx::prefetch_map(&codes);
        for (int stage = 0; stage < L::kStages; ++stage) {
            ptx::init_barrier(barriers.tokens_full(stage), 1);
            ptx::init_barrier(barriers.tokens_empty(stage), kPair * 4 * kConsumers);
        }
        for (int stage = 0; stage < L::kWeightStages; ++stage) {
            ptx::init_barrier(barriers.weights_full(stage), 1);
            ptx::init_barrier(barriers.weights_empty(stage), 4 * kConsumers);
        }
        ptx::init_barrier(barriers.facts_full(), 32);
        ptx::init_barrier(barriers.facts_empty(), 4 * kConsumers);
        for (int block = 0; block < 2; ++block) {
            ptx::init_barrier(barriers.ranks_full(block), 1);
            ptx::init_barrier(barriers.ranks_empty(block), 4 * kConsumers);
        }
        ptx::init_barrier(barriers.output_empty(), 1);
        for (int c = 0; c < kConsumers; ++c) ptx::init_barrier(barriers.output_full(c), 128);
        ptx::fence_barrier_init();
    }
    ptx::cluster_arrive();
    ptx::cluster_wait();
    if (warpgroup == 0) {
        ptx::give_up_registers<kProducerRegisters>();
        if (warp == 0) {
            if (lane == 0) load_tokens<tokens>(&codes, a, shared, barriers);
        } else if (warp == 1) {
            if (lane == 0) load_weights<tokens>(a, shared, barriers);
        } else if (a.sums) {
            // the bare product needs neither
        } else if (warp == 2) {
            load_facts<tokens>(a, memory, lane, barriers);
        } else if (lane == 0) {
            load_ranks_and_store<tokens, has_heads>(&hidden, &wide_out, &narrow_out, a, shared, barriers);
        }
    } else {
        ptx::take_registers<kConsumerRegisters>();
        const int consumer = warpgroup - 1;
        State<tokens> state{};
        Weights weights;
        read_weights(shared, 4 * consumer + warp % 4, lane, barriers, state.weight_ring, weights);
        decode_chunk(weights, code_mask(), state.operands);
        __syncwarp();
        release_weights(lane, barriers, state.weight_ring);
        for (int index = first_tile(); index < a.tiles; index += tile_step())
            if (index < a.wide_tiles)
                consume_tile<tokens, tokens, has_heads>(a, shared, consumer, index, barriers, state);
            else
                consume_tile<tokens, tokens - kNarrower, has_heads>(a, shared, consumer, index, barriers, state);
    }
    // The other block may still copy into this one's memory, or arrive at its barriers.
    ptx::cluster_arrive();
    ptx::cluster_wait();
}

// How the tokens of a sample are cut into tiles.
struct Tiling {
    int width;         // of a wide tile
    int wide, narrow;  // token tiles
};

template <int tokens>
void run(Arguments a, const Tiling& tiling, const int8_t* codes, const void* lora_act, const Planes& out,
         int processors, cudaStream_t stream) {
    a.wide_tokens = tiling.wide * tokens;
    a.wide_tiles = a.samples * tiling.wide * a.channel_pairs;
    a.tiles = a.samples * (tiling.wide + tiling.narrow) * a.channel_pairs;
    const auto map = [](CUtensorMapDataType type, int element_bytes, const Planes& planes, int row_bytes, int rows) {
        return make_tensor_map(type, element_bytes, planes, row_bytes, rows);
    };
    const Planes code_planes{codes, a.tokens, a.padded_k};
    const CUtensorMap codes_map = map(CU_TENSOR_MAP_DATA_TYPE_UINT8, 1, code_planes, kRow, tokens / kPair);
    // A map of something that is not there is not used.
    const auto half_map = [&](const Planes& planes, int row_bytes, int rows) {
        return planes.data ? map(CU_TENSOR_MAP_DATA_TYPE_UINT16, 2, planes, row_bytes, rows) : codes_map;
    };
    launch_clusters(kPair, a.heads.count ? product<tokens, true> : product<tokens, false>,
                    dim3(kPair * std::min(a.tiles, processors / kPair)), dim3(kThreads), Layout<tokens>::kBytes, stream,
                    "w4a8_linear (sm90)", codes_map,
                    half_map({a.rank ? lora_act : nullptr, a.tokens, a.rank}, kRankRow, tokens),
                    half_map(out, kRow, tokens), half_map(out, kRow, tokens - kNarrower), a);
}

// The tiling that is worked off soonest. A pair of blocks takes a tile after the other, wide ones first. Cycles of a
// tile as measured for widths 192 to 256: a chunk costs its decoding and half of its products, which hide the other
// half.
Tiling choose_tiling(const Arguments& a, int processors) {
    const int pairs = processors / kPair, tokens = a.tokens / a.samples;
    Tiling best{};
    double least = 0;
    for (const int width : {256, 224, 192, 160, 128}) {
        const int narrow_width = width - kNarrower;
        for (int tiles = (tokens + width - 1) / width;; ++tiles) {
            const int64_t missing = tokens - int64_t{tiles} * narrow_width;  // with narrow ones only
            const int wide = missing > 0 ? static_cast<int>((missing + kNarrower - 1) / kNarrower) : 0;
            const double mean_width = narrow_width + kNarrower * static_cast<double>(wide) / tiles;
            const int64_t rounds = (int64_t{tiles} * a.samples * a.channel_pairs + pairs - 1) / pairs;
            const double chunks = static_cast<double>(a.padded_k / kChunk);
            const double cost =
                static_cast<double>(rounds) * (chunks * (536 + 2.1 * mean_width) + 11 * mean_width + 300);
            if (!best.width || cost < least) least = cost, best = {width, wide, tiles - wide};
            if (!wide) break;
        }
    }
    return best;
}

void choose_and_run(const Arguments& a, const int8_t* codes, const void* lora_act, const Planes& out,
                    cudaStream_t stream) {
    const int processors = device_attribute(cudaDevAttrMultiProcessorCount);
    const Tiling tiling = choose_tiling(a, processors);
    switch (tiling.width) {
        case 256:
            return run<256>(a, tiling, codes, lora_act, out, processors, stream);
        case 224:
            return run<224>(a, tiling, codes, lora_act, out, processors, stream);
        case 192:
            return run<192>(a, tiling, codes, lora_act, out, processors, stream);
        case 160:
            return run<160>(a, tiling, codes, lora_act, out, processors, stream);
        default:
            return run<128>(a, tiling, codes, lora_act, out, processors, stream);
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
    a.samples = 1;
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
    return serves(a.product) && half_output && half_branch && a.rank <= kMaxRank && a.out_features % 8 == 0 &&
           aligned(a.out) && aligned(a.lora_act) &&
           (!a.residual.data || (a.residual.dtype == a.out_dtype && aligned(a.residual.data))) &&
           (!a.gate.data || a.gate_rows == 1 || a.product.tokens / a.gate_rows >= 256);
}

void w4a8_accumulate(const ProductArguments& product, int32_t* sums, cudaStream_t stream) {
    Arguments a = product_arguments(product);
    a.sums = sums;
    choose_and_run(a, product.codes, nullptr, {}, stream);
}

namespace {

Arguments linear_arguments(const LinearArguments& linear) {
    Arguments a = product_arguments(linear.product);
    a.rank = linear.proj_up.data ? static_cast<int>(linear.rank) : 0;
    a.ascales = linear.ascales;
    a.row_scales = linear.row_scales;
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
    return a;
}

}  // namespace

void w4a8_linear(const LinearArguments& linear, cudaStream_t stream) {
    const Arguments a = linear_arguments(linear);
    choose_and_run(a, linear.product.codes, linear.lora_act, {linear.out, a.tokens, a.out_features, 1, 0}, stream);
}

bool serves(const HeadArguments& h) {
    const LinearArguments& a = h.linear;
    return serves(a) && a.product.padded_n == a.out_features && aligned(h.rotary) &&
           a.product.tokens / h.samples > kFewTokens;  // samples have tiles of their own
}

void w4a8_linear_heads(const HeadArguments& h, cudaStream_t stream) {
    Arguments a = linear_arguments(h.linear);
    a.heads.count = static_cast<int>(h.heads);
    a.samples = static_cast<int>(h.samples);
    a.heads.tokens = a.tokens / a.samples;
    a.heads.eps = h.eps;
    a.heads.has_norm = h.norm_q.data;
    a.heads.rotary = h.rotary;
    a.norms[0] = h.norm_q.data, a.norms_dtype[0] = static_cast<DType>(h.norm_q.dtype);
    a.norms[1] = h.norm_k.data, a.norms_dtype[1] = static_cast<DType>(h.norm_k.dtype);
    const int64_t row_bytes = 2 * kHeadChannels;
    const Planes out{static_cast<char*>(h.linear.out) + h.first_token * row_bytes, a.heads.tokens, kHeadChannels,
                     3 * h.samples * h.heads, h.out_tokens * row_bytes};
    choose_and_run(a, h.linear.product.codes, h.linear.lora_act, out, stream);
}

}  // namespace nk::cuda::sm90
