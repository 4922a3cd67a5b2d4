"""Rounding that knows the inputs: GPTQ (Frantar et al. 2022), and coordinate descent on its result.

Both minimise `tr((target - value) H (target - value)^T)`, the squared error of the product over inputs with second
moment H, in codes whose scales are given; `descend` moves the scales of int4 groups, and scales and zeros of 4-bit
asymmetric groups, as well.
"""

from dataclasses import replace
from typing import NamedTuple, TypeVar

import torch

from nunchaku_kernels._checks import require_tensor
from nunchaku_kernels.quantize._replay import Replayed
from nunchaku_kernels.quantize.affine import AffineCodes
from nunchaku_kernels.quantize.residual import GroupedCodes, QuantizedResidual

Codes = TypeVar("Codes", bound=GroupedCodes)

_BLOCK = 128
# Columns that are corrected one by one: a product of two vectors costs as much memory traffic as one of matrices. On a
# GPU the launches are what a column costs, and a whole block of them is recorded.
_INNER = 16
# A matrix of fp32 moments can lack a Cholesky factor by its rounding alone; the published quantiser retries too.
_RETRIES = 8


def damped_cholesky(matrix: torch.Tensor, damping: float) -> torch.Tensor:
    """Lower Cholesky factor of `matrix + damping * mean(diagonal)`; damping grows tenfold until there is one.

    Channels that are always zero count as if they varied by themselves, so that they never meet a division by zero.

    Args:
        matrix: fp32 [K, K], symmetric, positive semidefinite up to rounding.
        damping: share of the mean diagonal that is added to the diagonal.

    Raises:
        ValueError: the matrix is not finite, or so far from positive that no damping helps.
    """
    require_tensor("matrix", matrix, (None, None), (torch.float32,))
    if matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"matrix: expected a square matrix, got {list(matrix.shape)}")
    matrix = matrix.clone()
    diagonal = matrix.diagonal()
    mean = float(diagonal.mean())
    diagonal.masked_fill_(diagonal <= 0, mean if mean > 0 else 1.0)
    added = max(damping * mean, 0.0)
    for attempt in range(_RETRIES):
        diagonal.add_(added)
        factor, failed = torch.linalg.cholesky_ex(matrix)
        if not failed and factor.diagonal().isfinite().all():
            return factor
        added = (10 ** (attempt - 4)) * mean
    raise ValueError("matrix: expected finite second moments of activations, got a matrix without Cholesky factor")


class Compensation(NamedTuple):
    """How columns make up for the rounding error of those before them; one for all weights with the same inputs.

    Attributes:
        order: int64 [K], columns by descending second moment.
        upper: fp32 [K, K], upper Cholesky factor of the inverse of the damped second moment, in that order.
    """

    order: torch.Tensor
    upper: torch.Tensor


def compensation(hessian: torch.Tensor, damping: float = 0.01) -> Compensation:
    """What `gptq` needs to know of the second moment of the inputs.

    Args:
        hessian: fp32 [K, K].
        damping: see `damped_cholesky`.
    """
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    inverse = torch.cholesky_inverse(damped_cholesky(hessian[order][:, order], damping))
    return Compensation(order, torch.linalg.cholesky(inverse, upper=True))


