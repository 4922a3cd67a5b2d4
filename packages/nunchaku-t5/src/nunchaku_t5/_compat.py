"""Where versions of transformers differ: 4.57 from 5, and early versions of 5 from later ones."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import transformers
from torch import nn
from torch.utils.hooks import RemovableHandle

from nunchaku_t5.errors import CheckpointError

VERSION = tuple(int(number) for number in transformers.__version__.split(".")[:2])
BEFORE_5 = VERSION < (5, 0)
DISK_HOLDS_INTEGERS = VERSION >= (5, 13)
"""Whether tensors that stay on the disk are read in their own dtypes; before, integers in that of the model."""


def tied_weights(model: Any) -> Mapping[str, str]:
    """Name of a tensor -> that of the tensor it is tied to; others are left out.

    transformers 5 has a table, which it acts upon after it has loaded the tensors; 4 shares them from the start.
    """
    if not BEFORE_5:
        table: Mapping[str, str] = model.all_tied_weights_keys
        return table
    first: dict[int, str] = {}
    values = model.named_parameters(remove_duplicate=False)
    sources = {name: first.setdefault(id(value), name) for name, value in values}
    return {name: source for name, source in sources.items() if name != source}


def add_ties(model: Any, added: Mapping[str, str]) -> None:
    """Tie further tensors: for 4, which finds that they are shared, a list of the names to leave out of files."""
    if BEFORE_5:
        model._tied_weights_keys = [*(model._tied_weights_keys or ()), *added]
        return
    model._tied_weights_keys = {**model._tied_weights_keys, **added}
    model.all_tied_weights_keys = {**model.all_tied_weights_keys, **added}


def drop_ties(model: Any, suffix: str) -> None:
    """Forget about tied tensors whose names end so."""
    if BEFORE_5:
        model._tied_weights_keys = [name for name in model._tied_weights_keys or () if not name.endswith(suffix)]
        return
    for attribute in ("_tied_weights_keys", "all_tied_weights_keys"):
        tied = getattr(model, attribute) or {}
        setattr(model, attribute, {name: source for name, source in tied.items() if not name.endswith(suffix)})


def note_dtype(model: Any) -> None:
    """What 4 notes in the config of a quantised model, and `dequantize` takes away again."""
    if BEFORE_5:
        model.config._pre_quantization_dtype = model.dtype


def narrow_dtype_plan(model: Any) -> None:
    """5.0 loads what `_keep_in_fp32_modules` names as float32 whatever the model's dtype; the others, where that is
    float16: make 5.0 do so."""
    if hasattr(model, "dtype_plan") and model.dtype != torch.float16:
        model.dtype_plan = dict.fromkeys(model._keep_in_fp32_modules_strict or (), torch.float32)


def restore_integers(module: nn.Module, integers: Mapping[str, torch.dtype]) -> None:
    """Undo what 5 before 5.21 does to integers in modules that it keeps in float32: it casts them, which is exact."""
    for name, dtype in integers.items():
        value = module.get_parameter(name)
        if value.dtype != dtype and not value.is_meta:
            setattr(module, name, nn.Parameter(value.to(dtype), requires_grad=False))


def check_arriving(model: nn.Module, where: str) -> list[RemovableHandle]:
    """Compare tensors with the model's own, on the meta device, when they are loaded: 4 does not say from which files.

    Args:
        model: it takes each tensor by `load_state_dict` of a module.
        where: for the message.

    Returns:
        What to `remove` when the model is loaded. Until then CheckpointError is raised for a tensor of another shape.
    """
    return [
        module.register_load_state_dict_pre_hook(partial(_check_shapes_of, f"{where}: {path}"))
        for path, module in model.named_modules()
    ]


def _check_shapes_of(label: str, module: nn.Module, tensors: Mapping[str, torch.Tensor], prefix: str, *_: Any) -> None:
    for name, value in module.named_parameters(recurse=False):
        given = tensors.get(prefix + name)
        if given is not None and given.shape != value.shape:
            raise CheckpointError(f"{label}.{name} must have shape {list(value.shape)}, found {list(given.shape)}")
