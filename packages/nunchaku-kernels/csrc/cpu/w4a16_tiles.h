#pragma once

#include "kernels.h"
#include "ops.h"

namespace nk::cpu {

// w4a16_linear with bf16 tokens and scales, on a processor with matrix tiles. Arguments are valid, tokens not zero.
void w4a16_linear_tiles(const Kernels& kernels, const AwqArguments& arguments, size_t threads);

}  // namespace nk::cpu
