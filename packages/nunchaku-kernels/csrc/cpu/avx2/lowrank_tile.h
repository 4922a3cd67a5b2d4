// Low-rank tiles from the published order: eight rows of eight elements are transposed in registers.
#pragma once

#include "transpose.h"

namespace nk::cpu {
namespace {

template <class T>
void transpose_tile(const T* tile, float* dst, size_t ld) {
    // A row of eight holds [row half][column half][column % 2] of one (row % 8, column % 8 / 2).
    for (size_t pair = 0; pair < 4; ++pair) {
        __m256i rows[8];
        for (size_t row = 0; row < 8; ++row)
            rows[row] = reinterpret_cast<__m256i>(load_floats(tile + row * 32 + pair * 8));
        transpose_8x8(rows);
        for (size_t i = 0; i < 8; ++i) {
            const size_t row_half = i / 4, column = i / 2 % 2 * 8 + pair * 2 + i % 2;
            store(dst + column * ld + row_half * 8, rows[i]);
        }
    }
}

void lowrank_tile(const void* tile, DType dtype, float* dst, size_t ld) {
    with_element_type(dtype, [&](auto type) { transpose_tile(static_cast<const decltype(type)*>(tile), dst, ld); });
}

}  // namespace
}  // namespace nk::cpu
