// The kernels behind w4a8_quantize: smoothing, token maximum, int8 and low-rank down projection in one pass over x.
//
// quantize_resident is for 16-bit x with aligned rows and a rank of at most 32: all of a team's x is in flight at once
// and stays in shared memory, tiles have any number of tokens, so that they divide evenly among the multiprocessors.
// quantize_tokens does everything else.
//
// A team (one CTA, or a cluster of CTAs) takes kTokens tokens, each of its warps every n-th 64-group of their channels.
// A warp copies its groups into slots of shared memory that no other warp reads, so it waits for its own copies only,
// and meets the others twice: to agree on the token maxima and to add up the low-rank sums. The slots keep x between
// the sweep that finds the maxima and the one that rounds. Where they are fewer than the groups, sweeps alternate in
// direction: each begins with what the one before left in the slots, and reads the rest again.
//
// Tensor cores multiply the low-rank factor, 16 ranks a tile (A), with the tokens (B). Lanes smooth and round the
// elements of their B fragments, whose channels (pairs 2u, 2u + 1 of every eight) make 16-byte stores of permuted
// codes.
#pragma once

#include <cuda_fp16.h>

#include <algorithm>
#include <type_traits>

#include "../check.h"
#include "../numerics/dtype.h"
#include "../numerics/layout.h"
#include "kernels.h"
#include "ptx/arithmetic.h"
#include "ptx/async_copy.h"
#include "ptx/mma.h"

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
    float* lora_act;
    int slots;               // of each warp
    bool partials_separate;  // low-rank sums do not go where x was, because further sweeps need it
    int tile_tokens;         // of quantize_resident, whose `slots` are those of a CTA
};

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

// One warp's share of a team's tokens.
template <class Element, int kTokens, class Team>
class Worker {
public:
    using TokenSlot = Slot<Element, kTokens>;

    __device__ Worker(const Parameters& p, char* shared)
        : p_(p),
          first_(static_cast<int64_t>(blockIdx.x / Team::size()) * kTokens),
          worker_(static_cast<int>(Team::rank()) * kWarps + static_cast<int>(threadIdx.x) / 32),
          workers_(static_cast<int>(Team::size()) * kWarps),
          count_((p.groups - worker_ + workers_ - 1) / workers_),
          slots_(shared + threadIdx.x / 32 * p.slots * kSlotBytes<sizeof(Element), kTokens>) {}

    __device__ int64_t first_token() const { return first_; }

    // Begins the copies of the first groups.
    __device__ void start() {
        for (int i = 0; i < p_.slots; ++i) {
            if (i < count_) fetch(i);
            ptx::commit_copies();
        }
        // The vector's latency is paid once for several slots; meanwhile x is on its way.
        constexpr int kBatch = 4;
        for (int first = 0; first < p_.slots; first += kBatch) {
            float2 smooth[kBatch];
#pragma unroll
            for (int i = 0; i < kBatch; ++i)
                if (first + i < min(p_.slots, count_)) smooth[i] = load_smooth(first + i);
#pragma unroll
            for (int i = 0; i < kBatch; ++i)
                if (first + i < min(p_.slots, count_)) store_reciprocals(first + i, smooth[i]);
        }
    }

    // Visits every group with visit(prefetched, group, slot), prefetched = prefetch(group) before x has arrived.
    template <class Prefetch, class Visit>
    __device__ void sweep(bool forward, Prefetch prefetch, Visit visit) {
        for (int n = 0; n < count_; ++n) {
            const int i = forward ? n : count_ - 1 - n;
            const auto prefetched = prefetch(group(i));
            wait_until_pending(p_.slots - 1);
            __syncwarp();
            visit(prefetched, group(i), slot(i));
            __syncwarp();
            const int next = forward ? i + p_.slots : i - p_.slots;
            if (0 <= next && next < count_) {
                fetch(next);
                store_reciprocals(next, load_smooth(next));
            }
            ptx::commit_copies();
        }
    }

private:
    __device__ int group(int i) const { return worker_ + i * workers_; }
    __device__ TokenSlot slot(int i) const { return {slots_ + i % p_.slots * kSlotBytes<sizeof(Element), kTokens>}; }

    __device__ void fetch(int i) {
        if (p_.x_aligned)
            copy_pieces(slot(i), group(i));
        else
            copy_elements(slot(i), group(i));
    }

    __device__ void copy_pieces(TokenSlot slot, int group) {
        constexpr int kRows = 32 / TokenSlot::kPieces, kElements = 16 / sizeof(Element);
        const int lane = threadIdx.x % 32, index = lane % TokenSlot::kPieces, row = lane / TokenSlot::kPieces;
        const int64_t k = int64_t{group} * kGroupSize + index * kElements;
        const char* source = p_.x + (first_ + row) * p_.row_bytes + k * static_cast<int64_t>(sizeof(Element));
#pragma unroll
        for (int i = 0; i < kTokens; i += kRows) {
            const bool valid = k < p_.channels && first_ + row + i < p_.tokens;
            ptx::copy_16(ptx::shared_address(slot.piece(row + i, index)), valid ? source : p_.x, valid);
            source += kRows * p_.row_bytes;
        }
    }

