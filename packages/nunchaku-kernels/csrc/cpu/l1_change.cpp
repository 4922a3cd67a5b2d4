// Sums of magnitudes per sample: how far activations have moved from earlier ones, and how large those were.
#include <algorithm>

#include "../check.h"
#include "isa.h"
#include "ops.h"
#include "parallel.h"

namespace nk::cpu {
namespace {

const char* row_of(const Activations& x, size_t element_size, int64_t sample, int64_t token) {
    const int64_t offset = sample * x.sample_stride + token * x.token_stride;
    return x.data ? static_cast<const char*>(x.data) + offset * static_cast<int64_t>(element_size) : nullptr;
}

}  // namespace

void l1_change(const L1ChangeArguments& a, int64_t threads, const std::string& isa) {
    const Kernels& kernels = select_kernels(isa);
    validate(a);
    require(threads > 0, "threads", "at least 1", threads);
    const DType dtype = static_cast<DType>(a.dtype);
    const size_t element_size = size_of(dtype);

    const int64_t blocks = (a.tokens + a.block_tokens - 1) / a.block_tokens;
    const size_t elements = static_cast<size_t>(a.samples) * a.tokens * a.channels;
    // An element costs as much time as some ten int8 multiply-adds.
    parallel_for(useful_threads(threads, elements * 10), a.samples * blocks, [&](WorkQueue& queue) {
        for (size_t item; queue.next(item);) {
            const int64_t sample = item / blocks, first = item % blocks * a.block_tokens;
            const int64_t counted = a.counted ? std::min(a.counted[sample], a.tokens) : a.tokens;
            double change = 0, size = 0;
            for (int64_t t = first; t < std::min(first + a.block_tokens, counted); ++t) {
                float sums[2];
                kernels.l1_change(row_of(a.current, element_size, sample, t), row_of(a.origin, element_size, sample, t),
                                  row_of(a.previous, element_size, sample, t), dtype, a.channels, sums);
                change += sums[0];
                size += sums[1];
            }
            a.blocks[2 * item] = change;
            a.blocks[2 * item + 1] = size;
        }
    });
    for (int64_t sample = 0; sample < a.samples; ++sample)
        for (int64_t i = 0; i < 2 * blocks; ++i) a.sums[2 * sample + i % 2] += a.blocks[2 * sample * blocks + i];
}

}  // namespace nk::cpu
