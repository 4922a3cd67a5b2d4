// The W4A8 product with mma.sync, for any GPU from sm_80 on: Y^T = W X^T, weights as the 16-row operand.
//
// A warp owns 32 output channels and all tokens of its block's tile. It loads the codes of its channels straight from
// the published order, which gives every lane the codes of its own fragment, and decodes them in registers; no other
// warp needs them. Tokens come through shared memory. Inputs are walked in chunks of 128; where tokens are few, the
// warps of a block share out the chunks and add up their int32 sums, which is exact in any order.
#include <algorithm>
#include <stdexcept>

#include "../../numerics/layout.h"
#include "../decode.cuh"
#include "../kernels.h"
#include "../ptx/async_copy.h"
#include "../ptx/mma.h"
#include "../tail.cuh"
#include "add_up.cuh"

namespace nk::cuda::sm80 {
namespace {

constexpr int kWarps = 4, kThreads = 32 * kWarps;
constexpr int kBlocks = 2;  // of a multiprocessor: one decodes while the other, which it never waits for, multiplies
constexpr int kStages = 3;
constexpr int kChunk = 128;  // inputs, and bytes of a token in a stage
constexpr int kStrips = 2;   // of 16 channels, per warp
constexpr int kWarpChannels = 16 * kStrips;
constexpr int kRankBlock = 32;                   // ranks of the low-rank branch that are staged together
constexpr int kHiddenPitch = kRankBlock + 8;     // elements of a staged token: no bank conflicts
constexpr int kOutputPitch = kWarpChannels + 4;  // floats: no bank conflicts

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

template <int tokens, int k_warps>
struct Shape {
    static constexpr int kTokens = tokens, kTokenBlocks = tokens / 8;
    static constexpr int kKWarps = k_warps, kNWarps = kWarps / k_warps;  // warps along inputs, along channels
    static constexpr int kChannels = kNWarps * kWarpChannels;
    static constexpr int kTileBytes = tokens * kChunk, kStageBytes = k_warps * kTileBytes;
    static constexpr int kAccumulators = kStrips * kTokenBlocks * 4;
    static constexpr int kReduceBytes = (k_warps - 1) * kNWarps * kAccumulators * 32 * 4;
    static constexpr int kHiddenBytes = tokens * kHiddenPitch * 2;
    static constexpr int kStagedTokens = std::min(tokens, 64);  // output tokens staged by a warp at a time
    static constexpr int kOutputBytes = kNWarps * kStagedTokens * kOutputPitch * 4;
    static constexpr int kSharedBytes =
        std::max(std::max(kStages * kStageBytes, kReduceBytes), std::max(kHiddenBytes, kOutputBytes));
};

// A lane's share of the weights of one group of 64 inputs, and of the multipliers of one chunk.
struct Codes {
    uint4 strips[kStrips];
};
struct Multipliers {
    uint32_t strips[kStrips][2];  // of the two groups: channels lane / 4 and, in the upper half, lane / 4 + 8
};

// Where a lane finds them: strips of 16 channels lie 512 bytes apart and groups of 64 inputs 4096 bytes.
struct WeightSource {
    const uint8_t* qweight;
    const int16_t* multipliers;

    __device__ __forceinline__ WeightSource(const Arguments& a, int channel, int lane)
        : qweight(a.qweight + qweight_strip_offset(channel, 0, a.padded_k) + 16 * lane),
          multipliers(a.multipliers + w4a8_multiplier_position(channel + lane / 4, 0, a.padded_k / kGroup)) {}

    __device__ __forceinline__ Codes codes(int group) const {
        const uint8_t* source = qweight + static_cast<size_t>(group) * (kChannelBlock * kGroup / 2);
        Codes result;
#pragma unroll
        for (int s = 0; s < kStrips; ++s)
            result.strips[s] = __ldg(reinterpret_cast<const uint4*>(source + s * kStripBytes));
        return result;
    }

