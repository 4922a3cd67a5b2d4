// Low-rank factors from the published order to fp32 panels whose rows are the summation index.
#pragma once

#include "kernels.h"
#include "ops.h"

namespace nk::cpu {

enum class LowrankSide { down, up };

// Channels [begin, begin + channels) of a factor; both rounded to 16 by the tiles that cover them.
//   down: panel[rank / 16][channel][16]      up: panel[rank][channel], rows `channels` apart
inline void unpack_lowrank(const Kernels& kernels, FloatTensor factor, size_t rank, size_t begin, size_t channels,
                           LowrankSide side, float* panel) {
    const DType dtype = static_cast<DType>(factor.dtype);
    const size_t tile_bytes = 256 * size_of(dtype), strip = (channels + 15) / 16 * 16 * 16;
    for (size_t c = 0; c < channels; c += 16)
        for (size_t r = 0; r < rank; r += 16) {
            const char* tile =
                static_cast<const char*>(factor.data) + ((begin + c) / 16 * (rank / 16) + r / 16) * tile_bytes;
            if (side == LowrankSide::down)
                kernels.lowrank_tile(tile, dtype, panel + r / 16 * strip + c * 16, 16);
            else
                kernels.lowrank_tile(tile, dtype, panel + r * channels + c, channels);
        }
}

}  // namespace nk::cpu
