"""4-bit linears on CUDA against torch's bf16 and fp8 ones: whole layers, bare products, activation quantisation.

Operands are random and of the kind that layers have, since a GPU's power, and so its clock, depends on them: normal
activations with a few large channels, normal weights. Each rival rotates over more weights and inputs than caches hold.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch.nn.functional import layer_norm, linear

from nunchaku_kernels.bench.linear import RANK, W4A8Layer, W4A16Layer, forced
from nunchaku_kernels.bench.report import Row
from nunchaku_kernels.bench.timing_cuda import MODES, Call, CudaTimer, interleaved_modes
from nunchaku_kernels.ops import _native
from nunchaku_kernels.reference.heads import HEAD_DIM, split_heads

TOKENS = (4608,)
"""FLUX at 1024 x 1024: 4096 tokens of the image and 512 of the text."""
SHAPES = ((3072, 9216), (3072, 3072), (3072, 12288), (12288, 3072), (3072, 21504), (15360, 3072))
"""(K, N) of FLUX."""


class WeightOnly(NamedTuple):
    """A layer whose activations stay in 16 bits."""

    tokens: int
    in_features: int
    out_features: int
    group_size: int


WEIGHT_ONLY = (
    WeightOnly(1, 3072, 18432, 64),
    WeightOnly(512, 4096, 4096, 128),
    WeightOnly(512, 4096, 10240, 128),
    WeightOnly(512, 10240, 4096, 128),
)
"""FLUX's modulation, and the layers of T5-XXL."""

ROTATED_BYTES = 300 * 2**20
"""Weights and inputs of one rival together."""
ROUNDS = 3
SECONDS = 0.12

BF16, FP8, FP8_DYNAMIC = "linear/torch-bf16", "product/torch-fp8-rowwise", "linear/torch-fp8-rowwise-dynamic"
"""F.linear with bias; the fp8 product of operands that are quantised already; that and the quantisation of x, each
without a bias, which `_scaled_mm` does not take on every GPU: in their favour."""

HEADS, HEADS_APART = "heads/w4a8", "heads/w4a8-then-torch"
"""q, k and v of attention heads, normalised, rotated and heads first: from the product's own tail, and by torch
operations on what the product stored."""

Rivals = dict[str, list[Call]]


def bench_linear_cuda(
    tokens: Iterable[int] = TOKENS,
    shapes: Iterable[tuple[int, int]] = SHAPES,
    *,
    weight_only: Iterable[WeightOnly] = WEIGHT_ONLY,
    isas: Sequence[str] | None = None,
    seconds: float = SECONDS,
    device: str = "cuda",
    on_step: Callable[[str], None] = lambda name: None,
) -> Iterator[Row]:
    """Time W4A8 and W4A16 on a GPU; every row's name ends in how it was timed, see `CudaTimer`.

    `linear/` rows are whole layers (quantise, product, branch of rank 32, bias), `product/` rows the product alone,
    `heads/` rows the product of a layer whose outputs are q, k and v of heads of 128 channels, up to those heads;
    `quantize/` rows, `-norm` behind a layer norm and a modulation, say what they move in a second. `rank32-share` is
    what the branch takes of a layer. Geometric means are over FLUX's shapes.

    Args:
        tokens: values of M.
        shapes: (K, N) of W4A8 layers, multiples of 128.
        weight_only: W4A16 layers.
        isas: kernel sets to time the product with besides the best one; None for all.
        seconds: of one sustained measurement; there are three per rival.
        device: torch device.
        on_step: told the name of each layer before it is measured.

    Raises:
        ValueError: a device or a kernel set that this machine lacks, or a shape that does not fit.
    """
    place, possible = _device(device)
    unknown = sorted(set(isas or ()) - set(possible))
    if unknown:
        raise ValueError(f"isa: {device} runs {', '.join(possible)}, asked for {', '.join(unknown)}")
    others = [isa for isa in possible[:-1] if isas is None or isa in isas]
    layers = list(shapes)
    for width, out_features in layers:
        if width % 128 or out_features % 128 or width <= 0 or out_features <= 0:
            raise ValueError(f"shape: K and N must be multiples of 128, got {width} and {out_features}")
    timer = partial(interleaved_modes, prepare=CudaTimer(place, seconds), rounds=ROUNDS)
    for m in tokens:
        measured = []
        for width in dict.fromkeys(width for width, _ in layers):
            on_step(f"quantize/K{width}/m{m}")
            yield from quantize_rows(m, width, timer(quantize_rivals(m, width, place)))
        for width, out_features in layers:
            on_step(f"linear/K{width}-N{out_features}/m{m}")
            rivals, note = w4a8_rivals(m, width, out_features, place, others)
            rows = list(linear_rows(f"K{width}-N{out_features}/m{m}", timer(rivals), note))
            measured += rows
            yield from rows
        for width in (width for width, out_features in layers if out_features == 3 * width):
            on_step(f"heads/K{width}-N{3 * width}/m{m}")
            yield from heads_rows(f"K{width}-N{3 * width}/m{m}", timer(heads_rivals(m, width, place)))
        if set(layers) >= set(SHAPES):
            yield from geometric_means(measured, m)
    for layer in weight_only:
        name = f"K{layer.in_features}-N{layer.out_features}/m{layer.tokens}"
        on_step(f"linear/w4a16/{name}")
        yield from linear_rows(name, timer(weight_only_rivals(layer, place)), "")


