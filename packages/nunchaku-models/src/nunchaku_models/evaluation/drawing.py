"""Pictures: every prompt drawn from fixed noise."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm


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
        arguments: of the pipeline's call, see `generation.call_arguments`.
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