    __device__ __forceinline__ Multipliers chunk_multipliers(int chunk) const {
        const int16_t* source = multipliers + static_cast<size_t>(2 * chunk) * kChannelBlock;
        Multipliers result;
#pragma unroll
        for (int s = 0; s < kStrips; ++s)
#pragma unroll
            for (int group = 0; group < 2; ++group)
                result.strips[s][group] =
                    __ldg(reinterpret_cast<const uint32_t*>(source + group * kChannelBlock + s * kStrip));
        return result;
    }
};

// Starts the copies of one stage: the tokens' codes of k_warps chunks, 16-byte pieces permuted within a row by the
// token, so that the eight rows of a matrix lie in different banks.
template <class S>
__device__ __forceinline__ void load_tokens(const Arguments& a, int first_token, int step, uint32_t stage) {
    constexpr int kRows = S::kKWarps * S::kTokens, kRowsAtOnce = kThreads / 8;
    static_assert(kRows % kRowsAtOnce == 0);
    const int column = threadIdx.x % 8, thread_row = threadIdx.x / 8;
#pragma unroll
    for (int i = 0; i < kRows / kRowsAtOnce; ++i) {
        const int row = i * kRowsAtOnce + thread_row, token = row % S::kTokens, tile = row / S::kTokens;
        const int k = (step * S::kKWarps + tile) * kChunk + 16 * column;
        const bool valid = first_token + token < a.tokens && k < a.padded_k;
        const int8_t* source = a.codes + (valid ? static_cast<size_t>(first_token + token) * a.padded_k + k : 0);
        ptx::copy_16(stage + row * kChunk + 16 * (column ^ row % 8), source, valid);
    }
}

// The decoded weights of one group of 64 inputs: operands of two steps.
struct Operands {
    uint32_t strips[kStrips][2][4];
};

// Word `w` (0..3) of a strip holds channel lane / 4 (+ 8 from w = 2 on) in step w % 2.
__device__ __forceinline__ void decode_word(const Codes& codes, const Multipliers& multipliers, int half, uint32_t mask,
                                            int s, int w, Operands& to) {
    const uint4 words = codes.strips[s];
    const uint32_t word = w == 0 ? words.x : w == 1 ? words.y : w == 2 ? words.z : words.w;
    const GroupMultiplier multiplier(multipliers.strips[s][half] >> 16 * (w / 2) & 0xffff, mask);
    decode(word, multiplier, to.strips[s][w % 2][w / 2], to.strips[s][w % 2][2 + w / 2]);
}

__device__ __forceinline__ void decode_all(const Codes& codes, const Multipliers& multipliers, int half, uint32_t mask,
                                           Operands& to) {
#pragma unroll
    for (int i = 0; i < 4 * kStrips; ++i) decode_word(codes, multipliers, half, mask, i / 4, i % 4, to);
}

// Adds the products of one group of 64 inputs, the `half`-th of the chunk in `tile`, and decodes the next group
// meanwhile: warps that wait for each other at the stages would otherwise all decode first and then all multiply.
template <class S>
__device__ __forceinline__ void multiply(const Operands& a, int half, uint32_t tile, int lane,
                                         int32_t (&sums)[kStrips][S::kTokenBlocks][4], const Codes& next_codes,
                                         const Multipliers& next_multipliers, int next_half, uint32_t mask,
                                         Operands& next) {
    // Four blocks at a time: a product waits for the one before it on the same sums, and eight lie between.
    constexpr int kAtOnce = S::kTokenBlocks < 4 ? S::kTokenBlocks : 4, kRounds = S::kTokenBlocks / kAtOnce;
    constexpr int kWords = 4 * kStrips / kRounds;
    const uint32_t row = tile + lane % 8 * kChunk + 16 * ((4 * half + lane / 8) ^ lane % 8);
#pragma unroll
    for (int round = 0; round < kRounds; ++round) {
        uint32_t b[kAtOnce][4];
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) ptx::ldmatrix_x4(b[i], row + (round * kAtOnce + i) * 8 * kChunk);
#pragma unroll
        for (int w = round * kWords; w < (round + 1) * kWords; ++w)
            decode_word(next_codes, next_multipliers, next_half, mask, w / 4, w % 4, next);
#pragma unroll
        for (int step = 0; step < 2; ++step)
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i)
#pragma unroll
                for (int s = 0; s < kStrips; ++s)
                    ptx::mma_s8(sums[s][round * kAtOnce + i], a.strips[s][step], b[i][2 * step], b[i][2 * step + 1]);
    }
}

