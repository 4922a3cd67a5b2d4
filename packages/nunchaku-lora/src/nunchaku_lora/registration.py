"""Telling PEFT and diffusers about 4-bit layers, and taking it back.

PEFT asks a chain of module-level functions for the layer that fits a linear; one of them is put in front of the last.
(`LoraConfig._register_custom_module` would need no change of PEFT, but only for a config that the caller makes, and
diffusers makes its own.) PEFT's swap of loaded weights gets a step after it, diffusers' removal of all LoRA layers a
step before it, and FLUX pipelines with 4-bit layers load files through `nunchaku_lora.loading`: it knows more formats.
"""

import functools
from collections.abc import Callable
from typing import Any

import peft.tuners.lora.model as peft_model
import peft.utils.hotswap as peft_hotswap
from diffusers.loaders.lora_pipeline import FluxLoraLoaderMixin
from diffusers.loaders.peft import PeftAdapterMixin
from torch import nn

from nunchaku_kernels.nn import QuantizedLinear
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
    _replace(peft_hotswap, "hotswap_adapter_from_state_dict", _hotswap)
    _replace(PeftAdapterMixin, "unload_lora", _unload_lora)
    _replace(FluxLoraLoaderMixin, "load_lora_weights", _load_lora_weights)


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


def _hotswap(swap: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(swap)
    def hotswap_adapter_from_state_dict(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        try:
            return swap(model, *args, **kwargs)
        finally:
            # it writes through `.data`, which nobody can notice
            for module in model.modules():
                if isinstance(module, QuantizedLoraLinear):
                    module.owner.forget()

    return hotswap_adapter_from_state_dict


def _load_lora_weights(load: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(load)
    def load_lora_weights(
        self: Any,
        pretrained_model_name_or_path_or_dict: Any,
        adapter_name: str | None = None,
        hotswap: bool = False,
        **kwargs: Any,
    ) -> Any:
        transformer = getattr(self, "transformer", None)
        if transformer is None or not any(isinstance(module, QuantizedLinear) for module in transformer.modules()):
            return load(self, pretrained_model_name_or_path_or_dict, adapter_name, hotswap, **kwargs)
        from nunchaku_lora.loading import load_lora_weights as load_any  # it imports this module

        for name in ("low_cpu_mem_usage", "use_safetensors"):
            kwargs.pop(name, None)
        source = pretrained_model_name_or_path_or_dict
        return load_any(self, source, adapter_name=adapter_name, hotswap=hotswap, **kwargs)

    return load_lora_weights
