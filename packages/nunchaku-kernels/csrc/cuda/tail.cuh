// The fp32 tail of a product: activation, gate, residual and the one rounding, on eight channels of one token.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "../numerics/dtype.h"
#include "../ops.h"
#include "kernels.h"

namespace nk::cuda {

struct Tail {
    const void *gate, *residual;
    void* out;
    DType gate_dtype, residual_dtype, out_dtype;
    int activation;  // as in LinearArguments
    int tokens, out_features, tokens_per_gate;
    bool vectors;  // rows of out, gate and residual start at multiples of 16 bytes
};

inline Tail make_tail(const LinearArguments& a) {
    Tail tail{};
    tail.gate = a.gate.data;
    tail.residual = a.residual.data;
    tail.out = a.out;
    tail.gate_dtype = static_cast<DType>(a.gate.dtype);
    tail.residual_dtype = static_cast<DType>(a.residual.dtype);
    tail.out_dtype = static_cast<DType>(a.out_dtype);
    tail.activation = a.activation;
    tail.tokens = static_cast<int>(a.product.tokens);
    tail.out_features = static_cast<int>(a.out_features);
    tail.tokens_per_gate = a.gate.data ? static_cast<int>(a.product.tokens / a.gate_rows) : 1;
    tail.vectors = a.out_features % 8 == 0 && aligned(a.out) && aligned(a.gate.data) && aligned(a.residual.data);
    return tail;
}

__device__ __forceinline__ float2 unpack_half(uint32_t bits, DType dtype) {
    if (dtype == DType::bf16) return __bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(bits));
    return __half22float2(reinterpret_cast<const __half2&>(bits));
}

__device__ __forceinline__ uint32_t pack_bf16(float first, float second) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
    return reinterpret_cast<const uint32_t&>(pair);
}

// Saturates at the largest finite number; NaN stays NaN.
__device__ __forceinline__ float clamp_f16(float value) {
    value = value > 65504.0f ? 65504.0f : value;
    return value < -65504.0f ? -65504.0f : value;
}

__device__ __forceinline__ uint32_t pack_f16(float first, float second) {
    const __half2 pair = __floats2half2_rn(clamp_f16(first), clamp_f16(second));
    return reinterpret_cast<const uint32_t&>(pair);
}

// Eight neighbouring elements from `index` on, at a multiple of 16 bytes.
__device__ __forceinline__ void load_8(const void* data, DType dtype, size_t index, float (&values)[8]) {
    if (dtype == DType::f32) {
        const float4* source = reinterpret_cast<const float4*>(static_cast<const float*>(data) + index);
        const float4 first = __ldg(source), second = __ldg(source + 1);
        values[0] = first.x, values[1] = first.y, values[2] = first.z, values[3] = first.w;
        values[4] = second.x, values[5] = second.y, values[6] = second.z, values[7] = second.w;
        return;
    }
    const uint4 bits = __ldg(reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(data) + index));
    const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float2 pair = unpack_half(words[i], dtype);
        values[2 * i] = pair.x, values[2 * i + 1] = pair.y;
    }
}

__device__ __forceinline__ void store_8(void* data, DType dtype, size_t index, const float (&values)[8]) {
    if (dtype == DType::f32) {
        float4* target = reinterpret_cast<float4*>(static_cast<float*>(data) + index);
        target[0] = make_float4(values[0], values[1], values[2], values[3]);
        target[1] = make_float4(values[4], values[5], values[6], values[7]);
        return;
    }
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i)
        words[i] = dtype == DType::bf16 ? pack_bf16(values[2 * i], values[2 * i + 1])
                                        : pack_f16(values[2 * i], values[2 * i + 1]);
    *reinterpret_cast<uint4*>(static_cast<uint16_t*>(data) + index) =
        make_uint4(words[0], words[1], words[2], words[3]);
}

__device__ __forceinline__ void store_1(void* data, DType dtype, size_t index, float value) {
    if (dtype == DType::f32)
        static_cast<float*>(data)[index] = value;
    else if (dtype == DType::bf16)
        static_cast<__nv_bfloat16*>(data)[index] = __float2bfloat16_rn(value);
    else
        static_cast<__half*>(data)[index] = __float2half_rn(clamp_f16(value));
}

// gelu (tanh form) and silu are both y * sigmoid(z): (1 + tanh u) / 2 = sigmoid(2 u).
__device__ __forceinline__ float activate(float y, int activation) {
    if (activation == 0) return y;
    const float z = activation == 1 ? y * (y * y * 0.044715f + 1.0f) * (2.0f * 0.7978845608f) : y;
    return __fdividef(y, 1.0f + __expf(-z));  // 2 ulp; a quotient too small to divide is 0, as it should be
}

// Activation, gate and residual of channels n..n+7 of token m, then the store; what lies outside of `out` is dropped.
__device__ __forceinline__ void finish_8(const Tail& tail, int m, int n, float (&y)[8]) {
    if (m >= tail.tokens || n >= tail.out_features) return;
    const size_t index = static_cast<size_t>(m) * tail.out_features + n;
    const size_t gate_index = static_cast<size_t>(m / tail.tokens_per_gate) * tail.out_features + n;
    if (tail.activation) {
#pragma unroll
        for (int i = 0; i < 8; ++i) y[i] = activate(y[i], tail.activation);
    }
    if (tail.vectors) {
        float operand[8];
        if (tail.gate) {
            load_8(tail.gate, tail.gate_dtype, gate_index, operand);
#pragma unroll
            for (int i = 0; i < 8; ++i) y[i] *= operand[i];
        }
        if (tail.residual) {
            load_8(tail.residual, tail.residual_dtype, index, operand);
#pragma unroll
            for (int i = 0; i < 8; ++i) y[i] += operand[i];
        }
        store_8(tail.out, tail.out_dtype, index, y);
        return;
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        if (n + i >= tail.out_features) return;
        if (tail.gate) y[i] *= load_float(tail.gate, tail.gate_dtype, gate_index + i);
        if (tail.residual) y[i] += load_float(tail.residual, tail.residual_dtype, index + i);
        store_1(tail.out, tail.out_dtype, index + i, y[i]);
    }
}

}  // namespace nk::cuda
