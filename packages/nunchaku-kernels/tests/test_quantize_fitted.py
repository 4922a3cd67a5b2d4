"""Weights fitted to calibration data, block by block, which of them deserve more bits, and plain AWQ as the rival."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from nunchaku_kernels.quantize import (
    BlockInputs,
    InputMetric,
    InputSpans,
    PairedMoments,
    awq_round,
    awq_smoothing,
    choose_wider,
    fit_w4a16,
    output_sensitivities,
    quantize_affine,
    quantize_w4a16,
    replace_weights,
)
from nunchaku_kernels.reference.w4a16 import dequantize

PROPERTY = settings(deadline=None, max_examples=12)
SEEDS = st.integers(0, 2**32 - 1)


def inputs(seed: int, tokens: int, k: int) -> Tensor:
    """Correlated, off centre, channels of unequal size."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, k, generator=generator) * torch.arange(1, k + 1) ** -0.5
    x = x @ torch.randn(k, k, generator=generator) / k**0.5 + 0.1 * torch.randn(k, generator=generator)
    return x * torch.randn(k, generator=generator).exp()


def weight_of(seed: int, n: int, k: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, k, generator=generator) * torch.randn(n, k, generator=generator).exp() * 0.02


def metric_of(x: Tensor, original: Tensor | None = None, prior: float = 0.0) -> InputMetric:
    moments = PairedMoments(x.shape[1])
    for part in range(0, len(x), 100):
        moments.update(x[part : part + 100], None if original is None else original[part : part + 100])
    return InputMetric(moments, prior)


# ----------------------------------------------------------------- the metric


@PROPERTY
@given(SEEDS, st.booleans())
def test_target_is_the_regression_on_the_inputs_as_they_are(seed: int, paired: bool) -> None:
    original, weight = inputs(seed, 700, 64), weight_of(seed, 12, 64)
    x = original + 0.2 * inputs(seed + 1, 700, 64) if paired else original
    target = metric_of(x, original if paired else None).target(weight)
    expected = torch.linalg.lstsq(x.double(), original.double() @ weight.double().t()).solution.t()
    missed = x.double() @ (target.double() - expected).t()
    # fp32 moments: the squared condition number of x counts
    assert missed.square().sum() <= 1e-4 * (x.double() @ expected.t()).square().sum()


@PROPERTY
@given(SEEDS, st.integers(1, 12))
def test_low_rank_is_the_best_in_the_metric(seed: int, rank: int) -> None:
    x, matrix = inputs(seed, 600, 48), weight_of(seed, 20, 48)
    metric = metric_of(x, prior=0.05)
    up, down = metric.low_rank(matrix, rank, torch.float32)
    assert up.shape == (20, rank) and down.shape == (rank, 48)
    root = torch.linalg.cholesky(metric.hessian.double())
    left = torch.linalg.svdvals(matrix.double() @ root)[rank:].square().sum()
    total = torch.linalg.svdvals(matrix.double() @ root).square().sum()
    assert metric.error(matrix - up @ down) <= float(left + 1e-4 * total)


def test_a_prior_is_as_if_there_had_been_more_inputs() -> None:
    x = inputs(3, 200, 32)
    more = metric_of(x, prior=0.5).hessian - metric_of(x).hessian
    diagonal = metric_of(x).hessian.diagonal()
    torch.testing.assert_close(
        more, (0.5 * diagonal.clamp(min=1e-3 * float(diagonal.mean()))).diag(), rtol=1e-4, atol=0
    )


def test_wrong_moments_are_named() -> None:
    moments = PairedMoments(8)
    with pytest.raises(ValueError, match="at least one token"):
        InputMetric(moments)
    moments.update(torch.ones(2, 8), torch.ones(2, 8))
    with pytest.raises(ValueError, match="original: expected for all tokens or for none"):
        moments.update(torch.ones(2, 8))
    with pytest.raises(ValueError, match="x: expected shape"):
        moments.update(torch.ones(2, 7))
    with pytest.raises(ValueError, match="original: expected shape"):
        moments.update(torch.ones(2, 8), torch.ones(3, 8))
    with pytest.raises(ValueError, match="prior"):
        InputMetric(moments, -1)
    moments.update(torch.full((1, 8), torch.inf), torch.ones(1, 8))
    with pytest.raises(ValueError, match="finite inputs"):
        InputMetric(moments)


# ----------------------------------------------------------------- one linear


