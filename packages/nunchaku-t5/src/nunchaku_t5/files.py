"""Safetensors files: reading one or several as one, and writing one tensor at a time, wholly or not at all."""

import contextlib
import json
import math
import os
import secrets
import shutil
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import torch
from safetensors import SafetensorError, safe_open

from nunchaku_t5.errors import CheckpointError, shown

INDEX_NAME = "model.safetensors.index.json"
WEIGHTS_NAME = "model.safetensors"
CONFIG_NAME = "config.json"
JSON_LIMIT = 100_000_000
"""Largest JSON file read, bytes."""

DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "I8": torch.int8,
    "U8": torch.uint8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class TensorInfo(NamedTuple):
    """A tensor that need not be in memory."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class TensorFiles:
    """The tensors of some safetensors files, read when asked for.

    Args:
        files: read as one; a name must be in one of them only.

    Raises:
        CheckpointError: a file is damaged or no safetensors file, or has a dtype that weights do not have.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self.metadata: dict[str, str] = {}
        self._infos: dict[str, TensorInfo] = {}
        self._homes: dict[str, Path] = {}
        for file in files:
            with _opened(file) as opened:
                self.metadata.update(opened.metadata() or {})
                for name in opened.keys():  # noqa: SIM118 - not a dict
                    if name in self._homes:
                        raise CheckpointError(f"{file}: {shown(name)} is in {self._homes[name].name}, too")
                    piece = opened.get_slice(name)
                    dtype = DTYPES.get(piece.get_dtype())
                    if dtype is None:
                        raise CheckpointError(f"{file}: {shown(name)} has the unknown dtype {piece.get_dtype()}")
                    self._infos[name] = TensorInfo(tuple(piece.get_shape()), dtype)
                    self._homes[name] = file

    @classmethod
    def of(cls, path: Path) -> Self:
        """Those of a file, or of a folder: `model.safetensors`, the files of its index, or the only one there is."""
        if path.is_file():
            return cls([path])
        index = path / INDEX_NAME
        if index.is_file():
            names = read_json(index).get("weight_map")
            if not isinstance(names, dict) or not names:
                raise CheckpointError(f"{index}: `weight_map` must map tensor names to files")
            files = sorted({str(name) for name in names.values()})
            for name in files:
                if Path(name).name != name or not (path / name).is_file():
                    raise CheckpointError(f"{index} names the file {shown(name)}, which is not in its folder")
            return cls([path / name for name in files])
        found = sorted(path.glob("*.safetensors")) if path.is_dir() else []
        whole = [file for file in found if file.name == WEIGHTS_NAME] or found
        if len(whole) != 1:
            what = "no" if not found else f"{len(found)}"
            raise CheckpointError(
                f"{path} holds {what} .safetensors files, and neither {INDEX_NAME} nor {WEIGHTS_NAME}"
            )
        return cls(whole)

    def __iter__(self) -> Iterator[str]:
        return iter(self._infos)

    def __contains__(self, name: object) -> bool:
        return name in self._infos

    def __len__(self) -> int:
        return len(self._infos)

    @property
    def paths(self) -> set[Path]:
        """The files that hold them."""
        return set(self._homes.values())

    def info(self, name: str) -> TensorInfo:
        """Shape and dtype.

        Raises:
            KeyError: there is no such tensor.
        """
        return self._infos[name]

    def get(self, name: str) -> torch.Tensor:
        """The tensor. Its file is mapped for as long as the tensor lives, and no other of its pages is touched."""
        with _opened(self._homes[name]) as opened:
            tensor: torch.Tensor = opened.get_tensor(name)
        return tensor


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt") as opened:
            yield opened
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} cannot be read as a safetensors file: {error}") from error


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        CheckpointError: it cannot be read, or holds something else.
    """
    try:
        if file.stat().st_size > JSON_LIMIT:
            raise CheckpointError(f"{file} is larger than {JSON_LIMIT} bytes")
        return parse_json(file.read_text(), str(file))
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error


def parse_json(text: str, where: str) -> dict[str, Any]:
    """The object that a JSON text stands for; `where` is for the message.

    Raises:
        CheckpointError: it is no JSON object.
    """
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{where} must be a JSON object, got {shown(found)}")
    return found


class StreamingWriter:
    """Writes a safetensors file one tensor at a time, in the order declared.

    Data goes to a temporary file beside `path`; leaving the `with` block puts it in place. Any exception,
    KeyboardInterrupt included, removes it, and leaves an earlier file at `path` as it was.

    Args:
        path: file to write; its folder must exist.
        tensors: name -> shape and dtype of what will be written.
        metadata: str -> str.

    Raises:
        CheckpointError: the folder is missing or read-only, the disk has too little space (checked at once) or fails.
    """

    def __init__(self, path: Path, tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str]) -> None:
        self.path = check_writable(path)
        self._expected = list(tensors.items())
        self._header = _header(tensors, metadata)
        self._temporary = self.path.with_name(f".{self.path.name[:100]}.{secrets.token_hex(6)}.tmp")
        needed = len(self._header) + sum(info.nbytes for info in tensors.values())
        free = shutil.disk_usage(self.path.parent).free
        if free < needed:
            raise CheckpointError(f"{path} needs {needed / 1e9:.2f} GB and its disk has {free / 1e9:.2f} GB free")

    def __enter__(self) -> Self:
        # Not tempfile: its files are readable by the owner only, and the result should follow the umask.
        self._file = open(self._temporary, "xb")
        try:
            self._put(self._header)
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise
        return self

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Append the next declared tensor.

        Raises:
            ValueError: another name, shape or dtype than declared next.
        """
        expected, info = self._expected.pop(0)
        if name != expected or tuple(tensor.shape) != info.shape or tensor.dtype != info.dtype:
            raise ValueError(f"expected {expected} {info}, got {name} {tuple(tensor.shape)} {tensor.dtype}")
        if info.nbytes:
            self._put(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)

    def _put(self, data: bytes | memoryview) -> None:
        try:
            self._file.write(data)
        except OSError as error:
            raise CheckpointError(f"writing {self.path} failed: {error.strerror or error}") from error

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                if self._expected:
                    raise ValueError(f"{self.path}: {len(self._expected)} declared tensors were not written")
                self._file.flush()
                os.fsync(self._file.fileno())
                self._file.close()
                os.replace(self._temporary, self.path)
        except OSError as failure:
            raise CheckpointError(f"writing {self.path} failed: {failure.strerror or failure}") from failure
        finally:
            self._file.close()
            self._temporary.unlink(missing_ok=True)


