// All tokens of a call in tile order (kernels.h), packed once for all work items.
#pragma once

#include "buffer.h"
#include "kernels.h"
#include "parallel.h"

namespace nk::cpu {

constexpr size_t kItemChannels = 256;  // of a work item: so many each tile meets that comes from an outer cache
constexpr size_t kSumsGap = 16;        // rows of sums a power of two apart would fall into a few sets of the cache

class TokenTiles {
public:
    // `bytes` of inputs per token, a multiple of 64; rows are `stride` bytes apart.
    TokenTiles(const TileKernels& kernels, const void* tokens, ptrdiff_t stride, size_t count, size_t bytes,
               size_t threads)
        : tiles_((count + kTileTokens - 1) / kTileTokens), data_(make_buffer<char>(tiles_ * kTileTokens * bytes)) {
        const char* rows = static_cast<const char*>(tokens);
        // A copied byte costs about as much as an int8 multiply-add of a portion of work.
        parallel_for(useful_threads(threads, count * bytes), tiles_, [&](WorkQueue& queue) {
            for (size_t tile; queue.next(tile);) {
                const size_t m = tile * kTileTokens;
                for (size_t k = 0; k < bytes; k += kTileInputBytes) {
                    const size_t block = std::min(kTileInputBytes, bytes - k);
                    kernels.pack_tokens(rows + stride * static_cast<ptrdiff_t>(m) + k, stride,
                                        std::min(kTileTokens, count - m), block, position(tile, k, block));
                }
            }
        });
    }

    // The tiles of a block: those of `bytes` inputs from byte `k` on, of tokens from 16 * `tile` on.
    const char* block(size_t tile, size_t k, size_t bytes) const { return position(tile, k, bytes); }

private:
    char* position(size_t tile, size_t k, size_t bytes) const {
        return data_.get() + (tiles_ * k + tile * bytes) * kTileTokens;
    }

    size_t tiles_;
    Buffer<char> data_;
};

}  // namespace nk::cpu
