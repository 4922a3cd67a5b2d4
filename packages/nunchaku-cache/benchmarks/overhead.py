"""What a first-block cache costs per step while it never hits.

uv run python packages/nunchaku-cache/benchmarks/overhead.py -o benchmarks/cache_overhead.json
uv run python packages/nunchaku-cache/benchmarks/overhead.py --device cuda

On the CPU: the 4-bit demo transformer, in processor time of one thread, the fastest steps, since other work may run
beside. On a GPU: a stand-in of FLUX.1's size, 57 blocks of bf16 products on 4608 tokens, medians, since the first steps
run at a higher clock. Steps with and without the cache take turns, some of each in a row.
"""

import argparse
import contextlib
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

import nunchaku_cache
from nunchaku_cache import BlockList, CacheHandle, Family, FirstBlockCache
from nunchaku_kernels.bench import report, table
from nunchaku_kernels.bench.report import Row

SIDES = (8, 16, 32, 64)
"""Of the demo's latents, in tokens: pictures of 128 to 1024 pixels."""
TURN = 8
"""Steps in a row."""
STREAMS = ("hidden_states", "encoder_hidden_states")


class StandInBlock(nn.Module):
    """As many multiplications as a block of FLUX.1 has, in square products."""

    def __init__(self, width: int, products: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, width) / width**0.5)
        self.products = products

    def forward(self, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor, temb: torch.Tensor) -> Any:
        x = torch.cat([encoder_hidden_states, hidden_states], 1)
        y = x
        for _ in range(self.products):
            y = y @ self.weight
        x = x + y * temb[:, None]
        return x.split([encoder_hidden_states.shape[1], hidden_states.shape[1]], 1)


class StandIn(nn.Module):
    """A transformer of such blocks."""

    def __init__(self, width: int = 3072, blocks: int = 57, products: int = 16) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(StandInBlock(width, products) for _ in range(blocks))

    def forward(self, hidden_states: torch.Tensor, timestep: torch.Tensor, encoder_hidden_states: torch.Tensor) -> Any:
        temb = torch.cos(timestep)[:, None].to(hidden_states.dtype).expand(-1, hidden_states.shape[-1]) / 10
        for block in self.blocks:
            encoder_hidden_states, hidden_states = block(hidden_states, encoder_hidden_states, temb)
        return hidden_states


STAND_IN = Family("StandIn", (BlockList("blocks", STREAMS, STREAMS[::-1]),))


def stand_in_step(model: nn.Module, device: torch.device) -> Callable[[], object]:
    """The next step of an endless loop on 4096 image and 512 text tokens."""
    image, text = (torch.randn(1, tokens, 3072, device=device).bfloat16() / 10 for tokens in (4096, 512))
    timesteps = itertools.cycle([1 - i / 50 for i in range(50)])

    def run() -> None:
        model(image, torch.full((1,), next(timesteps), device=device), text)
        torch.cuda.synchronize(device)

    return run


def demo_step(model: Any, side: int) -> Callable[[], object]:
    """The next step of an endless loop on a picture of side x side tokens."""
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
    return lambda: model(**inputs, timestep=torch.full((1,), next(timesteps)), return_dict=False)


@torch.no_grad()
def row(
    name: str,
    run: Callable[[], object],
    handle: CacheHandle,
    seconds: float,
    clock: Callable[[], float],
    average: Callable[[list[float]], float],
) -> Row:
    """A step with the cache against one without."""
    times: dict[str, list[float]] = {"plain": [], "cached": []}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for kind, measured in times.items():
            with handle.disabled() if kind == "plain" else contextlib.nullcontext():
                run()  # the first cached step has nothing to compare with
                for _ in range(TURN):
                    started = clock()
                    run()
                    measured.append(clock() - started)
    plain, cached = (1e3 * average(measured) for measured in times.values())
    return Row(f"cache/overhead/{name}", cached, "ms", f"no cache: {plain:.2f} ms", plain / cached)


def measure(device: torch.device, seconds: float) -> Iterator[Row]:
    """The rows of a device."""
    never = FirstBlockCache(threshold=0)
    if device.type == "cuda":
        model = StandIn().to(device, torch.bfloat16)
        handle = nunchaku_cache.apply(model, never, family=STAND_IN)
        yield row("stand-in", stand_in_step(model, device), handle, seconds, time.perf_counter, statistics.median)
        return
    from nunchaku_models.generation import load_pipeline

    torch.set_num_threads(1)  # a second thread's waiting would count as processor time
    model = load_pipeline().pipeline.transformer
    handle = nunchaku_cache.apply(model, never)
    for side in SIDES:
        yield row(f"demo/m{side * side}", demo_step(model, side), handle, seconds, time.process_time, min)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seconds", type=float, default=30, help="per row")
    args = parser.parse_args()
    rows = list(measure(torch.device(args.device), args.seconds))
    print(table(rows))
    if args.output:
        args.output.write_text(json.dumps(report(rows), indent=2) + "\n")


if __name__ == "__main__":
    main()
