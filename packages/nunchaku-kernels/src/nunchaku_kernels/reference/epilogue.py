"""The tail every 4-bit linear shares: channel scale, bias, low-rank up, activation, gate, residual, one rounding.

All in fp32 with a single rounding at the end; the published kernels round to 16 bits after every step (packing.md 8.4).
"""

from typing import Literal

import torch
from torch.nn.functional import gelu, silu

from nunchaku_kernels._checks import FLOAT_DTYPES, require_tensor

Activation = Literal["none", "gelu", "silu"]
ACTIVATIONS = ("none", "gelu", "silu")


def epilogue(
    accumulator: torch.Tensor,
    *,
    out_dtype: torch.dtype,
    wcscales: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    lora_act: torch.Tensor | None = None,
    proj_up: torch.Tensor | None = None,
    rank_scale: torch.Tensor | None = None,
    activation: Activation = "none",
    gate: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """`residual + gate * act(accumulator * wcscales + bias + (lora_act * rank_scale) @ proj_up.T)`, in fp32.

    Args:
        accumulator: fp32 [M, N], the scaled main product.
        out_dtype: dtype of the result; fp16 is clamped to its finite range, as the published store is.
        wcscales: [N] per-channel factors; None for ones.
        bias: [N], or None.
        lora_act: fp32 [M, R] low-rank hidden state; None (or R = 0) leaves the branch out.
        proj_up: [N, R]; required with `lora_act`.
        rank_scale: fp32 [R] factor per rank; None for ones.
        activation: "none", "gelu" (tanh form) or "silu".
        gate: [B, N] with M divisible by B: row m takes gate row m // (M / B). None for ones.
        residual: [M, N] added last, or None.

    Returns:
        [M, N] of `out_dtype`.
    """
    require_tensor("accumulator", accumulator, (None, None), (torch.float32,))
    m, n = accumulator.shape
    if out_dtype not in FLOAT_DTYPES:
        raise TypeError(f"out_dtype: expected float32, float16 or bfloat16, got {out_dtype}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    y = accumulator
    if wcscales is not None:
        y = y * require_tensor("wcscales", wcscales, (n,), FLOAT_DTYPES).float()
    if bias is not None:
        y = y + require_tensor("bias", bias, (n,), FLOAT_DTYPES).float()
    if lora_act is not None:
        y = y + _lowrank(lora_act, proj_up, rank_scale, m, n)
    if activation == "gelu":
        y = gelu(y, approximate="tanh")
    elif activation == "silu":
        y = silu(y)
    if gate is not None:
        require_tensor("gate", gate, (None, n), FLOAT_DTYPES)
        batches = gate.shape[0]
        if batches == 0 or m % batches:
            raise ValueError(f"gate: expected a number of rows that divides {m}, got {batches}")
        y = (y.view(batches, m // batches, n) * gate.float().unsqueeze(1)).reshape(m, n)
    if residual is not None:
        y = require_tensor("residual", residual, (m, n), FLOAT_DTYPES).float() + y
    if out_dtype == torch.float16:
        limit = torch.finfo(torch.float16).max
        y = y.clamp(-limit, limit)
    return y.to(out_dtype)


def _lowrank(
    lora_act: torch.Tensor, proj_up: torch.Tensor | None, rank_scale: torch.Tensor | None, m: int, n: int
) -> torch.Tensor:
    require_tensor("lora_act", lora_act, (m, None), (torch.float32,))
    rank = lora_act.shape[1]
    require_tensor("proj_up", proj_up, (n, rank), FLOAT_DTYPES)
    assert proj_up is not None
    if rank_scale is not None:
        lora_act = lora_act * require_tensor("rank_scale", rank_scale, (rank,), (torch.float32,))
    return lora_act @ proj_up.float().t()


def lowrank_down(x: torch.Tensor, proj_down: torch.Tensor) -> torch.Tensor:
    """Low-rank hidden state: `x @ proj_down.T` with fp32 accumulation, from the raw (unshifted, unsmoothed) input.

    Args:
        x: [M, K].
        proj_down: [R, K], already divided by the smoothing.

    Returns:
        fp32 [M, R].
    """
    require_tensor("x", x, (None, None), FLOAT_DTYPES)
    require_tensor("proj_down", proj_down, (None, x.shape[1]), FLOAT_DTYPES)
    return x.float() @ proj_down.float().t()
