// W4A16 for at most eight tokens, at the speed of memory: a block has 16 output channels, and its warps share out the
// inputs. The tokens are the eight columns of an mma, so that one token costs as much as eight; every weight is read
// once. What is in flight waits in shared memory, not in registers, which lets several blocks live on a multiprocessor.
#include "../kernels.h"
#include "../w4a16.cuh"

namespace nk::cuda::sm80 {
namespace {

constexpr int kWarps = 8, kThreads = 32 * kWarps;
constexpr int kDepth = 4;   // chunks of a warp in flight
constexpr int kPieces = 4;  // of 16 bytes, of x per lane and chunk
using Weights = WarpWeights<1>;

struct Tokens {
    uint4 pieces[kPieces];
};

// Inputs 32q .. 32q + 31 of a chunk for token g.
__device__ __forceinline__ Tokens load_tokens(const W4a16& p, int chunk, int lane) {
    const int k = chunk * kChunkInputs + lane % 4 * 32, token = lane / 4;
    Tokens result{};
    if (token < p.tokens && k < p.inputs) {
        const uint16_t* source = static_cast<const uint16_t*>(p.x) + token * p.stride + k;
#pragma unroll
        for (int i = 0; i < kPieces; ++i) result.pieces[i] = load_piece(source + 8 * i, p.x_vectors);
    }
    return result;
}

template <bool is_bf16>
__global__ void __launch_bounds__(kThreads, 3) gemv(const __grid_constant__ W4a16 p) {
    __shared__ __align__(16) uint8_t shared[kWarps][kDepth][Weights::kBytes];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int channel = blockIdx.x * Weights::kChannels;
    const int chunks = (p.inputs + kChunkInputs - 1) / kChunkInputs;
    const uint32_t ring = ptx::shared_address(shared[warp]);
    const Weights::Source source(p, channel, lane);
    const auto copy = [&](int chunk, int slot) {
        if (chunk < chunks) Weights::copy(p, source, chunk, ring + slot * Weights::kBytes, lane);
        ptx::commit_copies();
    };
#pragma unroll
    for (int i = 0; i < kDepth; ++i) copy(warp + i * kWarps, i);

    float sums[2][4] = {};  // of even and odd steps: two chains of dependent products
    Tokens tokens = load_tokens(p, warp, lane);
    for (int chunk = warp, slot = 0; chunk < chunks; chunk += kWarps, slot = (slot + 1) % kDepth) {
        ptx::wait_for_copies<kDepth - 1>();
        __syncwarp();
        Weights weights;
        weights.load(shared[warp][slot], lane);
        __syncwarp();
        copy(chunk + kDepth * kWarps, slot);
        const Tokens following = load_tokens(p, chunk + kWarps, lane);
#pragma unroll
        for (int step = 0; step < 8; ++step) {
            uint32_t a[4];
            decode_fragment<is_bf16>(weights, 0, step, a);
            multiply_step<is_bf16>(sums[step % 2], a, tokens.pieces[step / 2], step);
        }
        tokens = following;
    }

    // Every warp's sums into its own ring, which is empty now, then added in the order of the warps.
    ptx::wait_for_copies<0>();
    __syncwarp();
    reinterpret_cast<float4*>(shared[warp])[lane] =
        make_float4(sums[0][0] + sums[1][0], sums[0][1] + sums[1][1], sums[0][2] + sums[1][2], sums[0][3] + sums[1][3]);
    __syncthreads();
    const int token = threadIdx.x / 4, n = threadIdx.x % 4 * 4;
    if (token >= p.tokens || channel + n >= p.outputs) return;
    float y[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int row = n + i, fragment = (row % 8 * 4 + token / 2) * 4 + row / 8 * 2 + token % 2;
        y[i] = p.bias ? load_float(p.bias, p.bias_dtype, channel + row) : 0.0f;
#pragma unroll
        for (int w = 0; w < kWarps; ++w) y[i] += reinterpret_cast<const float*>(shared[w])[fragment];
    }
    store_quad(p, token, channel + n, y);
}

}  // namespace

void w4a16_gemv(const AwqArguments& a, cudaStream_t stream) {
    const W4a16 p = make_w4a16(a);
    const dim3 grid((p.outputs + Weights::kChannels - 1) / Weights::kChannels);
    launch(p.x_dtype == DType::bf16 ? gemv<true> : gemv<false>, grid, dim3(kThreads), 0, stream, "w4a16_linear (gemv)",
           p);
}

}  // namespace nk::cuda::sm80
