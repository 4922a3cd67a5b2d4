"""Which state belongs to which call: one per pipeline call, branch of guidance, shape and thread.

A forward pass of the transformer does not say which call it is part of. It is recognised by the objects that stay the
same over the steps of one call and differ in the next (text embeddings, position ids; `Family.call`), by the name given
to diffusers' `cache_context`, by the shape of the input, and by its place among passes of the same timestep. Threads
have their own.
"""

import contextlib
import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from itertools import count
from typing import Any, Generic, TypeVar

import torch

State = TypeVar("State")

MAX_CALLS = 8
"""Calls in progress that a thread remembers. Beyond, the one that was longest idle is forgotten."""


class Witness:
    """Recognises a tensor of an earlier step: the same object, or, if that is gone, one with the same values."""

    def __init__(self, tensor: torch.Tensor, on_death: Callable[[], None]) -> None:
        self._object = weakref.ref(tensor, lambda _: on_death())
        # shares memory, but does not keep the object alive
        self._values = tensor.detach()
        self._version = _version(tensor)

    def is_same(self, tensor: torch.Tensor) -> bool:
        """Whether `tensor` is the very object, with the values it had."""
        return self._object() is tensor and self._version == _version(tensor)

    def is_copy(self, tensor: torch.Tensor) -> bool:
        """Whether the object is gone, and `tensor` has its values."""
        values = self._values
        return (
            self._object() is None
            and (tensor.shape, tensor.dtype, tensor.device) == (values.shape, values.dtype, values.device)
            and torch.equal(tensor, values)
        )


class Call(Generic[State]):
    """One call in progress: its witnesses, where it is, and a state per branch.

    Who makes the objects anew on every step is recognised by their values. Once a call was seen with the same objects
    twice, it is over when they are gone. Equal values at the same timestep are those of a call that repeats another.
    """

    def __init__(
        self,
        key: Hashable,
        witnesses: Sequence[torch.Tensor],
        schedule: object,
        number: int,
        on_end: Callable[["Call[State]"], None],
    ) -> None:
        """
        Args:
            key: what else tells calls apart.
            witnesses: tensors that stay the same over the call.
            schedule: an object that a pipeline makes anew for every call, or None.
            number: to tell it from others of the same key that are in progress.
            on_end: called when the witnesses are gone.
        """
        self.key = key
        self._schedule = schedule
        self._same_schedule = False
        self._repeats = False
        self.number = number
        self._on_end = on_end
        self._keeps_objects = False
        self._watch(witnesses)
        self._positions: tuple[float, ...] = ()
        self._branch = 0
        self.branches: dict[int, State] = {}

    def _watch(self, witnesses: Sequence[torch.Tensor]) -> None:
        self._witnesses = [Witness(tensor, self._object_died) for tensor in witnesses]

    def _object_died(self) -> None:
        if self._keeps_objects:
            self._on_end(self)

    def matches(self, key: Hashable, witnesses: Sequence[torch.Tensor], schedule: object) -> bool:
        """Whether a forward pass with these may be part of this call."""
        if self.key != key or len(witnesses) != len(self._witnesses):
            return False
        pairs = list(zip(self._witnesses, witnesses, strict=True))
        if all(known.is_same(tensor) for known, tensor in pairs):
            self._keeps_objects = bool(pairs)
            self._repeats = False
            self._same_schedule = schedule is not None and schedule is self._schedule
            self._schedule = schedule
            return True
        if self._keeps_objects or schedule is not self._schedule:
            return False
        if not all(known.is_same(tensor) or known.is_copy(tensor) for known, tensor in pairs):
            return False
        self._watch(witnesses)
        self._repeats = True
        return True

    def branch_at(self, positions: tuple[float, ...], *, rising: bool, named: bool) -> int:
        """The branch of a pass at these timesteps; forgets everything if they say that another call has begun.

        Passes of one timestep are branches in order; those that have a name each are steps whose timesteps are the same
        in 16 bits. Timesteps that go back belong to a new call.

        Args:
            positions: timestep per sample.
            rising: whether timesteps rise over a call.
            named: passes of different branches have different keys.
        """
        if positions == self._positions and not self._repeats:
            if not (named and self._same_schedule):
                self._branch += 1
            return self._branch
        back = any((new < old) if rising else (new > old) for new, old in zip(positions, self._positions, strict=False))
        # NaN is no place on a schedule
        if back or positions == self._positions or any(position != position for position in positions):
            self.branches.clear()
        self._positions, self._branch = positions, 0
        return 0


class Calls(Generic[State]):
    """The calls in progress of one thread."""

    def __init__(self) -> None:
        self._calls: list[Call[State]] = []  # the most recently used last

    def find(self, key: Hashable, witnesses: Sequence[torch.Tensor], schedule: object = None) -> Call[State]:
        """The call that a forward pass is part of, or a new one. See `Call` for the arguments."""
        # a copy, since calls may end meanwhile: when the garbage collector runs
        for call in tuple(reversed(self._calls)):
            if call.matches(key, witnesses, schedule):
                self.forget(call)
                break
        else:
            taken = {call.number for call in self._calls if call.key == key}
            number = next(number for number in count() if number not in taken)
            call = Call(key, witnesses, schedule, number, self.forget)
            del self._calls[: max(0, len(self._calls) + 1 - MAX_CALLS)]
        self._calls.append(call)
        return call

    def forget(self, call: Call[State]) -> None:
        """Drop a call and its state, if it is still there."""
        with contextlib.suppress(ValueError):
            self._calls.remove(call)

    def clear(self) -> None:
        """Drop all calls."""
        self._calls.clear()

    def __iter__(self) -> Iterator[Call[State]]:
        return iter(tuple(self._calls))

    def __len__(self) -> int:
        return len(self._calls)


def tensors_of(value: Any) -> list[torch.Tensor]:
    """The tensors of an argument: itself, or those of a list, however deep."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, list | tuple):
        return [tensor for item in value for tensor in tensors_of(item)]
    return []


def _version(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
