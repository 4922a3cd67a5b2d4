// What the CUDA kernels of the W4A16 linear share: their arguments, the way of weights into mma fragments, the store.
//
// Y^T = W X^T on m16n8k16, weights as the 16-row operand. Sixteen neighbouring bytes of the AWQ order are 32 inputs of
// one channel, and that is a lane's load: lane 4g + q takes channels g and g + 8 of a strip and inputs 32q .. 32q + 31
// of a chunk of 128. Nibble j of both 16-bit halves of its i-th 32-bit word is the pair of inputs 32q + 8j + 2i, + 1.
// A product sums over inputs in any order, so step 2j + h of the eight of a chunk multiplies, in lane q, the pairs of
// words 2h and 2h + 1: the lane decodes its own fragment, and the tokens' side is half of a 16-byte piece of x, in two
// neighbouring registers.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cstdint>

#include "../numerics/layout.h"
#include "../ops.h"
#include "kernels.h"
#include "ptx/arithmetic.h"
#include "ptx/async_copy.h"
#include "ptx/mma.h"

namespace nk::cuda {

struct W4a16 {
    const void* x;
    const uint16_t* qweight;
    const void *scales, *zeros, *bias;
    void* out;
    int64_t stride;
    int tokens, inputs, outputs;
    int blocks;             // of 64 inputs
    uint32_t group_factor;  // block * group_factor >> 31 is its group
    DType x_dtype, scales_dtype, bias_dtype, out_dtype;
    bool x_vectors;  // rows of a 16-bit x start at multiples of 16 bytes
};

inline W4a16 make_w4a16(const AwqArguments& a) {
    W4a16 p{};
    p.x = a.x.data;
    p.qweight = a.qweight;
    p.scales = a.wscales;
    p.zeros = a.wzeros;
    p.bias = a.bias.data;
    p.out = a.out;
    p.stride = a.stride;
    p.tokens = static_cast<int>(a.tokens);
    p.inputs = static_cast<int>(a.in_features);
    p.outputs = static_cast<int>(a.out_features);
    p.blocks = static_cast<int>(a.in_features / kGroup);
    // A quotient rounded up is exact while block * divisor stays below 2^31.
    const int64_t blocks_per_group = std::min<int64_t>(a.group_size / kGroup, p.blocks);
    p.group_factor = static_cast<uint32_t>(((int64_t{1} << 31) + blocks_per_group - 1) / blocks_per_group);
    p.x_dtype = static_cast<DType>(a.x.dtype);
    p.scales_dtype = static_cast<DType>(a.scales_dtype);
    p.bias_dtype = static_cast<DType>(a.bias.dtype);
    p.out_dtype = static_cast<DType>(a.out_dtype);
    p.x_vectors = aligned(a.x.data) && (a.tokens == 1 || a.stride % 8 == 0);
    return p;
}

constexpr int kChunkInputs = 128;
constexpr int kTokenBytes = 2 * kChunkInputs, kPieces = kTokenBytes / 16;  // of one token in one chunk
constexpr int64_t kMaxInputs = int64_t{1} << 21;                           // for W4a16::group_factor

__host__ __device__ __forceinline__ size_t group_of(const W4a16& p, int block) {
    return static_cast<uint64_t>(static_cast<uint32_t>(block)) * p.group_factor >> 31;
}

// Where a tile keeps 16-byte piece `piece` of a token: moved within the token so that the eight lanes which are served
// together, pieces 4q + v of two tokens, meet different banks. The two low bits of `piece` only flip those of the
// place.
__device__ __forceinline__ int piece_place(int token, int piece) { return piece ^ piece / 8 ^ token % 2 * 2; }

// The weights of one chunk and `strips` x 16 channels, as one warp keeps them in shared memory. No other warp reads
// them. Four strips take a number of channels that is a multiple of eight.
template <int strips>
struct WarpWeights {
    static constexpr int kRows = 2 * strips;  // of eight channels
    static constexpr int kChannels = 16 * strips;
    static constexpr int kCodeBytes = kRows * 32 * 16;   // [row][lane]
    static constexpr int kScaleBytes = 32 * 4 * strips;  // [scales, zeros][block][channel]
    static constexpr int kBytes = kCodeBytes + kScaleBytes;

