// fp32 product for the small matrices around the integer one (low-rank factors) and for decoded 16-bit weights.
#pragma once

#include "vec.h"

namespace nk::cpu {
namespace {

template <size_t kTokens>
NK_INLINE void matmul_tile(const float* a, size_t lda, const float* b, size_t ldb, size_t inner, bool accumulate,
                           float* c, size_t ldc) {
    vf sums[kTokens][2];
    for (size_t m = 0; m < kTokens; ++m)
        for (size_t v = 0; v < 2; ++v) sums[m][v] = accumulate ? load<vf>(c + m * ldc + v * kLanes) : vf{};
    for (size_t k = 0; k < inner; ++k) {
        const vf b0 = load<vf>(b + k * ldb), b1 = load<vf>(b + k * ldb + kLanes);
#pragma GCC unroll 8
        for (size_t m = 0; m < kTokens; ++m) {
            const vf broadcast = splat(a[m * lda + k]);
            sums[m][0] = multiply_add(broadcast, b0, sums[m][0]);
            sums[m][1] = multiply_add(broadcast, b1, sums[m][1]);
        }
    }
    for (size_t m = 0; m < kTokens; ++m)
        for (size_t v = 0; v < 2; ++v) store(c + m * ldc + v * kLanes, sums[m][v]);
}

void matmul(const float* a, size_t lda, size_t tokens, const float* b, size_t ldb, size_t inner, size_t columns,
            bool accumulate, float* c, size_t ldc) {
    size_t m = 0;
    for (; m + 6 <= tokens; m += 6)
        for (size_t n = 0; n < columns; n += 16)
            matmul_tile<6>(a + m * lda, lda, b + n, ldb, inner, accumulate, c + m * ldc + n, ldc);
    for (; m + 2 <= tokens; m += 2)
        for (size_t n = 0; n < columns; n += 16)
            matmul_tile<2>(a + m * lda, lda, b + n, ldb, inner, accumulate, c + m * ldc + n, ldc);
    if (m < tokens)
        for (size_t n = 0; n < columns; n += 16)
            matmul_tile<1>(a + m * lda, lda, b + n, ldb, inner, accumulate, c + m * ldc + n, ldc);
}

}  // namespace
}  // namespace nk::cpu
