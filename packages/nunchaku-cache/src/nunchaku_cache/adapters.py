"""Which adapters act on a transformer: residuals of one set must not stand in for those of another."""

from collections.abc import Hashable
from typing import Any

import torch
from torch import nn


class AdapterWatch:
    """Says in one comparable value which adapters act and how strongly, without importing PEFT."""

    def __init__(self, transformer: nn.Module) -> None:
        self._transformer = transformer
        self._known: Hashable = None
        self._layers: list[Any] = []

    def fingerprint(self) -> Hashable:
        """Equal for two steps as long as no adapter was added, removed, switched, merged or set to another strength."""
        injected = tuple(getattr(self._transformer, "peft_config", None) or ())
        loaded = bool(getattr(self._transformer, "_hf_peft_config_loaded", False))
        if self._known != (injected, loaded):
            modules = list(self._transformer.modules())
            self._layers = [m for m in modules if hasattr(m, "_active_adapter") and hasattr(m, "scaling")]
            self._known = (injected, loaded)
        return (
            injected,
            tuple(
                (
                    str(layer._active_adapter),
                    layer._disable_adapters,
                    len(layer.merged_adapters),
                    tuple(map(_strength, layer.scaling.values())),
                )
                for layer in self._layers
            ),
        )


def _strength(value: Any) -> Hashable:
    # a strength that compiled code reads from memory: reading it here would wait for the device
    return (id(value), value._version) if isinstance(value, torch.Tensor) else value