    uint4 codes[kRows];
    uint32_t scales[kRows], zeros[kRows];  // twice the same 16 bits

    // Where a lane finds its share.
    struct Source {
        const uint16_t *codes, *scales;
        size_t row_stride;             // of codes, eight channels
        int channels, scale_channels;  // outputs from the lane's first one on; for codes, and for scales
        int block, scale_block;        // inside of a chunk

        __device__ __forceinline__ Source(const W4a16& p, int channel, int lane) {
            const int n = channel + lane / 4, scale_n = channel + lane % 8 * 2 * strips;
            codes =
                p.qweight + static_cast<size_t>(n / 4) * p.blocks * 64 + n % 4 * 16 + lane % 4 * 8 + lane % 4 / 2 * 48;
            scales = static_cast<const uint16_t*>(lane < 16 ? p.scales : p.zeros) + scale_n;
            row_stride = static_cast<size_t>(p.blocks) * 128;
            channels = p.outputs - n;
            scale_channels = p.outputs - scale_n;
            block = lane % 4 / 2;
            scale_block = lane / 8 % 2;
        }
    };

    // Starts the copies; what lies outside of the matrix becomes a weight of zero. The lane's codes of a row go to its
    // `place`-th 16 bytes.
    __device__ static __forceinline__ void copy(const W4a16& p, const Source& source, int chunk, uint32_t target,
                                                int lane, int place) {
        const bool inside = 2 * chunk + source.block < p.blocks;
        const uint16_t* codes = source.codes + static_cast<size_t>(chunk) * kChunkInputs;
#pragma unroll
        for (int row = 0; row < kRows; ++row)
            ptx::copy_16(target + (row * 32 + place) * 16, codes + row * source.row_stride,
                         inside && 8 * row < source.channels);
        const int block = 2 * chunk + source.scale_block;
        ptx::copy_few<4 * strips>(target + kCodeBytes + lane * 4 * strips,
                                  source.scales + group_of(p, block) * p.outputs,
                                  block < p.blocks && 0 < source.scale_channels);
    }

    // Brings the codes that `copy` will ask for to L2.
    __device__ static __forceinline__ void prefetch(const W4a16& p, const Source& source, int chunk) {
        const uint16_t* codes = source.codes + static_cast<size_t>(chunk) * kChunkInputs;
#pragma unroll
        for (int row = 0; row < kRows; ++row)
            if (2 * chunk + source.block < p.blocks && 8 * row < source.channels)
                ptx::prefetch_to_l2(codes + row * source.row_stride);
    }

