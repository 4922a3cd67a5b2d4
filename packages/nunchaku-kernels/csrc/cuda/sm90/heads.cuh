// RMS norm and rotary embedding of a finished tile that holds one attention head of 128 channels.
#pragma once

#include <cstdint>

#include "../ptx/shared.h"
#include "../tail.cuh"

namespace nk::cuda::sm90 {

constexpr int kHeadChannels = 128;

// What is done with the heads of a fused q, k and v projection. Without heads the outputs are an ordinary matrix.
struct Heads {
    int count;   // of q; as many of k and v
    int tokens;  // of a sample: those of the samples follow one another
    float eps;
    bool has_norm;        // of q and k; their weights are in shared memory
    const float* rotary;  // cosine and sine of [tokens, 64] pairs of channels, or null
};

// In place, on rows of 64 channels in the 128-byte swizzle, the second half of a head `second_half` bytes on: eight
// lanes to a token, 16 channels each. `weights` is the address of 128 floats. `warp` counts the warps that do it.
template <int columns, int warps, bool is_bf16>
__device__ __forceinline__ void finish_head(const Heads& heads, uint32_t rows, uint32_t second_half, uint32_t weights,
                                            int first_token, int all_tokens, int warp, int lane) {
    constexpr DType dtype = is_bf16 ? DType::bf16 : DType::f16;
    const int piece = lane % 8;
    float weight[16];
#pragma unroll
    for (int i = 0; i < 16; ++i)
        weight[i] = heads.has_norm ? ptx::load_shared_float(weights + 4 * (i / 8 * 64 + 8 * piece + i % 8)) : 1.0f;
#pragma unroll 2
    for (int row = 4 * warp + lane / 8; row < columns; row += 4 * warps) {
        const int token = min(first_token + row, all_tokens - 1);
        float rotary[2][8];  // cosine and sine of four pairs
        if (heads.rotary) {
            const size_t place = static_cast<size_t>(token % heads.tokens) * kHeadChannels + 8 * piece;
            load_8(heads.rotary, DType::f32, place, rotary[0]);
            load_8(heads.rotary, DType::f32, place + 64, rotary[1]);
        }
        const uint32_t address = rows + row * 128 + 16 * (piece ^ row % 8);
        float x[16];
        uint4 words[2] = {ptx::load_shared_16(address), ptx::load_shared_16(address + second_half)};
        float squares = 0.0f;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const uint32_t word = (&words[i / 4].x)[i % 4];
            const float2 pair = unpack_half(word, dtype);
            x[2 * i] = pair.x, x[2 * i + 1] = pair.y;
            squares += pair.x * pair.x + pair.y * pair.y;
        }
        if (heads.has_norm) {
#pragma unroll
            for (int distance = 1; distance < 8; distance *= 2) squares += __shfl_xor_sync(~0u, squares, distance);
            const float factor = rsqrtf(squares * (1.0f / kHeadChannels) + heads.eps);
#pragma unroll
            for (int i = 0; i < 16; ++i) x[i] *= factor * weight[i];
        }
        if (heads.rotary) {
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                const float cosine = rotary[i / 4][i % 4 * 2], sine = rotary[i / 4][i % 4 * 2 + 1];
                const float real = x[2 * i], imaginary = x[2 * i + 1];
                x[2 * i] = real * cosine - imaginary * sine;
                x[2 * i + 1] = imaginary * cosine + real * sine;
            }
        }
#pragma unroll
        for (int i = 0; i < 8; ++i)
            (&words[i / 4].x)[i % 4] = is_bf16 ? pack_bf16(x[2 * i], x[2 * i + 1]) : pack_f16(x[2 * i], x[2 * i + 1]);
        ptx::store_shared_16(address, words[0]);
        ptx::store_shared_16(address + second_half, words[1]);
    }
}

}  // namespace nk::cuda::sm90
