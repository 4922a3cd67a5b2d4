"""4-bit residuals, and rounding that knows the inputs: GPTQ as the textbook has it, descent that never loses."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nunchaku_kernels.formats import SVDQWeights
from nunchaku_kernels.formats.e2m1 import decode
from nunchaku_kernels.quantize import quantize_svdq, relative_output_error
from nunchaku_kernels.quantize.gptq import damped_cholesky, descend, gptq
from nunchaku_kernels.quantize.residual import QuantizedResidual, quantize_residual
from nunchaku_kernels.reference.weights import dequantize, effective_weight

PROPERTY = settings(deadline=None, max_examples=20)
SEEDS = st.integers(0, 2**32 - 1)
PRECISIONS = st.sampled_from(["int4", "nvfp4"])
SHIFT = 0.171875


def seeded(seed: int) -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator)


def correlated(seed: int, tokens: int, columns: int) -> Tensor:
    """Inputs with a decaying spectrum and channels of unequal size."""
    normal = seeded(seed)
    mixed = normal(tokens, columns) * torch.arange(1, columns + 1) ** -0.7
    return mixed @ normal(columns, columns) / columns**0.5 * normal(columns).mul(0.5).exp()


def second_moment(x: Tensor) -> Tensor:
    return x.t() @ x / len(x)


def started(seed: int, n: int, k: int, precision: str) -> tuple[Tensor, QuantizedResidual]:
    """A target and its round-to-nearest."""
    target = seeded(seed)(n, k)
    return target, quantize_residual(target, precision, [n], torch.bfloat16)  # type: ignore[arg-type]


def objective(target: Tensor, residual: QuantizedResidual, hessian: Tensor) -> float:
    missed = target.double() - residual.dequantize().double()
    return float(((missed @ hessian.double()) * missed).sum())


# ----------------------------------------------------------------- residual


@PROPERTY
@given(SEEDS, st.integers(1, 6), st.integers(1, 3), PRECISIONS, st.integers(1, 2))
def test_residual_stands_for_levels_times_steps(seed: int, n: int, k: int, precision: str, members: int) -> None:
    weight = seeded(seed)(n * members, k * 64) * 0.02
    weights = quantize_svdq(weight, precision=precision, rank=0, segments=[n] * members)  # type: ignore[arg-type]
    residual = QuantizedResidual(weights.codes, weights.scales, weights.wtscale, weights.wcscales)
    assert residual.precision == precision and residual.group_size == weights.group_size
    steps = residual.steps().repeat_interleave(residual.group_size, dim=1)
    assert torch.equal(residual.dequantize(), residual.levels() * steps)
    torch.testing.assert_close(residual.dequantize(), dequantize(weights), rtol=1e-6, atol=0)
    assert torch.equal(residual.dequantize(slice(0, 2)), residual.dequantize()[:2])
    assert torch.equal(residual.subtracted_from(weight), weight - residual.dequantize())
    vector = seeded(seed + 1)(k * 64)
    expected = residual.dequantize().double() @ vector.double()
    torch.testing.assert_close(residual.times(vector).double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("precision", ["int4", "nvfp4"])
def test_levels_and_codes_are_one_to_one(precision: str) -> None:
    _, start = started(0, 1, 64, precision)
    codes = torch.arange(64, dtype=torch.int8).remainder(16).view(1, 64)
    codes = codes - 8 if precision == "int4" else codes.masked_fill(codes == 8, 0)  # code 8 is -0
    levels = QuantizedResidual(codes, start.scales, start.wtscale).levels()
    again = start.with_levels(levels)
    assert torch.equal(again.codes, codes) and again.scales is start.scales and again.wtscale is start.wtscale
    assert torch.equal(start.nearest(levels), levels)


@PROPERTY
@given(st.lists(st.floats(-12, 12, width=32), min_size=1, max_size=30), PRECISIONS)
def test_no_level_is_nearer_than_the_nearest(values: list[float], precision: str) -> None:
    _, start = started(0, 1, 64, precision)
    table = decode(torch.arange(16, dtype=torch.int8)) if precision == "nvfp4" else torch.arange(-8, 8).float()
    given_values = torch.tensor(values)
    nearest = start.nearest(given_values)
    distances = (given_values.unsqueeze(1) - table).abs()
    assert torch.equal((given_values - nearest).abs(), distances.amin(dim=1))
    assert torch.isin(nearest, table).all()
    if precision == "int4":
        assert torch.equal(start.nearest(given_values, -7), nearest.clamp(min=-7))


# ----------------------------------------------------------------- GPTQ


@PROPERTY
@given(SEEDS, PRECISIONS, st.booleans())
def test_gptq_with_independent_inputs_is_round_to_nearest(seed: int, precision: str, dead: bool) -> None:
    target, start = started(seed, 5, 128, precision)
    diagonal = seeded(seed + 1)(128).exp()
    if dead:
        diagonal[::3] = 0
    blank = start.with_levels(torch.zeros(5, 128))
    assert torch.equal(gptq(target, blank, diagonal.diag()).codes, start.codes)
    if precision == "int4":
        codes = gptq(target, blank, diagonal.diag(), lowest=-7).codes
        assert torch.equal(codes, start.codes.clamp(min=-7))


def textbook_gptq(target: Tensor, start: QuantizedResidual, hessian: Tensor, damping: float, lowest: int) -> Tensor:
    """Levels by optimal brain quantisation in a fixed order, in fp64: every column read, its row of the inverse used to
    correct the others, then eliminated from the inverse."""
    h = hessian.double().clone()
    mean = h.diagonal().mean()
    h.diagonal()[h.diagonal() <= 0] = mean
    h += torch.eye(len(h)) * damping * mean
    inverse, work = torch.linalg.inv(h), target.double().clone()
    steps = start.steps().double().repeat_interleave(start.group_size, dim=1)
    levels = torch.zeros_like(work)
    for k in torch.argsort(hessian.diagonal(), descending=True, stable=True).tolist():
        levels[:, k] = start.nearest(work[:, k] / steps[:, k], lowest)
        error = (work[:, k] - levels[:, k] * steps[:, k]) / inverse[k, k]
        work -= torch.outer(error, inverse[k])
        inverse -= torch.outer(inverse[:, k], inverse[k]) / inverse[k, k]
    return levels


@pytest.mark.parametrize("precision", ["int4", "nvfp4"])
@pytest.mark.parametrize(("k", "dead", "lowest"), [(64, False, -8), (192, False, -7), (320, True, -8)])
def test_gptq_is_the_textbooks(precision: str, k: int, dead: bool, lowest: int) -> None:
    target, start = started(k, 24, k, precision)
    x = correlated(k + 1, 4 * k, k)
    if dead:
        x[:, 5::17] = 0
    hessian = second_moment(x)
    actual = gptq(target, start, hessian, damping=0.05, lowest=lowest)
    expected = textbook_gptq(target, start, hessian, 0.05, lowest)
    # fp32 may tip a value at the middle of two levels, and with it what follows in its row: in one row of 24 at most.
    assert (actual.levels() != expected).any(dim=1).sum() <= 1
    assert torch.equal(actual.scales.float(), start.scales.float())
    assert precision == "nvfp4" or int(actual.codes.min()) >= lowest


@PROPERTY
@given(SEEDS, PRECISIONS)
def test_gptq_beats_rounding_on_correlated_inputs(seed: int, precision: str) -> None:
    target, start = started(seed, 16, 128, precision)
    correlated_inputs, independent = second_moment(correlated(seed, 512, 128)), second_moment(seeded(seed)(512, 128))
    before, after = (objective(target, r, correlated_inputs) for r in (start, gptq(target, start, correlated_inputs)))
    assert after < 0.6 * before
    before, after = (objective(target, r, independent) for r in (start, gptq(target, start, independent)))
    assert after < 1.02 * before


def test_gptq_survives_a_singular_hessian() -> None:
    target, start = started(3, 8, 128, "int4")
    hessian = second_moment(correlated(4, 10, 128))
    result = gptq(target, start, hessian, damping=1e-6)
    assert objective(target, result, hessian) < 0.1 * objective(target, start, hessian)
    assert torch.equal(gptq(target, start, torch.zeros(128, 128)).codes, start.codes)


@pytest.mark.parametrize("position", [(3, 3), (70, 3)])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_not_finite_hessian(position: tuple[int, int], value: float) -> None:
    hessian = torch.eye(128)
    hessian[position] = hessian[position[::-1]] = value
    target, start = started(0, 4, 128, "int4")
    with pytest.raises(ValueError, match="matrix: expected finite second moments"):
        gptq(target, start, hessian)


@PROPERTY
@given(SEEDS, st.floats(1e-6, 0.1))
def test_damped_cholesky(seed: int, damping: float) -> None:
    matrix = second_moment(correlated(seed, 300, 40))
    kept = matrix.clone()
    factor = damped_cholesky(matrix, damping).double()
    expected = matrix.double() + damping * matrix.diagonal().double().mean() * torch.eye(40)
    torch.testing.assert_close(factor @ factor.t(), expected, rtol=0, atol=1e-5 * float(expected.max()))
    assert torch.equal(matrix, kept) and not factor.triu(1).any()


# ----------------------------------------------------------------- coordinate descent


@PROPERTY
@given(SEEDS, PRECISIONS, st.booleans(), st.integers(2, 400))
def test_descent_never_increases_the_error(seed: int, precision: str, rounded_well: bool, tokens: int) -> None:
    target, start = started(seed, 6, 192, precision)
    x = correlated(seed, tokens, 192)
    x[:, 7] = 0
    hessian = second_moment(x)
    if rounded_well:
        start = gptq(target, start, hessian)
    error = objective(target, start, hessian)
    better = descend(target, start, hessian)
    # What fp32 holds of the start's error is the limit where little of it is left.
    slack = 1e-5 * objective(target, start.with_levels(torch.zeros_like(target)), hessian)
    assert objective(target, better, hessian) <= error + slack
    if not rounded_well:
        assert objective(target, better, hessian) < 0.8 * error
    assert torch.equal(better.codes[:, 7], start.codes[:, 7])
    if precision == "nvfp4":
        assert torch.equal(better.scales.float(), start.scales.float())


def plain_descent(target: Tensor, start: QuantizedResidual, hessian: Tensor) -> tuple[Tensor, Tensor]:
    """Levels and steps after one sweep in fp64, with what is missed computed anew at every step."""
    h, size, levels, steps = hessian.double(), start.group_size, start.levels().double(), start.steps().double()

    def slope() -> Tensor:
        return (target.double() - levels * steps.repeat_interleave(size, dim=1)) @ h

    for group in range(steps.shape[1]):
        rows = slice(group * size, (group + 1) * size)
        if start.precision == "int4":
            mine = levels[:, rows]
            gain = (slope()[:, rows] * mine).sum(dim=1) / ((mine @ h[rows, rows]) * mine).sum(dim=1)
            steps[:, group] = (steps[:, group] + gain).to(start.scales.dtype).double()
        for k in range(rows.start, rows.stop):
            wanted = levels[:, k] + slope()[:, k] / (h[k, k] * steps[:, group])
            levels[:, k] = start.nearest(wanted)
    return levels, steps


@pytest.mark.parametrize("precision", ["int4", "nvfp4"])
def test_descent_is_one_plain_sweep(precision: str) -> None:
    target, start = started(11, 24, 192, precision)
    hessian = second_moment(correlated(12, 800, 192))
    result, (levels, steps) = descend(target, start, hessian), plain_descent(target, start, hessian)
    # As with GPTQ, fp32 may tip what lies in the middle: in one row of 24 at most.
    differ = (result.levels() != levels).any(dim=1) | (result.steps() != steps).any(dim=1)
    assert differ.sum() <= 1


@PROPERTY
@given(SEEDS, PRECISIONS)
def test_descent_stays_at_an_exact_solution(seed: int, precision: str) -> None:
    _, start = started(seed, 6, 128, precision)
    hessian = second_moment(correlated(seed, 200, 128))
    again = descend(start.dequantize(), start, hessian)
    assert torch.equal(again.codes, start.codes) and torch.equal(again.scales.float(), start.scales.float())


def test_descent_keeps_scales_that_a_half_can_hold() -> None:
    codes = torch.ones(1, 64, dtype=torch.int8)
    for target, scale in ((1e-9, 1e-7), (1e6, 6e4)):
        start = QuantizedResidual(codes, torch.full((1, 1), scale, dtype=torch.float16))
        result = descend(torch.full((1, 64), target), start, torch.eye(64))
        assert result.scales.isfinite().all() and (result.scales > 0).all()


# ----------------------------------------------------------------- quantize_svdq with a judge, and with a second moment


@pytest.mark.parametrize(
    ("errors", "calls", "kept"),
    [([3, 2, 1, 0], 4, 3), ([3, 2, 2.5, 0], 3, 1), ([3, 3, 3, 4], 4, 2), ([1, 2], 2, 0), ([math.nan, 1], 2, 0)],
)
def test_the_judge_decides(errors: list[float], calls: int, kept: int) -> None:
    weight, bias = seeded(9)(32, 128), seeded(10)(32)
    seen: list[SVDQWeights] = []

    def judge(weights: SVDQWeights) -> float:
        seen.append(weights)
        return errors[len(seen) - 1]

    found = quantize_svdq(weight, bias, rank=4, shift=SHIFT, num_iters=4, judge=judge)
    unjudged = quantize_svdq(weight, bias, rank=4, shift=SHIFT, num_iters=kept + 1)
    assert len(seen) == calls and not torch.equal(seen[0].proj_up, seen[1].proj_up)
    for name in ("codes", "scales", "proj_up", "proj_down", "bias"):
        assert torch.equal(getattr(found, name), getattr(seen[kept], name))
        assert torch.equal(getattr(found, name), getattr(unjudged, name))


@pytest.mark.parametrize(("precision", "columns"), [("int4", 128), ("int4", 100), ("nvfp4", 120)])
def test_svdq_with_gptq(precision: Any, columns: int) -> None:
    weight, bias, x = seeded(1)(48, columns), seeded(2)(48), correlated(3, 800, columns)
    smooth, shift = x.square().mean(dim=0).pow(0.25).bfloat16(), SHIFT if precision == "int4" else 0.0
    hessian = second_moment((x + shift) / smooth.float())
    options: Any = {"precision": precision, "rank": 4, "smooth": smooth, "shift": shift}
    nearest, rounded = (quantize_svdq(weight, bias, hessian=h, **options) for h in (None, hessian))
    assert torch.equal(rounded.scales.float(), nearest.scales.float())
    assert torch.equal(rounded.proj_up, nearest.proj_up) and torch.equal(rounded.proj_down, nearest.proj_down)
    if precision == "int4":
        assert rounded.codes.min() == -7
        searched = quantize_svdq(weight, bias, **options | {"shift": 0.0})
        assert searched.codes.min() == -8 and nearest.codes.min() == -7  # behind a shift, both ways alike

    def error(weights: SVDQWeights) -> float:
        missed = (effective_weight(weights)[:, :columns] - weight) * smooth.float()
        return float((missed @ hessian * missed).sum())

    assert error(rounded) < 0.6 * error(nearest)
    outputs = (
        relative_output_error(weight, bias, weights, x, shift=shift, arithmetic="w4a16")
        for weights in (rounded, nearest)
    )
    assert next(outputs) < 0.6 * next(outputs)
