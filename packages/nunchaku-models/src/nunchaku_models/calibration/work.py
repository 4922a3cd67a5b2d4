"""The folder beside the output that an unfinished calibration leaves: what is done need not be done again."""

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from nunchaku_models.calibration.records import Call
from nunchaku_models.checkpoints import CheckpointError, SafetensorsReader, StreamingWriter, TensorInfo, by_alignment
from nunchaku_models.checkpoints.json_guard import parse_json_object

_SETTINGS = "settings.json"
_CALLS = "calls.safetensors"
_INDEX_BYTES = 64 << 20


class WorkFolder:
    """Finished steps of one calibration.

    Args:
        path: the folder; made if it is not there.
        settings: everything that the result depends on, as plain values. A folder that was begun with others is not
            touched.

    Raises:
        CheckpointError: the folder belongs to another calibration, or cannot be made.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        text = json.dumps(settings, indent=1, sort_keys=True)
        try:
            path.mkdir(exist_ok=True)
            file = path / _SETTINGS
            if not file.exists():
                if any(path.iterdir()):
                    raise CheckpointError(f"{path} is in the way: it is no folder of this program; remove it")
                file.write_text(text)
            elif file.read_bytes() != text.encode():
                raise CheckpointError(
                    f"{path} holds an unfinished calibration with other settings ({_difference(file, settings)}); "
                    "remove it to start anew, or run the command as before to finish it"
                )
        except OSError as error:
            raise CheckpointError(f"{path} cannot be used to keep unfinished work: {error.strerror}") from error

    def remove(self) -> None:
        """Delete the folder: its work is finished."""
        shutil.rmtree(self.path, ignore_errors=True)

    def remove_if_unused(self) -> None:
        """Delete the folder if nothing was kept in it."""
        if [entry.name for entry in self.path.iterdir()] == [_SETTINGS]:
            self.remove()

    def has_calls(self) -> bool:
        """Whether `keep_calls` was finished."""
        return (self.path / _CALLS).is_file()

    def keep_calls(self, calls: Sequence[Call]) -> None:
        """Store recorded calls; tensors that several of them share are stored once.

        Raises:
            CheckpointError: an argument that is neither a tensor nor a plain value.
        """
        tensors: dict[str, torch.Tensor] = {}
        names: dict[bytes, str] = {}
        index = []
        for call in calls:
            entry: dict[str, Any] = {}
            for key, value in call.arguments.items():
                if isinstance(value, torch.Tensor):
                    value = value.contiguous()
                    digest = hashlib.sha256(value.view(torch.uint8).numpy().tobytes() if value.dim() else b"").digest()
                    digest += f"{value.dtype}{tuple(value.shape)}{'' if value.dim() else value.item()}".encode()
                    name = names.setdefault(digest, f"tensor{len(names)}")
                    tensors[name] = value
                    entry[key] = {"tensor": name}
                elif value is None or isinstance(value, bool | int | float | str) or value == {}:
                    entry[key] = {"value": value}
                else:
                    raise CheckpointError(f"the transformer was called with {key}={type(value).__name__}, not a tensor")
            index.append({"arguments": entry, "held_out": call.held_out})
        self._write(self.path / _CALLS, tensors, {"calls": json.dumps(index)})

    def calls(self) -> list[Call]:
        """What `keep_calls` stored.

        Raises:
            CheckpointError: the file is damaged.
        """
        path = self.path / _CALLS
        with self._open(path) as file:
            text = '{"calls": ' + file.metadata.get("calls", "") + "}"
            index = parse_json_object(text, where=str(path), max_bytes=_INDEX_BYTES)["calls"]
            tensors = {name: file.tensor(name).clone() for name in file}
            calls = []
            try:
                for entry in index:
                    arguments = {
                        key: tensors[value["tensor"]] if "tensor" in value else value["value"]
                        for key, value in entry["arguments"].items()
                    }
                    calls.append(Call(arguments, bool(entry["held_out"])))
            except (AttributeError, KeyError, TypeError) as error:
                raise CheckpointError(f"{path} has a damaged index") from error
            if not calls:
                raise CheckpointError(f"{path} holds no calls")
        return calls

    def has_block(self, block: str, layers: Iterable[str] = ()) -> bool:
        """Whether a block's layers were stored.

        Raises:
            CheckpointError: the file is damaged, or lacks one of `layers`.
        """
        if not self._block(block).is_file():
            return False
        with self._open(self._block(block)) as file:
            stored = {name.rpartition(".")[0] for name in file}
            for path in layers:
                if path not in stored:
                    raise CheckpointError(f"{file.where} does not hold the layer {path}")
        return True

    def keep_block(self, block: str, layers: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
        """Store the published tensors of a block's layers: path -> name -> tensor."""
        named = {f"{path}.{name}": value for path, layer in layers.items() for name, value in layer.items()}
        tensors = {name: value.cpu().contiguous() for name, value in named.items()}
        self._write(self._block(block), tensors, {})

    def layer(self, block: str, path: str) -> dict[str, torch.Tensor]:
        """The published tensors of one layer of a stored block."""
        with self._open(self._block(block)) as file:
            names = [name for name in file if name.rpartition(".")[0] == path]
            return {name.rpartition(".")[2]: file.tensor(name).clone() for name in names}

    def _block(self, block: str) -> Path:
        return self.path / f"{block}.safetensors"

    @contextmanager
    def _open(self, file: Path) -> Iterator[SafetensorsReader]:
        """A file of this folder; errors say what to do about it."""
        try:
            with SafetensorsReader(file) as reader:
                yield reader
        except CheckpointError as error:
            raise CheckpointError(f"{error}; remove {self.path} to start anew") from error

    @staticmethod
    def _write(path: Path, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str]) -> None:
        infos = by_alignment([TensorInfo(name, value.dtype, tuple(value.shape)) for name, value in tensors.items()])
        with StreamingWriter(path, infos, metadata or None) as writer:
            for info in infos:
                writer.write(info.name, tensors[info.name])


def _difference(file: Path, settings: Mapping[str, Any]) -> str:
    """Names of the settings that are not as in `file`."""
    try:
        before = parse_json_object(file.read_bytes(), where=str(file))
    except CheckpointError:
        return "unreadable"
    return ", ".join(sorted(key for key in settings.keys() | before.keys() if settings.get(key) != before.get(key)))
