// Low-rank tiles of 16-bit elements from the published order to panels of pairs: words are transposed in registers.
#pragma once

#include "transpose.h"

namespace nk::cpu {
namespace {

void lowrank_pairs(const uint16_t* tile, uint16_t* panel) {
    // Sixteen words of each row % 8: [column % 8 / 2][row half][column half], a word being two neighbouring columns.
    for (size_t part = 0; part < 2; ++part) {
        __m256i rows[8];
        for (size_t row = 0; row < 8; ++row) rows[row] = load<__m256i>(tile + row * 32 + part * 16);
        transpose_8x8(rows);
        for (size_t i = 0; i < 8; ++i) {
            const size_t pair = i % 2 * 4 + part * 2 + i / 4, row_half = i / 2 % 2;
            store(panel + (pair * 16 + row_half * 8) * 2, rows[i]);
        }
    }
}

}  // namespace
}  // namespace nk::cpu