// y += (lora_act * rank_scale) proj_up^T, both factors in the dtype of proj_up, accumulated in fp32.
template <class S, bool is_bf16>
__device__ __forceinline__ void add_low_rank(const Arguments& a, uint32_t* hidden, int first_token, int channel,
                                             bool active, int lane, float (&y)[kStrips][S::kTokenBlocks][4]) {
    constexpr int kPitch = kHiddenPitch / 2;  // pairs of ranks
    for (int first = 0; first < a.rank; first += kRankBlock) {
        const int ranks = min(kRankBlock, a.rank - first);
        for (int i = threadIdx.x; i < S::kTokens * kRankBlock / 2; i += kThreads) {
            const int token = i / (kRankBlock / 2), r = i % (kRankBlock / 2) * 2;
            float2 value{};
            if (r < ranks && first_token + token < a.tokens) {
                const size_t pair = (static_cast<size_t>(first_token + token) * a.rank + first + r) / 2;
                value = unpack_half(__ldg(static_cast<const uint32_t*>(a.lora_act) + pair),
                                    is_bf16 ? DType::bf16 : DType::f16);
                if (a.rank_scale) value.x *= a.rank_scale[first + r], value.y *= a.rank_scale[first + r + 1];
            }
            hidden[token * kPitch + r / 2] = is_bf16 ? pack_bf16(value.x, value.y) : pack_f16(value.x, value.y);
        }
        __syncthreads();
        if (active)
            for (int r = 0; r < ranks; r += 16) {
                uint32_t up[kStrips][4];
#pragma unroll
                for (int s = 0; s < kStrips; ++s) {
                    const size_t tile = static_cast<size_t>(channel / 16 + s) * (a.rank / 16) + (first + r) / 16;
                    const uint4 words = __ldg(static_cast<const uint4*>(a.proj_up) + tile * 32 + lane);
                    up[s][0] = words.x, up[s][1] = words.z, up[s][2] = words.y, up[s][3] = words.w;
                }
#pragma unroll
                for (int block = 0; block < S::kTokenBlocks; ++block) {
                    const uint32_t* pair = hidden + (8 * block + lane / 4) * kPitch + r / 2 + lane % 4;
                    const uint32_t b0 = pair[0], b1 = pair[4];
#pragma unroll
                    for (int s = 0; s < kStrips; ++s) ptx::mma_16<is_bf16>(y[s][block], up[s], b0, b1);
                }
            }
        __syncthreads();
    }
}

