"""A 16-bit T5 or UMT5 encoder to quantise: where it is, what is in it, and its tensors one by one."""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from nunchaku_t5.architecture import EMBEDDINGS, MODELS, make_config, skeleton, tensor_names
from nunchaku_t5.errors import CheckpointError, shown
from nunchaku_t5.files import CONFIG_NAME, TensorFiles, read_json

PIPELINE_INDEX = "model_index.json"
SUFFIXES = (".safetensors", ".sft")
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
PROBE = "encoder.block.0.layer.0.SelfAttention.q.weight"
"""In every such encoder; what stands before it in a file is a prefix of all its tensors."""

# Other parts of a whole T5, and what some single files carry besides: a tokenizer, a mark of scaled fp8.
_BESIDES = re.compile(r"decoder\..*|lm_head\.weight|spiece_model|scaled_fp8|.*\.scale_input")
_FP8_SCALE = ".scale_weight"
_ALLOWED = ["*.safetensors", "*.json"]


class EncoderSource:
    """Tensors of an encoder by the names of transformers.

    Attributes:
        where: for messages.
        config: of T5 or UMT5, checked against the tensors.
        entries: what its config file says, as it stands there; empty without one.
        model: the model on the meta device.
        folder: where its config file is, or None.

    Args:
        path: a folder of an encoder (or a whole T5), a folder of a pipeline of diffusers with one, or a single file.

    Raises:
        CheckpointError: it holds something else, lacks tensors or has others of no use, or is quantised.
    """

    def __init__(self, path: Path) -> None:
        self.folder = encoder_folder(path) if path.is_dir() else None
        self.where = str(self.folder or path)
        self._files = TensorFiles.of(self.folder or path)
        prefixes = [name.removesuffix(PROBE) for name in self._files if name.endswith(PROBE)]
        if len(prefixes) != 1:
            quantised = any(name.endswith(".qweight") for name in self._files)
            what = "is quantised already" if quantised else f"holds {len(prefixes)} T5 encoders, one is needed"
            other = "" if quantised or prefixes else "; `nunchaku_t5.quantize_encoder` quantises others, in Python"
            raise CheckpointError(f"{self.where} {what}{other}")
        self._prefix = prefixes[0]
        self._names = {name.removeprefix(self._prefix) for name in self._files if name.startswith(self._prefix)}
        shapes = {name: self._files.info(self._prefix + name).shape for name in self._names}
        config_file = None if self.folder is None else self.folder / CONFIG_NAME
        self.entries = read_json(config_file) if config_file is not None and config_file.is_file() else {}
        self.config = make_config(shapes, self.entries or None, self.where)
        self.model = skeleton(self.config, self.where)
        self._check(shapes)

    def _check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        expected = {name: tuple(self.model.get_parameter(name).shape) for name in tensor_names(self.model)}
        for name, shape in expected.items():
            stored = self._stored_name(name)
            if shapes.get(stored) != shape:
                found = list(shapes[stored]) if stored in shapes else "none"
                raise CheckpointError(f"{self.where}: {name} must have shape {list(shape)}, found {found}")
            if not self._files.info(self._prefix + stored).dtype.is_floating_point:
                raise CheckpointError(f"{self.where}: {name} must be of a floating-point dtype")
        scales = {name.removesuffix(".weight") + _FP8_SCALE: shape for name, shape in expected.items()}
        for name in sorted(self._names & scales.keys()):
            found_shape, dtype = self._files.info(self._prefix + name)
            if found_shape not in ((), (1,), (scales[name][0], 1)) or not dtype.is_floating_point:
                raise CheckpointError(
                    f"{self.where}: {name} must be one floating-point number, or one for each row, found shape "
                    f"{list(found_shape)} {dtype}"
                )
        unknown = sorted(self._names - expected.keys() - set(EMBEDDINGS) - scales.keys())
        unknown = [name for name in unknown if not _BESIDES.fullmatch(name)]
        if unknown:
            raise CheckpointError(f"{self.where}: {len(unknown)} tensors of no use, the first is {shown(unknown[0])}")

    def _stored_name(self, name: str) -> str:
        if name == EMBEDDINGS[0] and name not in self._names:
            return EMBEDDINGS[1]
        return name

    @property
    def files(self) -> set[Path]:
        """The files that its tensors are read from."""
        return self._files.paths

    def dtype(self, name: str) -> torch.dtype:
        """The dtype in which a tensor of the model is stored."""
        return self._files.info(self._prefix + self._stored_name(name)).dtype

    def get(self, name: str) -> torch.Tensor:
        """A tensor of the model; one stored in scaled fp8 as float32."""
        tensor = self._files.get(self._prefix + self._stored_name(name))
        scale = self._prefix + name.removesuffix(".weight") + _FP8_SCALE
        if scale not in self._files:
            return tensor
        return tensor.float() * self._files.get(scale).float()


