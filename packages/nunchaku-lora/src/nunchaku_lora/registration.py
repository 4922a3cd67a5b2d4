"""Telling PEFT and diffusers about 4-bit layers, and taking it back.

PEFT asks a chain of module-level functions for the layer that fits a linear; one of them is put in front of the last.
(`LoraConfig._register_custom_module` would need no change of PEFT, but only for a config that the caller makes, and
diffusers makes its own.) On diffusers' side, removing all LoRA layers gets a step before it.
"""

import functools
from collections.abc import Callable
from typing import Any

import peft.tuners.lora.model as peft_model
from diffusers.loaders.peft import PeftAdapterMixin
from torch import nn

from nunchaku_lora.peft_layer import QuantizedLoraLinear, dispatch_quantized

_REPLACED: list[tuple[Any, str, Any]] = []
"""What `enable` replaced: the object, the attribute, the value before. Empty while disabled."""


def enable() -> None:
    """Let PEFT and diffusers put LoRA on 4-bit layers, in this process; a second call does nothing.

    Models without 4-bit layers are treated as before.
    """
    if _REPLACED:
        return
    _replace(peft_model, "dispatch_default", _dispatch)
    _replace(PeftAdapterMixin, "unload_lora", _unload_lora)


def disable() -> None:
    """Undo `enable`. Adapters that are loaded keep working, new ones are refused by PEFT."""
    while _REPLACED:
        target, name, before = _REPLACED.pop()
        setattr(target, name, before)


def is_enabled() -> bool:
    """Whether `enable` is in force."""
    return bool(_REPLACED)


def _replace(target: Any, name: str, make: Callable[[Any], Any]) -> None:
    before = vars(target)[name]
    _REPLACED.append((target, name, before))
    setattr(target, name, make(before))


def _dispatch(default: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(default)
    def dispatch(target: nn.Module, adapter_name: str, config: Any, **kwargs: Any) -> Any:
        found = dispatch_quantized(target, adapter_name, config, **kwargs)
        return default(target, adapter_name, config=config, **kwargs) if found is None else found

    return dispatch


def _unload_lora(unload: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(unload)
    def unload_lora(self: nn.Module) -> Any:
        # diffusers puts the linears back without a word to the layers that it removes
        for module in self.modules():
            if isinstance(module, QuantizedLoraLinear):
                module.release()
        return unload(self)

    return unload_lora
