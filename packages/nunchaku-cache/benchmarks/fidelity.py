"""How far cached pictures of the 4-bit demo are from its uncached ones, policy by policy.

uv run python packages/nunchaku-cache/benchmarks/fidelity.py -o benchmarks/cache_fidelity.json
"""

import argparse
import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import nunchaku_cache
from nunchaku_cache import DoubleFirstBlockCache, FirstBlockCache, ScheduledCache, TeaCache, find_schedule
from nunchaku_kernels.bench import report, table
from nunchaku_kernels.bench.report import Row
from nunchaku_models.evaluation.metrics import psnr
from nunchaku_models.generation import load_pipeline

PROMPTS = (
    "a red apple, noto style",
    "a smiling cat face, fluent style",
    "a blue car, noto style",
    "a slice of pizza, noto style",
    "a green tree, fluent style",
    "a rocket, noto style",
    "a yellow star, fluent style",
    "a dog, noto style",
)
RECORDED = ("a pear, noto style", "a bus, fluent style", "a fox face, noto style", "a cup of tea, fluent style")
"""Prompts of the pictures from which schedules are found; their seeds follow those of PROMPTS."""


class Demo:
    """The demo pipeline."""

    def __init__(self, steps: int) -> None:
        loaded = load_pipeline()
        self.pipe = loaded.pipeline
        self.pipe.set_progress_bar_config(disable=True)
        self._arguments = loaded.defaults | {"num_inference_steps": steps}

    def draw(self, prompt: str, seed: int) -> Any:
        """A PIL picture."""
        generator = torch.Generator().manual_seed(seed)
        return self.pipe(prompt, generator=generator, **self._arguments).images[0]


def policies(trace: nunchaku_cache.Trace) -> Iterator[tuple[str, Any]]:
    """Names and policies."""
    for order in (0, 1, 2):
        for threshold in (0.05, 0.12, 0.2):
            yield f"first-block-{threshold}/order{order}", FirstBlockCache(threshold, order=order)
        yield f"double-0.12-0.12/order{order}", DoubleFirstBlockCache(0.12, 0.12, order=order)
        yield f"teacache-0.6/order{order}", TeaCache(0.6, order=order)
        for computed in (6, 10, 14):
            schedule = find_schedule(trace, computed, order=order)
            yield f"schedule-{computed}/order{order}", ScheduledCache(schedule)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--steps", type=int, default=28)
    args = parser.parse_args()
    demo, rows = Demo(args.steps), []
    plain = [demo.draw(prompt, seed) for seed, prompt in enumerate(PROMPTS)]
    with nunchaku_cache.apply(demo.pipe, ScheduledCache()).record() as trace:
        for seed, prompt in enumerate(RECORDED, len(PROMPTS)):
            demo.draw(prompt, seed)
    for name, policy in policies(trace):
        handle = nunchaku_cache.apply(demo.pipe, policy)
        drawn = [demo.draw(prompt, seed) for seed, prompt in enumerate(PROMPTS)]
        likeness = [psnr(picture, reference) for picture, reference in zip(drawn, plain, strict=True)]
        share = handle.stats.hits / (handle.stats.hits + handle.stats.misses)
        rows += [
            Row(f"cache/fidelity/{name}/mean", statistics.mean(likeness), "dB"),
            Row(f"cache/fidelity/{name}/worst", min(likeness), "dB"),
            Row(f"cache/fidelity/{name}/skipped", 100 * share, "%"),
        ]
    print(table(rows))
    if args.output:
        args.output.write_text(json.dumps(report(rows), indent=2) + "\n")


if __name__ == "__main__":
    main()
