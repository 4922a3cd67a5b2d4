"""What stands in for skipped blocks: exactly what they added, beside what the model adds by itself."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import nunchaku_cache
from nunchaku_cache import DoubleFirstBlockCache, FirstBlockCache
from nunchaku_cache.blocks import BlockSignature
from nunchaku_cache.families import family_of
from nunchaku_cache.residuals import ResidualHistory

Case = Any
SAMPLES = (0, 1)
ALWAYS = math.inf


def controlnet(case: Case, seed: int) -> dict[str, Any]:
    """Random ControlNet residuals for every argument that the model has for them."""

    def residuals(number: int, tokens: int, width: int) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return [torch.randn(len(SAMPLES), tokens, width, generator=generator) for _ in range(number)]

    found: dict[str, dict[str, Any]] = {
        "FluxTransformer2DModel": {
            "controlnet_block_samples": residuals(2, 16, 32),
            "controlnet_single_block_samples": residuals(3, 16, 32),
        },
        "ChromaTransformer2DModel": {
            "controlnet_block_samples": residuals(1, 16, 32),
            "controlnet_single_block_samples": residuals(2, 16, 32),
        },
        "QwenImageTransformer2DModel": {"controlnet_block_samples": residuals(3, 16, 32)},
        "SD3Transformer2DModel": {"block_controlnet_hidden_states": residuals(3, 16, 32)},
        "SanaTransformer2DModel": {"controlnet_block_samples": residuals(2, 64, 32)},
        "ZImageTransformer2DModel": {
            "controlnet_block_samples": dict(enumerate(residuals(3, 64, 32))),
        },
    }
    return found.get(case.name, {})


def with_recorded_tail(
    model: nn.Module, first: dict[str, Any], second: dict[str, Any], always_run: Sequence[str]
) -> torch.Tensor:
    """The model on `second`, where all blocks but the named ones add what they added on `first`. No cache."""
    family = family_of(model)
    blocks = [
        (f"{blocks.name}.{i}", block, BlockSignature(block, blocks))
        for blocks in family.lists
        for i, block in enumerate(model.get_submodule(blocks.name))
    ]
    added: dict[str, Any] = {}
    originals = {name: block.forward for name, block, _ in blocks}

    def recording(name: str, signature: BlockSignature) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Any:
            before = [stream.clone() for stream in signature.inputs(args, kwargs)]
            result = originals[name](*args, **kwargs)
            pairs = zip(signature.outputs(result), before, strict=True)
            added[name] = [None if new is None else new - old for new, old in pairs]
            return result

        return forward

    def replaying(name: str, signature: BlockSignature) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Any:
            pairs = zip(signature.inputs(args, kwargs), added[name], strict=True)
            return signature.result([None if change is None else stream + change for stream, change in pairs])

        return forward

    try:
        for name, block, signature in blocks:
            block.forward = recording(name, signature)
        model(**first, return_dict=False)
        for name, block, signature in blocks:
            block.forward = originals[name] if name in always_run else replaying(name, signature)
        return sample_of(model(**second, return_dict=False))
    finally:
        for _, block, _ in blocks:
            del block.forward


def sample_of(result: Any) -> torch.Tensor:
    return torch.stack(list(result[0])) if isinstance(result[0], list) else result[0]


def two_steps(case: Case) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """The arguments of two steps, without ControlNet residuals and, where the model takes them, with."""
    conditioning = case.conditioning(SAMPLES)
    first = case.inputs(case.latents(SAMPLES), 0.9, conditioning)
    second = case.inputs(case.latents([i + 10 for i in SAMPLES]), 0.7, conditioning)
    yield dict(first), dict(second)
    if controlnet(case, 0):
        yield first | controlnet(case, 1), second | controlnet(case, 2)


@torch.no_grad()
def test_a_hit_adds_what_the_blocks_added_and_controlnet_is_of_this_step(case: Case, model: nn.Module) -> None:
    head = f"{family_of(model).lists[0].name}.0"
    for first, second in two_steps(case):
        expected = with_recorded_tail(model, first, second, [head])
        handle = nunchaku_cache.apply(model, FirstBlockCache(threshold=ALWAYS))
        try:
            model(**first, return_dict=False)
            given = sample_of(model(**second, return_dict=False))
        finally:
            handle.remove()
        assert handle.stats.hit_pattern() == [(False, False), (True, True)]
        torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_in_double_mode_both_first_blocks_run(double_case: Case) -> None:
    model = double_case.make()
    heads = [f"{blocks.name}.0" for blocks in family_of(model).lists]
    for first, second in two_steps(double_case):
        expected = with_recorded_tail(model, first, second, heads)
        handle = nunchaku_cache.apply(model, DoubleFirstBlockCache(threshold=ALWAYS))
        model(**first, return_dict=False)
        given = sample_of(model(**second, return_dict=False))
        handle.remove()
        assert handle.stats.hits == 4
        torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_in_a_mixed_batch_each_sample_has_its_own_result(case: Case, model: nn.Module) -> None:
    """The second sample stands still and skips; the first one moves and is computed."""
    head, (name, timestep, _) = f"{family_of(model).lists[0].name}.0", case.names
    end = torch.tensor(math.inf if family_of(model).rising else -math.inf)
    for first, second in two_steps(case):
        second[name] = case.inputs(case.latents([10, 1]), 0.9, {})[name]
        second[timestep] = torch.nextafter(first[timestep], end)
        skipped = with_recorded_tail(model, first, second, [head])
        computed = sample_of(model(**second, return_dict=False))
        handle = nunchaku_cache.apply(model, FirstBlockCache(threshold=1e-3))
        try:
            model(**first, return_dict=False)
            given = sample_of(model(**second, return_dict=False))
        finally:
            handle.remove()
        assert handle.stats.hit_pattern()[1] == (False, True)
        torch.testing.assert_close(given[0], computed[0], rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(given[1], skipped[1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("left_out", [[0], [1], [2]])
@torch.no_grad()
def test_passes_that_leave_blocks_out_are_not_mixed_with_others(cases: dict[str, Case], left_out: list[int]) -> None:
    """As Stable Diffusion 3's skip-layer guidance does, on every step beside the whole model."""
    case = cases["SD3Transformer2DModel"]
    model, conditioning = case.make(), case.conditioning(SAMPLES)
    steps = [case.inputs(case.latents(SAMPLES), sigma, conditioning) for sigma in (0.9, 0.7, 0.5)]
    plain = [[model(**step, skip_layers=skipped).sample for skipped in (None, left_out)] for step in steps]
    handle = nunchaku_cache.apply(model, FirstBlockCache(threshold=1e-9))
    for step, (whole, partial) in zip(steps, plain, strict=True):
        assert torch.equal(model(**step).sample, whole)
        assert torch.equal(model(**step, skip_layers=left_out).sample, partial)
    handle.threshold = ALWAYS
    model(**steps[0])
    skipped = model(**steps[1]).sample
    model(**steps[0], skip_layers=left_out)
    assert torch.equal(model(**steps[2], skip_layers=left_out).sample, plain[2][1]) == (left_out != [1])
    assert not torch.equal(skipped, plain[1][0])


