// Sums of magnitudes per sample: how far activations have moved from earlier ones, and how large those were.
#include <algorithm>
#include <vector>

#include "../check.h"
#include "isa.h"
#include "ops.h"
#include "parallel.h"

namespace nk::cpu {
namespace {

constexpr int64_t kBlockElements =
    1 << 16;  // of a work item: long beside handing it out, short beside a thread's share

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

    const int64_t block_tokens = std::max<int64_t>(1, kBlockElements / std::max<int64_t>(1, a.channels));
    const int64_t blocks = (a.tokens + block_tokens - 1) / block_tokens;
    // Blocks are summed apart and then in order: the result does not depend on the number of threads.
    std::vector<double> partial(static_cast<size_t>(a.samples * blocks) * 2);
    const size_t elements = static_cast<size_t>(a.samples) * a.tokens * a.channels;
    // An element costs as much time as some ten int8 multiply-adds.
    parallel_for(useful_threads(threads, elements * 10), a.samples * blocks, [&](WorkQueue& queue) {
        for (size_t item; queue.next(item);) {
            const int64_t sample = item / blocks, first = item % blocks * block_tokens;
            const int64_t counted = a.counted ? std::min(a.counted[sample], a.tokens) : a.tokens;
            for (int64_t t = first; t < std::min(first + block_tokens, counted); ++t) {
                float sums[2];
                kernels.l1_change(row_of(a.current, element_size, sample, t), row_of(a.origin, element_size, sample, t),
                                  row_of(a.previous, element_size, sample, t), dtype, a.channels, sums);
                partial[2 * item] += sums[0];
                partial[2 * item + 1] += sums[1];
            }
        }
    });
    for (int64_t sample = 0; sample < a.samples; ++sample)
        for (int64_t i = 0; i < 2 * blocks; ++i) a.sums[2 * sample + i % 2] += partial[2 * sample * blocks + i];
}

}  // namespace nk::cpu