    __device__ void copy_elements(TokenSlot slot, int group) {
        using Bits = std::conditional_t<sizeof(Element) == 2, uint16_t, uint32_t>;
        constexpr int kElements = 16 / sizeof(Element);
        for (int column = threadIdx.x % 32; column < kGroupSize; column += 32) {
            const int64_t k = int64_t{group} * kGroupSize + column;
#pragma unroll 8
            for (int row = 0; row < kTokens; ++row) {
                const bool valid = k < p_.channels && first_ + row < p_.tokens;
                const Bits* source = reinterpret_cast<const Bits*>(p_.x + (first_ + row) * p_.row_bytes) + k;
                reinterpret_cast<Bits*>(slot.piece(row, column / kElements))[column % kElements] =
                    valid ? *source : Bits{0};
            }
        }
    }

    __device__ float2 load_smooth(int i) const { return quantize::load_smooth(p_, group(i)); }
    __device__ void store_reciprocals(int i, float2 smooth) {
        quantize::store_reciprocals(p_, group(i), smooth, slot(i).reciprocals());
    }

    const Parameters& p_;
    const int64_t first_;
    const int worker_, workers_, count_;
    char* const slots_;
};

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
    float* out = p.lora_act + token * p.rank + tile * 16 + lane / 4;
    if (token < p.tokens) out[0] = sum.x, out[8] = sum.z;
    if (token + 1 < p.tokens) out[p.rank] = sum.y, out[p.rank + 8] = sum.w;
}

template <class Element, int kTokens, bool low_rank, class Team>
__global__ void __launch_bounds__(kThreads, 2) quantize_tokens(const __grid_constant__ Parameters p) {
    static_assert(kTokens % 8 == 0 && kTokens <= 32, "mma tiles of 8 tokens; one word per token in kMaximaBytes");
    static_assert(!low_rank || sizeof(Element) == 2, "tensor cores multiply 16-bit factors");
    constexpr int kTiles = kTokens / 8;
    using TokenSlot = Slot<Element, kTokens>;
    using Prefetched = std::conditional_t<low_rank, Factors, NoFactors>;

    extern __shared__ __align__(128) char shared[];
    uint32_t* const maxima = reinterpret_cast<uint32_t*>(shared);  // bits of max |t|: magnitudes compare like integers
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    Worker<Element, kTokens, Team> worker(p, shared + kMaximaBytes);

    if (threadIdx.x < kTokens) maxima[threadIdx.x] = 0;
    Team::arrive();  // before the copies: a cluster's barrier has a memory fence, which could wait for them
    worker.start();

    float sums[kTiles][kRankTiles][4] = {};
    const auto factors_from = [&](int first_tile) {
        return [&p, first_tile](int group) {
            if constexpr (low_rank)
                return Factors(p, group, first_tile);
            else
                return NoFactors{};
        };
    };
    const auto multiply = [&](const Prefetched& factors, const Fragment<Element>& x, int tile) {
        if constexpr (low_rank) {
            // Tensor cores truncate, which adds up over long rows. Those have tiles of 8 tokens: sum them in fp32.
            constexpr bool kLong = kTokens == 8;
            float group_sums[kRankTiles][4] = {};
#pragma unroll
            for (int i = 0; i < 4; ++i)
#pragma unroll
                for (int ranks = 0; ranks < kRankTiles; ++ranks)
                    ptx::mma_16<std::is_same_v<Element, BF16>>(kLong ? group_sums[ranks] : sums[tile][ranks],
                                                               factors.a[i][ranks], x.words[2 * i], x.words[2 * i + 1]);
            if constexpr (kLong)
#pragma unroll
                for (int ranks = 0; ranks < kRankTiles; ++ranks)
#pragma unroll
                    for (int i = 0; i < 4; ++i) sums[tile][ranks][i] += group_sums[ranks][i];
        }
    };

    float largest[kTiles] = {};
    worker.sweep(true, factors_from(0), [&](const Prefetched& factors, int, TokenSlot slot) {
        const Reciprocals reciprocals(slot);
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
            const Fragment<Element> x(slot, tile);
            multiply(factors, x, tile);
#pragma unroll
            for (int b = 0; b < 8; ++b) {
                const float2 pair = x.pair(b), reciprocal = reciprocals.pair(b);
                largest[tile] = ptx::max_magnitude(largest[tile], smoothed(pair.x, p.shift, reciprocal.x));
                largest[tile] = ptx::max_magnitude(largest[tile], smoothed(pair.y, p.shift, reciprocal.y));
            }
        }
    });

    Team::wait();  // every CTA of the team has set its maxima to zero
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
        uint32_t bits = __float_as_uint(largest[tile]);
        bits = max(bits, __shfl_xor_sync(~0u, bits, 1));
        bits = max(bits, __shfl_xor_sync(~0u, bits, 2));
        if (lane % 4 == tile % 4) Team::raise(maxima + tile * 8 + lane / 4, bits);
    }
    Team::arrive();
    Team::wait();

    if (Team::rank() == 0 && threadIdx.x < kTokens && worker.first_token() + threadIdx.x < p.tokens)
        p.ascales[worker.first_token() + threadIdx.x] = TokenScale(maxima[threadIdx.x]).activation;
    float inverse[kTiles];
    uint32_t keep[kTiles];
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
        const TokenScale scale(maxima[tile * 8 + lane / 4]);
        inverse[tile] = scale.inverse, keep[tile] = scale.keep;
    }
    const auto nothing = [](int) { return NoFactors{}; };
    worker.sweep(false, nothing, [&](NoFactors, int group, TokenSlot slot) {
        const Reciprocals reciprocals(slot);
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
            const Fragment<Element> x(slot, tile);
            uint32_t codes[8][2];
#pragma unroll
            for (int b = 0; b < 8; ++b) {
                const float2 pair = x.pair(b), reciprocal = reciprocals.pair(b);
                codes[b][0] = rounded(smoothed(pair.x, p.shift, reciprocal.x), inverse[tile]);
                codes[b][1] = rounded(smoothed(pair.y, p.shift, reciprocal.y), inverse[tile]);
            }
            uint4 bytes = permuted_codes(codes);
            bytes.x &= keep[tile], bytes.y &= keep[tile], bytes.z &= keep[tile], bytes.w &= keep[tile];
            const int64_t token = worker.first_token() + tile * 8 + lane / 4;
            if (token < p.tokens)
                *reinterpret_cast<uint4*>(p.codes + (token * p.groups + group) * kGroupSize + lane % 4 * 16) = bytes;
        }
    });

    if constexpr (low_rank) {
        const int slots_bytes = p.slots * kSlotBytes<sizeof(Element), kTokens>;
        char* const partials = shared + kMaximaBytes + (p.partials_separate ? kWarps * slots_bytes : 0);
        const int stride = p.partials_separate ? kPartialBytes<kTokens> : slots_bytes;
        bool forward = true;
        for (int first_tile = 0;;) {
#pragma unroll
            for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
                for (int ranks = 0; ranks < kRankTiles; ++ranks) {
                    float(&d)[4] = sums[tile][ranks];
                    reinterpret_cast<float4*>(partials + warp * stride)[(tile * kRankTiles + ranks) * 32 + lane] = {
                        d[0], d[1], d[2], d[3]};
                    d[0] = d[1] = d[2] = d[3] = 0;
                }
            Team::arrive();
            Team::wait();
            add_partials<kTokens, Team>(p, partials, stride, first_tile, worker.first_token());
            Team::arrive();  // partials may be overwritten, or the CTA may end, once all have read them
            Team::wait();
            first_tile += kRankTiles;
            if (first_tile * 16 >= p.rank) break;
            worker.sweep(forward, factors_from(first_tile), [&](const Prefetched& factors, int, TokenSlot slot) {
#pragma unroll
                for (int tile = 0; tile < kTiles; ++tile) multiply(factors, Fragment<Element>(slot, tile), tile);
            });
            forward = !forward;
        }
    }
}

