"""Tiny random configurations of the declared transformers, and a denoising loop over them."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported: no test may need a network

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import diffusers
import pytest
import torch
from torch import nn

torch.set_num_threads(1)  # the tensors are tiny, and a second thread waits for its core on a busy machine

SIGMAS = (1.0, 0.93, 0.85, 0.76, 0.66, 0.55, 0.42, 0.25)


def noise(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Case:
    """One transformer class.

    Attributes:
        name: of the class.
        config: of a tiny one.
        sample: shape of a sample's noisy input.
        text: shape of its text embeddings.
        extra: (samples) -> what else the forward takes; constant over a call.
        step: the timestep argument for a sigma.
        names: of the arguments that hold the noisy input, the timestep, the text.
        lists: the inputs are lists with a tensor per sample.
        double: it has joint and single blocks.
    """

    name: str
    config: dict[str, Any]
    sample: tuple[int, ...]
    text: tuple[int, ...]
    extra: Callable[[Sequence[int]], dict[str, Any]] = lambda samples: {}
    step: Callable[[float], float] = lambda sigma: sigma * 1000
    names: tuple[str, str, str] = ("hidden_states", "timestep", "encoder_hidden_states")
    lists: bool = False
    double: bool = False

    def make(self) -> nn.Module:
        """The model, the same each time."""
        torch.manual_seed(0)
        model = getattr(diffusers, self.name)(**self.config).eval().requires_grad_(False)
        for parameter in model.parameters():
            if not parameter.any():  # gates that start closed
                parameter.normal_(0, 0.2)
        return model

    def conditioning(self, samples: Sequence[int]) -> dict[str, Any]:
        """What is the same on all steps of a call of samples with these numbers."""
        text = [noise(*self.text, seed=100 + i) for i in samples]
        return {self.names[2]: text if self.lists else torch.stack(text), **self.extra(samples)}

    def inputs(self, latents: torch.Tensor, sigma: float, conditioning: dict[str, Any]) -> dict[str, Any]:
        """The arguments of one step. latents: (batch, *sample)."""
        timestep = torch.full((len(latents),), self.step(sigma))
        sample = list(latents.unbind(0)) if self.lists else latents
        return {self.names[0]: sample, self.names[1]: timestep, **conditioning}

    def latents(self, samples: Sequence[int]) -> torch.Tensor:
        """Where the samples start."""
        return torch.stack([noise(*self.sample, seed=i) for i in samples])

    @torch.no_grad()
    def denoise(
        self,
        model: nn.Module,
        samples: Sequence[int] = (0,),
        sigmas: Sequence[float] = SIGMAS,
        conditioning: dict[str, Any] | None = None,
        on_step: Callable[[int], None] = lambda i: None,
    ) -> torch.Tensor:
        """Euler steps along the sigmas, the last one to 0 -> (batch, *sample)."""
        latents = self.latents(samples)
        conditioning = self.conditioning(samples) if conditioning is None else conditioning
        for i, (sigma, following) in enumerate(zip(sigmas, [*sigmas[1:], 0.0], strict=True)):
            on_step(i)
            velocity = model(**self.inputs(latents, sigma, conditioning), return_dict=False)[0]
            if self.lists:
                velocity = torch.stack(list(velocity))
            velocity = velocity[:, : latents.shape[1]] if velocity.dim() == 4 else velocity
            latents = latents + (following - sigma) * velocity
        return latents


def per_sample(samples: Sequence[int], *shape: int) -> torch.Tensor:
    return torch.stack([noise(*shape, seed=200 + i) for i in samples])


def _ids(width: int, axes: int) -> torch.Tensor:
    ids = torch.zeros(width, axes)
    ids[:, 1], ids[:, 2] = torch.arange(width) // 4, torch.arange(width) % 4
    return ids


def _mask(samples: Sequence[int], tokens: int) -> torch.Tensor:
    """Samples have texts of different lengths."""
    return torch.stack([(torch.arange(tokens) < tokens - i % 3).long() for i in samples])


_HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}
_ROPE = {"axes_dims_rope": (4, 6, 6)}

CASES = {
    case.name: case
    for case in (
        Case(
            "FluxTransformer2DModel",
            {**_HEADS, **_ROPE, "in_channels": 8, "num_layers": 2, "num_single_layers": 3, "joint_attention_dim": 24,
             "pooled_projection_dim": 20, "guidance_embeds": True},
            (16, 8),
            (5, 24),
            lambda samples: {
                "pooled_projections": per_sample(samples, 20),
                "img_ids": _ids(16, 3),
                "txt_ids": torch.zeros(5, 3),
                "guidance": torch.full((len(samples),), 3.5),
            },
            lambda sigma: sigma,
            double=True,
        ),
        Case(
            "Flux2Transformer2DModel",
            {**_HEADS, "axes_dims_rope": (4, 4, 4, 4), "in_channels": 8, "num_layers": 2, "num_single_layers": 3,
             "joint_attention_dim": 24, "timestep_guidance_channels": 16},
            (16, 8),
            (5, 24),
            lambda samples: {
                "img_ids": _ids(16, 4),
                "txt_ids": torch.zeros(5, 4),
                "guidance": torch.full((len(samples),), 3.5),
            },
            lambda sigma: sigma,
            double=True,
        ),
        Case(
            "ChromaTransformer2DModel",
            {**_HEADS, **_ROPE, "in_channels": 8, "num_layers": 2, "num_single_layers": 3, "joint_attention_dim": 24,
             "approximator_num_channels": 8, "approximator_hidden_dim": 32, "approximator_layers": 1},
            (16, 8),
            (5, 24),
            lambda samples: {
                "img_ids": _ids(16, 3),
                "txt_ids": torch.zeros(5, 3),
                "attention_mask": torch.nn.functional.pad(_mask(samples, 5), (0, 16), value=1).bool(),
            },
            lambda sigma: sigma,
            double=True,
        ),
        Case(
            "QwenImageTransformer2DModel",
            {**_HEADS, **_ROPE, "in_channels": 8, "out_channels": 2, "num_layers": 3, "joint_attention_dim": 24},
            (16, 8),
            (5, 24),
            lambda samples: {
                "encoder_hidden_states_mask": _mask(samples, 5),
                "img_shapes": [[(1, 4, 4)]] * len(samples),
            },
            lambda sigma: sigma,
        ),
        Case(
            "SD3Transformer2DModel",
            {**_HEADS, "sample_size": 8, "in_channels": 4, "out_channels": 4, "num_layers": 3,
             "joint_attention_dim": 24, "caption_projection_dim": 32, "pooled_projection_dim": 20,
             "pos_embed_max_size": 8},
            (4, 8, 8),
            (5, 24),
            lambda samples: {"pooled_projections": per_sample(samples, 20)},
        ),
        Case(
            "AuraFlowTransformer2DModel",
            {**_HEADS, "sample_size": 8, "num_mmdit_layers": 2, "num_single_dit_layers": 3, "joint_attention_dim": 24,
             "caption_projection_dim": 32, "pos_embed_max_size": 64},
            (4, 8, 8),
            (5, 24),
            step=lambda sigma: sigma,
            double=True,
        ),
        Case(
            "SanaTransformer2DModel",
            {**_HEADS, "sample_size": 8, "in_channels": 4, "out_channels": 4, "num_layers": 3,
             "num_cross_attention_heads": 2, "cross_attention_head_dim": 16, "cross_attention_dim": 32,
             "caption_channels": 24},
            (4, 8, 8),
            (5, 24),
            lambda samples: {"encoder_attention_mask": _mask(samples, 5)},
        ),
        Case(
            "PixArtTransformer2DModel",
            {**_HEADS, "sample_size": 8, "num_layers": 3, "cross_attention_dim": 32, "caption_channels": 24,
             "use_additional_conditions": False},
            (4, 8, 8),
            (5, 24),
            lambda samples: {
                "encoder_attention_mask": _mask(samples, 5),
                "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
            },
        ),
        Case(
            "ZImageTransformer2DModel",
            {"in_channels": 4, "dim": 32, "n_layers": 3, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2,
             "cap_feat_dim": 24, "axes_dims": [4, 6, 6], "axes_lens": [64, 32, 32]},
            (4, 1, 8, 8),
            (5, 24),
            step=lambda sigma: 1 - sigma,
            names=("x", "t", "cap_feats"),
            lists=True,
        ),
        Case(
            "Lumina2Transformer2DModel",
            {"sample_size": 8, "in_channels": 4, "hidden_size": 32, "num_layers": 3, "num_refiner_layers": 1,
             "num_attention_heads": 2, "num_kv_heads": 1, "multiple_of": 16, "axes_dim_rope": (4, 6, 6),
             "axes_lens": (64, 32, 32), "cap_feat_dim": 24},
            (4, 8, 8),
            (5, 24),
            lambda samples: {"encoder_attention_mask": _mask(samples, 5)},
            step=lambda sigma: 1 - sigma,
        ),
        Case(
            "CogVideoXTransformer3DModel",
            {**_HEADS, "in_channels": 4, "out_channels": 4, "time_embed_dim": 16, "text_embed_dim": 24, "num_layers": 3,
             "sample_width": 8, "sample_height": 8, "sample_frames": 5, "max_text_seq_length": 5},
            (2, 4, 8, 8),
            (5, 24),
        ),
        Case(
            "CogView4Transformer2DModel",
            {**_HEADS, "in_channels": 4, "out_channels": 4, "num_layers": 3, "text_embed_dim": 24, "time_embed_dim": 16,
             "condition_dim": 8, "pos_embed_max_size": 8, "sample_size": 8, "rope_axes_dim": (8, 8)},
            (4, 8, 8),
            (5, 24),
            lambda samples: {
                "original_size": torch.full((len(samples), 2), 64.0),
                "target_size": torch.full((len(samples), 2), 64.0),
                "crop_coords": torch.zeros(len(samples), 2),
            },
        ),
        Case(
            "MochiTransformer3DModel",
            {**_HEADS, "in_channels": 4, "num_layers": 3, "pooled_projection_dim": 16, "text_embed_dim": 24,
             "time_embed_dim": 16, "max_sequence_length": 5},
            (4, 2, 8, 8),
            (5, 24),
            lambda samples: {"encoder_attention_mask": _mask(samples, 5).bool()},
            step=lambda sigma: 1000 - sigma * 1000,
        ),
        Case(
            "WanTransformer3DModel",
            {**_HEADS, "in_channels": 4, "out_channels": 4, "text_dim": 24, "freq_dim": 16, "ffn_dim": 48,
             "num_layers": 3, "rope_max_seq_len": 32},
            (4, 2, 8, 8),
            (5, 24),
        ),
        Case(
            "LTXVideoTransformer3DModel",
            {**_HEADS, "in_channels": 8, "out_channels": 8, "cross_attention_dim": 32, "num_layers": 3,
             "caption_channels": 24},
            (16, 8),
            (5, 24),
            lambda samples: {
                "encoder_attention_mask": _mask(samples, 5),
                "num_frames": 1,
                "height": 4,
                "width": 4,
            },
        ),
        Case(
            "HunyuanVideoTransformer3DModel",
            {**_HEADS, "in_channels": 4, "out_channels": 4, "num_layers": 2, "num_single_layers": 3,
             "num_refiner_layers": 1, "text_embed_dim": 24, "pooled_projection_dim": 20, "rope_axes_dim": (4, 6, 6)},
            (4, 2, 8, 8),
            (5, 24),
            lambda samples: {
                "encoder_attention_mask": _mask(samples, 5),
                "pooled_projections": per_sample(samples, 20),
                "guidance": torch.full((len(samples),), 3500.0),
            },
            double=True,
        ),
    )
}  # fmt: skip


@pytest.fixture(scope="session", params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    """Each transformer class."""
    return CASES[request.param]


@pytest.fixture(scope="session", params=[name for name, case in CASES.items() if case.double])
def double_case(request: pytest.FixtureRequest) -> Case:
    """Each transformer class with joint and single blocks."""
    return CASES[request.param]


@pytest.fixture
def flux() -> Case:
    """The one for tests that need only one."""
    return CASES["FluxTransformer2DModel"]


_models: dict[str, nn.Module] = {}


@pytest.fixture
def model(case: Case) -> nn.Module:
    """The tiny model of `case`, shared by tests, which have to leave it as it was."""
    return _models.setdefault(case.name, case.make())


@pytest.fixture(scope="session")
def cases() -> dict[str, Case]:
    """All transformer classes by name."""
    return CASES
