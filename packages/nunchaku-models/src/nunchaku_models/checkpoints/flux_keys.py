"""Names of FLUX.1 tensors in the files people have, as data: published v1 <-> v2, and BFL / ComfyUI -> diffusers.

Three vocabularies: *diffusers* names (`transformer_blocks.0.attn.to_q.weight`), *BFL* names of the original single
files, which ComfyUI uses too (`double_blocks.0.img_attn.qkv.weight`), and the published quantised files, whose *v1*
names are their own (`transformer_blocks.0.qkv_proj.lora_down`) and whose *v2* names follow diffusers
(`transformer_blocks.0.attn.to_qkv.proj_down`). Sources: spec, checkpoint_format section 3; lora_formats section 2.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from nunchaku_models.checkpoints.errors import CheckpointError, shown
from nunchaku_models.checkpoints.safetensors_header import TensorInfo
from nunchaku_models.families.flux import FLUX

# ----------------------------------------------------------------------------------------------------- v1 and v2 names

# The order matters: ".smooth" is a prefix of ".smooth_orig".
_SUFFIXES_V1_V2 = (
    (".smooth_orig", ".smooth_factor_orig"),
    (".smooth", ".smooth_factor"),
    (".lora_down", ".proj_down"),
    (".lora_up", ".proj_up"),
)
# Block prefix -> module inside the block -> its v2 name, for modules whose names differ: as the family's page has them.
MODULES_V1_V2: dict[str, dict[str, str]] = {
    block.prefix: {
        **{spec.published: spec.module for spec in block.low_rank if spec.published != spec.module},
        **dict(block.renamed),
    }
    for block in FLUX.blocks
}
_BLOCK = re.compile(r"((?:single_)?transformer_blocks)\.(\d{1,6})\.(.+)", re.DOTALL)


def _rename(name: str, modules: Mapping[str, Mapping[str, str]], suffixes: Iterable[tuple[str, str]]) -> str:
    match = _BLOCK.fullmatch(name)
    if match is None:
        return name
    prefix, index, rest = match.groups()
    for old, new in suffixes:
        if rest.endswith(old):
            rest = rest.removesuffix(old) + new
            break
    module, dot, leaf = rest.rpartition(".")
    return f"{prefix}.{index}.{modules[prefix].get(module, module)}{dot}{leaf}"


_MODULES_V2_V1 = {prefix: {new: old for old, new in pairs.items()} for prefix, pairs in MODULES_V1_V2.items()}
_SUFFIXES_V2_V1 = tuple((new, old) for old, new in _SUFFIXES_V1_V2)


def v1_to_v2(name: str) -> str:
    """The v2 name of a v1 tensor; names outside the blocks, and those already v2, are returned unchanged."""
    return _rename(name, MODULES_V1_V2, _SUFFIXES_V1_V2)


def v2_to_v1(name: str) -> str:
    """The inverse of `v1_to_v2`."""
    return _rename(name, _MODULES_V2_V1, _SUFFIXES_V2_V1)


# --------------------------------------------------------------------------------------------------- BFL and diffusers


@dataclass(frozen=True, slots=True)
class Part:
    """Where a diffusers tensor comes from: rows of a BFL tensor.

    Attributes:
        source: BFL module or tensor name.
        start: first row, in units of the model width D.
        stop: one past the last row, in the same unit; None for the last row of the tensor.
        swap_halves: the source holds (shift, scale) and diffusers (scale, shift).
    """

    source: str
    start: int = 0
    stop: int | None = None
    swap_halves: bool = False


# Modules: both `.weight` and `.bias` follow the row.
_TOP_MODULES: dict[str, Part] = {
    "x_embedder": Part("img_in"),
    "context_embedder": Part("txt_in"),
    "time_text_embed.timestep_embedder.linear_1": Part("time_in.in_layer"),
    "time_text_embed.timestep_embedder.linear_2": Part("time_in.out_layer"),
    "time_text_embed.text_embedder.linear_1": Part("vector_in.in_layer"),
    "time_text_embed.text_embedder.linear_2": Part("vector_in.out_layer"),
    "time_text_embed.guidance_embedder.linear_1": Part("guidance_in.in_layer"),
    "time_text_embed.guidance_embedder.linear_2": Part("guidance_in.out_layer"),
    "norm_out.linear": Part("final_layer.adaLN_modulation.1", swap_halves=True),
    "proj_out": Part("final_layer.linear"),
}
_JOINT_MODULES: dict[str, Part] = {
    "norm1.linear": Part("img_mod.lin"),
    "norm1_context.linear": Part("txt_mod.lin"),
    "attn.to_q": Part("img_attn.qkv", 0, 1),
    "attn.to_k": Part("img_attn.qkv", 1, 2),
    "attn.to_v": Part("img_attn.qkv", 2),
    "attn.to_out.0": Part("img_attn.proj"),
    "attn.add_q_proj": Part("txt_attn.qkv", 0, 1),
    "attn.add_k_proj": Part("txt_attn.qkv", 1, 2),
    "attn.add_v_proj": Part("txt_attn.qkv", 2),
    "attn.to_add_out": Part("txt_attn.proj"),
    "ff.net.0.proj": Part("img_mlp.0"),
    "ff.net.2": Part("img_mlp.2"),
    "ff_context.net.0.proj": Part("txt_mlp.0"),
    "ff_context.net.2": Part("txt_mlp.2"),
}
_SINGLE_MODULES: dict[str, Part] = {
    "norm.linear": Part("modulation.lin"),
    "attn.to_q": Part("linear1", 0, 1),
    "attn.to_k": Part("linear1", 1, 2),
    "attn.to_v": Part("linear1", 2, 3),
    "proj_mlp": Part("linear1", 3),
    "proj_out": Part("linear2"),
}
# Vectors of the RMS norms over queries and keys.
_JOINT_NORMS = {
    "attn.norm_q": "img_attn.norm.query_norm",
    "attn.norm_k": "img_attn.norm.key_norm",
    "attn.norm_added_q": "txt_attn.norm.query_norm",
    "attn.norm_added_k": "txt_attn.norm.key_norm",
}
_SINGLE_NORMS = {"attn.norm_q": "norm.query_norm", "attn.norm_k": "norm.key_norm"}

BFL_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "transformer.")
_BFL_BLOCK = re.compile(r"(double|single)_blocks\.(\d{1,6})\.(.+)", re.DOTALL)


def _invert(modules: Mapping[str, Part], norms: Mapping[str, str]) -> dict[str, list[tuple[str, Part]]]:
    """BFL tensor name -> the diffusers tensors made from it."""
    result: dict[str, list[tuple[str, Part]]] = {}
    for target, part in modules.items():
        for leaf in ("weight", "bias"):
            result.setdefault(f"{part.source}.{leaf}", []).append((f"{target}.{leaf}", part))
    for target, source in norms.items():
        # Files re-saved by recent ComfyUI versions call the vector "weight".
        for leaf in ("scale", "weight"):
            result.setdefault(f"{source}.{leaf}", []).append((f"{target}.weight", Part(source)))
    return result


_TOP_TARGETS = _invert(_TOP_MODULES, {})
_BLOCK_TARGETS = {
    "double": ("transformer_blocks", _invert(_JOINT_MODULES, _JOINT_NORMS)),
    "single": ("single_transformer_blocks", _invert(_SINGLE_MODULES, _SINGLE_NORMS)),
}


def bfl_targets(name: str) -> list[tuple[str, Part]]:
    """The diffusers tensors made from a BFL tensor (name without prefix), with their rows; empty when unknown."""
    match = _BFL_BLOCK.fullmatch(name)
    if match is None:
        return _TOP_TARGETS.get(name, [])
    kind, index, rest = match.groups()
    prefix, targets = _BLOCK_TARGETS[kind]
    return [(f"{prefix}.{index}.{target}", part) for target, part in targets.get(rest, [])]


@dataclass(frozen=True, slots=True)
class Rows:
    """A diffusers tensor as rows start..stop of a tensor in the file."""

    source: str
    start: int
    stop: int
    swap_halves: bool = False


def bfl_rows(tensors: Mapping[str, TensorInfo], where: str) -> dict[str, Rows]:
    """For every diffusers tensor, the rows of the BFL tensor that hold it.

    Args:
        tensors: BFL name without prefix -> dtype and shape, as in the file (`TensorInfo.name` may keep the prefix).
        where: the file, for messages.

    Returns:
        diffusers name -> `Rows`, whose `source` is `TensorInfo.name`.

    Raises:
        CheckpointError: a tensor that is no part of FLUX.1, or whose rows do not divide as they should.
    """
    if "img_in.weight" not in tensors or len(tensors["img_in.weight"].shape) != 2:
        raise CheckpointError(f"{where} has BFL names but no 2-D 'img_in.weight'; it is not a whole FLUX.1 transformer")
    width = tensors["img_in.weight"].shape[0]
    result: dict[str, Rows] = {}
    unknown: list[str] = []
    for name, info in tensors.items():
        targets = bfl_targets(name)
        if not targets:
            unknown.append(name)
            continue
        rows = info.shape[0] if info.shape else 0
        for target, part in targets:
            start = part.start * width
            stop = rows if part.stop is None else part.stop * width
            whole = part.start == 0 and part.stop is None
            # The last part of a fused tensor: exactly one D for v of a joint block, the MLP (> 0) of a single block.
            last = part.stop is None and not whole
            if (
                (not whole and not start < stop <= rows)
                or (last and name.endswith(("qkv.weight", "qkv.bias")) and stop != start + width)
                or (part.swap_halves and rows != 2 * width)
            ):
                raise CheckpointError(
                    f"tensor {shown(info.name)} in {where} has shape {list(info.shape)}, which does not fit a model of "
                    f"width {width}; the file is damaged or not FLUX.1"
                )
            if target in result:
                raise CheckpointError(f"{where} holds {shown(target)} twice, once as {shown(info.name)}; remove one")
            result[target] = Rows(info.name, start, stop, part.swap_halves)
    if unknown:
        raise CheckpointError(
            f"{where} holds {len(unknown)} tensors that FLUX.1 does not have, such as "
            f"{', '.join(map(shown, unknown[:3]))}; it is another model or holds adapters too"
        )
    return result
