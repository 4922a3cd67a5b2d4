// The portable table: plain C++ and compiler vectors, no instruction-set flags.
#include "generic/epilogue.h"
#include "generic/fold_strip.h"
#include "generic/l1_change.h"
#include "generic/matmul.h"
#include "generic/quantize_token.h"
#include "portable/awq_decode.h"
#include "portable/lowrank_tile.h"
#include "portable/w4a8_panel.h"

namespace nk::cpu {

extern const Kernels portable_kernels;
const Kernels portable_kernels = {
    "portable",
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
    nullptr,
    nullptr,
    nullptr,
    nullptr,
    l1_change,
    nullptr,
};

}  // namespace nk::cpu
