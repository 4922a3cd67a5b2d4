"""SVDQuant weights against 16-bit activations: dequantise, then an ordinary matrix product.

Correct on any device torch supports and for both stored precisions; nothing of x is rounded to 4 or 8 bits. It reads
and writes the whole dequantised weight, so it is the last resort, not a fast path.
"""

from typing import Any

import torch

from nunchaku_kernels.formats import unpack_micro_scales, unpack_qweight, unpack_vector, unpack_wscales
from nunchaku_kernels.formats.e2m1 import decode
from nunchaku_kernels.ops._checks import (
    FLOATS,
    check_optional,
    check_quantize,
    check_tail,
    check_tensor,
    check_weight,
    device_of,
)
from nunchaku_kernels.ops._library import fake, implement
from nunchaku_kernels.ops._unpack import lowrank_activation, padded_input, reference_epilogue


def dequantize(
    qweight: torch.Tensor,
    wscales: torch.Tensor,
    wtscale: torch.Tensor | None,
    wcscales: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Published codes (N, K/2) and scales (int4 (K/64, N) T or nvfp4 (K/16, N) float8_e4m3fn) -> (N, K) `dtype`.

    All factors go in before the one rounding: nvfp4 codes times micro-scales alone reach 2688, and products of those
    overflow float16.
    """
    if wscales.dtype == torch.float8_e4m3fn:
        values, scales = decode(unpack_qweight(qweight, signed=False)), unpack_micro_scales(wscales).float().abs()
    else:
        values, scales = unpack_qweight(qweight).float(), unpack_wscales(wscales).float()
    if wtscale is not None:
        scales = scales * wtscale.float()
    if wcscales is not None:
        scales = scales * unpack_vector(wcscales).float().unsqueeze(1)
    grouped = values.unflatten(1, (scales.shape[1], -1)) * scales.unsqueeze(-1)
    return grouped.flatten(1).to(dtype)


def product(
    x: torch.Tensor,
    smooth: torch.Tensor | None,
    shift: float,
    qweight: torch.Tensor,
    wscales: torch.Tensor,
    wtscale: torch.Tensor | None,
    wcscales: torch.Tensor | None,
) -> torch.Tensor:
    """The main product float32 (M, N) of x (M, K' <= K) and published weights, differentiable in x and `wcscales`.

    Like the activations and the weights, it is rounded once to the dtype of x.
    """
    t = padded_input(x, qweight.shape[1] * 2, shift)
    if smooth is not None:
        t = (t.float() / unpack_vector(smooth).float()).to(x.dtype)
    return torch.nn.functional.linear(t, dequantize(qweight, wscales, wtscale, wcscales, x.dtype)).float()


@implement("svdq_w4a16_linear", "CompositeExplicitAutograd")
def _linear(
    x: torch.Tensor,
    smooth: torch.Tensor | None,
    shift: float,
    proj_down: torch.Tensor | None,
    qweight: torch.Tensor,
    wscales: torch.Tensor,
    wtscale: torch.Tensor | None,
    proj_up: torch.Tensor | None,
    rank_scale: torch.Tensor | None,
    wcscales: torch.Tensor | None,
    bias: torch.Tensor | None,
    *,
    out_features: int,
    activation: str = "none",
    gate: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    op = "svdq_w4a16_linear"
    device = device_of(op, "x", x)
    width = check_quantize(op, x, smooth, proj_down)
    rows, _ = check_weight(op, qweight, width, device)
    check_tensor(
        op, "wscales", wscales, dtypes=(*FLOATS, torch.float8_e4m3fn), shape=(None, rows), device=device
    )  # fmt: skip
    group = 16 if wscales.dtype == torch.float8_e4m3fn else 64
    if wscales.shape[0] * group != width:
        raise ValueError(f"{op}: `wscales` must have {width // group} rows, got {wscales.shape[0]}")
    check_optional(op, "wtscale", wtscale, dtypes=FLOATS, shape=(1,), device=device)
    lora_act = lowrank_activation(x, proj_down)
    check_tail(
        op, rows=x.shape[0], padded_out=rows, out_features=out_features, lora_act=lora_act, proj_up=proj_up,
        rank_scale=rank_scale, wcscales=wcscales, bias=bias, activation=activation, gate=gate, residual=residual,
        out_dtype=out_dtype, device=device,
    )  # fmt: skip
    return reference_epilogue(
        product(x, smooth, shift, qweight, wscales, wtscale, wcscales), lora_act, proj_up, rank_scale, None, bias,
        out_features=out_features, activation=activation, gate=gate, residual=residual, out_dtype=out_dtype,
    )  # fmt: skip


@fake("svdq_w4a16_linear")
def _(x: torch.Tensor, *_: Any, out_features: int, out_dtype: torch.dtype, **__: Any) -> torch.Tensor:
    return x.new_empty(x.shape[0], out_features, dtype=out_dtype)
