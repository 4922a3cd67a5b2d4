// W4A16 for more than sixteen tokens, on mma.sync. A warp owns 32 output channels and all tokens of its block's tile,
// so that a weight is decoded once per block; where channels are few, warps share out the inputs as well and add up
// their sums in a fixed order. While a warp multiplies one half of a chunk it decodes the next half.
#include <algorithm>
#include <array>
#include <limits>

#include "../kernels.h"
#include "../w4a16.cuh"
#include "add_up.cuh"

namespace nk::cuda::sm80 {
namespace {

constexpr int kWarps = 8, kThreads = 32 * kWarps;
constexpr int kStages = 3;
constexpr int kStrips = 2;
constexpr int kStagedTokens = 16;  // output tokens a warp turns at a time
using Weights = WarpWeights<kStrips>;
constexpr int kOutputPitch = Weights::kChannels + 4;  // floats: no bank conflicts
constexpr int kTogether = 2;                          // token blocks between two products that depend on each other
constexpr int kFragments = kStrips * 4;               // of half a chunk

template <int tokens, int k_warps>
struct Shape {
    static constexpr int kTokens = tokens, kTokenBlocks = tokens / 8;
    static constexpr int kKWarps = k_warps, kNWarps = kWarps / k_warps;  // warps along inputs, along channels
    static constexpr int kChannels = kNWarps * Weights::kChannels;
    static constexpr int kTileBytes = tokens * kTokenBytes;
    static constexpr int kStageBytes = k_warps * kTileBytes + kWarps * Weights::kBytes;
    static constexpr int kAccumulators = kStrips * kTokenBlocks * 4;
    static constexpr int kReduceBytes = (k_warps - 1) * kNWarps * kAccumulators * 32 * 4;
    static constexpr int kOutputBytes = kWarps * kStagedTokens * kOutputPitch * 4;
    static constexpr int kSharedBytes = std::max(kStages * kStageBytes, std::max(kReduceBytes, kOutputBytes));
    static_assert(tokens % kStagedTokens == 0 && kFragments % kTokenBlocks == 0);
};

// Where a thread finds the pieces that it copies: one of a token in every pass.
constexpr int kTokensAtOnce = kThreads / kPieces;
struct TokenSource {
    const uint16_t* piece;
    int64_t pass_stride;
    int tokens, k;  // how many tokens there are from this one on; first input of the piece

    __device__ __forceinline__ TokenSource(const W4a16& p, int first_token) {
        const int token = first_token + threadIdx.x / kPieces;
        k = threadIdx.x % kPieces * 8;
        piece = static_cast<const uint16_t*>(p.x) + token * p.stride + k;
        pass_stride = kTokensAtOnce * p.stride;
        tokens = p.tokens - token;
    }
};

// Starts the copies of the tokens of k_warps chunks.
template <class S>
__device__ __forceinline__ void copy_tokens(const W4a16& p, const TokenSource& from, int step, uint8_t* stage) {
    constexpr int kPasses = S::kTokens / kTokensAtOnce;
    static_assert(S::kTokens % kTokensAtOnce == 0);
    // Tokens of different passes are an even number apart, which leaves the place of a piece as it is.
    const int piece = threadIdx.x % kPieces, token = threadIdx.x / kPieces;
    uint8_t* target = stage + token * kTokenBytes + 16 * piece_place(token, piece);
#pragma unroll
    for (int tile = 0; tile < S::kKWarps; ++tile) {
        const int k = (step * S::kKWarps + tile) * kChunkInputs;
#pragma unroll
        for (int pass = 0; pass < kPasses; ++pass, target += kTokensAtOnce * kTokenBytes) {
            const bool valid = kTokensAtOnce * pass < from.tokens && from.k + k < p.inputs;
            const uint16_t* source = from.piece + pass * from.pass_stride + k;
            if (p.x_vectors)
                ptx::copy_16(ptx::shared_address(target), source, valid);
            else
                *reinterpret_cast<uint4*>(target) = valid ? load_piece(source, false) : uint4{};
        }
    }
}

struct Fragments {
    uint32_t a[kFragments][4];

