// What an instruction set must provide. One table per instruction set, each filled in a translation unit of its own
// (cpu/<isa>.cpp) and compiled with that instruction set's flags; drivers pick a table at run time and stay portable.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../numerics/dtype.h"

namespace nk::cpu {

// A W4A8 weight panel: int8 [channels / 16][inputs / 4][16][4]. Four consecutive inputs of one channel sit in one
// 32-bit word, the operand order of vpmaddubsw, vpdpbusd and AMX tiles alike.
constexpr size_t kPanelChannels = 128;
constexpr size_t kPanelInputs = 2048;

enum class Activation : int { none = 0, gelu_tanh = 1, silu = 2 };

// One token's slice of an epilogue operand; absent if data is null.
struct RowOperand {
    const void* data;
    DType dtype;
};

// Four neighbouring output channels in AWQ order. Scales and zeros are fp32 copies, [groups][scale_stride] from the
// first channel on; the weights they give are rounded to `dtype`.
struct AwqQuad {
    const uint16_t* words;
    const float *scales, *zeros;
    size_t scale_stride, inputs, group_size;
    DType dtype;
};

// Products in matrix tiles. A tile is 1 KB: of tokens, 16 rows of 64 bytes of inputs; of a panel, 16 rows that hold the
// same inputs for 16 channels, in words of 32 bits (four int8, or two bf16 inputs). Work is cut into blocks of inputs:
// the tokens' tiles are [block][16 tokens][64 bytes of the block], a panel's [16 channels][64 bytes of the block].
constexpr size_t kTileTokens = 16, kTileRowBytes = 64;
constexpr size_t kTileInputBytes = 1024;  // of a block; 32 tokens of it fit the first-level cache

struct TileKernels {
    // Up to 16 tokens, `stride` bytes apart, to tiles; `bytes` of inputs, a multiple of 64. Absent tokens are zeros.
    void (*pack_tokens)(const char* tokens, ptrdiff_t stride, size_t count, size_t bytes, char* tiles);

    // Inputs [k0, k0 + inputs) of `quads` <= 4 neighbouring quads to a panel of 16 channels; multiples of 64. Channels
    // of missing quads hold anything.
    void (*awq_decode_bf16)(const AwqQuad& first, size_t quads, size_t k0, size_t inputs, uint16_t* panel);

    // sums[16 tiles tokens, 16 strips channels] (+)= tokens panel^T over one block of inputs: fp32 sums of bf16, exact
    // int32 sums of int8. The sums' rows are `stride` elements apart, tiles of tokens `next_tile` bytes.
    void (*multiply_bf16)(const void* tokens, size_t next_tile, size_t tiles, const void* panel, size_t strips,
                          size_t bytes, bool accumulate, void* sums, size_t stride);
    void (*multiply_int8)(const void* tokens, size_t next_tile, size_t tiles, const void* panel, size_t strips,
                          size_t bytes, bool accumulate, void* sums, size_t stride);
};

struct Kernels {
    const char* name;

    // dst[i] = float(src[i]), and back with one rounding.
    void (*to_float)(const void* src, DType dtype, size_t count, float* dst);
    void (*from_float)(const float* src, DType dtype, size_t count, void* dst);

    // c[tokens, columns] (+)= a[tokens, inner] b[inner, columns] in fp32; columns a multiple of 16.
    void (*matmul)(const float* a, size_t lda, size_t tokens, const float* b, size_t ldb, size_t inner, size_t columns,
                   bool accumulate, float* c, size_t ldc);

    // One 16 x 16 tile of a low-rank factor from the published order, transposed: dst[column * ld + row].
    void (*lowrank_tile)(const void* tile, DType dtype, float* dst, size_t ld);

    // Row scales [16] and multipliers [16, groups] of one strip of 16 channels (numerics/w4a8.h), whose codes and group
    // scales begin at `qweight` and `wscales` in the published order. `scales` and `largest` are scratch for 16 *
    // groups.
    void (*fold_strip)(const uint8_t* qweight, const void* wscales, DType dtype, size_t groups, float* scales,
                       uint8_t* largest, float* row_scales, int16_t* multipliers);

    // One token to int8 (design: numerics, section w4a8). `reciprocal` is 1 / smooth in natural order, or null; `t` is
    // scratch for `channels` floats. Returns the token's scale.
    float (*quantize_token)(const float* x, size_t channels, float shift, const float* reciprocal, float* t,
                            int8_t* codes);

    // Channels [n0, n0 + channels) x inputs [k0, k0 + inputs) of a published weight into a panel; multiples of 16, 64.
    void (*decode_panel)(const uint8_t* qweight, const int16_t* multipliers, size_t padded_k, size_t n0,
                         size_t channels, size_t k0, size_t inputs, int8_t* panel);

    // sums[tokens, channels] (+)= codes[tokens, inputs] panel^T in exact int32; inputs at most kPanelInputs.
    void (*accumulate_panel)(const int8_t* codes, size_t stride, size_t tokens, const int8_t* panel, size_t channels,
                             size_t inputs, bool accumulate, int32_t* sums);

    // y[n] = float(sums[n]) * ascale * row_scales[n] (* wcscales[n]) (+ bias[n]); channels a multiple of 16.
    void (*dequantize_row)(const int32_t* sums, float ascale, const float* row_scales, const float* wcscales,
                           const float* bias, size_t channels, float* y);

    // out = round(residual + gate * activation(y)); overwrites y. Up to kPanelChannels channels.
    void (*finish_row)(float* y, size_t channels, Activation activation, RowOperand gate, RowOperand residual,
                       void* out, DType out_dtype);

    // Weights of a quad as fp32: dst[input * ld + channel], channel 0..3.
    void (*awq_decode)(const AwqQuad& quad, float* dst, size_t ld);

    // y[token * ldy + channel] += x[token, :] . weights of the quad's channel; x rows are contiguous. For few tokens,
    // where decoding dominates; null where awq_decode and matmul are as good.
    void (*awq_product)(const AwqQuad& quad, const float* x, size_t tokens, float* y, size_t ldy);

    // The trio awq_decode, matmul and lowrank_tile for bf16 factors and bf16 tokens, on a panel[input / 2][16][2] for
    // an even number of inputs; decoding AWQ fills four of the 16 channels, a low-rank tile [column / 2][row][column %
    // 2]. y[tokens, 16] is added to. All null where the processor has no bf16 products; decoding AWQ also where tiles
    // do it.
    void (*awq_decode_bf16)(const AwqQuad& quad, uint16_t* panel);
    void (*matmul_bf16)(const uint16_t* x, size_t stride, size_t tokens, const uint16_t* panel, size_t inputs, float* y,
                        size_t ldy);
    void (*lowrank_pairs)(const uint16_t* tile, uint16_t* panel);

    // sums[0] = sum |previous - (current - origin)|, sums[1] = sum |previous|; the difference current - origin is
    // rounded to `dtype`, a null origin is 0.
    void (*l1_change)(const void* current, const void* origin, const void* previous, DType dtype, size_t channels,
                      float* sums);

    const TileKernels* tiles;  // null where the processor has none
};

}  // namespace nk::cpu