constexpr int kResidentMaximaBytes = 512;  // two words per token of up to 6 tiles, and room behind them
constexpr int kResidentTokens = 40;        // at most

// low-rank sums of kTiles x 8 tokens and 32 ranks
template <int kTiles>
constexpr int kResidentPartialBytes = kTiles * 8 * kRankTiles * 16 * 4;

// Slots as in Slot, but of p.tile_tokens rows; warps take every kCtaWarps-th slot of their CTA. Here the tokens are A
// and the factor is B, whose published order needs no moves: of every 16 channels a lane has 2u, 2u + 1, 2u + 8 and
// 2u + 9 of the tokens lane / 4 + 8 i, and one float4 has their reciprocals. Rows beyond the tile repeat its last.
template <class Element, int kCtaWarps, int kTiles, bool low_rank, class Team>
__global__ void __launch_bounds__(kCtaWarps * 32, 16 / kCtaWarps)
    quantize_resident(const __grid_constant__ Parameters p) {
    constexpr bool kCluster = Team::kLargest > 1;
    constexpr int kPairs = (kTiles + 1) / 2, kBlocks = kRankTiles * 2;  // m16 tiles of tokens, n8 tiles of ranks
    constexpr int kSteps = kGroupSize / 16;
    // A CTA that has its multiprocessor to itself finishes 16 tokens while it waits for the next.
    constexpr int kPhasePairs = kCluster ? kPairs : 1, kPhases = kPairs / kPhasePairs, kPhaseTiles = kPhasePairs * 2;
    extern __shared__ __align__(128) char shared[];
    uint32_t* const own_maxima = reinterpret_cast<uint32_t*>(shared);
    uint32_t* const maxima = kCluster ? own_maxima + kResidentMaximaBytes / 8 : own_maxima;
    char* const slots = shared + kResidentMaximaBytes;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, u = lane % 4;
    const int rows = p.tile_tokens, slot_bytes = rows * kGroupSize * 2 + kReciprocalBytes;
    const int64_t first_token = static_cast<int64_t>(blockIdx.x / Team::size()) * rows;
    const int first_group = static_cast<int>(Team::rank()) * p.slots + warp;
    const int end_group = min(p.groups, static_cast<int>(Team::rank() + 1) * p.slots);
    const int count = max(0, end_group - first_group + kCtaWarps - 1) / kCtaWarps;
    const int step_bytes = kCtaWarps * slot_bytes;
    char* const first_slot = slots + warp * slot_bytes;

    {  // Rows of 16 are a copy group each, so that little is left to do when the last ones arrive.
        const int piece = lane % 8, first_row = lane / 8;
        const int valid_rows = static_cast<int>(min(static_cast<int64_t>(rows), p.tokens - first_token));
        const uint32_t nowhere = ptx::shared_address(shared) + 192;  // unread; keeps copies branchless
        const int64_t first_k = int64_t{first_group} * kGroupSize + piece * 8, row_step = 4 * p.row_bytes;
        const char* phase_source = p.x + (first_token + first_row) * p.row_bytes + first_k * 2;
        // Rows first_row + 8 n and first_row + 4 + 8 n of the first slot.
        const uint32_t even = ptx::shared_address(first_slot) + first_row * 128 + (piece ^ first_row) * 16;
        const uint32_t odd = ptx::shared_address(first_slot) + first_row * 128 + 512 + (piece ^ first_row ^ 4) * 16;
        const int inside_count =
            static_cast<int>(first_k < p.channels ? (p.channels - first_k - 1) / (kCtaWarps * kGroupSize) + 1 : 0);
#pragma unroll 1
        for (int phase = 0; phase < kPhases; ++phase) {
            const int start = phase * kPhasePairs * 16;
            const char* source = phase_source;
            uint32_t offset = start * 128;
#pragma unroll 1
            for (int i = 0; i < count; ++i) {
                const bool inside = i < inside_count;
                const char* row_source = source;
#pragma unroll
                for (int j = 0; j < kPhasePairs * 4; ++j) {
                    const int row = start + first_row + j * 4;
                    const uint32_t to = (j % 2 ? odd : even) + j / 2 * 1024 + offset;
                    ptx::copy_16(row < rows ? to : nowhere, row_source, inside && row < valid_rows);
                    row_source += row_step;
                    if (j % 4 == 3) ptx::commit_copies();
                }
                source += kCtaWarps * kGroupSize * 2;
                offset += step_bytes;
            }
            phase_source += kPhasePairs * 4 * row_step;
        }
    }
    for (int index = threadIdx.x; index < kResidentMaximaBytes / 4; index += kCtaWarps * 32) own_maxima[index] = 0;
    uint4 factors[kSteps][kRankTiles] = {};
    const auto load_factors = [&](int step, int group) {
        if constexpr (low_rank) {
            const int tiles = p.rank / 16;
            const uint4* source = p.proj_down + (int64_t{group * kSteps + step} * tiles) * 32 + lane;
            factors[step][0] = __ldg(source);
            if (tiles > 1) factors[step][1] = __ldg(source + 32);
        }
    };
    if (count > 0)
#pragma unroll
        for (int step = 0; step < kSteps; ++step) load_factors(step, first_group);
    constexpr int kBatch = 4;
    for (int first = 0; first < count; first += kBatch) {
        float2 smooth[kBatch];
#pragma unroll
        for (int i = 0; i < kBatch; ++i)
            if (first + i < count) smooth[i] = load_smooth(p, first_group + (first + i) * kCtaWarps);
#pragma unroll
        for (int i = 0; i < kBatch; ++i)
            if (first + i < count)
                store_reciprocals(
                    p, first_group + (first + i) * kCtaWarps, smooth[i],
                    reinterpret_cast<float*>(first_slot + (first + i) * step_bytes + slot_bytes - kReciprocalBytes));
    }
    __syncthreads();  // maxima are zero

    float sums[kPairs][kBlocks][4] = {};
    const auto multiply = [&](int pair, int step, const uint32_t(&a)[4]) {
#pragma unroll
        for (int ranks = 0; ranks < kRankTiles; ++ranks) {
            const uint4 b = factors[step][ranks];
            ptx::mma_16<std::is_same_v<Element, BF16>>(sums[pair][ranks * 2], a, b.x, b.y);
            ptx::mma_16<std::is_same_v<Element, BF16>>(sums[pair][ranks * 2 + 1], a, b.z, b.w);
        }
    };
    // Where the lane's ldmatrix rows of a tile of 16 or 8 tokens begin.
    const auto offset_of = [&](int row, int piece) {
        row = min(row, rows - 1);
        return static_cast<uint32_t>(row * 128 + (piece ^ row % 8) * 16);
    };
    int pending = count * kPairs;
    float largest[kPhaseTiles] = {};
    // In the last phase also the products of all tokens, so that the factor is read once.
    const auto find_maxima = [&](auto shifted, auto last, int phase) {
        constexpr int kBefore = kPairs - kPhasePairs;
        const auto raise = [&](int tile, uint32_t word, float r0, float r1) {
            const float2 x = unpacked<Element>(word);
            const float t0 = __fmul_rn(decltype(shifted)::value ? __fadd_rn(x.x, p.shift) : x.x, r0);
            const float t1 = __fmul_rn(decltype(shifted)::value ? __fadd_rn(x.y, p.shift) : x.y, r1);
            largest[tile] = ptx::max_magnitude(ptx::max_magnitude(largest[tile], t0), t1);
        };
        constexpr bool products = low_rank && decltype(last)::value;
        uint32_t offsets[kPhasePairs];
#pragma unroll
        for (int pair = 0; pair < kPhasePairs; ++pair)
            offsets[pair] = offset_of((phase * kPhasePairs + pair) * 16 + lane % 16, lane / 16);
        const uint32_t full_offset = lane % 16 * 128 + (lane / 16 ^ lane % 8) * 16;  // of a tile with all its tokens
#pragma unroll 1
        for (int i = 0; i < count; ++i) {
            const char* const slot = first_slot + i * step_bytes;
            const uint32_t address = ptx::shared_address(slot);
            const float4* reciprocals = reinterpret_cast<const float4*>(slot + slot_bytes - kReciprocalBytes) + u;
            if constexpr (products) {
#pragma unroll
                for (int pair = 0; pair < kBefore; ++pair)
#pragma unroll
                    for (int step = 0; step < kSteps; ++step) {
                        uint32_t a[4];
                        ptx::ldmatrix_x4(a, address + pair * 2048 + (full_offset ^ step * 32));
                        multiply(pair, step, a);
                    }
            }
#pragma unroll
            for (int pair = 0; pair < kPhasePairs; ++pair) {
                wait_until_pending(--pending);
                __syncwarp();
#pragma unroll
                for (int step = 0; step < kSteps; ++step) {
                    const float4 r = reciprocals[step * 4];
                    uint32_t a[4];
                    ptx::ldmatrix_x4(a, address + (offsets[pair] ^ step * 32));
                    if constexpr (products) multiply(kBefore + pair, step, a);
                    raise(pair * 2, a[0], r.x, r.y);
                    raise(pair * 2, a[2], r.z, r.w);
                    if (!decltype(last)::value || (kBefore + pair) * 2 + 1 < kTiles) {
                        raise(pair * 2 + 1, a[1], r.x, r.y);
                        raise(pair * 2 + 1, a[3], r.z, r.w);
                    }
                    if (products && pair == kPhasePairs - 1 && i + 1 < count)
                        load_factors(step, first_group + (i + 1) * kCtaWarps);
                }
            }
        }
    };

    const int64_t code_row = int64_t{p.groups} * kGroupSize;
    const int lane_rows = static_cast<int>(min(static_cast<int64_t>(rows), p.tokens - first_token)) - lane / 4;
    const auto round_all = [&](auto shifted, int first_tile) {
        float inverse[kPhaseTiles];
        uint32_t keep[kPhaseTiles], offsets[kPhaseTiles];
#pragma unroll
        for (int tile = 0; tile < kPhaseTiles; ++tile) {
            const TokenScale scale(maxima[(first_tile + tile) * 8 + lane / 4]);
            inverse[tile] = scale.inverse, keep[tile] = scale.keep;
            offsets[tile] = offset_of((first_tile + tile) * 8 + lane % 8, lane / 8);
        }
        int8_t* const first_codes = p.codes + (first_token + first_tile * 8 + lane / 4) * code_row + u * 16;
#pragma unroll 1
        for (int i = 0; i < count; ++i) {
            const char* const slot = first_slot + i * step_bytes;
            const uint32_t address = ptx::shared_address(slot);
            const float4* reciprocals = reinterpret_cast<const float4*>(slot + slot_bytes - kReciprocalBytes) + u;
            float4 r[kSteps];
#pragma unroll
            for (int step = 0; step < kSteps; ++step) r[step] = reciprocals[step * 4];
            int8_t* out = first_codes + int64_t{first_group + i * kCtaWarps} * kGroupSize;
#pragma unroll
            for (int tile = 0; tile < kPhaseTiles; ++tile) {
                if (kTiles % 2 && tile == kPhaseTiles - 1 && first_tile + tile >= kTiles) break;
                uint32_t codes[8][2];
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    uint32_t words[4];
                    ptx::ldmatrix_x4(words, address + (offsets[tile] ^ half * 64));
#pragma unroll
                    for (int j = 0; j < 4; ++j) {
                        const float4 quad = r[half * 2 + j / 2];
                        const float2 x = unpacked<Element>(words[j]);
                        const float t0 = __fmul_rn(decltype(shifted)::value ? __fadd_rn(x.x, p.shift) : x.x,
                                                   j % 2 ? quad.z : quad.x);
                        const float t1 = __fmul_rn(decltype(shifted)::value ? __fadd_rn(x.y, p.shift) : x.y,
                                                   j % 2 ? quad.w : quad.y);
                        codes[half * 4 + j][0] = rounded(t0, inverse[tile]);
                        codes[half * 4 + j][1] = rounded(t1, inverse[tile]);
                    }
                }
                uint4 bytes = permuted_codes(codes);
                bytes.x &= keep[tile], bytes.y &= keep[tile], bytes.z &= keep[tile], bytes.w &= keep[tile];
                if ((first_tile + tile) * 8 < lane_rows) *reinterpret_cast<uint4*>(out) = bytes;
                out += 8 * code_row;
            }
        }
    };

