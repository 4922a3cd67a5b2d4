"""Prompts and pictures: reading a prompts file, drawing every prompt from fixed noise."""

import inspect
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from nunchaku_models.checkpoints.errors import shown

MAX_PROMPTS = 1000
"""Picture i of seed s starts from noise seed 1000 * s + i; more prompts would share noise with the next seed's."""
MAX_PROMPT_CHARACTERS = 10_000
MAX_FILE_BYTES = 4 << 20


def read_prompts(path: str | os.PathLike[str]) -> list[str]:
    """The prompts of a UTF-8 text file, one per line; blank lines and lines that begin with # do not count.

    Raises:
        ValueError: no such file, not UTF-8 text, too large, or not 2 to 1000 prompts.
    """
    file = Path(path).expanduser()
    try:
        # a pipe or a device may never end
        if not file.is_file():
            raise ValueError(f"{shown(str(file))} is not a file; give a text file with one prompt per line")
        with file.open("rb") as opened:
            content = opened.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ValueError(f"{shown(str(file))} cannot be read: {error.strerror or error}") from error
    if len(content) > MAX_FILE_BYTES:
        raise ValueError(f"{file} is larger than the {MAX_FILE_BYTES:,} bytes that a prompts file may have")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text ({error.reason} at byte {error.start})") from None
    if "\0" in text:
        raise ValueError(f"{file} holds NUL characters, so it is no text file; give one prompt per line")
    lines = [line.strip() for line in text.replace("\r", "\n").split("\n")]
    prompts = [line for line in lines if line and not line.startswith("#")]
    longest = max(map(len, prompts), default=0)
    if longest > MAX_PROMPT_CHARACTERS:
        raise ValueError(f"{file} has a prompt of {longest:,} characters; {MAX_PROMPT_CHARACTERS:,} are allowed")
    return check_prompts(prompts, str(file))


def check_prompts(prompts: Sequence[str], where: str) -> list[str]:
    """The prompts, if there are enough for an interval and not too many.

    Raises:
        ValueError: fewer than 2 or more than 1000.
    """
    if not 2 <= len(prompts) <= MAX_PROMPTS:
        raise ValueError(f"{where} has {len(prompts)} prompts; an interval needs from 2 to {MAX_PROMPTS}")
    return list(prompts)


def call_arguments(
    pipeline: Any,
    defaults: Mapping[str, Any],
    *,
    steps: int | None = None,
    size: tuple[int, int] | None = None,
    guidance: float | None = None,
) -> dict[str, Any]:
    """Arguments of the pipeline's call: what was asked for, over what its folder recommends.

    Args:
        pipeline: a diffusers pipeline.
        defaults: call argument -> value, from the pipeline's folder.
        steps, size, guidance: denoising steps, (width, height) in pixels, guidance scale; None for the default.

    Raises:
        ValueError: an argument that the pipeline does not take.
    """
    given = {
        "num_inference_steps": steps,
        "guidance_scale": guidance,
        "width": size[0] if size else None,
        "height": size[1] if size else None,
    }
    arguments = {**defaults, **{key: value for key, value in given.items() if value is not None}}
    accepted = inspect.signature(type(pipeline).__call__).parameters
    unknown = sorted(key for key in arguments if key not in accepted)
    if unknown:
        raise ValueError(f"{type(pipeline).__name__} does not take {', '.join(unknown)}")
    return arguments


def draw(
    pipeline: Any,
    prompts: Sequence[str],
    *,
    seeds: int,
    batch: int,
    arguments: Mapping[str, Any],
    label: str,
    progress: bool = True,
) -> list[list[Image.Image]]:
    """Pictures [seed][prompt]; picture i of seed s starts from the noise of seed `1000 * s + i`.

    The noise is drawn on the CPU, so that every device starts from the same. Rounding may depend on the batch size:
    pictures to be compared must be drawn with the same one.

    Args:
        pipeline: a diffusers pipeline on its device.
        prompts: at most 1000.
        seeds: pictures per prompt.
        batch: pictures drawn at once.
        arguments: of the pipeline's call, see `call_arguments`.
        label: shown before the progress bar.
        progress: show a bar.
    """
    pipeline.set_progress_bar_config(disable=True)
    rest = dict(arguments)
    negative = rest.pop("negative_prompt", None)
    drawn: list[list[Image.Image]] = []
    with tqdm(total=seeds * len(prompts), desc=label, unit="picture", disable=not progress) as bar:
        for seed in range(seeds):
            pictures: list[Image.Image] = []
            for first in range(0, len(prompts), batch):
                part = list(prompts[first : first + batch])
                generators = [torch.Generator("cpu").manual_seed(1000 * seed + first + i) for i in range(len(part))]
                # not passed at all where there is none: not every pipeline takes one
                negatives = {} if negative is None else {"negative_prompt": [negative] * len(part)}
                pictures += pipeline(part, generator=generators, **negatives, **rest).images
                bar.update(len(part))
            drawn.append(pictures)
    return drawn
