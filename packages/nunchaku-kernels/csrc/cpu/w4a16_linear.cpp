// 4-bit weights in AWQ order times 16-bit or fp32 activations, accumulated in fp32.
#include <algorithm>

#include "../numerics/layout.h"
#include "buffer.h"
#include "check.h"
#include "isa.h"
#include "ops.h"
#include "parallel.h"

namespace nk::cpu {
namespace {

constexpr size_t kChannels = 32;  // of a work item: a cache line of 16-bit scales
constexpr size_t kTokenBlock = 512;
constexpr size_t kFewTokens = 4;  // above, a panel decoded once is cheaper than decoding in registers per token pair

void validate(const AwqArguments& a, int64_t threads) {
    require_dtype(a.x.dtype, "x_dtype");
    require_dtype(a.scales_dtype, "scales_dtype");
    require_dtype(a.bias.dtype, "bias_dtype");
    require_dtype(a.out_dtype, "out_dtype");
    require(a.tokens >= 0, "M", "0 or more", a.tokens);
    require(a.in_features > 0 && a.in_features % 64 == 0, "K", "a positive multiple of 64", a.in_features);
    require(a.out_features > 0 && a.out_features % 4 == 0, "N", "a positive multiple of 4", a.out_features);
    require(a.group_size > 0 && a.group_size % 64 == 0, "group_size", "a positive multiple of 64", a.group_size);
    require(a.stride >= a.in_features || a.tokens <= 1 || a.stride == 0, "x_stride", "at least K", a.stride);
    require(threads > 0, "threads", "at least 1", threads);
    if (!a.tokens) return;
    require_pointer(a.x.data, "x");
    require_pointer(a.qweight, "qweight");
    require_pointer(a.wscales, "wscales");
    require_pointer(a.wzeros, "wzeros");
    require_pointer(a.out, "out");
}

}  // namespace

void w4a16_linear(const AwqArguments& a, int64_t threads, const std::string& isa) {
    const Kernels& kernels = select_kernels(isa);
    validate(a, threads);
    if (!a.tokens) return;
    const size_t tokens = a.tokens, inputs = a.in_features, outputs = a.out_features;
    const DType x_dtype = static_cast<DType>(a.x.dtype), scales_dtype = static_cast<DType>(a.scales_dtype);
    const DType out_dtype = static_cast<DType>(a.out_dtype), bias_dtype = static_cast<DType>(a.bias.dtype);

    const Buffer<float> x = make_buffer<float>(tokens * inputs);
    for (size_t m = 0; m < tokens; ++m)
        kernels.to_float(static_cast<const char*>(a.x.data) + a.stride * static_cast<int64_t>(m * size_of(x_dtype)),
                         x_dtype, inputs, &x[m * inputs]);

    const bool few = tokens <= kFewTokens && kernels.awq_product;
    const size_t group_size = a.group_size, groups = (inputs + group_size - 1) / group_size;
    const size_t token_blocks = (tokens + kTokenBlock - 1) / kTokenBlock;
    const size_t channel_blocks = (outputs + kChannels - 1) / kChannels;
    parallel_for(threads, token_blocks * channel_blocks, [&](WorkQueue& queue) {
        const Buffer<float> scales = make_buffer<float>(groups * kChannels),
                            zeros = make_buffer<float>(groups * kChannels);
        const Buffer<float> panel = make_buffer<float>(few ? 0 : inputs * kStrip);
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
                if (few) {
                    kernels.awq_product(quad, &x[m0 * inputs], count, &y[n], kChannels);
                    continue;
                }
                kernels.awq_decode(quad, &panel[n % kStrip], kStrip);
                // A strip is whole, or the last one: its missing channels only reach columns that are not stored.
                if (n % kStrip + 4 == kStrip || n + 4 == channels)
                    kernels.matmul(&x[m0 * inputs], inputs, count, panel.get(), kStrip, inputs, kStrip, true,
                                   &y[n / kStrip * kStrip], kChannels);
            }
            for (size_t m = 0; m < count; ++m)
                kernels.from_float(&y[m * kChannels], out_dtype, channels,
                                   static_cast<char*>(a.out) + ((m0 + m) * outputs + n0) * size_of(out_dtype));
        }
    });
}

}  // namespace nk::cpu
