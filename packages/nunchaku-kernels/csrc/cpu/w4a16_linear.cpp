// 4-bit weights in AWQ order times 16-bit or fp32 activations, accumulated in fp32.
#include <algorithm>

#include "../check.h"
#include "../numerics/layout.h"
#include "buffer.h"
#include "isa.h"
#include "ops.h"
#include "parallel.h"
#include "w4a16_tiles.h"

namespace nk::cpu {
namespace {

constexpr size_t kChannels = 32;  // of a work item: a cache line of 16-bit scales
constexpr size_t kTokenBlock = 512;
constexpr size_t kFewTokens = 4;  // above, a panel decoded once is cheaper than decoding in registers per token pair

enum class Path {
    few_tokens,  // weights decoded in registers
    fp32_panel,  // 16 channels decoded once for all tokens of a block
    bf16_panel,  // the same where tokens and weights are bf16 and the processor multiplies those
    bf16_tiles,  // the same in matrix tiles
};

Path choose_path(const Kernels& kernels, size_t tokens, DType x_dtype, DType scales_dtype) {
    const bool all_bf16 = x_dtype == DType::bf16 && scales_dtype == DType::bf16;
    if (tokens > 1 && all_bf16 && kernels.tiles) return Path::bf16_tiles;
    if (tokens <= kFewTokens && kernels.awq_product) return Path::few_tokens;
    return all_bf16 && kernels.matmul_bf16 && kernels.awq_decode_bf16 ? Path::bf16_panel : Path::fp32_panel;
}

}  // namespace

void w4a16_linear(const AwqArguments& a, int64_t threads, const std::string& isa) {
    const Kernels& kernels = select_kernels(isa);
    validate(a);
    require(threads > 0, "threads", "at least 1", threads);
    if (!a.tokens) return;
    const size_t tokens = a.tokens, inputs = a.in_features, outputs = a.out_features;
    const DType x_dtype = static_cast<DType>(a.x.dtype), scales_dtype = static_cast<DType>(a.scales_dtype);
    const DType out_dtype = static_cast<DType>(a.out_dtype), bias_dtype = static_cast<DType>(a.bias.dtype);
    const Path path = choose_path(kernels, tokens, x_dtype, scales_dtype);
    // A decoded weight costs about 64 int8 multiply-adds, one of these products 4.
    const size_t workers = useful_threads(threads, (64 + 4 * tokens) * inputs * outputs);
    if (path == Path::bf16_tiles) return w4a16_linear_tiles(kernels, a, workers);

    // The tokens as they are multiplied. Twelve bf16 rows are read side by side: 64 extra bytes per row keep rows of a
    // power of two from sharing the few cache lines of one set.
    const size_t bf16_stride = inputs + 32;
    const Buffer<float> x = make_buffer<float>(path == Path::bf16_panel ? 0 : tokens * inputs);
    const Buffer<uint16_t> bf16_x = make_buffer<uint16_t>(path == Path::bf16_panel ? tokens * bf16_stride : 0);
    for (size_t m = 0; m < tokens; ++m) {
        const char* row = static_cast<const char*>(a.x.data) + a.stride * static_cast<int64_t>(m * size_of(x_dtype));
        if (path == Path::bf16_panel)
            std::copy_n(reinterpret_cast<const uint16_t*>(row), inputs, &bf16_x[m * bf16_stride]);
        else
            kernels.to_float(row, x_dtype, inputs, &x[m * inputs]);
    }

    const size_t group_size = a.group_size, groups = (inputs + group_size - 1) / group_size;
    const size_t token_blocks = (tokens + kTokenBlock - 1) / kTokenBlock;
    const size_t channel_blocks = (outputs + kChannels - 1) / kChannels;
    parallel_for(workers, token_blocks * channel_blocks, [&](WorkQueue& queue) {
        const Buffer<float> scales = make_buffer<float>(groups * kChannels);
        const Buffer<float> zeros = make_buffer<float>(groups * kChannels);
        const Buffer<float> panel = make_buffer<float>(path == Path::fp32_panel ? inputs * kStrip : 0);
        const Buffer<uint16_t> bf16_panel = make_buffer<uint16_t>(path == Path::bf16_panel ? inputs * kStrip : 0);
        const Buffer<float> y = make_buffer<float>(std::min(tokens, kTokenBlock) * kChannels);
        for (size_t item; queue.next(item);) {
            const size_t m0 = item / channel_blocks * kTokenBlock, count = std::min(kTokenBlock, tokens - m0);
            const size_t n0 = item % channel_blocks * kChannels, channels = std::min(kChannels, outputs - n0);
            for (size_t g = 0; g < groups; ++g) {
                const size_t offset = (g * outputs + n0) * size_of(scales_dtype);
                kernels.to_float(static_cast<const char*>(a.wscales) + offset, scales_dtype, channels,
                                 &scales[g * kChannels]);
                kernels.to_float(static_cast<const char*>(a.wzeros) + offset, scales_dtype, channels,
                                 &zeros[g * kChannels]);
            }
            float bias[kChannels] = {};
            if (a.bias.data)
                for (size_t n = 0; n < channels; ++n) bias[n] = load_float(a.bias.data, bias_dtype, n0 + n);
            for (size_t m = 0; m < count; ++m) std::copy_n(bias, kChannels, &y[m * kChannels]);

            for (size_t n = 0; n < channels; n += 4) {
                const AwqQuad quad = {a.qweight + (n0 + n) / 4 * inputs,
                                      &scales[n],
                                      &zeros[n],
                                      kChannels,
                                      inputs,
                                      group_size,
                                      scales_dtype};
                // A strip is whole, or the last one: its missing channels only reach columns that are not stored.
                const bool strip_decoded = n % kStrip + 4 == kStrip || n + 4 == channels;
                float* strip_y = &y[n / kStrip * kStrip];
                if (path == Path::few_tokens) {
                    kernels.awq_product(quad, &x[m0 * inputs], count, &y[n], kChannels);
                } else if (path == Path::fp32_panel) {
                    kernels.awq_decode(quad, &panel[n % kStrip], kStrip);
                    if (strip_decoded)
                        kernels.matmul(&x[m0 * inputs], inputs, count, panel.get(), kStrip, inputs, kStrip, true,
                                       strip_y, kChannels);
                } else {
                    kernels.awq_decode_bf16(quad, &bf16_panel[n % kStrip * 2]);
                    if (strip_decoded)
                        kernels.matmul_bf16(&bf16_x[m0 * bf16_stride], bf16_stride, count, bf16_panel.get(), inputs,
                                            strip_y, kChannels);
                }
            }
            for (size_t m = 0; m < count; ++m)
                kernels.from_float(&y[m * kChannels], out_dtype, channels,
                                   static_cast<char*>(a.out) + ((m0 + m) * outputs + n0) * size_of(out_dtype));
        }
    });
}

}  // namespace nk::cpu
