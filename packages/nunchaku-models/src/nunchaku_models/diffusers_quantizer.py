"""Quantised folders for diffusers: `quantization_config` with `quant_method: svdquant`.

Importing this module registers the method, as `nunchaku_models` does once diffusers is there; then the stock
`from_pretrained` of a pipeline or transformer loads such a folder and `save_pretrained` writes one.
"""

from enum import StrEnum
from pathlib import Path
from typing import Any

import torch
from diffusers.quantizers import auto
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from torch import nn

from nunchaku_kernels.formats.svdq import GROUP_SIZES, Precision
from nunchaku_kernels.nn import LinearSlice, QuantizedLinear
from nunchaku_models.checkpoints import CheckpointError, SafetensorsReader, TensorInfo, is_finite
from nunchaku_models.families import FAMILIES, Family
from nunchaku_models.layers import check_names, swap_layers
from nunchaku_models.published import QUANT_METHOD, quantization_entries


class _Method(StrEnum):
    # diffusers asks for `.value`
    SVDQUANT = QUANT_METHOD


class SVDQuantConfig(QuantizationConfigMixin):
    """`quantization_config` of a quantised folder. Which layers are 4-bit, and their ranks, the tensors say themselves.

    Args:
        precision: "int4" or "nvfp4".
        rank: rank of the low-rank branch; informational.
        group_size: channels per weight scale; informational, each precision has one.
    """

    def __init__(self, precision: str = "int4", rank: int = 32, group_size: int | None = None, **_: Any) -> None:
        if precision not in GROUP_SIZES:
            raise ValueError(f"quantization_config: `precision` must be 'int4' or 'nvfp4', got {precision!r}")
        if group_size not in (None, GROUP_SIZES[precision]):
            raise ValueError(
                f"quantization_config: {precision} has groups of {GROUP_SIZES[precision]}, got {group_size}"
            )
        self.quant_method = _Method.SVDQUANT
        self.precision: Precision = "nvfp4" if precision == "nvfp4" else "int4"
        self.rank = rank

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return quantization_entries(self.precision, self.rank)

    def to_diff_dict(self) -> dict[str, Any]:
        """What diffusers prints."""
        return self.to_dict()


class SVDQuantQuantizer(DiffusersQuantizer):
    """Swaps layers before diffusers loads the tensors, and keeps placeholders out of what it saves."""

    def __init__(self, quantization_config: SVDQuantConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._stored: dict[str, TensorInfo] = {}
        self._where = ""
        self._dtype = torch.bfloat16

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to require: 4-bit layers run wherever torch does."""

    def update_torch_dtype(self, torch_dtype: torch.dtype | None) -> torch.dtype:
        """Dtype of the 16-bit tensors: bfloat16 unless the caller says otherwise."""
        self._dtype = torch_dtype or torch.bfloat16
        return self._dtype

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[str]) -> list[str]:
        """Read the headers: they say which layers are 4-bit, with which rank and which optional tensors."""
        self._stored = {}
        self._where = str(checkpoint_files[0]) if len(checkpoint_files) == 1 else str(Path(checkpoint_files[0]).parent)
        for file in checkpoint_files:
            with SafetensorsReader(Path(file)) as reader:
                self._stored.update({name: reader.info(name) for name in reader})
        return loaded_keys

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> nn.Module:
        try:
            swapped = swap_layers(model, family_of(model), model.config, self._stored, dtype=self._dtype)
        except ValueError as error:
            raise CheckpointError(f"{self._where}: {error}") from error
        if not swapped:
            raise CheckpointError(f"{self._where} holds no 4-bit layers, though its config says so; get it again")
        check_names(model, self._stored, self._where)
        return model

    def _process_model_after_weight_loading(self, model: nn.Module, **_: Any) -> nn.Module:
        for name, value in model.named_parameters():
            if not value.is_meta and not is_finite(value):
                raise CheckpointError(f"{self._where}: {name} holds NaN or infinity; the file is damaged, get it again")
        family = family_of(model)
        if family.prepare is not None:
            family.prepare(model)
        return model

    def update_missing_keys(self, model: nn.Module, missing_keys: list[str], prefix: str) -> list[str]:
        """The `weight` placeholders of 4-bit layers are in no file."""
        return [key for key in missing_keys if key not in placeholder_keys(model)]

    def get_state_dict_and_metadata(
        self, state_dict: dict[str, Any], safe_serialization: bool = False
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """The state dict without `weight` placeholders (recognised by having no strides)."""
        kept = {
            k: v for k, v in state_dict.items() if not (k.endswith(".weight") and v.dim() == 2 and not any(v.stride()))
        }
        return kept, {}

    @property
    def is_serializable(self) -> bool:
        """`save_pretrained` works."""
        return True

    @property
    def is_trainable(self) -> bool:
        """The 4-bit weights themselves cannot be trained."""
        return False


def family_of(model: nn.Module) -> Family:
    """The page of the model's class, or of the diffusers class it derives from.

    Raises:
        ValueError: no page knows the class.
    """
    names = {cls.__name__ for cls in type(model).__mro__}
    for family in FAMILIES.values():
        if family.transformer_class in names:
            return family
    known = ", ".join(family.transformer_class for family in FAMILIES.values())
    raise ValueError(f"{type(model).__name__}: no model family for this class; known: {known}")


def placeholder_keys(model: nn.Module) -> set[str]:
    """State-dict keys that stand for no stored tensor: `weight` of every 4-bit layer and slice."""
    return {
        f"{path}.weight" for path, module in model.named_modules() if isinstance(module, QuantizedLinear | LinearSlice)
    }


def mark_quantized(model: Any, config: SVDQuantConfig) -> None:
    """Make diffusers treat a model that was loaded another way as one loaded from a quantised folder."""
    model.hf_quantizer = SVDQuantQuantizer(config)
    model.is_quantized = True
    model.quantization_method = config.quant_method
    model.register_to_config(quantization_config=config)


# diffusers has no function for that
auto.AUTO_QUANTIZER_MAPPING[QUANT_METHOD] = SVDQuantQuantizer
auto.AUTO_QUANTIZATION_CONFIG_MAPPING[QUANT_METHOD] = SVDQuantConfig