@PROPERTY
@given(SEEDS, st.sampled_from([64, 128]), st.sampled_from([torch.bfloat16, torch.float16]))
def test_each_step_lowers_the_error(seed: int, group_size: int, dtype: torch.dtype) -> None:
    weight, metric = weight_of(seed, 48, 256), metric_of(inputs(seed, 2000, 256), prior=0.03)
    start = quantize_affine(weight, group_size, search=False, dtype=dtype)
    rounded = metric.error(start.subtracted_from(weight))

    def error(**arguments: int) -> float:
        found = fit_w4a16(weight, metric, group_size=group_size, dtype=dtype, **arguments)
        assert found.scales.dtype == dtype and found.group_size == group_size and found.rank == arguments.get("rank", 0)
        return metric.error(found.dequantize() - weight)

    compensated, descended = error(sweeps=0), error(sweeps=2)
    assert descended <= compensated * 1.001 < 0.8 * rounded
    assert error(sweeps=2, rank=8) < 0.8 * descended
    assert error(sweeps=0, bits=8) < 0.02 * compensated


def test_a_branch_is_fitted_in_turn_with_the_codes() -> None:
    weight, metric = weight_of(1, 64, 256), metric_of(inputs(2, 1500, 256), prior=0.03)
    errors = [
        metric.error(fit_w4a16(weight, metric, rank=8, num_iters=turns).dequantize() - weight) for turns in (1, 2, 3)
    ]
    assert errors[2] < errors[0] and errors[1] < errors[0]


def test_errors_in_front_are_made_up_for() -> None:
    original, weight = inputs(5, 3000, 128), weight_of(6, 32, 128)
    x = original + 0.3 * original @ (weight_of(7, 128, 128) * 2)
    wanted = original @ weight.t()

    def error(metric: InputMetric) -> float:
        return float((x @ fit_w4a16(weight, metric).dequantize().t() - wanted).square().sum())

    assert error(metric_of(x, original)) < 0.1 * error(metric_of(x))


