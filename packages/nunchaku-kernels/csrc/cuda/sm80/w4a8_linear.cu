// The W4A8 product with mma.sync, for any GPU from sm_80 on: Y^T = W X^T, weights as the 16-row operand.
//
// A warp owns 32 output channels and all tokens of its block's tile: it alone needs the weights of its channels, and
// decodes them in registers while it multiplies. Inputs are walked in chunks; where tokens are few, the warps of a
// block share out the chunks and add up their int32 sums, which is exact in any order. Tokens, codes and multipliers
// come through shared memory, some chunks ahead: loaded into registers, weights would be waited for, since the compiler
// moves loads down to where they are used when registers are scarce.
#include <algorithm>
#include <iterator>
#include <stdexcept>
#include <type_traits>

#include "../../numerics/layout.h"
#include "../decode.cuh"
#include "../kernels.h"
#include "../ptx/async_copy.h"
#include "../ptx/mma.h"
#include "../ptx/shared.h"
#include "../tail.cuh"
#include "add_up.cuh"

namespace nk::cuda::sm80 {
namespace {

constexpr int kWarps = 4, kThreads = 32 * kWarps;
constexpr int kStrips = 2;  // of 16 channels, per warp
constexpr int kWarpChannels = 16 * kStrips;
constexpr int kStep = 32;                                // inputs of one product
constexpr int kGroupBytes = kChannelBlock * kGroup / 2;  // codes of 128 channels
constexpr int kReservedBytes = 1024;                     // of shared memory, for each block
constexpr int kRankBlock = 32;                           // ranks of the low-rank branch that are staged together
constexpr int kHiddenPitch = kRankBlock + 8;             // elements of a staged token: no bank conflicts
constexpr int kOutputPitch = kWarpChannels + 4;          // floats: no bank conflicts

struct Arguments {
    const int8_t* codes;
    const uint8_t* qweight;
    const int16_t* multipliers;
    int tokens, padded_n, padded_k;
    int32_t* sums;  // if given, the bare product goes there, and nothing below is read
    const float *ascales, *row_scales, *rank_scale;
    const void *lora_act, *proj_up, *wcscales, *bias;  // lora_act has the dtype of proj_up
    DType up_dtype, wcscales_dtype, bias_dtype;
    int rank;
    Tail tail;
};

// `blocks` run on a multiprocessor at once, if its shared memory allows it: they never wait for each other.
template <int tokens, int k_warps, int blocks, int chunk, int stages>
struct Shape {
    static constexpr int kTokens = tokens, kTokenBlocks = tokens / 8, kTokenPairs = tokens / 16;
    static constexpr int kKWarps = k_warps, kNWarps = kWarps / k_warps;  // warps along inputs, along channels
    static constexpr int kChannels = kNWarps * kWarpChannels;
    static constexpr int kBlocks = blocks, kStages = stages;
    static constexpr int kChunk = chunk, kSteps = chunk / kStep, kGroups = chunk / static_cast<int>(kGroup);
    // A stage: the tokens of k_warps chunks; then, warp by warp, codes and multipliers of its channels and chunk.
    static constexpr int kTileBytes = tokens * chunk;
    static constexpr int kCodeBytes = kWarpChannels * chunk / 2, kMultiplierBytes = kWarpChannels * kGroups * 2;
    static constexpr int kWarpBytes = kCodeBytes + kMultiplierBytes;
    static constexpr int kStageBytes = k_warps * kTileBytes + kWarps * kWarpBytes;
    static constexpr int kAccumulators = kStrips * kTokenBlocks * 4;
    static constexpr int kReduceBytes = (k_warps - 1) * kNWarps * kAccumulators * 32 * 4;
    static constexpr int kHiddenBytes = tokens * kHiddenPitch * 2;
    static constexpr int kMainBytes = std::max(stages * kStageBytes, std::max(kReduceBytes, kHiddenBytes));
    static constexpr int kOutputTokenBytes = kNWarps * kOutputPitch * 4;
    static constexpr int kStagedTokens =  // output tokens staged by a warp at a time
        tokens * kOutputTokenBytes <= kMainBytes ? tokens : std::min(tokens, 64);
    static constexpr int kFinishedTokens = std::min(kStagedTokens, 32);  // and finished
    static constexpr int kSharedBytes = std::max(kMainBytes, kStagedTokens* kOutputTokenBytes);
};

// The copies of a thread that fill a stage, in pieces of 16 bytes that are spread over the products: its share of the
// block's tokens and of the weights of its own warp. What lies outside of the operands is zero.
template <class S>
struct Copies {
    static constexpr int kRowPieces = S::kChunk / 16, kRowsAtOnce = kThreads / kRowPieces;
    static constexpr int kTokenPieces = S::kKWarps * S::kTokens / kRowsAtOnce;
    static constexpr int kCodePieces = kStrips * S::kGroups, kPieces = kTokenPieces + kCodePieces + 1;
    static_assert(S::kTokens % kRowsAtOnce == 0);

