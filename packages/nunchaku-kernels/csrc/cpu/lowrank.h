// Low-rank factors from the published order to strips of 16 columns, whose rows are the summation index. A strip is
// contiguous: rows that are a power of two apart would fall into a few sets of the first-level cache.
#pragma once

#include "kernels.h"
#include "ops.h"

namespace nk::cpu {

enum class LowrankSide { down, up };

// Calls unpack(tile, position in the strips) for all tiles of channels [begin, begin + channels), whose number is
// rounded up to 16.
//   down: strips [rank / 16][channel][16]      up: strips [channel / 16][rank][16]
template <class Unpack>
void for_each_tile(FloatTensor factor, size_t rank, size_t begin, size_t channels, LowrankSide side,
                   const Unpack& unpack) {
    const size_t tile_bytes = 256 * size_of(static_cast<DType>(factor.dtype));
    const size_t down_strip = (channels + 15) / 16 * 16 * 16;
    for (size_t c = 0; c < channels; c += 16)
        for (size_t r = 0; r < rank; r += 16) {
            const char* tile =
                static_cast<const char*>(factor.data) + ((begin + c) / 16 * (rank / 16) + r / 16) * tile_bytes;
            unpack(tile, side == LowrankSide::down ? r / 16 * down_strip + c * 16 : c * rank + r * 16);
        }
}

// To fp32 strips.
inline void unpack_lowrank(const Kernels& kernels, FloatTensor factor, size_t rank, size_t begin, size_t channels,
                           LowrankSide side, float* strips) {
    const DType dtype = static_cast<DType>(factor.dtype);
    for_each_tile(factor, rank, begin, channels, side,
                  [&](const void* tile, size_t position) { kernels.lowrank_tile(tile, dtype, strips + position, 16); });
}

// The strips of a bf16 factor with each pair of rows interleaved, [..][2][16] to [..][16][2]: panels of `matmul_bf16`.
inline void unpack_lowrank_pairs(const Kernels& kernels, FloatTensor factor, size_t rank, size_t begin, size_t channels,
                                 LowrankSide side, uint16_t* strips) {
    for_each_tile(factor, rank, begin, channels, side, [&](const void* tile, size_t position) {
        kernels.lowrank_pairs(static_cast<const uint16_t*>(tile), strips + position);
    });
}

}  // namespace nk::cpu
