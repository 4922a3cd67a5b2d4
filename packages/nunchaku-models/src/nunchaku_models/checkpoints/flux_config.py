"""The `FluxTransformer2DModel` configuration of a file: read, or inferred from shapes, and always checked against them.

A configuration from a file decides how much memory is allocated, so it may not claim more than the tensors show.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any

from nunchaku_models.checkpoints.detect import detect_form, is_quantised, require_family, split_prefix
from nunchaku_models.checkpoints.diffusers_view import DiffusersView
from nunchaku_models.checkpoints.errors import CheckpointError, shown
from nunchaku_models.checkpoints.flux_keys import v1_to_v2
from nunchaku_models.checkpoints.metadata import parse_metadata
from nunchaku_models.checkpoints.safetensors_file import TensorSource
from nunchaku_models.checkpoints.safetensors_header import TensorInfo

logger = logging.getLogger(__name__)

_BLOCK_LIMIT = 1000
_CLASSES = (
    "FluxTransformer2DModel",
    "NunchakuFluxTransformer2dModel",
    "NunchakuFluxTransformer2DModel",
    "NunchakuFluxTransformer2DModelV2",
)


def canonical_infos(source: TensorSource) -> dict[str, TensorInfo]:
    """dtype and shape of every tensor of a FLUX.1 file by diffusers name, or by v2 name where it is quantised."""
    require_family(list(source), source.where)
    if not is_quantised(detect_form(source)):
        view = DiffusersView(source)
        return {name: view.info(name) for name in view}
    prefix, stored = split_prefix(source, source.where)
    return {v1_to_v2(name.removeprefix(prefix)): source.info(name) for name in stored}


def _matrix(infos: Mapping[str, TensorInfo], name: str, where: str) -> tuple[int, int]:
    info = infos.get(name)
    if info is None or len(info.shape) != 2 or 0 in info.shape:
        held = "missing" if info is None else f"of shape {list(info.shape)}"
        raise CheckpointError(f"tensor '{name}' in {where} is {held}; a FLUX.1 transformer has a matrix there")
    return info.shape[0], info.shape[1]


def _count_blocks(infos: Mapping[str, TensorInfo], prefix: str, where: str) -> int:
    pattern = re.compile(rf"{prefix}\.(\d{{1,6}})\.")
    indices = {int(match.group(1)) for name in infos if (match := pattern.match(name))}
    if indices and (max(indices) != len(indices) - 1 or len(indices) > _BLOCK_LIMIT):
        missing = next(index for index in range(len(indices) + 1) if index not in indices)
        raise CheckpointError(
            f"{where} holds {len(indices)} '{prefix}' up to number {max(indices)}, without number {missing}; files are "
            "missing or it is damaged"
        )
    return len(indices)


def _rope_axes(head_dim: int) -> list[int]:
    """(16, 56, 56) of 128, scaled to another head dimension: three even numbers, the first about an eighth.

    No tensor shows how a head is divided; only 128 occurs in published models.
    """
    first = min(range(2, head_dim - 3, 2), key=lambda size: ((head_dim - size) % 4, abs(size - head_dim / 8)))
    return [first, (head_dim - first) // 2, (head_dim - first) // 2]


def parameter_count(config: Mapping[str, Any]) -> int:
    """Parameters of the unquantised model with this configuration."""
    head = config["attention_head_dim"]
    width = head * config["num_attention_heads"]
    square = width * width
    out = (config["out_channels"] or config["in_channels"]) * config["patch_size"] ** 2
    joint = 36 * square + 30 * width + 4 * head
    single = 15 * square + 11 * width + 2 * head
    timestep = square + 258 * width
    text = square + (config["pooled_projection_dim"] + 2) * width
    inputs = (config["in_channels"] + config["joint_attention_dim"] + 2) * width
    output = 2 * square + 2 * width + out * (width + 1)
    return (
        config["num_layers"] * joint
        + config["num_single_layers"] * single
        + timestep * (2 if config["guidance_embeds"] else 1)
        + text
        + inputs
        + output
    )


def infer_flux_config(source: TensorSource) -> dict[str, Any]:
    """Arguments of `FluxTransformer2DModel`, from names and shapes alone.

    Raises:
        CheckpointError: tensors missing or of shapes that contradict each other.
    """
    where = source.where
    infos = canonical_infos(source)
    width, in_channels = _matrix(infos, "x_embedder.weight", where)
    _, joint_dim = _matrix(infos, "context_embedder.weight", where)
    _, pooled_dim = _matrix(infos, "time_text_embed.text_embedder.linear_1.weight", where)
    out_rows, _ = _matrix(infos, "proj_out.weight", where)
    num_layers = _count_blocks(infos, "transformer_blocks", where)
    num_single_layers = _count_blocks(infos, "single_transformer_blocks", where)
    heads = {
        info.shape
        for name, info in infos.items()
        if re.fullmatch(r"(single_)?transformer_blocks\.\d+\.attn\.norm_(added_)?[qk]\.weight", name)
    }
    head_shape = next(iter(heads)) if len(heads) == 1 else ()
    if len(head_shape) != 1 or head_shape[0] < 6 or head_shape[0] % 2 or width % head_shape[0]:
        raise CheckpointError(
            f"the query and key norms in {where} have shapes {sorted(map(list, heads))[:4]}; one even head dimension "
            f"that divides the width {width} is needed"
        )
    head_dim = head_shape[0]
    expected = {
        "context_embedder.weight": (width, joint_dim),
        "time_text_embed.timestep_embedder.linear_1.weight": (width, 256),
        "time_text_embed.timestep_embedder.linear_2.weight": (width, width),
        "time_text_embed.text_embedder.linear_1.weight": (width, pooled_dim),
        "time_text_embed.text_embedder.linear_2.weight": (width, width),
        "norm_out.linear.weight": (2 * width, width),
        "proj_out.weight": (out_rows, width),
    }
    for name, shape in expected.items():
        if _matrix(infos, name, where) != shape:
            raise CheckpointError(
                f"tensor '{name}' in {where} has shape {list(infos[name].shape)} where {list(shape)} follows from "
                "'x_embedder.weight'; the file is damaged or not FLUX.1"
            )
    config: dict[str, Any] = {
        "patch_size": 1,
        "in_channels": in_channels,
        "out_channels": None if out_rows == in_channels else out_rows,
        "num_layers": num_layers,
        "num_single_layers": num_single_layers,
        "attention_head_dim": head_dim,
        "num_attention_heads": width // head_dim,
        "joint_attention_dim": joint_dim,
        "pooled_projection_dim": pooled_dim,
        "guidance_embeds": any(name.startswith("time_text_embed.guidance_embedder.") for name in infos),
        "axes_dims_rope": _rope_axes(head_dim),
    }
    # No parameter takes less than four bits here, so a file cannot hold more than two per byte.
    stored = sum(source.info(name).nbytes for name in source)
    if parameter_count(config) > 2 * stored:
        raise CheckpointError(
            f"{where} describes a model of {parameter_count(config):,} parameters and holds {stored:,} bytes; tensors "
            "are missing or it is damaged"
        )
    return config


def _integers(value: object) -> list[int] | None:
    if isinstance(value, list | tuple) and all(type(item) is int for item in value):
        return list(value)
    return None


def validate_flux_config(config: Mapping[str, Any], source: TensorSource) -> dict[str, Any]:
    """The arguments of `FluxTransformer2DModel` in an untrusted configuration, which must agree with the tensors.

    Args:
        config: as parsed from JSON; keys that start with "_" and `quantization_config` are left out, others that the
            model does not have are left out with a warning.
        source: the file the configuration belongs to.

    Raises:
        CheckpointError: another model class, a value of the wrong type, or one the tensors contradict.
    """
    where = source.where
    inferred = infer_flux_config(source)
    named = config.get("_class_name", _CLASSES[0])
    if named not in _CLASSES:
        raise CheckpointError(f"the config of {where} is for the class {shown(named)}; its tensors are those of FLUX.1")
    unknown = sorted(key for key in config if key not in inferred and not key.startswith("_"))
    unknown = [key for key in unknown if key != "quantization_config"]
    if unknown:
        logger.warning("the config of %s has entries that FLUX.1 does not know: %s", where, shown(", ".join(unknown)))
    result = dict(inferred)

    def disagree(key: str, fits: object) -> CheckpointError:
        return CheckpointError(
            f"the config of {where} gives {key} = {shown(config[key])} where its tensors need {fits}; one of the two "
            "is damaged or from another model"
        )

    # Neither can be seen in the tensors: patch_size only together with out_channels, the axes only by their sum.
    patch = config.get("patch_size", 1)
    out_rows = inferred["out_channels"] or inferred["in_channels"]
    if type(patch) is not int or not 1 <= patch <= 64 or out_rows % patch**2:
        raise disagree("patch_size", f"a positive integer whose square divides {out_rows}")
    result["patch_size"] = patch
    channels = out_rows // patch**2
    result["out_channels"] = None if channels == inferred["in_channels"] else channels
    if "axes_dims_rope" in config:
        axes = _integers(config["axes_dims_rope"])
        head_dim = inferred["attention_head_dim"]
        if axes is None or len(axes) != 3 or sum(axes) != head_dim or any(size <= 0 or size % 2 for size in axes):
            raise disagree("axes_dims_rope", f"three even positive integers that add up to {head_dim}")
        result["axes_dims_rope"] = axes
    for key, fits in result.items():
        if key not in config or key in ("patch_size", "axes_dims_rope"):
            continue
        given = config[key]
        if key == "out_channels":
            if given is not None and (type(given) is not int or given != channels):
                raise disagree(key, channels)
            if given is None and channels != inferred["in_channels"]:
                raise disagree(key, channels)
        elif type(given) is not type(fits) or given != fits:
            raise disagree(key, fits)
    return result


def flux_config(source: TensorSource) -> dict[str, Any]:
    """The configuration of a file: its `config` metadata checked against its tensors, or else inferred.

    Raises:
        CheckpointError: see `validate_flux_config` and `infer_flux_config`.
    """
    config = parse_metadata(source.metadata, source.where).config
    return infer_flux_config(source) if config is None else validate_flux_config(config, source)


def comfy_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The `comfy_config` metadata of a quantised FLUX.1 file (spec, checkpoint_format section 1).

    Args:
        config: arguments of `FluxTransformer2DModel`, all of them.
    """
    width = config["attention_head_dim"] * config["num_attention_heads"]
    # ComfyUI counts latent channels before they are cut into 2 x 2 patches.
    out_channels = (config["out_channels"] or config["in_channels"]) * config["patch_size"] ** 2
    return {
        "model_class": "Flux" if config["guidance_embeds"] else "FluxSchnell",
        "model_config": {
            "axes_dim": list(config["axes_dims_rope"]),
            "context_in_dim": config["joint_attention_dim"],
            "depth": config["num_layers"],
            "depth_single_blocks": config["num_single_layers"],
            "disable_unet_model_creation": True,
            "guidance_embed": config["guidance_embeds"],
            "hidden_size": width,
            "image_model": "flux",
            "in_channels": config["in_channels"] // 4,
            "mlp_ratio": 4.0,
            "num_heads": config["num_attention_heads"],
            "out_channels": out_channels // 4,
            "patch_size": 2,
            "qkv_bias": True,
            "theta": 10000,
            "vec_in_dim": config["pooled_projection_dim"],
        },
    }
