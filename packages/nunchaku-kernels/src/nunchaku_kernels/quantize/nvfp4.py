"""nvfp4 weights: e2m1 codes, an e4m3 scale per 16 inputs, one scale per tensor (packing.md 8.1)."""

import torch

from nunchaku_kernels._checks import FLOAT_DTYPES, require_multiple, require_tensor
from nunchaku_kernels.formats.e2m1 import E2M1_MAX, encode_ties_up
from nunchaku_kernels.quantize._blocks import group_absmax, require_finite_scales, row_blocks

GROUP_SIZE = 16
E4M3_MAX = 448.0

# What the search lets the largest magnitude become. Near 4 the spacing of the upper codes fits better than at 6; the
# neighbours cover the rounding of the scale to e4m3. Measured: 8 % (heavy tails) to 13 % (Gaussian) less error.
_SEARCHED_TOPS = (6.0, 6.7, 4.2, 3.8)

_E4M3_SMALLEST_NORMAL = 2.0**-6
_E4M3_SUBNORMAL_STEP = 2.0**-9
# Bits of an fp32 mantissa below the three of e4m3.
_DROPPED_BITS = 20


def encode_e4m3_ties_up(values: torch.Tensor) -> torch.Tensor:
    """Nearest float8_e4m3fn, ties upwards, saturating at 448: the published rule for micro-scales.

    Args:
        values: fp32, non-negative (NaN is kept), any shape.

    Returns:
        float8_e4m3fn of the same shape.
    """
    require_tensor("values", values, dtypes=(torch.float32,))
    # Adding half a step to the bit pattern carries into the exponent by itself; what is left below is cut off.
    bits = values.contiguous().view(torch.int32) + (1 << (_DROPPED_BITS - 1))
    normal = ((bits >> _DROPPED_BITS) << _DROPPED_BITS).view(torch.float32)
    # Not floor(steps + 1/2): for the float below 1/2 that sum rounds to 1.
    steps = values / _E4M3_SUBNORMAL_STEP
    whole = steps.floor()
    subnormal = (whole + (steps - whole >= 0.5)) * _E4M3_SUBNORMAL_STEP
    rounded = torch.where(values < _E4M3_SMALLEST_NORMAL, subnormal, normal).clamp(max=E4M3_MAX)
    return torch.where(values.isnan(), values, rounded).to(torch.float8_e4m3fn)


def quantize_nvfp4(
    weight: torch.Tensor, dtype: torch.dtype | None = None, *, scale_search: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, micro-scales and the per-tensor scale; both roundings resolve ties towards +infinity.

    `t = dtype(max|w| / 6 / 448)` (1 for a zero tensor), `g = e4m3(max_group|w| / 6 / t)`, `code = e2m1(w / (g t))`; a
    group whose g rounds to 0 has codes 0.

    Args:
        weight: fp32, fp16 or bf16 [N, K], finite; K a multiple of 16.
        dtype: dtype of the per-tensor scale; None for that of the weight.
        scale_search: choose each g among `e4m3(max_group|w| / (6, 6.7, 4.2, 3.8) / t)` by the squared error of its
            group.

    Returns:
        codes int8 [N, K] 0..15 (never 8, -0), micro_scales float8_e4m3fn [N, K/16], wtscale [1] of `dtype`.

    Raises:
        ValueError: `weight` is not finite, or too large for a scale of `dtype`.
    """
    require_tensor("weight", weight, (None, None), FLOAT_DTYPES)
    n, k = weight.shape
    require_multiple("weight", "K", k, GROUP_SIZE)
    absmax = group_absmax(weight.reshape(-1)).float()
    wtscale = (_over(absmax, E2M1_MAX) / E4M3_MAX).to(dtype or weight.dtype)
    require_finite_scales(wtscale)
    wtscale = torch.where(wtscale == 0, 1.0, wtscale)
    tensor_scale = wtscale.float()
    codes = torch.empty(n, k, dtype=torch.int8, device=weight.device)
    micro_scales = torch.empty(n, k // GROUP_SIZE, dtype=torch.float8_e4m3fn, device=weight.device)
    for rows in row_blocks(n, k):
        groups = weight[rows].float().view(-1, k // GROUP_SIZE, GROUP_SIZE)
        block_absmax = group_absmax(groups)
        scales = encode_e4m3_ties_up(_over(block_absmax, E2M1_MAX) / tensor_scale)
        if scale_search:
            scales = _searched(groups, block_absmax, tensor_scale)
        codes[rows] = encode_ties_up(_exact(groups, scales, tensor_scale)).reshape(-1, k)
        micro_scales[rows] = scales
    return codes, micro_scales, wtscale.view(1)


def _over(values: torch.Tensor, divisor: float) -> torch.Tensor:
    """Division by a tensor: dividing by a Python number goes through a rounded reciprocal on some devices."""
    return values / torch.full_like(values, divisor)


def _exact(groups: torch.Tensor, scales: torch.Tensor, tensor_scale: torch.Tensor) -> torch.Tensor:
    steps = scales.float() * tensor_scale
    return groups / torch.where(steps == 0, torch.inf, steps).unsqueeze(-1)


def _searched(groups: torch.Tensor, absmax: torch.Tensor, tensor_scale: torch.Tensor) -> torch.Tensor:
    best: torch.Tensor | None = None
    best_error = torch.empty_like(absmax)
    for top in _SEARCHED_TOPS:
        scales = encode_e4m3_ties_up(_over(absmax, top) / tensor_scale).float()
        exact = _exact(groups, scales, tensor_scale).abs_()
        # Nearest magnitude, as the sum over the three ranges of equal steps: 1/2 up to 2, 1 up to 4, 2 up to 6. Which
        # way a tie goes does not matter here.
        nearest = exact.clamp(max=2).mul_(2).round_().div_(2)
        nearest += exact.clamp(2, 4).round_()
        nearest += exact.clamp(4, 6).div_(2).round_().mul_(2)
        error = nearest.sub_(exact).sub_(6).square_().sum(dim=-1) * scales.square()
        # A scale of zero turns the group into zeros; as its own error it would count nothing.
        error = torch.where(scales == 0, torch.inf, error)
        if best is None:
            best, best_error = scales, error
            continue
        better = error < best_error
        best, best_error = torch.where(better, scales, best), torch.where(better, error, best_error)
    assert best is not None
    return best.to(torch.float8_e4m3fn)