    const int8_t* tokens;
    const uint8_t* codes;
    const int16_t* multipliers;
    uint32_t token_target, code_target, multiplier_target;
    int valid_rows, padded_k;
    int token_k, weight_k;  // first input of the block and of the warp
    bool copies_multipliers;

    __device__ __forceinline__ Copies(const Arguments& a, int first_token, int channel, int k_warp, uint32_t stages)
        : padded_k(a.padded_k), token_k(0), weight_k(k_warp * S::kChunk) {
        const int row = threadIdx.x / kRowPieces, column = threadIdx.x % kRowPieces;
        tokens = a.codes + static_cast<size_t>(first_token + row) * padded_k + 16 * column;
        token_target = stages + row * S::kChunk + 16 * permuted(row, column);
        valid_rows = a.tokens - first_token - row;
        const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = weight_k / static_cast<int>(kGroup);
        codes = a.qweight + qweight_strip_offset(channel, weight_k, padded_k) + 16 * lane;
        code_target = stages + S::kKWarps * S::kTileBytes + warp * S::kWarpBytes + 16 * lane;
        multipliers =
            a.multipliers + w4a8_multiplier_position(channel, group + lane / 4, padded_k / kGroup) + lane % 4 * 8;
        multiplier_target = code_target + S::kCodeBytes;
        copies_multipliers = lane < 4 * S::kGroups;
    }

    // Where in its row a piece of a token lies, so that the eight rows of a matrix lie in different banks.
    __device__ __forceinline__ static int permuted(int row, int column) {
        return column ^ (kRowPieces == 8 ? row : row / 2) % kRowPieces;
    }

    __device__ __forceinline__ void copy(int piece, int stage) const {
        const uint32_t offset = stage * S::kStageBytes;
        if (piece < kTokenPieces) {
            const int tile = piece * kRowsAtOnce / S::kTokens, row = piece * kRowsAtOnce % S::kTokens;
            ptx::copy_16(token_target + offset + piece * kRowsAtOnce * S::kChunk,
                         tokens + static_cast<size_t>(row) * padded_k + tile * S::kChunk,
                         row < valid_rows && token_k + tile * S::kChunk < padded_k);
        } else if (piece < kTokenPieces + kCodePieces) {
            const int i = piece - kTokenPieces;
            ptx::copy_16(code_target + offset + i * static_cast<int>(kStripBytes),
                         codes + i / kStrips * kGroupBytes + i % kStrips * kStripBytes, weight_k < padded_k);
        } else if (copies_multipliers) {
            ptx::copy_16(multiplier_target + offset, multipliers, weight_k < padded_k);
        }
    }

    // To the chunks of the next stage.
    __device__ __forceinline__ void advance() {
        token_k += S::kKWarps * S::kChunk, weight_k += S::kKWarps * S::kChunk;
        tokens += S::kKWarps * S::kChunk;
        codes += S::kKWarps * S::kGroups * kGroupBytes;
        multipliers += S::kKWarps * S::kGroups * kChannelBlock;
    }
};

// A lane's share of the weights of one group of 64 inputs: the published order has its codes side by side.
struct Weights {
    uint4 codes[kStrips];
    uint32_t multipliers[kStrips];  // of channels lane / 4 and, in the upper half, lane / 4 + 8

