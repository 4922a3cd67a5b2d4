"""The metadata of published quantised files: parsing without trust, and building.

All values are JSON strings (spec, checkpoint_format section 1): `config` of the diffusers model, `quantization_config`,
`comfy_config` for ComfyUI, and the plain string `model_class`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from nunchaku_kernels.formats.svdq import GROUP_SIZES, Precision
from nunchaku_models.checkpoints.errors import CheckpointError, shown
from nunchaku_models.checkpoints.json_guard import parse_json_object

DEFAULT_RANK = 32
_RANK_LIMIT = 16384
_WEIGHT_DTYPES: dict[str, Precision] = {"int4": "int4", "fp4_e2m1_all": "nvfp4"}
_KNOWN = ("method", "quant_method", "weight", "activation", "precision", "group_size", "rank", "skip_refiners")


@dataclass(frozen=True)
class QuantizationMetadata:
    """`quantization_config` of a file.

    Attributes:
        precision: None when the file does not say (see `detect.detect_precision`).
        rank: columns of the low-rank factors, 0 for none.
        skip_refiners: Z-Image: refiner attention is 16-bit.
        extra: further entries, kept as they are.
    """

    precision: Precision | None
    rank: int = DEFAULT_RANK
    skip_refiners: bool = False
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def group_size(self) -> int | None:
        """Input channels per weight scale: 64 for int4, 16 for nvfp4, None for an unknown precision."""
        return None if self.precision is None else GROUP_SIZES[self.precision]

    def to_dict(self) -> dict[str, Any]:
        """The published form. Raises ValueError without a precision."""
        if self.precision is None:
            raise ValueError("quantization_config cannot be written without a precision; give 'int4' or 'nvfp4'")
        fp4 = self.precision == "nvfp4"
        dtype = "fp4_e2m1_all" if fp4 else "int4"
        result: dict[str, Any] = {
            **self.extra,
            "method": "svdquant",
            "weight": {
                "dtype": dtype,
                "scale_dtype": [None, "fp8_e4m3_nan"] if fp4 else None,
                "group_size": self.group_size,
            },
            "activation": {
                "dtype": dtype,
                "scale_dtype": "fp8_e4m3_nan" if fp4 else None,
                "group_size": self.group_size,
            },
            "rank": self.rank,
        }
        if self.skip_refiners:
            result["skip_refiners"] = True
        return result


@dataclass(frozen=True)
class FileMetadata:
    """Everything the metadata of a file says. `other` keeps the entries without a meaning here, as strings."""

    config: dict[str, Any] | None = None
    quantization: QuantizationMetadata | None = None
    comfy_config: dict[str, Any] | None = None
    model_class: str | None = None
    other: Mapping[str, str] = field(default_factory=dict)


def _dtype(part: Mapping[str, Any], what: str, where: str) -> Precision | None:
    """Precision that a `weight` or `activation` entry names, after checking that its group size fits."""
    name = part.get("dtype")
    if name is None:
        return None
    if not isinstance(name, str) or name not in _WEIGHT_DTYPES:
        raise CheckpointError(
            f"{where} says in quantization_config that {what} have dtype {shown(name)}; int4 and fp4_e2m1_all are "
            "supported"
        )
    precision = _WEIGHT_DTYPES[name]
    group = part.get("group_size", GROUP_SIZES[precision])
    if isinstance(group, bool) or group != GROUP_SIZES[precision]:
        raise CheckpointError(
            f"{where} says in quantization_config that {name} {what} have groups of {shown(group)}; only "
            f"{GROUP_SIZES[precision]} exists"
        )
    return precision


def parse_quantization(metadata: Mapping[str, str], where: str) -> QuantizationMetadata:
    """`quantization_config` of a file's metadata; a missing one, or missing entries, give the defaults.

    Understood are the published form (`weight` and `activation` objects), the flat form of quantised diffusers folders
    (`precision`, `group_size`, `rank`) and diffusers' nunchaku_lite (`svdq_w4a4`).

    Raises:
        CheckpointError: entries that are nonsense, whose precision is unknown or contradict each other.
    """
    text = metadata.get("quantization_config")
    if text is None:
        return QuantizationMetadata(None)
    document = parse_json_object(text, where=f"the metadata entry 'quantization_config' of {where}")
    method = document.get("quant_method", document.get("method", "svdquant"))
    if method in ("nunchaku_lite", "nunchaku"):
        return _parse_lite(document, where)
    if method != "svdquant":
        raise CheckpointError(f"{where} is quantised with {shown(method)}; svdquant and nunchaku_lite are supported")
    parts = [_flat_precision(document, where)]
    for key, what in (("weight", "weights"), ("activation", "activations")):
        part = document.get(key)
        if part is not None and not isinstance(part, dict):
            raise CheckpointError(f"{where} has {shown(part)} as '{key}' of quantization_config; it must be an object")
        parts.append(_dtype(part or {}, what, where))
    stated = [part for part in parts if part is not None]
    if len(set(stated)) > 1:
        raise CheckpointError(f"{where} states both {stated[0]} and {stated[-1]} in quantization_config; it is damaged")
    skip = document.get("skip_refiners", False)
    if not isinstance(skip, bool):
        raise CheckpointError(
            f"{where} has {shown(skip)} as 'skip_refiners' of quantization_config; it must be a boolean"
        )
    extra = {key: value for key, value in document.items() if key not in _KNOWN}
    return QuantizationMetadata(stated[0] if stated else None, _rank(document, where), skip, extra)


def _flat_precision(part: Mapping[str, Any], where: str) -> Precision | None:
    precision = part.get("precision")
    if precision is None:
        return None
    if not isinstance(precision, str) or precision not in GROUP_SIZES:
        raise CheckpointError(f"{where} states the precision {shown(precision)}; int4 and nvfp4 are supported")
    known: Precision = "int4" if precision == "int4" else "nvfp4"
    group = part.get("group_size")
    if group is not None and (isinstance(group, bool) or group != GROUP_SIZES[known]):
        raise CheckpointError(f"{where} states {known} groups of {shown(group)}; only {GROUP_SIZES[known]} exists")
    return known


def _rank(document: Mapping[str, Any], where: str) -> int:
    rank = document.get("rank")
    if rank is None:
        return DEFAULT_RANK
    if isinstance(rank, bool) or not isinstance(rank, int) or not 0 <= rank <= _RANK_LIMIT:
        raise CheckpointError(
            f"{where} has {shown(rank)} as 'rank' of quantization_config; it must be 0 to {_RANK_LIMIT}"
        )
    return rank


def _parse_lite(document: Mapping[str, Any], where: str) -> QuantizationMetadata:
    part = document.get("svdq_w4a4") or {}
    if not isinstance(part, dict):
        raise CheckpointError(f"{where} has {shown(part)} as 'svdq_w4a4' of quantization_config; it must be an object")
    precision = _flat_precision(part, where)
    return QuantizationMetadata(precision, _rank(part, where), extra=dict(document))


def parse_metadata(metadata: Mapping[str, str], where: str) -> FileMetadata:
    """All metadata of a file. `config` is only checked to be an object; see `flux_config` for its contents.

    Args:
        metadata: the file's str -> str metadata.
        where: the file, for messages.

    Raises:
        CheckpointError: an entry that is not the JSON it should be, or nonsense in `quantization_config`.
    """

    def entry(key: str) -> dict[str, Any] | None:
        text = metadata.get(key)
        return None if text is None else parse_json_object(text, where=f"the metadata entry '{key}' of {where}")

    named = ("config", "quantization_config", "comfy_config", "model_class")
    return FileMetadata(
        config=entry("config"),
        quantization=parse_quantization(metadata, where) if "quantization_config" in metadata else None,
        comfy_config=entry("comfy_config"),
        model_class=metadata.get("model_class"),
        other={key: value for key, value in metadata.items() if key not in named},
    )


def build_metadata(values: FileMetadata) -> dict[str, str]:
    """The str -> str metadata to write; the inverse of `parse_metadata`."""
    result = dict(values.other)
    if values.config is not None:
        result["config"] = json.dumps(values.config)
    if values.quantization is not None:
        result["quantization_config"] = json.dumps(values.quantization.to_dict())
    if values.comfy_config is not None:
        result["comfy_config"] = json.dumps(values.comfy_config)
    if values.model_class is not None:
        result["model_class"] = values.model_class
    return result
