// Activations to int8 with one scale per token, and the low-rank down projection of the same tokens.
#include <algorithm>

#include "../check.h"
#include "../numerics/layout.h"
#include "buffer.h"
#include "isa.h"
#include "lowrank.h"
#include "ops.h"
#include "parallel.h"

namespace nk::cpu {
namespace {

constexpr size_t kTokenBlock = 6;  // tokens that share one pass over the low-rank factor

}  // namespace

void w4a8_quantize(const QuantizeArguments& a, int64_t threads, const std::string& isa) {
    const Kernels& kernels = select_kernels(isa);
    validate(a);
    require(threads > 0, "threads", "at least 1", threads);
    const size_t tokens = a.tokens, channels = a.channels, padded_k = a.padded_k, rank = a.rank;
    const DType x_dtype = static_cast<DType>(a.x.dtype);

    Buffer<float> reciprocal;
    if (a.smooth.data) {
        reciprocal = make_buffer<float>(channels);
        for (size_t k = 0; k < channels; ++k)
            reciprocal[k] = 1.0f / load_float(a.smooth.data, static_cast<DType>(a.smooth.dtype), vector_position(k));
    }
    Buffer<float> down;  // [K padded to 16, rank]
    if (rank) {
        down = make_buffer<float>((channels + 15) / 16 * 16 * rank);
        unpack_lowrank(kernels, a.proj_down, rank, 0, channels, LowrankSide::down, down.get());
    }

    // An element of the token costs about 64 int8 multiply-adds, one of the fp32 product 4.
    const size_t workers = useful_threads(threads, tokens * channels * (64 + 4 * rank));
    parallel_for(workers, (tokens + kTokenBlock - 1) / kTokenBlock, [&](WorkQueue& queue) {
        const Buffer<float> x = make_buffer<float>(kTokenBlock * channels), t = make_buffer<float>(channels);
        for (size_t block; queue.next(block);) {
            const size_t begin = block * kTokenBlock, count = std::min(kTokenBlock, tokens - begin);
            for (size_t i = 0; i < count; ++i) {
                const size_t m = begin + i;
                const char* row =
                    static_cast<const char*>(a.x.data) + a.stride * static_cast<int64_t>(m * size_of(x_dtype));
                kernels.to_float(row, x_dtype, channels, &x[i * channels]);
                int8_t* codes = a.codes + m * padded_k;
                a.ascales[m] =
                    kernels.quantize_token(&x[i * channels], channels, a.shift, reciprocal.get(), t.get(), codes);
                std::fill(codes + channels, codes + padded_k, int8_t{0});
            }
            if (rank)
                kernels.matmul(x.get(), channels, count, down.get(), rank, channels, rank, false,
                               static_cast<float*>(a.lora_act) + begin * rank, rank);
        }
    });
}

}  // namespace nk::cpu
