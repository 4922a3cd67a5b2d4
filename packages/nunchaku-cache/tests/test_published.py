"""The published names mean what the published engine made of them (spec/surface.md 4.1, 4.2, 4.5)."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import nn

import nunchaku_cache
from nunchaku_cache import DoubleFirstBlockCache, FirstBlockCache, apply_cache_on_pipe, apply_cache_on_transformer

Case = Any


def recorded(case: Case, model: nn.Module, blocks: str) -> list[torch.Tensor]:
    """What the first block of a list adds to its streams on every step of an uncached call: image first, then text."""
    found: list[torch.Tensor] = []
    block = model.get_submodule(blocks)[0]

    def hook(_: nn.Module, args: Any, kwargs: dict[str, torch.Tensor], result: tuple[torch.Tensor, ...]) -> None:
        text, image = result
        found.append(torch.cat([image - kwargs["hidden_states"], text - kwargs["encoder_hidden_states"]], 1))

    registered = block.register_forward_hook(hook, with_kwargs=True)
    case.denoise(model)
    registered.remove()
    return found


def published_pattern(residuals: list[torch.Tensor], threshold: float) -> list[tuple[bool]]:
    """Formula and rule of 4.1, word by word."""
    previous, pattern = None, []
    for current in residuals:
        hit = previous is not None and bool((previous - current).abs().mean() / previous.abs().mean() < threshold)
        if not hit:
            previous = current
        pattern.append((hit,))
    return pattern


def thresholds(residuals: list[torch.Tensor]) -> list[float]:
    """Between the distances that occur."""
    known = sorted(
        float((old - new).abs().mean() / old.abs().mean()) for old in residuals for new in residuals if new is not old
    )
    return [0.0, *((low + high) / 2 for low, high in itertools.pairwise(known)), math.inf]


def replay(model: nn.Module, blocks: str, residuals: list[torch.Tensor]) -> Any:
    """Make the first block of a list add the recorded residuals, one after another, whatever comes in."""
    steps = iter(residuals)

    def forward(hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor, **kwargs: Any) -> Any:
        image, text = next(steps).split([hidden_states.shape[1], encoder_hidden_states.shape[1]], 1)
        return encoder_hidden_states + text, hidden_states + image

    block = model.get_submodule(blocks)[0]
    block.forward = forward
    return block


def test_single_mode_hits_where_the_published_formula_does(flux: Case) -> None:
    model = flux.make()
    residuals = recorded(flux, model, "transformer_blocks")
    image_only = [residual[:, :16] for residual in residuals]
    handle = apply_cache_on_transformer(model, residual_diff_threshold=0.12)
    for threshold in thresholds(image_only)[::6]:
        replay(model, "transformer_blocks", residuals)
        handle.threshold = threshold
        handle.stats.reset()
        flux.denoise(model)
        assert handle.stats.hit_pattern() == published_pattern(image_only, threshold)


def test_double_mode_judges_single_blocks_by_the_whole_sequence(flux: Case) -> None:
    model = flux.make()
    residuals = recorded(flux, model, "single_transformer_blocks")
    for threshold in thresholds(residuals)[::6]:
        handle = apply_cache_on_pipe(
            model,
            use_double_fb_cache=True,
            residual_diff_threshold_multi=0.0,
            residual_diff_threshold_single=threshold,
        )
        replay(model, "single_transformer_blocks", residuals)
        flux.denoise(model)
        assert not any(hit for (hit,) in handle.stats.hit_pattern("joint"))
        assert handle.stats.hit_pattern("single") == published_pattern(residuals, threshold)


def test_arguments(flux: Case) -> None:
    model = flux.make()
    assert apply_cache_on_transformer(model).policy == FirstBlockCache(0.12)
    assert apply_cache_on_pipe(model, residual_diff_threshold_multi=0.2).policy == FirstBlockCache(0.2)
    double = apply_cache_on_pipe(model, use_double_fb_cache=True, residual_diff_threshold=0.09)
    assert double.policy == DoubleFirstBlockCache(0.09, -1.0)
    plain = flux.denoise(flux.make())
    off = apply_cache_on_pipe(model, residual_diff_threshold_multi=-1.0)
    assert torch.equal(flux.denoise(model), plain)
    assert off.stats.hits + off.stats.misses == 0


def tea_pattern(case: Case, model: nn.Module, threshold: float, coefficients: Any) -> list[tuple[bool]]:
    """TeaCache as 4.5 says it, step by step, on the modulated inputs that the given cached run has."""
    inputs: list[torch.Tensor] = []
    block = model.transformer_blocks[0]
    norm = block.norm1.register_forward_hook(lambda module, args, result: inputs.append(result[0]))
    with nunchaku_cache.tea_cache(model, num_steps=8, rel_l1_thresh=threshold) as handle:
        case.denoise(model)
    norm.remove()
    # a computed step calls the norm twice, for the cache and in the block
    steps, at = [], 0
    for (hit,) in handle.stats.hit_pattern():
        steps.append(inputs[at])
        at += 1 if hit else 2
    assert at == len(inputs)
    total, pattern = 0.0, []
    for i, current in enumerate(steps):
        hit = False
        if i not in (0, 7):
            previous = steps[i - 1]
            distance = float((current - previous).abs().mean() / previous.abs().mean())
            total += abs(sum(c * distance ** (4 - power) for power, c in enumerate(coefficients)))
            hit = total < threshold
        if not hit:
            total = 0.0
        pattern.append((hit,))
    assert handle.stats.hit_pattern() == pattern
    return pattern


def test_teacache(flux: Case) -> None:
    from nunchaku_cache.published import TEA_COEFFICIENTS

    model = flux.make()
    plain = flux.denoise(model)
    patterns = [tea_pattern(flux, model, threshold, TEA_COEFFICIENTS["flux"]) for threshold in (0.0, 0.3, 0.6, 1.5)]
    assert not any(hit for (hit,) in patterns[0])
    assert len({tuple(pattern) for pattern in patterns}) > 1
    assert torch.equal(flux.denoise(model), plain), "removed at the end"
    with nunchaku_cache.tea_cache(model, enabled=False) as handle:
        assert torch.equal(flux.denoise(model), plain)
    assert handle.stats.hits == 0
    with nunchaku_cache.tea_cache(model, num_steps=8, rel_l1_thresh=math.inf, skip_steps=4) as handle:
        flux.denoise(model)
    assert handle.stats.hit_pattern() == [(False,)] * 4 + [(True,)] * 3 + [(False,)]
    with pytest.raises(ValueError, match="flux-kontext"), nunchaku_cache.tea_cache(model, model_name="sdxl"):
        pass


def test_teacache_needs_a_fit() -> None:
    from diffusers import SD3Transformer2DModel, WanTransformer3DModel

    sd3 = SD3Transformer2DModel(sample_size=8, num_layers=2, attention_head_dim=8, num_attention_heads=1,
                                joint_attention_dim=8, caption_projection_dim=8, pooled_projection_dim=8)  # fmt: skip
    with pytest.raises(ValueError, match=r"no coefficients.*SD3Transformer2DModel"):
        nunchaku_cache.apply(sd3, nunchaku_cache.TeaCache())
    nunchaku_cache.apply(sd3, nunchaku_cache.TeaCache(coefficients=(1.0, 0.0)))
    wan = WanTransformer3DModel(num_attention_heads=1, attention_head_dim=12, num_layers=2, ffn_dim=8, text_dim=8)
    with pytest.raises(ValueError, match="modulated"):
        nunchaku_cache.apply(wan, nunchaku_cache.TeaCache(coefficients=(1.0, 0.0)))
