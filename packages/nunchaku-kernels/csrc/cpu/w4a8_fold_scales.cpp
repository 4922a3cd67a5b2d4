// Group scales of a published int4 weight folded into one fp32 scale per row and an int16 multiplier per group.
#include <algorithm>
#include <cmath>

#include "../check.h"
#include "../numerics/layout.h"
#include "../numerics/w4a8.h"
#include "isa.h"
#include "ops.h"
#include "parallel.h"

namespace nk::cpu {
namespace {

// largest[n] = max |code| over one group of a strip's 16 channels.
void largest_codes(const uint8_t* strip, int largest[kStrip]) {
    std::fill(largest, largest + kStrip, 0);
    for (size_t n = 0; n < kStrip; ++n)
        for (size_t k = 0; k < kGroup; k += 8) {  // eight consecutive inputs share one 32-bit word
            const uint8_t* word = strip + qweight_strip_nibble(n, k) / 2;
            for (size_t byte = 0; byte < 4; ++byte) {
                const int low = std::abs(sign_extend_nibble(word[byte] & 15));
                const int high = std::abs(sign_extend_nibble(word[byte] >> 4));
                largest[n] = std::max(largest[n], std::max(low, high));
            }
        }
}

}  // namespace

void w4a8_fold_scales(const FoldArguments& a, int64_t threads, const std::string& isa) {
    select_kernels(isa);
    validate(a);
    require(threads > 0, "threads", "at least 1", threads);
    const DType dtype = static_cast<DType>(a.wscales.dtype);

    const size_t groups = static_cast<size_t>(a.padded_k) / kGroup;
    const size_t workers = useful_threads(threads, static_cast<size_t>(a.padded_n) * a.padded_k * 64);
    parallel_for(workers, a.padded_n / kStrip, [&](WorkQueue& queue) {
        std::vector<int> largest(groups * kStrip);
        for (size_t strip; queue.next(strip);) {
            const size_t n0 = strip * kStrip;
            for (size_t g = 0; g < groups; ++g)
                largest_codes(a.qweight + qweight_strip_offset(n0, g * kGroup, a.padded_k), &largest[g * kStrip]);
            for (size_t n = n0; n < n0 + kStrip; ++n) {
                const auto scale = [&](size_t g) {
                    return static_cast<double>(load_float(a.wscales.data, dtype, group_scale_position(n, g, groups)));
                };
                double row_maximum = 0;
                for (size_t g = 0; g < groups; ++g) {
                    const double magnitude = std::fabs(largest[g * kStrip + n - n0] * scale(g));
                    if (magnitude > row_maximum || std::isnan(magnitude)) row_maximum = magnitude;  // NaN stays
                }
                const double row_scale = w4a8_row_scale(row_maximum);
                a.row_scales[n] = static_cast<float>(row_scale);
                for (size_t g = 0; g < groups; ++g)
                    a.multipliers[n * groups + g] =
                        largest[g * kStrip + n - n0] ? w4a8_group_multiplier(scale(g), row_scale) : int16_t{0};
            }
        }
    });
}

}  // namespace nk::cpu
