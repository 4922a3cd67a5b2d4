// W4A16 without tensor cores, for fp32 activations or scales and for tokens and scales of two different 16-bit types,
// whose products no mma takes exactly. Weights are decoded as the definition rounds them; products and sums are fp32.
#include "../kernels.h"
#include "../w4a16.cuh"

namespace nk::cuda::sm80 {
namespace {

constexpr int kThreads = 256;
constexpr int kTile = 64;  // tokens, channels and inputs of a step
constexpr int kPitch = kTile + 4;

__device__ __forceinline__ float round_to(float value, DType dtype) {
    if (dtype == DType::f32) return value;
    const uint16_t bits = static_cast<uint16_t>(round_to_16_bits(value, dtype));
    return dtype == DType::bf16 ? bf16_to_float(bits) : __half2float(__ushort_as_half(bits));
}

__global__ void __launch_bounds__(kThreads) linear(const __grid_constant__ W4a16 p) {
    __shared__ __align__(16) float tokens[kTile][kPitch], weights[kTile][kPitch];  // [input][token], [input][channel]
    const int first_token = blockIdx.x * kTile, channel = blockIdx.y * kTile;
    const int m = threadIdx.x / 16 * 4, n = threadIdx.x % 16 * 4;
    float y[4][4] = {};
    for (int block = 0; block < p.blocks; ++block) {
        __syncthreads();
        for (int i = threadIdx.x; i < kTile * kTile; i += kThreads) {
            const int token = i / kTile, k = i % kTile;
            const bool valid = first_token + token < p.tokens;
            tokens[k][token] =
                valid ? load_float(p.x, p.x_dtype, (first_token + token) * p.stride + block * kTile + k) : 0.0f;
        }
        for (int i = threadIdx.x; i < kTile * kTile / 4; i += kThreads) {
            const int row = i / 16, column = i % 16, k = column / 8 * 32 + column % 8;
            const bool valid = channel + row < p.outputs;
            const size_t group = group_of(p, block) * p.outputs + channel + row;
            const float scale = valid ? load_float(p.scales, p.scales_dtype, group) : 0.0f;
            const float zero = valid ? load_float(p.zeros, p.scales_dtype, group) : 0.0f;
            const int word = valid ? p.qweight[awq_word(channel + row, block * kTile + k, p.inputs)] : 0;
#pragma unroll
            for (int nibble = 0; nibble < 4; ++nibble) {
                const float code = static_cast<float>(word >> 4 * nibble & 15);
                weights[k + 8 * nibble][row] = round_to(__fadd_rn(__fmul_rn(code, scale), zero), p.scales_dtype);
            }
        }
        __syncthreads();
#pragma unroll 8
        for (int k = 0; k < kTile; ++k) {
            const float4 t = *reinterpret_cast<const float4*>(&tokens[k][m]);
            const float4 w = *reinterpret_cast<const float4*>(&weights[k][n]);
            const float ts[4] = {t.x, t.y, t.z, t.w}, ws[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
            for (int i = 0; i < 4; ++i)
#pragma unroll
                for (int j = 0; j < 4; ++j) y[i][j] = fmaf(ts[i], ws[j], y[i][j]);
        }
    }
    if (channel + n >= p.outputs) return;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        if (first_token + m + i >= p.tokens) return;
        if (p.bias) {
#pragma unroll
            for (int j = 0; j < 4; ++j) y[i][j] += load_float(p.bias, p.bias_dtype, channel + n + j);
        }
        store_quad(p, first_token + m + i, channel + n, y[i]);
    }
}

}  // namespace

void w4a16_fp32(const AwqArguments& a, cudaStream_t stream) {
    const W4a16 p = make_w4a16(a);
    const dim3 grid((p.tokens + kTile - 1) / kTile, (p.outputs + kTile - 1) / kTile);
    launch(linear, grid, dim3(kThreads), 0, stream, "w4a16_linear (fp32)", p);
}

}  // namespace nk::cuda::sm80
