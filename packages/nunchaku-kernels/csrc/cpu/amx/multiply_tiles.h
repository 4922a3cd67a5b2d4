// Tokens in tiles times panels in tiles, two by two: four sums stay in registers and every tile that is loaded is used
// twice. Inputs are summed in portions of 64 bytes from the first on, whatever the number of tokens: a token's result
// does not depend on its neighbours.
#pragma once

#include "tiles.h"

namespace nk::cpu {
namespace {

constexpr size_t kTileBytes = kTileTokens * kTileRowBytes;

enum class Element { int8, bf16 };

// The numbers of tiles must be literals, which a template parameter is not to every compiler.
#define NK_MULTIPLY(sums, tokens, panel)       \
    if constexpr (kElement == Element::int8) { \
        _tile_dpbssd(sums, tokens, panel);     \
    } else {                                   \
        _tile_dpbf16ps(sums, tokens, panel);   \
    }

// The arguments of a product (kernels.h) in bytes.
struct Operands {
    const char* tokens;
    size_t next_tile;
    const char* panel;
    size_t strips, steps;  // of 64 bytes of inputs
    bool accumulate;
    char* sums;
    size_t row_bytes;
};

// Panel and sums are loaded as streams, which leaves the first-level cache to the tokens: each tile of tokens there
// meets all strips.

// kTokens x kStrips tiles of sums (0-3) from tile `m` and strip `s` on, over all steps, with tiles of tokens (4, 5) and
// panel (6, 7). Every step fetches `share` bytes from `ahead` on.
template <Element kElement, size_t kTokens, size_t kStrips>
NK_INLINE void multiply_block(const Operands& o, size_t m, size_t s, const char* ahead, size_t share) {
    const char *t0 = o.tokens + m * o.next_tile, *t1 = t0 + o.next_tile;
    const char *w0 = o.panel + s * o.steps * kTileBytes, *w1 = w0 + o.steps * kTileBytes;
    char* y0 = o.sums + m * kTileTokens * o.row_bytes + s * kTileRowBytes;
    char* y1 = y0 + kTileTokens * o.row_bytes;
    if (o.accumulate) {
        _tile_stream_loadd(0, y0, o.row_bytes);
        if (kStrips > 1) _tile_stream_loadd(1, y0 + kTileRowBytes, o.row_bytes);
        if (kTokens > 1) _tile_stream_loadd(2, y1, o.row_bytes);
        if (kTokens > 1 && kStrips > 1) _tile_stream_loadd(3, y1 + kTileRowBytes, o.row_bytes);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (size_t offset = 0; offset < o.steps * kTileBytes; offset += kTileBytes) {
        for (const char* end = ahead + share; ahead < end; ahead += kTileRowBytes) _mm_prefetch(ahead, _MM_HINT_T0);
        _tile_loadd(4, t0 + offset, kTileRowBytes);
        _tile_stream_loadd(6, w0 + offset, kTileRowBytes);
        NK_MULTIPLY(0, 4, 6)
        if (kStrips > 1) {
            _tile_stream_loadd(7, w1 + offset, kTileRowBytes);
            NK_MULTIPLY(1, 4, 7)
        }
        if (kTokens > 1) {
            _tile_loadd(5, t1 + offset, kTileRowBytes);
            NK_MULTIPLY(2, 5, 6)
            if (kStrips > 1) {
                NK_MULTIPLY(3, 5, 7)
            }
        }
    }
    _tile_stored(0, y0, o.row_bytes);
    if (kStrips > 1) _tile_stored(1, y0 + kTileRowBytes, o.row_bytes);
    if (kTokens > 1) _tile_stored(2, y1, o.row_bytes);
    if (kTokens > 1 && kStrips > 1) _tile_stored(3, y1 + kTileRowBytes, o.row_bytes);
}

#undef NK_MULTIPLY

// kTokens tiles of tokens with all strips; those tokens stay in the first-level cache meanwhile, and the next ones are
// fetched.
template <Element kElement, size_t kTokens>
NK_INLINE void multiply_row(const Operands& o, size_t m) {
    const char* ahead = o.tokens + (m + kTokens) * o.next_tile;
    const size_t share = kTokens * kTileBytes / ((o.strips + 1) / 2);
    size_t s = 0;
    for (; s + 2 <= o.strips; s += 2, ahead += o.steps * share)
        multiply_block<kElement, kTokens, 2>(o, m, s, ahead, share);
    if (s < o.strips) multiply_block<kElement, kTokens, 1>(o, m, s, ahead, share);
}

template <Element kElement>
void multiply_tiles(const void* tokens, size_t next_tile, size_t tiles, const void* panel, size_t strips, size_t bytes,
                    bool accumulate, void* sums, size_t stride) {
    TileShapes shapes;
    for (size_t tile = 0; tile < 8; ++tile) shapes.set(tile, kTileTokens);
    shapes.load();
    const Operands o = {static_cast<const char*>(tokens),
                        next_tile,
                        static_cast<const char*>(panel),
                        strips,
                        bytes / kTileRowBytes,
                        accumulate,
                        static_cast<char*>(sums),
                        stride * sizeof(int32_t)};
    size_t m = 0;
    for (; m + 2 <= tiles; m += 2) multiply_row<kElement, 2>(o, m);
    if (m < tiles) multiply_row<kElement, 1>(o, m);
}

}  // namespace
}  // namespace nk::cpu
