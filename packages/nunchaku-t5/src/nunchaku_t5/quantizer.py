"""The method `nunchaku_w4a16` of transformers: stock `from_pretrained` loads, `save_pretrained` writes.

Importing this module registers it; importing `nunchaku_t5` makes that happen as soon as transformers can quantise.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

from nunchaku_t5._compat import (
    BEFORE_5,
    DISK_HOLDS_INTEGERS,
    check_arriving,
    narrow_dtype_plan,
    note_dtype,
    restore_integers,
    tied_weights,
)
from nunchaku_t5.config import QUANT_METHOD, W4A16Config
from nunchaku_t5.errors import CheckpointError, shown
from nunchaku_t5.files import TensorFiles, TensorInfo
from nunchaku_t5.layers import EncoderLinear, Int8Embedding, places, swap_layers, untie_scales


class W4A16Quantizer(HfQuantizer):
    """Swaps modules before transformers loads the tensors."""

    _checks: Sequence[RemovableHandle] = ()

    def validate_environment(self, *_: Any, device_map: Any = None, **__: Any) -> None:
        """Called with the devices asked for, and again where transformers chose them.

        Raises:
            NotImplementedError: parts are to stay on the disk, and this transformers would read integers as floats.
        """
        if isinstance(device_map, Mapping) and "disk" in device_map.values() and not DISK_HOLDS_INTEGERS:
            raise NotImplementedError(
                "`device_map`: quantised encoders stay on the disk with transformers 5.13 or later"
            )

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Sequence[str] | None = None, **_: Any
    ) -> None:
        where = str(Path(checkpoint_files[0]).parent) if checkpoint_files else _where(model)
        layers = self.quantization_config.layers
        if not layers:
            raise CheckpointError(
                f"{where}: `quantization_config` must name the quantised layers, got none; a model that is not "
                "quantised yet is by `quantize_encoder`"
            )
        try:
            swap_layers(model, layers)
        except ValueError as error:
            raise CheckpointError(f"{where}: {error}") from error
        if checkpoint_files:
            stored = TensorFiles([Path(file) for file in checkpoint_files])
            if same_names(layers, stored):
                check_tensors(model, {name: stored.info(name) for name in stored}, where)
        if BEFORE_5:
            self._checks = check_arriving(model, where)
        narrow_dtype_plan(model)

    def update_missing_keys(self, model: Any, missing_keys: list[str], prefix: str) -> list[str]:
        """transformers 4 asks here before it makes up what its files lack.

        Raises:
            CheckpointError: they lack something.
        """
        if missing_keys:
            raise CheckpointError(
                f"{_where(model)} lacks the tensor {shown(missing_keys[0])}; it is not whole, get it again"
            )
        # Of a module with a buffer that no file has (CLIP's position ids) it makes up all before it loads it, which it
        # cannot for integers
        for module, homes in places(model).items():
            if isinstance(module, Int8Embedding):
                for home, _ in homes:
                    home._is_hf_initialized = True  # type: ignore[assignment]
        return missing_keys

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        for check in self._checks:
            check.remove()
        self._checks = ()
        marks = not BEFORE_5  # transformers 5 marks what it loaded, and makes up what is missing
        for name in self.quantization_config.layers:
            module = model.get_submodule(name)
            for key, value in module.named_parameters():
                value.requires_grad_(False)
                if value.is_meta:  # stays on disk
                    continue
                if marks and not getattr(value, "_is_hf_initialized", False):
                    raise CheckpointError(f"{name}: its `{key}` is in none of the files; get them again")
                if value.is_floating_point() and not value.isfinite().all():
                    raise CheckpointError(
                        f"{name}: `{key}` holds NaN or infinity in {value.dtype}: the file is damaged, or needs "
                        "another dtype"
                    )
            restore_integers(module, module.integers)
        return model

    def _dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        # Where no dtype is asked for transformers gives the config's: of the time of loading, and a name after saving.
        asked, usual = _dtype(dtype), _dtype(getattr(model.config, "dtype", None))
        if asked == usual:
            asked = None
        for module, homes in places(model).items():
            if isinstance(module, EncoderLinear | Int8Embedding):
                original = dequantized(module, asked or module.wscales.dtype)
                for home, child in homes:
                    setattr(home, child, original)
        untie_scales(model)
        model.tie_weights()
        return model if asked is None else model.to(asked)

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """`save_pretrained` works."""
        return True

    @property
    def is_trainable(self) -> bool:
        """The 4-bit weights themselves cannot be trained."""
        return False


def check_tensors(model: nn.Module, stored: Mapping[str, TensorInfo], where: str) -> None:
    """Compare what a model, on the meta device, will hold with what its files hold: before anything is allocated.

    Args:
        model: with its layers swapped.
        stored: tensor name -> shape and dtype.
        where: for the message.

    Raises:
        CheckpointError: a tensor is missing, or has another shape or another dtype; any floating-point dtype may stand
            for another. Tensors nobody asks for are transformers' to report.
    """
    base = f"{model.base_model_prefix}." if getattr(model, "base_model_prefix", "") else ""
    values = model.state_dict(keep_vars=True)
    tied = tied_weights(model)
    present: set[str] = set()
    absent: list[tuple[str, str]] = []
    for name, value in values.items():
        shared = tied.get(name, name)  # the same for all names of a tensor, of which files need one
        found = next((n for n in (name, name.removeprefix(base), base + name) if n in stored), None)
        if found is None:
            absent.append((name, shared))
            continue
        present.add(shared)
        shape, dtype = stored[found]
        if shape != tuple(value.shape):
            raise CheckpointError(f"{where}: {shown(found)} must have shape {list(value.shape)}, found {list(shape)}")
        if dtype != value.dtype and not (dtype.is_floating_point and value.is_floating_point()):
            raise CheckpointError(f"{where}: {shown(found)} must have dtype {value.dtype}, found {dtype}")
    missing = [name for name, shared in absent if shared not in present]
    if missing:
        raise CheckpointError(f"{where} lacks the tensor {shown(missing[0])}; it is not whole, get it again")


def _where(model: Any) -> str:
    """For messages, where the files are not known: what `from_pretrained` was called with."""
    return str(model.name_or_path or type(model).__name__)


def same_names(layers: Iterable[str], stored: Iterable[str]) -> bool:
    """Whether files call a model's quantised layers as the model does: transformers renames some models' tensors while
    it loads them, by rules of its own."""
    names = set(stored)
    return any(f"{layer}.qweight" in names for layer in layers)


def _dtype(name: torch.dtype | str | None) -> torch.dtype | None:
    return getattr(torch, name) if isinstance(name, str) else name


def dequantized(module: EncoderLinear | Int8Embedding, dtype: torch.dtype) -> nn.Module:
    """An ordinary module with the weights that a quantised one stands for."""
    weight = module.dequantize().to(dtype)
    if isinstance(module, Int8Embedding):
        return nn.Embedding.from_pretrained(weight)
    linear = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if module.bias is not None:
        linear.bias = nn.Parameter(module.bias.to(dtype), requires_grad=False)
    return linear


def mark_quantized(model: Any, config: W4A16Config) -> None:
    """Make transformers treat a model as one that was loaded from a quantised folder."""
    model.hf_quantizer = W4A16Quantizer(config)
    model.is_quantized = True
    model.quantization_method = config.quant_method
    model.config.quantization_config = config
    note_dtype(model)


def register() -> None:
    """Make the method known to transformers. Idempotent."""
    if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(QUANT_METHOD)(W4A16Config)
        register_quantizer(QUANT_METHOD)(W4A16Quantizer)


# Here and not in the package: this module may be what imports `transformers.quantizers`, and is not yet whole then.
register()
