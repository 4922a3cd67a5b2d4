"""Reading one safetensors file through a memory map, after validating its header."""

from __future__ import annotations

import difflib
import mmap
import os
import stat
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Protocol, Self

import torch

from nunchaku_models.checkpoints.errors import CheckpointError, shown
from nunchaku_models.checkpoints.safetensors_header import HEADER_LIMIT, Header, TensorInfo, parse_header

# mmap.MAP_NORESERVE arrives in Python 3.12; the value is the kernel's on every Linux we build for.
_NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)

_TORCH_FILE = "a PyTorch pickle file, which can run code when opened; convert it to .safetensors with a tool you trust"
_KNOWN_STARTS: tuple[tuple[bytes, str], ...] = (
    (b"PK\x03\x04", f"a zip archive, most likely {_TORCH_FILE}"),
    (b"\x80\x02", _TORCH_FILE),
    (b"\x80\x03", _TORCH_FILE),
    (b"\x80\x04", _TORCH_FILE),
    (b"\x80\x05", _TORCH_FILE),
    (b"GGUF", "a GGUF file, which is not supported; use the .safetensors release of the model"),
    (
        b"version https://git-lfs",
        "a Git LFS pointer and not the weights; run `git lfs pull` or download the file itself",
    ),
    (
        b"version https://hawser",
        "a Git LFS pointer and not the weights; run `git lfs pull` or download the file itself",
    ),
    (b"\x1f\x8b", "a gzip archive; unpack it first"),
    (b"\x28\xb5\x2f\xfd", "a zstandard archive; unpack it first"),
    (b"7z\xbc\xaf\x27\x1c", "a 7-zip archive; unpack it first"),
    (b"\x89HDF", "an HDF5 file; use the .safetensors release of the model"),
    (b"\x93NUMPY", "a NumPy array; use the .safetensors release of the model"),
)


class TensorSource(Protocol):
    """What readers and views have in common: named tensors that are loaded when asked for."""

    @property
    def where(self) -> str: ...
    @property
    def metadata(self) -> dict[str, str]: ...
    def keys(self) -> list[str]: ...
    def __contains__(self, name: object) -> bool: ...
    def __iter__(self) -> Iterator[str]: ...
    def __len__(self) -> int: ...
    def info(self, name: str) -> TensorInfo: ...
    def tensor(self, name: str) -> torch.Tensor: ...
    def rows(self, name: str, start: int, stop: int) -> torch.Tensor: ...
    def release(self, name: str) -> None: ...


def missing_tensor(where: str, name: str, names: list[str]) -> CheckpointError:
    """The error for a name that a source does not hold, with the nearest names it does hold."""
    # Names come from the file: the comparison is quadratic in their length, so monsters are left out.
    near = difflib.get_close_matches(name[:200], [known for known in names[:5000] if len(known) < 200], n=2)
    hint = f"; similar names in it: {', '.join(map(shown, near))}" if near else ""
    return CheckpointError(f"{where} holds no tensor {shown(name)} among its {len(names):,}{hint}")


def check_rows(info: TensorInfo, start: int, stop: int, where: str) -> None:
    """Raise `CheckpointError` unless `info` has rows start..stop along its first dimension."""
    if not info.shape or not 0 <= start <= stop <= info.shape[0]:
        raise CheckpointError(
            f"tensor {shown(info.name)} in {where} has shape {list(info.shape)} and no rows {start}..{stop}"
        )


def _read_header(file: BinaryIO, size: int, where: str) -> tuple[Header, int]:
    """The validated header and the offset of the data part. Reads the header and nothing else."""
    start = file.read(64)
    if not start:
        raise CheckpointError(f"{where} is empty; download or export it again")
    length = int.from_bytes(start[:8], "little")
    # Only what cannot be a safetensors file is matched against other formats: any first byte is a possible length.
    if len(start) < 10 or length < 2 or length > HEADER_LIMIT or start[8:9] != b"{":
        lowered = start.lstrip().lower()
        for prefix, what in _KNOWN_STARTS:
            if start.startswith(prefix):
                raise CheckpointError(f"{where} is not a safetensors file but {what}")
        if lowered.startswith((b"<!doctype", b"<html", b"<?xml")):
            raise CheckpointError(
                f"{where} is not a safetensors file but a web page, most likely an error page saved by a failed "
                "download; download it again (a gated model needs a login)"
            )
        if lowered.startswith(b"{"):
            raise CheckpointError(f"{where} is not a safetensors file but JSON text; give the weight file itself")
        if len(start) < 10:
            raise CheckpointError(f"{where} is only {size} bytes long and holds no header; download or copy it again")
        if start[8:9] == b"{" and length > HEADER_LIMIT:
            raise CheckpointError(
                f"{where} claims a header of {length:,} bytes; at most {HEADER_LIMIT:,} are allowed, so it is damaged"
            )
        raise CheckpointError(f"{where} is not a safetensors file: it does not start with a safetensors header")
    if 8 + length > size:
        raise CheckpointError(
            f"{where} is truncated: its header takes {length:,} bytes and the file ends after {size:,}; "
            "download or copy it again"
        )
    header = start[8 : 8 + length]
    if length > len(header):
        header += file.read(length - len(header))
    if len(header) != length:
        raise CheckpointError(f"{where} became shorter while it was read; wait until it is fully written")
    return parse_header(header, size - 8 - length, where), 8 + length