def gptq(
    target: torch.Tensor,
    start: Codes,
    hessian: torch.Tensor | Compensation,
    *,
    damping: float = 0.01,
    lowest: int | None = None,
) -> Codes:
    """Codes for the scales of `start`, column by column; those that follow make up for the rounding error of each.

    Columns go in the order of descending diagonal; scales stay with their original groups (svdquant_algorithm.md 7).

    Args:
        target: fp32 [N, K], what the product should be made with.
        start: its scales; the codes are not read.
        hessian: fp32 [K, K], second moment of the inputs; or what `compensation` made of it.
        damping: see `damped_cholesky`.
        lowest: lowest level; the published quantiser leaves -8 out.
    """
    columns = target.shape[1]
    order, upper = hessian if isinstance(hessian, Compensation) else compensation(hessian, damping)
    offsets = start.offsets()
    if offsets is not None:
        # What is subtracted once stays subtracted: the rest of the way is that of codes without offset.
        target = (target.view(*offsets.shape, -1) - offsets.unsqueeze(-1)).view_as(target)
    # Transposed, so that a column is contiguous.
    work, steps = target.t()[order].contiguous(), start.steps().t().contiguous()
    divisors = torch.where(steps == 0, torch.inf, steps)
    groups, pivots = order // start.group_size, upper.diagonal()
    levels, errors = torch.empty_like(work), torch.empty_like(work[:_BLOCK])

    def round_block(
        values: torch.Tensor, level: torch.Tensor, error: torch.Tensor, divisor: torch.Tensor, step: torch.Tensor,
        upper: torch.Tensor, pivot: torch.Tensor,
    ) -> None:  # fmt: skip
        size = values.shape[0]
        inner = _INNER if values.is_cpu else size
        for begin in range(0, size, inner):
            end = min(begin + inner, size)
            for k in range(begin, end):
                torch.div(values[k], divisor[k], out=level[k])
                start.nearest(level[k], lowest, out=level[k])
                torch.addcmul(values[k], level[k], step[k], value=-1, out=error[k]).div_(pivot[k])
                values[k + 1 : end].addr_(upper[k, k + 1 : end], error[k], alpha=-1)
            if end < size:
                values[end:].addmm_(upper[begin:end, end:].t(), error[begin:end], alpha=-1)

    rounded = Replayed(round_block, changed=3)
    for first in range(0, columns, _BLOCK):
        last = min(first + _BLOCK, columns)
        group, made = groups[first:last], errors[: last - first]
        rounded(
            work[first:last], levels[first:last], made, divisors[group], steps[group], upper[first:last, first:last],
            pivots[first:last],
        )  # fmt: skip
        work[last:].addmm_(upper[first:last, last:].t(), made, alpha=-1)
    natural = torch.empty_like(levels)
    natural[order] = levels
    return start.with_levels(natural.t())


def descend(target: torch.Tensor, start: Codes, hessian: torch.Tensor) -> Codes:
    """One sweep of coordinate descent over all codes, each set to its best value while the others stand still.

    Never worse than `start` but for fp32 rounding. Before a group's codes, its int4 scale, or the scale and zero of
    4-bit asymmetric codes, are set to their best values; the micro-scales of nvfp4 stay, and 8-bit groups as a whole.

    Args:
        target: fp32 [N, K].
        start: codes and scales to improve.
        hessian: fp32 [K, K], second moment of the inputs.
    """
    size = start.group_size
    levels, steps = start.levels().t().contiguous(), start.steps().t().contiguous()
    scales, zeros = _movable(start)
    # slope[k] = half the derivative of the error by column k, negated; [K, N]
    slope = hessian @ start.subtracted_from(target).t()

    def move_codes(
        level: torch.Tensor, local: torch.Tensor, moved: torch.Tensor, divisor: torch.Tensor, step: torch.Tensor,
        inner: torch.Tensor,
    ) -> None:  # fmt: skip
        moved.copy_(level)
        columns = _INNER if level.is_cpu else size
        for begin in range(0, size, columns):
            end = min(begin + columns, size)
            for k in range(begin, end):
                start.nearest(torch.addcdiv(level[k], local[k], divisor[k], out=level[k]), out=level[k])
                torch.sub(level[k], moved[k], out=moved[k]).mul_(step)
                local[k + 1 : end].addr_(inner[k, k + 1 : end], moved[k], alpha=-1)
            if end < size:
                local[end:].addmm_(inner[begin:end, end:].t(), moved[begin:end], alpha=-1)

    descended = Replayed(move_codes, changed=3)
    for group, first in enumerate(range(0, levels.shape[0], size)):
        rows, later = slice(first, first + size), slice(first + size, None)
        inner, local = hessian[rows, rows], slope[rows]  # this group's slopes are not needed again
        change = torch.zeros_like(local)
        if scales is not None:
            values = levels[rows]
            if zeros is None:
                scales[group] = _best_scale(values, local, inner, scales[group])
                change = (scales[group].float() - steps[group]) * values
            else:
                old = zeros[group].float()
                scales[group], zeros[group] = _best_scale_and_zero(values, local, inner, scales[group], zeros[group])
                change = (scales[group].float() - steps[group]) * values + (zeros[group].float() - old)
            local.addmm_(inner, change, alpha=-1)
            steps[group] = scales[group].float()
        # A channel that is always zero stays as it is.
        curvature = inner.diagonal()[:, None]
        divisors = torch.where(
            curvature > 0, curvature * torch.where(steps[group] == 0, torch.inf, steps[group]), torch.inf
        )
        moved = torch.empty_like(local)
        descended(levels[rows], local, moved, divisors, steps[group], inner)
        slope[later].addmm_(hessian[later, rows], change.add_(moved), alpha=-1)
    result = start.with_levels(levels.t())
    moved_scales = {"scales": scales, "zeros": zeros}
    stored = {name: value.t().contiguous() for name, value in moved_scales.items() if value is not None}
    return replace(result, **stored) if stored else result  # type: ignore[type-var]  # both kinds are dataclasses


