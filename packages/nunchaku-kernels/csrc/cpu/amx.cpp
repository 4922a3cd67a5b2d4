// The AMX table: products of many tokens in tiles, the rest as for AVX-512 BF16.
#include "amx/awq_tiles.h"
#include "amx/multiply_tiles.h"
#include "avx2/awq.h"
#include "avx2/decode_panel.h"
#include "avx2/lowrank_pairs.h"
#include "avx2/lowrank_tile.h"
#include "avx512bf16/convert.h"
#include "avx512bf16/matmul.h"
#include "avx512vnni/accumulate_panel.h"
#include "avx512vnni/awq_lookup.h"
#include "avx512vnni/dequantize_row.h"
#include "avx512vnni/quantize_token.h"
#include "generic/epilogue.h"
#include "generic/fold_strip.h"
#include "generic/l1_change.h"
#include "generic/matmul.h"

namespace nk::cpu {
namespace {

constexpr TileKernels tile_kernels = {
    pack_tokens,
    awq_decode_tiles,
    multiply_tiles<Element::bf16>,
    multiply_tiles<Element::int8>,
};

}  // namespace

extern const Kernels amx_kernels;
const Kernels amx_kernels = {
    "amx",
    to_float_array,
    from_float_array_fast,
    matmul,
    lowrank_tile,
    fold_strip,
    quantize_token_wide,
    decode_panel,
    accumulate_panel,
    dequantize_row_wide,
    finish_row<from_float_array_fast>,
    awq_decode,
    awq_product,
    nullptr,
    matmul_bf16,
    lowrank_pairs,
    l1_change,
    &tile_kernels,
};

}  // namespace nk::cpu