#pragma unroll 1
    for (int phase = 0; phase < kPhases; ++phase) {
        const int first_tile = phase * kPhaseTiles;
#pragma unroll
        for (int tile = 0; tile < kPhaseTiles; ++tile) largest[tile] = 0;
        const auto run = [&](auto last) {
            if (p.shift != 0)
                find_maxima(std::true_type{}, last, phase);
            else
                find_maxima(std::false_type{}, last, phase);  // adding 0 changes neither a magnitude nor a code
        };
        if (kPhases == 1 || phase == kPhases - 1)
            run(std::true_type{});
        else
            run(std::false_type{});
#pragma unroll
        for (int tile = 0; tile < kPhaseTiles; ++tile) {
            uint32_t bits = __float_as_uint(largest[tile]);
            bits = max(bits, __shfl_xor_sync(~0u, bits, 1));
            bits = max(bits, __shfl_xor_sync(~0u, bits, 2));
            if (u == tile % 4) atomicMax(own_maxima + (first_tile + tile) * 8 + lane / 4, bits);
        }
        __syncthreads();
        if constexpr (kCluster) {
            Team::arrive();
            Team::wait();
            const int words = threadIdx.x % 16, cta = threadIdx.x / 16;
            if (words < kTiles * 2 && cta < static_cast<int>(Team::size())) {
                const float4 theirs = Team::load(shared + words * 16, cta);
                atomicMax(maxima + words * 4, __float_as_uint(theirs.x));
                atomicMax(maxima + words * 4 + 1, __float_as_uint(theirs.y));
                atomicMax(maxima + words * 4 + 2, __float_as_uint(theirs.z));
                atomicMax(maxima + words * 4 + 3, __float_as_uint(theirs.w));
            }
            __syncthreads();
        }
        if (p.shift != 0)
            round_all(std::true_type{}, first_tile);
        else
            round_all(std::false_type{}, first_tile);
    }
    if (Team::rank() == 0 && static_cast<int>(threadIdx.x) < rows && first_token + threadIdx.x < p.tokens)
        p.ascales[first_token + threadIdx.x] = TokenScale(maxima[threadIdx.x]).activation;

    if constexpr (low_rank) {
        constexpr int kPartial = kResidentPartialBytes<kTiles>, kFloats2 = kPartial / 8;
        __syncthreads();  // x is read
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
            for (int block = 0; block < kBlocks; ++block) {
                const float(&d)[4] = sums[tile / 2][block];
                reinterpret_cast<float2*>(slots + warp * kPartial)[(tile * kBlocks + block) * 32 + lane] = {
                    d[tile % 2 * 2], d[tile % 2 * 2 + 1]};
            }
        __syncthreads();
        const auto store = [&](int index, float x, float y) {
            const int row = index / 32 / kBlocks * 8 + index % 32 / 4;
            const int column = index / 32 % kBlocks * 8 + index % 4 * 2;
            if (row >= rows || first_token + row >= p.tokens || column >= p.rank) return;
            float* out = p.lora_act + (first_token + row) * p.rank + column;
            out[0] = x, out[1] = y;
        };
        for (int index = threadIdx.x; index < kFloats2; index += kCtaWarps * 32) {
            float2 sum{};
#pragma unroll
            for (int part = 0; part < kCtaWarps; ++part) {
                const float2 v = reinterpret_cast<const float2*>(slots + part * kPartial)[index];
                sum.x += v.x, sum.y += v.y;
            }
            if constexpr (kCluster)
                reinterpret_cast<float2*>(slots + kCtaWarps * kPartial)[index] = sum;
            else
                store(index, sum.x, sum.y);
        }
        if constexpr (kCluster) {
            Team::arrive();
            Team::wait();
            const int size = static_cast<int>(Team::size()), rank = static_cast<int>(Team::rank());
            for (int index = rank * kCtaWarps * 32 + threadIdx.x; index < kFloats2 / 2;
                 index += size * kCtaWarps * 32) {
                float4 parts[Team::kLargest], sum{};
#pragma unroll
                for (int cta = 0; cta < Team::kLargest; ++cta)
                    if (cta < size) parts[cta] = Team::load(slots + kCtaWarps * kPartial + index * 16, cta);
#pragma unroll
                for (int cta = 0; cta < Team::kLargest; ++cta)
                    if (cta < size)
                        sum.x += parts[cta].x, sum.y += parts[cta].y, sum.z += parts[cta].z, sum.w += parts[cta].w;
                store(index * 2, sum.x, sum.y);
                store(index * 2 + 1, sum.z, sum.w);
            }
        }
    }
    if constexpr (kCluster) {  // no CTA ends before the others have read it
        Team::arrive_relaxed();
        Team::wait();
    }
}

