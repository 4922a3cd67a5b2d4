"""What keys of LoRA files mean: which linear, and which tensor of its adapter."""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import NamedTuple

KINDS: dict[str, str] = {
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora_A.default.weight": "down",  # saved from a PEFT model without taking the adapter's name out
    ".lora_B.default.weight": "up",
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    "_lora.down.weight": "down",  # attention processors of early diffusers, single blocks of XLabs
    "_lora.up.weight": "up",
    ".down.weight": "down",  # joint blocks of XLabs: `qkv_lora1.down.weight`
    ".up.weight": "up",
    ".lora_A": "down",
    ".lora_B": "up",
    ".alpha": "alpha",
    ".lora_B.bias": "bias",
    ".diff_b": "diff_b",
    ".lora_gain": "gain",
    ".dora_scale": "dora",
    ".lora_magnitude_vector": "dora",
    ".lora_magnitude_vector.weight": "dora",
    ".diff": "diff",
    ".lora_mid.weight": "mid",
    **{f".lokr_{name}": f"lokr_{name}" for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
    **{f".hada_{name}": f"hada_{name}" for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
}
"""Endings of keys -> the tensor they name. Longer endings are tried first."""

_BY_LENGTH = sorted(KINDS, key=len, reverse=True)

VECTORS = (".scale", ".weight")
"""Endings of whole tensors that replace the model's: norm weights of control LoRAs."""

PREFIXES = (
    "base_model.model.",
    "model.diffusion_model.",
    "diffusion_model.",
    "transformer.",
    "lora_unet_",
    "lora_transformer_",
    "lycoris_",
)
"""What stands in front of a name in the transformer; several may follow each other."""

TEXT_PREFIXES = (
    "lora_te_",
    "lora_te1_",
    "text_encoder.",
    "text_encoders.clip_l.transformer.",
    "text_encoders.clip_l.",
)
"""What stands in front of a name in the CLIP text encoder."""

OTHER_TEXT_PREFIXES = ("lora_te2_", "lora_te3_", "text_encoder_2.", "text_encoders.t5xxl.", "lora_prior_te_")
"""Text encoders that FLUX pipelines of diffusers have no adapters for."""


class Key(NamedTuple):
    """A key of a file, taken apart.

    Attributes:
        part: "transformer", "text_encoder" or "other text encoder".
        module: the name between prefix and ending, as the file spells it.
        kind: a value of `KINDS`, "vector", or "" for an ending that means nothing here.
    """

    part: str
    module: str
    kind: str


@dataclass(frozen=True)
class Place:
    """The linears of a model that one adapter of a file is for.

    Attributes:
        paths: module paths in the diffusers model; several where the file's model has them fused, in row order.
        shares: relative heights of their rows, where the model is not there to tell.
        swapped: the two halves of the rows are the other way round in diffusers (shift and scale of the last norm).
    """

    paths: tuple[str, ...]
    shares: tuple[int, ...] = (1,)
    swapped: bool = False


def parse_key(key: str) -> Key:
    """Take a key apart; never fails."""
    part, rest = "transformer", key
    for prefix in OTHER_TEXT_PREFIXES:
        if key.startswith(prefix):
            return Key("other text encoder", key.removeprefix(prefix), "")
    for prefix in TEXT_PREFIXES:
        if key.startswith(prefix):
            part, rest = "text_encoder", key.removeprefix(prefix)
            break
    stripped = part == "transformer"
    while stripped:
        stripped = False
        for prefix in PREFIXES:
            if rest.startswith(prefix):
                rest, stripped = rest.removeprefix(prefix), True
    for ending in _BY_LENGTH:
        if rest.endswith(ending) and len(rest) > len(ending):
            return Key(part, _without_processor(rest.removesuffix(ending)), KINDS[ending])
    for ending in VECTORS:
        if rest.endswith(ending) and "norm" in rest:
            return Key(part, rest.removesuffix(ending), "vector")
    return Key(part, rest, "")


def _without_processor(module: str) -> str:
    """Adapters of early diffusers and of XLabs belong to attention processors; give them their linear's name."""
    xlabs = re.fullmatch(r"(double|single)_blocks\.(\d+)\.processor\.(qkv|proj)(?:_lora)?([12]?)", module)
    if xlabs:
        kind, index, which, stream = xlabs.groups()
        if kind == "single":
            return f"single_blocks.{index}.{'qkv' if which == 'qkv' else 'linear2'}"
        return f"double_blocks.{index}.{'txt' if stream == '2' else 'img'}_attn.{which}"
    return re.sub(r"\.processor\.", ".", module)


_QKV, _ADDED = ("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj")
_STREAM_NAMES: dict[str, dict[str, tuple[str, ...]]] = {
    "img": {
        "attn_qkv": tuple(f"attn.{name}" for name in _QKV),
        "attn_proj": ("attn.to_out.0",),
        "mlp_0": ("ff.net.0.proj",),
        "mlp_2": ("ff.net.2",),
        "mod_lin": ("norm1.linear",),
        "attn_norm_query_norm": ("attn.norm_q",),
        "attn_norm_key_norm": ("attn.norm_k",),
    },
    "txt": {
        "attn_qkv": tuple(f"attn.{name}" for name in _ADDED),
        "attn_proj": ("attn.to_add_out",),
        "mlp_0": ("ff_context.net.0.proj",),
        "mlp_2": ("ff_context.net.2",),
        "mod_lin": ("norm1_context.linear",),
        "attn_norm_query_norm": ("attn.norm_added_q",),
        "attn_norm_key_norm": ("attn.norm_added_k",),
    },
}
_SINGLE_NAMES: dict[str, tuple[str, ...]] = {
    "linear1": (*(f"attn.{name}" for name in _QKV), "proj_mlp"),
    "qkv": tuple(f"attn.{name}" for name in _QKV),
    "linear2": ("proj_out",),
    "modulation_lin": ("norm.linear",),
    "norm_query_norm": ("attn.norm_q",),
    "norm_key_norm": ("attn.norm_k",),
}
_TOP_NAMES: dict[str, str] = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in_in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in_out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in_in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in_out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in_in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in_out_layer": "time_text_embed.guidance_embedder.linear_2",
    "final_layer_linear": "proj_out",
    "final_layer_adaLN_modulation_1": "norm_out.linear",
}
_DIFFUSERS_NAMES = (
    *(f"attn.{name}" for name in (*_QKV, *_ADDED, "to_out.0", "to_add_out")),
    *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
    *("norm1.linear", "norm1_context.linear", "norm.linear", "proj_mlp", "proj_out"),
)
_UNDERSCORED = {name.replace(".", "_"): name for name in _DIFFUSERS_NAMES}
_UNDERSCORED_TOP = {
    name.replace(".", "_"): name for name in (*_TOP_NAMES.values(), "x_embedder", "context_embedder", "proj_out")
}
_FUSED = {"attn_to_qkv": _QKV, "attn_add_qkv_proj": _ADDED}


def flux_place(module: str) -> Place | None:
    """Where an adapter for `module` goes in diffusers' FLUX.1.

    Args:
        module: a name of the original (BFL) model or of diffusers, with dots or with underscores for them.

    Returns:
        The place, or None if FLUX.1 has no such linear.
    """
    name = module.replace(".", "_")
    if name in _TOP_NAMES:
        return Place((_TOP_NAMES[name],), swapped=name == "final_layer_adaLN_modulation_1")
    if name in _UNDERSCORED_TOP:
        return Place((_UNDERSCORED_TOP[name],))
    if found := re.fullmatch(r"double_blocks_(\d+)_(img|txt)_(\w+)", name):
        index, stream, rest = found.groups()
        return _place(f"transformer_blocks.{index}", _STREAM_NAMES[stream].get(rest, ()))
    if found := re.fullmatch(r"single_blocks_(\d+)_(\w+)", name):
        return _place(f"single_transformer_blocks.{found[1]}", _SINGLE_NAMES.get(found[2], ()))
    if found := re.fullmatch(r"((?:single_)?transformer_blocks)_(\d+)_(\w+)", name):
        block, rest = f"{found[1]}.{found[2]}", found[3]
        if rest in _FUSED:
            return _place(block, tuple(f"attn.{part}" for part in _FUSED[rest]))
        return _place(block, (_UNDERSCORED[rest],) if rest in _UNDERSCORED else ())
    return None


def find_place(module: str, known: Collection[str] | None, by_underscores: Mapping[str, str]) -> Place | None:
    """Where an adapter for `module` goes.

    Args:
        module: as the file spells it.
        known: module paths of the model's linears; None if there is no model, when names with dots are believed.
        by_underscores: the same paths by their spelling with underscores.

    Returns:
        The place, whose paths the model may not have, or None if the name means nothing.
    """
    if known is not None and module in known:
        return Place((module,))
    if module.replace(".", "_") in by_underscores:
        return Place((by_underscores[module.replace(".", "_")],))
    place = flux_place(module)
    if place is None and known is None and "." in module:
        return Place((module,))
    return place


def _place(block: str, names: tuple[str, ...]) -> Place | None:
    if not names:
        return None
    # the MLP of a single block is four times as wide as its q, k and v
    shares = tuple(4 if name == "proj_mlp" and len(names) > 1 else 1 for name in names)
    return Place(tuple(f"{block}.{name}" for name in names), shares)


def format_name(keys: Collection[str]) -> str:
    """What people call the format of a file with these keys."""
    checks = (
        ("published (fused)", r"\.lora_(down|up)$"),
        ("XLabs", r"\.processor\.(qkv|proj)_lora"),
        ("BFL control", r"query_norm\.scale$"),
        ("LyCORIS", r"\.(lokr|hada)_"),
        ("kohya", r"^lora_unet_"),
        ("OneTrainer", r"^lora_transformer_"),
        ("ComfyUI", r"^(model\.)?diffusion_model\."),
        ("fal Kontext", r"^base_model\.model\.(double|single)_blocks"),
        ("PEFT", r"^base_model\.model\."),
        ("BFL", r"^(double|single)_blocks\."),
    )
    for name, pattern in checks:
        if any(re.search(pattern, key) for key in keys):
            return name
    return "diffusers"