    __device__ __forceinline__ void load(uint32_t code_address, uint32_t multiplier_address) {
#pragma unroll
        for (int s = 0; s < kStrips; ++s) {
            codes[s] = ptx::load_shared_16(code_address + s * kStripBytes);
            multipliers[s] = ptx::load_shared_4(multiplier_address + s * kStrip * 2);
        }
    }
};

// The decoded weights of one step.
struct Operands {
    uint32_t strips[kStrips][4];

    // One half of a strip, channels lane / 4 + 8 `row`, in the first or second step of the group.
    __device__ __forceinline__ void decode_row(const Weights& weights, int step, int strip, int row, uint32_t mask) {
        const uint4 words = weights.codes[strip];
        const uint32_t word = row ? (step ? words.w : words.z) : (step ? words.y : words.x);
        const GroupMultiplier multiplier(weights.multipliers[strip] >> 16 * row & 0xffff, mask);
        decode(word, multiplier, strips[strip][row], strips[strip][2 + row]);
    }
};

// This warp's sums, over its chunks.
template <class S>
__device__ __forceinline__ void accumulate(const Arguments& a, uint32_t stages, int first_token, int channel,
                                           int k_warp, int32_t (&sums)[kStrips][S::kTokenBlocks][4]) {
    constexpr int kPairs = S::kTokenPairs, kRounds = S::kSteps * kPairs, kRows = 2 * kStrips;
    static_assert(S::kStages >= 3 && S::kSteps % 2 == 0);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    Copies<S> copies(a, first_token, channel, k_warp, stages);
#pragma unroll
    for (int stage = 0; stage < S::kStages - 1; ++stage) {
#pragma unroll
        for (int i = 0; i < copies.kPieces; ++i) copies.copy(i, stage);
        copies.advance();
        ptx::commit_copies();
    }

    // Lane i points at row i % 8 of matrix i / 8: eight tokens in both halves of a step, then the next eight.
    const int row = lane % 8 + lane / 16 * 8;
    const uint32_t tokens = stages + k_warp * S::kTileBytes + row * S::kChunk + 16 * copies.permuted(row, lane / 8 % 2);
    uint32_t fragments[2][4];  // of 16 tokens, one loaded while the other is multiplied
    const auto load_fragments = [&](int round, uint32_t offset) {
        const uint32_t step = tokens + offset ^ round / kPairs % S::kSteps * kStep;
        ptx::ldmatrix_x4(fragments[round % 2], step + round % kPairs * 16 * S::kChunk);
    };
    const uint32_t warp_weights = stages + S::kKWarps * S::kTileBytes + warp * S::kWarpBytes;
    const uint32_t codes = warp_weights + 16 * lane, multipliers = warp_weights + S::kCodeBytes + lane / 4 * 4;
    Weights weights;
    const auto load_weights = [&](int group, uint32_t offset) {
        weights.load(codes + offset + group * kStrips * kStripBytes, multipliers + offset + group * kWarpChannels * 2);
    };

    const uint32_t mask = code_mask();
    Operands operands[2];  // of this step and the next
    ptx::wait_for_copies<S::kStages - 2>();
    __syncthreads();
    load_weights(0, 0);
#pragma unroll
    for (int i = 0; i < kRows; ++i) operands[0].decode_row(weights, 0, i / 2, i % 2, mask);
    load_fragments(0, 0);

    const int chunks = a.padded_k / S::kChunk;
    int stage = 0;
#pragma unroll 1
    for (int chunk = 0; chunk < chunks; chunk += S::kKWarps) {
        const int free = stage ? stage - 1 : S::kStages - 1;
        const uint32_t offset = stage * S::kStageBytes;
        stage = stage + 1 < S::kStages ? stage + 1 : 0;
        const uint32_t next_offset = stage * S::kStageBytes;
#pragma unroll
        for (int round = 0; round < kRounds; ++round) {
            const int step = round / kPairs, pair = round % kPairs;
            const bool last_step = step == S::kSteps - 1;
            if (last_step && !pair) {
                ptx::wait_for_copies<S::kStages - 3>();
                __syncthreads();  // the next stage is here, and everybody is done with the one before this
            }
            load_fragments(round + 1, round + 1 < kRounds ? offset : next_offset);
            if (step % 2 && !pair) load_weights((step + 1) % S::kSteps / 2, last_step ? next_offset : offset);
#pragma unroll
            for (int i = pair * kRows / kPairs; i < (pair + 1) * kRows / kPairs; ++i)
                operands[(step + 1) % 2].decode_row(weights, (step + 1) % 2, i / 2, i % 2, mask);
            if (last_step) {
#pragma unroll
                for (int i = pair * copies.kPieces / kPairs; i < (pair + 1) * copies.kPieces / kPairs; ++i)
                    copies.copy(i, free);
            }
            // A product waits for the one before it on the same sums: there is a step between them.
            const uint32_t(&b)[4] = fragments[round % 2];
#pragma unroll
            for (int i = 0; i < 2; ++i)
#pragma unroll
                for (int s = 0; s < kStrips; ++s)
                    ptx::mma_s8(sums[s][2 * pair + i], operands[step % 2].strips[s], b[2 * i], b[2 * i + 1]);
        }
        copies.advance();
        ptx::commit_copies();
    }
    ptx::wait_for_copies<0>();
    __syncthreads();
}

// y += (lora_act * rank_scale) proj_up^T, both factors in the dtype of proj_up, accumulated in fp32.
template <class S, bool is_bf16>
__device__ __forceinline__ void add_low_rank(const Arguments& a, uint32_t* hidden, int first_token, int channel,
                                             bool active, int lane, float (&y)[kStrips][S::kTokenBlocks][4]) {
    constexpr int kPitch = kHiddenPitch / 2;  // pairs of ranks
    constexpr int kPieces = kRankBlock / 8, kRows = kThreads / kPieces, kEach = (S::kTokens + kRows - 1) / kRows;
    const int row = threadIdx.x / kPieces, rank = threadIdx.x % kPieces * 8;
    for (int first = 0; first < a.rank; first += kRankBlock) {
        const int ranks = min(kRankBlock, a.rank - first);
        // All loads first, so that they are waited for once.
        uint4 pieces[kEach], up[kRankBlock / 16][kStrips];
#pragma unroll
        for (int i = 0; i < kEach; ++i) {
            const int token = first_token + i * kRows + row;
            const size_t index = static_cast<size_t>(token) * a.rank + first + rank;
            pieces[i] = make_uint4(0, 0, 0, 0);
            if (rank < ranks && token < a.tokens)
                pieces[i] = __ldg(reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(a.lora_act) + index));
        }
#pragma unroll
        for (int step = 0; step < kRankBlock / 16; ++step)
#pragma unroll
            for (int s = 0; s < kStrips; ++s) {
                const size_t tile = static_cast<size_t>(channel / 16 + s) * (a.rank / 16) + first / 16 + step;
                if (16 * step < ranks) up[step][s] = __ldg(static_cast<const uint4*>(a.proj_up) + tile * 32 + lane);
            }
#pragma unroll
        for (int i = 0; i < kEach; ++i) {
            if (a.rank_scale && rank < ranks) {
                uint32_t* pairs = reinterpret_cast<uint32_t*>(&pieces[i]);
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    const float2 value = unpack_half(pairs[j], is_bf16 ? DType::bf16 : DType::f16);
                    const float2 scale = __ldg(reinterpret_cast<const float2*>(a.rank_scale + first + rank) + j);
                    pairs[j] = is_bf16 ? pack_bf16(value.x * scale.x, value.y * scale.y)
                                       : pack_f16(value.x * scale.x, value.y * scale.y);
                }
            }
            if (i * kRows + row < S::kTokens)
                *reinterpret_cast<uint4*>(hidden + (i * kRows + row) * kPitch + rank / 2) = pieces[i];
        }
        __syncthreads();
        if (active) {
#pragma unroll
            for (int step = 0; step < kRankBlock / 16; ++step) {
                if (16 * step >= ranks) break;
                uint32_t factors[kStrips][4];
#pragma unroll
                for (int s = 0; s < kStrips; ++s) {
                    const uint4 words = up[step][s];
                    factors[s][0] = words.x, factors[s][1] = words.z, factors[s][2] = words.y, factors[s][3] = words.w;
                }
#pragma unroll
                for (int block = 0; block < S::kTokenBlocks; ++block) {
                    const uint32_t* pair = hidden + (8 * block + lane / 4) * kPitch + 8 * step + lane % 4;
                    const uint32_t b0 = pair[0], b1 = pair[4];
#pragma unroll
                    for (int s = 0; s < kStrips; ++s) ptx::mma_16<is_bf16>(y[s][block], factors[s], b0, b1);
                }
            }
        }
        __syncthreads();
    }
}

