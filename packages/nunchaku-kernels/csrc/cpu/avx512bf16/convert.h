// fp32 to bf16 by vcvtne2ps2bf16: as elsewhere, except that subnormal numbers become zero.
#pragma once

#include <immintrin.h>

#include "../generic/vec.h"

namespace nk::cpu {
namespace {

void from_float_array_fast(const float* src, DType dtype, size_t count, void* dst) {
    if (dtype != DType::bf16) return from_float_array(src, dtype, count, dst);
    uint16_t* out = static_cast<uint16_t*>(dst);
    size_t i = 0;
    for (; i + 32 <= count; i += 32)
        store(out + i, _mm512_cvtne2ps_pbh(_mm512_loadu_ps(src + i + 16), _mm512_loadu_ps(src + i)));
    if (i < count) from_float_array(src + i, dtype, count - i, out + i);
}

}  // namespace
}  // namespace nk::cpu
