"""The operators' schemas. They are frozen: every backend, LoRA and the text encoders use exactly these.

Tensors are in the PUBLISHED order (`formats/`) unless a schema's comment says "natural" (row-major, readable).
M tokens; N and K padded to multiples of 128; R the rank of the low-rank branch; G scale groups along K; T one of
float32, float16, bfloat16. A backend may permute k inside a 64-group of `codes`, and multipliers inside 128 rows: they
are opaque between the operators of the same arithmetic.

Quantise: x (M, K' <= K) T natural, smooth (K) T, shift in units of x, proj_down (K, R) T
    -> codes (M, K) int8, ascales, lora_act (M, R) float32 natural, from the raw x (not shifted, not smoothed).
       w4a8 on CUDA: lora_act in the dtype of a 16-bit proj_down, in which tensor cores multiply it.
       w4a8: ascales (M) float32.  w4a4: ascales (M, K/64) dtype of x.  nvfp4: ascales (M, K/16) float8_e4m3fn.
Linear: y = act(wcscales * (codes x weights) + bias + (lora_act * rank_scale) @ proj_up^T); out = residual + gate * y
    proj_up (N, R) T, rank_scale (R) float32 natural, wcscales (N) T, bias (N) T, gate (B, out_features) T natural with
    B dividing M (token m uses row m // (M / B)), residual (M, out_features) T natural -> (M, out_features) out_dtype,
    rounded once.
"""

from collections.abc import Callable
from typing import Any

import torch

NAMESPACE = "nunchaku_kernels"

_QUANTIZE = "(Tensor x, Tensor? smooth, float shift, Tensor? proj_down{extra}) -> (Tensor, Tensor, Tensor)"
_TAIL = (
    "Tensor? proj_up, Tensor? rank_scale, Tensor? wcscales, Tensor? bias, *, int out_features, str activation='none', "
    "Tensor? gate=None, Tensor? residual=None, ScalarType out_dtype) -> Tensor"
)

SCHEMAS = {
    # row_scales (N) float32, group_multipliers (N, K/64) int16: natural; numerics.md "two levels"
    "w4a8_fold_scales": "(Tensor qweight, Tensor wscales) -> (Tensor, Tensor)",
    "w4a8_quantize": _QUANTIZE.format(extra=""),
    # of layer_norm(x) * (1 + scale) + shift, without affine weights, rounded once to the dtype of x. scale and shift of
    # that dtype, natural, have B rows of K' channels; tokens share rows as those of `gate` do
    "w4a8_quantize_norm": "(Tensor x, Tensor scale, Tensor shift, float eps, Tensor? smooth, Tensor? proj_down) "
    "-> (Tensor, Tensor, Tensor)",
    "w4a8_linear": "(Tensor codes, Tensor ascales, Tensor lora_act, Tensor qweight, Tensor row_scales, "
    "Tensor group_multipliers, " + _TAIL,
    # of a fused q, k and v projection with heads of 128 channels: `reference.heads.split_heads` of the linear's result
    # in the dtype of out. out (3, B, H, T, 128) natural takes the tokens of B samples from
    # first_token on and is not touched elsewhere; norm_q and norm_k (128) T, rotary (M / B, 64, 2) float32, natural
    "w4a8_linear_heads": "(Tensor codes, Tensor ascales, Tensor lora_act, Tensor qweight, Tensor row_scales, "
    "Tensor group_multipliers, Tensor? proj_up, Tensor? rank_scale, Tensor? wcscales, Tensor? bias, Tensor? norm_q, "
    "Tensor? norm_k, float eps, Tensor? rotary, Tensor(a!) out, int first_token) -> ()",
    # unsigned: codes 0..15, for inputs that the shift made non-negative
    "w4a4_quantize": _QUANTIZE.format(extra=", bool unsigned=False"),
    "w4a4_linear": "(Tensor codes, Tensor ascales, Tensor lora_act, Tensor qweight, Tensor wscales, " + _TAIL,
    "nvfp4_quantize": _QUANTIZE.format(extra=""),
    "nvfp4_linear": "(Tensor codes, Tensor ascales, Tensor lora_act, Tensor qweight, Tensor wscales, "
    "Tensor? wtscale, " + _TAIL,
    # 16-bit activations against a dequantised int4 or nvfp4 weight: the last resort that runs on any device. Here the
    # product is rounded to the dtype of x before the tail, which then rounds once more
    "svdq_w4a16_linear": "(Tensor x, Tensor? smooth, float shift, Tensor? proj_down, Tensor qweight, Tensor wscales, "
    "Tensor? wtscale, " + _TAIL,
    # AWQ order: x (M, K) T, qweight (N/4, K/2) int32 or (N/4, K) int16, wscales and wzeros (Gpad, N) natural, bias (N)
    # natural -> (M, N) dtype of x
    "w4a16_linear": "(Tensor x, Tensor qweight, Tensor wscales, Tensor wzeros, Tensor? bias, int group_size) -> Tensor",
    # mean|previous - (current - origin)| / mean|previous| per sample, over all streams, which are (B, tokens, C) T
    # natural; current - origin is rounded to T. tokens (B) int64: leading tokens of each sample that count
    # -> (B) float32
    "relative_l1": "(Tensor[] current, Tensor[] previous, Tensor[]? origin=None, Tensor? tokens=None) -> Tensor",
}

_library = torch.library.Library(NAMESPACE, "DEF")
for _name, _schema in SCHEMAS.items():
    _library.define(_name + _schema)


def implement(name: str, dispatch_key: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register the decorated function as the kernel of operator `name` for one dispatch key."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        _library.impl(name, function, dispatch_key)
        return function

    return register


def fake(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register the decorated function as the shape-only kernel of operator `name` (torch.compile, export)."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        torch.library.register_fake(f"{NAMESPACE}::{name}", function, lib=_library)
        return function

    return register
