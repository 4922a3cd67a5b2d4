// The portable W4A8 product where tokens are many: a block decodes each weight once for all of its 224 tokens.
//
// Eight warps multiply 64 channels by 56 tokens each. A warp decodes an eighth of every chunk of inputs, one chunk
// ahead, and leaves it in shared memory as the operands of `mma`: by layout, what a lane decodes is what the same lane
// of the warps that multiply it needs. A block stays on its multiprocessor and asks for its next tile before it
// finishes this one, and warps meet once a chunk, at a barrier where they arrive some products before they wait.
#pragma once

#include <algorithm>

#include "../../numerics/layout.h"
#include "../decode.cuh"
#include "../ptx/async_copy.h"
#include "../ptx/block_barrier.h"
#include "../ptx/mma.h"
#include "../ptx/shared.h"
#include "w4a8_tail.cuh"

namespace nk::cuda::sm80 {
namespace {

struct ByBlock {
    static constexpr int kNWarps = 2, kMWarps = 4, kKWarps = 1, kWarps = kNWarps * kMWarps, kThreads = 32 * kWarps;
    static constexpr int kStrips = 4, kWarpChannels = 16 * kStrips, kChannels = kNWarps * kWarpChannels;
    static constexpr int kWarpTokens = 56, kTokenBlocks = kWarpTokens / 8, kTokens = kMWarps * kWarpTokens;
    static constexpr int kBlocks = 1, kStages = 4;
    static constexpr int kChunk = static_cast<int>(kGroup), kSteps = 2, kStepBytes = kChannels * kChunk / kSteps;
    static constexpr int kStripStepBytes = 16 * kChunk / kSteps;
    // A stage: the tokens of one chunk, codes and multipliers of the next.
    static constexpr int kTokenBytes = kTokens * kChunk, kCodeBytes = kChannels * kChunk / 2;
    static constexpr int kMultiplierBytes = kChannels * 2;
    static constexpr int kStageBytes = kTokenBytes + kCodeBytes + kMultiplierBytes;
    static constexpr int kRingBytes = kStages * kStageBytes;
    // Behind the ring the decoded weights of as many chunks, and in their place, at the end of a tile, what it stages.
    static constexpr int kOperandBytes = kChannels * kChunk;
    static constexpr int kOutputTokenBytes = (kWarpChannels + 4) * 4;
    static constexpr int kStagedTokens = 32, kFinishedTokens = 8;
    static constexpr int kStagingBytes =
        std::max(kStagedTokens * kWarps * kOutputTokenBytes, kTokens* kHiddenPitch * 2);
    // Then the barrier and, for this tile and the next, the factors of its channels and tokens.
    static constexpr int kBarrierOffset = kRingBytes + std::max(kStages * kOperandBytes, kStagingBytes);
    static constexpr int kFactorOffset = kBarrierOffset + 16, kFactorBytes = kChannels * 8 + kTokens * 4;
    static constexpr int kSharedBytes = kFactorOffset + 2 * kFactorBytes;
    static_assert(kChannels == kChannelBlock && kWarps * kStrip == kChannels && kStages % 2 == 0);
    static_assert(kThreads * 16 == kCodeBytes && kThreads >= kTokens && kThreads >= kChannels);

    // For the estimate of time, measured: a chunk of 64 inputs takes 570 ns. A residual is waited for, since nothing
    // else runs on the multiprocessor meanwhile.
    static constexpr int kWork = kTokens - 6, kResidualTime = 4500;

    static bool serves(const Arguments& a) {  // offsets of tokens are kept in 32 bits
        return static_cast<uint64_t>(a.tokens) * a.padded_k <= UINT32_MAX;
    }
};

// The copies of a thread, for one tile after the other.
template <class S>
struct BlockCopies {
    static constexpr int kRows = S::kThreads / 4, kTokenPieces = (S::kTokens + kRows - 1) / kRows;

    uint32_t token_target, weight_target;  // in the first stage
    const int8_t* tokens;
    uint32_t rows[kTokenPieces];  // of `tokens`, where the pieces start
    const uint8_t* codes;
    const int16_t* multipliers;

    __device__ __forceinline__ BlockCopies(const Arguments& a, uint32_t shared) : tokens(a.codes) {
        const int row = threadIdx.x / 4, column = threadIdx.x % 4;
        token_target = ptx::opaque(shared + row * S::kChunk + 16 * permuted(row, column));
        weight_target = ptx::opaque(shared + S::kTokenBytes + 16 * threadIdx.x);
    }

