"""A block seen from outside: its streams in, its streams out, and the arguments of some samples only."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from nunchaku_cache.families import BlockList

Streams = list[torch.Tensor | None]


class NotSplittableError(Exception):
    """An argument that holds more than tensors cannot be had for some samples only."""


class BlockSignature:
    """Reads and rebuilds the arguments and results of the blocks of one list."""

    def __init__(self, block: nn.Module, blocks: BlockList) -> None:
        """
        Raises:
            ValueError: the block's forward has no argument of a declared name.
        """
        module = getattr(block, "_orig_mod", block)
        # of the class: an instance's forward may be wrapped by an offloader
        names = list(inspect.signature(type(module).forward).parameters)[1:]
        declared = (*blocks.streams, *blocks.shared, *blocks.stacked, *([blocks.valid] if blocks.valid else []))
        for name in declared:
            if name not in names:
                raise ValueError(
                    f"BlockList {blocks.name!r}: {type(module).__name__}.forward has no argument {name!r}, only "
                    f"{', '.join(names)}"
                )
        self._names = names
        self._places = {name: names.index(name) for name in declared}
        self._blocks = blocks
        self._streams = [(name, self._places[name]) for name in blocks.streams]
        self._returned = [blocks.order.index(name) for name in blocks.streams]
        self._taken = [blocks.streams.index(name) for name in blocks.order]

    def argument(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """A declared argument, None if it was not given."""
        if name in kwargs:
            return kwargs[name]
        place = self._places[name]
        return args[place] if place < len(args) else None

    def by_name(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """All arguments by name."""
        return {**dict(zip(self._names, args, strict=False)), **kwargs}

    def inputs(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
        """The streams that go in.

        Raises:
            TypeError: one of them is no tensor.
        """
        streams: list[Any] = [
            kwargs[name] if name in kwargs else args[place] if place < len(args) else None
            for name, place in self._streams
        ]
        for stream in streams:
            if not isinstance(stream, torch.Tensor):
                names = ", ".join(self._blocks.streams)
                raise TypeError(
                    f"BlockList {self._blocks.name!r}: the streams {names} must be tensors, got {type(stream).__name__}"
                )
        return streams

    def outputs(self, result: Any) -> Streams:
        """The streams that come out, in the order of `inputs`.

        Raises:
            TypeError: the block returned another number of streams.
        """
        if type(result) is tuple and len(result) == len(self._returned):
            return [result[i] for i in self._returned]
        if isinstance(result, torch.Tensor):
            result = (result,)
        if not isinstance(result, tuple | list) or len(result) != len(self._returned):
            given = f"{len(result)} values" if isinstance(result, tuple | list) else type(result).__name__
            expected = ", ".join(self._blocks.order)
            raise TypeError(f"BlockList {self._blocks.name!r}: a block should return {expected}, got {given}")
        return [result[i] for i in self._returned]

    def passes_on(self, result: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
        """Whether the streams that go in are the very ones that an earlier block of the list has returned."""
        if type(result) is not tuple:
            result = (result,)
        if len(result) != len(self._streams):
            return False
        for (name, place), i in zip(self._streams, self._returned, strict=True):
            if (kwargs[name] if name in kwargs else args[place]) is not result[i]:
                return False
        return True

    def result(self, streams: Sequence[torch.Tensor | None]) -> Any:
        """What a block returns for these streams."""
        return streams[0] if len(streams) == 1 else tuple(streams[i] for i in self._taken)

    def valid_tokens(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> torch.Tensor | None:
        """Valid tokens per sample, int64 (batch), or None for all of them."""
        mask = None if self._blocks.valid is None else self.argument(self._blocks.valid, args, kwargs)
        return None if mask is None else mask.sum(-1)

    def take(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], batch: int, samples: torch.Tensor
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of some samples.

        Args:
            args, kwargs: of all samples.
            batch: their number.
            samples: int64, which ones.

        Raises:
            NotSplittableError: an argument is an object that is no tensor, nor made of tensors.
        """
        shared = self._blocks.shared
        positional = tuple(
            value if name in shared else _take(value, batch, samples, name in self._blocks.stacked)
            for name, value in zip(self._names, args, strict=False)
        )
        named = {
            name: value if name in shared else _take(value, batch, samples, name in self._blocks.stacked)
            for name, value in kwargs.items()
        }
        return positional, named


def _take(value: Any, batch: int, samples: torch.Tensor, stacked: bool) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, torch.Tensor):
        if value.dim() == 0 or (value.shape[0] != batch and not (stacked and value.shape[0] % batch == 0)):
            return value
        if value.shape[0] == batch:
            return value.index_select(0, samples.to(value.device))
        rows = value.unflatten(0, (-1, batch))
        return rows.index_select(1, samples.to(value.device)).flatten(0, 1)
    if isinstance(value, tuple) and type(value) is tuple:
        return tuple(_take(item, batch, samples, stacked) for item in value)
    if type(value) is list:
        return [_take(item, batch, samples, stacked) for item in value]
    if type(value) is dict:
        return {key: _take(item, batch, samples, stacked) for key, item in value.items()}
    raise NotSplittableError(type(value).__name__)
