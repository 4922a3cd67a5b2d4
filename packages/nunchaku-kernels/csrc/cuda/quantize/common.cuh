// What both quantise kernels share: their arguments, how x and the factors lie in registers and shared memory, and the
// arithmetic of an element.
#pragma once

#include <cuda_fp16.h>

#include <algorithm>
#include <type_traits>

#include "../../check.h"
#include "../../numerics/dtype.h"
#include "../../numerics/layout.h"
#include "../kernels.h"
#include "../ptx/arithmetic.h"
#include "../ptx/async_copy.h"
#include "../ptx/mma.h"
#include "../tail.cuh"

namespace nk::cuda::quantize {

constexpr int kWarps = 8, kThreads = 32 * kWarps;
constexpr int kGroupSize = static_cast<int>(kGroup);
constexpr int kRankTiles = 2;  // 16-rank tiles that share one sweep
constexpr int kReciprocalBytes = kGroupSize * 4;
constexpr int kMaximaBytes = 128;  // one word per token, and the slots behind them stay aligned for the swizzle

struct Parameters {
    const char* x;
    int64_t tokens, channels, row_bytes;
    bool x_aligned;  // rows begin on 16 bytes and hold whole 16-byte pieces
    int groups;
    const void* smooth;
    DType smooth_dtype;
    float shift;
    const uint4* proj_down;  // one A fragment of a lane each
    int rank;
    int8_t* codes;
    float* ascales;
    void* lora_act;
    DType lora_dtype;
    int slots;               // of each warp
    bool partials_separate;  // low-rank sums do not go where x was, because further sweeps need it
    int tile_tokens;         // of quantize_resident, whose `slots` are those of a CTA
};

// Without what depends on the kernel.
inline Parameters parameters(const QuantizeArguments& a) {
    const DType dtype = static_cast<DType>(a.x.dtype);
    const int64_t element_bytes = static_cast<int64_t>(size_of(dtype));
    require(!a.rank || (a.proj_down.dtype == a.x.dtype && dtype != DType::f32), "proj_down_dtype",
            "the 16-bit dtype of x", a.proj_down.dtype);
    require(aligned(a.codes), "codes", "an address that is a multiple of 16", reinterpret_cast<intptr_t>(a.codes));
    require(aligned(a.proj_down.data), "proj_down", "an address that is a multiple of 16",
            reinterpret_cast<intptr_t>(a.proj_down.data));
    Parameters p{};
    p.x = static_cast<const char*>(a.x.data);
    p.tokens = a.tokens, p.channels = a.channels, p.row_bytes = a.tokens > 1 ? a.stride * element_bytes : 0;
    p.x_aligned = aligned(a.x.data) && p.row_bytes % 16 == 0 && a.channels * element_bytes % 16 == 0;
    p.groups = static_cast<int>(a.padded_k / kGroupSize);
    p.smooth = a.smooth.data, p.smooth_dtype = static_cast<DType>(a.smooth.dtype);
    p.shift = a.shift;
    p.proj_down = static_cast<const uint4*>(a.proj_down.data);
    p.rank = static_cast<int>(a.rank);
    p.codes = a.codes, p.ascales = a.ascales, p.lora_act = a.lora_act;
    p.lora_dtype = static_cast<DType>(a.proj_down.dtype);
    return p;
}

// A CTA by itself: its barrier is the only one, and its shared memory the only one to read.
struct Alone {
    static constexpr int kLargest = 1;

    static __device__ uint32_t size() { return 1; }
    static __device__ uint32_t rank() { return 0; }
    static __device__ void arrive() {}
    static __device__ void arrive_relaxed() {}
    static __device__ void wait() { __syncthreads(); }
    static __device__ void raise(uint32_t* word, uint32_t value) { atomicMax(word, value); }
    static __device__ float4 load(const char* address, uint32_t) { return *reinterpret_cast<const float4*>(address); }
};

template <int kElementBytes, int kTokens>
constexpr int kSlotBytes = kTokens* kGroupSize* kElementBytes + kReciprocalBytes;

// A warp's low-rank sums of one sweep; they fit where a slot keeps its 16-bit x.
template <int kTokens>
constexpr int kPartialBytes = kTokens* kRankTiles * 16 * 4;

// One 64-group of kTokens tokens in shared memory. 16-byte pieces of a row are permuted, so that the eight rows that a
// warp reads at once lie in different banks. Behind them 1 / smooth in published order, 0 for padding.
template <class Element, int kTokens>
struct Slot {
    static constexpr int kRowBytes = kGroupSize * sizeof(Element), kPieces = kRowBytes / 16;
    char* data;

    __device__ char* piece(int row, int index) const {
        return data + row * kRowBytes + (index ^ row % 8 * static_cast<int>(sizeof(Element) / 2)) * 16;
    }
    __device__ float* reciprocals() const { return reinterpret_cast<float*>(data + kTokens * kRowBytes); }
};

template <class Element>
__device__ __forceinline__ float2 unpacked(uint32_t word) {
    if constexpr (std::is_same_v<Element, BF16>)
        return {__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u)};
    else
        return __half22float2(reinterpret_cast<const __half2&>(word));
}

