// AWQ-ordered 4-bit weights to fp32 through a table of sixteen values per (channel, group).
#pragma once

#include "../../numerics/layout.h"
#include "../generic/awq_weights.h"
#include "../kernels.h"

namespace nk::cpu {
namespace {

void awq_decode(const AwqQuad& quad, float* dst, size_t ld) {
    with_element_type(quad.dtype, [&](auto type) {
        using T = decltype(type);
        for (size_t n = 0; n < 4; ++n)
            for (size_t group = 0; group < quad.inputs; group += quad.group_size) {
                const ValueTable table = value_table<T>(quad, n, group / quad.group_size);
                float values[16];
                store(values, table.low);
                store(values + kLanes, table.high);
                for (size_t k = group; k < group + quad.group_size && k < quad.inputs; ++k)
                    dst[k * ld + n] = values[quad.words[awq_word(n, k, quad.inputs)] >> (4 * awq_nibble(k)) & 15];
            }
    });
}

}  // namespace
}  // namespace nk::cpu