// Calls f with the dtype as a constant, so that what it does many times has no branch inside.
template <class F>
__device__ __forceinline__ void with_dtype(DType dtype, const F& f) {
    if (dtype == DType::bf16)
        f(std::integral_constant<DType, DType::bf16>());
    else if (dtype == DType::f16)
        f(std::integral_constant<DType, DType::f16>());
    else
        f(std::integral_constant<DType, DType::f32>());
}

// What `finish_8` does where `tail.vectors`, for tokens m, m + 8, ... together: each operand is a pass over all of
// them, because a branch costs as much as the work on eight channels.
template <int count>
__device__ __forceinline__ void finish_vectors(const Tail& tail, int m, int n, float (&y)[count][8]) {
    if (n >= tail.out_features) return;
    const auto each = [&](const auto& f) {
#pragma unroll
        for (int i = 0; i < count; ++i)
            if (m + 8 * i < tail.tokens) f(m + 8 * i, y[i]);
    };
    const auto index = [&](int row) { return static_cast<size_t>(row) * tail.out_features + n; };
    if (tail.activation == 1)
        each([&](int, float(&values)[8]) {
            for (float& value : values) value = activate(value, 1);
        });
    else if (tail.activation)
        each([&](int, float(&values)[8]) {
            for (float& value : values) value = activate(value, 2);
        });
    if (tail.gate)
        with_dtype(tail.gate_dtype, [&](auto dtype) {
            each([&](int token, float(&values)[8]) {
                float gate[8];
                load_8(tail.gate, decltype(dtype)::value, index(token / tail.tokens_per_gate), gate);
                for (int i = 0; i < 8; ++i) values[i] *= gate[i];
            });
        });
    if (tail.residual)
        with_dtype(tail.residual_dtype, [&](auto dtype) {
            each([&](int token, float(&values)[8]) {
                float residual[8];
                load_8(tail.residual, decltype(dtype)::value, index(token), residual);
                for (int i = 0; i < 8; ++i) values[i] += residual[i];
            });
        });
    with_dtype(tail.out_dtype, [&](auto dtype) {
        each([&](int token, float(&values)[8]) { store_8(tail.out, decltype(dtype)::value, index(token), values); });
    });
}