// How a device's CTAs share the work: as large a tile of tokens as leaves no multiprocessor idle (each tile reads the
// whole low-rank factor through L2), in clusters large enough that two CTAs per multiprocessor hold all of x.
struct Plan {
    int tokens, team, slots;
    bool resident;
    size_t shared_bytes;
    int64_t ctas;
};

inline int device_attribute(cudaDeviceAttr which) {
    int device = 0, value = 0;
    check(cudaGetDevice(&device), "cudaGetDevice");
    check(cudaDeviceGetAttribute(&value, which, device), "cudaDeviceGetAttribute");
    return value;
}

inline Plan plan_for(int tokens_per_tile, int largest_team, const QuantizeArguments& a) {
    constexpr int kReservedBytes = 1024;  // of every CTA
    const int processors = device_attribute(cudaDevAttrMultiProcessorCount);
    const int element_bytes = static_cast<int>(size_of(static_cast<DType>(a.x.dtype)));
    const int slot_bytes = tokens_per_tile * kGroupSize * element_bytes + kReciprocalBytes;
    const int partial_bytes = a.rank > kRankTiles * 16 ? tokens_per_tile * kRankTiles * 16 * 4 : 0;
    const int room = device_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor) / 2 - kReservedBytes - kMaximaBytes;
    const int slots = std::max(1, (room / kWarps - partial_bytes) / slot_bytes);
    const int64_t groups = a.padded_k / kGroupSize, tiles = (a.tokens + tokens_per_tile - 1) / tokens_per_tile;
    const auto per_warp = [&](int team) { return static_cast<int>((groups + team * kWarps - 1) / (team * kWarps)); };
    int team = 1;
    while (team < largest_team && team * kWarps < groups && (per_warp(team) > slots || tiles * team < processors))
        team *= 2;
    Plan plan{tokens_per_tile, team, std::min(slots, per_warp(team)), per_warp(team) <= slots, 0, tiles * team};
    plan.shared_bytes = kMaximaBytes + static_cast<size_t>(kWarps) * (plan.slots * slot_bytes + partial_bytes);
    return plan;
}

