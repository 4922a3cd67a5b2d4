// The warps of quantize_stream that turn tiles into codes.
#pragma once

#include <cuda_bf16.h>

#include "stream_place.cuh"

namespace nk::cuda::quantize {

template <class Element>
__device__ __forceinline__ uint32_t packed(float low, float high) {
    if constexpr (std::is_same_v<Element, BF16>) {
        const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
        return reinterpret_cast<const uint32_t&>(pair);
    } else {
        const __half2 pair = __floats2half2_rn(low, high);
        return reinterpret_cast<const uint32_t&>(pair);
    }
}

__device__ __forceinline__ float4 load_shared_float4(uint32_t address) {
    const uint4 v = ptx::load_shared_16(address);
    return {__uint_as_float(v.x), __uint_as_float(v.y), __uint_as_float(v.z), __uint_as_float(v.w)};
}

// In chunk c of a warp, a lane has channels 8 (lane % 8) .. + 7 of tokens lane / 8 and lane / 8 + 4. What is known of a
// whole token, lanes with lane % 8 < 4 know of the first one, the others of the second.
template <class T, class Combine>
__device__ __forceinline__ T over_lanes(T first, T second, Combine combine) {
    const bool upper = threadIdx.x & 4;
    T value = upper ? second : first;
    value = combine(value, __shfl_xor_sync(~0u, upper ? first : second, 4));
    value = combine(value, __shfl_xor_sync(~0u, value, 1));
    return combine(value, __shfl_xor_sync(~0u, value, 2));
}

// The other way: values of both tokens.
template <class T>
__device__ __forceinline__ void of_both(T value, T (&both)[2]) {
    const T other = __shfl_xor_sync(~0u, value, 4);
    const bool upper = threadIdx.x & 4;
    both[0] = upper ? other : value, both[1] = upper ? value : other;
}

// The maxima, or behind a norm the moments, of a tile's tokens over all channels: each warp leaves its own in shared
// memory, a warp adds up what the CTA has and sends it to all CTAs.
template <class Place>
struct StreamExchange {
    const Place& place;
    int half, warp;  // of a tile, of the group

    __device__ void meet() const { ptx::sync_threads<kGroupWarps * 32>(2 + half); }

    __device__ uint32_t maximum(uint32_t own, int turn) const {
        const int lane = threadIdx.x % 32, token = lane / 8 + lane % 8 / 4 * 4;
        const int to = turn % 2;
        auto& shared = place.shared;
        const uint32_t barrier = place.barrier(shared.maxima_received[half], to);
        if (lane % 4 == 0) shared.warp_maxima[half][warp][token] = own;
        meet();
        if (warp == 0) {
            if (lane == 0) ptx::arrive_expecting(barrier, place.ctas * kHalfTokens * 4);
            // A lane has four tokens of one warp, at the end those of all warps, for one CTA.
            const int four = lane % 2, of_cta = lane / 2;
            uint4 largest = *reinterpret_cast<const uint4*>(&shared.warp_maxima[half][of_cta % kGroupWarps][four * 4]);
#pragma unroll
            for (int bit = 2; bit < 16; bit *= 2)
                for (uint32_t* word : {&largest.x, &largest.y, &largest.z, &largest.w})
                    *word = max(*word, __shfl_xor_sync(~0u, *word, bit));
            if (of_cta < place.ctas)
                ptx::send_16(
                    ptx::address_in_cta(ptx::shared_address(&shared.maxima[half][to][place.cta][four * 4]), of_cta),
                    largest, ptx::address_in_cta(barrier, of_cta));
        }
        ptx::wait(barrier, turn / 2 % 2);
        uint32_t bits = max(shared.maxima[half][to][lane % 4][token], shared.maxima[half][to][lane % 4 + 4][token]);
        bits = max(bits, __shfl_xor_sync(~0u, bits, 1));
        return max(bits, __shfl_xor_sync(~0u, bits, 2));
    }

