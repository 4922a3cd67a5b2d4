// bf16 tokens times panels of bf16 pairs with AMX tiles: products exact, sums in fp32. A panel is a column of B tiles
// as it lies in memory; tokens are A tiles. Inputs are summed in portions of 32 from the first on, whatever the number
// of tokens: a token's result does not depend on its neighbours.
#pragma once

#include <immintrin.h>

#include "../../numerics/layout.h"
#include "../generic/vec.h"
#include "../kernels.h"

namespace nk::cpu {
namespace {

constexpr size_t kTileRows = 16, kTileInputs = 32;

// Tiles 0, 1, 2 are sums of `rows` tokens each; 3 and 4 tokens and panel of 32 inputs, 5 and 6 of the last `rest`.
class TileShapes {
public:
    TileShapes(size_t rows, size_t rest) {
        for (size_t sums = 0; sums < 3; ++sums) set(sums, rows, 64);
        set(3, rows, 64);
        set(4, kTileRows, 64);
        if (rest) {
            set(5, rows, rest * 2);
            set(6, rest / 2, 64);
        }
        asm volatile("" : : "r"(this) : "memory");  // GCC thinks that the instruction reads a pointer only
        _tile_loadconfig(this);
    }
    ~TileShapes() { _tile_release(); }

private:
    void set(size_t tile, size_t rows, size_t bytes) {
        rows_[tile] = static_cast<uint8_t>(rows);
        bytes_[tile] = static_cast<uint16_t>(bytes);
    }

    uint8_t palette_ = 1, start_row_ = 0, reserved_[14] = {};
    uint16_t bytes_[16] = {};
    uint8_t rows_[16] = {};
};
static_assert(sizeof(TileShapes) == 64, "the operand of ldtilecfg");

// kCount tiles of tokens, in the shapes that are set; tile numbers must be literals.
template <size_t kCount>
NK_INLINE void multiply_tiles(const uint16_t* x, size_t stride, const uint16_t* panel, size_t inputs, float* y,
                              size_t ldy) {
    const size_t x_bytes = stride * sizeof(uint16_t), y_bytes = ldy * sizeof(float);
    const size_t next_x = kTileRows * stride, next_y = kTileRows * ldy;
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
    const size_t rest = inputs % kTileInputs, whole = tokens / kTileRows * kTileRows;
    size_t m = 0;
    if (whole) {
        const TileShapes shapes(kTileRows, rest);
        for (; m + 3 * kTileRows <= whole; m += 3 * kTileRows)
            multiply_tiles<3>(x + m * stride, stride, panel, inputs, y + m * ldy, ldy);
        for (; m < whole; m += kTileRows) multiply_tiles<1>(x + m * stride, stride, panel, inputs, y + m * ldy, ldy);
    }
    if (m < tokens) {
        const TileShapes shapes(tokens - m, rest);
        multiply_tiles<1>(x + m * stride, stride, panel, inputs, y + m * ldy, ldy);
    }
}

}  // namespace
}  // namespace nk::cpu
