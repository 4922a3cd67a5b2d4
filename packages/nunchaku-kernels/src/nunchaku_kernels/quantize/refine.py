"""Weights fitted to calibration data: what an SVDQuant linear of given rank and format can do at best.

The output error over the calibration tokens, `E |W x - R q - U A x - b|^2` with q the quantised activations, is a
quadratic function of the residual R and of the branch U A, and its coefficients are moments of x and q. The residual is
rounded with GPTQ and coordinate descent to what the branch leaves *given the quantised activations*
(`(W E[xq] - U A E[xq]) E[qq]^-1`: where quantisation noise drowns a direction of x, R turns away from it); then the
branch is the best low-rank answer to what R leaves (reduced-rank regression); and so on. How far to trust the data is
measured on tokens held out. SVDQuant takes the same branch from the weights alone and rounds to the nearest.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch.nn.functional import pad

from nunchaku_kernels._checks import ceil_to
from nunchaku_kernels.formats import SVDQWeights
from nunchaku_kernels.formats.svdq import GROUP_SIZES, Precision
from nunchaku_kernels.ops.arithmetic import check_arithmetic
from nunchaku_kernels.quantize.gptq import damped_cholesky, descend, gptq
from nunchaku_kernels.quantize.lowrank import truncated_svd
from nunchaku_kernels.quantize.moments import Covariances, InputMoments
from nunchaku_kernels.quantize.residual import QuantizedResidual, quantize_residual
from nunchaku_kernels.quantize.svdq import check_arguments, fused_members, require_fit

PRIORS = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
"""Weights of `Covariances.with_prior`, ascending. With few distinct inputs (text, 250 prompts) 1 to 3 wins, with many
(pictures) 0.1 to 0.3; a fixed 0.01 made pictures of other prompts worse than no calibration."""

_JITTER = 1e-6


class Refined(NamedTuple):
    """Fitted weights; the prior that was chosen; the error on held-out tokens, relative to the variance of the output
    (NaN where none were held out)."""

    weights: SVDQWeights
    prior: float
    held_out_error: float


class _Fit(NamedTuple):
    residual: QuantizedResidual
    up: torch.Tensor
    down: torch.Tensor
    bias: torch.Tensor


def quantize_refined(
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    moments: InputMoments,
    *,
    precision: Precision = "int4",
    rank: int = 32,
    segments: Sequence[int] | None = None,
    dtype: torch.dtype = torch.bfloat16,
    num_iters: int = 3,
    priors: Sequence[float] = PRIORS,
    generator: torch.Generator | None = None,
) -> Refined:
    """Quantises `y = x @ weight.T + bias` for the inputs whose moments are given.

    Args:
        weight: fp32, fp16 or bf16 [N, K], finite. K is padded to the group size with zero columns.
        bias: [N], finite, or None.
        moments: of the layer's inputs, with the smoothing vector, shift and arithmetic that are meant.
        precision, rank, segments, dtype: see `quantize_svdq`.
        num_iters: rounds of rounding the residual and fitting the branch, at least 1.
        priors: see `PRIORS`; the search starts in the middle and goes on as long as the error on held-out tokens falls.
            With one, or without held-out tokens, the largest is taken unjudged.
        generator: see `truncated_svd`.

    Raises:
        ValueError: an argument that does not fit, or moments that are not finite.
    """
    check_arguments(weight, bias, precision, rank, moments.shift, dtype, num_iters)
    members = fused_members(segments, weight.shape[0])
    columns = weight.shape[1]
    check_arithmetic("moments", precision, moments.arithmetic)
    if moments.smooth.numel() != columns:
        raise ValueError(f"moments: expected {columns} channels, got {moments.smooth.numel()}")
    if not priors:
        raise ValueError("priors: expected at least one, got none")
    padding = ceil_to(columns, GROUP_SIZES[precision]) - columns
    stored_smooth = pad(moments.smooth, (0, padding), value=1.0)
    smooth = stored_smooth.float()
    target = pad(weight.float(), (0, padding))

    def fit(covariances: Covariances, prior: float, iterations: int) -> _Fit:
        known = covariances.padded(padding).with_prior(prior, smooth)
        return _fit(target, bias, known, smooth, precision, members, rank, dtype, iterations, generator)

    prior, error = max(priors), float("nan")
    if len(priors) > 1 and moments.has_held_out:
        seen, unseen = moments.covariances("fit"), moments.covariances("held out").padded(padding)
        error, prior = _descending(priors, lambda weight: output_error(target, bias, fit(seen, weight, 1), unseen))
        del seen, unseen
    found = fit(moments.covariances("all"), prior, num_iters)
    stored_bias = found.bias.to(dtype)
    require_fit(dtype, proj_up=found.up, proj_down=found.down, bias=stored_bias)
    weights = SVDQWeights(
        precision=precision,
        codes=found.residual.codes,
        scales=found.residual.scales,
        smooth=stored_smooth,
        smooth_orig=stored_smooth,
        proj_down=found.down,
        proj_up=found.up,
        bias=stored_bias,
        wtscale=found.residual.wtscale,
        wcscales=found.residual.wcscales,
    )
    return Refined(weights, prior, error)


def _descending(values: Sequence[float], error: Callable[[float], float]) -> tuple[float, float]:
    """The least error that is found by going from the middle one of `values` in the direction in which it falls, and
    where it is."""
    middle = len(values) // 2
    best = (error(values[middle]), values[middle])
    for way in (values[middle + 1 :], values[:middle][::-1]):
        start = best
        for value in way:
            here = (error(value), value)
            if here >= best:
                break
            best = here
        if best < start:
            break  # it falls this way, so it rises the other way
    return best


def _fit(
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    known: Covariances,
    smooth: torch.Tensor,
    precision: Precision,
    members: Sequence[int],
    rank: int,
    dtype: torch.dtype,
    num_iters: int,
    generator: torch.Generator | None,
) -> _Fit:
    factor = damped_cholesky(known.quantized, _JITTER)
    up, down = truncated_svd(weight * smooth, rank, generator=generator)
    up, down = up.to(dtype), (down / smooth).to(dtype)
    residual: QuantizedResidual | None = None
    wanted = weight @ known.input_quantized
    for iteration in range(num_iters):
        left = wanted - up.float() @ (down.float() @ known.input_quantized) if rank else wanted
        target = torch.cholesky_solve(left.t(), factor).t()
        if residual is None:
            start = quantize_residual(target.contiguous(), precision, members, dtype)
            residual = gptq(target, start, known.quantized, damping=_JITTER)
        residual = descend(target, residual, known.quantized)
        if rank and iteration + 1 < num_iters:
            missed = weight @ known.input - residual.dequantize() @ known.input_quantized.t()
            up, down = reduced_rank_regression(missed, known.input, rank, dtype, generator)
    assert residual is not None
    offset = weight @ known.input_mean - residual.times(known.quantized_mean)
    offset -= up.float() @ (down.float() @ known.input_mean)
    return _Fit(residual, up, down, offset if bias is None else offset + bias.float())


def reduced_rank_regression(
    covariance: torch.Tensor,
    inputs: torch.Tensor,
    rank: int,
    dtype: torch.dtype,
    generator: torch.Generator | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """up [N, R] and down [R, K] that minimise `E |t - up down x|^2` (Izenman 1975).

    Args:
        covariance: `E[t x^T]` fp32 [N, K].
        inputs: `E[x x^T]` fp32 [K, K].
    """
    factor = damped_cholesky(inputs, 1e-4)
    whitened = torch.linalg.solve_triangular(factor, covariance.t(), upper=False).t()
    up, directions = truncated_svd(whitened.contiguous(), rank, generator=generator)
    down = torch.linalg.solve_triangular(factor.t(), directions.t(), upper=True).t()
    return up.to(dtype), down.to(dtype)


def output_error(weight: torch.Tensor, bias: torch.Tensor | None, fit: _Fit, known: Covariances) -> float:
    """`E |y - y'|^2 / E |y - E y|^2` of a fit, from the moments of the inputs; both [N, K] padded alike."""
    residual, up, down = fit.residual.dequantize(), fit.up.float(), fit.down.float()

    def trace(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return (left * right).sum(dtype=torch.float64)

    meant = trace(weight @ known.input, weight)
    reached = trace(residual @ known.quantized, residual)
    shared = trace(weight @ known.input_quantized, residual)
    if up.shape[1]:
        reached += trace(up.t() @ up, down @ known.input @ down.t())
        reached += 2 * trace(up.t() @ residual @ known.input_quantized.t(), down)
        shared += trace(up.t() @ weight @ known.input, down)
    offset = weight @ known.input_mean - residual @ known.quantized_mean - fit.bias
    offset -= up @ (down @ known.input_mean)
    if bias is not None:
        offset += bias.float()
    error = meant + reached - 2 * shared + offset.square().sum(dtype=torch.float64)
    return float(error / meant) if meant > 0 else float(error)
