"""Writing weight files so that a failure never leaves a half-written or lost file."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import torch

from nunchaku_models.checkpoints.errors import CheckpointError, shown
from nunchaku_models.checkpoints.safetensors_header import TensorInfo, build_header


def by_alignment(tensors: Sequence[TensorInfo]) -> list[TensorInfo]:
    """The order of the safetensors library, widest dtype first and then by name: every tensor lies aligned."""
    return sorted(tensors, key=lambda info: (-info.dtype.itemsize, info.name))


def _target(path: str | os.PathLike[str]) -> Path:
    """The real place to write to: through symbolic links, in a folder that exists and can be written."""
    target = Path(os.path.realpath(Path(path).expanduser()))
    if target.is_dir():
        raise CheckpointError(f"{path} is a folder; give the name of the file to write")
    if target.exists() and not target.is_file():  # renaming something over a device or a pipe removes it
        raise CheckpointError(f"{path} is no regular file; give another name")
    if not target.parent.is_dir():
        raise CheckpointError(f"{path} cannot be written: the folder {target.parent} does not exist; create it first")
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise CheckpointError(f"{path} cannot be written: no permission to create files in {target.parent}")
    return target


def check_writable(path: str | os.PathLike[str]) -> None:
    """Raise CheckpointError unless a file can be written at `path`: hours of work later is too late to find out."""
    _target(path)


def _sync_folder(folder: Path) -> None:
    # Makes the new directory entry survive a crash; not every system lets a folder be opened or synced.
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


class _AtomicFile:
    """A temporary file beside `path` that takes its place on `commit` and vanishes on `discard`."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.target = _target(path)
        self.temporary = self.target.with_name(f".{self.target.name[:100]}.{secrets.token_hex(6)}.tmp")
        try:
            # Not tempfile: its files are readable by the owner only, and the result should follow the umask.
            self.file: BinaryIO = open(self.temporary, "xb")  # noqa: SIM115 - closed by commit or discard
        except OSError as error:
            raise CheckpointError(f"{path} cannot be written: {error.strerror or error}") from None

    def commit(self) -> None:
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        os.replace(self.temporary, self.target)
        _sync_folder(self.target.parent)

    def discard(self) -> None:
        with contextlib.suppress(OSError):
            self.file.close()
        with contextlib.suppress(OSError):
            self.temporary.unlink()