template <class S>
__global__ void __launch_bounds__(kThreads, kBlocks) product(const __grid_constant__ Arguments a) {
    extern __shared__ __align__(128) uint8_t shared[];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int n_warp = warp % S::kNWarps, k_warp = warp / S::kNWarps;
    const int first_token = blockIdx.x * S::kTokens;
    const int channel = blockIdx.y * S::kChannels + n_warp * kWarpChannels;
    const bool active = channel < a.padded_n;  // the last block can have more warps than channels
    const uint32_t stages = ptx::shared_address(shared);

    int32_t sums[kStrips][S::kTokenBlocks][4] = {};
    {
        const int chunks = a.padded_k / kChunk, steps = (chunks + S::kKWarps - 1) / S::kKWarps;
#pragma unroll
        for (int step = 0; step < kStages - 1; ++step) {
            if (step < steps) load_tokens<S>(a, first_token, step, stages + step * S::kStageBytes);
            ptx::commit_copies();
        }
        const WeightSource source(a, active ? channel : 0, lane);
        // A lane that has nothing to do loads what the first one loads. Weights are loaded one group of 64 inputs ahead
        // of being decoded, and decoded one ahead of being multiplied.
        int chunk = k_warp < chunks ? k_warp : 0;
        const uint32_t mask = code_mask();
        Multipliers multipliers = source.chunk_multipliers(chunk);
        Operands even, odd;  // of the first and second half of a chunk
        decode_all(source.codes(2 * chunk), multipliers, 0, mask, even);
        Codes codes = source.codes(2 * chunk + 1);
        for (int step = 0; step < steps; ++step) {
            ptx::wait_for_copies<kStages - 2>();
            __syncthreads();  // the stage is here, and everybody is done with the one that is filled next
            const int next = step + kStages - 1;
            if (next < steps) load_tokens<S>(a, first_token, next, stages + next % kStages * S::kStageBytes);
            ptx::commit_copies();
            if (!active || step * S::kKWarps + k_warp >= chunks) continue;
            const uint32_t tile = stages + step % kStages * S::kStageBytes + k_warp * S::kTileBytes;
            const int next_chunk = chunk + S::kKWarps < chunks ? chunk + S::kKWarps : chunk;
            const Codes first = source.codes(2 * next_chunk);
            const Multipliers next_multipliers = source.chunk_multipliers(next_chunk);
            multiply<S>(even, 0, tile, lane, sums, codes, multipliers, 1, mask, odd);
            codes = source.codes(2 * next_chunk + 1);
            multiply<S>(odd, 1, tile, lane, sums, first, next_multipliers, 0, mask, even);
            multipliers = next_multipliers;
            chunk = next_chunk;
        }
        ptx::wait_for_copies<0>();
        __syncthreads();
    }
    add_up<S>(reinterpret_cast<int32_t*>(shared), n_warp, k_warp, lane, sums);
    const bool finishes = active && k_warp == 0;

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
        float scale[kStrips][2], factor[kStrips][2], bias[kStrips][2];
#pragma unroll
        for (int s = 0; s < kStrips; ++s)
#pragma unroll
            for (int row = 0; row < 2; ++row) {
                const int n = channel + 16 * s + 8 * row + lane / 4;
                scale[s][row] = __ldg(a.row_scales + n);
                factor[s][row] = a.wcscales ? load_float(a.wcscales, a.wcscales_dtype, vector_position(n)) : 1.0f;
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
                        static_cast<float>(sums[s][block][i]) * ascale[i % 2] * scale[s][i / 2] * factor[s][i / 2] +
                        bias[s][i / 2];
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

    // Through shared memory, so that a lane holds eight neighbouring channels of one token. (The loop over tokens is a
    // real one: its body is long, and unrolled it would not fit the instruction cache.)
    float* staged = reinterpret_cast<float*>(shared) + n_warp * S::kStagedTokens * kOutputPitch;
#pragma unroll
    for (int first = 0; first < S::kTokenBlocks; first += S::kStagedTokens / 8) {
        __syncwarp();
#pragma unroll
        for (int b = 0; b < S::kStagedTokens / 8; ++b)
#pragma unroll
            for (int s = 0; s < kStrips; ++s)
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    staged[(8 * b + lane % 4 * 2 + i % 2) * kOutputPitch + 16 * s + lane / 4 + i / 2 * 8] =
                        y[s][first + b][i];
        __syncwarp();
#pragma unroll 1
        for (int token = lane / 4; token < S::kStagedTokens; token += 8) {
            const int n = lane % 4 * 8;
            const float4* row = reinterpret_cast<const float4*>(staged + token * kOutputPitch + n);
            const float4 low = row[0], high = row[1];
            float values[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
            finish_8(a.tail, first_token + 8 * first + token, channel + n, values);
        }
    }
}

template <class S>
void run(const Arguments& a, cudaStream_t stream) {
    const dim3 grid((a.tokens + S::kTokens - 1) / S::kTokens, (a.padded_n + S::kChannels - 1) / S::kChannels);
    launch(product<S>, grid, dim3(kThreads), S::kSharedBytes, stream, "w4a8_linear (sm80)", a);
}

// Blocks that run after each other on one multiprocessor, times the work of one.
template <class S>
int64_t cost(const Arguments& a, int processors) {
    const int64_t blocks =
        (a.tokens + S::kTokens - 1) / S::kTokens * static_cast<int64_t>((a.padded_n + S::kChannels - 1) / S::kChannels);
    // Decoding costs a warp about as much as multiplying with 24 tokens.
    const int64_t at_once = static_cast<int64_t>(processors) * kBlocks;
    return (blocks + at_once - 1) / at_once * S::kNWarps * (S::kTokens + 24);
}

void choose_and_run(const Arguments& a, cudaStream_t stream) {
    const int processors = device_attribute(cudaDevAttrMultiProcessorCount);
    using Many = Shape<128, 1>;
    using Some = Shape<64, 2>;
    using Few = Shape<32, 4>;
    using Fewest = Shape<16, 4>;
    const int64_t costs[] = {cost<Many>(a, processors), cost<Some>(a, processors), cost<Few>(a, processors),
                             cost<Fewest>(a, processors)};
    switch (std::min_element(costs, costs + 4) - costs) {
        case 0:
            return run<Many>(a, stream);
        case 1:
            return run<Some>(a, stream);
        case 2:
            return run<Few>(a, stream);
        default:
            return run<Fewest>(a, stream);
    }
}

Arguments product_arguments(const ProductArguments& p) {
    if (p.padded_k % kChunk)
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