    // From the warp's mean and its part of the variance around that: mean and variance of the token.
    __device__ float2 moments(float2 own, int turn) const {
        const int lane = threadIdx.x % 32, token = lane / 8 + lane % 8 / 4 * 4;
        const int to = turn % 2;
        auto& shared = place.shared;
        const uint32_t barrier = place.barrier(shared.moments_received[half], to);
        if (lane % 4 == 0) shared.warp_moments[half][warp][token] = own;
        meet();
        if (warp == 0) {
            if (lane == 0) ptx::arrive_expecting(barrier, place.ctas * kHalfTokens * 8);
            // A lane has two tokens of one warp, at the end those of all warps, for one CTA.
            const int two = lane % 4, of_cta = lane / 4;
            const auto over_warps = [](float2 v) {
#pragma unroll
                for (int bit = 4; bit < 32; bit *= 2)
                    v.x += __shfl_xor_sync(~0u, v.x, bit), v.y += __shfl_xor_sync(~0u, v.y, bit);
                return v;
            };
            const float4 part = *reinterpret_cast<const float4*>(&shared.warp_moments[half][of_cta][two * 2]);
            const float weight = shared.warp_weights[of_cta], of_all = shared.cta_weights[place.cta] * weight;
            const float2 mean = over_warps({weight * part.x, weight * part.z});
            const float2 variance = over_warps({part.y + of_all * (part.x - mean.x) * (part.x - mean.x),
                                                part.w + of_all * (part.z - mean.y) * (part.z - mean.y)});
            const uint4 words{__float_as_uint(mean.x), __float_as_uint(variance.x), __float_as_uint(mean.y),
                              __float_as_uint(variance.y)};
            if (of_cta < place.ctas)
                ptx::send_16(
                    ptx::address_in_cta(ptx::shared_address(&shared.moments[half][to][place.cta][two * 2]), of_cta),
                    words, ptx::address_in_cta(barrier, of_cta));
        }
        ptx::wait(barrier, turn / 2 % 2);
        const auto over_ctas = [](float value) {
            value += __shfl_xor_sync(~0u, value, 1);
            return value + __shfl_xor_sync(~0u, value, 2);
        };
        const int one = lane % 4, other = one + 4;
        const float2 a = shared.moments[half][to][one][token], b = shared.moments[half][to][other][token];
        const float a_weight = shared.cta_weights[one], b_weight = shared.cta_weights[other];
        const float mean = over_ctas(a_weight * a.x + b_weight * b.x);
        return {mean,
                over_ctas(a.y + b.y + a_weight * (a.x - mean) * (a.x - mean) + b_weight * (b.x - mean) * (b.x - mean))};
    }
};

template <class Element, int kChunks, bool low_rank, bool norm>
__device__ void quantize_halves(const StreamPlace<kChunks, low_rank, norm>& place) {
    using Place = StreamPlace<kChunks, low_rank, norm>;
    const StreamParameters& stream = place.stream;
    const Parameters& p = stream.common;
    auto& shared = place.shared;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % kGroupWarps, half = threadIdx.x / 32 / kGroupWarps;
    const int row = lane / 8, piece = lane % 8, slice = warp / 2;
    const int cta_chunk = place.cta * stream.cta_chunks, first_chunk = cta_chunk + warp * kChunks;
    const auto chunks_until = [&](int end) {
        return max(0, min(kChunks, min(end, cta_chunk + stream.cta_chunks) - first_chunk));
    };
    const int stored = chunks_until(p.groups), given = chunks_until(static_cast<int>(p.channels) / kGroupSize);
    const bool has_slice = slice < place.slices;
    const StreamExchange<Place> exchange{place, half, warp};
    const int64_t code_row = int64_t{p.groups} * kGroupSize;
    // Of a block of 32 channels, lanes of a pair swap words: the even one stores from the first 16 bytes of the codes,
    // the odd one from the others.
    int8_t* const codes =
        p.codes + int64_t{first_chunk} * kGroupSize + piece / 4 * 32 + piece % 2 * 16 + piece % 4 / 2 * 8;
    const uint32_t own_reciprocals = place.reciprocals + (warp * kChunks * 16 + piece) * 16;
    const uint32_t own_x = place.ring + warp % 2 * kChunks * kChunkBytes + row * kRowBytes + (piece ^ row) * 16;
    const auto x_at = [&](uint32_t place_of_x, int c, int i) {  // the swizzle of a row four below differs in one bit
        return (i ? (place_of_x + 4 * kRowBytes) ^ 64 : place_of_x) + c * kChunkBytes;
    };

    StreamTiles tiles = place.tiles();
    StreamSlot slot{0, 0, stream.slots};
    slot.advance(min(slice, place.slices - 1));
    int turn = 0;
#pragma unroll 1
    for (; tiles.left(); tiles.advance(), slot.advance(place.slices)) {
        const int first = tiles.first + half * kHalfTokens, tokens = tiles.tokens - half * kHalfTokens;
        const uint32_t freed = place.barrier(shared.freed, slot.index);
        if (has_slice) ptx::wait(place.barrier(shared.arrived, slot.index), slot.parity);
        if (tokens <= 0) {    // a tile's second half may be empty
            exchange.meet();  // as every tile makes them: a warp may not be two phases of a barrier ahead
            if (has_slice && lane == 0) {
                ptx::arrive(freed);
                if (norm && low_rank) ptx::arrive(place.barrier(shared.modulated, slot.index));
            }
            continue;
        }
        const uint32_t place_of_x = own_x + slot.index * Place::kSliceBytes + half * kHalfTokens * kRowBytes;
        float values[kChunks][2][8];
        {
            uint4 x[kChunks][2];
#pragma unroll
            for (int c = 0; c < kChunks; ++c)
#pragma unroll
                for (int i = 0; i < 2; ++i) x[c][i] = ptx::load_shared_16(x_at(place_of_x, c, i), c < given);
            if (!(norm && low_rank) && has_slice) {
                ptx::fence_async_proxy();  // copies overwrite what is read here
                __syncwarp();
                if (lane == 0) ptx::arrive(freed);
            }
#pragma unroll
            for (int c = 0; c < kChunks; ++c)
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    const uint32_t words[4] = {x[c][i].x, x[c][i].y, x[c][i].z, x[c][i].w};
#pragma unroll
                    for (int j = 0; j < 4; ++j) {
                        const float2 pair = unpacked<Element>(words[j]);
                        values[c][i][2 * j] = pair.x, values[c][i][2 * j + 1] = pair.y;
                    }
                }
        }

        if constexpr (norm) {
            const auto add = [](float a, float b) { return a + b; };
            float sums[2]{}, means[2], squares[2]{};
#pragma unroll
            for (int c = 0; c < kChunks; ++c)
#pragma unroll
                for (int j = 0; j < 8; ++j)
#pragma unroll
                    for (int i = 0; i < 2; ++i) sums[i] += values[c][i][j];
            const float inverse_channels = given ? 1.0f / static_cast<float>(given * kGroupSize) : 0.0f;
            const float mean = over_lanes(sums[0], sums[1], add) * inverse_channels;
            of_both(mean, means);
#pragma unroll
            for (int c = 0; c < kChunks; ++c)
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    const float centre = c < given ? means[i] : 0.0f;  // what is not there is zero
#pragma unroll
                    for (int j = 0; j < 8; ++j) {
                        const float around = values[c][i][j] - centre;
                        squares[i] = fmaf(around, around, squares[i]);
                    }
                }
            const float variance = over_lanes(squares[0], squares[1], add) * (1.0f / static_cast<float>(p.channels));
            const int64_t offset =
                (int64_t{tiles.row} * p.channels + (given ? int64_t{first_chunk} * kGroupSize + piece * 8 : 0)) * 2;
            const float2 moments = exchange.moments({mean, variance}, turn);
            float deviations[2];  // their reciprocals
            const float deviation = rsqrtf(moments.y + stream.eps);
            of_both(deviation, deviations), of_both(-moments.x * deviation, means);
#pragma unroll
            for (int c = 0; c < kChunks; ++c) {
                const int of = max(0, min(c, given - 1)) * kRowBytes;  // branchless, so that loads overlap
                const uint4 scales = __ldg(reinterpret_cast<const uint4*>(stream.scale + offset + of));
                const uint4 shifts = __ldg(reinterpret_cast<const uint4*>(stream.shift + offset + of));
                const uint32_t scale[4] = {scales.x, scales.y, scales.z, scales.w};
                const uint32_t shift[4] = {shifts.x, shifts.y, shifts.z, shifts.w};
                uint32_t words[2][4];
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    const float2 a = unpacked<Element>(scale[j]), b = unpacked<Element>(shift[j]);
#pragma unroll
                    for (int i = 0; i < 2; ++i) {
                        float(&v)[8] = values[c][i];
                        words[i][j] =
                            packed<Element>(fmaf(fmaf(v[2 * j], deviations[i], means[i]), 1.0f + a.x, b.x),
                                            fmaf(fmaf(v[2 * j + 1], deviations[i], means[i]), 1.0f + a.y, b.y));
                        const float2 pair = unpacked<Element>(words[i][j]);
                        v[2 * j] = pair.x, v[2 * j + 1] = pair.y;
                    }
                }
                if (low_rank && c < given)
#pragma unroll
                    for (int i = 0; i < 2; ++i)
                        ptx::store_shared_16(x_at(place_of_x, c, i),
                                             {words[i][0], words[i][1], words[i][2], words[i][3]});
            }
            if (low_rank && has_slice) {
                ptx::fence_async_proxy();  // wgmma reads what was stored
                __syncwarp();
                if (lane == 0) ptx::arrive(place.barrier(shared.modulated, slot.index)), ptx::arrive(freed);
            }
        }

        float largest[2][2]{};
