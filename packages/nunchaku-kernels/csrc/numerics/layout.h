// Published ("fragment") order of 4-bit checkpoints as index arithmetic. All sizes are in elements; see the
// packing specification, sections 1, 2, 4 and 6, for the same formulas in closed form.
#pragma once

#include <cstddef>

#include "dtype.h"

namespace nk {

constexpr size_t kGroup = 64;          // input channels that share one int4 weight scale
constexpr size_t kChannelBlock = 128;  // output channels of one weight tile
constexpr size_t kStrip = 16;          // output channels of one sub-tile
constexpr size_t kStripBytes = kStrip * kGroup / 2;

// Section 1. Byte offset of the (16 channels x 64 inputs) sub-tile that holds weight (n, k).
NK_FUNCTION size_t qweight_strip_offset(size_t n, size_t k, size_t padded_k) {
    const size_t tile = n / kChannelBlock * (padded_k / kGroup) + k / kGroup;
    return (tile * 8 + n % kChannelBlock / kStrip) * kStripBytes;
}

// Section 1. Nibble index of element (n % 16, k % 64) inside its sub-tile; even nibbles are the low half of a byte.
NK_FUNCTION size_t qweight_strip_nibble(size_t n, size_t k) {
    return ((n % 8 * 4 + k % 32 / 8) * 4 + n % 16 / 8 * 2 + k % 64 / 32) * 8 + k % 8;
}

// Section 2. Position of group scale (n, g) in `wscales`; a vector is the same with one group.
NK_FUNCTION size_t group_scale_position(size_t n, size_t g, size_t groups) {
    return (n / 128 * groups + g) * 128 + n % 128 / 16 * 16 + n % 8 / 2 * 4 + n % 16 / 8 * 2 + n % 2;
}

NK_FUNCTION size_t vector_position(size_t n) { return group_scale_position(n, 0, 1); }

// Section 4. Position of element (row, column) inside a 16 x 16 tile of a low-rank factor. Row is the rank index and
// column the channel for `proj_down`; row is the channel and column the rank index for `proj_up`.
NK_FUNCTION size_t lowrank_tile_position(size_t row, size_t column) {
    return row % 8 * 32 + column % 8 / 2 * 8 + row / 8 * 4 + column / 8 * 2 + column % 2;
}

// Where the W4A8 codes of an activation keep input channel k on CUDA: permuted inside its 64-group, so that the codes
// of a published weight word (eight inputs) land in registers as mma fragments without a shuffle. A lane of the
// product's B fragment (k32, channels 4q .. 4q+3 and 16 + 4q ..) then meets inputs 32j + 8q + {0, 4, 1, 5} and + {2, 6,
// 3, 7}.
NK_FUNCTION size_t w4a8_code_position(size_t k) {
    const size_t half = k % 64 / 32, quad = k % 32 / 8;
    const size_t nibble_rank = k % 4 * 2 + k % 8 / 4;  // the low nibbles of both 16-bit halves of a word, then the next
    return k / 64 * 64 + half * 32 + nibble_rank / 4 * 16 + quad * 4 + nibble_rank % 4;
}

// Where the W4A8 multiplier of (n, g) lies on CUDA: those of 128 channels and one group together, the two channels of
// a strip whose weights the same lane holds side by side.
NK_FUNCTION size_t w4a8_multiplier_position(size_t n, size_t g, size_t groups) {
    return (n / 128 * groups + g) * 128 + n % 128 / 16 * 16 + n % 8 * 2 + n % 16 / 8;
}

// Section 6. Index of the 16-bit word of 4-bit weight (n, k) in the AWQ order, and the nibble inside that word.
NK_FUNCTION size_t awq_word(size_t n, size_t k, size_t in_features) {
    return (n / 4 * (in_features / 64) + k / 64) * 64 + n % 4 * 16 + k % 64 / 32 * 8 + k % 8;
}
NK_FUNCTION size_t awq_nibble(size_t k) { return k % 32 / 8; }

}  // namespace nk
