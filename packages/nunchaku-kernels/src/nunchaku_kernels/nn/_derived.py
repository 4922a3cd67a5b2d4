"""Tensors computed from a layer's registered ones, remade whenever those changed behind its back."""

import ctypes
import operator
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

_SAMPLE_BYTES = 64


# Applied to many tensors by `map`, without Python in between: a step of a large model asks thousands of times.
_storage = torch._C.TensorBase.untyped_storage
_address = torch._C.TensorBase.data_ptr
_stride = torch._C.TensorBase.stride
_state = operator.attrgetter("_version", "dtype", "shape")
_alive = weakref.ref.__call__


class _Sources(NamedTuple):
    """What the source tensors looked like when the value was made; a list has an item for each."""

    storages: "list[weakref.ref[torch.UntypedStorage]]"
    addresses: list[int]
    strides: list[tuple[int, ...]]
    states: list[tuple[int, torch.dtype, torch.Size]]
    places: "list[ctypes.Array[ctypes.c_char]]"
    contents: bytes  # of all places

    def are_still(self, tensors: Sequence[torch.Tensor]) -> bool:
        return (
            list(map(_storage, tensors)) == list(map(_alive, self.storages))
            and list(map(_address, tensors)) == self.addresses
            and _states(tensors) == self.states
            and list(map(_stride, tensors)) == self.strides
            and b"".join(self.places) == self.contents  # only now: the storages are alive, and where they were
        )

    def are_tensors_of(self, other: "_Sources") -> bool:
        """Whether both are of the same elements, whatever has been written there in between."""
        mine, theirs = ([_alive(storage) for storage in each.storages] for each in (self, other))
        shapes = [[state[1:] for state in each.states] for each in (self, other)]
        return mine == theirs and self[1:3] == other[1:3] and shapes[0] == shapes[1]


class _Entry(NamedTuple):
    sources: _Sources
    key: object
    value: Any
    nbytes: int


class DerivedTensors:
    """A cache of a value that belongs to its source tensors.

    Offloaders swap a parameter's storage and loaders write into it without telling the layer. A source counts as
    unchanged only while its storage is the very same object (a weak reference, so that a recycled address cannot fool
    it) and its version counter stands still. Writes through `param.data` and inside inference mode do not count as
    versions; on the CPU a few bytes are compared for those. When a source's storage is freed, so is the value.

    The latest value is kept, and as many of those before it, made from other sources, as fit into `spare_bytes`.

    Safe from several threads: the entries are replaced as a whole, at worst two threads make the same value.
    """

    def __init__(self, spare_bytes: int = 0) -> None:
        self.spare_bytes = spare_bytes
        self._entries: tuple[_Entry, ...] = ()

    def get(self, sources: Sequence[torch.Tensor], make: Callable[[], Any], key: object = None) -> Any:
        """The cached value, or `make()` if any of `sources` is not the tensor it was made from.

        Args:
            sources: the tensors that the value depends on.
            make: makes it: a tensor, or a tuple with some.
            key: whatever else it depends on, compared with `==`; equal keys come with equally many sources.
        """
        entries = self._entries
        for entry in entries:
            if entry.key == key and entry.sources.are_still(sources):
                if entry is not entries[0]:
                    self._keep(entry)
                return entry.value
        # Looked at before `make`: a write that arrives meanwhile is then seen as a change.
        seen = self._look_at(sources)
        value = make()
        self._keep(_Entry(seen, key, value, _nbytes(value)))
        return value

    def clear(self) -> None:
        """Forget all values (and free their memory)."""
        self._entries = ()

    def _keep(self, latest: _Entry) -> None:
        kept, room = [latest], self.spare_bytes
        for entry in self._entries:
            outdated = entry.key == latest.key and entry.sources.are_tensors_of(latest.sources)
            if entry is latest or outdated:
                continue
            room -= entry.nbytes
            if room < 0:
                break
            kept.append(entry)
        self._entries = tuple(kept)

    def _look_at(self, tensors: Sequence[torch.Tensor]) -> _Sources:
        cache = weakref.ref(self)

        def forget(dead: "weakref.ref[torch.UntypedStorage]") -> None:
            owner = cache()
            if owner is not None:
                owner._entries = tuple(
                    entry for entry in owner._entries if not any(found is dead for found in entry.sources.storages)
                )

        storages = [weakref.ref(storage, forget) for storage in map(_storage, tensors)]
        places = [place for tensor in tensors for place in _sampled(tensor)]
        return _Sources(
            storages, list(map(_address, tensors)), list(map(_stride, tensors)), _states(tensors), places,
            b"".join(places),
        )  # fmt: skip

    def __deepcopy__(self, memo: dict[int, Any]) -> "DerivedTensors":
        return DerivedTensors(self.spare_bytes)

    def __reduce__(self) -> tuple[type["DerivedTensors"], tuple[int]]:
        return DerivedTensors, (self.spare_bytes,)


def _states(tensors: Sequence[torch.Tensor]) -> list[tuple[int, torch.dtype, torch.Size]]:
    try:
        return list(map(_state, tensors))
    except RuntimeError:  # an inference tensor has no version counter
        return [(-1 if each.is_inference() else each._version, each.dtype, each.shape) for each in tensors]


def _sampled(tensor: torch.Tensor) -> "list[ctypes.Array[ctypes.c_char]]":
    """Where to look for changes of a CPU tensor: at its start and at its middle. Each place is a page of memory that
    is seldom in any cache, so more of them would cost more than all other looks together."""
    size, address = tensor.nbytes, tensor.data_ptr()
    if not tensor.is_cpu or not address or size < 2 * _SAMPLE_BYTES or not tensor.is_contiguous():
        return []
    return [(ctypes.c_char * _SAMPLE_BYTES).from_address(address + offset) for offset in (0, size // 2)]


def _nbytes(value: Any) -> int:
    """Of all tensors in `value`."""
    if isinstance(value, torch.Tensor):
        return value.nbytes
    return sum(map(_nbytes, value)) if isinstance(value, tuple) else 0