class StreamingWriter:
    """Writes a safetensors file one tensor at a time; memory use is one tensor.

    The header is computed from the declared tensors, data goes to a temporary file in the same folder, and leaving the
    `with` block puts it in place. Any exception, KeyboardInterrupt included, removes the temporary file and leaves an
    earlier file at `path` untouched::

        with StreamingWriter("model.safetensors", infos, {"model_class": "..."}) as writer:
            for info in infos:
                writer.write(info.name, make(info.name))

    Args:
        path: file to write; its folder must exist.
        tensors: what will be written, in this order (see `by_alignment`).
        metadata: str -> str.

    Raises:
        CheckpointError: the folder is missing or read-only, or the disk has too little space (checked before work
            starts); on leaving, fewer tensors written than declared; the disk failing.
        ValueError, TypeError: names given twice, dtypes the format lacks, metadata that is not str -> str.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        tensors: Sequence[TensorInfo],
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self.path = Path(path)
        self._tensors = tuple(tensors)
        self._header = build_header(self._tensors, metadata)
        self._written = 0
        self._atomic: _AtomicFile | None = None
        self.nbytes = len(self._header) + sum(info.nbytes for info in self._tensors)
        free = shutil.disk_usage(_target(path).parent).free
        if free < self.nbytes:
            raise CheckpointError(
                f"{path} needs {self.nbytes / 1e9:.2f} GB and its disk has {free / 1e9:.2f} GB free; make room or "
                "write elsewhere"
            )

    def __enter__(self) -> Self:
        if self._atomic is not None:
            raise ValueError(f"the writer of {self.path} was already used; create another")
        self._atomic = _AtomicFile(self.path)
        try:
            self._put(self._header)
        except BaseException:
            self._atomic.discard()
            raise
        return self

    def _put(self, data: bytes | memoryview) -> None:
        assert self._atomic is not None
        try:
            self._atomic.file.write(data)
        except OSError as error:
            raise CheckpointError(f"writing {self.path} failed: {error.strerror or error}") from error

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Append the next declared tensor.

        Raises:
            ValueError: another name, dtype or shape than declared next, or a tensor without dense data.
        """
        if self._atomic is None or self._atomic.file.closed:
            raise ValueError(f"the writer of {self.path} is not open; use it in a `with` block")
        if self._written == len(self._tensors):
            raise ValueError(f"tensor {shown(name)} was not declared: all {len(self._tensors)} tensors are written")
        info = self._tensors[self._written]
        if name != info.name:
            raise ValueError(f"tensor {shown(name)} was written where {shown(info.name)} was declared next")
        if tensor.dtype != info.dtype or tuple(tensor.shape) != info.shape:
            raise ValueError(
                f"tensor {shown(name)} was declared as {info.dtype} {list(info.shape)} and given as {tensor.dtype} "
                f"{list(tensor.shape)}"
            )
        if tensor.device.type == "meta" or tensor.layout != torch.strided:
            raise ValueError(f"tensor {shown(name)} is on {tensor.device} with layout {tensor.layout}: no dense data")
        if info.nbytes:
            plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
            self._put(plain.view(torch.uint8).numpy().data)
        self._written += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._atomic is not None
        try:
            if kind is None:
                if self._written < len(self._tensors):
                    raise CheckpointError(
                        f"{self.path} was not written: {len(self._tensors) - self._written} of {len(self._tensors)} "
                        f"declared tensors are missing, the first is {shown(self._tensors[self._written].name)}"
                    )
                try:
                    self._atomic.commit()
                except OSError as failure:
                    raise CheckpointError(f"writing {self.path} failed: {failure.strerror or failure}") from failure
        finally:
            # After a commit there is nothing left to remove.
            self._atomic.discard()


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike[str], names: Collection[str]) -> Iterator[Path]:
    """Fill a folder, wholly or not at all: yields a temporary folder that becomes `path` when the block succeeds.

    An existing folder is replaced only if all it holds are files among `names`, the files about to be written;
    otherwise nothing is touched. An exception removes the temporary folder.

    Args:
        path: the folder to create; its parent must exist.
        names: file names the block will write.

    Raises:
        CheckpointError: `path` is a file or holds other files, the parent is missing or read-only, or the block wrote
            other files than it announced.
    """
    target = Path(os.path.realpath(Path(path).expanduser()))
    expected = set(names)

    def check() -> None:
        if target.exists() and not target.is_dir():
            raise CheckpointError(f"{path} is a file; give the name of a folder to write")
        foreign = (
            [entry.name for entry in target.iterdir() if entry.name not in expected or not entry.is_file()]
            if target.exists()
            else []
        )
        if foreign:
            raise CheckpointError(
                f"{path} holds other files ({', '.join(sorted(foreign)[:4])}{' ...' if len(foreign) > 4 else ''}), "
                "which replacing the folder would delete; choose another folder"
            )

    check()
    if not target.parent.is_dir() or not os.access(target.parent, os.W_OK | os.X_OK):
        raise CheckpointError(f"{path} cannot be created: {target.parent} does not exist or cannot be written")
    temporary = target.with_name(f"{target.name[:100]}.tmp-{secrets.token_hex(6)}")
    temporary.mkdir()
    try:
        yield temporary
        written = {entry.name for entry in temporary.iterdir()}
        if written != expected:
            raise CheckpointError(
                f"{path} was not written: the files made and announced differ in {sorted(written ^ expected)[:4]}"
            )
        check()
        previous = target.with_name(f"{target.name[:100]}.old-{secrets.token_hex(6)}")
        if target.exists():
            os.replace(target, previous)
        try:
            os.replace(temporary, target)
        except BaseException:
            if previous.exists():
                os.replace(previous, target)
            raise
        _sync_folder(target.parent)
        if previous.exists():
            # Not rmtree: what is deleted are the announced files and nothing else.
            for name in expected:
                (previous / name).unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                previous.rmdir()
    finally:
        if temporary.exists():
            shutil.rmtree(temporary, ignore_errors=True)
