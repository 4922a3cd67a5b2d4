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
from nunchaku_kernels.formats import padded_groups
from nunchaku_kernels.ops._native import ISA_VARIABLE, extension
from nunchaku_kernels.reference.heads import HEAD_DIM

RANK = 32
ROTATED_BYTES = 256 * 2**20
"""Weights of one rival together: larger than the caches of the machines this runs on."""

Call = Callable[[], object]


class W4A8Layer:
    """A random W4A8 linear with bias; its entries are independent, so that published and natural order are the same."""

    def __init__(
        self, width: int, out_features: int, dtype: torch.dtype, device: torch.device, *, rank: int = RANK
    ) -> None:
        self.out_features, self.dtype = out_features, dtype
        normal = partial(torch.randn, device=device)
        self.qweight = _random_qweight(out_features, width // 2, device)
        wscales = normal(width // 64, out_features).mul(0.3).exp().mul(0.01).to(dtype)
        self.folded = torch.ops.nunchaku_kernels.w4a8_fold_scales(self.qweight, wscales)
        self.smooth = normal(width).mul(0.3).exp().to(dtype)
        self.down, self.up = (normal(n, rank).mul(0.1).to(dtype) if rank else None for n in (width, out_features))
        self.bias = normal(out_features).to(dtype)

    def quantize(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The first half."""
        result: tuple[torch.Tensor, ...] = torch.ops.nunchaku_kernels.w4a8_quantize(x, self.smooth, 0.0, self.down)
        return result

    def quantize_norm(self, x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The same behind a layer norm, with its modulation by scale and shift (1, K)."""
        result: tuple[torch.Tensor, ...] = torch.ops.nunchaku_kernels.w4a8_quantize_norm(
            x, scale, shift, 1e-6, self.smooth, self.down
        )
        return result

    def heads(
        self, quantized: tuple[torch.Tensor, ...], norm_q: torch.Tensor, norm_k: torch.Tensor, rotary: torch.Tensor
    ) -> torch.Tensor:
        """`product` of a fused q, k and v, as (3, 1, H, T, 128) heads; see `reference.heads.split_heads`."""
        tokens = quantized[0].shape[0]
        out = torch.empty(
            3, 1, self.out_features // 3 // HEAD_DIM, tokens, HEAD_DIM, dtype=self.dtype, device=self.qweight.device
        )
        torch.ops.nunchaku_kernels.w4a8_linear_heads(
            *quantized, self.qweight, *self.folded, None, None, None, None, norm_q, norm_k, 1e-6, rotary, out, 0
        )
        return out

    def product(self, quantized: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """The second half of a layer without a branch, and without its bias."""
        return self._linear(quantized, None, None)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._linear(self.quantize(x), self.up, self.bias)

    def _linear(
        self, quantized: tuple[torch.Tensor, ...], up: torch.Tensor | None, bias: torch.Tensor | None
    ) -> torch.Tensor:
        result: torch.Tensor = torch.ops.nunchaku_kernels.w4a8_linear(
            *quantized, self.qweight, *self.folded, up, None, None, bias, out_features=self.out_features,
            out_dtype=self.dtype,
        )  # fmt: skip
        return result


class W4A16Layer:
    """A random W4A16 linear with bias."""

    def __init__(
        self, width: int, out_features: int, dtype: torch.dtype, device: torch.device, *, group_size: int = 64
    ) -> None:
        groups = padded_groups(width // group_size, group_size)
        self.group_size = group_size
        self.qweight = _random_qweight(out_features // 4, 2 * width, device).view(torch.int32)
        self.wscales = torch.randn(groups, out_features, device=device).mul(0.3).exp().mul(0.01).to(dtype)
        self.wzeros = -7 * self.wscales
        self.bias = torch.randn(out_features, device=device).to(dtype)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = torch.ops.nunchaku_kernels.w4a16_linear(
            x, self.qweight, self.wscales, self.wzeros, self.bias, self.group_size
        )
        return result


def _random_qweight(rows: int, columns: int, device: torch.device) -> torch.Tensor:
    """int8 of two codes each: normal on a GPU, whose power depends on them; uniform on the CPU, where normal ones would
    take longer to make than to measure."""
    if device.type == "cpu":
        return torch.randint(-128, 128, (rows, columns), dtype=torch.int8)
    codes = torch.randn(2, rows, columns, device=device).mul_(2.7).round_().clamp_(-8, 7).to(torch.int8)
    return codes[0] & 15 | codes[1] << 4


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
    for name, kind in (("w4a8", W4A8Layer), ("w4a16", W4A16Layer)):
        copies = range(_copies(width * out_features, 0.5))
        calls = [partial(kind(width, out_features, x.dtype, x.device), x) for _ in copies]
        for isa in isas:
            rivals[f"{name}@{isa}" if isa else name] = [partial(forced, ISA_VARIABLE, isa, call) for call in calls]
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


def forced(variable: str, isa: str, call: Call) -> object:
    """`call` with the kernels that an environment variable asks for; as it is for an empty name."""
    with _environment(variable, isa):
        return call()


@contextmanager
def _environment(variable: str, isa: str) -> Iterator[None]:
    before = os.environ.get(variable)
    if isa:
        os.environ[variable] = isa
    try:
        yield
    finally:
        if isa:
            os.environ.pop(variable)
            if before is not None:
                os.environ[variable] = before
