// The W4A8 product: weights are decoded to int8 panels that stay in cache while all tokens of a block pass over them.
#pragma once

#include <algorithm>

#include "../numerics/layout.h"
#include "buffer.h"
#include "kernels.h"
#include "ops.h"
#include "parallel.h"
#include "token_tiles.h"

namespace nk::cpu {

// How a product is cut into work items: token blocks x channel blocks, each item over all inputs.
struct Partition {
    size_t token_block, channel_block, input_block, token_blocks, channel_blocks;
    size_t items() const { return token_blocks * channel_blocks; }
};

// Smaller blocks until there are enough that threads finish together; strips of 16 channels are the smallest unit.
inline Partition partition(const ProductArguments& p, size_t threads, size_t channel_block, size_t input_block) {
    constexpr size_t kTokens = 512;  // panels are decoded again for every so many: 1 % of the work there
    const size_t tokens = p.tokens, n = p.padded_n;
    Partition result{std::min(tokens, kTokens), channel_block, input_block, 0, 0};
    const auto items = [&] {
        result.token_blocks = (tokens + result.token_block - 1) / result.token_block;
        result.channel_blocks = (n + result.channel_block - 1) / result.channel_block;
        return result.items();
    };
    while (items() < 4 * threads && result.channel_block > 32) result.channel_block /= 2;
    while (items() < 4 * threads && result.token_block > 64) result.token_block = (result.token_block + 1) / 2;
    return result;
}

// Few tokens: 16 KB panels that never leave L1, so that weights stream through once, in order.
// Many tokens: panels of at most 512 KB for L2.
inline Partition panel_partition(const ProductArguments& p, size_t threads) {
    constexpr size_t kFewTokens = 16, kSmallInputs = 128;
    const size_t k = p.padded_k, input_blocks = (k + kPanelInputs - 1) / kPanelInputs;
    return partition(p, threads, kPanelChannels,
                     static_cast<size_t>(p.tokens) <= kFewTokens
                         ? std::min(k, kSmallInputs)
                         : ((k / kGroup + input_blocks - 1) / input_blocks) * kGroup);
}

// Calls finish(begin_token, tokens, begin_channel, channels, sums, stride of sums) for every block of the product, of
// at most kPanelChannels channels; `make_finish` makes one such function per thread, so that it can own scratch memory.
template <class MakeFinish>
void multiply_panels(const Kernels& kernels, const ProductArguments& p, size_t threads, const MakeFinish& make_finish) {
    const size_t tokens = p.tokens, padded_n = p.padded_n, padded_k = p.padded_k;
    const Partition cut = panel_partition(p, threads);
    parallel_for(threads, cut.items(), [&](WorkQueue& queue) {
        const Buffer<int8_t> panel = make_buffer<int8_t>(cut.channel_block * cut.input_block);
        const Buffer<int32_t> sums = make_buffer<int32_t>(cut.token_block * cut.channel_block);
        auto finish = make_finish();
        for (size_t item; queue.next(item);) {
            // Channel blocks first: neighbouring items share their tokens in the outer cache.
            const size_t m0 = item / cut.channel_blocks * cut.token_block;
            const size_t n0 = item % cut.channel_blocks * cut.channel_block;
            const size_t count = std::min(cut.token_block, tokens - m0);
            const size_t channels = std::min(cut.channel_block, padded_n - n0);
            for (size_t k0 = 0; k0 < padded_k; k0 += cut.input_block) {
                const size_t inputs = std::min(cut.input_block, padded_k - k0);
                kernels.decode_panel(p.qweight, p.multipliers, padded_k, n0, channels, k0, inputs, panel.get());
                kernels.accumulate_panel(p.codes + m0 * padded_k + k0, padded_k, count, panel.get(), channels, inputs,
                                         k0 > 0, sums.get());
            }
            finish(m0, count, n0, channels, sums.get(), channels);
        }
    });
}

// The same in matrix tiles.
template <class MakeFinish>
void multiply_in_tiles(const Kernels& kernels, const ProductArguments& p, size_t threads,
                       const MakeFinish& make_finish) {
    const size_t tokens = p.tokens, padded_n = p.padded_n, padded_k = p.padded_k;
    Partition cut = partition(p, threads, kItemChannels, kTileInputBytes);
    cut.token_block = (cut.token_block + kTileTokens - 1) / kTileTokens * kTileTokens;
    cut.token_blocks = (tokens + cut.token_block - 1) / cut.token_block;
    const TokenTiles codes(*kernels.tiles, p.codes, p.padded_k, tokens, padded_k, threads);
    parallel_for(threads, cut.items(), [&](WorkQueue& queue) {
        const size_t stride = cut.channel_block + kSumsGap;
        const Buffer<int8_t> panel = make_buffer<int8_t>(cut.channel_block * cut.input_block);
        const Buffer<int32_t> sums = make_buffer<int32_t>(cut.token_block * stride);
        auto finish = make_finish();
        for (size_t item; queue.next(item);) {
            const size_t m0 = item / cut.channel_blocks * cut.token_block;
            const size_t n0 = item % cut.channel_blocks * cut.channel_block;
            const size_t count = std::min(cut.token_block, tokens - m0);
            const size_t channels = std::min(cut.channel_block, padded_n - n0);
            const size_t token_tiles = (count + kTileTokens - 1) / kTileTokens;
            for (size_t k0 = 0; k0 < padded_k; k0 += cut.input_block) {
                const size_t inputs = std::min(cut.input_block, padded_k - k0);
                kernels.decode_panel(p.qweight, p.multipliers, padded_k, n0, channels, k0, inputs, panel.get());
                kernels.tiles->multiply_int8(codes.block(m0 / kTileTokens, k0, inputs), inputs * kTileTokens,
                                             token_tiles, panel.get(), channels / kStrip, inputs, k0 > 0, sums.get(),
                                             stride);
            }
            for (size_t n = 0; n < channels; n += kPanelChannels)
                finish(m0, count, n0 + n, std::min(kPanelChannels, channels - n), &sums[n], stride);
        }
    });
}

template <class MakeFinish>
void for_each_block(const Kernels& kernels, const ProductArguments& p, int64_t threads, const MakeFinish& make_finish) {
    constexpr int64_t kFewTokens = 2;  // up to so many, mostly empty tiles take longer
    if (!p.tokens) return;
    const size_t work = static_cast<size_t>((p.tokens + 16) * p.padded_n * p.padded_k);  // decoding costs about 16
    const size_t workers = useful_threads(threads, work);
    if (kernels.tiles && p.tokens > kFewTokens)
        multiply_in_tiles(kernels, p, workers, make_finish);
    else
        multiply_panels(kernels, p, workers, make_finish);
}

}  // namespace nk::cpu
