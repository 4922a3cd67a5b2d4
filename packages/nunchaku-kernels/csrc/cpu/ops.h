// The native operators: validation and partition of the work, on top of one table of kernels (kernels.h).
// Tensors are contiguous unless a stride is given; an absent tensor is a null pointer. All throw std::invalid_argument.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "../numerics/dtype.h"

namespace nk::cpu {

// A tensor of one of the three float types; data is null where the tensor is absent.
struct FloatTensor {
    const void* data;
    int dtype;
};

// row_scales fp32 [Np] and multipliers int16 [Np, Kp / 64], natural order, from published qweight and wscales.
void w4a8_fold_scales(const uint8_t* qweight, FloatTensor wscales, int64_t padded_n, int64_t padded_k,
                      float* row_scales, int16_t* multipliers, int64_t threads);

struct QuantizeArguments {
    FloatTensor x;  // [tokens, channels], rows `stride` elements apart
    int64_t tokens, channels, stride, padded_k;
    FloatTensor smooth;  // [Kp] published order, or absent
    float shift;
    FloatTensor proj_down;  // [Kp, rank] published order, or absent
    int64_t rank;
    int8_t* codes;    // [tokens, Kp]
    float* ascales;   // [tokens]
    float* lora_act;  // [tokens, rank]
};
void w4a8_quantize(const QuantizeArguments& arguments, int64_t threads, const std::string& isa);

struct ProductArguments {
    const int8_t* codes;         // [tokens, Kp]
    const uint8_t* qweight;      // [Np, Kp / 2] published order
    const int16_t* multipliers;  // [Np, Kp / 64]
    int64_t tokens, padded_n, padded_k;
};
void w4a8_accumulate(const ProductArguments& product, int32_t* sums, int64_t threads, const std::string& isa);

struct LinearArguments {
    ProductArguments product;
    const float* ascales;     // [tokens]
    const float* row_scales;  // [Np]
    const float* lora_act;    // [tokens, rank]
    int64_t rank;
    FloatTensor proj_up;      // [Np, rank] published order, or absent
    const float* rank_scale;  // [rank] or null
    FloatTensor wcscales;     // [Np] published order, or absent
    FloatTensor bias;         // [Np] published order, or absent
    int64_t out_features;
    int activation;        // 0 none, 1 gelu (tanh), 2 silu
    FloatTensor gate;      // [gate_rows, out_features], or absent
    int64_t gate_rows;     // divides tokens
    FloatTensor residual;  // [tokens, out_features], or absent
    void* out;             // [tokens, out_features]
    int out_dtype;
};
void w4a8_linear(const LinearArguments& arguments, int64_t threads, const std::string& isa);

struct AwqArguments {
    FloatTensor x;  // [tokens, in_features], rows `stride` elements apart
    int64_t tokens, in_features, stride;
    const uint16_t* qweight;  // [out_features / 4, in_features] 16-bit words, AWQ order
    const void* wscales;      // [groups, out_features] natural order
    const void* wzeros;       // like wscales; already -(zero point * scale)
    int scales_dtype;
    FloatTensor bias;  // [out_features] natural order, or absent
    int64_t out_features, group_size;
    void* out;  // [tokens, out_features]
    int out_dtype;
};
void w4a16_linear(const AwqArguments& arguments, int64_t threads, const std::string& isa);

}  // namespace nk::cpu