def check_writable(path: Path) -> Path:
    """The real path of a file that can be written, through symbolic links.

    Raises:
        CheckpointError: it cannot.
    """
    target = Path(os.path.realpath(path.expanduser()))
    if target.is_dir():
        raise CheckpointError(f"{path} is a folder; give the name of the file to write")
    if target.exists() and not target.is_file():  # renaming something over a device or a pipe removes it
        raise CheckpointError(f"{path} is no regular file; give another name")
    if not target.parent.is_dir() or not os.access(target.parent, os.W_OK | os.X_OK):
        raise CheckpointError(f"{path} cannot be written: {target.parent} does not exist or is read-only")
    return target


def _header(tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    start = 0
    for name, info in tensors.items():
        stop = start + info.nbytes
        entries[name] = {
            "dtype": DTYPE_NAMES[info.dtype],
            "shape": list(info.shape),
            "data_offsets": [start, stop],
        }
        start = stop
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data starts aligned
    return struct.pack("<Q", len(text)) + text


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Fill a folder, wholly or not at all: yields a temporary one that becomes `path` when the block succeeds.

    Raises:
        CheckpointError: `path` exists and is not an empty folder, or cannot be made.
    """
    target = check_new_folder(path)
    temporary = target.with_name(f".{target.name[:100]}.{secrets.token_hex(6)}.tmp")
    temporary.mkdir()
    try:
        yield temporary
        os.replace(temporary, target)
    except OSError as error:
        raise CheckpointError(f"writing {path} failed: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_new_folder(path: Path) -> Path:
    """The real path of a folder that can be made.

    Raises:
        CheckpointError: it exists with something in it, or cannot be made.
    """
    target = Path(os.path.realpath(path.expanduser()))
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(f"{path} exists; nothing is overwritten, give another name or remove it")
    if not target.parent.is_dir() or not os.access(target.parent, os.W_OK | os.X_OK):
        raise CheckpointError(f"{path} cannot be written: {target.parent} does not exist or is read-only")
    return target
