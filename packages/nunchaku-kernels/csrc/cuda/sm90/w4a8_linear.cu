// The W4A8 product with wgmma (sm_90a): Y^T = W X^T, with the same int32 sums as the portable kernel.
//
// Persistent pairs of blocks (clusters of two) share a token tile: each loads half of it for both. A block has three
// warpgroups. The first one moves data: one warp loads tokens and weights of 128 inputs per stage, one stores finished
// tiles, two bring the low-rank hidden state. The other two multiply 64 channels each with all tokens of the tile;
// weights are decoded in registers, straight from the published order, into the A operand of wgmma. Sums become fp32 in
// place, and the low-rank up projection is accumulated onto them by 16-bit wgmmas.
#include <algorithm>
#include <cstdint>
#include <stdexcept>

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
constexpr int kWeightBytes = kChannels * kChunk / 2;
constexpr int kRow = 128;  // bytes of a token in a stage, and in an output or hidden tile
constexpr int kSharedLimit = 232448;
constexpr int kRankBlock = 64;  // ranks of the low-rank branch that are staged together
constexpr int kHiddenThreads = 64;
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
};

// Shared memory: stages of tokens, stages of weights, one output tile per consumer, scales of activations, barriers.
// The hidden state of the low-rank branch lies where the first output tile goes afterwards.
template <int tokens>
struct Layout {
    static constexpr int kTokenBytes = tokens * kRow, kStageBytes = kTokenBytes + kWeightBytes;
    static constexpr int kOutputBytes = kConsumers * tokens * kRow;
    static constexpr int kScaleBytes = tokens * 4;  // of activations; two sets
    static constexpr int kBarrierBytes = 192;
    static constexpr int kStages =
        std::min(8, (kSharedLimit - kOutputBytes - 2 * kScaleBytes - kBarrierBytes) / kStageBytes);
    static constexpr int kWeights = kStages * kTokenBytes, kOutput = kWeights + kStages * kWeightBytes;
    static constexpr int kScales = kOutput + kOutputBytes, kBarriers = kScales + 2 * kScaleBytes;
    static constexpr int kBytes = kBarriers + kBarrierBytes;
    static_assert(kTokenBytes % 1024 == 0 && kStages >= 3 && (2 * kStages + 3 + kConsumers) * 8 <= kBarrierBytes);
};

