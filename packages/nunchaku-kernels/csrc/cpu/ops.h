// The operators on the CPU: partition of the work, on top of one table of kernels (kernels.h). All validate their
// arguments.
#pragma once

#include <string>

#include "../ops.h"

namespace nk::cpu {

void w4a8_fold_scales(const FoldArguments& arguments, int64_t threads, const std::string& isa);
void w4a8_quantize(const QuantizeArguments& arguments, int64_t threads, const std::string& isa);
void w4a8_accumulate(const ProductArguments& product, int32_t* sums, int64_t threads, const std::string& isa);
void w4a8_linear(const LinearArguments& arguments, int64_t threads, const std::string& isa);
void w4a16_linear(const AwqArguments& arguments, int64_t threads, const std::string& isa);
void l1_change(const L1ChangeArguments& arguments, int64_t threads, const std::string& isa);

}  // namespace nk::cpu
