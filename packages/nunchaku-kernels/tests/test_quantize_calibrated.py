"""What calibration is made of: simulated activations, moments of them, smoothing candidates."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nunchaku_kernels.formats.e2m1 import decode
from nunchaku_kernels.quantize import (
    InputMoments,
    InputSpans,
    candidates,
    published_candidates,
    quantized_activations,
)
from nunchaku_kernels.quantize import moments as moments_module
from nunchaku_kernels.quantize.gptq import damped_cholesky
from nunchaku_kernels.reference import nvfp4, w4a4, w4a8

PROPERTY = settings(deadline=None, max_examples=20)
SEEDS = st.integers(0, 2**32 - 1)
FLOATS = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])
SHIFT = 0.171875


def seeded(seed: int) -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator)


def correlated(seed: int, tokens: int, columns: int) -> Tensor:
    """Inputs with a decaying spectrum and channels of unequal size."""
    normal = seeded(seed)
    mixed = normal(tokens, columns) * torch.arange(1, columns + 1) ** -0.7
    return mixed @ normal(columns, columns) / columns**0.5 * normal(columns).mul(0.5).exp()


# ----------------------------------------------------------------- activations


@PROPERTY
@given(SEEDS, st.integers(1, 5), st.integers(1, 150), FLOATS, st.sampled_from(["w4a4", "w4a8", "nvfp4", "w4a16"]))
def test_activations_are_those_of_the_reference(seed: int, m: int, k: int, dtype: torch.dtype, arithmetic: str) -> None:
    normal = seeded(seed)
    x, smooth = normal(m, k).to(dtype), normal(k).mul(0.3).exp().bfloat16()
    for shift in (0.0,) if arithmetic == "nvfp4" else (0.0, SHIFT):
        padded = torch.cat((x, torch.full((m, -k % 64), -shift, dtype=dtype)), dim=1)
        divisors = torch.cat((smooth, torch.ones(-k % 64, dtype=torch.bfloat16)))
        actual = quantized_activations(x, smooth, shift, arithmetic)  # type: ignore[arg-type]
        if arithmetic == "w4a4":
            codes, scales = w4a4.quantize_tokens(padded, divisors, shift, unsigned=shift > 0)
            expected = codes.double() * scales.double().repeat_interleave(64, dim=1)
        elif arithmetic == "w4a8":
            codes, scales = w4a8.quantize_tokens(padded, divisors, shift)
            expected = codes.double() * scales.double().unsqueeze(1)
        elif arithmetic == "nvfp4":
            codes, scales = nvfp4.quantize_tokens(padded, divisors)
            expected = decode(codes).double() * scales.double().repeat_interleave(16, dim=1)
        else:
            expected = ((padded + shift) if shift else padded).double() / divisors.double()
        assert actual.dtype == torch.float32 and actual.shape == (m, k)
        torch.testing.assert_close(actual.double(), expected[:, :k], rtol=1e-6, atol=0)


def test_activations_behind_a_gelu_use_all_sixteen_codes() -> None:
    x = torch.linspace(-SHIFT, 3, 64).unsqueeze(0)
    steps = quantized_activations(x, torch.ones(64), SHIFT) / ((3 + SHIFT) / 15)
    assert sorted({round(float(step), 4) for step in steps[0]}) == list(range(16))


# ----------------------------------------------------------------- moments


def fp64_covariances(parts: list[Tensor]) -> Tensor:
    return torch.cov(torch.cat([part.double() for part in parts], dim=1).t(), correction=0)


@pytest.mark.parametrize("arithmetic", ["w4a4", "w4a8", "nvfp4", "w4a16"])
@pytest.mark.parametrize("mean", [0.0, 300.0])
def test_moments(arithmetic: Any, mean: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moments_module, "_CHUNK", 37)
    k, shift, normal = 70, 0.0 if arithmetic == "nvfp4" else SHIFT, seeded(1)
    smooth, sizes, means = normal(k).mul(0.3).exp().bfloat16(), normal(k).exp(), mean * normal(k)
    moments = InputMoments(smooth, shift, arithmetic)
    parts = []
    for tokens, held_out in ((50, False), (1, True), (0, False), (90, True), (38, False)):
        x = normal(tokens, k) * sizes + means
        moments.update(x, held_out=held_out)
        parts.append((held_out, x, quantized_activations(x, smooth, shift, arithmetic)))
    assert moments.has_held_out
    for which, kept in (("fit", (False,)), ("held out", (True,)), ("all", (False, True))):
        inputs, quantized = (torch.cat([p[i] for p in parts if p[0] in kept]) for i in (1, 2))
        whole, found = fp64_covariances([inputs, quantized]), moments.covariances(which)
        for actual, expected in ((found.input_mean, inputs), (found.quantized_mean, quantized)):
            torch.testing.assert_close(actual.double(), expected.double().mean(dim=0), rtol=1e-5, atol=1e-4)
        # A channel that is always quantised to the same has no size of its own.
        size = whole.diagonal().clamp(min=1e-3 * float(whole.diagonal().mean())).sqrt()
        actual = torch.cat(
            [
                torch.cat([found.input, found.input_quantized], dim=1),
                torch.cat([found.input_quantized.t(), found.quantized], dim=1),
            ]
        )
        difference = (actual.double() - whole) / torch.outer(size, size)
        assert difference.abs().max() < 1e-4


@pytest.mark.parametrize("padding", [0, 3])
def test_a_prior_is_further_inputs(padding: int) -> None:
    k, tokens, weight, normal = 24, 60, 0.3, seeded(2)
    smooth = normal(k).mul(0.3).exp().bfloat16()
    moments = InputMoments(smooth, SHIFT)
    x = correlated(3, tokens, k)
    moments.update(x)
    parts = [x, quantized_activations(x, smooth, SHIFT)]
    parts = [part.double() - part.double().mean(dim=0) for part in parts]
    # Every channel alone, up and down, as large as makes its mean square over all `tokens` what the prior says.
    size = (weight * parts[1].square().mean(dim=0) * tokens / 2).sqrt()
    alone = torch.cat((size.diag(), -size.diag()))
    inputs, quantized = (
        torch.nn.functional.pad(torch.cat((part, extra)), (0, padding))
        for part, extra in zip(parts, (alone * smooth.double(), alone), strict=True)
    )
    found = moments.covariances().with_prior(weight, smooth.float()).padded(padding)
    for name, left, right in (
        ("input", inputs, inputs),
        ("quantized", quantized, quantized),
        ("input_quantized", inputs, quantized),
    ):
        torch.testing.assert_close(getattr(found, name).double(), left.t() @ right / tokens, rtol=1e-4, atol=1e-6)
    assert found.input_mean.shape == (k + padding,)


def test_wrong_moments() -> None:
    ones = torch.ones(64, dtype=torch.bfloat16)
    plain = InputMoments(ones)
    x = torch.randn(3, 64)
    cases: list[tuple[Callable[[], object], type[Exception], str]] = [
        (lambda: plain.update(x[:, :63]), ValueError, "x: expected shape"),
        (lambda: plain.update(x.double()), TypeError, "x: expected dtype"),
        (lambda: InputMoments(torch.ones(64)), TypeError, "smooth: expected dtype"),
        (lambda: plain.covariances(), ValueError, "x: expected at least one token"),
        (lambda: plain.covariances("none"), ValueError, "which: expected 'fit', 'held out' or 'all', got 'none'"),
    ]
    for call, error, message in cases:
        with pytest.raises(error, match=message):
            call()
    plain.update(x)
    with pytest.raises(ValueError, match="at least one token"):
        plain.covariances("held out")
    assert not plain.has_held_out


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])
def test_activations_that_are_not_finite(value: float) -> None:
    moments = InputMoments(torch.ones(64, dtype=torch.bfloat16), arithmetic="w4a16")
    moments.update(torch.randn(20, 64))
    x = torch.zeros(20, 64)
    x[3, 5] = value
    moments.update(x)
    with pytest.raises(ValueError, match="x: expected finite activations"):
        moments.covariances()


# ----------------------------------------------------------------- smoothing


@PROPERTY
@given(SEEDS, st.integers(1, 5), st.booleans())
def test_spans_over_parts_are_those_of_the_whole(seed: int, parts: int, shifted: bool) -> None:
    x, shift = seeded(seed)(20, 12), SHIFT if shifted else 0.0
    spans = InputSpans(12, shift)
    for part in (*x.tensor_split(parts), x[:0]):
        spans.update(part)
    assert torch.equal(spans.absmax, (x + shift).abs().amax(dim=0))
    torch.testing.assert_close(spans.rms, (x + shift).square().mean(dim=0).sqrt())


def test_published_candidates() -> None:
    normal = seeded(4)
    x, weights = normal(30, 16) * normal(16).exp(), [normal(8, 16), 3 * normal(5, 16)]
    x[:, 2] = 0
    spans = InputSpans(16)
    spans.update(x)
    found = list(published_candidates(spans, weights))
    inputs, columns = x.abs().amax(dim=0).double(), torch.cat(weights).abs().amax(dim=0).double()
    powers = [(0.0, 0.0)] + [(i / 20, 0.0) for i in range(1, 20)] + [(i / 20, 1 - i / 20) for i in range(1, 20)]
    assert len(found) == len(powers) == 39 and torch.equal(found[0], torch.ones(16))
    for actual, (alpha, beta) in zip(found, powers, strict=True):
        expected = inputs**alpha / columns**beta
        expected[expected == 0] = 1
        torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=0)
    assert len(list(published_candidates(spans, weights, num_grids=10))) == 19
    weights[0][:, 3] = weights[1][:, 3] = 0
    unusable = list(published_candidates(spans, weights))[20:]
    assert unusable and all(torch.equal(vector, torch.ones(16)) for vector in unusable)


def test_candidates_are_powers_of_the_spans() -> None:
    x = seeded(5)(500, 16) * torch.linspace(-2, 2, 16).exp()
    x[:, 3] = 0
    spans = InputSpans(16)
    spans.update(x)
    found = list(candidates(spans))
    alive = torch.arange(16) != 3
    middle = (spans.rms * spans.absmax).sqrt()
    powers = [(size, alpha) for size in (spans.rms, spans.absmax, middle) for alpha in (0.35, 0.5, 0.65, 0.8, 0.95)]
    for vector, (size, alpha) in zip(found, powers, strict=True):
        assert vector[3] == 1 and abs(float(vector.log().mean())) < 1e-5
        ratio = vector[alive] / size[alive] ** alpha
        torch.testing.assert_close(ratio, ratio[:1].expand(15), rtol=1e-4, atol=0)
    assert all(torch.equal(vector, torch.ones(16)) for vector in candidates(InputSpans(16)))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: quantized_activations(x[0], torch.ones(64)), ValueError, "x: expected shape"),
        (lambda x: quantized_activations(x, torch.ones(63)), ValueError, r"smooth: expected shape \[64\]"),
        (lambda x: quantized_activations(x.double(), torch.ones(64)), TypeError, "x: expected dtype"),
        (lambda x: quantized_activations(x, torch.ones(64), SHIFT, "nvfp4"), ValueError, "shift: expected 0"),
        (lambda x: quantized_activations(x, torch.ones(64), 0.0, "w8a8"), ValueError, "arithmetic: .* got 'w8a8'"),
        (lambda x: damped_cholesky(x, 0.01), ValueError, "matrix: expected a square matrix"),
        (lambda x: damped_cholesky(torch.eye(3).double(), 0.01), TypeError, "matrix: expected dtype"),
        (lambda x: InputSpans(63).update(x), ValueError, r"x: expected shape \[any, 63\]"),
    ],
)
def test_wrong_arguments(call: Callable[[Tensor], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(torch.ones(2, 64))