def _device(device: str) -> tuple[torch.device, list[str]]:
    """The device, with its index, and its kernel sets."""
    place = torch.device(device)
    missing = "" if place.type == "cuda" else "it is not a CUDA device"
    if not missing and not torch.cuda.is_available():
        missing = "torch finds no CUDA device here"
    if not missing:
        place = torch.device("cuda", torch.cuda.current_device() if place.index is None else place.index)
        missing = _native.missing_cuda_kernels(place.index)
    if missing:
        raise ValueError(f"device: expected one with 4-bit CUDA kernels, got {device!r}: {missing}")
    return place, list(_native.kernels(place).isas(place.index))


# ---- who competes ----------------------------------------------------------------------------------------------------


def activations(m: int, width: int, device: torch.device) -> torch.Tensor:
    """bf16 (M, K): normal, one channel of 256 eight times as large."""
    x = torch.randn(m, width, device=device)
    x[:, torch.randperm(width, device=device)[: width // 256]] *= 8
    return x.bfloat16()


def _copies(bytes_each: int) -> range:
    return range(max(2, -(-ROTATED_BYTES // bytes_each)))


def _bf16_calls(m: int, width: int, out_features: int, device: torch.device) -> list[Call]:
    calls: list[Call] = []
    for _ in _copies(2 * width * (m + out_features)):
        weight, bias = (0.02 * torch.randn(size, device=device) for size in ((out_features, width), (out_features,)))
        calls.append(partial(linear, activations(m, width, device), weight.bfloat16(), bias.bfloat16()))
    return calls


def quantize_fp8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x (M, K) -> float8_e4m3fn (M, K) and fp32 scales (M, 1)."""
    values = x.float()
    scales = values.abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / torch.finfo(torch.float8_e4m3fn).max
    return (values / scales).to(torch.float8_e4m3fn), scales


def _fused_quantize_fp8(x: torch.Tensor) -> tuple[Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]], str]:
    """`quantize_fp8` as torch.compile makes it for the shape of x, where it can; and which one it is."""
    torch.compiler.reset()  # else the ninth shape would silently run eagerly
    compiled = torch.compile(quantize_fp8, dynamic=False)
    try:
        compiled(x)
    except Exception:  # no compiler, no triton, an unknown GPU: torch has no common class for these
        return quantize_fp8, "eager"
    return compiled, "compiled"


def w4a8_rivals(m: int, width: int, out_features: int, device: torch.device, isas: Sequence[str]) -> tuple[Rivals, str]:
    """Everybody's calls for one layer, and how the quantisation to fp8 was made."""
    rivals: Rivals = {BF16: _bf16_calls(m, width, out_features, device), FP8: [], FP8_DYNAMIC: []}
    quantize, note = _fused_quantize_fp8(activations(m, width, device))

    def fp8_product(x: torch.Tensor, scales: torch.Tensor, weight: torch.Tensor, row_scales: torch.Tensor) -> object:
        return torch._scaled_mm(x, weight.t(), scales, row_scales.t(), out_dtype=torch.bfloat16, use_fast_accum=True)

    def fp8_linear(x: torch.Tensor, *weight: torch.Tensor) -> object:
        return fp8_product(*quantize(x), *weight)

    for _ in _copies(width * (m + out_features)):
        x, weight = activations(m, width, device), quantize_fp8(0.02 * torch.randn(out_features, width, device=device))
        rivals[FP8].append(partial(fp8_product, *quantize_fp8(x), *weight))
        rivals[FP8_DYNAMIC].append(partial(fp8_linear, x, *weight))

    names = ("linear/w4a8", "linear/w4a8-rank0", "product/w4a8", *(f"product/w4a8-{isa}" for isa in isas))
    rivals |= {name: [] for name in names}
    for _ in _copies(width * (m + out_features // 2)):
        x = activations(m, width, device)
        layer, bare = (W4A8Layer(width, out_features, x.dtype, device, rank=rank) for rank in (RANK, 0))
        rivals["linear/w4a8"].append(partial(layer, x))
        rivals["linear/w4a8-rank0"].append(partial(bare, x))
        product = partial(bare.product, bare.quantize(x))
        rivals["product/w4a8"].append(product)
        for isa in isas:
            rivals[f"product/w4a8-{isa}"].append(partial(forced, _native.CUDA_ISA_VARIABLE, isa, product))
    return rivals, note


def quantize_rivals(m: int, width: int, device: torch.device) -> Rivals:
    """Quantisation with a branch of rank 32, alone and behind a norm and a modulation, in one kernel or by torch first;
    and a copy that moves as many bytes."""
    rivals: Rivals = {name: [] for name in ("quantize/w4a8", "quantize/w4a8-norm", "quantize/torch-norm-w4a8", "copy")}
    for _ in _copies(2 * m * width):
        x = activations(m, width, device)
        layer = W4A8Layer(width, 128, x.dtype, device)
        scale, shift = (torch.randn(1, width, device=device).mul(0.3).to(x.dtype) for _ in range(2))
        rivals["quantize/w4a8"].append(partial(layer.quantize, x))
        rivals["quantize/w4a8-norm"].append(partial(layer.quantize_norm, x, scale, shift))
        rivals["quantize/torch-norm-w4a8"].append(partial(_normalise_and_quantize, layer, x, scale, shift))
        source = torch.randn(quantize_bytes(m, width) // 8, device=device)
        rivals["copy"].append(partial(torch.empty_like(source).copy_, source))
    return rivals


def _normalise_and_quantize(
    layer: W4A8Layer, x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    return layer.quantize(layer_norm(x, x.shape[1:], eps=1e-6) * (1 + scale) + shift)


def heads_rivals(m: int, width: int, device: torch.device) -> Rivals:
    """Heads of one sample of m tokens, from a fused q, k and v without a branch."""
    rivals: Rivals = {HEADS: [], HEADS_APART: []}
    for _ in _copies(width * (m + 3 * width // 2)):
        layer = W4A8Layer(width, 3 * width, torch.bfloat16, device, rank=0)
        quantized = layer.quantize(activations(m, width, device))
        norm_q, norm_k = (torch.rand(HEAD_DIM, device=device).bfloat16() for _ in range(2))
        angles = torch.rand(m, HEAD_DIM // 2, device=device)
        rotary = torch.stack([angles.cos(), angles.sin()], dim=-1)
        rivals[HEADS].append(partial(layer.heads, quantized, norm_q, norm_k, rotary))
        rivals[HEADS_APART].append(partial(_product_then_heads, layer, quantized, norm_q, norm_k, rotary))
    return rivals


def _product_then_heads(
    layer: W4A8Layer,
    quantized: tuple[torch.Tensor, ...],
    norm_q: torch.Tensor,
    norm_k: torch.Tensor,
    rotary: torch.Tensor,
) -> torch.Tensor:
    return split_heads(layer.product(quantized), 1, norm_q=norm_q, norm_k=norm_k, eps=1e-6, rotary=rotary)


def quantize_bytes(m: int, width: int) -> int:
    """Bytes that quantisation has to read and write: x, codes, scales, hidden state, `proj_down`, `smooth`."""
    return m * width * (2 + 1) + 4 * m * (1 + RANK) + 2 * width * (RANK + 1)


def weight_only_rivals(layer: WeightOnly, device: torch.device) -> Rivals:
    """One W4A16 layer against bf16."""
    m, width, out_features, group_size = layer
    ours: list[Call] = []
    for _ in _copies(width * (2 * m + out_features // 2)):
        x = activations(m, width, device)
        ours.append(partial(W4A16Layer(width, out_features, x.dtype, device, group_size=group_size), x))
    return {BF16: _bf16_calls(m, width, out_features, device), "linear/w4a16": ours}


# ---- what is reported ------------------------------------------------------------------------------------------------


def linear_rows(layer: str, times: Mapping[str, Mapping[str, float]], note: str) -> Iterator[Row]:
    """Rows of one layer, in milliseconds: everybody against bf16; ours once more against fp8 with the same extent.

    Args:
        layer: e.g. "K3072-N9216/m4608".
        times: seconds of each rival and mode.
        note: on how fp8 quantises x.
    """
    for mode in MODES:
        for name, measured in times.items():
            against = [] if name == BF16 else [BF16]
            if "/w4a8" in name and FP8 in times:
                against.append(FP8 if name.startswith("product/") else FP8_DYNAMIC)
            if not against:
                yield Row(f"{name}/{layer}/{mode}", 1e3 * measured[mode], "ms")
            for baseline in against:
                label = baseline.split("/")[1] + (f" ({note})" if baseline == FP8_DYNAMIC else "")
                ratio = times[baseline][mode] / measured[mode]
                yield Row(f"{name}/{layer}/{mode}", 1e3 * measured[mode], "ms", label, ratio)
        if "linear/w4a8-rank0" in times:
            whole, bare = times["linear/w4a8"][mode], times["linear/w4a8-rank0"][mode]
            yield Row(f"rank32-share/w4a8/{layer}/{mode}", 100 * (1 - bare / whole), "%")


def quantize_rows(m: int, width: int, times: Mapping[str, Mapping[str, float]]) -> Iterator[Row]:
    """Rows of one quantisation, in GB/s, against a copy of as many bytes."""
    for mode in MODES:
        rates = {name: quantize_bytes(m, width) / measured[mode] / 1e9 for name, measured in times.items()}
        yield Row(f"copy/K{width}/m{m}/{mode}", rates["copy"], "GB/s")
        for name, rate in rates.items():
            if name != "copy":
                yield Row(f"{name}/K{width}/m{m}/{mode}", rate, "GB/s", "copy", rate / rates["copy"])


def heads_rows(layer: str, times: Mapping[str, Mapping[str, float]]) -> Iterator[Row]:
    """Rows of one fused q, k and v, in milliseconds, against torch operations behind the same product."""
    for mode in MODES:
        ours, apart = (times[name][mode] for name in (HEADS, HEADS_APART))
        yield Row(f"{HEADS_APART}/{layer}/{mode}", 1e3 * apart, "ms")
        yield Row(f"{HEADS}/{layer}/{mode}", 1e3 * ours, "ms", HEADS_APART.split("/")[1], apart / ours)


def geometric_means(rows: Sequence[Row], m: int) -> Iterator[Row]:
    """Geometric means, over FLUX's shapes, of what was compared at M tokens."""
    layers = {f"K{width}-N{out_features}" for width, out_features in SHAPES}
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        parts = row.name.split("/")
        if row.ratio is not None and row.baseline is not None and parts[2] in layers:
            groups.setdefault(("/".join([*parts[:2], "flux-geomean", *parts[3:]]), row.baseline), []).append(row)
    for (name, baseline), group in groups.items():
        if len(group) == len(layers):
            value, ratio = (_mean(values) for values in zip(*((r.value, r.ratio or 0.0) for r in group), strict=True))
            yield Row(name, value, "ms", baseline, ratio)


def _mean(values: Iterable[float]) -> float:
    logarithms = [math.log(value) for value in values]
    return math.exp(sum(logarithms) / len(logarithms))
