"""Tensors computed from a layer's registered ones, remade whenever those changed behind its back."""

import ctypes
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

_SAMPLE_BYTES = 64
_SAMPLES = 4


class _Source(NamedTuple):
    """What a source tensor looked like when the value was made."""

    storage: "weakref.ref[torch.UntypedStorage]"
    storage_bytes: int
    address: int
    version: int
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]
    sampled: tuple[int, ...]
    samples: list[bytes]

    def is_still(self, tensor: torch.Tensor) -> bool:
        storage = tensor.untyped_storage()
        return (
            self.storage() is storage
            and self.storage_bytes == storage.nbytes()
            and self.address == tensor.data_ptr()
            and self.version == _version(tensor)
            and self.dtype == tensor.dtype
            and self.shape == tensor.shape
            and self.stride == tensor.stride()
            and self.samples == _read(self.sampled)
        )


class _Entry(NamedTuple):
    sources: tuple[_Source, ...]
    key: object
    value: Any


class DerivedTensors:
    """A one-entry cache that belongs to its source tensors.

    Offloaders swap a parameter's storage and loaders write into it without telling the layer. A source counts as
    unchanged only while its storage is the very same object (a weak reference, so that a recycled address cannot fool
    it) and its version counter stands still. Writes through `param.data` and inside inference mode do not count as
    versions; on the CPU a few bytes are compared for those. When a source's storage is freed, so is the value.

    Safe from several threads: the entry is replaced as a whole, at worst two threads make the same value.
    """

    def __init__(self) -> None:
        self._entry: _Entry | None = None

    def get(self, sources: tuple[torch.Tensor, ...], make: Callable[[], Any], key: object = None) -> Any:
        """The cached value, or `make()` if any of `sources` is not the tensor it was made from.

        Args:
            sources: the tensors that the value depends on.
            make: makes it.
            key: whatever else it depends on, compared with `==`; equal keys come with equally many sources.
        """
        entry = self._entry
        if entry is not None and entry.key == key and all(map(_Source.is_still, entry.sources, sources)):
            return entry.value
        # Looked at before `make`: a write that arrives meanwhile is then seen as a change.
        seen = tuple(self._look_at(source) for source in sources)
        value = make()
        self._entry = _Entry(seen, key, value)
        return value

    def clear(self) -> None:
        """Forget the value (and free its memory)."""
        self._entry = None

    def _look_at(self, tensor: torch.Tensor) -> _Source:
        cache = weakref.ref(self)

        def forget(dead: "weakref.ref[torch.UntypedStorage]") -> None:
            owner = cache()
            entry = None if owner is None else owner._entry
            if owner is not None and entry is not None and any(source.storage is dead for source in entry.sources):
                owner.clear()

        storage, sampled = tensor.untyped_storage(), _sample_addresses(tensor)
        return _Source(
            weakref.ref(storage, forget),
            storage.nbytes(),
            tensor.data_ptr(),
            _version(tensor),
            tensor.dtype,
            tensor.shape,
            tensor.stride(),
            sampled,
            _read(sampled),
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> "DerivedTensors":
        return DerivedTensors()

    def __reduce__(self) -> tuple[type["DerivedTensors"], tuple[()]]:
        return DerivedTensors, ()


def _version(tensor: torch.Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version  # an inference tensor has no version counter


def _sample_addresses(tensor: torch.Tensor) -> tuple[int, ...]:
    """Where to look for changes of a CPU tensor: a few places, evenly spread."""
    size, address = tensor.nbytes, tensor.data_ptr()
    if not tensor.is_cpu or not address or size < _SAMPLE_BYTES or not tensor.is_contiguous():
        return ()
    step = (size - _SAMPLE_BYTES) // (_SAMPLES - 1)
    return tuple(address + i * step for i in range(_SAMPLES))


def _read(addresses: tuple[int, ...]) -> list[bytes]:
    return [ctypes.string_at(address, _SAMPLE_BYTES) for address in addresses]
