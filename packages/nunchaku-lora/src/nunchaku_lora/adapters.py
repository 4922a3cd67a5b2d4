"""Calls on a model that has adapters, beyond those of PEFT and diffusers."""

import logging
import math
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import nn

from nunchaku_kernels.nn import QuantizedLinear
from nunchaku_lora.peft_layer import QuantizedLoraLinear

logger = logging.getLogger(__name__)


def set_strength(target: Any, strengths: Mapping[str, float]) -> None:
    """Change how strongly loaded adapters act; which of them are active stays as it is.

    Made for sliders: nothing is combined or packed again, the kernels get other factors per rank. A strength that is a
    tensor already (after `enable_lora_hotswap`) is written in place, so that compiled models do not recompile.

    The strength of an adapter that is fused, switched off or not active is kept for when it acts again; until then it
    is not heard of, and the log says so.

    Args:
        target: a diffusers pipeline or model.
        strengths: adapter -> factor, of the strength that its file was made for.

    Raises:
        ValueError: a strength that is not finite, or no adapter of that name is loaded; nothing has changed then.
    """
    models = _models_of(target)
    configurations = [getattr(model, "peft_config", None) or {} for model in models]
    for name, strength in strengths.items():
        if not any(name in names for names in configurations):
            known = sorted({known for names in configurations for known in names})
            raise ValueError(f"there is no adapter {name!r}; loaded: {', '.join(known) or 'none'}")
        if not math.isfinite(strength):
            raise ValueError(f"the strength of {name!r} must be a finite number, got {strength}")
    silent = dict.fromkeys(strengths, "not active")
    for model in models:
        for layer in _lora_layers(model):
            scaling = layer.scaling
            for name, strength in strengths.items():
                if name not in scaling:
                    continue
                root = math.sqrt(layer.r[name]) if layer.use_rslora.get(name) else layer.r[name]
                value = strength * layer.lora_alpha[name] / root
                if isinstance(scaling[name], torch.Tensor):
                    scaling[name].fill_(value)
                else:
                    scaling[name] = value
                if name in silent:
                    if name in layer.merged_adapters:
                        silent[name] = "fused"
                    elif layer.disable_adapters:
                        silent[name] = "switched off"
                    elif name in layer.active_adapters:
                        del silent[name]
    for name, state in silent.items():
        logger.warning("adapter %r is %s: its strength is kept, and acts when the adapter does", name, state)


def keep_joined(target: Any, megabytes: float) -> None:
    """Set how much memory may be spent on adapters that were active before and may be again.

    A 4-bit layer joins the factors of its active adapters to its own; where there is room, what it joined for other
    sets of adapters stays, the sets used last first, and switching back to one of those joins nothing.

    Args:
        target: a diffusers pipeline or model.
        megabytes: for all 4-bit layers, in 10^6 bytes on the layers' device, shared out in proportion to their weights;
            default: a quarter of the 4-bit weights. 0 keeps nothing but what acts.

    Raises:
        ValueError: a negative number, or not a finite one.
    """
    if not math.isfinite(megabytes) or megabytes < 0:
        raise ValueError(f"`megabytes` must be a finite number and not negative, got {megabytes}")
    modules = (module for model in _models_of(target) for module in model.modules())
    sizes = {
        module: module.in_features * module.out_features for module in modules if isinstance(module, QuantizedLinear)
    }
    for layer, size in sizes.items():
        layer.keep_joined(int(megabytes * 1e6 * size / sum(sizes.values())))


def reset(target: Any) -> None:
    """Take every adapter off the 4-bit layers that no LoRA layer in their model stands for: those that were fused.

    Stored tensors never changed, so the layers are then as they were loaded. 16-bit layers, into whose weights adapters
    were fused, are not restored: unfuse before unloading for those.

    Args:
        target: a diffusers pipeline or model.
    """
    modules = [module for model in _models_of(target) for module in model.modules()]
    wrappers = [module for module in modules if isinstance(module, QuantizedLoraLinear)]
    for module in modules:
        if isinstance(module, QuantizedLinear):
            module.detach_all()
    for wrapper in wrappers:
        wrapper.forget_fused()
        wrapper.owner.attach(wrapper, keep=False)


def _models_of(target: Any) -> list[Any]:
    """The models of a pipeline that can have adapters, or the model itself."""
    parts = [getattr(target, name, None) for name in ("transformer", "unet", "text_encoder")]
    return [part for part in parts if isinstance(part, nn.Module)] or [target]


def _lora_layers(model: nn.Module) -> list[Any]:
    kept = vars(model).setdefault("_nunchaku_lora_layers", _LoraLayers())
    found: list[Any] = kept.of(model)
    return found


class _LoraLayers:
    """The LoRA layers of a model: walking through all its modules takes longer than a slider may.

    Looked up again whenever the model has other adapters than before. Held weakly: a layer that leaves the model must
    stop acting.
    """

    def __init__(self) -> None:
        self._configurations: dict[str, Any] = {}
        self._layers: list[weakref.ref[Any]] = []

    def of(self, model: nn.Module) -> list[Any]:
        now = getattr(model, "peft_config", None) or {}
        known = self._configurations
        if known.keys() != now.keys() or any(known[name] is not configuration for name, configuration in now.items()):
            self._layers = [weakref.ref(module) for module in model.modules() if isinstance(module, LoraLayer)]
            self._configurations = dict(now)
        return [layer for reference in self._layers if (layer := reference()) is not None]

    def __deepcopy__(self, memo: dict[int, Any]) -> "_LoraLayers":
        return _LoraLayers()

    def __reduce__(self) -> tuple[type["_LoraLayers"], tuple[()]]:
        return _LoraLayers, ()