#pragma unroll
        for (int c = 0; c < kChunks; ++c)
#pragma unroll
            for (int quad = 0; quad < 2; ++quad) {
                const float4 four = load_shared_float4(own_reciprocals + (c * 16 + quad * 8) * 16);
                const float reciprocals[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
                for (int j = 0; j < 4; ++j)
#pragma unroll
                    for (int i = 0; i < 2; ++i) {
                        float& value = values[c][i][quad * 4 + j];
                        // Behind a norm there is no shift.
                        value = norm ? __fmul_rn(value, reciprocals[j]) : smoothed(value, p.shift, reciprocals[j]);
                        largest[i][j % 2] = ptx::max_magnitude(largest[i][j % 2], value);
                    }
            }
        const auto maximum = [](uint32_t a, uint32_t b) { return max(a, b); };
        const uint32_t own = over_lanes(__float_as_uint(ptx::max_magnitude(largest[0][0], largest[0][1])),
                                        __float_as_uint(ptx::max_magnitude(largest[1][0], largest[1][1])), maximum);
        const TokenScale token(exchange.maximum(own, turn));
        const int own_token = row + piece / 4 * 4;
        if (place.cta == 0 && warp == 0 && piece % 4 == 0 && own_token < tokens)
            p.ascales[first + own_token] = token.activation;
        float inverses[2];
        uint32_t keep[2];
        of_both(token.inverse, inverses), of_both(token.keep, keep);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            int8_t* const out = codes + (int64_t{first} + row + i * 4) * code_row;
#pragma unroll
            for (int c = 0; c < kChunks; ++c) {
                uint32_t bytes[8];
#pragma unroll
                for (int j = 0; j < 8; ++j) bytes[j] = rounded(values[c][i][j], inverses[i]);
                const uint32_t low = low_bytes({bytes[0], bytes[4], bytes[1], bytes[5]}) & keep[i];
                const uint32_t high = low_bytes({bytes[2], bytes[6], bytes[3], bytes[7]}) & keep[i];
                const uint32_t got = __shfl_xor_sync(~0u, piece % 2 ? low : high, 1);
                if (row + i * 4 < tokens && c < stored)
                    *reinterpret_cast<uint2*>(out + c * kGroupSize) =
                        piece % 2 ? make_uint2(got, high) : make_uint2(low, got);
            }
        }
        ++turn;
    }
}

}  // namespace nk::cuda::quantize
