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

constexpr size_t kTokenBlock = 512;

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

    const size_t token_blocks = (tokens + kTokenBlock - 1) / kTokenBlock;
    const size_t channel_blocks = (outputs + kStrip - 1) / kStrip;
    parallel_for(threads, token_blocks * channel_blocks, [&](WorkQueue& queue) {
        const Buffer<float> panel = make_buffer<float>(inputs * kStrip);
        const Buffer<float> y = make_buffer<float>(std::min(tokens, kTokenBlock) * kStrip);
        for (size_t item; queue.next(item);) {
            const size_t m0 = item / channel_blocks * kTokenBlock, count = std::min(kTokenBlock, tokens - m0);
            const size_t n0 = item % channel_blocks * kStrip, channels = std::min(kStrip, outputs - n0);
            if (channels < kStrip) std::fill_n(panel.get(), inputs * kStrip, 0.0f);
            for (size_t n = 0; n < channels; n += 4) {
                const size_t offset = (n0 + n) * size_of(scales_dtype);
                kernels.awq_decode(a.qweight + (n0 + n) / 4 * inputs, static_cast<const char*>(a.wscales) + offset,
                                   static_cast<const char*>(a.wzeros) + offset, scales_dtype, outputs, inputs,
                                   a.group_size, panel.get() + n, kStrip);
            }
            for (size_t m = 0; m < count; ++m)
                for (size_t n = 0; n < kStrip; ++n)
                    y[m * kStrip + n] = a.bias.data && n < channels ? load_float(a.bias.data, bias_dtype, n0 + n) : 0.0f;
            kernels.matmul(&x[m0 * inputs], inputs, count, panel.get(), kStrip, inputs, kStrip, true, y.get(), kStrip);
            for (size_t m = 0; m < count; ++m)
                kernels.from_float(&y[m * kStrip], out_dtype, channels,
                                   static_cast<char*>(a.out) + ((m0 + m) * outputs + n0) * size_of(out_dtype));
        }
    });
}

}  // namespace nk::cpu