    // Where in its row a piece of a token lies, so that the eight rows of a matrix lie in different banks.
    __device__ __forceinline__ static int permuted(int row, int column) { return column ^ row / 2 % 4; }

    // All stages but the last of a tile. Tokens behind the last are copies of it: nobody reads their sums.
    __device__ __forceinline__ void start(const Arguments& a, int first_token, int first_channel) {
        const int chunks = a.padded_k / S::kChunk;
#pragma unroll
        for (int i = 0; i < kTokenPieces; ++i) {
            const uint32_t token = min(first_token + static_cast<int>(threadIdx.x) / 4 + i * kRows, a.tokens - 1);
            rows[i] = token * a.padded_k + threadIdx.x % 4 * 16;
        }
        codes = a.qweight + qweight_strip_offset(first_channel, 0, a.padded_k) + 16 * threadIdx.x;
        multipliers = a.multipliers + w4a8_multiplier_position(first_channel, 0, a.padded_k / kGroup) + 8 * threadIdx.x;
        copy_weights(S::kStages - 1, 0, true);
#pragma unroll
        for (int stage = 0; stage < S::kStages - 1; ++stage) {
            copy_tokens(stage, stage, stage < chunks);
            copy_weights(stage, stage + 1, stage + 1 < chunks);
            ptx::commit_copies();
        }
#pragma unroll
        for (int i = 0; i < kTokenPieces; ++i) rows[i] += (S::kStages - 1) * S::kChunk;
        codes += S::kStages * S::kCodeBytes, multipliers += S::kStages * S::kChannels;
    }

    // Into a stage, what lies `ahead` chunks behind the pointers. (In one bunch: the compiler puts three instructions
    // between a load from shared memory and the copies that follow it.)
    __device__ __forceinline__ void copy_tokens(int stage, int ahead, bool wanted) const {
#pragma unroll
        for (int i = 0; i < kTokenPieces; ++i) {
            const bool inside = (i + 1) * kRows <= S::kTokens || threadIdx.x / 4 + i * kRows < S::kTokens;
            ptx::copy_16_if(wanted && inside, token_target + stage * S::kStageBytes + i * kRows * S::kChunk,
                            tokens + rows[i] + ahead * S::kChunk);
        }
    }
    __device__ __forceinline__ void copy_weights(int stage, int ahead, bool wanted) const {
        const uint32_t target = weight_target + stage * S::kStageBytes;
        ptx::copy_16_if(wanted, target, codes + ahead * S::kCodeBytes);
        ptx::copy_16_if(wanted && threadIdx.x < S::kMultiplierBytes / 16, target + S::kCodeBytes,
                        multipliers + ahead * S::kChannels);
    }

    __device__ __forceinline__ void advance() {
#pragma unroll
        for (int i = 0; i < kTokenPieces; ++i) rows[i] += S::kStages * S::kChunk;
        codes += S::kStages * S::kCodeBytes, multipliers += S::kStages * S::kChannels;
    }
};

// Decodes one strip of a chunk, a step at a time.
template <class S>
struct StripDecoder {
    uint32_t source, multiplier_source, target, mask;
    uint4 codes;
    uint32_t multipliers;
    uint32_t words[4];  // of the operand

    __device__ __forceinline__ StripDecoder(uint32_t shared, uint32_t weight_target)
        : source(weight_target), target(weight_target + S::kRingBytes - S::kTokenBytes), mask(code_mask()) {
        multiplier_source = ptx::opaque(shared + S::kTokenBytes + S::kCodeBytes + threadIdx.x / 4 * 4);
    }

    __device__ __forceinline__ void load(int stage) {
        codes = ptx::load_shared_16(source + stage * S::kStageBytes);
        multipliers = ptx::load_shared_4(multiplier_source + stage * S::kStageBytes);
    }

    // Channels lane / 4 + 8 `row` of the strip.
    __device__ __forceinline__ void decode_row(int step, int row) {
        const uint32_t word = row ? (step ? codes.w : codes.z) : (step ? codes.y : codes.x);
        decode(word, GroupMultiplier(multipliers >> 16 * row & 0xffff, mask), words[row], words[2 + row]);
    }

