// Group scales of a published int4 weight folded into one fp32 scale per row and an int16 multiplier per group.
#include "../check.h"
#include "../numerics/layout.h"
#include "isa.h"
#include "ops.h"
#include "parallel.h"

namespace nk::cpu {

void w4a8_fold_scales(const FoldArguments& a, int64_t threads, const std::string& isa) {
    const Kernels& kernels = select_kernels(isa);
    validate(a);
    require(threads > 0, "threads", "at least 1", threads);
    const DType dtype = static_cast<DType>(a.wscales.dtype);

    const size_t groups = static_cast<size_t>(a.padded_k) / kGroup;
    // A code costs as much time as a few multiply-adds.
    const size_t workers = useful_threads(threads, static_cast<size_t>(a.padded_n) * a.padded_k * 4);
    parallel_for(workers, a.padded_n / kStrip, [&](WorkQueue& queue) {
        std::vector<float> scales(groups * kStrip);
        std::vector<uint8_t> largest(groups * kStrip);
        for (size_t strip; queue.next(strip);) {
            const size_t n0 = strip * kStrip;
            const size_t first_scale = group_scale_position(n0, 0, groups);
            kernels.fold_strip(a.qweight + qweight_strip_offset(n0, 0, a.padded_k),
                               static_cast<const uint8_t*>(a.wscales.data) + first_scale * size_of(dtype), dtype,
                               groups, scales.data(), largest.data(), a.row_scales + n0, a.multipliers + n0 * groups);
        }
    });
}

}  // namespace nk::cpu
