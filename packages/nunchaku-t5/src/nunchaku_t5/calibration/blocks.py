"""An encoder in 16 bits, run block by block on calibration batches."""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from nunchaku_kernels.formats import W4A16Weights
from nunchaku_kernels.quantize import BlockInputs
from nunchaku_t5.calibration.texts import Batch

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments behind the hidden states."""


@dataclass
class FittedBlock:
    """What a method makes of a block: names are relative to the model.

    Attributes:
        weights: path of a linear -> its quantised weight.
        changed: name of another tensor -> its new value.
    """

    weights: dict[str, W4A16Weights] = field(default_factory=dict)
    changed: dict[str, torch.Tensor] = field(default_factory=dict)


@dataclass
class Block:
    """A block with what calibration gives it.

    Attributes:
        path: of the block in the model.
        module: a copy of the block; a method may put quantised weights into it, later blocks then see what it gives.
        before: inputs of the original block.
        now: inputs of `module` behind the quantised blocks.
        groups: names in the block of linears that share an input, in the order of their calls.
        originals: first name of each group -> its tokens in the original block, batch by batch.
    """

    path: str
    module: nn.Module
    before: BlockInputs
    now: BlockInputs
    groups: list[list[str]]
    originals: dict[str, list[torch.Tensor]]

    def weight(self, name: str) -> torch.Tensor:
        """Of a linear of the original block, (N, K)."""
        linear = self.before.block.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        return linear.weight.detach()


class EncoderBlocks:
    """Iterates over the blocks of a T5 or UMT5 encoder.

    Args:
        model: with 16-bit or float32 weights; it stays as it is.
        batches: at least one.
        names: paths of the linears to quantise; the others keep their weights.
    """

    def __init__(self, model: Any, batches: Sequence[Batch], names: Sequence[str]) -> None:
        self.model, self.batches, self._names = model.requires_grad_(False), batches, set(names)

    @torch.no_grad()
    def __iter__(self) -> Iterator[Block]:
        hidden, calls = self._entry()
        quantized = list(hidden)
        masks = [batch.counted for batch in self.batches]
        for index, original in enumerate(self.model.encoder.block):
            path, module = f"encoder.block.{index}", copy.deepcopy(original)
            here = [each[index] for each in calls]
            before = BlockInputs(original, _Runs(original, hidden, here), masks)
            now = BlockInputs(module, _Runs(module, quantized, here), masks)
            groups = [[name for name in group if f"{path}.{name}" in self._names] for group in before.groups()]
            groups = [group for group in groups if group]
            originals = before.tokens([group[0] for group in groups])
            yield Block(path, module, before, now, groups, originals)
            hidden, quantized = before.outputs(), now.outputs()

    def _entry(self) -> tuple[list[torch.Tensor], list[list[Call]]]:
        """For each batch what enters the first block, and with which further arguments each block is called."""
        hidden: list[torch.Tensor] = []
        calls: list[list[Call]] = []

        def see(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            states, named = arguments[0] if arguments else named["hidden_states"], dict(named)
            named.pop("hidden_states", None)
            if not calls[-1]:
                hidden.append(states)
            calls[-1].append((arguments[1:], named))

        handles = [block.register_forward_pre_hook(see, with_kwargs=True) for block in self.model.encoder.block]
        try:
            for batch in self.batches:
                calls.append([])
                self.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
        finally:
            for handle in handles:
                handle.remove()
        return hidden, calls


class _Runs:
    """Runs a block on batch i: hidden states in, hidden states out."""

    def __init__(self, module: nn.Module, states: Sequence[torch.Tensor], calls: Sequence[Call]) -> None:
        self.module, self.states, self.calls = module, states, calls

    def __call__(self, i: int) -> torch.Tensor:
        arguments, named = self.calls[i]
        result = self.module(self.states[i], *arguments, **named)
        states: torch.Tensor = result[0] if isinstance(result, tuple) else result
        return states
