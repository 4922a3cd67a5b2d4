"""Rounding that knows the inputs: GPTQ (Frantar et al. 2022), and coordinate descent on its result.

Both minimise `tr((target - value) H (target - value)^T)`, the squared error of the product over inputs with second
moment H, in codes whose scales are given; `descend` moves the scales of int4 groups as well.
"""

import torch

from nunchaku_kernels._checks import require_tensor
from nunchaku_kernels.quantize.int4 import INT4_MIN
from nunchaku_kernels.quantize.residual import QuantizedResidual

_BLOCK = 128
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


def gptq(
    target: torch.Tensor,
    start: QuantizedResidual,
    hessian: torch.Tensor,
    *,
    damping: float = 0.01,
    lowest: int = INT4_MIN,
) -> QuantizedResidual:
    """Codes for the scales of `start`, column by column; those that follow make up for the rounding error of each.

    Columns go in the order of descending diagonal; scales stay with their original groups (svdquant_algorithm.md 7).

    Args:
        target: fp32 [N, K], what the product should be made with.
        start: its scales; the codes are not read.
        hessian: fp32 [K, K], second moment of the inputs.
        damping: see `damped_cholesky`.
        lowest: lowest int4 code; the published quantiser leaves -8 out.
    """
    columns = target.shape[1]
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    factor = damped_cholesky(hessian[order][:, order], damping)
    upper = torch.linalg.cholesky(torch.cholesky_inverse(factor), upper=True)
    # Transposed, so that a column is contiguous.
    work, steps = target.t()[order].contiguous(), start.steps().t().contiguous()
    divisors = torch.where(steps == 0, torch.inf, steps)
    groups, pivots = (order // start.group_size).tolist(), upper.diagonal().tolist()
    levels, errors = torch.empty_like(work), torch.empty_like(work[:_BLOCK])
    # On a GPU the launches are what a column costs: results go where they are needed, without copies.
    for first in range(0, columns, _BLOCK):
        last = min(first + _BLOCK, columns)
        for k, value, level, error in zip(
            range(first, last), work[first:last], levels[first:last], errors, strict=False
        ):
            torch.div(value, divisors[groups[k]], out=level)
            start.nearest(level, lowest, out=level)
            torch.addcmul(value, level, steps[groups[k]], value=-1, out=error).div_(pivots[k])
            work[k + 1 : last].addr_(upper[k, k + 1 : last], error, alpha=-1)
        work[last:].addmm_(upper[first:last, last:].t(), errors[: last - first], alpha=-1)
    natural = torch.empty_like(levels)
    natural[order] = levels
    return start.with_levels(natural.t())


def descend(target: torch.Tensor, start: QuantizedResidual, hessian: torch.Tensor) -> QuantizedResidual:
    """One sweep of coordinate descent over all codes, each set to its best value while the others stand still.

    Never worse than `start` but for fp32 rounding. Before a group's codes, its int4 scale is set to its best value; the
    micro-scales of nvfp4 stay.

    Args:
        target: fp32 [N, K].
        start: codes and scales to improve.
        hessian: fp32 [K, K], second moment of the inputs.
    """
    size = start.group_size
    levels, steps = start.levels().t().contiguous(), start.steps().t().contiguous()
    scales = start.scales.t().contiguous() if start.precision == "int4" else None
    # slope[k] = half the derivative of the error by column k, negated; [K, N]
    slope = hessian @ start.subtracted_from(target).t()
    for group, first in enumerate(range(0, levels.shape[0], size)):
        rows = slice(first, first + size)
        block, inner = hessian[:, rows], hessian[rows, rows]
        if scales is not None:
            scales[group] = _best_scale(levels[rows], slope[rows], inner, scales[group])
            change = (scales[group].float() - steps[group]) * levels[rows]
            slope.addmm_(block, change, alpha=-1)
            steps[group] = scales[group].float()
        step, local, before = steps[group], slope[rows].clone(), levels[rows].clone()
        curvatures = inner.diagonal()
        divisors = curvatures[:, None] * torch.where(step == 0, torch.inf, step)
        moved = torch.zeros_like(local)
        for k, curvature in enumerate(curvatures.tolist()):
            if curvature <= 0:
                continue
            level = levels[first + k]
            start.nearest(torch.addcdiv(level, local[k], divisors[k], out=level), out=level)
            torch.sub(level, before[k], out=moved[k]).mul_(step)
            local.addr_(inner[k], moved[k], alpha=-1)
        slope.addmm_(block, moved, alpha=-1)
    result = start.with_levels(levels.t())
    if scales is None:
        return result
    return QuantizedResidual(result.codes, scales.t().contiguous())


def _best_scale(levels: torch.Tensor, slope: torch.Tensor, inner: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The scale [N] of one group (levels and slope [64, N]) that minimises the error, in its dtype."""
    curvature = (levels * (inner @ levels)).sum(dim=0)
    # Rounded first: what fp32 holds can be zero or infinite as a half.
    best = (scale.float() + (levels * slope).sum(dim=0) / curvature).to(scale.dtype)
    return torch.where((curvature > 0) & best.isfinite() & (best > 0), best, scale)
