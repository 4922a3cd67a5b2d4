"""Caching on a whole 4-bit model: fused layers stay fused, and adapters reset."""

from typing import Any

import pytest
import torch

import nunchaku_cache
import nunchaku_lora
from nunchaku_cache import DoubleFirstBlockCache, FirstBlockCache
from nunchaku_models import NunchakuFluxTransformer2DModel, demo

STEPS = 10


@pytest.fixture
def model() -> Any:
    """The demo transformer in 4 bits."""
    return NunchakuFluxTransformer2DModel.from_pretrained(demo.TRANSFORMER_INT4)


@torch.no_grad()
def denoise(model: Any, on_step: Any = lambda i: None) -> torch.Tensor:
    """A random prompt on 16 image tokens."""
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).bfloat16()

    latents, ids = noise(1, 16, model.config.in_channels), torch.zeros(16, 3)
    ids[:, 1], ids[:, 2] = torch.arange(16) // 4, torch.arange(16) % 4
    fixed = {
        "encoder_hidden_states": noise(1, 5, model.config.joint_attention_dim),
        "pooled_projections": noise(1, model.config.pooled_projection_dim),
        "img_ids": ids,
        "txt_ids": torch.zeros(5, 3),
        "return_dict": False,
    }
    for i in range(STEPS):
        on_step(i)
        velocity = model(hidden_states=latents, timestep=torch.tensor([1 - i / STEPS]), **fixed)[0]
        latents = latents - velocity / STEPS
    return latents


def count_fused(model: Any) -> list[int]:
    calls = [0]
    for block in model.single_transformer_blocks:
        block.attn.to_qkv.register_forward_pre_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
    return calls


@pytest.mark.parametrize("policy", [FirstBlockCache(0.0, order=2), DoubleFirstBlockCache(0.0, 0.0)])
def test_threshold_0_changes_no_bit(model: Any, policy: Any) -> None:
    plain = denoise(model)
    handle = nunchaku_cache.apply(model, policy)
    assert torch.equal(denoise(model), plain)
    assert handle.stats.misses and not handle.stats.hits


def test_computed_steps_run_fused_and_skipped_ones_run_nothing(model: Any) -> None:
    handle = nunchaku_cache.apply(model, FirstBlockCache(threshold=0.2, order=1))
    fused = count_fused(model)
    assert denoise(model).isfinite().all()
    assert handle.stats.hits > 2
    assert fused[0] == handle.stats.misses * len(model.single_transformer_blocks)


def test_a_new_strength_is_not_answered_from_the_cache(model: Any) -> None:
    from peft import LoraConfig

    nunchaku_lora.enable()
    try:
        config = LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "proj_out"], init_lora_weights=False)
        model.add_adapter(config, "style")
        handle = nunchaku_cache.apply(model, FirstBlockCache(threshold=float("inf")))

        def change(step: int) -> None:
            if step == 4:
                nunchaku_lora.set_strength(model, {"style": 0.5})
            if step == 7:
                model.disable_lora()

        denoise(model, change)
        assert [step for step, (hit,) in enumerate(handle.stats.hit_pattern()) if not hit] == [0, 4, 7]
    finally:
        nunchaku_lora.disable()