def _movable(start: GroupedCodes) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Copies [G, N] of the scales, and of the zeros, that may be given any value of their dtype."""
    if isinstance(start, AffineCodes) and start.bits == 4:
        return start.scales.t().contiguous(), start.zeros.t().contiguous()
    if isinstance(start, QuantizedResidual) and start.precision == "int4":
        return start.scales.t().contiguous(), None
    return None, None


def _best_scale(levels: torch.Tensor, slope: torch.Tensor, inner: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The scale [N] of one group (levels and slope [64, N]) that minimises the error, in its dtype."""
    curvature = (levels * (inner @ levels)).sum(dim=0)
    # Rounded first: what fp32 holds can be zero or infinite as a half.
    best = (scale.float() + (levels * slope).sum(dim=0) / curvature).to(scale.dtype)
    return torch.where((curvature > 0) & best.isfinite() & (best > 0), best, scale)


def _best_scale_and_zero(
    levels: torch.Tensor, slope: torch.Tensor, inner: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero [N] of one group (levels and slope [size, N]) that minimise the error, in their dtype; those given
    where rounding leaves nothing of the gain."""
    pushed, sums = inner @ levels, inner.sum(dim=0)
    by_scale, mixed, by_zero = (levels * pushed).sum(dim=0), pushed.sum(dim=0), sums.sum()
    scale_slope, zero_slope = (levels * slope).sum(dim=0), slope.sum(dim=0)
    determinant = by_scale * by_zero - mixed.square()
    # Nearly dependent where all codes of a group are alike: then the zero alone moves.
    independent = determinant > 1e-6 * by_scale * by_zero
    step = (by_zero * scale_slope - mixed * zero_slope) / determinant
    best_scale = (scale.float() + step).to(scale.dtype)
    best_scale = torch.where(independent & best_scale.isfinite() & (best_scale > 0), best_scale, scale)
    # The best zero for the scale as it is stored.
    scale_change = best_scale.float() - scale.float()
    best_zero = (zero.float() + (zero_slope - mixed * scale_change) / by_zero).to(zero.dtype)
    zero_change = best_zero.float() - zero.float()
    gain = 2 * (scale_change * scale_slope + zero_change * zero_slope)
    gain -= scale_change.square() * by_scale + 2 * scale_change * zero_change * mixed + zero_change.square() * by_zero
    better = best_zero.isfinite() & (gain > 0)
    return torch.where(better, best_scale, scale), torch.where(better, best_zero, zero)
