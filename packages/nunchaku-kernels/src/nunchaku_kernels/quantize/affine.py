"""Asymmetric groups: unsigned codes with a scale and a zero each, searched for the error they leave.

With 8 bits a scale keeps five significant bits and a zero stands for the middle code, 128: the two nibble planes in
which such a weight is stored are then exact in 16 bits (see `formats.pack_w4a16`).
"""

from dataclasses import dataclass, replace
from typing import Self

import torch

from nunchaku_kernels._checks import FLOAT_DTYPES, require_finite, require_multiple, require_tensor
from nunchaku_kernels.formats.w4a16 import CODE_OF_ZERO, check_bits
from nunchaku_kernels.quantize._blocks import require_finite_scales, round_within_, row_blocks
from nunchaku_kernels.quantize.residual import GroupedCodes

_PLANE_BITS = 5
"""Significant bits of an 8-bit group's scale: times a level of the upper plane, -8..7, they fit bfloat16's eight."""

# Tried at either end of a group's range. Against the range itself, on groups of 128 Student-t weights (3, 5 and 30
# degrees of freedom): 17, 13 and 13 % less squared error after the refits, 54, 61 and 49 % less with inputs whose size
# varies; 49 finer candidates without refits come to 19, 16 and 16 %, and 51, 60 and 50 %.
_SHRINKS = (1.0, 0.85, 0.7, 0.55)
_REFITS = 4

# Each is gone over some twenty times: small enough for a core's own cache, and for torch not to share it among threads,
# which on a busy machine wait longer for each other than they compute (70 times as long was seen).
_BLOCK_ELEMENTS = 1 << 14
# On a GPU launches are what a block costs: with small ones fitting a block of T5-XXL took 78 s on an H100, mostly here.
_GPU_BLOCK_ELEMENTS = 1 << 24


@dataclass(frozen=True)
class AffineCodes(GroupedCodes):
    """A matrix in unsigned codes; a weight is `(code - code of zero) * scale + zero`.

    Attributes:
        codes: uint8 [N, K], 0..15 or 0..255.
        scales, zeros: [N, G] of one dtype; the zero is what code 0 (4 bits) or 128 (8 bits) stands for.
        bits: 4 or 8.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    bits: int = 4

    @property
    def group_size(self) -> int:
        return self.codes.shape[1] // self.scales.shape[1]

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.codes.shape
        return rows, columns

    def steps(self, rows: slice = slice(None)) -> torch.Tensor:
        return self.scales[rows].float()

    def levels(self, rows: slice = slice(None)) -> torch.Tensor:
        return self.codes[rows].float().sub_(CODE_OF_ZERO[self.bits])

    def offsets(self, rows: slice = slice(None)) -> torch.Tensor:
        return self.zeros[rows].float()

    def nearest(
        self, values: torch.Tensor, lowest: int | None = None, *, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        low, high = level_range(self.bits)
        levels = values.clone() if out is None else out if out is values else out.copy_(values)
        return round_within_(levels, low if lowest is None else max(low, lowest), high)

    def with_levels(self, levels: torch.Tensor) -> Self:
        return replace(self, codes=(levels + CODE_OF_ZERO[self.bits]).to(torch.uint8))


def level_range(bits: int) -> tuple[int, int]:
    """Lowest and highest level of asymmetric codes: 0 and 15, or -128 and 127."""
    return -CODE_OF_ZERO[bits], (1 << bits) - 1 - CODE_OF_ZERO[bits]


def quantize_affine(
    weight: torch.Tensor,
    group_size: int = 128,
    *,
    bits: int = 4,
    importance: torch.Tensor | None = None,
    search: bool = True,
    dtype: torch.dtype | None = None,
) -> AffineCodes:
    """Round to nearest in groups whose scale and zero are searched for.

    The search tries ranges that are up to 45 % shorter at either end, then fits scale and zero to the codes by least
    squares and rounds again, some times over; every step is kept only where it leaves less of
    `sum_k importance[k] error[k]^2`. 8-bit groups take their whole range.

    Args:
        weight: fp32, fp16 or bf16 [N, K], finite; K a multiple of `group_size`.
        group_size: inputs per scale.
        bits: 4 or 8.
        importance: of the columns, fp32 [K], not negative: the mean square of the inputs; None for equal ones.
        search: whether to search; else 4-bit groups take their whole range, too.
        dtype: of scales and zeros; None for that of the weight.

    Raises:
        ValueError: `weight` is not finite, or too large for a scale of `dtype`.
    """
    require_tensor("weight", weight, (None, None), FLOAT_DTYPES)
    n, k = weight.shape
    require_multiple("weight", "K", k, group_size)
    check_bits("bits", bits)
    require_finite("weight", weight)
    counts = torch.ones(k, device=weight.device)
    if importance is not None:
        counts = require_tensor("importance", importance, (k,), (torch.float32,))
        if not (counts.isfinite() & (counts >= 0)).all():
            raise ValueError("importance: expected finite values that are not negative, got others")
    counts = counts.view(-1, group_size)
    codes = torch.empty(n, k, dtype=torch.uint8, device=weight.device)
    scales = torch.empty(n, k // group_size, dtype=dtype or weight.dtype, device=weight.device)
    zeros = torch.empty_like(scales)
    for rows in row_blocks(n, k, _BLOCK_ELEMENTS if weight.device.type == "cpu" else _GPU_BLOCK_ELEMENTS):
        groups = weight[rows].float().view(-1, k // group_size, group_size)
        scale, zero = _searched(groups, counts, scales.dtype) if search and bits == 4 else _range(groups, scales, bits)
        levels = _rounded(groups, scale, zero, bits)
        codes[rows] = levels.add_(CODE_OF_ZERO[bits]).to(torch.uint8).view(-1, k)
        scales[rows], zeros[rows] = scale, zero
    require_finite_scales(scales)
    require_finite_scales(zeros)
    return AffineCodes(codes, scales, zeros, bits)


def _range(groups: torch.Tensor, like: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero for the whole range of each group, fp32 values of the dtype of `like`."""
    low, high = torch.aminmax(groups, dim=-1)
    span = torch.full_like(low, (1 << bits) - 1)
    if bits == 4:
        return _stored((high - low) / span, low, like.dtype)
    scale = _few_bits((high - low) / span).to(like.dtype).float()
    # The middle code, 128, is half a step above the middle of the codes.
    return _stored(scale, (low + high + scale) / 2, like.dtype)


