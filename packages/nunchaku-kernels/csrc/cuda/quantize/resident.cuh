// quantize_resident: 16-bit x with aligned rows and a rank of at most 32. All of a team's x is in flight at once and
// stays in shared memory; tiles have any number of tokens, so that they divide evenly among the multiprocessors.
#pragma once

#include "common.cuh"

namespace nk::cuda::quantize {

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
                    if (row < rows) ptx::copy_16(to, row_source, inside && row < valid_rows);
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
            store_sum(p, first_token + row, column, x);
            store_sum(p, first_token + row, column + 1, y);
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

}  // namespace nk::cuda::quantize