// Where the barriers are. `full` and `empty` guard the stages, `hidden_full` and `hidden_empty` one block of ranks,
// `output_full` (one per consumer) and `output_empty` the output tiles.
template <int stages>
struct Barriers {
    uint32_t base;
    __device__ uint32_t full(int stage) const { return base + 8 * stage; }
    __device__ uint32_t empty(int stage) const { return base + 8 * (stages + stage); }
    __device__ uint32_t hidden_full() const { return base + 8 * (2 * stages); }
    __device__ uint32_t hidden_empty() const { return base + 8 * (2 * stages + 1); }
    __device__ uint32_t output_empty() const { return base + 8 * (2 * stages + 2); }
    __device__ uint32_t output_full(int consumer) const { return base + 8 * (2 * stages + 3 + consumer); }
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
__device__ void load_stages(const CUtensorMap* codes, const Arguments& a, uint32_t shared,
                            Barriers<Layout<tokens>::kStages> barriers) {
    using L = Layout<tokens>;
    const int rank = ptx::cluster_rank(), half = rank * (tokens / kPair);
    Ring<L::kStages> ring;
    for (int index = first_tile(); index < a.tiles; index += tile_step()) {
        const Tile tile(a, index, rank, tokens);
        const uint8_t* weights = a.qweight + qweight_strip_offset(tile.existing_channel, 0, a.padded_k);
        for (int k = 0; k < a.padded_k; k += kChunk, weights += kWeightBytes) {
            ptx::wait(barriers.empty(ring.stage), ring.parity ^ 1);
            const uint32_t full = barriers.full(ring.stage);
            ptx::arrive_expecting(full, L::kStageBytes);
            ptx::tensor_load_multicast(shared + ring.stage * L::kTokenBytes + half * kRow, codes, k, tile.token + half,
                                       full, (1 << kPair) - 1);
            ptx::bulk_load(shared + L::kWeights + ring.stage * kWeightBytes, weights, kWeightBytes, full);
            ring.advance();
        }
    }
}

template <int tokens>
__device__ void store_tiles(const CUtensorMap* out, const Arguments& a, uint32_t shared,
                            Barriers<Layout<tokens>::kStages> barriers) {
    const int rank = ptx::cluster_rank();
    uint32_t parity = 0;
    for (int index = first_tile(); index < a.tiles; index += tile_step(), parity ^= 1) {
        const Tile tile(a, index, rank, tokens);
#pragma unroll
        for (int c = 0; c < kConsumers; ++c) {
            ptx::wait(barriers.output_full(c), parity);
            ptx::tensor_store(out, shared + Layout<tokens>::kOutput + c * tokens * kRow, tile.channel + 64 * c,
                              tile.token);
        }
        ptx::finish_reading_stores();
        ptx::arrive(barriers.output_empty());
    }
}

// Brings lora_act * rank_scale as 16-bit rows of 64 ranks, in the 128-byte swizzle.
template <int tokens>
__device__ void load_hidden(const Arguments& a, uint8_t* hidden, int thread,
                            Barriers<Layout<tokens>::kStages> barriers) {
    uint32_t output_parity = 1, empty_parity = 1;
    for (int index = first_tile(); index < a.tiles; index += tile_step()) {
        const Tile tile(a, index, 0, tokens);  // both blocks of a pair have the same tokens
        for (int first = 0; first < a.rank; first += kRankBlock) {
            // Before the first block: the last tile was stored. Before the others: the block before was multiplied.
            if (first == 0) {
                ptx::wait(barriers.output_empty(), output_parity);
                output_parity ^= 1;
            }
            ptx::wait(barriers.hidden_empty(), empty_parity);
            empty_parity ^= 1;
            const int pieces = min(kRankBlock, a.rank - first) / 8;  // of 16 bytes
#pragma unroll 4
            for (int i = thread; i < tokens * pieces; i += kHiddenThreads) {
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
            ptx::arrive(barriers.hidden_full());
        }
    }
}

// The A operands of a chunk for a warp's 16 channels, and the multipliers of its two groups for the lane's two
// channels.
struct Operands {
    uint32_t steps[4][4];
};
struct Multipliers {
    uint32_t upper, lower;
};

__device__ __forceinline__ void decode_chunk(const uint4 (&codes)[2], Multipliers m, uint32_t mask, Operands& a) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const GroupMultiplier upper(m.upper >> 16 * half & 0xffff, mask), lower(m.lower >> 16 * half & 0xffff, mask);
        decode(codes[half].x, upper, a.steps[2 * half][0], a.steps[2 * half][2]);
        decode(codes[half].y, upper, a.steps[2 * half + 1][0], a.steps[2 * half + 1][2]);
        decode(codes[half].z, lower, a.steps[2 * half][1], a.steps[2 * half][3]);
        decode(codes[half].w, lower, a.steps[2 * half + 1][1], a.steps[2 * half + 1][3]);
    }
}

// The factors of one block of ranks for a warp's 16 channels; a rank that does not exist repeats the last ones.
struct UpFactors {
    uint4 steps[kRankBlock / 16];
};

// Without a branch: what a rank of 0 loads is not used, and nothing has to wait for the loads before it is.
__device__ __forceinline__ UpFactors load_up(const Arguments& a, int strip_channel, int first_rank, int lane) {
    const uint4* up = a.rank ? static_cast<const uint4*>(a.proj_up) +
                                   static_cast<size_t>(strip_channel / 16) * (a.rank / 16) * 32 + lane
                             : reinterpret_cast<const uint4*>(a.qweight);
    UpFactors result;
#pragma unroll
    for (int step = 0; step < kRankBlock / 16; ++step)
        result.steps[step] = __ldg(up + max(min(first_rank / 16 + step, a.rank / 16 - 1), 0) * 32);
    return result;
}

