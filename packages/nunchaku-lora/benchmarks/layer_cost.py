"""What the ranks of an adapter cost in one 4-bit layer of FLUX.1's sizes: whole layers on random contents.

uv run python packages/nunchaku-lora/benchmarks/layer_cost.py --isa avx512bf16 amx -o benchmarks/lora_layer_cost.json

Layers with and without adapters, and instruction sets, take turns, the fastest of all turns counts. Times are in
milliseconds.
"""

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import torch

from nunchaku_kernels.nn import LowRankAdapter, SVDQLinear
from nunchaku_kernels.ops._native import ISA_VARIABLE

SHAPES = ((3072, 3072, 1), (3072, 9216, 3), (3072, 12288, 1), (12288, 3072, 1))
"""in_features, out_features, and how many linears are fused."""


def random_layer(in_features: int, out_features: int) -> SVDQLinear:
    """A layer of rank 32."""
    layer = SVDQLinear(in_features, out_features, rank=32)
    for name, parameter in layer.named_parameters():
        if parameter.dtype == torch.int8:
            parameter.random_(-128, 128)
        else:
            parameter.fill_(1) if "smooth" in name else parameter.normal_().mul_(0.02).abs_()
    return layer


def variants(in_features: int, out_features: int, fused: int) -> dict[str, SVDQLinear]:
    """The layer without an adapter, and with one of rank 16 and of rank 128 on every linear."""
    layers = {"none": random_layer(in_features, out_features)}
    height = out_features // fused
    for rank in (16, 128):
        for kind in ("own", "shared") if fused > 1 else ("",):
            layer = layers[f"rank {rank} {kind}".strip()] = random_layer(in_features, out_features)
            down = torch.randn(rank, in_features).bfloat16()
            for i in range(fused):
                own = down if kind == "shared" else torch.randn(rank, in_features).bfloat16()
                up = torch.randn(height, rank).bfloat16()
                layer.attach(LowRankAdapter(own, up, 0.7), (i * height, (i + 1) * height))
    return layers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--tokens", type=int, default=640)
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--isa", nargs="+", default=[""], help="instruction sets, as in NUNCHAKU_CPU_ISA")
    args = parser.parse_args()
    found: dict[str, Any] = {"threads": torch.get_num_threads(), "tokens": args.tokens}
    with torch.no_grad():
        for in_features, out_features, fused in SHAPES:
            x = torch.randn(args.tokens, in_features).bfloat16()
            layers = variants(in_features, out_features, fused)
            best = {(isa, name): float("inf") for isa in args.isa for name in layers}
            for turn in range(args.turns + 1):
                for isa, name in best:
                    os.environ[ISA_VARIABLE] = isa
                    started = time.perf_counter()
                    layers[name](x)
                    if turn:
                        best[isa, name] = min(best[isa, name], 1e3 * (time.perf_counter() - started))
            shape = f"{in_features} -> {out_features}" + (f", {fused} fused" if fused > 1 else "")
            for isa, name in best:
                value, more = best[isa, name], f"{best[isa, name] / best[isa, 'none'] - 1:+.1%}"
                found.setdefault(isa or "best instruction set", {}).setdefault(shape, {})[name] = {
                    "ms": round(value, 2),
                    "more": more,
                }
    print(json.dumps(found, indent=2))
    if args.output:
        args.output.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
