"""What a first-block cache costs per step while it never hits: the 4-bit demo transformer with and without one.

uv run python packages/nunchaku-cache/benchmarks/overhead.py -o benchmarks/cache_overhead.json

Steps with and without the cache take turns, some of each in a row; the fastest one counts, in processor time, since
other work may run beside.
"""

import argparse
import contextlib
import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

import nunchaku_cache
from nunchaku_kernels.bench import report, table
from nunchaku_kernels.bench.report import Row
from nunchaku_models.generation import load_pipeline

SIDES = (8, 16, 32, 64)
"""Of the latents, in tokens: pictures of 128 to 1024 pixels."""
TURN = 8
"""Steps in a row."""


def step(model: nn.Module, side: int) -> Callable[[], object]:
    """A function that runs the next step of an endless denoising loop."""
    config, tokens = model.config, side * side
    ids = torch.zeros(tokens, 3)
    ids[:, 1], ids[:, 2] = torch.arange(tokens) // side, torch.arange(tokens) % side
    inputs = {
        "hidden_states": torch.randn(1, tokens, config.in_channels).bfloat16(),
        "encoder_hidden_states": torch.randn(1, 32, config.joint_attention_dim).bfloat16(),
        "pooled_projections": torch.randn(1, config.pooled_projection_dim).bfloat16(),
        "img_ids": ids,
        "txt_ids": torch.zeros(32, 3),
    }
    timesteps = itertools.cycle([1 - i / 50 for i in range(50)])

    def run() -> object:
        return model(**inputs, timestep=torch.full((1,), next(timesteps)), return_dict=False)

    return run


def fastest(run: Callable[[], object], handle: nunchaku_cache.CacheHandle, seconds: float) -> dict[str, float]:
    """Processor time of the fastest step without and with the cache, in seconds."""
    best = {"plain": float("inf"), "cached": float("inf")}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for name in best:
            with handle.disabled() if name == "plain" else contextlib.nullcontext():
                for i in range(TURN):
                    started = time.process_time()
                    run()
                    # the first cached step has nothing to compare with
                    if i:
                        best[name] = min(best[name], time.process_time() - started)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--seconds", type=float, default=30, help="per size")
    args = parser.parse_args()
    # a second thread's waiting would count as processor time
    torch.set_num_threads(1)
    model = load_pipeline().pipeline.transformer
    handle = nunchaku_cache.apply(model, nunchaku_cache.FirstBlockCache(threshold=0))
    rows = []
    with torch.no_grad():
        for side in SIDES:
            found = fastest(step(model, side), handle, args.seconds)
            name, ratio = f"cache/overhead/m{side * side}", found["plain"] / found["cached"]
            rows.append(Row(name, 1e3 * found["cached"], "ms", f"no cache: {1e3 * found['plain']:.2f} ms", ratio))
    print(table(rows))
    if args.output:
        args.output.write_text(json.dumps(report(rows), indent=2) + "\n")


if __name__ == "__main__":
    main()