// What a lane holds of 8 tokens x 64 channels: of token lane / 4 the channels 8 b + 2 (lane % 4) + {0, 1}, b = 0 .. 7.
// For 16-bit types these are the B fragments of four m16n8k16 products.
template <class Element>
struct Fragment {
    uint32_t words[8];

    template <int kTokens>
    __device__ Fragment(Slot<Element, kTokens> slot, int tile) {
        const int lane = threadIdx.x % 32;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            uint32_t matrices[4];
            ptx::ldmatrix_x4(matrices, ptx::shared_address(slot.piece(tile * 8 + lane % 8, half * 4 + lane / 8)));
#pragma unroll
            for (int i = 0; i < 4; ++i) words[half * 4 + i] = matrices[i];
        }
    }
    __device__ float2 pair(int b) const { return unpacked<Element>(words[b]); }
};

template <>
struct Fragment<float> {
    float2 pairs[8];

    template <int kTokens>
    __device__ Fragment(Slot<float, kTokens> slot, int tile) {
        const int lane = threadIdx.x % 32;
#pragma unroll
        for (int b = 0; b < 8; ++b)
            pairs[b] =
                *reinterpret_cast<const float2*>(slot.piece(tile * 8 + lane / 4, b * 2 + lane % 4 / 2) + lane % 2 * 8);
    }
    __device__ float2 pair(int b) const { return pairs[b]; }
};

// 1 / smooth of the channels of a Fragment: published order keeps the four of a 16-block together.
struct Reciprocals {
    float4 blocks[4];

    template <class Element, int kTokens>
    __device__ explicit Reciprocals(Slot<Element, kTokens> slot) {
#pragma unroll
        for (int i = 0; i < 4; ++i)
            blocks[i] = reinterpret_cast<const float4*>(slot.reciprocals())[i * 4 + threadIdx.x % 4];
    }
    __device__ float2 pair(int b) const {
        return b % 2 ? make_float2(blocks[b / 2].z, blocks[b / 2].w) : make_float2(blocks[b / 2].x, blocks[b / 2].y);
    }
};

// A fragments of a 64-group; zeros for tiles beyond the rank.
struct Factors {
    uint32_t a[4][kRankTiles][4];

    __device__ Factors(const Parameters& p, int group, int first_tile) {
        const int lane = threadIdx.x % 32, tiles = p.rank / 16;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
#pragma unroll
            for (int tile = 0; tile < kRankTiles; ++tile) {
                uint4 words{};
                if (first_tile + tile < tiles) {
                    const int64_t index = int64_t{group * 4 + i} * tiles + first_tile + tile;
                    words = __ldg(p.proj_down + index * 32 + lane);
                }
                // Published order has the two k halves of a row together, the instruction the two rows of a k half.
                a[i][tile][0] = words.x, a[i][tile][1] = words.z, a[i][tile][2] = words.y, a[i][tile][3] = words.w;
            }
        }
    }
};
struct NoFactors {};

__device__ __forceinline__ float smoothed(float x, float shift, float reciprocal) {
    return __fmul_rn(__fadd_rn(x, shift), reciprocal);
}

// From the maximum of a token, as bits: numerics.md, "w4a8".
struct TokenScale {
    float inverse;     // 127 / maximum
    uint32_t keep;     // all ones, or zero where all codes are 0
    float activation;  // what a code is worth

    __device__ explicit TokenScale(uint32_t maximum_bits) {
        constexpr uint32_t kInfinity = 0x7f800000u;
        const float maximum = __uint_as_float(maximum_bits);
        inverse = __fdiv_rn(127.0f, maximum);
        const bool finite = maximum_bits < kInfinity, usable = finite && __float_as_uint(inverse) != kInfinity;
        keep = usable ? ~0u : 0u;
        activation = usable ? __fdiv_rn(maximum, 127.0f) : finite ? 1.0f : __uint_as_float(0x7fc00000u);
    }
};

// A code in the low byte. In [2^23, 2^24) the spacing is 1: adding 1.5 * 2^23 rounds to an integer, half to even.
__device__ __forceinline__ uint32_t rounded(float t, float inverse) {
    return __float_as_uint(__fadd_rn(__fmul_rn(t, inverse), 12582912.0f));
}

__device__ __forceinline__ uint32_t low_bytes(const uint32_t (&words)[4]) {
    return __byte_perm(__byte_perm(words[0], words[1], 0x0040), __byte_perm(words[2], words[3], 0x0040), 0x5410);
}