inline Plan plan(int largest_team, const QuantizeArguments& a) {
    constexpr int kOverlappingSlots = 3;  // copies that run ahead, where x does not fit
    const int processors = device_attribute(cudaDevAttrMultiProcessorCount);
    Plan streamed{};
    for (const int tokens : {32, 24}) {
        const Plan candidate = plan_for(tokens, largest_team, a);
        if (candidate.ctas < processors) continue;
        if (candidate.resident) return candidate;
        // Streaming stalls more often: it needs the second CTA of every multiprocessor.
        if (!streamed.tokens && candidate.slots >= kOverlappingSlots && candidate.ctas >= 2 * processors)
            streamed = candidate;
    }
    return streamed.tokens ? streamed : plan_for(8, largest_team, a);
}

template <class Element, bool low_rank, class Team>
void launch_tile(const Plan& plan, const Parameters& p, cudaStream_t stream) {
    const auto run = [&](auto kernel) {
        launch_clusters(plan.team, kernel, dim3(static_cast<unsigned>(plan.ctas)), dim3(kThreads), plan.shared_bytes,
                        stream, "w4a8_quantize", p);
    };
    switch (plan.tokens) {
        case 32:
            return run(quantize_tokens<Element, 32, low_rank, Team>);
        case 24:
            return run(quantize_tokens<Element, 24, low_rank, Team>);
        default:
            return run(quantize_tokens<Element, 8, low_rank, Team>);
    }
}

