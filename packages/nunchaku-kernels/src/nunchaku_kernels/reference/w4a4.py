"""W4A4: int4 weights and int4 activations, both with one scale per 64 inputs (packing.md 8.2-8.3, golden README 4).

The quantiser follows the published kernel, rounding to the input dtype where it does and with exact reciprocals; the
product accumulates in fp32, which is closer to the real-number function than the published 16-bit accumulation.
"""

import torch

from nunchaku_kernels._checks import FLOAT_DTYPES, require_multiple, require_tensor
from nunchaku_kernels.formats import SVDQWeights
from nunchaku_kernels.reference.epilogue import Activation, epilogue, lowrank_down

GROUP_SIZE = 64


def quantize_tokens(
    x: torch.Tensor, smooth: torch.Tensor | None = None, shift: float = 0.0, *, unsigned: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Activation codes and group scales.

    `t = r((r(x + shift)) / smooth)` with r() the rounding to the dtype of x, `s = max|t| * f32(1/7)` (1/15 unsigned)
    per group; the stored scale is r(s), the codes are `rint(t * (1 / s))` from the unrounded s, half to even,
    saturated. A group of zeros has scale 0 and codes 0; a non-finite group has a non-finite scale, so that its product
    is NaN.

    Args:
        x: [M, K], K a multiple of 64; fp32 is not rounded on the way.
        smooth: [K] in natural order, or None for ones.
        shift: added before smoothing (0.171875 behind a fused GELU).
        unsigned: codes 0..15 instead of -8..7.

    Returns:
        codes int8 [M, K], ascales [M, K/64] of the dtype of x.
    """
    require_tensor("x", x, (None, None), FLOAT_DTYPES)
    m, k = x.shape
    require_multiple("x", "K", k, GROUP_SIZE)
    t = (x + shift if shift else x).float()
    if smooth is not None:
        t = t / require_tensor("smooth", smooth, (k,), FLOAT_DTYPES).float()
    t = t.to(x.dtype).float().view(m, k // GROUP_SIZE, GROUP_SIZE)
    scales = t.abs().amax(dim=-1) * (1 / 15 if unsigned else 1 / 7)
    low, high = (0, 15) if unsigned else (-8, 7)
    # 0 * inf in a group of zeros is NaN, and so is inf * 0 in an infinite one: both become code 0.
    codes = torch.round(t * torch.reciprocal(scales).unsqueeze(-1)).nan_to_num(nan=0.0).clamp(low, high)
    return codes.to(torch.int8).reshape(m, k), scales.to(x.dtype)


def product(
    token_codes: torch.Tensor, ascales: torch.Tensor, weight_codes: torch.Tensor, scales: torch.Tensor
) -> torch.Tensor:
    """`sum_g ascale scale sum_k code code` with fp32 accumulation.

    Args:
        token_codes: int8 [M, K], -8..7 or 0..15.
        ascales: [M, K/64].
        weight_codes: int8 [N, K], -8..7.
        scales: [N, K/64].

    Returns:
        fp32 [M, N].
    """
    tokens = _dequantize("token_codes", token_codes, "ascales", ascales)
    weight = _dequantize("weight_codes", weight_codes, "scales", scales)
    require_tensor("weight_codes", weight_codes, (None, token_codes.shape[1]))
    # Code x scale is exact in fp32, so the only roundings are those of the accumulation.
    return tokens @ weight.t()


def _dequantize(code_name: str, codes: torch.Tensor, scale_name: str, scales: torch.Tensor) -> torch.Tensor:
    require_tensor(code_name, codes, (None, None), (torch.int8,))
    rows, k = codes.shape
    require_multiple(code_name, "K", k, GROUP_SIZE)
    require_tensor(scale_name, scales, (rows, k // GROUP_SIZE), FLOAT_DTYPES)
    return (codes.view(rows, k // GROUP_SIZE, GROUP_SIZE).float() * scales.float().unsqueeze(-1)).reshape(rows, k)


def linear(
    x: torch.Tensor,
    weights: SVDQWeights,
    *,
    shift: float = 0.0,
    unsigned: bool = False,
    rank_scale: torch.Tensor | None = None,
    activation: Activation = "none",
    gate: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """A whole int4 linear in W4A4 arithmetic; arguments as in `w4a8.linear`, `unsigned` as in `quantize_tokens`."""
    if weights.precision != "int4":
        raise ValueError(f"weights: expected precision 'int4', got {weights.precision!r}")
    require_tensor("x", x, (None, weights.in_features), FLOAT_DTYPES)
    token_codes, ascales = quantize_tokens(x, weights.smooth, shift, unsigned=unsigned)
    return epilogue(
        product(token_codes, ascales, weights.codes, weights.scales),
        wcscales=weights.wcscales,
        bias=weights.bias,
        lora_act=lowrank_down(x, weights.proj_down),
        proj_up=weights.proj_up,
        rank_scale=rank_scale,
        activation=activation,
        gate=gate,
        residual=residual,
        out_dtype=out_dtype or x.dtype,
    )