// y += (lora_act * rank_scale) proj_up^T. `up` has the factors of the first block of ranks.
template <int tokens, bool is_bf16>
__device__ __forceinline__ void add_low_rank(const Arguments& a, uint32_t hidden, int strip_channel, int lane,
                                             UpFactors up, uint32_t& parity, Barriers<Layout<tokens>::kStages> barriers,
                                             float (&y)[tokens / 2]) {
    const uint64_t b = ptx::wgmma_operand(hidden);
#pragma unroll 1
    for (int first = 0; first < a.rank; first += kRankBlock) {
        if (first) up = load_up(a, strip_channel, first, lane);
        ptx::wait(barriers.hidden_full(), parity);
        parity ^= 1;
        ptx::wgmma_fence();
#pragma unroll
        for (int step = 0; step < kRankBlock / 16; ++step)
            if (first + 16 * step < a.rank) {
                const uint4 words = up.steps[step];
                const uint32_t factors[4] = {words.x, words.z, words.y, words.w};
                ptx::Wgmma<tokens>::template half<is_bf16>(y, factors, b + 2 * step);
            }
        ptx::wgmma_commit();
        ptx::wgmma_wait<0>();
        if (lane == 0) ptx::arrive(barriers.hidden_empty());
    }
}

// What the sums of the lane's two channels are multiplied by, and what is added; as loaded, so that nothing waits for
// it before it is used.
struct ChannelTerms {
    uint32_t scale[2], factor[2], bias[2];

    __device__ __forceinline__ ChannelTerms(const Arguments& a, int channel) {
#pragma unroll
        for (int row = 0; row < 2; ++row) {
            const int n = channel + 8 * row;
            scale[row] = a.row_scales ? __ldg(reinterpret_cast<const uint32_t*>(a.row_scales) + n) : 0;
            factor[row] = bits(a.wcscales, a.wcscales_dtype, vector_position(n));
            bias[row] = bits(a.bias, a.bias_dtype, vector_position(n));
        }
    }

    static __device__ __forceinline__ uint32_t bits(const void* vector, DType dtype, size_t index) {
        if (!vector) return 0;
        return dtype == DType::f32 ? __ldg(static_cast<const uint32_t*>(vector) + index)
                                   : __ldg(static_cast<const uint16_t*>(vector) + index);
    }

    static __device__ __forceinline__ float value(uint32_t bits, DType dtype) {
        if (dtype == DType::f32) return __uint_as_float(bits);
        return dtype == DType::bf16 ? __uint_as_float(bits << 16) : unpack_half(bits, DType::f16).x;
    }
};

