// From exact int32 sums to the rounded output of one token: scales, bias, activation, gate and residual in fp32.
#pragma once

#include "../kernels.h"
#include "vec.h"

namespace nk::cpu {
namespace {

void dequantize_row(const int32_t* sums, float ascale, const float* row_scales, const float* wcscales,
                    const float* bias, size_t channels, float* y) {
    for (size_t n = 0; n < channels; n += kLanes) {
        vf value = __builtin_convertvector(load<vi>(sums + n), vf) * ascale * load<vf>(row_scales + n);
        if (wcscales) value *= load<vf>(wcscales + n);
        if (bias) value += load<vf>(bias + n);
        store(y + n, value);
    }
}

// Limits |x|; NaN stays NaN.
NK_INLINE vf clamp(vf x, float limit) {
    x = select(x > limit, splat(limit), x);
    return select(x < -limit, splat(-limit), x);
}

// exp(x) to about 2 ulp for |x| <= 87; larger arguments are clamped, NaN stays NaN.
NK_INLINE vf exponential(vf x) {
    x = clamp(x, 87.0f);
    const vf shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the integer lands in the low bits
    const vf n = shifted - 12582912.0f;
    vf r = multiply_add(n, splat(-0.693359375f), x);  // ln 2 in two parts, the first exact in few bits
    r = multiply_add(n, splat(2.12194440e-4f), r);
    vf p = splat(1.0f / 5040.0f);
    p = multiply_add(p, r, splat(1.0f / 720.0f));
    p = multiply_add(p, r, splat(1.0f / 120.0f));
    p = multiply_add(p, r, splat(1.0f / 24.0f));
    p = multiply_add(p, r, splat(1.0f / 6.0f));
    p = multiply_add(p, r, splat(0.5f));
    p = multiply_add(p, r, splat(1.0f));
    p = multiply_add(p, r, splat(1.0f));
    const vi exponent = reinterpret_cast<vi>(shifted) - 0x4b400000;
    return p * reinterpret_cast<vf>((exponent + 127) << 23);
}

// x * sigmoid(z); the tanh form of GELU is x * sigmoid(2 u) because (1 + tanh u) / 2 = sigmoid(2 u).
NK_INLINE vf gated_by_sigmoid(vf x, vf z) { return x / (exponential(-z) + 1.0f); }

NK_INLINE vf activate(vf y, Activation activation) {
    if (activation == Activation::gelu_tanh)
        return gated_by_sigmoid(y, y * (y * y * 0.044715f + 1.0f) * (2.0f * 0.7978845608f));
    if (activation == Activation::silu) return gated_by_sigmoid(y, y);
    return y;
}

template <void (*kFromFloat)(const float* src, DType dtype, size_t count, void* dst)>
void finish_row(float* y, size_t channels, Activation activation, RowOperand gate, RowOperand residual, void* out,
                DType out_dtype) {
    const bool plain = activation == Activation::none && !gate.data && !residual.data;
    if (plain && out_dtype != DType::f16) return kFromFloat(y, out_dtype, channels, out);
    alignas(32) float gates[kPanelChannels], residuals[kPanelChannels];
    if (gate.data) to_float_array(gate.data, gate.dtype, channels, gates);
    if (residual.data) to_float_array(residual.data, residual.dtype, channels, residuals);
    for (size_t n = 0; n < channels; n += kLanes) {  // y, gates, residuals are whole vectors; the excess is not stored
        vf value = activate(load<vf>(y + n), activation);
        if (gate.data) value *= load<vf>(gates + n);
        if (residual.data) value += load<vf>(residuals + n);
        if (out_dtype == DType::f16) value = clamp(value, 65504.0f);  // as the published kernels store fp16
        store(y + n, value);
    }
    kFromFloat(y, out_dtype, channels, out);
}

}  // namespace
}  // namespace nk::cpu
