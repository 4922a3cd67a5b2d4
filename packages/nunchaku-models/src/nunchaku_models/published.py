"""The metadata and configurations that quantised files and folders carry."""

import json
import re
from collections.abc import Mapping
from typing import Any

from nunchaku_kernels.formats.svdq import GROUP_SIZES, Precision
from nunchaku_models.checkpoints import FileMetadata, QuantizationMetadata, build_metadata, comfy_config

WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
QUANT_METHOD = "svdquant"


def weights_name(variant: str | None = None) -> str:
    """File name of the weights in a diffusers folder.

    Raises:
        ValueError: a variant that is no plain word.
    """
    if variant is None:
        return WEIGHTS_NAME
    if not re.fullmatch(r"[A-Za-z0-9_-]+", variant):
        raise ValueError(f"variant must be a name such as 'fp16', got {variant!r}")
    return WEIGHTS_NAME.replace(".", f".{variant}.")


def quantization_entries(precision: Precision, rank: int) -> dict[str, Any]:
    """`quantization_config` of a quantised diffusers folder."""
    return {
        "quant_method": QUANT_METHOD,
        "precision": precision,
        "rank": rank,
        "group_size": GROUP_SIZES[precision],
    }


def file_metadata(transformer_class: str, config: Mapping[str, Any], precision: Precision, rank: int) -> dict[str, str]:
    """Metadata entries of a published file (spec, checkpoint_format section 1)."""
    return build_metadata(
        FileMetadata(
            config={"_class_name": transformer_class, **config},
            quantization=QuantizationMetadata(precision, rank),
            comfy_config=comfy_config(config),
            model_class=f"Nunchaku{transformer_class.replace('2DModel', '2dModel')}",
        )
    )


def plain_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A diffusers configuration without the entries that describe where it came from."""
    return {k: v for k, v in config.items() if not k.startswith("_") and k != "quantization_config"}


def folder_config(transformer_class: str, config: Mapping[str, Any], precision: Precision, rank: int) -> str:
    """`config.json` of a quantised transformer folder."""
    quantization = quantization_entries(precision, rank)
    entries = {"_class_name": transformer_class, **config, "quantization_config": quantization}
    return json.dumps(entries, indent=2) + "\n"
