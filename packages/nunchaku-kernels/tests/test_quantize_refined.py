"""Layers fitted to calibration data: the error they predict is the error they make, and it is less on other inputs."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nunchaku_kernels.formats import SVDQWeights, pack_svdq, unpack_svdq
from nunchaku_kernels.quantize import (
    InputMoments,
    quantize_modulation,
    quantize_refined,
    quantize_svdq,
    quantized_activations,
    relative_output_error,
)
from nunchaku_kernels.quantize.refine import _Fit, output_error
from nunchaku_kernels.quantize.residual import QuantizedResidual
from nunchaku_kernels.reference import w4a4
from nunchaku_kernels.reference.weights import effective_weight

PROPERTY = settings(deadline=None, max_examples=15)
SEEDS = st.integers(0, 2**32 - 1)
SHIFT = 0.171875


class Layer:
    """A linear and where its inputs come from: few directions, channels of unequal size, some noise."""

    def __init__(self, seed: int, n: int, k: int, dimensions: int = 12) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.sizes = self.normal(k).mul(0.5).exp()
        self.directions = self.normal(dimensions, k) / dimensions**0.5
        self.mean = self.normal(k)
        self.weight = self.normal(n, k) * 0.05 + 0.05 * self.normal(n, 4) @ self.normal(4, k)
        self.bias = self.normal(n)
        self.smooth = self.sizes.sqrt().bfloat16()

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def inputs(self, tokens: int) -> Tensor:
        shared = self.normal(tokens, len(self.directions)) @ self.directions
        return (shared + self.mean + 0.05 * self.normal(tokens, len(self.mean))) * self.sizes

    def moments(self, x: Tensor, held_out: int = 0, **options: Any) -> InputMoments:
        """Of some tokens, the last `held_out` of which are held out."""
        moments = InputMoments(self.smooth, **options)
        for rows, judged in ((slice(0, len(x) - held_out), False), (slice(len(x) - held_out, None), True)):
            moments.update(x[rows], held_out=judged)
        return moments


def as_fit(weights: SVDQWeights) -> _Fit:
    residual = QuantizedResidual(weights.codes, weights.scales, weights.wtscale, weights.wcscales)
    bias = torch.zeros(len(weights.codes)) if weights.bias is None else weights.bias.float()
    return _Fit(residual, weights.proj_up, weights.proj_down, bias)


# ----------------------------------------------------------------- the error that moments know


@PROPERTY
@given(SEEDS, st.sampled_from(["w4a4", "w4a8", "w4a16", "nvfp4"]), st.integers(0, 8), st.booleans())
def test_error_from_moments_is_the_error(seed: int, arithmetic: Any, rank: int, with_bias: bool) -> None:
    layer = Layer(seed, 24, 128)
    bias, shift = layer.bias if with_bias else None, 0.0 if arithmetic == "nvfp4" else SHIFT
    precision: Any = "nvfp4" if arithmetic == "nvfp4" else "int4"
    x = layer.inputs(200)
    weights = quantize_svdq(
        layer.weight, bias, precision=precision, rank=rank, smooth=layer.smooth, shift=shift, num_iters=1
    )
    moments = layer.moments(x, 80, shift=shift, arithmetic=arithmetic)
    for which, rows in (("fit", slice(0, 120)), ("held out", slice(120, None)), ("all", slice(None))):
        actual = output_error(layer.weight, bias, as_fit(weights), moments.covariances(which))
        expected = relative_output_error(layer.weight, bias, weights, x[rows], shift=shift, arithmetic=arithmetic)
        assert actual == pytest.approx(expected, rel=2e-3)
        meant = torch.nn.functional.linear(x[rows].double(), layer.weight.double())
        residual = as_fit(weights).residual.dequantize().double()
        made = quantized_activations(x[rows], layer.smooth, shift, arithmetic).double() @ residual.t()
        made += x[rows].double() @ (weights.proj_up.double() @ weights.proj_down.double()).t()
        if weights.bias is not None:
            made += weights.bias.double() - (0 if bias is None else bias.double())
        expected = float((made - meant).square().sum() / (meant - meant.mean(dim=0)).square().sum())
        assert actual == pytest.approx(expected, rel=2e-3)


def test_error_is_that_of_the_running_layer() -> None:
    layer = Layer(1, 32, 128)
    x = layer.inputs(100).bfloat16()
    weights = quantize_svdq(layer.weight, layer.bias, smooth=layer.smooth, shift=SHIFT)
    exact = torch.nn.functional.linear(x.double(), layer.weight.double(), layer.bias.double())
    actual = w4a4.linear(x, weights, shift=SHIFT, unsigned=True, out_dtype=torch.float32).double()
    expected = float((actual - exact).square().sum() / (exact - exact.mean(dim=0)).square().sum())
    assert relative_output_error(layer.weight, layer.bias, weights, x, shift=SHIFT) == pytest.approx(expected, rel=0.01)
    one = relative_output_error(layer.weight, layer.bias, weights, x[:1], shift=SHIFT)
    assert one == pytest.approx(float((actual - exact)[:1].square().sum()), rel=0.01)


# ----------------------------------------------------------------- refined layers


@pytest.mark.parametrize(
    ("options", "arithmetic", "shift", "columns"),
    [
        ({}, "w4a4", 0.0, 256),
        ({}, "w4a8", 0.0, 256),
        ({}, "w4a4", SHIFT, 250),
        ({"rank": 0}, "w4a4", 0.0, 256),
        ({"dtype": torch.float16}, "w4a4", 0.0, 130),
        ({"precision": "nvfp4"}, "nvfp4", 0.0, 200),
        ({"precision": "nvfp4", "segments": [30, 50]}, "nvfp4", 0.0, 256),
    ],
)
def test_refined_layers_do_better_on_other_inputs(
    options: dict[str, Any], arithmetic: Any, shift: float, columns: int
) -> None:
    layer = Layer(columns, 80, columns)
    options = {"rank": 8, **options}
    moments = layer.moments(layer.inputs(1500), 300, shift=shift, arithmetic=arithmetic)
    refined = quantize_refined(layer.weight, layer.bias, moments, **options)
    plain = quantize_svdq(layer.weight, layer.bias, smooth=layer.smooth, shift=shift, **options)
    unseen = layer.inputs(500)

    def error(weights: SVDQWeights) -> float:
        return relative_output_error(layer.weight, layer.bias, weights, unseen, shift=shift, arithmetic=arithmetic)

    assert error(refined.weights) < 0.6 * error(plain)
    assert refined.held_out_error == pytest.approx(error(refined.weights), rel=0.35)
    weights, group = refined.weights, 16 if "precision" in options else 64
    assert weights.codes.shape == (80, math.ceil(columns / group) * group)
    assert not weights.codes[:, columns:].any() and not weights.proj_down[:, columns:].any()
    assert torch.equal(weights.smooth[:columns], layer.smooth) and (weights.smooth[columns:] == 1).all()
    assert (weights.wcscales is not None) == ("segments" in options)
    stored = (weights.proj_up, weights.proj_down, weights.bias)
    assert all(part is not None and part.dtype == options.get("dtype", torch.bfloat16) for part in stored)
    restored = unpack_svdq(pack_svdq(weights))
    assert torch.equal(restored.codes[:80, : weights.codes.shape[1]], weights.codes)


def test_refined_layers_are_reproducible() -> None:
    layer = Layer(2, 300, 320)
    moments = layer.moments(layer.inputs(400), 100)
    state = torch.random.get_rng_state()
    first, second = (quantize_refined(layer.weight, None, moments, rank=4, num_iters=2) for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert first.prior == second.prior and first.held_out_error == second.held_out_error
    for name in ("codes", "scales", "proj_up", "proj_down", "bias"):
        assert torch.equal(getattr(first.weights, name), getattr(second.weights, name))


@pytest.mark.parametrize("precision", ["int4", "nvfp4"])
def test_a_large_prior_is_no_calibration(precision: Any) -> None:
    layer = Layer(3, 64, 128)
    layer.sizes.fill_(1)
    layer.smooth.fill_(1)
    moments = layer.moments(layer.inputs(300), arithmetic="nvfp4" if precision == "nvfp4" else "w4a4")
    plain = quantize_svdq(layer.weight, precision=precision, rank=8, num_iters=1)

    def fitted(prior: float) -> SVDQWeights:
        return quantize_refined(
            layer.weight, None, moments, precision=precision, rank=8, num_iters=1, priors=[prior]
        ).weights

    def distance(weights: SVDQWeights) -> float:
        return float((effective_weight(weights) - layer.weight).norm() / layer.weight.norm())

    assert distance(fitted(1e5)) <= 1.01 * distance(plain) < 0.3 * distance(fitted(1e-3))
    if precision == "nvfp4":  # int4 moves its scales
        assert (fitted(1e5).codes == plain.codes).float().mean() > 0.99


@pytest.mark.parametrize("arithmetic", ["w4a4", "w4a8"])
@pytest.mark.parametrize("seed", range(4))
def test_few_distinct_inputs_are_not_trusted(seed: int, arithmetic: Any) -> None:
    layer = Layer(seed, 96, 128, dimensions=64)
    distinct = layer.inputs(20)
    # As text is: the same few tokens again and again, those held out among themselves too.
    tokens = torch.cat((distinct[:14].repeat(20, 1), distinct[14:].repeat(20, 1)))
    moments = layer.moments(tokens, 120, arithmetic=arithmetic)
    unseen = layer.inputs(500)

    def error(weights: SVDQWeights) -> float:
        return relative_output_error(layer.weight, None, weights, unseen, arithmetic=arithmetic)

    plain = error(quantize_svdq(layer.weight, rank=8, smooth=layer.smooth))
    trusting = error(quantize_refined(layer.weight, None, moments, rank=8, priors=[0.003]).weights)
    chosen = quantize_refined(layer.weight, None, moments, rank=8)
    assert error(chosen.weights) <= plain < trusting
    assert chosen.prior >= 1


def test_many_inputs_are_trusted() -> None:
    layer = Layer(5, 64, 128)
    moments = layer.moments(layer.inputs(4000), 1000)
    assert quantize_refined(layer.weight, None, moments, rank=8).prior < 0.3


def test_channels_that_data_does_not_show_keep_their_weights() -> None:
    layer = Layer(6, 48, 128)
    x = layer.inputs(600)
    x[:, [5, 70]] = 0
    weights = quantize_refined(layer.weight, None, layer.moments(x, 100), rank=4).weights
    error = (effective_weight(weights) - layer.weight)[:, [5, 70]]
    # Some are clipped, since scales go by the channels that matter; none is given away.
    assert error.norm() < 0.6 * layer.weight[:, [5, 70]].norm()


def test_without_held_out_tokens_the_largest_prior_is_taken() -> None:
    layer = Layer(8, 16, 64)
    x = layer.inputs(100)
    refined = quantize_refined(layer.weight, layer.bias, layer.moments(x), rank=4, priors=[0.1, 0.3])
    assert refined.prior == 0.3 and math.isnan(refined.held_out_error)
    one = quantize_refined(layer.weight, layer.bias, layer.moments(x, 50), rank=4, priors=[0.1])
    assert one.prior == 0.1 and math.isnan(one.held_out_error)


def moments_of(x: Tensor, arithmetic: Any = "w4a4", shift: float = 0.0) -> InputMoments:
    moments = InputMoments(torch.ones(x.shape[1], dtype=torch.bfloat16), shift, arithmetic)
    moments.update(x)
    return moments


ONES = torch.ones(8, 64)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: quantize_refined(torch.ones(8, 63), None, m), ValueError, "moments: expected 63 channels, got 64"),
        (lambda m: quantize_refined(ONES, None, m, priors=[]), ValueError, "priors: expected at least one"),
        (lambda m: quantize_refined(ONES, None, m, rank=-1), ValueError, "rank: expected"),
        (lambda m: quantize_refined(ONES, None, m, num_iters=0), ValueError, "num_iters: expected at least 1"),
        (lambda m: quantize_refined(ONES, None, m, segments=[4]), ValueError, "segments: .* add up to 8"),
        (lambda m: quantize_refined(ONES, torch.ones(7), m), ValueError, "bias: expected shape"),
        (lambda m: quantize_refined(ONES * math.nan, None, m), ValueError, "weight: expected finite"),
        (lambda m: quantize_refined(ONES, None, m, dtype=torch.float32), TypeError, "dtype: expected float16"),
        (lambda m: quantize_refined(ONES, None, m, precision="nvfp4"), ValueError, "nvfp4 .* cannot .* 'w4a4'"),
        (lambda m: quantize_refined(ONES, None, InputMoments(m.smooth)), ValueError, "x: expected at least one token"),
        (lambda m: quantize_svdq(ONES, hessian=torch.eye(63)), ValueError, "hessian: expected shape"),
        (lambda m: quantize_svdq(ONES, hessian=torch.eye(64) * math.nan), ValueError, "expected finite second moments"),
        (lambda m: quantize_svdq(ONES, num_iters=0), ValueError, "num_iters: expected at least 1"),
        (
            lambda m: relative_output_error(ONES, None, quantize_svdq(ONES), ONES[:, 1:]),
            ValueError,
            "x: expected shape",
        ),
        (lambda m: quantize_modulation(torch.ones(24, 64), None, 6, moments=m), ValueError, "moments: expected"),
        (
            lambda m: quantize_modulation(
                torch.ones(24, 128), None, 6, group_size=128, moments=moments_of(torch.ones(4, 128), "w4a16")
            ),
            ValueError,
            "group_size: expected 64",
        ),
    ],
)
def test_wrong_arguments(call: Callable[[InputMoments], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(moments_of(torch.randn(10, 64, generator=torch.Generator().manual_seed(0))))
