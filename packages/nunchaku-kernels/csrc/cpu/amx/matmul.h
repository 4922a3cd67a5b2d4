// bf16 tokens times panels of bf16 pairs with AMX tiles: products exact, sums in fp32. A panel is a column of B tiles
// as it lies in memory; tokens are A tiles. Inputs are summed in portions of 32 from the first on, whatever the number
// of tokens: a token's result does not depend on its neighbours.
#pragma once

#include "../../numerics/layout.h"
#include "tiles.h"

namespace nk::cpu {
namespace {

constexpr size_t kTileInputs = kRowBytes / sizeof(uint16_t);

// Tiles 0, 1, 2 are sums of `rows` tokens each; 3 and 4 tokens and panel of 32 inputs, 5 and 6 of the last `rest`.
class MatmulShapes : public TileShapes {
public:
    MatmulShapes(size_t rows, size_t rest) {
        for (size_t tile = 0; tile < 4; ++tile) set(tile, rows);
        set(4, kTileTokens);
        if (rest) {
            set(5, rows, rest * 2);
            set(6, rest / 2);
        }
        load();
    }
};

// kCount tiles of tokens, in the shapes that are set; tile numbers must be literals.
template <size_t kCount>
NK_INLINE void multiply_tiles(const uint16_t* x, size_t stride, const uint16_t* panel, size_t inputs, float* y,
                              size_t ldy) {
    const size_t x_bytes = stride * sizeof(uint16_t), y_bytes = ldy * sizeof(float);
    const size_t next_x = kTileTokens * stride, next_y = kTileTokens * ldy;
    _tile_loadd(0, y, y_bytes);
    if (kCount > 1) _tile_loadd(1, y + next_y, y_bytes);
    if (kCount > 2) _tile_loadd(2, y + 2 * next_y, y_bytes);
    size_t k = 0;
    for (; k + kTileInputs <= inputs; k += kTileInputs) {
        _tile_loadd(4, panel + k * kStrip, 64);
        _tile_loadd(3, x + k, x_bytes);
        _tile_dpbf16ps(0, 3, 4);
        if (kCount > 1) {
            _tile_loadd(3, x + next_x + k, x_bytes);
            _tile_dpbf16ps(1, 3, 4);
        }
        if (kCount > 2) {
            _tile_loadd(3, x + 2 * next_x + k, x_bytes);
            _tile_dpbf16ps(2, 3, 4);
        }
    }
    if (k < inputs) {
        _tile_loadd(6, panel + k * kStrip, 64);
        _tile_loadd(5, x + k, x_bytes);
        _tile_dpbf16ps(0, 5, 6);
        if (kCount > 1) {
            _tile_loadd(5, x + next_x + k, x_bytes);
            _tile_dpbf16ps(1, 5, 6);
        }
        if (kCount > 2) {
            _tile_loadd(5, x + 2 * next_x + k, x_bytes);
            _tile_dpbf16ps(2, 5, 6);
        }
    }
    _tile_stored(0, y, y_bytes);
    if (kCount > 1) _tile_stored(1, y + next_y, y_bytes);
    if (kCount > 2) _tile_stored(2, y + 2 * next_y, y_bytes);
}

void matmul_bf16(const uint16_t* x, size_t stride, size_t tokens, const uint16_t* panel, size_t inputs, float* y,
                 size_t ldy) {
    const size_t rest = inputs % kTileInputs, whole = tokens / kTileTokens * kTileTokens;
    size_t m = 0;
    if (whole) {
        const MatmulShapes shapes(kTileTokens, rest);
        for (; m + 3 * kTileTokens <= whole; m += 3 * kTileTokens)
            multiply_tiles<3>(x + m * stride, stride, panel, inputs, y + m * ldy, ldy);
        for (; m < whole; m += kTileTokens) multiply_tiles<1>(x + m * stride, stride, panel, inputs, y + m * ldy, ldy);
    }
    if (m < tokens) {
        const MatmulShapes shapes(tokens - m, rest);
        multiply_tiles<1>(x + m * stride, stride, panel, inputs, y + m * ldy, ldy);
    }
}

}  // namespace
}  // namespace nk::cpu
