"""The demo model that ships with this package: a small FLUX that draws emoji. See README.md beside this file."""

import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
PIPELINE = FOLDER / "pipeline"
"""The 16-bit pipeline, a diffusers folder."""
TRANSFORMER_INT4 = FOLDER / "transformer-int4.safetensors"
"""Its transformer in 4 bits, a published file."""
DEFAULTS_NAME = "generation_defaults.json"
"""In a pipeline folder: the arguments of its call that suit the model."""


def is_complete() -> bool:
    """Whether the demo's files are there."""
    return TRANSFORMER_INT4.is_file() and (PIPELINE / "model_index.json").is_file()


def defaults(pipeline: Path = PIPELINE) -> dict[str, Any]:
    """Call arguments recommended by a pipeline folder; empty where it recommends none.

    Raises:
        ValueError: the file is not a JSON object of plain values.
    """
    file = pipeline / DEFAULTS_NAME
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
    plain = isinstance(found, dict) and all(isinstance(v, str | int | float | None) for v in found.values())
    if not plain:
        raise ValueError(f"{file} must be a JSON object of strings and numbers")
    return dict(found)
