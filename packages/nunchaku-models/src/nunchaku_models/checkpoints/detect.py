"""What a weight file is, from its tensor names alone: model family, naming form, precision."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import replace
from typing import Literal

import torch

from nunchaku_kernels.formats.svdq import Precision
from nunchaku_models.checkpoints.errors import CheckpointError, shown
from nunchaku_models.checkpoints.flux_keys import BFL_PREFIXES, MODULES_V1_V2
from nunchaku_models.checkpoints.metadata import QuantizationMetadata, parse_quantization
from nunchaku_models.checkpoints.safetensors_file import TensorSource

Form = Literal["diffusers", "bfl", "nunchaku-v1", "nunchaku-v2", "nunchaku-lite"]

_FLUX_DIFFUSERS = (
    "x_embedder.weight",
    "context_embedder.weight",
    "time_text_embed.timestep_embedder.linear_1.weight",
    "time_text_embed.text_embedder.linear_1.weight",
)
_FLUX_BFL = ("img_in.weight", "txt_in.weight", "time_in.in_layer.weight", "vector_in.in_layer.weight")
_ROOTS = (
    "double_blocks.",
    "single_blocks.",
    "transformer_blocks.",
    "single_transformer_blocks.",
    "img_in.",
    "x_embedder.",
)

# What an unknown file most likely is: a substring of some tensor name -> the answer. First match wins.
_OTHERS = (
    (r"lora_(A|B|down|up)\b|^lora_|\.lokr_|\.hada_", "an adapter (LoRA), not a model; load it on top of a model"),
    (r"distilled_guidance_layer\.", "Chroma"),
    (r"controlnet_blocks\.", "a ControlNet"),
    (r"(double_stream_modulation|time_guidance_embed)", "FLUX.2"),
    (r"txt_in\.individual_token_refiner", "HunyuanVideo"),
    (r"(noise|context)_refiner\.", "Z-Image or Lumina"),
    (r"txt_norm\.weight", "Qwen-Image"),
    (r"caption_projection|scale_shift_table", "SANA or PixArt"),
    (r"joint_blocks\.|context_block\.|pos_embed\.proj", "Stable Diffusion 3"),
    (r"(encoder|decoder)\.(mid_block|mid|up_blocks|down_blocks)\.", "a VAE"),
    (r"(down|input)_blocks\.\d+\.", "a UNet (SDXL or Stable Diffusion 1.x)"),
    (r"encoder\.block\.\d+\.layer|text_model\.|model\.layers\.", "a text encoder or language model"),
    (r"patch_embedding\.|blocks\.\d+\.(cross_attn|attn2)\.", "Wan"),
)
# Other parts of an all-in-one file, next to the prefixed transformer.
_FOREIGN = (
    "vae.",
    "first_stage_model.",
    "text_encoders.",
    "text_encoder.",
    "text_encoder_2.",
    "cond_stage_model.",
    "conditioner.",
)
_SPLIT_LINEARS = re.compile(r"\.(attn\.(to_[qkv]|add_[qkv]_proj)|proj_mlp|proj_out)\.qweight$")


def split_prefix(names: Iterable[str], where: str) -> tuple[str, list[str]]:
    """The prefix under which the transformer's tensors are stored, and the names under it.

    In a file that also holds a VAE and text encoders, those are left out.

    Raises:
        CheckpointError: names that belong neither to the transformer nor to a known part of an all-in-one file.
    """
    names = list(names)
    for prefix in BFL_PREFIXES:
        if not any(name.startswith(tuple(prefix + root for root in _ROOTS)) for name in names):
            continue
        inside = [name for name in names if name.startswith(prefix)]
        outside = [name for name in names if not name.startswith((prefix, *_FOREIGN)) and name != "scaled_fp8"]
        if outside:
            raise CheckpointError(
                f"{where} holds a transformer under '{prefix}' and {len(outside)} tensors outside it, such as "
                f"{shown(outside[0])}; it is not one transformer"
            )
        return prefix, inside
    return "", names


def detect_family(names: Collection[str]) -> Literal["flux"] | None:
    """ "flux" for a FLUX.1 transformer in any form, prefixed or not; None for anything else."""
    present = set(names)
    for prefix in ("", *BFL_PREFIXES):
        if any(f"{prefix}{name}" in present for name in ("distilled_guidance_layer.in_proj.weight", "txt_norm.weight")):
            return None
        if any(name.startswith((f"{prefix}controlnet_", f"{prefix}distilled_guidance_layer.")) for name in present):
            return None
        for required, blocks in (
            (_FLUX_DIFFUSERS, ("transformer_blocks.", "single_transformer_blocks.")),
            (_FLUX_BFL, ("double_blocks.", "single_blocks.")),
        ):
            if all(prefix + name in present for name in required) and any(
                name.startswith(tuple(prefix + block for block in blocks)) for name in present
            ):
                return "flux"
    return None


def require_family(names: Collection[str], where: str) -> Literal["flux"]:
    """`detect_family`, or a `CheckpointError` that says what the file holds instead."""
    family = detect_family(names)
    if family is not None:
        return family
    if not names:
        raise CheckpointError(f"{where} holds no tensors; download or export it again")
    guess = next((what for pattern, what in _OTHERS if any(re.search(pattern, name) for name in names)), None)
    held = f"{len(names):,} tensors such as {', '.join(shown(name, 60) for name in sorted(names)[:3])}"
    if guess is None:
        raise CheckpointError(f"{where} is not a FLUX.1 transformer, the family supported so far; it holds {held}")
    raise CheckpointError(f"{where} looks like {guess}; FLUX.1 transformers are supported so far. It holds {held}")


def detect_form(names: Iterable[str]) -> Form:
    """How the tensors of a FLUX.1 file are named (with or without a prefix). Call `require_family` first."""
    quantised = False
    for name in names:
        if re.search(r"(^|\.)(double|single)_blocks\.\d", name):
            return "bfl"
        match = re.search(r"(?:^|\.)((?:single_)?transformer_blocks)\.\d+\.(.+)\.qweight$", name)
        if match is None:
            continue
        quantised = True
        if match.group(2) in MODULES_V1_V2[match.group(1)]:
            return "nunchaku-v1"
        if _SPLIT_LINEARS.search(name):
            return "nunchaku-lite"
    return "nunchaku-v2" if quantised else "diffusers"


def is_quantised(form: Form) -> bool:
    """Whether a form holds 4-bit layers."""
    return form.startswith("nunchaku")


def quantization_of(source: TensorSource) -> QuantizationMetadata:
    """What the metadata of a quantised file says, completed from its tensors (legacy folders say nothing).

    The rank is that of the first low-rank factor; layers may differ, so load by the shape of each.

    Raises:
        CheckpointError: see `detect_precision`.
    """
    stated = parse_quantization(source.metadata, source.where)
    down = next((name for name in source if name.endswith((".lora_down", ".proj_down"))), None)
    shape = () if down is None else source.info(down).shape
    rank = shape[1] if len(shape) == 2 else 0
    return replace(stated, precision=detect_precision(source), rank=rank)


def detect_precision(source: TensorSource) -> Precision:
    """Precision of a quantised file: what its metadata says, checked against its scales; without metadata, the scales.

    Raises:
        CheckpointError: metadata that is nonsense or contradicts the tensors, or a file that is not quantised.
    """
    scales = [info.dtype for name in source if name.endswith(".wscales") for info in [source.info(name)]]
    if not scales:
        raise CheckpointError(f"{source.where} holds no 4-bit layers (no '.wscales' tensors); quantise it first")
    held: Precision = "nvfp4" if torch.float8_e4m3fn in scales else "int4"
    stated = parse_quantization(source.metadata, source.where).precision
    if stated is not None and stated != held:
        raise CheckpointError(f"{source.where} says it is {stated}, but its scales are those of {held}; it is damaged")
    return held
