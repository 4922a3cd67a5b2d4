// Tokens in tiles times panels in tiles, two by two: four sums stay in registers and every tile that is loaded is used
// twice. Inputs are summed in portions of 64 bytes from the first on, whatever the number of tokens: a token's result
// does not depend on its neighbours.
#pragma once

#include "tiles.h"

namespace nk::cpu {
namespace {

constexpr size_t kTileBytes = kTileTokens * kRowBytes;

enum class Element { int8, bf16 };

// The numbers of tiles must be literals, which a template parameter is not to every compiler.
#define NK_MULTIPLY(sums, tokens, panel)       \
    if constexpr (kElement == Element::int8) { \
        _tile_dpbssd(sums, tokens, panel);     \
    } else {                                   \
        _tile_dpbf16ps(sums, tokens, panel);   \
    }

// kTokens x kStrips tiles of sums (0-3), over `steps` tiles of tokens (4, 5) and panel (6, 7).
template <Element kElement, size_t kTokens, size_t kStrips>
NK_INLINE void multiply_block(const char* tokens, size_t next_tile, const char* panel, size_t steps, char* sums,
                              size_t row_bytes, const char* ahead, size_t share) {
    const size_t size = steps * kTileBytes, next_sums = kTileTokens * row_bytes;
    _tile_loadd(0, sums, row_bytes);
    if (kStrips > 1) _tile_loadd(1, sums + kRowBytes, row_bytes);
    if (kTokens > 1) _tile_loadd(2, sums + next_sums, row_bytes);
    if (kTokens > 1 && kStrips > 1) _tile_loadd(3, sums + next_sums + kRowBytes, row_bytes);
    for (size_t offset = 0; offset < size; offset += kTileBytes) {
        for (const char* end = ahead + share; ahead < end; ahead += kRowBytes) _mm_prefetch(ahead, _MM_HINT_T0);
        _tile_loadd(4, tokens + offset, kRowBytes);
        _tile_loadd(6, panel + offset, kRowBytes);
        NK_MULTIPLY(0, 4, 6)
        if (kStrips > 1) {
            _tile_loadd(7, panel + size + offset, kRowBytes);
            NK_MULTIPLY(1, 4, 7)
        }
        if (kTokens > 1) {
            _tile_loadd(5, tokens + next_tile + offset, kRowBytes);
            NK_MULTIPLY(2, 5, 6)
            if (kStrips > 1) {
                NK_MULTIPLY(3, 5, 7)
            }
        }
    }
    _tile_stored(0, sums, row_bytes);
    if (kStrips > 1) _tile_stored(1, sums + kRowBytes, row_bytes);
    if (kTokens > 1) _tile_stored(2, sums + next_sums, row_bytes);
    if (kTokens > 1 && kStrips > 1) _tile_stored(3, sums + next_sums + kRowBytes, row_bytes);
}

#undef NK_MULTIPLY

// kTokens tiles of tokens with all strips of a panel; those tokens stay in the first-level cache meanwhile, and the
// next ones are fetched.
template <Element kElement, size_t kTokens>
NK_INLINE void multiply_row(const char* tokens, size_t next_tile, const char* panel, size_t strips, size_t steps,
                            char* sums, size_t row_bytes) {
    const size_t size = steps * kTileBytes;
    const char* ahead = tokens + kTokens * next_tile;
    const size_t share = kTokens * kTileBytes / ((strips + 1) / 2);  // to fetch in every step
    size_t s = 0;
    for (; s + 2 <= strips; s += 2)
        multiply_block<kElement, kTokens, 2>(tokens, next_tile, panel + s * size, steps, sums + s * kRowBytes,
                                             row_bytes, ahead + s / 2 * steps * share, share);
    if (s < strips)
        multiply_block<kElement, kTokens, 1>(tokens, next_tile, panel + s * size, steps, sums + s * kRowBytes,
                                             row_bytes, ahead + s / 2 * steps * share, share);
}

template <Element kElement>
void multiply_tiles(const void* tokens, size_t next_tile, size_t tiles, const void* panel, size_t strips, size_t bytes,
                    void* sums, size_t stride) {
    TileShapes shapes;
    for (size_t tile = 0; tile < 8; ++tile) shapes.set(tile, kTileTokens);
    shapes.load();
    const size_t steps = bytes / kRowBytes, row_bytes = stride * sizeof(int32_t);
    const char *t = static_cast<const char*>(tokens), *w = static_cast<const char*>(panel);
    char* y = static_cast<char*>(sums);
    size_t m = 0;
    for (; m + 2 <= tiles; m += 2)
        multiply_row<kElement, 2>(t + m * next_tile, next_tile, w, strips, steps, y + m * kTileTokens * row_bytes,
                                  row_bytes);
    if (m < tiles)
        multiply_row<kElement, 1>(t + m * next_tile, next_tile, w, strips, steps, y + m * kTileTokens * row_bytes,
                                  row_bytes);
}

}  // namespace
}  // namespace nk::cpu
