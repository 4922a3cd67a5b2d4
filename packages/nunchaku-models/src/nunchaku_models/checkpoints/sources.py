"""Opening whatever a user calls a checkpoint: a file, a folder, a pipeline folder, a published legacy folder, a hub id.

`open_checkpoint` returns a `SafetensorsReader` or a `ShardedReader`; both are a `TensorSource`. Layouts: spec,
checkpoint_format sections 1 and 2; the rule for hub paths: surface section 1.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from nunchaku_models.checkpoints.errors import CheckpointError, shown
from nunchaku_models.checkpoints.json_guard import parse_json_object
from nunchaku_models.checkpoints.safetensors_file import SafetensorsReader, missing_tensor
from nunchaku_models.checkpoints.safetensors_header import TensorInfo

WEIGHT_SUFFIXES = (".safetensors", ".sft")
_STEM = "diffusion_pytorch_model"
_INDEX_SUFFIX = ".safetensors.index.json"
_INDEX_LIMIT = 64 << 20
_CONFIG_LIMIT = 1 << 20
_SHARD_LIMIT = 4096
_LEGACY = ("unquantized_layers.safetensors", "transformer_blocks.safetensors")
# What a hub repository may hold of interest; a single-file release next to a diffusers folder is not fetched with it.
_HUB_PATTERNS = ("model_index.json", "config.json", "comfy_config.json", *_LEGACY)


class ShardedReader:
    """Several safetensors files read as one.

    Args:
        readers: the open files; closed together with this reader.
        where: what to call the whole in messages.
        names: which reader holds which tensor. Without it a tensor held by several files comes from the last.
        metadata: entries that take precedence over those of the files.
    """

    def __init__(
        self,
        readers: list[SafetensorsReader],
        where: str,
        *,
        names: Mapping[str, SafetensorsReader] | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self.readers = readers
        self._where = where
        self._names = dict(names) if names is not None else {name: reader for reader in readers for name in reader}
        self._metadata: dict[str, str] = {}
        for reader in readers:
            self._metadata.update(reader.metadata)
        self._metadata.update(metadata or {})

    @property
    def where(self) -> str:
        return self._where

    @property
    def metadata(self) -> dict[str, str]:
        return self._metadata

    def keys(self) -> list[str]:
        return list(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def _reader(self, name: str) -> SafetensorsReader:
        try:
            return self._names[name]
        except KeyError:
            raise missing_tensor(self._where, name, self.keys()) from None

    def info(self, name: str) -> TensorInfo:
        return self._reader(name).info(name)

    def tensor(self, name: str) -> torch.Tensor:
        return self._reader(name).tensor(name)

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        return self._reader(name).rows(name, start, stop)

    def release(self, name: str) -> None:
        self._reader(name).release(name)

    def close(self) -> None:
        for reader in self.readers:
            reader.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


Checkpoint = SafetensorsReader | ShardedReader


def open_checkpoint(
    path: str | os.PathLike[str],
    *,
    subfolder: str | None = None,
    variant: str | None = None,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
) -> Checkpoint:
    """Open a checkpoint for reading; reads headers only.

    Args:
        path: an existing file; an existing folder (a diffusers transformer, a pipeline with `model_index.json`, the
            legacy pair `transformer_blocks` + `unquantized_layers`, or a folder with a single safetensors file); else
            a hub id `org/repo`, `org/repo/folder` or `org/repo/path/file.safetensors`.
        subfolder: folder below `path`.
        variant: diffusers file variant, "fp16" for `diffusion_pytorch_model.fp16.safetensors`.
        revision, cache_dir, token, local_files_only, force_download: passed to huggingface_hub.

    Raises:
        CheckpointError: nothing usable there, or a damaged file.
    """
    text = os.fspath(path)
    if not isinstance(text, str):
        raise TypeError(f"path must be text, not {type(text).__name__}")
    if not text or "\0" in text:
        raise CheckpointError(f"{shown(text)} is not a path; give a file, a folder or a hub id such as 'org/repo'")
    if variant is not None and not re.fullmatch(r"[A-Za-z0-9_-]+", variant):
        raise CheckpointError(f"variant {shown(variant)} is not a name such as 'fp16'")
    try:
        local = Path(text).expanduser()
        present = local.exists()
    except (OSError, RuntimeError) as error:  # a name too long, no permission to look, an unknown ~user
        raise CheckpointError(f"{shown(text)} cannot be opened: {getattr(error, 'strerror', None) or error}") from None
    if not present:
        local = _download(
            text,
            subfolder,
            variant,
            {
                "revision": revision,
                "cache_dir": cache_dir,
                "token": token,
                "local_files_only": local_files_only,
                "force_download": force_download,
            },
        )
    elif subfolder:
        local = local / _relative(subfolder, text)
    if local.is_dir():
        return _open_folder(local, variant)
    if (match := re.search(r"-\d{5}-of-(\d{5})\.", local.name)) and int(match.group(1)) > 1:
        raise CheckpointError(f"{local} is one of {int(match.group(1))} shards of a model; give their folder")
    return SafetensorsReader(local)


def _relative(subfolder: str, where: str) -> str:
    parts = subfolder.replace("\\", "/").strip("/").split("/")
    if any(part in ("", ".", "..") or ":" in part for part in parts):
        raise CheckpointError(f"subfolder {shown(subfolder)} is not a folder below {where}")
    return "/".join(parts)


# ---------------------------------------------------------------------------------------------------------- folders


def _open_folder(folder: Path, variant: str | None) -> Checkpoint:
    if (folder / "model_index.json").is_file():
        inner = next((folder / name for name in ("transformer", "unet") if (folder / name).is_dir()), None)
        if inner is None:
            raise CheckpointError(f"{folder} is a pipeline without a 'transformer' or 'unet' folder; download it again")
        folder = inner
    try:
        names = sorted(entry.name for entry in folder.iterdir() if entry.is_file())
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be read: {error.strerror or error}") from None
    if any(name in names for name in _LEGACY):
        return _open_legacy(folder, names)
    choice = _choose(folder, names, variant)
    metadata = _folder_metadata(folder, names)
    if choice.endswith(".json"):
        return _open_index(folder, choice, metadata)
    return ShardedReader([SafetensorsReader(folder / choice)], str(folder / choice), metadata=metadata)


def _choose(folder: Path, names: list[str], variant: str | None) -> str:
    """The index or the weight file of a diffusers folder; any single candidate will do if it is the only one."""
    if variant:
        wanted = [f"{_STEM}.safetensors.index.{variant}.json", f"{_STEM}.{variant}.safetensors.index.json"]
        wanted += [f"{_STEM}.{variant}{suffix}" for suffix in WEIGHT_SUFFIXES]
    else:
        wanted = [_STEM + _INDEX_SUFFIX] + [_STEM + suffix for suffix in WEIGHT_SUFFIXES]
    for name in wanted:
        if name in names:
            return name
    indexes = [name for name in names if name.endswith(_INDEX_SUFFIX)]
    weights = [name for name in names if name.endswith(WEIGHT_SUFFIXES)]
    candidates = indexes or weights
    if variant is None and len(candidates) == 1:
        return candidates[0]
    if not candidates:
        pickles = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt", ".gguf"))]
        held = f"only {', '.join(pickles[:4])}, which are not supported" if pickles else "no .safetensors file"
        raise CheckpointError(f"{folder} holds {held}; give the folder with the transformer's safetensors files")
    raise CheckpointError(
        f"{folder} holds {', '.join(candidates[:8])}{' ...' if len(candidates) > 8 else ''} and "
        f"{'no ' + wanted[-2] if variant else 'none of them is the default'}; name the file"
        f"{' or a variant' if variant is None else ''}"
    )


def _read_text(path: Path, limit: int) -> bytes:
    try:
        if path.stat().st_size > limit:
            raise CheckpointError(f"{path} is larger than the {limit:,} bytes this reader accepts")
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from None


def _folder_metadata(folder: Path, names: list[str]) -> dict[str, str]:
    """`config.json` and `comfy_config.json` under the metadata keys a single file has (checked to be objects)."""
    result: dict[str, str] = {}
    for key, name in (("config", "config.json"), ("comfy_config", "comfy_config.json")):
        if name in names:
            value = parse_json_object(_read_text(folder / name, _CONFIG_LIMIT), where=str(folder / name))
            result[key] = json.dumps(value)
            # diffusers keeps the quantisation of a saved model inside its config.
            if key == "config" and isinstance(value.get("quantization_config"), dict):
                result.setdefault("quantization_config", json.dumps(value["quantization_config"]))
    return result


def _open_all(paths: list[Path]) -> list[SafetensorsReader]:
    readers: list[SafetensorsReader] = []
    try:
        for path in paths:
            readers.append(SafetensorsReader(path))
    except BaseException:
        for reader in readers:
            reader.close()
        raise
    return readers


def _open_legacy(folder: Path, names: list[str]) -> ShardedReader:
    missing = [name for name in _LEGACY if name not in names]
    if missing:
        raise CheckpointError(f"{folder} holds {_LEGACY[missing[0] == _LEGACY[0]]} but not {missing[0]}; add it")
    readers = _open_all([folder / name for name in _LEGACY])
    # Unquantised layers first: where both hold a tensor, the blocks win.
    return ShardedReader(readers, str(folder), metadata=_folder_metadata(folder, names))


def _open_index(folder: Path, index: str, metadata: dict[str, str]) -> ShardedReader:
    where = str(folder / index)
    document = parse_json_object(
        _read_text(folder / index, _INDEX_LIMIT), where=where, max_bytes=_INDEX_LIMIT, max_depth=4
    )
    weight_map = document.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{where} has no 'weight_map' of tensor names; download it again")
    about = document.get("metadata", {})
    total = about.get("total_size", 0) if isinstance(about, dict) else None
    if isinstance(total, bool) or not isinstance(total, int | float) or total < 0:
        raise CheckpointError(f"{where} has nonsense in 'metadata.total_size' ({shown(total)}); download it again")
    shards: dict[str, Path] = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str):
            raise CheckpointError(f"{where} maps tensor {shown(name)} to {shown(shard)} instead of a file name")
        if shard in shards:
            continue
        # A shard lies next to its index: anything that could name another place is refused, not normalised.
        if not re.fullmatch(r"[A-Za-z0-9_.+-]+", shard) or not shard.endswith(WEIGHT_SUFFIXES) or shard.startswith("."):
            raise CheckpointError(f"{where} names the shard {shown(shard)}, which is no plain name of a weight file")
        if len(shards) == _SHARD_LIMIT:
            raise CheckpointError(f"{where} names more than {_SHARD_LIMIT} shards; it is damaged or hostile")
        shards[shard] = folder / shard
    absent = [name for name, path in shards.items() if not path.is_file()]
    if absent:
        raise CheckpointError(
            f"{where} names {len(shards)} shards of which {len(absent)} are missing ({', '.join(absent[:4])}"
            f"{' ...' if len(absent) > 4 else ''}); download the rest"
        )
    readers = dict(zip(shards, _open_all(list(shards.values())), strict=True))
    names: dict[str, SafetensorsReader] = {}
    for name, shard in weight_map.items():
        if name not in readers[shard]:
            for reader in readers.values():
                reader.close()
            raise CheckpointError(
                f"{where} says that {shard} holds tensor {shown(name)}, and it does not; download both again"
            )
        names[name] = readers[shard]
    return ShardedReader(list(readers.values()), where, names=names, metadata=metadata)


# -------------------------------------------------------------------------------------------------------------- hub


def _download(text: str, subfolder: str | None, variant: str | None, options: dict[str, Any]) -> Path:
    """Fetch a hub id and return the local file or folder."""
    parts = text.split("/")
    if (
        len(parts) < 2
        or text.startswith(("/", "~", "."))
        or "\\" in text
        or any(part in ("", ".", "..") or ":" in part for part in parts)
        or (len(parts) == 2 and text.endswith((*WEIGHT_SUFFIXES, ".json", ".bin", ".pt", ".ckpt", ".gguf")))
    ):
        raise CheckpointError(
            f"{shown(text)} does not exist, and it is no hub id either; give a file, a folder, 'org/repo' or "
            "'org/repo/file.safetensors'"
        )
    try:
        import huggingface_hub
        from huggingface_hub import errors as hub_errors
    except ImportError:
        raise CheckpointError(
            f"{shown(text)} does not exist here, and downloading it needs huggingface_hub: pip install huggingface_hub"
        ) from None
    repo, inner = "/".join(parts[:2]), "/".join(parts[2:])
    try:
        if inner.endswith(WEIGHT_SUFFIXES):
            return Path(huggingface_hub.hf_hub_download(repo, inner, **options))
        if inner.endswith((".bin", ".pt", ".pth", ".ckpt", ".gguf")):
            raise CheckpointError(f"{shown(text)} is not a safetensors file; name one of that repository")
        folder = "/".join(part for part in (inner, _relative(subfolder, text) if subfolder else "") if part)
        roots = [f"{folder}/"] if folder else ["", "transformer/", "unet/"]
        allowed = [root + pattern for root in roots for pattern in (*_HUB_PATTERNS, *_weight_patterns(variant))]
        found = Path(huggingface_hub.snapshot_download(repo, allow_patterns=allowed, **options))
    except (hub_errors.HfHubHTTPError, hub_errors.HFValidationError, OSError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(_hub_message(text, repo, error, hub_errors)) from error
    found = found / folder if folder else found
    if not found.is_dir() or not any(entry.name.endswith((".safetensors", ".json")) for entry in found.iterdir()):
        raise CheckpointError(
            f"the hub repository {repo} holds no transformer weights under '{folder or '.'}'; name the file, as in "
            f"'{repo}/<file>.safetensors'"
        )
    return found


def _weight_patterns(variant: str | None) -> tuple[str, ...]:
    """Hub patterns of one variant only: every variant of a 12 B model is another 24 GB."""
    five = "[0-9]" * 5
    if variant is None:
        return f"{_STEM}.safetensors", f"{_STEM}-{five}-of-{five}.safetensors", f"{_STEM}.safetensors.index.json"
    return f"{_STEM}*.{variant}*.safetensors", f"{_STEM}*.{variant}*.json"


def _hub_message(text: str, repo: str, error: Exception, hub_errors: Any) -> str:
    if isinstance(error, hub_errors.GatedRepoError):
        return f"the hub repository {repo} is gated: accept its licence on its page, then log in with `hf auth login`"
    if isinstance(error, hub_errors.RepositoryNotFoundError):
        return f"{shown(text)} is neither a local path nor a hub repository you may read; check the spelling or log in"
    if isinstance(error, hub_errors.EntryNotFoundError) and not isinstance(error, hub_errors.LocalEntryNotFoundError):
        return f"the hub repository {repo} has no such file as {shown(text)}; check its list of files"
    if isinstance(error, hub_errors.LocalEntryNotFoundError | hub_errors.OfflineModeIsEnabled | ConnectionError):
        return (
            f"{shown(text)} does not exist here, is not in the hub cache, and the hub could not be asked; go online, "
            "or download it elsewhere and give its local path"
        )
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{shown(text)} could not be fetched from the hub ({type(error).__name__}: {first[:300]})"
