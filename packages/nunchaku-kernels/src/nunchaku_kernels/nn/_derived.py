"""Tensors computed from a layer's registered ones, remade whenever those changed behind its back."""

from collections.abc import Callable
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef


class DerivedTensors:
    """A one-entry cache keyed by the identity of its source tensors.

    Offloaders swap a parameter's storage and loaders write into it without telling the layer. A source counts as
    unchanged only while its storage is the very same object (a weak reference, so that the cache keeps no memory
    alive and a recycled address cannot fool it) and its version counter stands still.
    """

    def __init__(self) -> None:
        self._key: tuple[Any, ...] = ()
        self._storages: tuple[StorageWeakRef, ...] = ()
        self._value: Any = None

    def get(self, sources: tuple[torch.Tensor, ...], make: Callable[[], Any]) -> Any:
        """The cached value, or `make()` if any of `sources` is not the tensor it was made from."""
        key = tuple(_identity(source) for source in sources)
        if key != self._key or any(storage.expired() for storage in self._storages):
            self._value = make()
            self._storages = tuple(StorageWeakRef(source.untyped_storage()) for source in sources)
            self._key = key
        return self._value

    def clear(self) -> None:
        """Forget the value (and free its memory)."""
        self.__init__()  # type: ignore[misc]

    def __deepcopy__(self, memo: dict[int, Any]) -> "DerivedTensors":
        return DerivedTensors()

    def __reduce__(self) -> tuple[type["DerivedTensors"], tuple[()]]:
        return DerivedTensors, ()


def _identity(tensor: torch.Tensor) -> tuple[Any, ...]:
    # An inference tensor has no version counter; it cannot be written to outside inference mode either.
    version = -1 if tensor.is_inference() else tensor._version
    return (tensor.untyped_storage()._cdata, tensor.storage_offset(), version, tensor.dtype, tensor.device)