    template <bool is_bf16>
    __device__ __forceinline__ void decode(const Weights& weights, int half, int fragment) {
        decode_fragment<is_bf16>(weights, fragment % kStrips, 4 * half + fragment / kStrips, a[fragment]);
    }
};

// Adds the products of one half of a chunk, and decodes `next_half` of `next` in between.
template <class S, bool is_bf16>
__device__ __forceinline__ void multiply(const Fragments& fragments, const uint8_t* tile, int half, int lane,
                                         const Weights& next, int next_half, Fragments& decoded,
                                         float (&sums)[kStrips][S::kTokenBlocks][4]) {
    const uint8_t* row = tile + lane / 4 * kTokenBytes;
    const int place = piece_place(lane / 4, lane % 4 * 4);
    uint4 x[kTogether][2], following[kTogether][2];
    const auto load = [&](int first_block, uint4(&pieces)[kTogether][2]) {
#pragma unroll
        for (int b = 0; b < kTogether; ++b)
#pragma unroll
            for (int i = 0; i < 2; ++i)
                pieces[b][i] = *reinterpret_cast<const uint4*>(row + (first_block + b) * 8 * kTokenBytes +
                                                               16 * (place ^ (2 * half + i)));
    };
    load(0, x);
#pragma unroll
    for (int block = 0; block < S::kTokenBlocks; block += kTogether) {
        if (block + kTogether < S::kTokenBlocks) load(block + kTogether, following);
        constexpr int kDecoded = kFragments * kTogether / S::kTokenBlocks;
#pragma unroll
        for (int i = 0; i < kDecoded; ++i) decoded.decode<is_bf16>(next, next_half, block / kTogether * kDecoded + i);
#pragma unroll
        for (int step = 0; step < 4; ++step)
#pragma unroll
            for (int b = 0; b < kTogether; ++b)
#pragma unroll
                for (int s = 0; s < kStrips; ++s)
                    multiply_step<is_bf16>(sums[s][block + b], fragments.a[step * kStrips + s], x[b][step / 2], step);
#pragma unroll
        for (int b = 0; b < kTogether; ++b)
#pragma unroll
            for (int i = 0; i < 2; ++i) x[b][i] = following[b][i];
    }
}

// Through shared memory, so that a lane holds eight neighbouring channels of one token.
template <class S>
__device__ __forceinline__ void store(const W4a16& p, float* staged, int first_token, int channel, int lane,
                                      const float (&sums)[kStrips][S::kTokenBlocks][4]) {
    const int n = channel + lane % 4 * 8;
    float bias[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) bias[i] = p.bias && n + i < p.outputs ? load_float(p.bias, p.bias_dtype, n + i) : 0.0f;
#pragma unroll
    for (int pair = 0; pair < S::kTokenBlocks / 2; ++pair) {
        __syncwarp();
#pragma unroll
        for (int b = 0; b < 2; ++b)
#pragma unroll
            for (int s = 0; s < kStrips; ++s)
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    staged[(8 * b + lane % 4 * 2 + i % 2) * kOutputPitch + 16 * s + lane / 4 + i / 2 * 8] =
                        sums[s][2 * pair + b][i];
        __syncwarp();
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = 8 * half + lane / 4, token = first_token + kStagedTokens * pair + row;
            if (token >= p.tokens) continue;
#pragma unroll
            for (int quad = 0; quad < 2; ++quad) {
                if (n + 4 * quad >= p.outputs) continue;
                const float4 t =
                    *reinterpret_cast<const float4*>(staged + row * kOutputPitch + lane % 4 * 8 + 4 * quad);
                const float y[4] = {t.x + bias[4 * quad], t.y + bias[4 * quad + 1], t.z + bias[4 * quad + 2],
                                    t.w + bias[4 * quad + 3]};
                store_quad(p, token, n + 4 * quad, y);
            }
        }
    }
}

template <class S, bool is_bf16>
__global__ void __launch_bounds__(kThreads, 1) gemm(const __grid_constant__ W4a16 p) {
    extern __shared__ __align__(128) uint8_t shared[];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int n_warp = warp % S::kNWarps, k_warp = warp / S::kNWarps;
    const int first_token = blockIdx.x * S::kTokens;
    const int channel = blockIdx.y * S::kChannels + n_warp * Weights::kChannels;
    const int chunks = (p.inputs + kChunkInputs - 1) / kChunkInputs;
    const int steps = (chunks + S::kKWarps - 1) / S::kKWarps;

    // A stage: one tile of tokens per chunk, then the weights of every warp.
    const auto stage = [&](int step) { return shared + step % kStages * S::kStageBytes; };
    const auto weights_of = [&](int step) { return stage(step) + S::kKWarps * S::kTileBytes + warp * Weights::kBytes; };
    const TokenSource tokens(p, first_token);
    const Weights::Source source(p, channel, lane);
    const auto copy = [&](int step) {
        if (step < steps) {
            copy_tokens<S>(p, tokens, step, stage(step));
            Weights::copy(p, source, step * S::kKWarps + k_warp, ptx::shared_address(weights_of(step)), lane, lane);
        }
        ptx::commit_copies();
    };

    float sums[kStrips][S::kTokenBlocks][4] = {};
    Weights weights;
    Fragments even, odd;
#pragma unroll
    for (int step = 0; step < kStages - 1; ++step) copy(step);
    ptx::wait_for_copies<kStages - 2>();
    __syncwarp();
    weights.load(weights_of(0), lane);
#pragma unroll
    for (int fragment = 0; fragment < kFragments; ++fragment) even.decode<is_bf16>(weights, 0, fragment);
    for (int step = 0; step < steps; ++step) {
        __syncthreads();  // everybody's copies of this step are here, and everybody is done with the stage filled next
        copy(step + kStages - 1);
        const uint8_t* tile = stage(step) + k_warp * S::kTileBytes;
        multiply<S, is_bf16>(even, tile, 0, lane, weights, 1, odd, sums);
        // The next weights are this warp's own copies. After the last step there are none: what is read is not used.
        ptx::wait_for_copies<kStages - 2>();
        __syncwarp();
        weights.load(weights_of(step + 1), lane);
        multiply<S, is_bf16>(odd, tile, 1, lane, weights, 0, even, sums);
    }
    ptx::wait_for_copies<0>();
    __syncthreads();
    add_up<S>(reinterpret_cast<float*>(shared), n_warp, k_warp, lane, sums);
    if (!k_warp)
        store<S>(p, reinterpret_cast<float*>(shared) + warp * kStagedTokens * kOutputPitch, first_token, channel, lane,
                 sums);
}

template <class S>
dim3 grid_of(const W4a16& p) {
    return dim3((p.tokens + S::kTokens - 1) / S::kTokens, (p.outputs + S::kChannels - 1) / S::kChannels);
}

template <class S>
void run(const W4a16& p, cudaStream_t stream) {
    launch(p.x_dtype == DType::bf16 ? gemm<S, true> : gemm<S, false>, grid_of<S>(p), dim3(kThreads), S::kSharedBytes,
           stream, "w4a16_linear (gemm)", p);
}

// Clocks that a launch should take. A chunk takes a multiprocessor what its products take or what its bytes take, which
// come from a second-level cache that all share. The constants are those of an H100.
template <class S>
double cost(const W4a16& p, int processors, int shared_bytes) {
    if (S::kSharedBytes > shared_bytes) return std::numeric_limits<double>::infinity();
    constexpr double kProductsPerClock = 1200, kBytesPerClock = 3000, kBytesPerClockOfOne = 48, kStartClocks = 2500;
    const dim3 grid = grid_of<S>(p);
    const int64_t blocks = static_cast<int64_t>(grid.x) * grid.y, rounds = (blocks + processors - 1) / processors;
    const double running = static_cast<double>(std::min<int64_t>(blocks, processors));
    const double products = static_cast<double>(S::kTokens + 8) * S::kChannels * kChunkInputs;  // 8: the decoding
    const double bytes = S::kTileBytes + S::kNWarps * Weights::kBytes;
    const double clocks =
        std::max(products / kProductsPerClock, bytes / std::min(kBytesPerClockOfOne, kBytesPerClock / running));
    return static_cast<double>(rounds) * (clocks * p.inputs / kChunkInputs + kStartClocks);
}

template <class... Shapes>
void run_cheapest(const W4a16& p, cudaStream_t stream) {
    const int processors = device_attribute(cudaDevAttrMultiProcessorCount);
    const int shared_bytes = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
    const std::array costs = {cost<Shapes>(p, processors, shared_bytes)...};
    constexpr std::array runs = {&run<Shapes>...};
    runs[std::min_element(costs.begin(), costs.end()) - costs.begin()](p, stream);
}

}  // namespace

void w4a16_gemm(const AwqArguments& a, cudaStream_t stream) {
    // Shape<32, 1> and Shape<16, 2> fit into the 99 KiB of sm_86 and sm_89.
    run_cheapest<Shape<64, 1>, Shape<64, 2>, Shape<32, 1>, Shape<32, 2>, Shape<32, 4>, Shape<16, 2>, Shape<16, 4>>(
        make_w4a16(a), stream);
}

}  // namespace nk::cuda::sm80