struct ResidentPlan {
    int tokens, team, slots;  // tokens 0: does not fit
    int64_t tiles, waves;
    size_t shared_bytes;
};

// Tiles as large as fit, evened out over the waves that this takes.
inline ResidentPlan resident_plan_for(int team, const QuantizeArguments& a) {
    const int ctas_per_processor = team > 1 ? 2 : 1;
    const int64_t room = device_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor) / ctas_per_processor - 1024;
    const int64_t groups = a.padded_k / kGroupSize, slots = (groups + team - 1) / team;
    const int64_t largest = std::min<int64_t>(
        kResidentTokens, ((room - kResidentMaximaBytes) / slots - kReciprocalBytes) / (kGroupSize * 2));
    if (largest <= 0) return {};
    // Clusters of 8 leave a few multiprocessors of some devices without one.
    const int64_t processors = device_attribute(cudaDevAttrMultiProcessorCount);
    const int64_t teams = std::max<int64_t>(1, processors * ctas_per_processor / team - (team > 2 ? 1 : 0));
    const int64_t waves = (a.tokens + teams * largest - 1) / (teams * largest);
    const int64_t tokens = std::max<int64_t>(1, (a.tokens + teams * waves - 1) / (teams * waves));
    return {static_cast<int>(tokens), team, static_cast<int>(slots), (a.tokens + tokens - 1) / tokens, waves, 0};
}

inline int resident_tiles(int tokens) { return (tokens + 7) / 8; }

