"""W4A8: 4-bit weights decoded to int8 with one scale per row, int8 activations with one scale per token.

The definition is fixed to the bit (numerics.md, "w4a8"): the same 16-bit input gives the same token codes and scales on
every device, and the same codes give the same int32 sums. Only the fp32 epilogue may differ in its last bits.
"""

import torch

from nunchaku_kernels._checks import FLOAT_DTYPES, require_finite, require_multiple, require_tensor
from nunchaku_kernels.formats import SVDQWeights
from nunchaku_kernels.reference.epilogue import Activation, epilogue, lowrank_down

GROUP_SIZE = 64
INT8_MAX = 127

# 1024 products of two int8 values sum to at most 2^24, so fp32 holds every partial sum exactly in any order.
_EXACT_COLUMNS = 1024


def fold_scales(codes: torch.Tensor, scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Splits the group scales into one scale per row and an integer multiplier per group.

    `r = max_k |q s| / 127` over the codes (1 for a zero row) and `m = 2 * rint(128 s / r)` (0 for a group of zero
    codes), in fp64; m is even and below 2^15.

    Args:
        codes: int8 [N, K], -8..7.
        scales: [N, K/64], finite.

    Returns:
        row_scales fp32 [N], group_multipliers int16 [N, K/64].
    """
    require_tensor("codes", codes, (None, None), (torch.int8,))
    n, k = codes.shape
    require_multiple("codes", "K", k, GROUP_SIZE)
    groups = k // GROUP_SIZE
    require_tensor("scales", scales, (n, groups), FLOAT_DTYPES)
    require_finite("scales", scales)
    largest_code = codes.view(n, groups, GROUP_SIZE).abs().amax(dim=-1)
    if codes.device.type == "mps":  # Metal has no fp64; one number per group travels instead.
        largest_code, scales = largest_code.cpu(), scales.cpu()
    scales64 = scales.double()
    largest = (largest_code * scales64.abs()).amax(dim=1)
    # A tensor divisor: dividing by a Python number goes through a rounded reciprocal on some devices.
    row = torch.where(largest == 0, 1.0, largest / torch.full_like(largest, INT8_MAX))
    multipliers = 2 * torch.round(128 * scales64 / row.unsqueeze(1))
    multipliers = torch.where(largest_code == 0, 0.0, multipliers)
    return row.float().to(codes.device), multipliers.to(device=codes.device, dtype=torch.int16)


def decode_int8(codes: torch.Tensor, group_multipliers: torch.Tensor) -> torch.Tensor:
    """int8 weights of the integer product: `(q m + 129) >> 8`, |result| <= 127 for multipliers of `fold_scales`.

    Args:
        codes: int8 [N, K], -8..7.
        group_multipliers: int16 [N, K/64].

    Returns:
        int8 [N, K].
    """
    require_tensor("codes", codes, (None, None), (torch.int8,))
    n, k = codes.shape
    require_multiple("codes", "K", k, GROUP_SIZE)
    require_tensor("group_multipliers", group_multipliers, (n, k // GROUP_SIZE), (torch.int16,))
    products = codes.view(n, -1, GROUP_SIZE).to(torch.int32) * group_multipliers.to(torch.int32).unsqueeze(-1)
    return ((products + 129) >> 8).to(torch.int8).reshape(n, k)


def quantize_tokens(
    x: torch.Tensor, smooth: torch.Tensor | None = None, shift: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token codes and scales, in fp32 with every operation rounded by itself.

    `t = (x + shift) * (1 / smooth)`, `mx = max_k |t|`, `a = mx / 127`, `t8 = rint(t * (127 / mx))`, half to even. Where
    127 / mx is infinite (a zero token, or one below 2^-121) a = 1 and t8 = 0. A token with a non-finite t gets a = NaN
    and t8 = 0: int8 cannot carry it.

    Args:
        x: fp32, fp16 or bf16 [M, K].
        smooth: [K] in natural channel order, or None for ones.
        shift: added to x before smoothing.

    Returns:
        codes int8 [M, K], ascales fp32 [M].
    """
    require_tensor("x", x, (None, None), FLOAT_DTYPES)
    k = x.shape[1]
    t = x.float() + shift
    if smooth is not None:
        t = t * torch.reciprocal(require_tensor("smooth", smooth, (k,), FLOAT_DTYPES).float())
    mx = t.abs().amax(dim=1)
    # Tensors on both sides, as in `fold_scales`.
    limit = torch.full_like(mx, INT8_MAX)
    inverse = limit / mx
    usable = inverse.isfinite() & mx.isfinite()
    codes = torch.round(t * inverse.unsqueeze(1))
    codes = torch.where(usable.unsqueeze(1), codes, 0.0).to(torch.int8)
    ascales = torch.where(usable, mx / limit, 1.0)
    return codes, torch.where(mx.isfinite(), ascales, torch.nan)


def accumulate(token_codes: torch.Tensor, weight_codes: torch.Tensor) -> torch.Tensor:
    """The integer product `token_codes @ weight_codes.T`, exact on every device.

    Args:
        token_codes: int8 [M, K].
        weight_codes: int8 [N, K] of `decode_int8`; K below 133,000.

    Returns:
        int32 [M, N].
    """
    require_tensor("token_codes", token_codes, (None, None), (torch.int8,))
    m, k = token_codes.shape
    require_tensor("weight_codes", weight_codes, (None, k), (torch.int8,))
    total = torch.zeros(m, weight_codes.shape[0], dtype=torch.int32, device=token_codes.device)
    for start in range(0, k, _EXACT_COLUMNS):
        columns = slice(start, start + _EXACT_COLUMNS)
        total += (token_codes[:, columns].float() @ weight_codes[:, columns].float().t()).to(torch.int32)
    return total


def linear(
    x: torch.Tensor,
    weights: SVDQWeights,
    *,
    shift: float = 0.0,
    rank_scale: torch.Tensor | None = None,
    activation: Activation = "none",
    gate: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """A whole int4 linear in W4A8 arithmetic.

    Args:
        x: fp32, fp16 or bf16 [M, K].
        weights: int4 weights with K inputs and N outputs.
        shift: added to x on the quantised path only.
        rank_scale, activation, gate, residual: see `epilogue`.
        out_dtype: None for the dtype of x.

    Returns:
        [M, N] of `out_dtype`.
    """
    if weights.precision != "int4":
        raise ValueError(f"weights: expected precision 'int4', got {weights.precision!r}")
    require_tensor("x", x, (None, weights.in_features), FLOAT_DTYPES)
    row_scales, multipliers = fold_scales(weights.codes, weights.scales)
    token_codes, ascales = quantize_tokens(x, weights.smooth, shift)
    sums = accumulate(token_codes, decode_int8(weights.codes, multipliers))
    return epilogue(
        sums.float() * ascales.unsqueeze(1) * row_scales,
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
