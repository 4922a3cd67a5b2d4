// W4A16 in matrix tiles, where tokens and scales are bf16: weights of a block of inputs are decoded to a panel, which
// all tokens of the item pass over.
#include <algorithm>

#include "../numerics/layout.h"
#include "buffer.h"
#include "token_tiles.h"
#include "w4a16_tiles.h"

namespace nk::cpu {
namespace {

constexpr size_t kInputBlock = kTileInputBytes / sizeof(uint16_t);
constexpr size_t kTokenBlock = 512;

}  // namespace

void w4a16_linear_tiles(const Kernels& kernels, const AwqArguments& a, size_t threads) {
    const TileKernels& tiles = *kernels.tiles;
    const size_t tokens = a.tokens, inputs = a.in_features, outputs = a.out_features;
    const DType out_dtype = static_cast<DType>(a.out_dtype), bias_dtype = static_cast<DType>(a.bias.dtype);
    const size_t group_size = a.group_size, groups = (inputs + group_size - 1) / group_size;
    constexpr size_t kSize = sizeof(uint16_t);  // of bf16
    const TokenTiles x(tiles, a.x.data, a.stride * static_cast<ptrdiff_t>(kSize), tokens, inputs * kSize, threads);

    const size_t token_blocks = (tokens + kTokenBlock - 1) / kTokenBlock;
    size_t block = kItemChannels;
    while (block > 32 && token_blocks * outputs < 4 * threads * block) block /= 2;
    const size_t stride = block + kSumsGap, channel_blocks = (outputs + block - 1) / block;
    parallel_for(threads, token_blocks * channel_blocks, [&](WorkQueue& queue) {
        const Buffer<float> scales = make_buffer<float>(groups * block);
        const Buffer<float> zeros = make_buffer<float>(groups * block);
        const Buffer<float> bias = make_buffer<float>(block);
        const Buffer<uint16_t> panel = make_buffer<uint16_t>(kInputBlock * block);
        const Buffer<float> y = make_buffer<float>((std::min(tokens, kTokenBlock) + kTileTokens - 1) * stride);
        for (size_t item; queue.next(item);) {
            const size_t m0 = item / channel_blocks * kTokenBlock, count = std::min(kTokenBlock, tokens - m0);
            const size_t n0 = item % channel_blocks * block, channels = std::min(block, outputs - n0);
            const size_t strips = (channels + kStrip - 1) / kStrip;
            const size_t token_tiles = (count + kTileTokens - 1) / kTileTokens;
            for (size_t g = 0; g < groups; ++g) {
                const size_t offset = g * outputs + n0;
                kernels.to_float(static_cast<const uint16_t*>(a.wscales) + offset, DType::bf16, channels,
                                 &scales[g * block]);
                kernels.to_float(static_cast<const uint16_t*>(a.wzeros) + offset, DType::bf16, channels,
                                 &zeros[g * block]);
            }
            for (size_t n = 0; n < channels; ++n)
                bias[n] = a.bias.data ? load_float(a.bias.data, bias_dtype, n0 + n) : 0.0f;
            for (size_t m = 0; m < token_tiles * kTileTokens; ++m) std::copy_n(&bias[0], block, &y[m * stride]);

            for (size_t k0 = 0; k0 < inputs; k0 += kInputBlock) {
                const size_t length = std::min(kInputBlock, inputs - k0);
                for (size_t n = 0; n < channels; n += kStrip) {
                    const AwqQuad first = {a.qweight + (n0 + n) / 4 * inputs,
                                           &scales[n],
                                           &zeros[n],
                                           block,
                                           inputs,
                                           group_size,
                                           DType::bf16};
                    tiles.awq_decode_bf16(first, std::min(kStrip, channels - n) / 4, k0, length, &panel[n * length]);
                }
                tiles.multiply_bf16(x.block(m0 / kTileTokens, k0 * kSize, length * kSize), length * kSize * kTileTokens,
                                    token_tiles, panel.get(), strips, length * kSize, true, y.get(), stride);
            }
            for (size_t m = 0; m < count; ++m)
                kernels.from_float(&y[m * stride], out_dtype, channels,
                                   static_cast<char*>(a.out) + ((m0 + m) * outputs + n0) * size_of(out_dtype));
        }
    });
}

}  // namespace nk::cpu