// Sums to fp32 outputs without the low-rank branch; `ascales` has those of the tile's tokens, from the lane's first one
// on.
template <int tokens>
__device__ __forceinline__ void scale_sums(const Arguments& a, const ChannelTerms& terms, uint32_t ascales,
                                           const int32_t (&sums)[tokens / 2], float (&y)[tokens / 2]) {
    float scale[2], bias[2];
#pragma unroll
    for (int row = 0; row < 2; ++row) {
        scale[row] = __uint_as_float(terms.scale[row]);
        if (a.wcscales) scale[row] *= ChannelTerms::value(terms.factor[row], a.wcscales_dtype);
        bias[row] = a.bias ? ChannelTerms::value(terms.bias[row], a.bias_dtype) : 0.0f;
    }
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
__device__ __forceinline__ void apply_gate(const Arguments& a, const Tile& tile, int channel, int first_token,
                                           float (&y)[tokens / 2]) {
    const int row = tile.token / a.tokens_per_gate, last_row = (a.tokens - 1) / a.tokens_per_gate;
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
__device__ __forceinline__ void finish(const Arguments& a, uint32_t outputs, const Tile& tile, int consumer,
                                       int channel, int first_token, float (&y)[tokens / 2]) {
    const uint32_t output = outputs + consumer * tokens * kRow;
    if (a.activation == 1) {
#pragma unroll
        for (int i = 0; i < tokens / 2; ++i) y[i] = activate(y[i], 1);
    } else if (a.activation == 2) {
#pragma unroll
        for (int i = 0; i < tokens / 2; ++i) y[i] = activate(y[i], 2);
    }
    if (a.gate) apply_gate<tokens>(a, tile, channel, first_token, y);
    if (a.residual) {
        load_residual<tokens>(a, output, tile.token, tile.channel + 64 * consumer);
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

// Multiplies and finishes tiles: warpgroup `consumer` has channels 64 * consumer and on of each.
template <int tokens>
__device__ void consume(const Arguments& a, uint32_t shared, int consumer, Barriers<Layout<tokens>::kStages> barriers) {
    using L = Layout<tokens>;
    const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
    const int groups = a.padded_k / kGroup, chunks = a.padded_k / kChunk;
    const uint32_t strip = shared + L::kWeights + (4 * consumer + warp) * kStripBytes + 16 * lane;
    const int rank = ptx::cluster_rank(), consumer_thread = threadIdx.x - 128;
    // Stages are filled by both blocks of the pair: both must know that they are free.
    const auto release = [&](int stage) {
        if (lane < kPair) ptx::arrive_in_cluster(ptx::address_in_cta(barriers.empty(stage), lane));
    };
    const uint64_t tokens_operand = ptx::wgmma_operand(shared);
    const uint32_t mask = code_mask();
    Ring<L::kStages> ring;
    uint32_t hidden_parity = 0, output_parity = 1;
    int scale_set = 0;

    for (int index = first_tile(); index < a.tiles; index += tile_step()) {
        const Tile tile(a, index, rank, tokens);
        const int strip_channel = tile.existing_channel + 64 * consumer + 16 * warp, channel = strip_channel + lane / 4;
        int32_t sums[tokens / 2] = {};  // zeros: without them ptxas keeps the registers alive from tile to tile
        const float my_ascale =
            a.sums ? 0.0f : __ldg(a.ascales + min(tile.token + min(consumer_thread, tokens - 1), a.tokens - 1));
        const ChannelTerms terms(a, channel);  // early, as all that the end of the tile would wait for
        const UpFactors up = load_up(a, strip_channel, 0, lane);
        const uint32_t* upper_row =
            reinterpret_cast<const uint32_t*>(a.multipliers + static_cast<size_t>(channel) * groups);
        const uint32_t* lower_row = upper_row + 4 * groups;  // eight channels on
        // A lane loads the multipliers of every fourth chunk, for all four lanes that share its channels: loads from
        // rows far apart are dear, shuffles are not.
        const auto load_multipliers = [&](int chunk) {
            const int own = min(chunk + lane % 4, chunks - 1);
            return Multipliers{__ldg(upper_row + own), __ldg(lower_row + own)};
        };
        Multipliers four = load_multipliers(0), next_four = load_multipliers(4);
        const auto multipliers_of = [&](int chunk) {  // chunks in ascending order, each once
            if (chunk % 4 == 0 && chunk) {
                four = next_four;
                next_four = load_multipliers(chunk + 4);
            }
            return Multipliers{__shfl_sync(~0u, four.upper, chunk % 4, 4), __shfl_sync(~0u, four.lower, chunk % 4, 4)};
        };
        const auto codes_of = [&](const Ring<L::kStages>& at, uint4(&codes)[2]) {
            ptx::wait(barriers.full(at.stage), at.parity);
            codes[0] = ptx::load_shared_16(strip + at.stage * kWeightBytes);
            codes[1] = ptx::load_shared_16(strip + at.stage * kWeightBytes + kChannels * kGroup / 2);
        };
        const auto issue = [&](const Operands& a_operands) {
            const uint64_t b = tokens_operand + ring.stage * (L::kTokenBytes >> 4);
            ptx::wgmma_fence();
#pragma unroll
            for (int step = 0; step < 4; ++step) ptx::Wgmma<tokens>::s8(sums, a_operands.steps[step], b + 2 * step);
            ptx::wgmma_commit();
        };
        // Starts a chunk's products, and decodes the next chunk while they run.
        int chunk = 0, finished = -1;
        const auto step = [&](const Operands& current, Operands& next) {
            issue(current);
            const int stage = ring.stage;
            ring.advance();
            uint4 codes[2];
            codes_of(ring, codes);
            const Multipliers multipliers = multipliers_of(++chunk);
            ptx::wgmma_wait<1>();
            if (finished >= 0) release(finished);
            finished = stage;
            decode_chunk(codes, multipliers, mask, next);
        };
        const auto last = [&](const Operands& current) {
            issue(current);
            ptx::wgmma_wait<0>();
            if (finished >= 0) release(finished);
            release(ring.stage);
            ring.advance();
        };
        Operands even, odd;
        {
            uint4 codes[2];
            codes_of(ring, codes);
            decode_chunk(codes, multipliers_of(0), mask, even);
        }
#pragma unroll 1
        while (chunk + 2 < chunks) {
            step(even, odd);
            step(odd, even);
        }
        if (chunk + 1 < chunks) {
            step(even, odd);
            last(odd);
        } else {
            last(even);
        }

        const int first_token = tile.token + lane % 4 * 2;
        if (a.sums) {
            if (tile.channel != tile.existing_channel) continue;
#pragma unroll
            for (int block = 0; block < tokens / 8; ++block)
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const int token = first_token + 8 * block + i % 2;
                    if (token < a.tokens)
                        a.sums[static_cast<size_t>(token) * a.padded_n + channel + i / 2 * 8] = sums[4 * block + i];
                }
            continue;
        }

        float y[tokens / 2];
        // Double: the other consumer may still be reading those of the last tile.
        const uint32_t scales = shared + L::kScales + scale_set * L::kScaleBytes;
        scale_set ^= 1;
        if (consumer_thread < tokens) ptx::store_shared_float(scales + 4 * consumer_thread, my_ascale);
        ptx::sync_threads<128 * kConsumers>(1);
        scale_sums<tokens>(a, terms, scales + lane % 4 * 8, sums, y);
        if (a.rank) {
            if (a.up_dtype == DType::bf16)
                add_low_rank<tokens, true>(a, shared + L::kOutput, strip_channel, lane, up, hidden_parity, barriers, y);
            else
                add_low_rank<tokens, false>(a, shared + L::kOutput, strip_channel, lane, up, hidden_parity, barriers,
                                            y);
            ptx::sync_threads<128 * kConsumers>(1);  // the hidden state makes room for outputs
        } else {
            ptx::wait(barriers.output_empty(), output_parity);
            output_parity ^= 1;
        }
        finish<tokens>(a, shared + L::kOutput, tile, consumer, tile.channel + 64 * consumer + 16 * warp + lane / 4,
                       first_token, y);
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
        }
        ptx::init_barrier(barriers.hidden_full(), kHiddenThreads);
        ptx::init_barrier(barriers.hidden_empty(), 4 * kConsumers);
        ptx::init_barrier(barriers.output_empty(), 1);
        for (int c = 0; c < kConsumers; ++c) ptx::init_barrier(barriers.output_full(c), 128);
        ptx::fence_barrier_init();
    }
    ptx::cluster_arrive();
    ptx::cluster_wait();
    if (warpgroup == 0) {
        ptx::give_up_registers<kProducerRegisters>();
        if (warp == 0) {
            if (lane == 0) load_stages<tokens>(&codes, a, shared, barriers);
        } else if (warp == 1) {
            if (lane == 0 && !a.sums) store_tiles<tokens>(&out, a, shared, barriers);
        } else if (!a.sums && a.rank) {
            load_hidden<tokens>(a, memory + L::kOutput, threadIdx.x - 64, barriers);
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
    a.tokens_per_gate = linear.gate.data ? static_cast<int>(linear.product.tokens / linear.gate_rows) : 1;
    choose_and_run(a, linear.product.codes, linear.out, stream);
}

}  // namespace nk::cuda::sm90