// The 16 code bytes of a token that the lane with lane % 4 = u stores at byte 16 u of the 64-group, from the codes of
// its Fragment. w4a8_code_position alternates channels of two lanes, u and u ^ 2; the lower takes channels 0 .. 31.
__device__ __forceinline__ uint4 permuted_codes(const uint32_t (&codes)[8][2]) {
    uint32_t packed[4];
#pragma unroll
    for (int i = 0; i < 4; ++i)
        packed[i] = low_bytes({codes[2 * i][0], codes[2 * i][1], codes[2 * i + 1][0], codes[2 * i + 1][1]});
    const bool upper = threadIdx.x & 2;
    const uint32_t even = upper ? 0x1504 : 0x5140, odd = upper ? 0x3726 : 0x7362;
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const uint32_t own = upper ? packed[2 + i] : packed[i];
        const uint32_t other = __shfl_xor_sync(~0u, upper ? packed[i] : packed[2 + i], 2);
        words[2 * i] = __byte_perm(own, other, even);
        words[2 * i + 1] = __byte_perm(own, other, odd);
    }
    return {words[0], words[1], words[2], words[3]};
}

__device__ __forceinline__ float load_smooth_at(const Parameters& p, int64_t position) {  // branchless: loads overlap
    const bool wide = p.smooth_dtype == DType::f32;
    const uint32_t bits = wide ? __ldg(static_cast<const uint32_t*>(p.smooth) + position)
                               : __ldg(static_cast<const uint16_t*>(p.smooth) + position);
    const float half = __half2float(__ushort_as_half(static_cast<uint16_t>(bits)));
    return p.smooth_dtype == DType::f16 ? half : __uint_as_float(wide ? bits : bits << 16);
}

// The lane's two neighbours in published order, ones where there is no vector.
__device__ __forceinline__ float2 load_smooth(const Parameters& p, int group) {
    const int64_t position = int64_t{group} * kGroupSize + threadIdx.x % 32 * 2;
    return p.smooth ? make_float2(load_smooth_at(p, position), load_smooth_at(p, position + 1)) : make_float2(1, 1);
}

__device__ __forceinline__ void store_reciprocals(const Parameters& p, int group, float2 smooth, float* reciprocals) {
    const int position = threadIdx.x % 32 * 2;
    const int64_t k = int64_t{group} * kGroupSize + position / 16 * 16 + position % 16 / 4 * 2 + position % 4 / 2 * 8;
    reinterpret_cast<float2*>(reciprocals)[threadIdx.x % 32] = {k < p.channels ? __fdiv_rn(1.0f, smooth.x) : 0.0f,
                                                                k + 1 < p.channels ? __fdiv_rn(1.0f, smooth.y) : 0.0f};
}

// Fewer unfinished copies than allowed are always right.
__device__ __forceinline__ void wait_until_pending(int allowed) {
    switch (allowed) {
        case 0:
            return ptx::wait_for_copies<0>();
        case 1:
            return ptx::wait_for_copies<1>();
        case 2:
            return ptx::wait_for_copies<2>();
        case 3:
            return ptx::wait_for_copies<3>();
        case 4:
            return ptx::wait_for_copies<4>();
        case 5:
            return ptx::wait_for_copies<5>();
        case 6:
            return ptx::wait_for_copies<6>();
        case 7:
            return ptx::wait_for_copies<7>();
        default:
            return allowed < 16 ? ptx::wait_for_copies<8>() : ptx::wait_for_copies<16>();
    }
}

// A low-rank sum, in the dtype in which the product will multiply it.
__device__ __forceinline__ void store_sum(const Parameters& p, int64_t token, int rank, float sum) {
    store_1(p.lora_act, p.lora_dtype, static_cast<size_t>(token * p.rank + rank), sum);
}

// A team's fp32 sums of kRankTiles tiles, added over its warps in a fixed order, to lora_act. `partials` are those of
// this CTA's first warp, as accumulators of mma lanes; those of the next one are `stride` bytes on.
template <int kTokens, class Team>
__device__ void add_partials(const Parameters& p, const char* partials, int stride, int first_tile,
                             int64_t first_token) {
    const int share = kTokens * kRankTiles * 4 / static_cast<int>(Team::size());
    const int index = static_cast<int>(Team::rank()) * share + static_cast<int>(threadIdx.x);
    const int lane = index % 32, tile = first_tile + index / 32 % kRankTiles;
    if (static_cast<int>(threadIdx.x) >= share || tile * 16 >= p.rank) return;
    float4 sum{};
    for (uint32_t cta = 0; cta < Team::size(); ++cta) {
#pragma unroll
        for (int warp = 0; warp < kWarps; ++warp) {
            const float4 part = Team::load(partials + warp * stride + index * 16, cta);
            sum.x += part.x, sum.y += part.y, sum.z += part.z, sum.w += part.w;
        }
    }
    const int64_t token = first_token + index / 32 / kRankTiles * 8 + lane % 4 * 2;
    const int rank = tile * 16 + lane / 4;
    if (token < p.tokens) store_sum(p, token, rank, sum.x), store_sum(p, token, rank + 8, sum.z);
    if (token + 1 < p.tokens) store_sum(p, token + 1, rank, sum.y), store_sum(p, token + 1, rank + 8, sum.w);
}

}  // namespace nk::cuda::quantize
