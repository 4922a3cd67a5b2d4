"""nvfp4: e2m1 activations with an e4m3 scale per 16 channels, as sm_100 and sm_120 multiply them.

Plain torch on every device; kernels for the devices that have the instruction replace it there.
"""

from typing import Any

import torch

from nunchaku_kernels._checks import require_int_range
from nunchaku_kernels.formats import unpack_micro_scales, unpack_qweight
from nunchaku_kernels.ops._checks import (
    FLOATS,
    INT8,
    check_optional,
    check_quantize,
    check_tail,
    check_tensor,
    check_weight,
    device_of,
    padded_width,
)
from nunchaku_kernels.ops._library import fake, implement
from nunchaku_kernels.ops._unpack import lowrank_activation, natural_smooth, padded_input, reference_epilogue
from nunchaku_kernels.reference import nvfp4 as reference

GROUP = reference.GROUP_SIZE


@implement("nvfp4_quantize", "CompositeExplicitAutograd")
def _quantize(
    x: torch.Tensor, smooth: torch.Tensor | None, shift: float, proj_down: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    width = check_quantize("nvfp4_quantize", x, smooth, proj_down)
    if shift:
        raise ValueError(f"nvfp4_quantize: `shift` must be 0, the format has signed codes, got {shift}")
    codes, ascales = reference.quantize_tokens(padded_input(x, width), natural_smooth(smooth))
    return codes, ascales, lowrank_activation(x, proj_down)


@fake("nvfp4_quantize")
def _(
    x: torch.Tensor, smooth: torch.Tensor | None, shift: float, proj_down: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    width = padded_width(x, smooth, proj_down)
    rank = 0 if proj_down is None else proj_down.shape[1]
    return (
        x.new_empty(x.shape[0], width, dtype=torch.int8),
        x.new_empty(x.shape[0], width // GROUP, dtype=torch.float8_e4m3fn),
        x.new_empty(x.shape[0], rank, dtype=torch.float32),
    )


@implement("nvfp4_linear", "CompositeExplicitAutograd")
def _linear(
    codes: torch.Tensor,
    ascales: torch.Tensor,
    lora_act: torch.Tensor,
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
    op = "nvfp4_linear"
    device = device_of(op, "codes", codes)
    fp8 = (torch.float8_e4m3fn,)
    check_tensor(op, "codes", codes, dtypes=INT8, shape=(None, None), device=device)
    require_int_range(f"{op}: `codes`", codes, 0, 15)
    tokens, width = codes.shape
    check_tensor(op, "ascales", ascales, dtypes=fp8, shape=(tokens, width // GROUP), device=device)
    rows, _ = check_weight(op, qweight, width, device)
    check_tensor(op, "wscales", wscales, dtypes=fp8, shape=(width // GROUP, rows), device=device)
    check_optional(op, "wtscale", wtscale, dtypes=FLOATS, shape=(1,), device=device)
    check_tail(
        op, rows=tokens, padded_out=rows, out_features=out_features, lora_act=lora_act, proj_up=proj_up,
        rank_scale=rank_scale, wcscales=wcscales, bias=bias, activation=activation, gate=gate, residual=residual,
        out_dtype=out_dtype, device=device,
    )  # fmt: skip
    product = reference.product(codes, ascales, unpack_qweight(qweight, signed=False), unpack_micro_scales(wscales))
    if wtscale is not None:
        product = product * wtscale.float()
    return reference_epilogue(
        product, lora_act, proj_up, rank_scale, wcscales, bias, out_features=out_features, activation=activation,
        gate=gate, residual=residual, out_dtype=out_dtype,
    )  # fmt: skip


@fake("nvfp4_linear")
def _(codes: torch.Tensor, *_: Any, out_features: int, out_dtype: torch.dtype, **__: Any) -> torch.Tensor:
    return codes.new_empty(codes.shape[0], out_features, dtype=out_dtype)
