// The operators on NVIDIA GPUs: they check their arguments, choose a kernel for the device, and launch it on the
// caller's stream without waiting for it. Wrong arguments throw std::invalid_argument, errors of the runtime
// std::runtime_error.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "../ops.h"

struct CUstream_st;  // cudaStream_t points to one: this header needs no CUDA toolkit

namespace nk::cuda {

// Where to run. `isa` is a name from usable_isas, or empty for the best one.
struct Launch {
    int64_t device;
    CUstream_st* stream;
    std::string isa;
};

// Kernel sets of this build that run on the device, best last; none below sm_80.
std::vector<std::string> usable_isas(int64_t device);

void w4a8_fold_scales(const FoldArguments& arguments, const Launch& launch);
void w4a8_quantize(const QuantizeArguments& arguments, const Launch& launch);
// Whether a kernel takes these arguments; nothing is written where none does.
bool w4a8_quantize_norm(const QuantizeNormArguments& arguments, const Launch& launch);
void w4a8_accumulate(const ProductArguments& product, int32_t* sums, const Launch& launch);
void w4a8_linear(const LinearArguments& arguments, const Launch& launch);
// Like w4a8_quantize_norm.
bool w4a8_linear_heads(const HeadArguments& arguments, const Launch& launch);
void w4a16_linear(const AwqArguments& arguments, const Launch& launch);
void l1_change(const L1ChangeArguments& arguments, const Launch& launch);

}  // namespace nk::cuda