def test_wrong_arguments_are_named() -> None:
    weight, metric = weight_of(1, 8, 128), metric_of(inputs(2, 300, 128))
    for arguments, message in (
        ({"group_size": 96}, "weight: expected K"), ({"rank": -1}, "rank"), ({"num_iters": 0}, "num_iters"),
        ({"sweeps": -1}, "sweeps"), ({"bits": 3}, "bits"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            fit_w4a16(weight, metric, **arguments)
    with pytest.raises(TypeError, match="dtype"):
        fit_w4a16(weight, metric, dtype=torch.float32)
    with pytest.raises(ValueError, match="weight: expected shape"):
        fit_w4a16(weight[:, :64], metric)
    with pytest.raises(ValueError, match="weight: expected finite"):
        fit_w4a16(weight * torch.inf, metric)


# ----------------------------------------------------------------- blocks


class Block(nn.Module):
    """Two linears on one input, one on their product, one unused."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.gate, self.value = nn.Linear(128, 128, bias=False), nn.Linear(128, 128, bias=False)
        self.out, self.spare = nn.Linear(128, 128), nn.Linear(128, 128)
        with torch.no_grad():
            for index, linear in enumerate((self.gate, self.value, self.out)):
                linear.weight.copy_(weight_of(seed + index, 128, 128) * 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out(torch.sigmoid(self.gate(x)) * self.value(x))


def test_a_block_is_fitted_in_the_order_of_its_calls() -> None:
    original, hidden = Block(1), [inputs(20 + i, 90, 128).view(3, 30, 128) for i in range(6)]
    masks = [torch.rand(3, 30, generator=torch.Generator().manual_seed(i)) < 0.8 if i % 2 else None for i in range(6)]
    counted = [len(h.flatten(0, 1)) if mask is None else int(mask.sum()) for h, mask in zip(hidden, masks, strict=True)]

    def errors(paired: bool) -> float:
        block = copy.deepcopy(original)
        before = BlockInputs(original, lambda i: original(hidden[i]), masks)
        now = BlockInputs(block, lambda i: block(hidden[i]), masks)
        groups = before.groups()
        assert groups == [["gate", "value"], ["out"]] and now.groups() == groups
        tokens = before.tokens(["gate", "out"])
        assert [len(part) for part in tokens["out"]] == counted
        for group in groups:
            originals = tokens[group[0]]
            moments = now.moments(group[0], originals) if paired else before.moments(group[0])
            assert moments.tokens == sum(counted) and (moments.cross is not None) == paired
            metric = InputMetric(moments, 0.03)
            fitted = {name: fit_w4a16(block.get_submodule(name).weight, metric) for name in group}
            replace_weights(block, {name: form.dequantize() for name, form in fitted.items()})
        pairs = zip(before.outputs(), now.outputs(), masks, strict=True)
        return sum(float((a - b)[... if mask is None else mask].square().sum()) for a, b, mask in pairs)

    assert errors(paired=True) < 0.97 * errors(paired=False)


@pytest.mark.parametrize("seed", [0, 1])
def test_sensitivities_are_what_rounding_one_linear_does(seed: int) -> None:
    model, hidden = Block(seed), [inputs(seed + i, 64, 128).view(8, 8, 128) for i in range(4)]
    names = ["gate", "value", "out", "spare"]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        exact = [model(x) for x in hidden]
        expected = {}
        for name in names:
            changed = copy.deepcopy(model)
            linear = changed.get_submodule(name)
            rounded = quantize_affine(linear.weight.detach(), 128, search=False, dtype=torch.bfloat16)
            linear.weight.copy_(rounded.dequantize())
            expected[name] = sum(float((changed(x) - y).square().sum()) for x, y in zip(hidden, exact, strict=True))
    found = output_sensitivities(model, lambda i: model(hidden[i]), 4, names, probes=30, seed=seed)
    assert found.pop("spare") == expected.pop("spare") == 0
    for name, value in expected.items():
        assert 0.7 * value < found[name] < 1.4 * value
    assert not any(parameter.requires_grad for parameter in model.parameters())


@PROPERTY
@given(st.data())
def test_wider_layers_fit_the_budget(data: st.DataObject) -> None:
    names = [f"layer{i}" for i in range(data.draw(st.integers(0, 8)))]
    harm = {name: data.draw(st.floats(0, 100)) for name in names}
    sizes = {name: data.draw(st.integers(1, 100)) for name in names}
    budget = data.draw(st.integers(0, 300))
    chosen = choose_wider(harm, sizes, budget)
    spent = sum(sizes[name] for name in chosen)
    assert spent <= budget and len(set(chosen)) == len(chosen) and all(harm[name] > 0 for name in chosen)
    # nothing that would still fit was left out
    assert all(harm[name] == 0 or sizes[name] > budget - spent for name in names if name not in chosen)
    if chosen:
        densest = max(harm[name] / sizes[name] for name in names if sizes[name] <= budget)
        assert harm[chosen[0]] / sizes[chosen[0]] == densest


# ----------------------------------------------------------------- plain AWQ


@PROPERTY
@given(SEEDS)
def test_awq_ranges_are_those_of_least_error(seed: int) -> None:
    weight, x = weight_of(seed, 6, 256), inputs(seed, 500, 256)
    moment = x.t() @ x / len(x)
    found = awq_round(weight, moment)
    for group in range(2):
        columns = slice(128 * group, 128 * group + 128)
        part, tokens = weight[:, columns], x[:, columns].double()
        errors = []
        for step in range(21):
            ratio = 1 - step / 100
            zero, scale = (
                (part.amin(dim=1) * ratio).bfloat16(),
                ((part.amax(dim=1) - part.amin(dim=1)) * ratio / 15).bfloat16(),
            )
            levels = ((part - zero.float()[:, None]) / scale.float()[:, None]).round().clamp(0, 15)
            values = dequantize(levels.to(torch.uint8), scale.float()[:, None], zero.float()[:, None])
            errors.append((tokens @ (values - part).double().t()).square().mean(dim=0))
        here = found.dequantize()[:, columns] - part
        mine = (tokens @ here.double().t()).square().mean(dim=0)
        torch.testing.assert_close(mine, torch.stack(errors).amin(dim=0), rtol=1e-3, atol=1e-12)


def test_awq_smoothing_is_the_best_of_its_grid() -> None:
    weights, x = [weight_of(1, 16, 128), weight_of(2, 8, 128)], inputs(3, 400, 128)
    x[:, 5] *= 40
    spans = InputSpans(128)
    spans.update(x)
    found = awq_smoothing(weights, spans, x.t() @ x / len(x))

    def error(smooth: Tensor) -> float:
        total = 0.0
        for weight in weights:
            codes, scales, zeros = quantize_w4a16(weight * smooth, 128, symmetric=False, dtype=torch.bfloat16)
            values = dequantize(codes, scales.float(), zeros.float()) / smooth
            total += float((x @ (values - weight).t()).square().mean(dim=0).sum())
        return total

    errors = [error(spans.absmax ** (step / 20)) for step in range(20)]
    assert error(found) == pytest.approx(min(errors), rel=1e-3)
    assert min(errors) < 0.8 * errors[0]
