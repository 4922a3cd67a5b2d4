// The AVX-512 VNNI table: its own integer product, the rest as for AVX2.
#include "avx2/awq.h"
#include "avx2/decode_panel.h"
#include "avx2/lowrank_tile.h"
#include "avx512vnni/accumulate_panel.h"
#include "avx512vnni/awq_lookup.h"
#include "generic/epilogue.h"
#include "generic/fold_strip.h"
#include "generic/l1_change.h"
#include "generic/matmul.h"
#include "generic/quantize_token.h"

namespace nk::cpu {

extern const Kernels avx512vnni_kernels;
const Kernels avx512vnni_kernels = {
    "avx512vnni",
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
