"""The CUDA kernels against their plain-torch definition and the CPU's: integers bit for bit, floats within bounds."""

import math
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nunchaku_kernels import _C
from nunchaku_kernels.formats import (
    pack_awq,
    pack_awq_int16,
    pack_awq_scales,
    pack_lowrank_down,
    pack_lowrank_up,
    pack_qweight,
    pack_vector,
    pack_wscales,
)
from nunchaku_kernels.ops import _native
from nunchaku_kernels.reference import w4a8, w4a16
from nunchaku_kernels.reference.epilogue import epilogue
from nunchaku_kernels.reference.heads import split_heads

pytestmark = pytest.mark.cuda

OPS = torch.ops.nunchaku_kernels
GPU = torch.device("cuda", 0)
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
ROUNDING = {torch.float32: 2**-18, torch.float16: 2**-10, torch.bfloat16: 2**-7}
FACTOR_ROUNDING = {torch.float32: 2**-18, torch.float16: 2**-11, torch.bfloat16: 2**-8}
"""Of the low-rank hidden state between the two operators, and of a factor with the scale of its rank."""
SMALLEST = {torch.float32: 1e-30, torch.float16: 2.0**-25, torch.bfloat16: 1e-30}
"""What rounding to a dtype may lose of a number below its smallest normal one."""
FINITE = {dtype: torch.finfo(dtype).max for dtype in DTYPES}
WEIGHT_ROUNDING = {torch.float32: 2**-23, torch.float16: 2**-11, torch.bfloat16: 2**-8}
"""Of a W4A16 weight by the definition; a kernel may also leave weights exact."""
SHIFT = 0.171875
GUARD, POISON = 4096, 0xFF
"""Bytes around an output, and the byte they are filled with: NaN in every float type."""

ISAS: list[str] = [""] if _native.missing_cuda_kernels(0) else _C.cuda.isas(0)
isas = pytest.mark.parametrize("isa", ISAS)
dtypes = st.sampled_from(list(DTYPES))
seeds = st.integers(0, 2**31)
tokens_up_to_300 = st.integers(1, 40) | st.sampled_from([63, 64, 65, 127, 128, 129, 192, 255, 256, 257, 300])
examples = settings(max_examples=25, deadline=None)


def force(isa: str) -> AbstractContextManager[Any]:
    return patch.dict(os.environ, {_native.CUDA_ISA_VARIABLE: isa})


