"""Fixtures of the kernel tests: golden tensors of the published packers and kernels."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors import safe_open

GOLDEN_VARIABLE = "NUNCHAKU_GOLDEN"
REPOSITORY = Path(__file__).resolve().parents[3]


class Golden(NamedTuple):
    """One golden file: its tensors, its `params` and its `errors` metadata."""

    tensors: dict[str, torch.Tensor]
    params: dict[str, Any]
    errors: dict[str, Any]


@pytest.fixture(scope="session")
def golden() -> Callable[[str], Golden]:
    """Loads a golden file by name without suffix; skips where the files are absent."""
    folder = Path(os.environ.get(GOLDEN_VARIABLE, REPOSITORY.parent / "shared" / "golden"))

    def load(name: str) -> Golden:
        path = folder / f"{name}.safetensors"
        if not path.is_file():
            pytest.skip(f"golden file {path.name} not found in {folder}; set {GOLDEN_VARIABLE} to its folder")
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
        return Golden(tensors, json.loads(metadata["params"]), json.loads(metadata.get("errors", "{}")))

    return load
