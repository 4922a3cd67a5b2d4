// Checks of the operators' arguments: every size a kernel relies on.
#include "ops.h"

#include "check.h"
#include "numerics/w4a8.h"

namespace nk {

void validate(const FoldArguments& a) {
    require_dtype(a.wscales.dtype, "wscales_dtype");
    require(a.padded_n > 0 && a.padded_n % 128 == 0, "Np", "a positive multiple of 128", a.padded_n);
    require(a.padded_k > 0 && a.padded_k % 64 == 0, "Kp", "a positive multiple of 64", a.padded_k);
    require_pointer(a.qweight, "qweight");
    require_pointer(a.wscales.data, "wscales");
    require_pointer(a.row_scales, "row_scales");
    require_pointer(a.multipliers, "multipliers");
}

void validate(const QuantizeArguments& a) {
    require_dtype(a.x.dtype, "x_dtype");
    require_dtype(a.smooth.dtype, "smooth_dtype");
    require_dtype(a.proj_down.dtype, "proj_down_dtype");
    require(a.tokens >= 0, "M", "0 or more", a.tokens);
    require(a.padded_k > 0 && a.padded_k % 64 == 0, "Kp", "a positive multiple of 64", a.padded_k);
    require(a.channels > 0 && a.channels <= a.padded_k, "K", "1 to Kp", a.channels);
    require(a.stride >= a.channels || a.tokens <= 1 || a.stride == 0, "x_stride", "at least K", a.stride);
    require(a.rank >= 0 && a.rank % 16 == 0, "R", "a multiple of 16", a.rank);
    if (!a.tokens) return;
    require_pointer(a.x.data, "x");
    require_pointer(a.codes, "codes");
    require_pointer(a.ascales, "ascales");
    if (!a.rank) return;
    require_pointer(a.proj_down.data, "proj_down");
    require_pointer(a.lora_act, "lora_act");
}

void validate(const QuantizeNormArguments& a) {
    validate(a.quantize);
    const ModulationArguments& m = a.modulation;
    require(m.scale.dtype == a.quantize.x.dtype, "scale_dtype", "that of x", m.scale.dtype);
    require(m.shift.dtype == a.quantize.x.dtype, "shift_dtype", "that of x", m.shift.dtype);
    require(m.rows > 0 && a.quantize.tokens % m.rows == 0, "rows", "a divisor of M", m.rows);
    if (!a.quantize.tokens) return;
    require_pointer(m.scale.data, "scale");
    require_pointer(m.shift.data, "shift");
}

void validate(const ProductArguments& p) {
    require(p.tokens >= 0, "M", "0 or more", p.tokens);
    require(p.padded_n > 0 && p.padded_n % 128 == 0, "Np", "a positive multiple of 128", p.padded_n);
    require(p.padded_k > 0 && p.padded_k % 64 == 0, "Kp", "a positive multiple of 64", p.padded_k);
    require(p.padded_k < kMaxSummands, "Kp", "less than 133000 (int32 sums)", p.padded_k);
    if (!p.tokens) return;
    require_pointer(p.codes, "codes");
    require_pointer(p.qweight, "qweight");
    require_pointer(p.multipliers, "multipliers");
}

void validate(const LinearArguments& a) {
    validate(a.product);
    require_dtype(a.proj_up.dtype, "proj_up_dtype");
    require_dtype(a.wcscales.dtype, "wcscales_dtype");
    require_dtype(a.bias.dtype, "bias_dtype");
    require_dtype(a.gate.dtype, "gate_dtype");
    require_dtype(a.residual.dtype, "residual_dtype");
    require_dtype(a.out_dtype, "out_dtype");
    require(a.rank >= 0 && (!a.proj_up.data || a.rank % 16 == 0), "R", "a multiple of 16", a.rank);
    require(a.out_features > 0 && a.out_features <= a.product.padded_n, "out_features", "1 to Np", a.out_features);
    require(a.activation >= 0 && a.activation <= 2, "activation", "0 (none), 1 (gelu) or 2 (silu)", a.activation);
    if (!a.product.tokens) return;
    require(!a.gate.data || (a.gate_rows > 0 && a.product.tokens % a.gate_rows == 0), "gate_rows", "a divisor of M",
            a.gate_rows);
    require_pointer(a.ascales, "ascales");
    require_pointer(a.row_scales, "row_scales");
    require_pointer(a.out, "out");
    if (a.rank && a.proj_up.data) require_pointer(a.lora_act, "lora_act");
}

void validate(const HeadArguments& a) {
    validate(a.linear);
    const int64_t tokens = a.linear.product.tokens;
    require(a.heads > 0 && a.linear.out_features == 3 * 128 * a.heads, "heads", "out_features / 384", a.heads);
    require(a.samples > 0 && tokens % a.samples == 0, "samples", "a divisor of M", a.samples);
    require(a.first_token >= 0 && a.first_token + tokens / a.samples <= a.out_tokens, "out_tokens",
            "room for first_token and the tokens of a sample", a.out_tokens);
    require_dtype(a.norm_q.dtype, "norm_q_dtype");
    require_dtype(a.norm_k.dtype, "norm_k_dtype");
    require(!a.norm_q.data == !a.norm_k.data, "norm_k", "a weight, like norm_q, or neither", !!a.norm_k.data);
    require(!a.linear.activation && !a.linear.gate.data && !a.linear.residual.data, "activation",
            "none, and no gate or residual", a.linear.activation);
}

void validate(const AwqArguments& a) {
    require_dtype(a.x.dtype, "x_dtype");
    require_dtype(a.scales_dtype, "scales_dtype");
    require_dtype(a.bias.dtype, "bias_dtype");
    require_dtype(a.out_dtype, "out_dtype");
    require(a.tokens >= 0, "M", "0 or more", a.tokens);
    require(a.in_features > 0 && a.in_features % 64 == 0, "K", "a positive multiple of 64", a.in_features);
    require(a.out_features > 0 && a.out_features % 4 == 0, "N", "a positive multiple of 4", a.out_features);
    require(a.group_size > 0 && a.group_size % 64 == 0, "group_size", "a positive multiple of 64", a.group_size);
    require(a.stride >= a.in_features || a.tokens <= 1 || a.stride == 0, "x_stride", "at least K", a.stride);
    if (!a.tokens) return;
    require_pointer(a.x.data, "x");
    require_pointer(a.qweight, "qweight");
    require_pointer(a.wscales, "wscales");
    require_pointer(a.wzeros, "wzeros");
    require_pointer(a.out, "out");
}

void validate(const L1ChangeArguments& a) {
    require_dtype(a.dtype, "dtype");
    require(a.samples >= 0, "B", "0 or more", a.samples);
    require(a.tokens >= 0, "T", "0 or more", a.tokens);
    require(a.channels >= 0, "C", "0 or more", a.channels);
    if (!a.samples || !a.tokens || !a.channels) return;
    require_pointer(a.current.data, "current");
    require_pointer(a.previous.data, "previous");
    require(a.block_tokens > 0, "block_tokens", "at least 1", a.block_tokens);
    require_pointer(a.blocks, "blocks");
    require_pointer(a.sums, "sums");
}

}  // namespace nk
