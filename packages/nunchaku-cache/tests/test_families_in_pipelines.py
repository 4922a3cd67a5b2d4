"""diffusers' pipelines call their transformers as the declarations say: calls and their branches are recognised."""

from typing import Any

import diffusers
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

import nunchaku_cache
from nunchaku_cache import FirstBlockCache

STEPS = 6
MASKS = {"prompt_attention_mask": torch.ones(1, 5).long(), "negative_prompt_attention_mask": torch.ones(1, 5).long()}
FLOAT_MASKS = {name: mask.bfloat16() for name, mask in MASKS.items()}
POOLED = {f"{prefix}pooled_prompt_embeds": torch.ones(1, 20).bfloat16() for prefix in ("", "negative_")}
QWEN_MASKS = {"prompt_embeds_mask": torch.ones(1, 5).long(), "negative_prompt_embeds_mask": torch.ones(1, 5).long()}
INVERTED = FlowMatchEulerDiscreteScheduler(invert_sigmas=True, shift=1.0)
UNIPC = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
FREE_SIZE: dict[str, Any] = {"negative_prompt": None, "use_resolution_binning": False}

PIPELINES: dict[str, tuple[str, dict[str, Any], set[str]]] = {
    "StableDiffusion3Pipeline": ("SD3Transformer2DModel", POOLED, {""}),
    "ChromaPipeline": ("ChromaTransformer2DModel", {**FLOAT_MASKS, "guidance_scale": 3.0}, {"", "#2"}),
    "QwenImagePipeline": ("QwenImageTransformer2DModel", {**QWEN_MASKS, "true_cfg_scale": 3.0}, {"cond", "uncond"}),
    "Lumina2Pipeline": ("Lumina2Transformer2DModel", MASKS, {"", "#2"}),
    "SanaPipeline": ("SanaTransformer2DModel", {**MASKS, **FREE_SIZE, "height": 256, "width": 256}, {""}),
    "PixArtSigmaPipeline": ("PixArtTransformer2DModel", {**MASKS, **FREE_SIZE}, {""}),
    "AuraFlowPipeline": ("AuraFlowTransformer2DModel", MASKS, {""}),
    "MochiPipeline": ("MochiTransformer3DModel", {**MASKS, "num_frames": 7}, {"cond_uncond"}),
    "WanPipeline": ("WanTransformer3DModel", {"num_frames": 5}, {"cond", "uncond"}),
    "LTXPipeline": ("LTXVideoTransformer3DModel", {**MASKS, "num_frames": 9}, {"cond_uncond"}),
    "CogView4Pipeline": ("CogView4Transformer2DModel", {}, {"cond", "uncond"}),
    "Flux2Pipeline": ("Flux2Transformer2DModel", {"negative_prompt_embeds": None}, {""}),
    "ZImagePipeline": ("ZImageTransformer2DModel", {"guidance_scale": 3.0}, {""}),
}
"""Pipeline -> its transformer, what else its call takes, and the names of its branches."""
SCHEDULERS = {"MochiPipeline": INVERTED, "WanPipeline": UNIPC, "PixArtSigmaPipeline": DPMSolverMultistepScheduler()}
PARTS = {
    "StableDiffusion3Pipeline": ("text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3"),
}


@pytest.mark.parametrize("name", PIPELINES)
def test_only_the_first_step_of_every_branch_is_computed(name: str, cases: dict[str, Any]) -> None:
    transformer, extra, branches = PIPELINES[name]
    parts = dict.fromkeys(("vae", "text_encoder", "tokenizer", *PARTS.get(name, ())))
    # in 16 bits, which embeddings and latents of the call are not
    model = cases[transformer].make().bfloat16()
    scheduler = SCHEDULERS.get(name) or FlowMatchEulerDiscreteScheduler()
    pipe = getattr(diffusers, name)(transformer=model, scheduler=scheduler, **parts)
    pipe.set_progress_bar_config(disable=True)
    handle = nunchaku_cache.apply(pipe, FirstBlockCache(threshold=float("inf")))
    generator = torch.Generator().manual_seed(0)
    embeddings: dict[str, Any] = {
        f"{prefix}prompt_embeds": torch.randn(1, 5, 24, generator=generator).bfloat16() for prefix in ("", "negative_")
    }
    if cases[transformer].lists:
        embeddings = {key: list(value) for key, value in embeddings.items()}
    arguments = {"height": 64, "width": 64, **embeddings, **extra}
    arguments = {key: value for key, value in arguments.items() if value is not None or key == "negative_prompt"}
    for _ in range(2):
        pipe(num_inference_steps=STEPS, output_type="latent", generator=generator, **arguments)
    assert {record.branch for record in handle.stats.steps} == branches
    for branch in branches:
        computed = [not any(hit) for hit in handle.stats.hit_pattern(branch=branch)]
        assert computed == [True, *[False] * (STEPS - 1)] * 2
