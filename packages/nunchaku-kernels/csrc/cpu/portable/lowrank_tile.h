// Low-rank tiles from the published order, element by element.
#pragma once

#include "../../numerics/layout.h"

namespace nk::cpu {
namespace {

void lowrank_tile(const void* tile, DType dtype, float* dst, size_t ld) {
    for (size_t column = 0; column < 16; ++column)
        for (size_t row = 0; row < 16; ++row)
            dst[column * ld + row] = load_float(tile, dtype, lowrank_tile_position(row, column));
}

}  // namespace
}  // namespace nk::cpu
