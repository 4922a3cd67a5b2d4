// What the native operators take, on any processor, and the checks of it. Tensors are contiguous unless a stride is
// given; an absent tensor is a null pointer.
#pragma once

#include <cstddef>
#include <cstdint>

#include "numerics/dtype.h"

namespace nk {

// A tensor of one of the three float types; data is null where the tensor is absent.
struct FloatTensor {
    const void* data;
    int dtype;
};

// row_scales fp32 [Np] and multipliers int16 [Np, Kp / 64], natural order, from published qweight and wscales.
struct FoldArguments {
    const uint8_t* qweight;  // [Np, Kp / 2]
    FloatTensor wscales;     // [Kp / 64, Np]
    int64_t padded_n, padded_k;
    float* row_scales;
    int16_t* multipliers;
};

struct QuantizeArguments {
    FloatTensor x;  // [tokens, channels], rows `stride` elements apart
    int64_t tokens, channels, stride, padded_k;
    FloatTensor smooth;  // [Kp] published order, or absent
    float shift;
    FloatTensor proj_down;  // [Kp, rank] published order, or absent
    int64_t rank;
    int8_t* codes;   // [tokens, Kp]
    float* ascales;  // [tokens]
    void* lora_act;  // [tokens, rank]: fp32 on the CPU, the dtype of proj_down on CUDA
};

// layer_norm(x) * (1 + scale) + shift, rounded to the dtype of x, which scale and shift [rows, channels] have too.
struct ModulationArguments {
    FloatTensor scale, shift;
    int64_t rows;  // divides tokens
    float eps;
};

struct QuantizeNormArguments {
    QuantizeArguments quantize;
    ModulationArguments modulation;
};

struct ProductArguments {
    const int8_t* codes;         // [tokens, Kp]
    const uint8_t* qweight;      // [Np, Kp / 2] published order
    const int16_t* multipliers;  // [Np, Kp / 64]
    int64_t tokens, padded_n, padded_k;
};

struct LinearArguments {
    ProductArguments product;
    const float* ascales;     // [tokens]
    const float* row_scales;  // [Np]
    const void* lora_act;     // [tokens, rank]: fp32 on the CPU, the dtype of proj_up on CUDA
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

// A fused projection to q, k and v of heads of 128 channels. The heads of q and k are normalised (RMS, with the weights
// norm_q and norm_k [128], or neither) and rotated in pairs of neighbouring channels. Sample s, token t of it, head h
// of q, k or v (part 0, 1 or 2) goes to out [3, samples, heads, out_tokens, 128] at [part, s, h, first_token + t].
struct HeadArguments {
    LinearArguments linear;  // without activation, gate and residual
    int64_t samples, heads;  // samples divide tokens; out_features = 3 * 128 * heads
    FloatTensor norm_q, norm_k;
    float eps;
    const float* rotary;  // [tokens / samples, 64, 2]: cosines and sines; or null
    int64_t first_token, out_tokens;
};

// [samples, tokens, channels], channels side by side, strides in elements; absent if data is null.
struct Activations {
    const void* data;
    int64_t sample_stride, token_stride;
};

// Per sample, over the tokens that count: sums of |previous - (current - origin)| and of |previous|. The difference
// current - origin is rounded to the dtype, which all three have.
struct L1ChangeArguments {
    Activations current, origin, previous;
    int dtype;
    int64_t samples, tokens, channels;
    const int64_t* counted;  // [samples] leading tokens of each sample that count, or null: all
    int64_t block_tokens;    // of a block, whose sums are made apart: a result depends on it, and not on the machine
    double* blocks;          // [samples, ceil(tokens / block_tokens), 2], overwritten
    double* sums;            // [samples, 2], to which blocks are added in order
};

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

// All throw std::invalid_argument, naming the argument as Python knows it.
void validate(const FoldArguments& arguments);
void validate(const QuantizeArguments& arguments);
void validate(const QuantizeNormArguments& arguments);
void validate(const ProductArguments& product);
void validate(const LinearArguments& arguments);  // with its product
void validate(const HeadArguments& arguments);    // with its linear
void validate(const AwqArguments& arguments);
void validate(const L1ChangeArguments& arguments);

}  // namespace nk