    __device__ __forceinline__ void store(int buffer, int step) const {
        ptx::store_shared_16(target + buffer * S::kOperandBytes + step * S::kStepBytes,
                             make_uint4(words[0], words[1], words[2], words[3]));
    }
};

// The sums of a tile, whose copies were started.
template <class S>
__device__ __forceinline__ void accumulate_by_block(const Arguments& a, uint32_t shared, BlockCopies<S>& copies,
                                                    int32_t (&sums)[S::kStrips][S::kTokenBlocks][4]) {
    constexpr int kStages = S::kStages, kSteps = S::kSteps;
    constexpr int kPairs = (S::kTokenBlocks + 1) / 2, kRounds = kSteps * kPairs;  // of token blocks
    constexpr int kFragments = 4, kAhead = 2;  // fragments in registers; they are loaded two rounds ahead
    static_assert(kPairs == S::kStrips && kRounds % kFragments == 0);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const uint32_t barrier = shared + S::kBarrierOffset;
    const int chunks = a.padded_k / S::kChunk;
    StripDecoder<S> decoder(shared, copies.weight_target);

    // Lane i points at row i % 8 of matrix i / 8: eight tokens in both halves of a step, then the next eight.
    const int row = lane % 8 + lane / 16 * 8;
    const uint32_t tokens = shared + (warp / S::kNWarps * S::kWarpTokens + row) * S::kChunk;
    const uint32_t token_source[kSteps] = {ptx::opaque(tokens + 16 * copies.permuted(row, lane / 8 % 2)),
                                           ptx::opaque(tokens + 16 * copies.permuted(row, lane / 8 % 2 + 2))};
    uint32_t fragments[kFragments][4];
    const auto load_fragments = [&](int round, int stage) {
        ptx::ldmatrix_x4(fragments[round % kFragments],
                         token_source[round / kPairs] + stage * S::kStageBytes + round % kPairs * 16 * S::kChunk);
    };
    const uint32_t weight_source =
        ptx::opaque(shared + S::kRingBytes + warp % S::kNWarps * S::kStrips * S::kStripStepBytes + 16 * lane);
    uint32_t weights[kSteps][S::kStrips][4];
    const auto load_weights = [&](int buffer, int step, int strip) {
        const uint4 words = ptx::load_shared_16(weight_source + buffer * S::kOperandBytes + step * S::kStepBytes +
                                                strip * S::kStripStepBytes);
        uint32_t(&target)[4] = weights[step][strip];
        target[0] = words.x, target[1] = words.y, target[2] = words.z, target[3] = words.w;
    };

    // The first chunk decoded, and the first step of the second.
    ptx::wait_for_copies<kStages - 2>();
    __syncthreads();
    decoder.load(kStages - 1);
#pragma unroll
    for (int i = 0; i < kSteps + 1; ++i) {
        if (i == kSteps) decoder.load(0);
        decoder.decode_row(i % kSteps, 0), decoder.decode_row(i % kSteps, 1);
        decoder.store(i / kSteps, i % kSteps);
    }
    __syncthreads();
#pragma unroll
    for (int s = 0; s < S::kStrips; ++s) load_weights(0, 0, s);
#pragma unroll
    for (int round = 0; round < kAhead; ++round) load_fragments(round, 0);

#pragma unroll 1
    for (int first = 0; first < chunks; first += kStages) {
#pragma unroll
        for (int stage = 0; stage < kStages; ++stage) {
            if (stage && stage % 2 == 0 && first + stage >= chunks) break;  // there is an even number of chunks
            const int next = (stage + 1) % kStages, after = (stage + 2) % kStages, free = (stage + 3) % kStages;
#pragma unroll
            for (int round = 0; round < kRounds; ++round) {
                const int step = round / kPairs, pair = round % kPairs;
                if (step == 0 && pair == 2) {
                    ptx::wait_for_copies<kStages - 3>();
                    __syncwarp();
                    if (lane == 0) ptx::arrive_at_block_barrier(barrier);
                }
                if (step == 1 && pair == 1) {
                    // Behind it the next chunk's tokens and the codes after them are here, the next chunk is decoded,
                    // and nobody needs the stage before this.
                    ptx::wait_for_block_barrier(barrier, stage % 2);
                    decoder.load(next);
                    copies.copy_tokens(free, stage, first + stage + kStages - 1 < chunks);
                    copies.copy_weights(free, stage, first + stage + kStages < chunks);
                    ptx::commit_copies();
                }
                load_fragments((round + kAhead) % kRounds, round + kAhead < kRounds ? stage : next);
                if (step == 0)
                    load_weights(stage, 1, pair);
                else if (pair >= 2)
                    load_weights(next, 0, 2 * pair - 4), load_weights(next, 0, 2 * pair - 3);
                const uint32_t(&b)[4] = fragments[round % kFragments];
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    // Step 0 decodes the rest of the next chunk, step 1 the first step of the chunk after it.
                    const int at = 2 * pair + i;
                    if (at == (step ? 4 : 1)) decoder.decode_row(1 - step, 0);
                    if (at == (step ? 5 : 2)) decoder.decode_row(1 - step, 1);
                    if (at == (step ? 7 : 3)) decoder.store(step ? after : next, 1 - step);
                    if (at < S::kTokenBlocks) {
#pragma unroll
                        for (int s = 0; s < S::kStrips; ++s)
                            ptx::mma_s8(sums[s][at], weights[step][s], b[2 * i], b[2 * i + 1]);
                    }
                }
            }
        }
        copies.advance();
    }
    ptx::wait_for_copies<0>();
    __syncthreads();
}

// Factors of a tile, loaded by all threads while the tile before it is finished.
template <class S>
struct BlockFactors {
    float2 channel{};    // scale and bias of channel threadIdx.x
    float token = 0.0f;  // scale of token threadIdx.x

