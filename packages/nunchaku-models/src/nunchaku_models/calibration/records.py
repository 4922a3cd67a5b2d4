"""Calls of a transformer, recorded while its pipeline draws calibration prompts."""

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

HELD_OUT_SHARE = 0.25
"""Of the pipeline's runs. Whole runs, so that no prompt is on both sides."""


@dataclass(frozen=True)
class Call:
    """Arguments of one call, tensors on the CPU, and whether it is for judging what was fitted to the others."""

    arguments: dict[str, Any]
    held_out: bool


def record_calls(
    pipeline: Any,
    prompts: Sequence[str],
    arguments: Mapping[str, Any],
    *,
    batch: int,
    tokens: int,
    seed: int,
    progress: bool = True,
) -> list[Call]:
    """Draw every prompt, and keep a random sample of the transformer's calls, equally many of each run.

    Args:
        pipeline: a diffusers pipeline with a transformer, on its device.
        prompts: what to draw.
        arguments: of the pipeline's call.
        batch: prompts drawn at once.
        tokens: how many tokens of `hidden_states` to keep, all calls together; about, and at least one call of a run.
        seed: of the noise and of the sample.
        progress: show a bar.
    """
    transformer = pipeline.transformer
    signature = inspect.signature(transformer.forward)
    seen: list[dict[str, Any]] = []

    def record(_: Any, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
        seen.append(dict(signature.bind(*positional, **named).arguments))

    rest = dict(arguments) | {"output_type": "latent"}
    negative = rest.pop("negative_prompt", None)
    pipeline.set_progress_bar_config(disable=True)
    handle = transformer.register_forward_pre_hook(record, with_kwargs=True)
    runs = math.ceil(len(prompts) / batch)
    calls: list[Call] = []
    chance = torch.Generator().manual_seed(seed)
    try:
        with tqdm(total=len(prompts), desc="calibration prompts", unit="prompt", disable=not progress) as bar:
            for run in range(runs):
                part = list(prompts[run * batch : (run + 1) * batch])
                noise = [torch.Generator("cpu").manual_seed(seed + run * batch + i) for i in range(len(part))]
                negatives = {} if negative is None else {"negative_prompt": [negative] * len(part)}
                pipeline(part, generator=noise, **negatives, **rest)
                size = seen[0]["hidden_states"].shape[:2].numel()
                wanted = max(1, round(tokens / runs / size))
                held_out = runs > 1 and run >= runs - max(1, round(runs * HELD_OUT_SHARE))
                for index in sorted(torch.randperm(len(seen), generator=chance)[:wanted].tolist()):
                    calls.append(Call({k: on_device(v, "cpu") for k, v in seen[index].items()}, held_out))
                seen.clear()
                bar.update(len(part))
    finally:
        handle.remove()
    return calls


def on_device(value: Any, device: torch.device | str) -> Any:
    """`value` with its tensors, also those in tuples, lists and dictionaries, on `device`."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, tuple | list):
        return type(value)(on_device(item, device) for item in value)
    if isinstance(value, dict):
        return {key: on_device(item, device) for key, item in value.items()}
    return value
