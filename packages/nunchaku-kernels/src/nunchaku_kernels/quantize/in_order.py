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


class BlockInputs:
    """Batches of hidden states that run through a block.

    Two of these calibrate it. One runs the original block on hidden states of the original model: its `tokens` are what
    linears should have got. The other runs a copy, into which quantised weights are put group by group, on what the
    quantised blocks before gave: its `moments`, paired with those tokens, make the metric for `fit_w4a16`.

    Args:
        block: any module. Its linears are all `nn.Linear`s under it that are called.
        run: runs the block, as it is at that time, on batch i and returns the hidden states that it makes of it.
        masks: for each batch, which tokens count: bool with the shape of a linear's input without its channels; None
            for all.
    """

    def __init__(
        self, block: nn.Module, run: Callable[[int], torch.Tensor], masks: Sequence[torch.Tensor | None]
    ) -> None:
        if not masks:
            raise ValueError("masks: expected at least one batch, got none")
        self.block, self.run, self.masks = block, run, masks

    def groups(self) -> list[list[str]]:
        """Names of the block's linears, in the order of their calls; those that are given the same tensor together."""
        groups: list[list[str]] = []
        inputs: list[torch.Tensor] = []

        def record(name: str, x: torch.Tensor) -> None:
            if any(name in group for group in groups):
                return
            if not inputs or inputs[-1] is not x:
                inputs.append(x)
                groups.append([])
            groups[-1].append(name)

        linears = {name: module for name, module in self.block.named_modules() if type(module) is nn.Linear}
        with _watching(linears, record), torch.no_grad():
            self.run(0)
        return groups

    def tokens(self, names: Sequence[str]) -> dict[str, list[torch.Tensor]]:
        """What reaches some linears: name -> [M, K] for each batch."""
        found: dict[str, list[torch.Tensor]] = {name: [] for name in names}
        modules = {name: self.block.get_submodule(name) for name in names}
        for index, mask in enumerate(self.masks):

            def keep(name: str, x: torch.Tensor, mask: torch.Tensor | None = mask) -> None:
                found[name].append(x.detach().flatten(0, -2) if mask is None else x.detach()[mask])

            with _watching(modules, keep), torch.no_grad():
                self.run(index)
        return found

    def moments(self, name: str, originals: Sequence[torch.Tensor] | None = None) -> PairedMoments:
        """Of the input of a linear, as it is now.

        Args:
            name: the linear; of those that share an input, any.
            originals: its `tokens` in the original model, to be paired with those of now; None for none.
        """
        batches = self.tokens([name])[name]
        moments = PairedMoments(batches[0].shape[1], batches[0].device)
        for index, x in enumerate(batches):
            moments.update(x, None if originals is None else originals[index])
        return moments

    def outputs(self) -> list[torch.Tensor]:
        """What the block makes of each batch."""
        with torch.no_grad():
            return [self.run(index) for index in range(len(self.masks))]


def replace_weights(block: nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    """Put other values into the weights of some linears, in their dtype."""
    for name, value in weights.items():
        linear = block.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        with torch.no_grad():
            linear.weight.copy_(value)


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