    __device__ __forceinline__ void load(const Arguments& a, int first_token, int first_channel) {
        if (a.sums) return;
        const GlobalFactors factors{a, first_channel, first_token};
        if (threadIdx.x < S::kChannels) channel = factors.scale_and_bias(threadIdx.x);
        token = factors.token_scales(threadIdx.x).x;
    }

    __device__ __forceinline__ void store(uint8_t* shared) const {
        if (threadIdx.x < S::kChannels) reinterpret_cast<float2*>(shared)[threadIdx.x] = channel;
        if (threadIdx.x < S::kTokens) reinterpret_cast<float*>(shared + S::kChannels * 8)[threadIdx.x] = token;
    }
};

struct SharedFactors {
    const float2* channels;
    const float* tokens;

    __device__ __forceinline__ float2 scale_and_bias(int n) const { return channels[n]; }
    __device__ __forceinline__ float2 token_scales(int m) const { return *reinterpret_cast<const float2*>(tokens + m); }
};

// Brings the residual of a tile to L2 long before it is added.
template <class S>
__device__ __forceinline__ void prefetch_residual(const Tail& tail, int first_token, int first_channel) {
    if (!tail.residual) return;
    const int bytes = tail.residual_dtype == DType::f32 ? 4 : 2, lines = S::kChannels * bytes / 128;
    for (int i = threadIdx.x; i < S::kTokens * lines; i += S::kThreads) {
        const int token = first_token + i / lines, channel = first_channel + i % lines * (128 / bytes);
        if (token < tail.tokens && channel < tail.out_features)
            ptx::prefetch_to_l2(static_cast<const uint8_t*>(tail.residual) +
                                (static_cast<size_t>(token) * tail.out_features + channel) * bytes);
    }
}

template <class S>
__global__ void __launch_bounds__(S::kThreads, S::kBlocks) product_by_block(const __grid_constant__ Arguments a) {
    extern __shared__ __align__(128) uint8_t shared[];
    const uint32_t address = ptx::shared_address(shared);
    const int warp = threadIdx.x / 32;
    const int warp_channel = warp % S::kNWarps * S::kWarpChannels, warp_token = warp / S::kNWarps * S::kWarpTokens;
    const int token_tiles = (a.tokens + S::kTokens - 1) / S::kTokens, tiles = token_tiles * (a.padded_n / S::kChannels);
    if (threadIdx.x == 0) ptx::init_block_barrier(address + S::kBarrierOffset, S::kWarps);

    BlockCopies<S> copies(a, address);
    BlockFactors<S> factors;
    int first_token, first_channel, parity = 0;
    const auto start = [&](int tile) {
        first_token = tile % token_tiles * S::kTokens, first_channel = tile / token_tiles * S::kChannels;
        copies.start(a, first_token, first_channel);
        factors.load(a, first_token, first_channel);
    };
    start(blockIdx.x);
#pragma unroll 1
    for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        uint8_t* tile_factors = shared + S::kFactorOffset + parity * S::kFactorBytes;
        factors.store(tile_factors);
        prefetch_residual<S>(a.tail, first_token, first_channel);
        int32_t sums[S::kStrips][S::kTokenBlocks][4] = {};
        accumulate_by_block<S>(a, address, copies, sums);
        const int token = first_token, channel = first_channel + warp_channel;
        if (tile + static_cast<int>(gridDim.x) < tiles) start(tile + gridDim.x);
        const SharedFactors mine{reinterpret_cast<const float2*>(tile_factors) + warp_channel,
                                 reinterpret_cast<const float*>(tile_factors + S::kChannels * 8) + warp_token};
        finish<S>(a, mine, shared + S::kRingBytes, token, warp_token, channel, true, sums);
        parity ^= 1;
    }
}

}  // namespace
}  // namespace nk::cuda::sm80