inline ResidentPlan resident_plan(int largest_team, const QuantizeArguments& a) {
    ResidentPlan best = resident_plan_for(1, a);
    const int64_t processors = device_attribute(cudaDevAttrMultiProcessorCount), groups = a.padded_k / kGroupSize;
    const double factor_bytes = 2.0 * a.padded_k * a.rank * best.tiles;
    // Each team reads the whole factor through L2. A CTA that has its multiprocessor to itself overlaps nothing.
    const bool split = !best.tokens || (best.tokens < 16 && (best.waves > 1 || factor_bytes > 40e6)) ||
                       (best.tiles * 4 <= processors && groups >= 32);
    if (split && largest_team > 1) {
        ResidentPlan wide{};
        for (int team = 2; team <= largest_team && team * 2 <= groups; team *= 2) {
            const ResidentPlan candidate = resident_plan_for(team, a);
            if (!candidate.tokens) continue;
            wide = candidate;
            if (candidate.tokens >= 24) break;
        }
        if (wide.tokens) best = wide;
    }
    // Few tokens of long rows would read the factor very often.
    if (a.rank && best.tokens < 4 && best.waves > 1) return {};
    if (!best.tokens) return {};
    const int warps = best.team > 1 ? 8 : 16;
    const size_t partial = a.rank ? size_t(resident_tiles(best.tokens)) * 8 * kRankTiles * 16 * 4 * (warps + 1) : 0;
    best.shared_bytes = kResidentMaximaBytes +
                        std::max(size_t(best.slots) * (best.tokens * kGroupSize * 2 + kReciprocalBytes), partial);
    return best;
}

template <class Element, int kCtaWarps, bool low_rank, class Team>
void launch_resident(const ResidentPlan& plan, const Parameters& p, cudaStream_t stream) {
    const auto run = [&](auto kernel) {
        launch_clusters(plan.team, kernel, dim3(static_cast<unsigned>(plan.tiles * plan.team)), dim3(kCtaWarps * 32),
                        plan.shared_bytes, stream, "w4a8_quantize", p);
    };
    switch (resident_tiles(plan.tokens)) {
        case 1:
            return run(quantize_resident<Element, kCtaWarps, 1, low_rank, Team>);
        case 2:
            return run(quantize_resident<Element, kCtaWarps, 2, low_rank, Team>);
        case 3:
            return run(quantize_resident<Element, kCtaWarps, 3, low_rank, Team>);
        case 4:
            return run(quantize_resident<Element, kCtaWarps, 4, low_rank, Team>);
        default:
            return run(quantize_resident<Element, kCtaWarps, 5, low_rank, Team>);
    }
}

template <class Element, class Team>
void launch_resident_element(const ResidentPlan& plan, Parameters p, cudaStream_t stream) {
    p.tile_tokens = plan.tokens, p.slots = plan.slots;
    if constexpr (Team::kLargest > 1)
        if (plan.team > 1)
            return p.rank ? launch_resident<Element, 8, true, Team>(plan, p, stream)
                          : launch_resident<Element, 8, false, Team>(plan, p, stream);
    p.rank ? launch_resident<Element, 16, true, Alone>(plan, p, stream)
           : launch_resident<Element, 16, false, Alone>(plan, p, stream);
}

template <class Team>
void run(const QuantizeArguments& a, cudaStream_t stream) {
    const DType dtype = static_cast<DType>(a.x.dtype);
    const size_t element_bytes = size_of(dtype);
    require(!a.rank || (a.proj_down.dtype == a.x.dtype && dtype != DType::f32), "proj_down_dtype",
            "the 16-bit dtype of x", a.proj_down.dtype);
    const auto aligned = [](const void* address) { return reinterpret_cast<uintptr_t>(address) % 16 == 0; };
    require(aligned(a.codes), "codes", "an address that is a multiple of 16", reinterpret_cast<intptr_t>(a.codes));
    require(aligned(a.proj_down.data), "proj_down", "an address that is a multiple of 16",
            reinterpret_cast<intptr_t>(a.proj_down.data));
    const int64_t row_bytes = a.tokens > 1 ? a.stride * static_cast<int64_t>(element_bytes) : 0;
    Parameters p{};
    p.x = static_cast<const char*>(a.x.data);
    p.tokens = a.tokens, p.channels = a.channels, p.row_bytes = row_bytes;
    p.x_aligned = aligned(a.x.data) && row_bytes % 16 == 0 && a.channels * element_bytes % 16 == 0;
    p.groups = static_cast<int>(a.padded_k / kGroupSize);
    p.smooth = a.smooth.data, p.smooth_dtype = static_cast<DType>(a.smooth.dtype);
    p.shift = a.shift;
    p.proj_down = static_cast<const uint4*>(a.proj_down.data);
    p.rank = static_cast<int>(a.rank);
    p.codes = a.codes, p.ascales = a.ascales, p.lora_act = a.lora_act;
    if (p.x_aligned && dtype != DType::f32 && a.rank <= kRankTiles * 16) {
        const ResidentPlan resident = resident_plan(Team::kLargest, a);
        if (resident.tokens)
            return dtype == DType::f16 ? launch_resident_element<F16, Team>(resident, p, stream)
                                       : launch_resident_element<BF16, Team>(resident, p, stream);
    }
    const Plan chosen = plan(Team::kLargest, a);
    p.slots = chosen.slots;
    p.partials_separate = p.rank > kRankTiles * 16;
    if (dtype == DType::f32) return launch_tile<float, false, Team>(chosen, p, stream);
    if (dtype == DType::f16)
        return a.rank ? launch_tile<F16, true, Team>(chosen, p, stream)
                      : launch_tile<F16, false, Team>(chosen, p, stream);
    return a.rank ? launch_tile<BF16, true, Team>(chosen, p, stream)
                  : launch_tile<BF16, false, Team>(chosen, p, stream);
}

}  // namespace nk::cuda::quantize
