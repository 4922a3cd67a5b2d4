// Integer weights of the W4A8 product: 4-bit code times a 16-bit group multiplier, rounded to int8.
// One formula for every processor, so that int32 sums agree bit for bit.
#pragma once

#include <cmath>

#include "dtype.h"

namespace nk {

// Largest number of summands |q8 * t8| <= 127 * 127 that cannot overflow int32.
constexpr long long kMaxSummands = 133000;

// row_maximum = max_k |q s| over the codes of an output channel; 0 for a channel of zeros.
NK_FUNCTION double w4a8_row_scale(double row_maximum) { return row_maximum == 0 ? 1.0 : row_maximum / 127.0; }

// Even, below 2^15 for every scale whose group holds a code of magnitude one or more.
NK_FUNCTION int16_t w4a8_group_multiplier(double group_scale, double row_scale) {
    const double steps = rint(128.0 * group_scale / row_scale);
    return fabs(steps) < 16384.0 ? static_cast<int16_t>(2 * static_cast<int>(steps)) : int16_t{0};  // NaN: 0
}

// The high byte of a 16-bit product; |result| <= 127 for multipliers made by the two functions above.
NK_FUNCTION int8_t w4a8_decode(int code, int multiplier) {
    return static_cast<int8_t>(static_cast<int16_t>(code * multiplier + 129) >> 8);
}

NK_FUNCTION int sign_extend_nibble(int nibble) { return (nibble ^ 8) - 8; }

}  // namespace nk
