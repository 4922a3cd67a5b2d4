"""4-bit linears against torch's own, whole operators: quantised activations, low-rank branch and bias included."""

import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch.nn.functional import linear

from nunchaku_kernels.bench.report import Row
from nunchaku_kernels.bench.timing import interleaved_medians
from nunchaku_kernels.ops._native import ISA_VARIABLE, extension

RANK = 32
ROTATED_BYTES = 256 * 2**20
"""Weights of one rival together: larger than the caches of the machines this runs on."""

Call = Callable[[], object]


def w4a8_call(x: torch.Tensor, out_features: int) -> Call:
    """A W4A8 linear (rank 32, bias) on random published tensors."""
    operators, width = torch.ops.nunchaku_kernels, x.shape[1]
    qweight = torch.randint(-128, 128, (out_features, width // 2), dtype=torch.int8)
    wscales = torch.rand(width // 64, out_features).add(0.1).to(x.dtype)
    smooth, down = torch.rand(width).add(0.5).to(x.dtype), torch.randn(width, RANK).to(x.dtype)
    up, bias = torch.randn(out_features, RANK).to(x.dtype), torch.randn(out_features).to(x.dtype)
    folded = operators.w4a8_fold_scales(qweight, wscales)

    def call() -> object:
        quantized = operators.w4a8_quantize(x, smooth, 0.0, down)
        return operators.w4a8_linear(
            *quantized, qweight, *folded, up, None, None, bias, out_features=out_features, out_dtype=x.dtype
        )

    return call


def w4a16_call(x: torch.Tensor, out_features: int) -> Call:
    """A W4A16 linear (group 64, bias) on random published tensors."""
    width = x.shape[1]
    qweight = torch.randint(-(2**31), 2**31, (out_features // 4, width // 2), dtype=torch.int32)
    groups = (width // 64 + 15) // 16 * 16
    wscales, bias = torch.rand(groups, out_features).to(x.dtype), torch.randn(out_features).to(x.dtype)
    wzeros = -7 * wscales
    return lambda: torch.ops.nunchaku_kernels.w4a16_linear(x, qweight, wscales, wzeros, bias, 64)


def bench_linear(
    tokens: Iterable[int],
    shapes: Iterable[tuple[int, int]],
    *,
    isas: Iterable[str] = (),
    seconds: float = 2.0,
    clock: Callable[[], float] = time.perf_counter,
) -> Iterator[Row]:
    """Time W4A8 and W4A16 on the CPU against torch in bf16; torch in fp32 is timed too.

    Args:
        tokens: values of M.
        shapes: (K, N), multiples of 128.
        isas: instruction sets to force; default: what the machine picks.
        seconds: measuring time per shape and M.
        clock: see `interleaved_medians`.

    Raises:
        ValueError: an instruction set that this machine lacks, or a shape that does not fit.
    """
    native = extension()
    possible = [] if native is None else native.isas()
    unknown = sorted(set(isas) - set(possible))
    if unknown:
        raise ValueError(f"isa: this machine runs {', '.join(possible)}, asked for {', '.join(unknown)}")
    for width, out_features in shapes:
        if width % 128 or out_features % 128 or width <= 0 or out_features <= 0:
            raise ValueError(f"shape: K and N must be multiples of 128, got {width} and {out_features}")
        for m in tokens:
            yield from _one(m, width, out_features, list(isas) or [""], seconds, clock)


def _one(
    m: int, width: int, out_features: int, isas: list[str], seconds: float, clock: Callable[[], float]
) -> Iterator[Row]:
    x = torch.randn(m, width).bfloat16()
    rivals: dict[str, list[Call]] = {}
    for dtype, name in ((torch.bfloat16, "torch-bf16"), (torch.float32, "torch-fp32")):
        weights = [
            torch.randn(out_features, width).to(dtype) for _ in range(_copies(width * out_features, dtype.itemsize))
        ]
        rivals[name] = [partial(linear, x.to(dtype), weight) for weight in weights]
    for name, make in (("w4a8", w4a8_call), ("w4a16", w4a16_call)):
        calls = [make(x, out_features) for _ in range(_copies(width * out_features, 0.5))]
        for isa in isas:
            rivals[f"{name}@{isa}" if isa else name] = [partial(_forced, isa, call) for call in calls]
    medians = interleaved_medians(rivals, seconds=seconds, clock=clock)
    for name, median in medians.items():
        yield Row(
            f"linear/{name}/K{width}-N{out_features}/m{m}",
            median * 1e3,
            "ms",
            None if name == "torch-bf16" else "torch-bf16",
            None if name == "torch-bf16" else medians["torch-bf16"] / median,
        )


def _copies(elements: int, bytes_each: float) -> int:
    return max(2, -(-ROTATED_BYTES // int(elements * bytes_each)))


def _forced(isa: str, call: Call) -> object:
    with _environment(isa):
        return call()


@contextmanager
def _environment(isa: str) -> Iterator[None]:
    before = os.environ.get(ISA_VARIABLE)
    if isa:
        os.environ[ISA_VARIABLE] = isa
    try:
        yield
    finally:
        if isa:
            os.environ.pop(ISA_VARIABLE)
            if before is not None:
                os.environ[ISA_VARIABLE] = before
