// What follows the int32 sums of the portable W4A8 product: scales, bias, the low-rank branch, the fp32 tail and the
// store. S says how the warps of a block are arranged.
#pragma once

#include <type_traits>

#include "../../numerics/layout.h"
#include "../kernels.h"
#include "../ptx/mma.h"
#include "../tail.cuh"

namespace nk::cuda::sm80 {
namespace {

constexpr int kRankBlock = 32;                // ranks of the low-rank branch that are staged together
constexpr int kHiddenPitch = kRankBlock + 8;  // elements of a staged token: no bank conflicts

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

// y += (lora_act * rank_scale) proj_up^T, both factors in the dtype of proj_up, accumulated in fp32.
template <class S, bool is_bf16>
__device__ __forceinline__ void add_low_rank(const Arguments& a, uint32_t* hidden, int first_token, int channel,
                                             int warp_token, bool active, float (&y)[S::kStrips][S::kTokenBlocks][4]) {
    constexpr int kPitch = kHiddenPitch / 2;  // pairs of ranks
    constexpr int kPieces = kRankBlock / 8, kRows = S::kThreads / kPieces, kEach = (S::kTokens + kRows - 1) / kRows;
    const int row = threadIdx.x / kPieces, rank = threadIdx.x % kPieces * 8, lane = threadIdx.x % 32;
    for (int first = 0; first < a.rank; first += kRankBlock) {
        const int ranks = min(kRankBlock, a.rank - first);
        // All loads first, so that they are waited for once.
        uint4 pieces[kEach], up[kRankBlock / 16][S::kStrips];
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
            for (int s = 0; s < S::kStrips; ++s) {
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
                uint32_t factors[S::kStrips][4];
#pragma unroll
                for (int s = 0; s < S::kStrips; ++s) {
                    const uint4 words = up[step][s];
                    factors[s][0] = words.x, factors[s][1] = words.z, factors[s][2] = words.y, factors[s][3] = words.w;
                }
#pragma unroll
                for (int block = 0; block < S::kTokenBlocks; ++block) {
                    const uint32_t* pair = hidden + (warp_token + 8 * block + lane / 4) * kPitch + 8 * step + lane % 4;
                    const uint32_t b0 = pair[0], b1 = pair[4];
#pragma unroll
                    for (int s = 0; s < S::kStrips; ++s) ptx::mma_16<is_bf16>(y[s][block], factors[s], b0, b1);
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

// What `finish_8` does where `tail.vectors`, for tokens m, m + apart, ... together: each operand is a pass over all of
// them, because a branch costs as much as the work on eight channels.
template <int count, int apart>
__device__ __forceinline__ void finish_vectors(const Tail& tail, int m, int n, float (&y)[count][8]) {
    if (n >= tail.out_features) return;
    const auto each = [&](const auto& f) {
#pragma unroll
        for (int i = 0; i < count; ++i)
            if (m + apart * i < tail.tokens) f(m + apart * i, y[i]);
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

// What a warp multiplies its sums with and adds to them, from global memory. `finish` asks for channels and tokens
// counted from those of the warp; another source may have them in shared memory.
struct GlobalFactors {
    const Arguments& a;
    int channel, token;

    __device__ __forceinline__ float2 scale_and_bias(int n) const {
        float2 result = make_float2(__ldg(a.row_scales + channel + n), 0.0f);
        const size_t position = vector_position(channel + n);
        if (a.wcscales) result.x *= load_float(a.wcscales, a.wcscales_dtype, position);
        if (a.bias) result.y = load_float(a.bias, a.bias_dtype, position);
        return result;
    }
    // Of two tokens.
    __device__ __forceinline__ float2 token_scales(int m) const {
        return make_float2(__ldg(a.ascales + min(token + m, a.tokens - 1)),
                           __ldg(a.ascales + min(token + m + 1, a.tokens - 1)));
    }
};

// Of the warp whose channels and tokens start at `channel` and, in its block, at `warp_token`; all warps of the block
// come here, and those with `finishes` have sums.
template <class S, class Factors>
__device__ __forceinline__ void finish(const Arguments& a, const Factors& factors, uint8_t* shared, int block_token,
                                       int warp_token, int channel, bool finishes,
                                       const int32_t (&sums)[S::kStrips][S::kTokenBlocks][4]) {
    const int lane = threadIdx.x % 32, first_token = block_token + warp_token;
    if (a.sums) {
        if (!finishes) return;
#pragma unroll
        for (int s = 0; s < S::kStrips; ++s)
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

    float y[S::kStrips][S::kTokenBlocks][4];
    if (finishes) {
        float2 channels[S::kStrips][2];
#pragma unroll
        for (int s = 0; s < S::kStrips; ++s)
#pragma unroll
            for (int row = 0; row < 2; ++row) channels[s][row] = factors.scale_and_bias(16 * s + 8 * row + lane / 4);
#pragma unroll
        for (int block = 0; block < S::kTokenBlocks; ++block) {
            const float2 ascales = factors.token_scales(8 * block + lane % 4 * 2);
#pragma unroll
            for (int s = 0; s < S::kStrips; ++s)
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const float2 channel = channels[s][i / 2];
                    y[s][block][i] =
                        static_cast<float>(sums[s][block][i]) * (i % 2 ? ascales.y : ascales.x) * channel.x + channel.y;
                }
        }
    }
    if (a.rank) {
        uint32_t* hidden = reinterpret_cast<uint32_t*>(shared);
        if (a.up_dtype == DType::bf16)
            add_low_rank<S, true>(a, hidden, block_token, channel, warp_token, finishes, y);
        else
            add_low_rank<S, false>(a, hidden, block_token, channel, warp_token, finishes, y);
    }
    if (!finishes) return;

    // Through shared memory, so that a lane holds eight neighbouring channels of one token. (Loops over tokens are real
    // ones: their bodies are long, and unrolled they would not fit the instruction cache.)
    constexpr int kPitch = S::kWarpChannels + 4;                       // floats: no bank conflicts
    constexpr int kLanes = S::kWarpChannels / 8, kRows = 32 / kLanes;  // lanes to a token, tokens at once
    static_assert(S::kOutputTokenBytes == kPitch * 4);
    float* staged = reinterpret_cast<float*>(shared + threadIdx.x / 32 * S::kStagedTokens * S::kOutputTokenBytes);
    const int n = lane % kLanes * 8;
    const auto load_staged = [&](int token, float(&values)[8]) {
        const float4* row = reinterpret_cast<const float4*>(staged + token * kPitch + n);
        reinterpret_cast<float4&>(values[0]) = row[0], reinterpret_cast<float4&>(values[4]) = row[1];
    };
#pragma unroll
    for (int first = 0; first < S::kWarpTokens; first += S::kStagedTokens) {
        const int count = min(S::kStagedTokens, S::kWarpTokens - first);
        __syncwarp();
#pragma unroll
        for (int b = 0; b < S::kStagedTokens / 8; ++b)
#pragma unroll
            for (int s = 0; s < S::kStrips; ++s)
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    if (first + 8 * b < S::kWarpTokens)
                        staged[(8 * b + lane % 4 * 2 + i % 2) * kPitch + 16 * s + lane / 4 + i / 2 * 8] =
                            y[s][first / 8 + b][i];
        __syncwarp();
        if (a.tail.vectors) {
            constexpr int kAtOnce = S::kFinishedTokens / kRows;
#pragma unroll 1
            for (int token = lane / kLanes; token < count; token += S::kFinishedTokens) {
                float values[kAtOnce][8];
#pragma unroll
                for (int i = 0; i < kAtOnce; ++i) load_staged(token + kRows * i, values[i]);
                finish_vectors<kAtOnce, kRows>(a.tail, first_token + first + token, channel + n, values);
            }
        } else {
#pragma unroll 1
            for (int token = lane / kLanes; token < count; token += kRows) {
                float values[8];
                load_staged(token, values);
                finish_8(a.tail, first_token + first + token, channel + n, values);
            }
        }
    }
}

}  // namespace
}  // namespace nk::cuda::sm80
