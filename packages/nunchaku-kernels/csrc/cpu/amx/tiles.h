// What AMX kernels share: the shapes of tiles, and tokens in tile order.
#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#include "../generic/vec.h"
#include "../kernels.h"

namespace nk::cpu {
namespace {

// Sets tile shapes for the calling thread while it lives; a tile that is not set may not be used.
class TileShapes {
public:
    void set(size_t tile, size_t rows, size_t bytes = kTileRowBytes) {
        rows_[tile] = static_cast<uint8_t>(rows);
        bytes_[tile] = static_cast<uint16_t>(bytes);
    }
    void load() const {
        asm volatile("" : : "r"(this) : "memory");  // GCC thinks that the instruction reads a pointer only
        _tile_loadconfig(this);
    }
    ~TileShapes() { _tile_release(); }

private:
    uint8_t palette_ = 1, start_row_ = 0, reserved_[14] = {};
    uint16_t bytes_[16] = {};
    uint8_t rows_[16] = {};
};
static_assert(sizeof(TileShapes) == 64, "the operand of ldtilecfg");

void pack_tokens(const char* tokens, ptrdiff_t stride, size_t count, size_t bytes, char* tiles) {
    for (size_t k = 0; k < bytes; k += kTileRowBytes)
        for (size_t m = 0; m < kTileTokens; ++m, tiles += kTileRowBytes)
            _mm512_store_si512(tiles, m < count ? load<__m512i>(tokens + static_cast<ptrdiff_t>(m) * stride + k)
                                                : _mm512_setzero_si512());
}

}  // namespace
}  // namespace nk::cpu