template <class S>
__global__ void __launch_bounds__(kThreads, S::kBlocks) product(const __grid_constant__ Arguments a) {
    extern __shared__ __align__(128) uint8_t shared[];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int n_warp = warp % S::kNWarps, k_warp = warp / S::kNWarps;
    const int first_token = blockIdx.x * S::kTokens;
    const int channel = blockIdx.y * S::kChannels + n_warp * kWarpChannels;

    int32_t sums[kStrips][S::kTokenBlocks][4] = {};
    accumulate<S>(a, ptx::shared_address(shared), first_token, channel, k_warp, sums);
    add_up<S>(reinterpret_cast<int32_t*>(shared), n_warp, k_warp, lane, sums);
    const bool finishes = k_warp == 0;

    if (a.sums) {
        if (!finishes) return;
#pragma unroll
        for (int s = 0; s < kStrips; ++s)
#pragma unroll
            for (int block = 0; block < S::kTokenBlocks; ++block)
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const int token = first_token + 8 * block + lane % 4 * 2 + i % 2;
                    const int n = channel + 16 * s + lane / 4 + i / 2 * 8;
                    if (token < a.tokens) a.sums[static_cast<size_t>(token) * a.padded_n + n] = sums[s][block][i];
                }
        return;
    }

    float y[kStrips][S::kTokenBlocks][4];
    if (finishes) {
        float scale[kStrips][2], bias[kStrips][2];
#pragma unroll
        for (int s = 0; s < kStrips; ++s)
#pragma unroll
            for (int row = 0; row < 2; ++row) {
                const int n = channel + 16 * s + 8 * row + lane / 4;
                scale[s][row] = __ldg(a.row_scales + n);
                if (a.wcscales) scale[s][row] *= load_float(a.wcscales, a.wcscales_dtype, vector_position(n));
                bias[s][row] = a.bias ? load_float(a.bias, a.bias_dtype, vector_position(n)) : 0.0f;
            }
#pragma unroll
        for (int block = 0; block < S::kTokenBlocks; ++block) {
            float ascale[2];
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int token = first_token + 8 * block + lane % 4 * 2 + i;
                ascale[i] = __ldg(a.ascales + min(token, a.tokens - 1));
            }
#pragma unroll
            for (int s = 0; s < kStrips; ++s)
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    y[s][block][i] =
                        static_cast<float>(sums[s][block][i]) * ascale[i % 2] * scale[s][i / 2] + bias[s][i / 2];
        }
    }
    if (a.rank) {
        uint32_t* hidden = reinterpret_cast<uint32_t*>(shared);
        if (a.up_dtype == DType::bf16)
            add_low_rank<S, true>(a, hidden, first_token, channel, finishes, lane, y);
        else
            add_low_rank<S, false>(a, hidden, first_token, channel, finishes, lane, y);
    }
    if (!finishes) return;

    // Through shared memory, so that a lane holds eight neighbouring channels of one token. (Loops over tokens are real
    // ones: their bodies are long, and unrolled they would not fit the instruction cache.)
    float* staged = reinterpret_cast<float*>(shared) + n_warp * S::kStagedTokens * kOutputPitch;
    const int n = lane % 4 * 8;
    const auto load_staged = [&](int token, float(&values)[8]) {
        const float4* row = reinterpret_cast<const float4*>(staged + token * kOutputPitch + n);
        reinterpret_cast<float4&>(values[0]) = row[0], reinterpret_cast<float4&>(values[4]) = row[1];
    };
