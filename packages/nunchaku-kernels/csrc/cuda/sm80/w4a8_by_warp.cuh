// The portable W4A8 product where tokens are few.
//
// A warp owns 32 output channels and all tokens of its block's tile: it alone needs the weights of its channels, and
// decodes them in registers while it multiplies. Inputs are walked in chunks; where tokens are few, the warps of a
// block share out the chunks and add up their int32 sums, which is exact in any order. Tokens, codes and multipliers
// come through shared memory, some chunks ahead: loaded into registers, weights would be waited for, since the compiler
// moves loads down to where they are used when registers are scarce.
#pragma once

#include <algorithm>

#include "../../numerics/layout.h"
#include "../decode.cuh"
#include "../ptx/async_copy.h"
#include "../ptx/mma.h"
#include "../ptx/shared.h"
#include "add_up.cuh"
#include "w4a8_tail.cuh"

namespace nk::cuda::sm80 {
namespace {

constexpr int kStep = 32;                                // inputs of one product
constexpr int kGroupBytes = kChannelBlock * kGroup / 2;  // codes of 128 channels

// `blocks` run on a multiprocessor at once, if its shared memory allows it: they never wait for each other.
template <int tokens, int k_warps, int blocks, int chunk, int stages>
struct ByWarp {
    static constexpr int kWarps = 4, kThreads = 32 * kWarps;
    static constexpr int kStrips = 2, kWarpChannels = 16 * kStrips;  // strips of 16 channels, per warp
    static constexpr int kTokens = tokens, kWarpTokens = tokens, kTokenBlocks = tokens / 8, kTokenPairs = tokens / 16;
    static constexpr int kKWarps = k_warps, kNWarps = kWarps / k_warps;  // warps along inputs, along channels
    static constexpr int kChannels = kNWarps * kWarpChannels;
    static constexpr int kBlocks = blocks, kStages = stages;
    static constexpr int kChunk = chunk, kSteps = chunk / kStep, kGroups = chunk / static_cast<int>(kGroup);
    // A stage: the tokens of k_warps chunks; then, warp by warp, codes and multipliers of its channels and chunk.
    static constexpr int kTileBytes = tokens * chunk;
    static constexpr int kCodeBytes = kWarpChannels * chunk / 2, kMultiplierBytes = kWarpChannels * kGroups * 2;
    static constexpr int kWarpBytes = kCodeBytes + kMultiplierBytes;
    static constexpr int kStageBytes = k_warps * kTileBytes + kWarps * kWarpBytes;
    // For the estimate of time: decoding costs a warp about as much as multiplying with 24 tokens.
    static constexpr int kWork = tokens + 24, kResidualTime = 0;
    static constexpr int kAccumulators = kStrips * kTokenBlocks * 4;
    static constexpr int kReduceBytes = (k_warps - 1) * kNWarps * kAccumulators * 32 * 4;
    static constexpr int kHiddenBytes = tokens * kHiddenPitch * 2;
    static constexpr int kMainBytes = std::max(stages * kStageBytes, std::max(kReduceBytes, kHiddenBytes));
    static constexpr int kOutputTokenBytes = (kWarpChannels + 4) * 4;
    static constexpr int kStagedTokens =  // output tokens staged by a warp at a time
        tokens * kNWarps * kOutputTokenBytes <= kMainBytes ? tokens : std::min(tokens, 64);
    static constexpr int kFinishedTokens = std::min(kStagedTokens, 32);  // and finished
    static constexpr int kSharedBytes = std::max(kMainBytes, kStagedTokens* kNWarps* kOutputTokenBytes);

    static bool serves(const Arguments&) { return true; }
};

// The copies of a thread that fill a stage, in pieces of 16 bytes that are spread over the products: its share of the
// block's tokens and of the weights of its own warp. What lies outside of the operands is zero.
template <class S>
struct Copies {
    static constexpr int kRowPieces = S::kChunk / 16, kRowsAtOnce = S::kThreads / kRowPieces;
    static constexpr int kTokenPieces = S::kKWarps * S::kTokens / kRowsAtOnce;
    static constexpr int kCodePieces = S::kStrips * S::kGroups, kPieces = kTokenPieces + kCodePieces + 1;
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
                         codes + i / S::kStrips * kGroupBytes + i % S::kStrips * kStripBytes, weight_k < padded_k);
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
template <int strips>
struct Weights {
    uint4 codes[strips];
    uint32_t multipliers[strips];  // of channels lane / 4 and, in the upper half, lane / 4 + 8

    __device__ __forceinline__ void load(uint32_t code_address, uint32_t multiplier_address) {
#pragma unroll
        for (int s = 0; s < strips; ++s) {
            codes[s] = ptx::load_shared_16(code_address + s * kStripBytes);
            multipliers[s] = ptx::load_shared_4(multiplier_address + s * kStrip * 2);
        }
    }
};

// The decoded weights of one step.
template <int strips>
struct Operands {
    uint32_t words[strips][4];

    // One half of a strip, channels lane / 4 + 8 `row`, in the first or second step of the group.
    __device__ __forceinline__ void decode_row(const Weights<strips>& weights, int step, int strip, int row,
                                               uint32_t mask) {
        const uint4 codes = weights.codes[strip];
        const uint32_t word = row ? (step ? codes.w : codes.z) : (step ? codes.y : codes.x);
        const GroupMultiplier multiplier(weights.multipliers[strip] >> 16 * row & 0xffff, mask);
        decode(word, multiplier, words[strip][row], words[strip][2 + row]);
    }
};

// This warp's sums, over its chunks.
template <class S>
__device__ __forceinline__ void accumulate_by_warp(const Arguments& a, uint32_t stages, int first_token, int channel,
                                                   int k_warp, int32_t (&sums)[S::kStrips][S::kTokenBlocks][4]) {
    constexpr int kPairs = S::kTokenPairs, kRounds = S::kSteps * kPairs, kRows = 2 * S::kStrips;
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
    Weights<S::kStrips> weights;
    const auto load_weights = [&](int group, uint32_t offset) {
        weights.load(codes + offset + group * S::kStrips * kStripBytes,
                     multipliers + offset + group * S::kWarpChannels * 2);
    };

    const uint32_t mask = code_mask();
    Operands<S::kStrips> operands[2];  // of this step and the next
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
                for (int s = 0; s < S::kStrips; ++s)
                    ptx::mma_s8(sums[s][2 * pair + i], operands[step % 2].words[s], b[2 * i], b[2 * i + 1]);
        }
        copies.advance();
        ptx::commit_copies();
    }
    ptx::wait_for_copies<0>();
    __syncthreads();
}
template <class S>
__global__ void __launch_bounds__(S::kThreads, S::kBlocks) product_by_warp(const __grid_constant__ Arguments a) {
    extern __shared__ __align__(128) uint8_t shared[];
    const int warp = threadIdx.x / 32, n_warp = warp % S::kNWarps;
    const int first_token = blockIdx.x * S::kTokens, first_channel = blockIdx.y * S::kChannels;
    const int channel = first_channel + n_warp * S::kWarpChannels;

    int32_t sums[S::kStrips][S::kTokenBlocks][4] = {};
    const int k_warp = warp / S::kNWarps;
    accumulate_by_warp<S>(a, ptx::shared_address(shared), first_token, channel, k_warp, sums);
    add_up<S>(reinterpret_cast<int32_t*>(shared), n_warp, k_warp, threadIdx.x % 32, sums);
    finish<S>(a, GlobalFactors{a, channel, first_token}, shared, first_token, 0, channel, k_warp == 0, sums);
}

}  // namespace
}  // namespace nk::cuda::sm80