def _few_bits(scale: torch.Tensor) -> torch.Tensor:
    """Rounded up to `_PLANE_BITS` significant bits."""
    mantissa, exponent = torch.frexp(scale)
    return torch.ldexp(torch.ceil(mantissa * (1 << _PLANE_BITS)), exponent - _PLANE_BITS)


def _stored(scale: torch.Tensor, zero: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Rounded to `dtype`, as fp32. A constant group is its zero: any scale does, 1 avoids 0 / 0."""
    scale = scale.to(dtype).float()
    return torch.where(scale == 0, 1.0, scale), zero.to(dtype).float()


def _rounded(groups: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, bits: int = 4) -> torch.Tensor:
    low, high = level_range(bits)
    # not NaN where a scale or zero overflowed, which is reported at the end
    exact = (groups - zero.unsqueeze(-1)).div_(scale.unsqueeze(-1)).nan_to_num_(nan=0.0)
    return round_within_(exact, low, high)


def _searched(groups: torch.Tensor, importance: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero [N, G] of groups [N, G, size] with the least error that is found; fp32 values of `dtype`."""
    low, high = torch.aminmax(groups, dim=-1)
    steps = torch.full_like(low, level_range(4)[1])
    scale, zero = _stored((high - low) / steps, low, dtype)
    levels = _rounded(groups, scale, zero)
    least = _error(groups, levels, scale, zero, importance)

    def consider(candidate: tuple[torch.Tensor, torch.Tensor], refit: bool = False) -> None:
        nonlocal scale, zero, levels, least
        tried = _rounded(groups, *candidate)
        error = _error(groups, tried, *candidate, importance)
        better = error < least
        scale, zero = torch.where(better, candidate[0], scale), torch.where(better, candidate[1], zero)
        least = torch.where(better, error, least)
        if refit:
            levels = torch.where(better.unsqueeze(-1), tried, levels)

    for bottom in _SHRINKS:
        for top in _SHRINKS:
            consider(_stored((high * top - low * bottom) / steps, low * bottom, dtype))
    levels = _rounded(groups, scale, zero)
    for _ in range(_REFITS):
        consider(_least_squares(groups, levels, scale, importance, dtype), refit=True)
    return scale, zero


def _error(
    groups: torch.Tensor, levels: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, importance: torch.Tensor
) -> torch.Tensor:
    difference = torch.addcmul(zero.unsqueeze(-1), levels, scale.unsqueeze(-1)).sub_(groups)
    return difference.square_().mul_(importance).sum(dim=-1)


def _least_squares(
    groups: torch.Tensor, levels: torch.Tensor, scale: torch.Tensor, importance: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """The scale and zero that suit given levels best."""
    shares = importance / importance.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    level_mean, group_mean = (levels * shares).sum(dim=-1), (groups * shares).sum(dim=-1)
    deviations = (levels - level_mean.unsqueeze(-1)).mul_(shares)
    variance, covariance = (deviations * levels).sum(dim=-1), (deviations * groups).sum(dim=-1)
    best = covariance / variance
    best = torch.where(best.isfinite() & (best > 0), best, scale).to(dtype).float()
    return _stored(best, group_mean - best * level_mean, dtype)