#pragma unroll
    for (int first = 0; first < S::kTokens; first += S::kStagedTokens) {
        __syncwarp();
#pragma unroll
        for (int b = 0; b < S::kStagedTokens / 8; ++b)
#pragma unroll
            for (int s = 0; s < kStrips; ++s)
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    staged[(8 * b + lane % 4 * 2 + i % 2) * kOutputPitch + 16 * s + lane / 4 + i / 2 * 8] =
                        y[s][first / 8 + b][i];
        __syncwarp();
        if (a.tail.vectors) {
            constexpr int kAtOnce = S::kFinishedTokens / 8;
#pragma unroll 1
            for (int token = lane / 4; token < S::kStagedTokens; token += 8 * kAtOnce) {
                float values[kAtOnce][8];
#pragma unroll
                for (int i = 0; i < kAtOnce; ++i) load_staged(token + 8 * i, values[i]);
                finish_vectors<kAtOnce>(a.tail, first_token + first + token, channel + n, values);
            }
        } else {
#pragma unroll 1
            for (int token = lane / 4; token < S::kStagedTokens; token += 8) {
                float values[8];
                load_staged(token, values);
                finish_8(a.tail, first_token + first + token, channel + n, values);
            }
        }
    }
}

template <class S>
void run(const Arguments& a, cudaStream_t stream) {
    const dim3 grid((a.tokens + S::kTokens - 1) / S::kTokens, (a.padded_n + S::kChannels - 1) / S::kChannels);
    launch(product<S>, grid, dim3(kThreads), S::kSharedBytes, stream, "w4a8_linear (sm80)", a);
}