def find(path: str | os.PathLike[str], *, subfolder: str | None = None) -> Path:
    """The local file or folder of a path, or of a hub id, downloaded if need be.

    Args:
        path: a file, a folder, or a hub id "org/repo".
        subfolder: of the folder or repository; by default the one that a pipeline has its encoder in.

    Raises:
        FileNotFoundError: there is no such thing.
    """
    local = Path(path).expanduser()
    if local.exists():
        return local / subfolder if subfolder else local
    if subfolder is None:
        index = pipeline_index(path)
        subfolder = None if index is None else encoder_part(index)
    root = repository(path, subfolder)
    return root / subfolder if subfolder else root


def repository(path: str | os.PathLike[str], subfolder: str | None, **hub: Any) -> Path:
    """A local copy of what a hub id has beside an encoder's config, in a subfolder or at its root; not what is in other
    folders: those of a pipeline are large.

    Args:
        path: "org/repo".
        subfolder: where the encoder is; None for the root.
        hub: `revision`, `token`, `cache_dir`, `local_files_only`.

    Raises:
        FileNotFoundError: that is no hub id, or there is no such repository.
    """
    if subfolder:
        return _download(path, [f"{subfolder}/{pattern}" for pattern in _ALLOWED], **hub)
    return _download(path, _ALLOWED, ignore_patterns=["*/*"], **hub)


def pipeline_index(path: str | os.PathLike[str], **hub: Any) -> Path | None:
    """The index of a pipeline's folder or hub id; None for what is no pipeline.

    Raises:
        FileNotFoundError: there is neither such a folder nor such a repository.
    """
    local = Path(path).expanduser()
    index = (local if local.exists() else _download(path, [PIPELINE_INDEX], **hub)) / PIPELINE_INDEX
    return index if index.is_file() else None


def _download(path: str | os.PathLike[str], patterns: Sequence[str], **options: Any) -> Path:
    from huggingface_hub import snapshot_download

    text = os.fspath(path)
    if HUB_ID.fullmatch(text) is None or text.endswith(SUFFIXES):
        raise FileNotFoundError(f"{path} is neither a file, a folder nor a hub id such as 'org/repo'")
    return Path(snapshot_download(text, allow_patterns=list(patterns), **options))


def encoder_folder(folder: Path) -> Path:
    """The folder itself, or the part of a pipeline's folder that holds its T5."""
    index = pipeline_index(folder)
    return folder if index is None else folder / encoder_part(index)


def encoder_part(index: Path) -> str:
    """The name of the T5 or UMT5 among the parts of a pipeline.

    Raises:
        CheckpointError: it has none, or several.
    """
    classes = {model.__name__ for _, model in MODELS.values()}
    found = [
        name
        for name, entry in read_json(index).items()
        if isinstance(entry, list) and len(entry) == 2 and entry[1] in classes and re.fullmatch(r"\w+", name)
    ]
    if len(found) != 1:
        raise CheckpointError(f"{index} names {len(found)} T5 encoders {shown(found)}, one is needed")
    return found[0]


def as_entries(config: Any, entries: Mapping[str, Any]) -> dict[str, Any]:
    """What a config file of the encoder alone says."""
    return {**(entries or config.to_dict()), "model_type": config.model_type, "is_encoder_decoder": False}
