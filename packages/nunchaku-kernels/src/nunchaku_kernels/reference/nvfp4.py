"""nvfp4: e2m1 weights and activations with an e4m3 scale per 16 inputs, fp32 accumulation (packing.md 8.2-8.3)."""

import torch

from nunchaku_kernels._checks import FLOAT_DTYPES, require_multiple, require_tensor
from nunchaku_kernels.formats import SVDQWeights
from nunchaku_kernels.formats.e2m1 import E2M1_MAX, decode, encode_nearest_even
from nunchaku_kernels.reference.epilogue import Activation, epilogue, lowrank_down

GROUP_SIZE = 16
E4M3_MAX = 448.0


def quantize_tokens(x: torch.Tensor, smooth: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Activation codes and micro-scales; there is no per-tensor activation scale and no shift.

    `t = r(x / smooth)` with r() the rounding to the dtype of x, `s = min(max|t| / 6, 448)` per group; the stored scale
    is e4m3(s), half to even, the codes are e2m1(t * (1 / s)) from the unrounded s. A group of zeros has scale 0 and
    codes 0; a non-finite group has scale NaN.

    Args:
        x: [M, K], K a multiple of 16; fp32 is not rounded on the way.
        smooth: [K] in natural order, or None for ones.

    Returns:
        codes int8 [M, K] 0..15, ascales float8_e4m3fn [M, K/16].
    """
    require_tensor("x", x, (None, None), FLOAT_DTYPES)
    m, k = x.shape
    require_multiple("x", "K", k, GROUP_SIZE)
    t = x.float()
    if smooth is not None:
        t = t / require_tensor("smooth", smooth, (k,), FLOAT_DTYPES).float()
    t = t.to(x.dtype).float().view(m, k // GROUP_SIZE, GROUP_SIZE)
    largest = t.abs().amax(dim=-1)
    scales = (largest / torch.full_like(largest, E2M1_MAX)).clamp(max=E4M3_MAX)
    scales = torch.where(largest.isfinite(), scales, torch.nan)
    usable = (scales > 0).unsqueeze(-1)
    codes = torch.where(usable, encode_nearest_even(t * torch.reciprocal(scales).unsqueeze(-1)), 0)
    return codes.reshape(m, k), scales.to(torch.float8_e4m3fn)


def product(
    token_codes: torch.Tensor, ascales: torch.Tensor, weight_codes: torch.Tensor, scales: torch.Tensor
) -> torch.Tensor:
    """`sum_g ascale scale sum_k value value` with fp32 accumulation, before wtscale and wcscales.

    Args:
        token_codes: int8 [M, K], 0..15.
        ascales: float8_e4m3fn [M, K/16].
        weight_codes: int8 [N, K], 0..15.
        scales: float8_e4m3fn [N, K/16]; the sign bit of a zero scale is ignored.

    Returns:
        fp32 [M, N].
    """
    tokens = _dequantize("token_codes", token_codes, "ascales", ascales)
    weight = _dequantize("weight_codes", weight_codes, "scales", scales)
    require_tensor("weight_codes", weight_codes, (None, token_codes.shape[1]))
    return tokens @ weight.t()


def _dequantize(code_name: str, codes: torch.Tensor, scale_name: str, scales: torch.Tensor) -> torch.Tensor:
    require_tensor(code_name, codes, (None, None), (torch.int8,))
    rows, k = codes.shape
    require_multiple(code_name, "K", k, GROUP_SIZE)
    require_tensor(scale_name, scales, (rows, k // GROUP_SIZE), (torch.float8_e4m3fn,))
    return (decode(codes).view(rows, k // GROUP_SIZE, GROUP_SIZE) * scales.float().abs().unsqueeze(-1)).reshape(rows, k)


def linear(
    x: torch.Tensor,
    weights: SVDQWeights,
    *,
    rank_scale: torch.Tensor | None = None,
    activation: Activation = "none",
    gate: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """A whole nvfp4 linear with activations quantised as the format prescribes; arguments as in `w4a8.linear`."""
    if weights.precision != "nvfp4":
        raise ValueError(f"weights: expected precision 'nvfp4', got {weights.precision!r}")
    require_tensor("x", x, (None, weights.in_features), FLOAT_DTYPES)
    token_codes, ascales = quantize_tokens(x, weights.smooth)
    accumulator = product(token_codes, ascales, weights.codes, weights.scales)
    if weights.wtscale is not None:
        accumulator = accumulator * weights.wtscale.float()
    return epilogue(
        accumulator,
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