    // After the copies have arrived, and a __syncwarp; places were lanes.
    __device__ __forceinline__ void load(const uint8_t* source, int lane) {
        const uint16_t* scale = reinterpret_cast<const uint16_t*>(source + kCodeBytes) + lane % 4 / 2 * kChannels;
#pragma unroll
        for (int row = 0; row < kRows; ++row) {
            codes[row] = reinterpret_cast<const uint4*>(source)[row * 32 + lane];
            scales[row] = scale[8 * row + lane / 4] * 0x10001u;
            zeros[row] = scale[2 * kChannels + 8 * row + lane / 4] * 0x10001u;
        }
    }
};

__device__ __forceinline__ uint32_t component(const uint4& words, int i) {
    return i == 0 ? words.x : i == 1 ? words.y : i == 2 ? words.z : words.w;
}

// Two codes as the last bits of a power of two whose spacing is one: 128 or, in fp16, 1024 more than they are.
template <bool is_bf16>
__device__ __forceinline__ uint32_t raise_pair(uint32_t word, int nibble) {
    return ptx::and_or(word >> 4 * nibble, 0x000f000fu, is_bf16 ? 0x43004300u : 0x64006400u);
}

// Two weights, rounded once as the definition has it: code * scale + zero as one fused operation in the scales' dtype.
// Subtracting the power of two is exact.
template <bool is_bf16>
__device__ __forceinline__ uint32_t decode_pair(uint32_t word, int nibble, uint32_t scale, uint32_t zero) {
    const uint32_t raised = raise_pair<is_bf16>(word, nibble);
    uint32_t result;
    if constexpr (is_bf16) {
        const uint32_t power = 0x43004300u;  // 128
        const __nv_bfloat162 codes =
            __hsub2(reinterpret_cast<const __nv_bfloat162&>(raised), reinterpret_cast<const __nv_bfloat162&>(power));
        reinterpret_cast<__nv_bfloat162&>(result) = __hfma2(codes, reinterpret_cast<const __nv_bfloat162&>(scale),
                                                            reinterpret_cast<const __nv_bfloat162&>(zero));
    } else {
        const uint32_t power = 0x64006400u;  // 1024
        const __half2 codes =
            __hsub2(reinterpret_cast<const __half2&>(raised), reinterpret_cast<const __half2&>(power));
        reinterpret_cast<__half2&>(result) =
            __hfma2(codes, reinterpret_cast<const __half2&>(scale), reinterpret_cast<const __half2&>(zero));
    }
    return result;
}

// The fragment of one strip in one of the eight steps of a chunk.
template <bool is_bf16, int strips>
__device__ __forceinline__ void decode_fragment(const WarpWeights<strips>& weights, int strip, int step,
                                                uint32_t (&a)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int row = 2 * strip + i % 2;
        a[i] = decode_pair<is_bf16>(component(weights.codes[row], step % 2 * 2 + i / 2), step / 2, weights.scales[row],
                                    weights.zeros[row]);
    }
}

// Adds the products of the fragment of a step; `piece` is the step / 2-th of the lane.
template <bool is_bf16>
__device__ __forceinline__ void multiply_step(float (&sums)[4], const uint32_t (&a)[4], const uint4& piece, int step) {
    ptx::mma_16<is_bf16>(sums, a, component(piece, step % 2 * 2), component(piece, step % 2 * 2 + 1));
}

// Eight neighbouring elements of a 16-bit row, wherever it starts.
__device__ __forceinline__ uint4 load_piece(const uint16_t* source, bool vectors) {
    if (vectors) return __ldg(reinterpret_cast<const uint4*>(source));
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i)
        words[i] = __ldg(source + 2 * i) | static_cast<uint32_t>(__ldg(source + 2 * i + 1)) << 16;
    return make_uint4(words[0], words[1], words[2], words[3]);
}

__device__ __forceinline__ uint32_t round_to_16_bits(float value, DType dtype) {
    return dtype == DType::bf16 ? __bfloat16_as_ushort(__float2bfloat16_rn(value))
                                : __half_as_ushort(__float2half_rn(value));
}

// Four neighbouring channels; the number of channels is a multiple of four.
__device__ __forceinline__ void store_quad(const W4a16& p, int token, int n, const float (&y)[4]) {
    const size_t index = static_cast<size_t>(token) * p.outputs + n;
    if (p.out_dtype == DType::f32) {
        *reinterpret_cast<float4*>(static_cast<float*>(p.out) + index) = make_float4(y[0], y[1], y[2], y[3]);
        return;
    }
    uint32_t bits[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) bits[i] = round_to_16_bits(y[i], p.out_dtype);
    *reinterpret_cast<uint2*>(static_cast<uint16_t*>(p.out) + index) =
        make_uint2(bits[0] | bits[1] << 16, bits[2] | bits[3] << 16);
}

}  // namespace nk::cuda