@torch.no_grad()
def test_what_cannot_be_split_by_samples_runs_whole(flux: Case) -> None:
    model, results = flux.make(), []
    batches: list[int] = []
    model.transformer_blocks[1].register_forward_pre_hook(
        lambda module, args, kwargs: batches.append(len(kwargs["hidden_states"])), with_kwargs=True
    )
    for extra in ({}, {"joint_attention_kwargs": {"opaque": object()}}):
        first, second = next(iter(two_steps(flux)))
        second["hidden_states"] = flux.latents([10, 1])
        second["timestep"] = torch.nextafter(first["timestep"], torch.tensor(-math.inf))
        handle = nunchaku_cache.apply(model, FirstBlockCache(threshold=1e-3))
        model(**first, **extra)
        results.append(model(**second, **extra).sample)
        assert handle.stats.hit_pattern()[1] == (False, True)
    assert batches == [2, 1, 2, 2]
    torch.testing.assert_close(results[0], results[1])


@given(
    order=st.integers(0, 2),
    coefficients=st.lists(st.lists(st.integers(-8, 8), min_size=3, max_size=3), min_size=2, max_size=2),
    computed=st.lists(st.lists(st.booleans(), min_size=2, max_size=2), min_size=1, max_size=8),
)
@settings(max_examples=100, deadline=None)
def test_polynomials_are_continued_exactly(
    order: int, coefficients: list[list[int]], computed: list[list[bool]]
) -> None:
    """Samples move along polynomials of the timestep and are computed at unequal, different steps."""

    def value(sample: int, x: float, degree: int) -> float:
        return sum(c * x**power for power, c in enumerate(coefficients[sample][: degree + 1]))

    history, seen = ResidualHistory(2, order), [0, 0]
    for step, chosen in enumerate([[True, True], *computed]):
        positions = [1 - step / 9 - step * step / 200] * 2
        # a polynomial of as high a degree as can be told from the values so far
        for sample in range(2):
            seen[sample] += chosen[sample]
        rows = [i for i in range(2) if chosen[i]]
        if rows:
            residual = torch.tensor([[value(i, positions[i], order)] for i in range(2)], dtype=torch.float64)
            history.record([residual, None], positions, None if len(rows) == 2 else rows)
        streams = [torch.ones(2, 1, dtype=torch.float64), torch.ones(2, 1, dtype=torch.float64)]
        given, absent = history.add_to(streams, positions, None)
        assert absent is None
        assert given is not None
        for sample in range(2):
            if seen[sample] > order or chosen[sample]:
                expected = 1 + value(sample, positions[sample], order)
                assert given[sample].item() == pytest.approx(expected, rel=1e-7, abs=1e-7)