class SafetensorsReader:
    """One safetensors file. Opening reads and validates the header only; tensor data is mapped when first asked for.

    Tensors are views of a private copy-on-write map: reading costs memory only for the pages touched, and writing to a
    tensor never reaches the file (it makes a private copy of the touched pages), but treat them as read-only, because
    `release` forgets such writes. A tensor stays valid after `close`. A tensor whose place in the file is not aligned
    to its dtype is copied. The file must not be shortened while it is open.

    Args:
        path: a local file.

    Raises:
        CheckpointError: missing, unreadable, another format, or anything wrong with the header.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._map: mmap.mmap | None = None
        self._lock = threading.Lock()
        self._closed = False
        try:
            # Looked at before opening: opening a pipe would wait for its other end.
            if not stat.S_ISREG(os.stat(self.path).st_mode):
                raise CheckpointError(f"{self.path} is not a regular file; give a .safetensors file")
            self._file = open(self.path, "rb")  # noqa: SIM115 - closed by close()
        except (OSError, ValueError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(
                f"{self.path} cannot be opened: {getattr(error, 'strerror', None) or error}"
            ) from None
        try:
            self._size = os.fstat(self._file.fileno()).st_size
            self._header, self._data_start = _read_header(self._file, self._size, str(self.path))
        except BaseException:
            self._file.close()
            raise

    @property
    def where(self) -> str:
        return str(self.path)

    @property
    def metadata(self) -> dict[str, str]:
        """The file's `__metadata__`; empty when it has none."""
        return self._header.metadata

    def keys(self) -> list[str]:
        """Tensor names in file order."""
        return list(self._header.tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._header.tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._header.tensors)

    def __len__(self) -> int:
        return len(self._header.tensors)

    def info(self, name: str) -> TensorInfo:
        """dtype and shape of a tensor. Raises CheckpointError for an unknown name."""
        try:
            return self._header.tensors[name]
        except KeyError:
            raise missing_tensor(self.where, name, self.keys()) from None

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor, on the CPU, without copying where the file's alignment allows."""
        info = self.info(name)
        return self._view(info, 0, info.nbytes, info.shape)

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows start..stop along the first dimension, without touching the others."""
        info = self.info(name)
        check_rows(info, start, stop, self.where)
        row = info.nbytes // info.shape[0] if info.shape[0] else 0
        return self._view(info, start * row, stop * row, (stop - start, *info.shape[1:]))

    def release(self, name: str) -> None:
        """Let go of the resident pages of a tensor; they are read from the file again if it is used again."""
        info = self.info(name)
        mapped = self._map
        if mapped is None or not hasattr(mapped, "madvise"):
            return
        # Pages shared with the neighbours stay, so that releasing one tensor never evicts another in use.
        page = mmap.PAGESIZE
        begin = self._data_start + self._header.offsets[name]
        first = -(-begin // page) * page
        last = (begin + info.nbytes) // page * page
        if last > first:
            mapped.madvise(mmap.MADV_DONTNEED, first, last - first)

    def close(self) -> None:
        """Close the file. The map lives on until the last tensor made from it is gone."""
        self._closed = True
        self._map = None
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _mapped(self) -> mmap.mmap:
        with self._lock:
            if self._closed:
                raise CheckpointError(f"{self.where} was closed; open it again to read tensors")
            if self._map is None:
                try:
                    if sys.platform == "win32":
                        mapped = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_COPY)
                    else:
                        # Not reserved: otherwise the kernel wants memory for the whole file in case we write to it,
                        # and refuses to map a 24 GB file on a 16 GB machine.
                        mapped = mmap.mmap(
                            self._file.fileno(),
                            0,
                            flags=mmap.MAP_PRIVATE | _NO_RESERVE,
                            prot=mmap.PROT_READ | mmap.PROT_WRITE,
                        )
                except (OSError, ValueError) as error:
                    raise CheckpointError(f"{self.where} cannot be mapped into memory: {error}") from None
                if len(mapped) < self._size:
                    raise CheckpointError(f"{self.where} became shorter since it was opened; open it again")
                self._map = mapped
            return self._map

    def _view(self, info: TensorInfo, start: int, stop: int, shape: tuple[int, ...]) -> torch.Tensor:
        if start == stop:
            return torch.empty(shape, dtype=info.dtype)
        # One storage per tensor: a storage of the whole file would be copied whole by deepcopy and torch.save.
        offset = self._data_start + self._header.offsets[info.name] + start
        raw = torch.frombuffer(self._mapped(), dtype=torch.uint8, count=stop - start, offset=offset)
        if raw.data_ptr() % info.dtype.itemsize:
            raw = raw.clone()
        return raw.view(info.dtype).view(shape)
