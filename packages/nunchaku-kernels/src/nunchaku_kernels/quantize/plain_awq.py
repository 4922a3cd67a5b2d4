"""AWQ (Lin et al. 2023) as the published 4-bit T5 was made with it (svdquant_algorithm.md 9): the rival of `fit_w4a16`.

Inputs are smoothed by a power of their largest magnitudes, which is folded into the layer in front; ranges are searched
for by the squared error of each group's share of the product; codes are rounded to the nearest.
"""

from collections.abc import Sequence
from itertools import islice

import torch

from nunchaku_kernels._checks import FLOAT_DTYPES, require_multiple, require_tensor
from nunchaku_kernels.formats import W4A16Weights
from nunchaku_kernels.quantize._blocks import row_blocks
from nunchaku_kernels.quantize.affine import level_range
from nunchaku_kernels.quantize.awq import quantize_w4a16
from nunchaku_kernels.quantize.smoothing import InputSpans, published_candidates

NUM_GRIDS = 20
RANGE_STEPS = 20
_HIGHEST = level_range(4)[1]


def awq_smoothing(
    weights: Sequence[torch.Tensor],
    spans: InputSpans,
    moment: torch.Tensor,
    *,
    group_size: int = 128,
    dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """The vector s for which rounding `weight * s` to the nearest and dividing the inputs by s costs least.

    Candidates are `max |x_k| ** (i / 20)`, i = 0..19.

    Args:
        weights: [N, K], all that share the input; their squared output errors are added up.
        spans: largest magnitudes of the inputs.
        moment: `E[x x^T]` fp32 [K, K].
        group_size, dtype: see `awq_round`.

    Returns:
        fp32 [K]. The caller multiplies the columns of the weights by it, and divides the rows of the linear, or the
        weight of the norm, in front.
    """
    best, least = None, float("inf")
    for candidate in islice(published_candidates(spans, weights, NUM_GRIDS), NUM_GRIDS):
        error = 0.0
        for weight in weights:
            smoothed = weight.float() * candidate
            codes, scales, zeros = quantize_w4a16(smoothed, group_size, symmetric=False, dtype=dtype)
            deviation = (W4A16Weights(codes, scales, zeros).dequantize() - smoothed) / candidate
            error += float(((deviation @ moment) * deviation).sum(dtype=torch.float64))
        if best is None or error < least:
            best, least = candidate, error
    assert best is not None
    return best


def awq_round(
    weight: torch.Tensor,
    moment: torch.Tensor | None = None,
    *,
    group_size: int = 128,
    dtype: torch.dtype = torch.bfloat16,
) -> W4A16Weights:
    """Round to nearest with asymmetric groups whose ranges may be shorter by 1 to 20 % at both ends.

    Args:
        weight: fp32, fp16 or bf16 [N, K], smoothed.
        moment: `E[x x^T]` fp32 [K, K] of the smoothed inputs: the range of a group is the one with the least
            `E (sum over the group of error x)^2`; None for the whole range (as for q, k and v).
        group_size: inputs per scale.
        dtype: of scales and zeros.
    """
    require_tensor("weight", weight, (None, None), FLOAT_DTYPES)
    n, k = weight.shape
    require_multiple("weight", "K", k, group_size)
    if moment is None:
        return W4A16Weights(*quantize_w4a16(weight, group_size, symmetric=False, dtype=dtype))
    require_tensor("moment", moment, (k, k), (torch.float32,))
    inner = torch.stack([moment[i : i + group_size, i : i + group_size] for i in range(0, k, group_size)])
    codes = torch.empty(n, k, dtype=torch.uint8, device=weight.device)
    scales = torch.empty(n, k // group_size, dtype=dtype, device=weight.device)
    zeros = torch.empty_like(scales)
    for rows in row_blocks(n, k):
        groups = weight[rows].float().view(-1, k // group_size, group_size)
        low, high = groups.amin(dim=-1), groups.amax(dim=-1)
        least: torch.Tensor | None = None
        found: tuple[torch.Tensor, ...] = ()
        for step in range(RANGE_STEPS + 1):
            ratio = 1 - step / 100
            zero = (low * ratio).to(dtype)
            scale = ((high - low) * ratio / _HIGHEST).to(dtype)
            scale = torch.where(scale == 0, 1.0, scale)
            exact = (groups - zero.float().unsqueeze(-1)) / scale.float().unsqueeze(-1)
            levels = exact.round().clamp(0, _HIGHEST)
            deviation = levels * scale.float().unsqueeze(-1) + zero.float().unsqueeze(-1) - groups
            error = (torch.einsum("ngk,gkj->ngj", deviation, inner) * deviation).sum(dim=-1)
            tried = (levels.to(torch.uint8), scale, zero)
            if least is None:
                least, found = error, tried
                continue
            better = error < least
            least = torch.where(better, error, least)
            found = tuple(
                torch.where(better.unsqueeze(-1) if new.dim() == 3 else better, new, old)
                for new, old in zip(tried, found, strict=True)
            )
        codes[rows], scales[rows], zeros[rows] = found[0].view(-1, k), found[1], found[2]
    return W4A16Weights(codes, scales, zeros)
