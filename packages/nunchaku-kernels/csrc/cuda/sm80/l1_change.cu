// Sums of magnitudes per sample: how far activations have moved from earlier ones, and how large those were. A warp
// takes a token at a time, a CTA the tokens of a block, and one more launch adds blocks in order: the result of a
// sample does not depend on what stands beside it, nor on where its memory starts.
#include "../kernels.h"
#include "../tail.cuh"

namespace nk::cuda::sm80 {
namespace {

constexpr int kWarps = 8;
constexpr int kPiece = 8;  // neighbouring channels of a lane

struct Source {
    const char* data;
    int64_t sample_stride, token_stride;  // bytes
};

struct L1Change {
    Source current, origin, previous;
    int64_t tokens, channels, block_tokens, sample_blocks;
    const int64_t* counted;
    double* blocks;
    bool vectors;  // pieces start at multiples of their size
};

__device__ __forceinline__ const char* row_of(const Source& x, int64_t sample, int64_t token) {
    return x.data ? x.data + sample * x.sample_stride + token * x.token_stride : nullptr;
}

// Zeros beyond the channels. The order of channels is the same with and without vectors.
template <DType dtype>
__device__ __forceinline__ void load_piece(const char* row, int64_t channel, const L1Change& p,
                                           float (&values)[kPiece]) {
    if (p.vectors) return load_8(row, dtype, channel, values);
#pragma unroll
    for (int i = 0; i < kPiece; ++i) values[i] = channel + i < p.channels ? load_float(row, dtype, channel + i) : 0.0f;
}

template <DType dtype>
__device__ __forceinline__ float rounded(float value) {
    if (dtype == DType::f16) return __half2float(__float2half_rn(value));
    return dtype == DType::bf16 ? __bfloat162float(__float2bfloat16_rn(value)) : value;
}

template <DType dtype>
__global__ void __launch_bounds__(32 * kWarps) sum_blocks(const L1Change p) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int64_t sample = blockIdx.x / p.sample_blocks, first = blockIdx.x % p.sample_blocks * p.block_tokens;
    const int64_t counted = p.counted ? min(p.counted[sample], p.tokens) : p.tokens;
    const int64_t end = min(first + p.block_tokens, counted);
    double change = 0, size = 0;
    for (int64_t token = first + warp; token < end; token += kWarps) {
        const char* const current = row_of(p.current, sample, token);
        const char* const origin = row_of(p.origin, sample, token);
        const char* const previous = row_of(p.previous, sample, token);
        float moved = 0, large = 0;
#pragma unroll 4
        for (int64_t channel = lane * kPiece; channel < p.channels; channel += 32 * kPiece) {
            float x[kPiece], start[kPiece] = {}, old[kPiece];
            load_piece<dtype>(current, channel, p, x);
            if (origin) load_piece<dtype>(origin, channel, p, start);
            load_piece<dtype>(previous, channel, p, old);
#pragma unroll
            for (int i = 0; i < kPiece; ++i) {
                moved += fabsf(old[i] - (origin ? rounded<dtype>(x[i] - start[i]) : x[i]));
                large += fabsf(old[i]);
            }
        }
        change += moved, size += large;
    }
    for (int distance = 16; distance; distance /= 2) {
        change += __shfl_xor_sync(~0u, change, distance);
        size += __shfl_xor_sync(~0u, size, distance);
    }
    __shared__ double of_warps[kWarps][2];
    if (lane == 0) of_warps[warp][0] = change, of_warps[warp][1] = size;
    __syncthreads();
    if (threadIdx.x >= 2) return;
    double sum = 0;
    for (int i = 0; i < kWarps; ++i) sum += of_warps[i][threadIdx.x];
    p.blocks[int64_t{blockIdx.x} * 2 + threadIdx.x] = sum;
}

// A warp per sample.
__global__ void add_blocks(const double* blocks, int64_t count, double* sums) {
    const int64_t sample = blockIdx.x;
    double sum[2] = {};
    for (int64_t i = threadIdx.x; i < count; i += 32)
        for (int j = 0; j < 2; ++j) sum[j] += blocks[(sample * count + i) * 2 + j];
    for (int distance = 16; distance; distance /= 2)
        for (int j = 0; j < 2; ++j) sum[j] += __shfl_xor_sync(~0u, sum[j], distance);
    if (threadIdx.x < 2) sums[sample * 2 + threadIdx.x] += threadIdx.x ? sum[1] : sum[0];
}

}  // namespace

void l1_change(const L1ChangeArguments& a, cudaStream_t stream) {
    const DType dtype = static_cast<DType>(a.dtype);
    const int64_t element_bytes = static_cast<int64_t>(size_of(dtype));
    bool vectors = a.channels % kPiece == 0;
    const auto source = [&](const Activations& x) {
        vectors = vectors && aligned(x.data) && x.sample_stride * element_bytes % 16 == 0 &&
                  x.token_stride * element_bytes % 16 == 0;
        return Source{static_cast<const char*>(x.data), x.sample_stride * element_bytes,
                      x.token_stride * element_bytes};
    };
    L1Change p{};
    p.current = source(a.current), p.origin = source(a.origin), p.previous = source(a.previous);
    p.tokens = a.tokens, p.channels = a.channels, p.counted = a.counted;
    p.block_tokens = a.block_tokens, p.sample_blocks = (a.tokens + a.block_tokens - 1) / a.block_tokens;
    p.blocks = a.blocks;
    p.vectors = vectors;
    const auto kernel = dtype == DType::f32   ? sum_blocks<DType::f32>
                        : dtype == DType::f16 ? sum_blocks<DType::f16>
                                              : sum_blocks<DType::bf16>;
    launch(kernel, dim3(static_cast<unsigned>(a.samples * p.sample_blocks)), dim3(32 * kWarps), 0, stream, "l1_change",
           p);
    launch(add_blocks, dim3(static_cast<unsigned>(a.samples)), dim3(32), 0, stream, "l1_change", a.blocks,
           p.sample_blocks, a.sums);
}

}  // namespace nk::cuda::sm80
