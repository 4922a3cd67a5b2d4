"""Calibration of a block of a model: its linears one after the other, each fitted to the inputs it will really get.

A linear is fitted to what comes out of the quantised ones in front of it, and aims at what the original block would
have computed there; so it also makes up for part of their error.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from nunchaku_kernels.quantize.metric import PairedMoments

Run = Callable[[int], torch.Tensor]
"""Runs a block on batch i and returns the hidden states that it makes of it, [..., channels]."""


class BlockInputs:
    """The batches that calibrate a block.

    Args:
        block: any module, on the device of the batches. Its linears are all `nn.Linear`s under it that are called.
        original, quantized: run it on hidden states of the original model, and on those that come out of the quantised
            blocks in front; where the two are the same, nothing is made up for.
        masks: for each batch, which tokens count: bool with the shape of a linear's input without its channels; None
            for all.
    """

    def __init__(self, block: nn.Module, original: Run, quantized: Run, masks: Sequence[torch.Tensor | None]) -> None:
        if not masks:
            raise ValueError("masks: expected at least one batch, got none")
        self.block, self.original, self.quantized, self.masks = block, original, quantized, masks

    def groups(self) -> list[list[str]]:
        """Names of the block's linears, in the order of their calls; those that are given the same tensor together."""
        groups: list[list[str]] = []
        seen: list[torch.Tensor] = []

        def record(name: str, x: torch.Tensor) -> None:
            if any(name in group for group in groups):
                return
            if not seen or seen[-1] is not x:
                seen.append(x)
                groups.append([])
            groups[-1].append(name)

        with _watching(dict(_linears(self.block)), record), torch.no_grad():
            self.original(0)
        return groups

    def moments(self, names: Sequence[str], originals: Mapping[str, Sequence[torch.Tensor]]) -> PairedMoments:
        """Of the input that some linears share, as it is now, paired with what it was.

        Args:
            names: one of `groups`.
            originals: see `record`.
        """
        first = self.block.get_submodule(names[0])
        assert isinstance(first, nn.Linear)
        moments = PairedMoments(first.in_features, first.weight.device)
        for index, original in enumerate(originals[names[0]]):
            moments.update(self._tokens(self.quantized, names[:1], index)[names[0]], original)
        return moments

    def record(self, names: Sequence[str]) -> dict[str, list[torch.Tensor]]:
        """The tokens [M, K] that reach each of some linears in the original block, batch by batch."""
        batches = [self._tokens(self.original, names, index) for index in range(len(self.masks))]
        return {name: [batch[name] for batch in batches] for name in names}

    def outputs(self, run: Run) -> list[torch.Tensor]:
        """What the block makes of each batch."""
        with torch.no_grad():
            return [run(index) for index in range(len(self.masks))]

    def _tokens(self, run: Run, names: Sequence[str], index: int) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = {}
        mask = self.masks[index]

        def keep(name: str, x: torch.Tensor) -> None:
            found[name] = x.detach().flatten(0, -2) if mask is None else x.detach()[mask]

        with _watching({name: self.block.get_submodule(name) for name in names}, keep), torch.no_grad():
            run(index)
        return found


def replace_weights(block: nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    """Put other values into the weights of some linears, in their dtype."""
    for name, value in weights.items():
        linear = block.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        with torch.no_grad():
            linear.weight.copy_(value)


def _linears(block: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    for name, module in block.named_modules():
        if type(module) is nn.Linear:
            yield name, module


@contextmanager
def _watching(modules: Mapping[str, nn.Module], see: Callable[[str, torch.Tensor], None]) -> Iterator[None]:
    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda module, arguments: see(name, arguments[0])

    handles = [module.register_forward_pre_hook(hook(name)) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
