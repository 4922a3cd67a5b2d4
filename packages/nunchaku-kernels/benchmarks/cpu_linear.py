"""Time the CPU's 4-bit linears against torch's bf16 and fp32 `F.linear` on the same machine, in the same process.

    python packages/nunchaku-kernels/benchmarks/cpu_linear.py --tokens 1 16 96 512 --threads 2

W4A8 times include quantising the activations, the low-rank branch (rank 32) and the bias. Each cell is the best of a
second of runs: GOPS = 2 * tokens * inputs * outputs / time. `--clock cpu` counts processor time instead of elapsed
time; with `--threads 1` that is the number to trust on a machine that others use too.
"""

import argparse
import os
import time
from collections.abc import Callable
from functools import partial

import torch
from torch.nn.functional import linear

from nunchaku_kernels.ops._native import ISA_VARIABLE, extension

OPS = torch.ops.nunchaku_kernels
RANK = 32


def best_seconds(function: Callable[[], object], clock: Callable[[], float], budget: float = 1.0) -> float:
    """Shortest run within `budget` seconds of elapsed time, after one run to warm up; at least three runs."""
    function()
    runs: list[float] = []
    end = time.perf_counter() + budget
    while len(runs) < 3 or time.perf_counter() < end:
        start = clock()
        function()
        runs.append(clock() - start)
    return min(runs)


def w4a8_call(x: torch.Tensor, outputs: int) -> Callable[[], object]:
    """One whole W4A8 linear on random published tensors."""
    inputs = x.shape[1]
    qweight = torch.randint(-128, 128, (outputs, inputs // 2), dtype=torch.int8)
    wscales = torch.rand(inputs // 64, outputs).add(0.1).to(x.dtype)
    smooth, down = torch.rand(inputs).add(0.5).to(x.dtype), torch.randn(inputs, RANK).to(x.dtype)
    up, bias = torch.randn(outputs, RANK).to(x.dtype), torch.randn(outputs).to(x.dtype)
    row_scales, multipliers = OPS.w4a8_fold_scales(qweight, wscales)

    def call() -> object:
        quantised = OPS.w4a8_quantize(x, smooth, 0.0, down)
        tail = (up, None, None, bias)
        return OPS.w4a8_linear(
            *quantised, qweight, row_scales, multipliers, *tail, out_features=outputs, out_dtype=x.dtype
        )

    return call


def w4a16_call(x: torch.Tensor, outputs: int) -> Callable[[], object]:
    """One W4A16 linear (group 64) on random published tensors."""
    inputs = x.shape[1]
    qweight = torch.randint(-(2**31), 2**31, (outputs // 4, inputs // 2), dtype=torch.int32)
    groups = (inputs // 64 + 15) // 16 * 16
    wscales, bias = torch.rand(groups, outputs).to(x.dtype), torch.randn(outputs).to(x.dtype)
    wzeros = -7 * wscales
    return lambda: OPS.w4a16_linear(x, qweight, wscales, wzeros, bias, 64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 96, 512])
    parser.add_argument("--inputs", type=int, default=3072)
    parser.add_argument("--outputs", type=int, default=9216)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", choices=["elapsed", "cpu"], default="elapsed")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    clock = time.perf_counter if arguments.clock == "elapsed" else time.process_time
    module = extension()
    assert module is not None, "the compiled extension is missing"

    print(f"{arguments.inputs} -> {arguments.outputs}, {arguments.threads} threads, {arguments.clock} time")
    print("| tokens | what | ms | GOPS | times torch bf16 |\n|---|---|---|---|---|")
    for tokens in arguments.tokens:
        x = torch.randn(tokens, arguments.inputs).bfloat16()
        weight = torch.randn(arguments.outputs, arguments.inputs).bfloat16()
        calls: dict[str, Callable[[], object]] = {
            "torch bf16": partial(linear, x, weight),
            "torch fp32": partial(linear, x.float(), weight.float()),
        }
        for name, call in (("w4a8", w4a8_call), ("w4a16", w4a16_call)):
            calls |= {f"{name} {isa}": call(x, arguments.outputs) for isa in module.isas()[1:]}
        reference = 0.0
        for name, function in calls.items():
            os.environ[ISA_VARIABLE] = name.split()[1] if name.startswith("w4") else ""
            seconds = best_seconds(function, clock)
            reference = reference or seconds
            gops = 2e-9 * tokens * arguments.inputs * arguments.outputs / seconds
            print(f"| {tokens} | {name} | {seconds * 1e3:.2f} | {gops:.0f} | {reference / seconds:.2f} |", flush=True)


if __name__ == "__main__":
    main()