// An estimate of the time in nanoseconds, fitted to an H100: blocks come in waves, and in each a chunk takes as long as
// the multiprocessor needs for it, or as the copies do that are under way.
template <class S>
int64_t cost(const Arguments& a, int processors, int shared_bytes) {
    const int64_t at_once = std::min(S::kBlocks, shared_bytes / (S::kSharedBytes + kReservedBytes));
    if (!at_once) return INT64_MAX;
    const int64_t blocks = static_cast<int64_t>((a.tokens + S::kTokens - 1) / S::kTokens) * (a.padded_n / S::kChannels);
    const int64_t chunks = (a.padded_k / S::kChunk + S::kKWarps - 1) / S::kKWarps;
    const auto wave = [&](int64_t resident) {
        // Decoding costs a warp about as much as multiplying with 24 tokens; a chunk of any size costs a barrier.
        const int64_t work = resident * (S::kTokens + 24) * S::kChunk / 25 + 10, copies = 1500 / (S::kStages - 1);
        return chunks * std::max(work, copies) + 3000;
    };
    const int64_t full = blocks / (processors * at_once), rest = blocks % (processors * at_once);
    return full * wave(at_once) + (rest ? wave((rest + processors - 1) / processors) : 0);
}

template <class... Shapes>
void run_cheapest(const Arguments& a, cudaStream_t stream) {
    const int processors = device_attribute(cudaDevAttrMultiProcessorCount);
    const int shared_bytes = device_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
    const int64_t costs[] = {cost<Shapes>(a, processors, shared_bytes)...};
    void (*const runs[])(const Arguments&, cudaStream_t) = {run<Shapes>...};
    runs[std::min_element(std::begin(costs), std::end(costs)) - std::begin(costs)](a, stream);
}

void choose_and_run(const Arguments& a, cudaStream_t stream) {
    run_cheapest<Shape<128, 1, 2, 128, 3>, Shape<128, 1, 2, 64, 4>,  // the second for 100 KB of shared memory
                 Shape<64, 2, 3, 128, 3>, Shape<32, 4, 3, 128, 3>, Shape<16, 4, 3, 128, 4>>(a, stream);
}

Arguments product_arguments(const ProductArguments& p) {
    if (p.padded_k % 128)
        throw std::invalid_argument("Kp: expected a multiple of 128, given " + std::to_string(p.padded_k));
    if (p.tokens > INT32_MAX - 128 || p.padded_n > INT32_MAX - 256)
        throw std::invalid_argument("M, Np: expected less than 2^31, given " + std::to_string(p.tokens) + " and " +
                                    std::to_string(p.padded_n));
    Arguments a{};
    a.codes = p.codes;
    a.qweight = p.qweight;
    a.multipliers = p.multipliers;
    a.tokens = static_cast<int>(p.tokens);
    a.padded_n = static_cast<int>(p.padded_n);
    a.padded_k = static_cast<int>(p.padded_k);
    return a;
}

}  // namespace

void w4a8_accumulate(const ProductArguments& product, int32_t* sums, cudaStream_t stream) {
    Arguments a = product_arguments(product);
    a.sums = sums;
    choose_and_run(a, stream);
}

void w4a8_linear(const LinearArguments& linear, cudaStream_t stream) {
    Arguments a = product_arguments(linear.product);
    a.rank = linear.proj_up.data ? static_cast<int>(linear.rank) : 0;
    a.up_dtype = static_cast<DType>(linear.proj_up.dtype);
    if (a.rank && a.up_dtype == DType::f32)
        throw std::invalid_argument("proj_up_dtype: expected fp16 or bf16, given fp32");
    a.ascales = linear.ascales;
    a.row_scales = linear.row_scales;
    a.lora_act = linear.lora_act;
    a.rank_scale = linear.rank_scale;
    a.proj_up = linear.proj_up.data;
    a.wcscales = linear.wcscales.data;
    a.bias = linear.bias.data;
    a.wcscales_dtype = static_cast<DType>(linear.wcscales.dtype);
    a.bias_dtype = static_cast<DType>(linear.bias.dtype);
    a.tail = make_tail(linear);
    choose_and_run(a, stream);
}

}  // namespace nk::cuda::sm80
