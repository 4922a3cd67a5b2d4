// quantize_tokens: any dtype, stride, rank and number of channels.
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

#include "common.cuh"

namespace nk::cuda::quantize {

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

}  // namespace nk::cuda::quantize