@contextmanager
def guarded_outputs() -> Iterator[None]:
    """Operators write into poisoned tensors in the middle of larger buffers, whose rest must stay as it is."""
    buffers = []

    def empty(*shape: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        size = math.prod(shape) * dtype.itemsize
        buffers.append(torch.full((size + 2 * GUARD,), POISON, dtype=torch.uint8, device=device))
        return buffers[-1][GUARD : GUARD + size].view(dtype).view(shape)

    with patch.object(torch, "empty", empty):
        yield
    assert buffers
    for buffer in buffers:
        assert (buffer[:GUARD] == POISON).all() and (buffer[-GUARD:] == POISON).all()


def guarded(operator: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
    """An operator's result, the same from run to run, and nothing written beside it."""
    with guarded_outputs():
        result = operator(*arguments, **keywords)
    again = operator(*arguments, **keywords)
    for one, other in zip(*[r if isinstance(r, tuple) else (r,) for r in (result, again)], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
    return result


def code_positions(k: int) -> torch.Tensor:
    """Where CUDA keeps the code of each input channel: `w4a8_code_position` of csrc/numerics/layout.h."""
    channel = torch.arange(k, device=GPU)
    rank = channel % 4 * 2 + channel % 8 // 4
    return channel // 64 * 64 + channel % 64 // 32 * 32 + rank // 4 * 16 + channel % 32 // 8 * 4 + rank % 4


def natural(codes: torch.Tensor) -> torch.Tensor:
    """Codes as CUDA keeps them -> codes in the order of channels."""
    return codes[:, code_positions(codes.shape[1])]


def permuted(codes: torch.Tensor) -> torch.Tensor:
    """Codes in the order of channels -> codes as CUDA keeps them."""
    result = torch.empty_like(codes)
    result[:, code_positions(codes.shape[1])] = codes
    return result


def multiplier_positions(rows: int, groups: int) -> torch.Tensor:
    """Where CUDA keeps the multiplier of a row and group: 128 rows of a group together, rows 8 apart side by side."""
    n, g = torch.arange(rows, device=GPU)[:, None], torch.arange(groups, device=GPU)
    return (n // 128 * groups + g) * 128 + n % 128 // 16 * 16 + n % 8 * 2 + n % 16 // 8


def natural_multipliers(multipliers: torch.Tensor) -> torch.Tensor:
    """Multipliers as CUDA keeps them -> [rows, groups]."""
    return multipliers.flatten()[multiplier_positions(*multipliers.shape)]


def permuted_multipliers(multipliers: torch.Tensor) -> torch.Tensor:
    """Multipliers [rows, groups] -> as CUDA keeps them."""
    result = torch.empty_like(multipliers).flatten()
    result[multiplier_positions(*multipliers.shape)] = multipliers
    return result.view(multipliers.shape)


class Draw:
    """Seeded random tensors on the GPU."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator(GPU).manual_seed(seed)

    def integers(self, low: int, high: int, *shape: int, dtype: torch.dtype = torch.int8) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=self.generator, dtype=dtype, device=GPU)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator, device=GPU).to(dtype)

    def weight(self, n: int, k: int) -> torch.Tensor:
        """int4 codes over all of -8..7; some groups and one channel are zero, one channel is extreme."""
        codes = self.integers(-8, 8, n, k)
        codes.view(n, -1, 64)[self.normal(n, k // 64) > 1.3] = 0
        codes[0] = 0
        codes[1] = torch.where(self.normal(k) > 0, 7, -8)
        return codes

    def scales(self, n: int, k: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return self.normal(n, k // 64).mul(2).exp().mul(0.01).to(dtype)

    def tokens(self, m: int, k: int) -> torch.Tensor:
        """int8 codes of activations, every third token at the extremes."""
        codes = self.integers(-127, 128, m, k)
        codes[::3] = torch.where(codes[::3] > 0, 127, -127)
        return codes


# ---- W4A8: weights ---------------------------------------------------------------------------------------------------


@isas
@given(seed=seeds, blocks=st.integers(1, 5), groups=st.integers(1, 40), dtype=dtypes)
@examples
def test_fold_scales_is_exact(isa: str, seed: int, blocks: int, groups: int, dtype: torch.dtype) -> None:
    draw = Draw(seed)
    n, k = 128 * blocks, 128 * groups
    codes, scales = draw.weight(n, k), draw.scales(n, k, dtype)
    with force(isa):
        row_scales, multipliers = guarded(OPS.w4a8_fold_scales, pack_qweight(codes), pack_wscales(scales))
    expected = w4a8.fold_scales(codes.cpu(), scales.cpu())
    assert torch.equal(row_scales.cpu(), expected[0])
    assert torch.equal(natural_multipliers(multipliers).cpu(), expected[1])


# ---- W4A8: activations -----------------------------------------------------------------------------------------------


@isas
@given(
    seed=seeds,
    tokens=tokens_up_to_300,
    channels=st.integers(1, 700) | st.sampled_from([128, 512, 1536, 3072, 3080, 12288, 15360]),
    slack=st.sampled_from([0, 1, 5, 8]),
    padding=st.integers(0, 2),
    dtype=dtypes,
    factor_dtypes=st.tuples(dtypes, dtypes),
    smooth=st.booleans(),
    rank=st.sampled_from([0, 16, 32, 48, 160]),
    shift=st.sampled_from([0.0, SHIFT, -1.0]),
    exponent=st.integers(-40, 10),
)
@settings(max_examples=60, deadline=None)
def test_quantize_is_exact(
    isa: str,
    seed: int,
    tokens: int,
    channels: int,
    slack: int,
    padding: int,
    dtype: torch.dtype,
    factor_dtypes: tuple[torch.dtype, torch.dtype],
    smooth: bool,
    rank: int,
    shift: float,
    exponent: int,
) -> None:
    draw = Draw(seed)
    padded = (channels + 127) // 128 * 128 + 128 * padding
    if not smooth and not rank:
        channels = padded  # nothing else says how wide the codes are
    x = draw.normal(tokens, channels + slack).mul(2.0**exponent).to(dtype)[:, :channels]
    factors = draw.normal(padded).abs().add(0.1).to(factor_dtypes[0]) if smooth else None
    down = draw.normal(rank, padded, dtype=factor_dtypes[1]) if rank else None
    with force(isa):
        codes, ascales, hidden = guarded(
            OPS.w4a8_quantize,
            x,
            None if factors is None else pack_vector(factors),
            shift,
            None if down is None else pack_lowrank_down(down),
        )
    expected = w4a8.quantize_tokens(x.cpu(), None if factors is None else factors[:channels].cpu(), shift)
    codes = natural(codes)
    assert torch.equal(codes[:, :channels].cpu(), expected[0])
    assert not codes[:, channels:].any()
    torch.testing.assert_close(ascales.cpu(), expected[1], rtol=0, atol=0, equal_nan=True)
    assert hidden.shape == (tokens, rank)
    if down is not None:
        x, down = x.double(), down[:, :channels].double()
        bound = 2**-16 * (x.abs() @ down.abs().t()) + FACTOR_ROUNDING[hidden.dtype] * (x @ down.t()).abs()
        assert hidden.dtype == factor_dtypes[1]
        wrong = (hidden - (x @ down.t()).clamp(-FINITE[hidden.dtype], FINITE[hidden.dtype])).abs() > bound + SMALLEST[
            hidden.dtype
        ]
        assert not wrong.any()


@isas
@pytest.mark.parametrize("channels", [3072, 3968, 12288, 15360])
@pytest.mark.parametrize("rank", [0, 32])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_quantize_of_many_tokens(isa: str, channels: int, rank: int, dtype: torch.dtype) -> None:
    draw, tokens = Draw(channels), 4601
    x = draw.normal(tokens, channels, dtype=dtype)
    smooth = draw.normal(channels).abs().add(0.1).to(dtype)
    down = draw.normal(rank, channels, dtype=dtype) if rank else None
    packed = None if down is None else pack_lowrank_down(down)
    with force(isa):
        codes, ascales, hidden = guarded(OPS.w4a8_quantize, x, pack_vector(smooth), SHIFT, packed)
    looked_at = torch.arange(0, tokens, 17)
    expected = w4a8.quantize_tokens(x[looked_at].cpu(), smooth.cpu(), SHIFT)
    assert torch.equal(natural(codes[looked_at]).cpu(), expected[0])
    assert torch.equal(ascales[looked_at].cpu(), expected[1])
    if down is not None:
        x, down = x.double(), down.double()
        relative = 2**-16 + FACTOR_ROUNDING[hidden.dtype]
        assert ((hidden - x @ down.t()).abs() <= relative * (x.abs() @ down.abs().t())).all()


@isas
def test_quantize_rounds_half_to_even(isa: str) -> None:
    steps = torch.arange(-127, 127.5, 0.5)  # the largest is 127, so one step is exactly 1
    x = torch.cat([steps, torch.zeros(640 - steps.numel())]).to(GPU)[None]
    with force(isa):
        codes, ascales, _ = OPS.w4a8_quantize(x, None, 0.0, None)
    assert ascales.item() == 1.0
    assert torch.equal(natural(codes)[0, : steps.numel()].cpu(), steps.round().to(torch.int8))


@isas
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("position", [0, 31, 66, 127])
@pytest.mark.parametrize("dtype", DTYPES)
def test_quantize_marks_non_finite_tokens(isa: str, value: float, position: int, dtype: torch.dtype) -> None:
    x = torch.ones(3, 128, device=GPU, dtype=dtype)
    x[1, position] = value
    with force(isa):
        codes, ascales, _ = OPS.w4a8_quantize(x, None, 0.0, None)
    assert torch.isnan(ascales).tolist() == [False, True, False]
    assert not codes[1].any()
    assert (codes[::2] == 127).all()


@isas
@pytest.mark.parametrize("magnitude", [0.0, 1e-45, 1e-38, 2.0**-122, 2.0**-120, 3e38])
def test_quantize_extreme_tokens(isa: str, magnitude: float) -> None:
    x = torch.linspace(-1, 1, 128)[None] * magnitude
    with force(isa):
        codes, ascales, _ = OPS.w4a8_quantize(x.to(GPU), None, 0.0, None)
    expected = w4a8.quantize_tokens(x)
    assert torch.equal(natural(codes).cpu(), expected[0])
    assert torch.equal(ascales.cpu(), expected[1])


MODULATED = {torch.float32: 1e-5, torch.float16: 2**-9, torch.bfloat16: 2**-6}
"""Of a maximum behind a norm: a modulated value may round to the neighbouring one."""


@isas
@given(
    seed=seeds,
    tokens=st.integers(1, 40),
    rows=st.sampled_from([1, 2, 3, 7]),
    channels=st.integers(1, 700) | st.sampled_from([128, 512, 1536, 3072, 3080, 5120, 15360]),
    slack=st.sampled_from([0, 1, 8]),
    padding=st.integers(0, 2),
    dtype=dtypes,
    factor_dtypes=st.none() | st.tuples(dtypes, dtypes),
    rank=st.sampled_from([0, 16, 32, 48]),
    mean=st.sampled_from([0.0, 1.0, -30.0]),
    eps=st.sampled_from([1e-6, 0.1]),
)
@settings(max_examples=60, deadline=None)
def test_quantize_norm(
    isa: str,
    seed: int,
    tokens: int,
    rows: int,
    channels: int,
    slack: int,
    padding: int,
    dtype: torch.dtype,
    factor_dtypes: tuple[torch.dtype, torch.dtype] | None,
    rank: int,
    mean: float,
    eps: float,
) -> None:
    draw = Draw(seed)
    tokens *= rows
    padded = (channels + 127) // 128 * 128 + 128 * padding
    smooth_dtype, down_dtype = factor_dtypes or (dtype, dtype)
    x = draw.normal(tokens, channels + slack).add(mean).to(dtype)[:, :channels]
    scale, shift = (draw.normal(rows, channels).mul(0.3).to(dtype) for _ in range(2))
    smooth = draw.normal(padded).abs().add(0.1).to(smooth_dtype)
    down = draw.normal(rank, padded, dtype=down_dtype) if rank else None
    with force(isa):
        codes, ascales, hidden = guarded(
            OPS.w4a8_quantize_norm,
            x,
            scale,
            shift,
            eps,
            pack_vector(smooth),
            None if down is None else pack_lowrank_down(down),
        )
    value = x.double()
    value = (value - value.mean(1, keepdim=True)) / (value.var(1, correction=0, keepdim=True) + eps).sqrt()
    value = value.view(rows, -1, channels) * (1 + scale.double()[:, None]) + shift.double()[:, None]
    value = value.view(tokens, channels).to(dtype)
    expected = w4a8.quantize_tokens(value.cpu(), smooth[:channels].cpu())
    codes = natural(codes)
    assert ((codes[:, :channels].cpu().int() - expected[0].int()).abs() <= 1).all()
    assert not codes[:, channels:].any()
    cancelled = 1 + abs(mean)  # what fp32 loses when it takes the mean away
    torch.testing.assert_close(ascales.cpu(), expected[1], rtol=cancelled * MODULATED[dtype], atol=1e-30)
    if down is not None:
        value, down = value.double(), down[:, :channels].double()
        relative = cancelled * MODULATED[dtype] + FACTOR_ROUNDING[hidden.dtype]
        assert ((hidden - value @ down.t()).abs() <= relative * (value.abs() @ down.abs().t()) + 1e-30).all()


@isas
@pytest.mark.parametrize(("tokens", "rows"), [(4608, 1), (4608, 2), (9, 9), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_quantize_norm_as_flux_has_it(isa: str, tokens: int, rows: int, dtype: torch.dtype) -> None:
    """Nearly every code is that of the torch operations."""
    draw = Draw(tokens)
    x = draw.normal(tokens, 3072).mul(3).to(dtype)
    scale, shift = (draw.normal(rows, 3072).mul(0.3).to(dtype) for _ in range(2))
    smooth = pack_vector(draw.normal(3072).abs().add(0.1).to(dtype))
    down = pack_lowrank_down(draw.normal(32, 3072, dtype=dtype))
    normalised = torch.nn.functional.layer_norm(x.float(), (3072,), eps=1e-6).view(rows, -1, 3072)
    modulated = (normalised * (1 + scale.float()[:, None]) + shift.float()[:, None]).to(dtype).view(tokens, 3072)
    with force(isa):
        codes, ascales, hidden = guarded(OPS.w4a8_quantize_norm, x, scale, shift, 1e-6, smooth, down)
        expected = OPS.w4a8_quantize(modulated, smooth, 0.0, down)
    assert (codes != expected[0]).float().mean() < 1e-2
    torch.testing.assert_close(ascales, expected[1], rtol=MODULATED[dtype], atol=0)
    rtol = 2e-3 + 2 * FACTOR_ROUNDING[dtype]
    torch.testing.assert_close(hidden, expected[2], rtol=rtol, atol=2e-3 * float(hidden.abs().max()))


@isas
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_quantize_norm_marks_non_finite_tokens(isa: str, value: float) -> None:
    x = Draw(1).normal(3, 3072, dtype=torch.bfloat16)
    x[1, 2000] = value
    modulation = torch.zeros(1, 3072, device=GPU, dtype=torch.bfloat16)
    with force(isa):
        codes, ascales, _ = OPS.w4a8_quantize_norm(x, modulation, modulation, 1e-6, None, None)
    assert torch.isnan(ascales).tolist() == [False, True, False]
    assert not codes[1].any()


# ---- W4A8: the integer product ---------------------------------------------------------------------------------------


def accumulate(codes: torch.Tensor, qweight: torch.Tensor, multipliers: torch.Tensor, isa: str) -> torch.Tensor:
    """int32 sums [M, N] of codes in the order of channels, by the kernel set `isa`."""
    (m, k), n = codes.shape, qweight.shape[0]
    codes, multipliers = permuted(codes), permuted_multipliers(multipliers)
    with guarded_outputs():
        sums = torch.empty(m, n, dtype=torch.int32, device=GPU)
        stream = torch.cuda.current_stream(GPU).cuda_stream
        _C.cuda.w4a8_accumulate(
            codes.data_ptr(), qweight.data_ptr(), multipliers.data_ptr(), m, n, k, sums.data_ptr(), 0, stream, isa
        )
    return sums


@isas
@given(seed=seeds, tokens=tokens_up_to_300, blocks=st.integers(1, 6), groups=st.integers(1, 10))
@settings(max_examples=60, deadline=None)
def test_sums_are_those_of_the_cpu(isa: str, seed: int, tokens: int, blocks: int, groups: int) -> None:
    draw = Draw(seed)
    n, k = 128 * blocks, 128 * groups
    codes, t8 = draw.weight(n, k), draw.tokens(tokens, k)
    multipliers = w4a8.fold_scales(codes, draw.scales(n, k))[1]
    qweight = pack_qweight(codes)
    sums = accumulate(t8, qweight, multipliers, isa)
    on_cpu = [tensor.cpu() for tensor in (t8, qweight, multipliers)]
    expected = torch.empty(tokens, n, dtype=torch.int32)
    _C.w4a8_accumulate(*[tensor.data_ptr() for tensor in on_cpu], tokens, n, k, expected.data_ptr(), 2, "")
    assert torch.equal(sums.cpu(), expected)
    assert torch.equal(sums, accumulate(t8, qweight, multipliers, isa))


@isas
@pytest.mark.parametrize(
    ("tokens", "n", "k"),
    [
        (4608, 3072, 3072),
        (4608, 9216, 3072),
        (4608, 3072, 12288),
        (4095, 21504, 3072),
        (4609, 3072, 15360),
        (513, 1152, 3200),
        (100_000, 384, 256),
        (7, 384, 132_992),
        (200, 256, 132_992),
    ],
)
def test_sums_of_large_products(isa: str, tokens: int, n: int, k: int) -> None:
    draw = Draw(k)
    codes, t8 = draw.weight(n, k), draw.tokens(tokens, k)
    multipliers = w4a8.fold_scales(codes, draw.scales(n, k))[1]
    if k == 132_992:  # as large as sums can get: 127 * 127 * K, just below 2^31
        codes[1], multipliers[1] = 7, 2 * round(128 * 127 / 7)
        t8[0] = 127
    sums = accumulate(t8, pack_qweight(codes), multipliers, isa)
    assert torch.equal(sums, w4a8.accumulate(t8, w4a8.decode_int8(codes, multipliers)))
    assert k != 132_992 or sums[0, 1] == 127 * 127 * k


@isas
@pytest.mark.parametrize("tokens", [1, 128])
def test_sums_of_every_code_and_multiplier(isa: str, tokens: int) -> None:
    """Each of the 16 codes with every multiplier that keeps |q8| at 127, read back one by one."""
    codes = (torch.arange(128)[:, None] + torch.arange(128)[None]).remainder(16).sub(8).to(GPU, torch.int8)
    one_hot = 127 * torch.eye(128, dtype=torch.int8, device=GPU)
    for start in range(0, 32514, 256):
        column = (start + 2 * torch.arange(128, device=GPU)[:, None]).to(torch.int16)
        group = torch.cat([column, column.flip(0)], dim=1)
        products = codes.view(128, 2, 64).int() * group.int().unsqueeze(-1)
        valid = torch.where(products.abs() <= 127 * 256, codes.view(128, 2, 64), 0).view(128, 128)
        channels = (torch.arange(tokens, device=GPU) + start // 256) % 128
        sums = accumulate(one_hot[channels], pack_qweight(valid), group, isa)
        assert torch.equal(sums.t(), 127 * w4a8.decode_int8(valid, group).int()[:, channels])


# ---- W4A8: the whole second half -------------------------------------------------------------------------------------


class Second:
    """Arguments of `w4a8_linear` and what has to come out, from random operands of the dtypes given."""

    def __init__(self, draw: Draw, m: int, out_features: int, k: int, rank: int) -> None:
        self.draw, self.m, self.out_features = draw, m, out_features
        self.n = n = (out_features + 127) // 128 * 128
        codes = draw.weight(n, k)
        self.row_scales, multipliers = w4a8.fold_scales(codes, torch.full((n, k // 64), 0.03, device=GPU))
        t8, self.ascales = draw.tokens(m, k), draw.normal(m).abs().mul(0.05)
        self.sums = w4a8.accumulate(t8, w4a8.decode_int8(codes, multipliers))
        self.hidden = draw.normal(m, rank)
        self.head = (
            permuted(t8), self.ascales, self.hidden, pack_qweight(codes), self.row_scales,
            permuted_multipliers(multipliers),
        )  # fmt: skip

    def natural_operands(self, present: dict[str, torch.dtype], gate_rows: int) -> dict[str, torch.Tensor]:
        """The optional operands asked for, [N] and [N, R] ones in natural order."""
        shapes = {
            "proj_up": (self.n, self.hidden.shape[1]),
            "rank_scale": (self.hidden.shape[1],),
            "wcscales": (self.n,),
            "bias": (self.n,),
            "gate": (gate_rows, self.out_features),
            "residual": (self.m, self.out_features),
        }
        return {name: self.draw.normal(*shapes[name], dtype=dtype) for name, dtype in present.items()}

    def call(self, operands: dict[str, torch.Tensor], activation: str, out_dtype: torch.dtype) -> torch.Tensor:
        packers = {"proj_up": pack_lowrank_up, "wcscales": pack_vector, "bias": pack_vector}
        packed = {name: packers.get(name, lambda tensor: tensor)(tensor) for name, tensor in operands.items()}
        positional = [packed.get(name) for name in ("proj_up", "rank_scale", "wcscales", "bias")]
        result: torch.Tensor = guarded(
            OPS.w4a8_linear, *self.head, *positional, out_features=self.out_features, activation=activation,
            gate=packed.get("gate"), residual=packed.get("residual"), out_dtype=out_dtype,
        )  # fmt: skip
        return result

    def check(self, y: torch.Tensor, operands: dict[str, torch.Tensor], activation: Any) -> None:
        cut = {
            name: tensor[: self.out_features] if name in ("proj_up", "wcscales", "bias") else tensor
            for name, tensor in operands.items()
        }
        product = (self.sums.float() * self.ascales[:, None] * self.row_scales)[:, : self.out_features].contiguous()
        with_branch: dict[str, Any] = {"lora_act": self.hidden} if "proj_up" in cut else {}
        expected = epilogue(product, activation=activation, out_dtype=torch.float32, **with_branch, **cut)
        # Rounding before the activation, which may stretch it by an eighth, then gate and output.
        bound = 2**-16 * (product * cut.get("wcscales", 1.0)).abs()
        if "proj_up" in cut:
            scaled = (self.hidden * cut.get("rank_scale", 1.0)).abs()
            roundings = 1 + ("rank_scale" in cut)
            bound += roundings * FACTOR_ROUNDING[cut["proj_up"].dtype] * (scaled @ cut["proj_up"].float().abs().t())
        bound = 1.2 * bound + 2**-18 * (1 + epilogue(product, out_dtype=torch.float32, **with_branch, **{
            name: tensor for name, tensor in cut.items() if name not in ("gate", "residual")
        }).abs())  # fmt: skip
        if "gate" in cut:
            bound *= cut["gate"].float().abs().repeat_interleave(self.m // len(cut["gate"]), dim=0)
        bound += ROUNDING[y.dtype] * expected.abs() + 1e-6
        wrong = ~((y.float() - expected).abs() <= bound)
        where = wrong.nonzero()[:1].tolist()
        assert not where, f"{int(wrong.sum())} wrong, first at {where}: {y[wrong][0]} instead of {expected[wrong][0]}"


def check_linear(isa: str, data: st.DataObject, seed: int, m: int, out_features: int, k: int) -> None:
    """Any rank, optional operands, dtypes and activation."""
    rank = data.draw(st.sampled_from([0, 16, 32, 32, 48, 160, 1024]), label="rank")
    second = Second(Draw(seed), m, out_features, k, rank)
    optional = st.sampled_from(["wcscales", "bias", "gate", "residual"])
    same = data.draw(dtypes)
    present = {
        name: data.draw(st.just(same) | dtypes, label=name)
        for name in sorted(data.draw(st.sets(optional), label="present"))
    }
    if rank:
        present["proj_up"] = data.draw(st.just(same) | dtypes, label="proj_up")
        if data.draw(st.booleans(), label="rank_scale"):
            present["rank_scale"] = torch.float32
    gate_rows = data.draw(st.sampled_from([rows for rows in (1, 2, 3, 5, m) if m % rows == 0]))
    activation = data.draw(st.sampled_from(["none", "gelu", "silu"]))
    operands = second.natural_operands(present, gate_rows)
    with force(isa):
        y = second.call(operands, activation, data.draw(dtypes, label="out_dtype"))
    second.check(y, operands, activation)


@isas
@given(data=st.data(), seed=seeds)
@settings(max_examples=120, deadline=None)
def test_linear(isa: str, data: st.DataObject, seed: int) -> None:
    m = data.draw(tokens_up_to_300)
    out_features = data.draw(st.integers(1, 400) | st.sampled_from([128, 256, 384, 640]))
    check_linear(isa, data, seed, m, out_features, 128 * data.draw(st.integers(1, 5)))


@isas
@given(data=st.data(), seed=seeds, m=st.integers(2017, 2240), out_features=st.integers(1153, 1280) | st.just(1280))
@settings(max_examples=30, deadline=None)
def test_linear_in_wide_tiles(isa: str, data: st.DataObject, seed: int, m: int, out_features: int) -> None:
    """Sizes for which the portable kernels take the tiles of many tokens, unless there is a residual."""
    check_linear(isa, data, seed, m, out_features, 128 * data.draw(st.integers(1, 3)))


@isas
@pytest.mark.parametrize(("m", "out_features", "k"), [(4608, 3072, 3072), (4600, 9216, 3072), (100_000, 250, 128)])
@pytest.mark.parametrize("rank", [0, 32, 160])
def test_linear_of_many_tokens(isa: str, m: int, out_features: int, k: int, rank: int) -> None:
    second = Second(Draw(m), m, out_features, k, rank)
    present = dict.fromkeys(["bias", "gate", "residual", *["proj_up"] * (rank > 0)], torch.bfloat16)
    operands = second.natural_operands(present, 2)
    with force(isa):
        second.check(second.call(operands, "gelu", torch.bfloat16), operands, "gelu")


@isas
def test_linear_passes_nan_tokens_on_and_clamps_fp16(isa: str) -> None:
    codes = torch.full((128, 128), 7, dtype=torch.int8, device=GPU)
    folded = w4a8.fold_scales(codes, torch.full((128, 2), 1000.0, device=GPU))
    x = torch.tensor([[1.0], [float("nan")], [-1.0]], device=GPU).expand(3, 128)
    with force(isa):
        first = OPS.w4a8_quantize(x, None, 0.0, None)
        for activation in ("none", "gelu", "silu"):
            y = OPS.w4a8_linear(
                *first, pack_qweight(codes), *folded, None, None, None, None, out_features=128, activation=activation,
                out_dtype=torch.float16,
            )  # fmt: skip
            assert (y[0] == 65504).all()
            assert y[1].isnan().all()
            assert (y[2] == (-65504 if activation == "none" else 0)).all()


@isas
def test_more_elements_than_32_bits_count(isa: str) -> None:
    """100,000 tokens of 21,632 channels, as input and as output; the first and the last tokens are looked at."""
    draw, m, wide = Draw(3), 100_000, 21_632
    ends = torch.tensor([0, 1, m - 2, m - 1], device=GPU)
    with force(isa):
        x = torch.randn(m, wide, generator=draw.generator, device=GPU, dtype=torch.bfloat16)
        codes, ascales, hidden = OPS.w4a8_quantize(x, None, 0.0, None)
        expected = w4a8.quantize_tokens(x[ends].cpu())
        assert torch.equal(natural(codes[ends]).cpu(), expected[0])
        assert torch.equal(ascales[ends].cpu(), expected[1])
        del x
        for n, k, given in ((128, wide, codes), (wide, 128, codes[:, :128].contiguous())):
            weight = draw.weight(n, k)
            row_scales, multipliers = w4a8.fold_scales(weight, draw.scales(n, k))
            y = OPS.w4a8_linear(
                given, ascales, hidden, pack_qweight(weight), row_scales, permuted_multipliers(multipliers), None, None,
                None, None, out_features=n, out_dtype=torch.bfloat16,
            )  # fmt: skip
            sums = w4a8.accumulate(natural(given[ends]), w4a8.decode_int8(weight, multipliers)).float()
            expected_rows = (sums * ascales[ends, None] * row_scales).bfloat16()
            torch.testing.assert_close(y[ends], expected_rows, rtol=ROUNDING[torch.bfloat16], atol=0)
            del y, given


@isas
@given(
    seed=seeds,
    samples=st.integers(1, 3),
    tokens=tokens_up_to_300 | st.sampled_from([513]),
    heads=st.integers(1, 4),
    rank=st.sampled_from([0, 32, 80]),
    before=st.sampled_from([0, 1, 77]),
    after=st.sampled_from([0, 5]),
    parts=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.bfloat16, torch.float32]),
)
@examples
def test_linear_heads(
    isa: str,
    seed: int,
    samples: int,
    tokens: int,
    heads: int,
    rank: int,
    before: int,
    after: int,
    parts: tuple[bool, bool, bool],
    dtype: torch.dtype,
) -> None:
    """What `split_heads` makes of the linear's outputs, in its place; everything beside it stays as it was."""
    draw = Draw(seed)
    second = Second(draw, samples * tokens, 384 * heads, 256, rank)
    bias = pack_vector(draw.normal(384 * heads, dtype=dtype)) if parts[0] else None
    up = pack_lowrank_up(draw.normal(384 * heads, rank, dtype=dtype)) if rank else None
    norms = [draw.normal(128, dtype=dtype) if parts[1] else None for _ in range(2)]
    angles = draw.normal(tokens, 64).mul(3)
    rotary = torch.stack((angles.cos(), angles.sin()), dim=-1) if parts[2] else None
    out = torch.full((3, samples, heads, before + tokens + after, 128), float("nan"), dtype=dtype, device=GPU)
    with force(isa):
        OPS.w4a8_linear_heads(*second.head, up, None, None, bias, *norms, 1e-6, rotary, out, before)
        again = torch.full_like(out, float("nan"))
        OPS.w4a8_linear_heads(*second.head, up, None, None, bias, *norms, 1e-6, rotary, again, before)
        y = OPS.w4a8_linear(*second.head, up, None, None, bias, out_features=384 * heads, out_dtype=dtype)
    torch.testing.assert_close(out, again, rtol=0, atol=0, equal_nan=True)
    expected = split_heads(y, samples, norm_q=norms[0], norm_k=norms[1], rotary=rotary)
    inside = out[:, :, :, before : before + tokens]
    scale = expected.float().abs().amax(-1, keepdim=True)  # a rotation mixes channels: one can cancel
    assert (
        (inside.float() - expected.float()).abs() <= ROUNDING[dtype] * expected.float().abs() + 2**-20 * scale
    ).all()
    assert torch.equal(inside[2], expected[2])
    assert out[:, :, :, :before].isnan().all() and out[:, :, :, before + tokens :].isnan().all()


# ---- W4A16 -----------------------------------------------------------------------------------------------------------


def exact(codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
    """fp64 weights, not rounded."""
    grouped = codes.double().unflatten(1, (scales.shape[1], -1))
    return (grouped * scales.double().unsqueeze(-1) + zeros.double().unsqueeze(-1)).flatten(1)


@isas
@given(
    seed=seeds,
    tokens=st.integers(1, 20) | tokens_up_to_300,
    quads=st.integers(1, 100),
    groups=st.integers(1, 12),
    group_size=st.sampled_from([64, 128]),
    slack=st.sampled_from([0, 3, 8]),
    dtype=dtypes,
    scales_dtype=dtypes,
    bias_dtype=st.none() | dtypes,
    pack=st.sampled_from([pack_awq, pack_awq_int16]),
)
@settings(max_examples=80, deadline=None)
def test_w4a16(
    isa: str,
    seed: int,
    tokens: int,
    quads: int,
    groups: int,
    group_size: int,
    slack: int,
    dtype: torch.dtype,
    scales_dtype: torch.dtype,
    bias_dtype: torch.dtype | None,
    pack: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    draw = Draw(seed)
    n, k = 4 * quads, group_size * groups
    codes = draw.integers(0, 16, n, k, dtype=torch.uint8)
    scales, zeros = draw.normal(n, groups, dtype=scales_dtype), draw.normal(n, groups, dtype=scales_dtype)
    x = draw.normal(tokens, k + slack, dtype=dtype)[:, :k]
    bias = None if bias_dtype is None else draw.normal(n, dtype=bias_dtype)
    packed = pack(codes), pack_awq_scales(scales, group_size), pack_awq_scales(zeros, group_size)
    with force(isa):
        y = guarded(OPS.w4a16_linear, x, *packed, bias, group_size)
    weight = exact(codes, scales, zeros)
    expected = x.double() @ weight.t() + (0 if bias is None else bias.double())
    error = WEIGHT_ROUNDING[scales_dtype] + 2**-16
    bound = ROUNDING[dtype] * expected.abs() + error * (x.double().abs() @ weight.abs().t()) + 1e-6
    assert ((y.double() - expected).abs() <= bound).all()


@isas
@pytest.mark.parametrize("tokens", [1, 2, 64])
@pytest.mark.parametrize("dtype", DTYPES)
def test_w4a16_weights_are_rounded_like_the_definition(isa: str, tokens: int, dtype: torch.dtype) -> None:
    """One-hot tokens read the decoded weights back, bit for bit, over all codes."""
    codes = torch.arange(16, dtype=torch.uint8, device=GPU).repeat(64, 8)
    scales = Draw(3).normal(64, 2).abs().to(dtype)
    zeros = (-7.3 * scales.float()).to(dtype)
    weights = w4a16.dequantize(codes, scales, zeros)
    packed = pack_awq(codes), pack_awq_scales(scales, 64), pack_awq_scales(zeros, 64)
    one_hot = torch.eye(128, dtype=dtype, device=GPU)
    with force(isa):
        for start in range(0, 128, tokens):
            y = OPS.w4a16_linear(one_hot[start : start + tokens], *packed, None, 64)
            assert torch.equal(y, weights[:, start : start + tokens].t())


@isas
@pytest.mark.parametrize(
    ("tokens", "n", "k", "group_size"),
    [
        (1, 18432, 3072, 64),
        (8, 9216, 3072, 64),
        (16, 10240, 4096, 128),
        (77, 4096, 4096, 128),
        (512, 10240, 4096, 128),
        (512, 4096, 10240, 128),
        (4608, 64, 3072, 64),
    ],
)
def test_w4a16_of_large_layers(isa: str, tokens: int, n: int, k: int, group_size: int) -> None:
    draw = Draw(n)
    codes = draw.integers(0, 16, n, k, dtype=torch.uint8)
    scales = draw.normal(n, k // group_size).abs().mul(0.02).bfloat16()
    zeros = (-7.5 * scales).bfloat16()
    x = draw.normal(tokens, k, dtype=torch.bfloat16)
    packed = pack_awq(codes), pack_awq_scales(scales, group_size), pack_awq_scales(zeros, group_size)
    with force(isa):
        y = guarded(OPS.w4a16_linear, x, *packed, None, group_size)
    expected = x.double() @ exact(codes, scales, zeros).t()
    defined = (x.double() @ w4a16.dequantize(codes, scales, zeros).double().t()).bfloat16()
    assert (y.double() - expected).norm() <= 1.01 * (defined.double() - expected).norm()


# ---- any tensor anywhere in memory -----------------------------------------------------------------------------------


def shifted(tensor: torch.Tensor) -> torch.Tensor:
    """The same values one element behind an aligned address, as in a buffer that holds a whole model."""
    moved = torch.empty(tensor.numel() + 1, dtype=tensor.dtype, device=GPU)[1:].view(tensor.shape)
    return moved.copy_(tensor)


@isas
@pytest.mark.parametrize("out_features", [256, 250])
def test_tensors_at_odd_addresses(isa: str, out_features: int) -> None:
    draw = Draw(9)
    weight, scales, x = draw.weight(256, 256), draw.scales(256, 256), draw.normal(70, 256, dtype=torch.bfloat16)
    down, up = draw.normal(32, 256, dtype=torch.bfloat16), draw.normal(256, 32, dtype=torch.bfloat16)
    operands = {name: draw.normal(256, dtype=torch.bfloat16).abs() for name in ("smooth", "wcscales", "bias")}
    tail = draw.normal(2, out_features, dtype=torch.float16), draw.normal(70, out_features, dtype=torch.bfloat16)
    awq = [
        pack_awq(draw.integers(0, 16, 256, 256, dtype=torch.uint8)),
        *(pack_awq_scales(draw.normal(256, 4, dtype=torch.bfloat16), 64) for _ in range(2)),
    ]

    def run(place: Callable[[torch.Tensor], torch.Tensor]) -> list[torch.Tensor]:
        smooth, wcscales, bias = (place(pack_vector(vector)) for vector in operands.values())
        qweight = place(pack_qweight(weight))
        folded = OPS.w4a8_fold_scales(qweight, place(pack_wscales(scales)))
        first = OPS.w4a8_quantize(place(x), smooth, 0.1, place(pack_lowrank_down(down)))
        y = OPS.w4a8_linear(
            *map(place, first), qweight, *map(place, folded), place(pack_lowrank_up(up)),
            place(torch.linspace(0, 1, 32, device=GPU)), wcscales, bias, out_features=out_features, gate=place(tail[0]),
            residual=place(tail[1]), out_dtype=torch.bfloat16,
        )  # fmt: skip
        modulated = [OPS.w4a16_linear(place(x)[:m], *map(place, awq), bias, 64) for m in (1, 5, 70)]
        return [*folded, *first, y, *modulated]

    with force(isa):
        *same, many = zip(run(lambda tensor: tensor), run(shifted), strict=True)
    for one, other in same:
        assert torch.equal(one, other)
    # W4A16 for many tokens at such an address is another kernel, which adds up in another order.
    torch.testing.assert_close(*many, rtol=ROUNDING[torch.bfloat16], atol=0.05)


@isas
@pytest.mark.parametrize("tokens", [0, 1])
def test_no_tokens(isa: str, tokens: int) -> None:
    x = torch.ones(tokens, 128, device=GPU, dtype=torch.bfloat16)
    qweight = torch.zeros(128, 64, dtype=torch.int8, device=GPU)
    with force(isa):
        folded = OPS.w4a8_fold_scales(qweight, torch.ones(2, 128, device=GPU))
        first = OPS.w4a8_quantize(x, None, 0.0, None)
        y = OPS.w4a8_linear(
            *first, qweight, *folded, None, None, None, None, out_features=128, out_dtype=torch.bfloat16
        )
        awq = torch.zeros(32, 64, dtype=torch.int32, device=GPU), *[torch.zeros(16, 128, device=GPU)] * 2
        z = OPS.w4a16_linear(x, *awq, None, 64)
    for result in (y, z):
        assert result.shape == (tokens, 128)
        assert not result.any()
