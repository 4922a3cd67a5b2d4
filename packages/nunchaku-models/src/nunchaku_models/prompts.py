"""Prompts: from a user's file, and those that a model is calibrated with when nobody says which."""

import itertools
import os
import random
from pathlib import Path

from nunchaku_models.checkpoints.errors import shown

MAX_PROMPTS = 1000
"""Picture i of seed s starts from noise seed 1000 * s + i; more prompts would share noise with the next seed's."""
MAX_PROMPT_CHARACTERS = 10_000
MAX_FILE_BYTES = 4 << 20

CALIBRATION_NAME = "calibration_prompts.txt"
"""In a pipeline folder: prompts that suit the model, one per line."""

_SUBJECTS = (
    "an old fisherman", "two children", "a ginger cat", "a red bicycle", "a bowl of ramen", "a lighthouse",
    "a steam locomotive", "a woman in a green coat", "a robot", "a glass of orange juice", "a bookshop", "a fox",
    "a wooden bridge", "a street musician", "a vase of tulips", "a sailing boat", "an astronaut", "a stone castle",
    "a slice of chocolate cake", "a herd of elephants", "a vintage typewriter", "a basketball player",
    "a hummingbird", "a neon sign that says OPEN", "a mountain village", "a chess board", "a pair of running shoes",
    "a bearded man with glasses", "a waterfall", "a yellow taxi", "a greenhouse full of plants", "a violin",
)  # fmt: skip
_SETTINGS = (
    "in the rain", "at sunrise", "on a wooden table", "in a crowded market", "in front of snowy mountains",
    "under a starry sky", "in an empty white room", "by a river in autumn", "seen from above", "in thick fog",
    "on a busy city street at night", "beside a large window",
)  # fmt: skip
_STYLES = (
    "photograph, 35 mm", "oil painting", "watercolour", "flat vector illustration", "pencil sketch", "film still",
    "3d render", "close-up photograph, shallow depth of field", "pixel art", "black and white photograph",
)  # fmt: skip


def read_prompts(path: str | os.PathLike[str], *, minimum: int = 1, maximum: int = MAX_PROMPTS) -> list[str]:
    """The prompts of a UTF-8 text file, one per line; blank lines and lines that begin with # do not count.

    Raises:
        ValueError: no such file, not UTF-8 text, too large, or not `minimum` to `maximum` prompts.
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
    if not minimum <= len(prompts) <= maximum:
        raise ValueError(f"{file} has {len(prompts)} prompts; from {minimum} to {maximum} are possible")
    return prompts


def calibration_prompts(count: int, pipeline: str | os.PathLike[str]) -> list[str]:
    """`count` different prompts: the first of those that the pipeline's folder recommends, else general captions.

    Raises:
        ValueError: more prompts than there are, or fewer than one.
    """
    own = Path(pipeline).expanduser() / CALIBRATION_NAME
    if own.is_file():
        known = read_prompts(own, maximum=100_000)
    else:
        parts = itertools.product(_SUBJECTS, _SETTINGS, _STYLES)
        known = [f"{subject} {setting}, {style}" for subject, setting, style in parts]
        random.Random(0).shuffle(known)
    if not 1 <= count <= len(known):
        raise ValueError(f"--calibrate must be a file or a number from 1 to {len(known)}, got {count}")
    return known[:count]
