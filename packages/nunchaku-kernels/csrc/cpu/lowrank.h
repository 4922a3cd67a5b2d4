// Low-rank factors from the published order to fp32 strips of 16 columns, whose rows are the summation index. A strip
// is contiguous: rows that are a power of two apart would fall into a few sets of the first-level cache.
#pragma once

#include "kernels.h"
#include "ops.h"

namespace nk::cpu {

enum class LowrankSide { down, up };

// Channels [begin, begin + channels) of a factor; both rounded to 16 by the tiles that cover them.
//   down: strips [rank / 16][channel][16]      up: strips [channel / 16][rank][16]
inline void unpack_lowrank(const Kernels& kernels, FloatTensor factor, size_t rank, size_t begin, size_t channels,
                           LowrankSide side, float* strips) {
    const DType dtype = static_cast<DType>(factor.dtype);
    const size_t tile_bytes = 256 * size_of(dtype), down_strip = (channels + 15) / 16 * 16 * 16;
    for (size_t c = 0; c < channels; c += 16)
        for (size_t r = 0; r < rank; r += 16) {
            const char* tile =
                static_cast<const char*>(factor.data) + ((begin + c) / 16 * (rank / 16) + r / 16) * tile_bytes;
            float* dst = side == LowrankSide::down ? strips + r / 16 * down_strip + c * 16 : strips + c * rank + r * 16;
            kernels.lowrank_tile(tile, dtype, dst, 16);
        }
}

}  // namespace nk::cpu
