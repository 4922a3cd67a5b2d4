// The AVX2 table (with FMA and F16C).
#include "avx2/accumulate_panel.h"
#include "avx2/awq.h"
#include "avx2/awq_lookup.h"
#include "avx2/decode_panel.h"
#include "avx2/lowrank_tile.h"
#include "generic/epilogue.h"
#include "generic/fold_strip.h"
#include "generic/l1_change.h"
#include "generic/matmul.h"
#include "generic/quantize_token.h"

namespace nk::cpu {

extern const Kernels avx2_kernels;
const Kernels avx2_kernels = {
    "avx2",
    to_float_array,
    from_float_array,
    matmul,
    lowrank_tile,
    fold_strip,
    quantize_token,
    decode_panel,
    accumulate_panel,
    dequantize_row,
    finish_row<from_float_array>,
    awq_decode,
    awq_product,
    nullptr,
    nullptr,
    nullptr,
    l1_change,
    nullptr,
};

}  // namespace nk::cpu
