"""Reading LoRA files: safetensors only, checked before anything is believed."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

Source = str | os.PathLike[str] | Mapping[str, torch.Tensor]

NAMES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
"""What diffusers and PEFT call the file in a folder."""

METADATA_KEY = "lora_adapter_metadata"
"""Where diffusers keeps the PEFT configuration in a file's header."""

MAX_TENSORS = 100_000


def read_lora(source: Source) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tensors of a LoRA file and the PEFT configuration it came with (empty if none).

    Args:
        source: a safetensors file, a folder with one (diffusers' or PEFT's), or tensors by name.

    Raises:
        ValueError: the file is not safetensors, is damaged, empty, or has values that are no tensors; the message
            names it.
        FileNotFoundError: there is no such file.
    """
    if isinstance(source, Mapping):
        wrong = [key for key, value in source.items() if not isinstance(value, torch.Tensor)]
        if wrong or not source:
            raise ValueError(f"a LoRA must be tensors by name, got {wrong[:3] or 'nothing'}")
        return dict(source), {}
    path = file_of(Path(source).expanduser())
    try:
        with safe_open(path, "pt") as file:
            keys = list(file.keys())
            if not 0 < len(keys) <= MAX_TENSORS:
                raise ValueError(f"{path}: {len(keys)} tensors are not a LoRA")
            tensors = {key: file.get_tensor(key) for key in keys}
            header = file.metadata() or {}
    except (SafetensorError, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read as safetensors: {error}") from error
    configuration = _parsed(header[METADATA_KEY], f"{path}: {METADATA_KEY}") if METADATA_KEY in header else {}
    beside = path.parent / "adapter_config.json"
    if not configuration and path.name == NAMES[1] and beside.is_file():
        configuration = _parsed(beside.read_text(), str(beside))
    return tensors, configuration


def file_of(path: Path) -> Path:
    """The safetensors file that `path` is, or that is in the folder `path`.

    Raises:
        ValueError: another kind of file, or a folder with none or with several.
        FileNotFoundError: there is no such file.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    if path.is_dir():
        for name in NAMES:
            if (path / name).is_file():
                return path / name
        found = sorted(path.glob("*.safetensors"))
        if len(found) != 1:
            raise ValueError(f"{path}: expected one .safetensors file in this folder, found {len(found)}")
        return found[0]
    if path.suffix not in (".safetensors", ".sft"):
        raise ValueError(f"{path}: only safetensors files are read, not pickles or other formats")
    return path


def _parsed(text: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{where} must be a JSON object")
    return value
