"""The compiled W4A8 kernels against their plain-torch definition: integers bit for bit, the fp32 tail by tolerance."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nunchaku_kernels import _C
from nunchaku_kernels.formats import (
    pack_lowrank_down,
    pack_lowrank_up,
    pack_qweight,
    pack_vector,
    pack_wscales,
)
from nunchaku_kernels.reference import w4a8
from nunchaku_kernels.reference.epilogue import epilogue, lowrank_down

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
ACTIVATIONS = {"none": 0, "gelu": 1, "silu": 2}
ROUNDING = {torch.float32: 2**-18, torch.float16: 2**-10, torch.bfloat16: 2**-7}
SHIFT = 0.171875

isas = pytest.mark.parametrize("isa", _C.isas())
dtypes = st.sampled_from(list(DTYPES))
seeds = st.integers(0, 2**31)
examples = settings(max_examples=12, deadline=None)


def address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def code(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else DTYPES[tensor.dtype]


def random_codes(n: int, k: int, generator: torch.Generator) -> torch.Tensor:
    """int4 codes over all of -8..7, with groups of zeros and a channel of zeros among them."""
    codes = torch.randint(-8, 8, (n, k), generator=generator, dtype=torch.int8)
    codes.view(n, -1, 64)[torch.rand(n, k // 64, generator=generator) < 0.1] = 0
    codes[torch.randint(0, n, (1,), generator=generator)] = 0
    return codes


def random_scales(n: int, k: int, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    return (torch.randn(n, k // 64, generator=generator) * 2).exp().mul(0.01).to(dtype)


def fold(codes: torch.Tensor, scales: torch.Tensor, isa: str, threads: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    n, k = codes.shape
    row_scales, multipliers = torch.empty(n), torch.empty(n, k // 64, dtype=torch.int16)
    qweight, wscales = pack_qweight(codes), pack_wscales(scales)
    _C.w4a8_fold_scales(
        address(qweight), address(wscales), code(wscales), n, k, address(row_scales), address(multipliers), threads,
        isa,
    )  # fmt: skip
    return row_scales, multipliers


def quantize(
    x: torch.Tensor,
    padded: int,
    isa: str,
    *,
    smooth: torch.Tensor | None = None,
    shift: float = 0.0,
    down: torch.Tensor | None = None,
    threads: int = 2,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes [M, padded], scales [M] and low-rank hidden state [M, R]; smooth and down in published order."""
    tokens, channels = x.shape
    rank = 0 if down is None else down.shape[1]
    codes = torch.full((tokens, padded), 99, dtype=torch.int8)
    ascales, hidden = torch.empty(tokens), torch.empty(tokens, rank)
    _C.w4a8_quantize(
        address(x), code(x), tokens, channels, x.stride(0), padded, address(smooth), code(smooth), shift, address(down),
        code(down), rank, address(codes), address(ascales), address(hidden), threads, isa,
    )  # fmt: skip
    return codes, ascales, hidden


def accumulate(
    tokens: torch.Tensor, qweight: torch.Tensor, multipliers: torch.Tensor, isa: str, threads: int = 2
) -> torch.Tensor:
    m, k = tokens.shape
    n = qweight.shape[0]
    sums = torch.empty(m, n, dtype=torch.int32)
    _C.w4a8_accumulate(address(tokens), address(qweight), address(multipliers), m, n, k, address(sums), threads, isa)
    return sums


@isas
@given(seed=seeds, blocks=st.integers(1, 3), groups=st.integers(1, 9), dtype=dtypes)
@examples
def test_fold_scales_is_exact(isa: str, seed: int, blocks: int, groups: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = random_codes(128 * blocks, 64 * groups, generator)
    scales = random_scales(128 * blocks, 64 * groups, dtype, generator)
    row_scales, multipliers = fold(codes, scales, isa)
    expected_rows, expected_multipliers = w4a8.fold_scales(codes, scales)
    assert torch.equal(row_scales, expected_rows)
    assert torch.equal(multipliers, expected_multipliers)


@isas
@pytest.mark.parametrize("dtype", DTYPES)
def test_fold_scales_of_any_magnitude(isa: str, dtype: torch.dtype) -> None:
    """Largest codes of 0 to 8 under scales of either sign, zero, subnormal and as large as the dtype goes."""
    generator = torch.Generator().manual_seed(5)
    largest = torch.randint(0, 9, (256, 8, 1), generator=generator)
    codes = (largest * torch.randint(-1, 1, (256, 8, 64), generator=generator)).reshape(256, 512).to(torch.int8)
    extremes = torch.finfo(dtype)
    values = torch.tensor([0.0, 1.0, extremes.tiny / 4, extremes.tiny, extremes.max, 3.0, 1 / 3, 1e-3]).to(dtype)
    scales = values[torch.randint(0, 8, (256, 8), generator=generator)]
    scales *= torch.randint(0, 2, (256, 8), generator=generator) * 2 - 1
    for one, other in zip(fold(codes, scales, isa), w4a8.fold_scales(codes, scales), strict=True):
        assert torch.equal(one, other)
    scales[3, 5], scales[4, 5] = float("nan"), float("inf")
    codes[3:5] = -8
    row_scales, multipliers = fold(codes, scales, isa)
    assert row_scales[3].isnan() and row_scales[4].isinf() and row_scales.isfinite().sum() == 254
    assert not multipliers[3].any()


@isas
@given(
    seed=seeds,
    tokens=st.integers(1, 20),
    channels=st.integers(1, 300),
    padding=st.integers(0, 1),
    dtype=dtypes,
    smooth=st.booleans(),
    shift=st.sampled_from([0.0, SHIFT]),
    exponent=st.integers(-40, 20),
)
@examples
def test_quantize_is_exact(
    isa: str,
    seed: int,
    tokens: int,
    channels: int,
    padding: int,
    dtype: torch.dtype,
    smooth: bool,
    shift: float,
    exponent: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    padded = (channels + 127) // 128 * 128 + 128 * padding
    whole = (torch.randn(tokens, channels + 5, generator=generator) * 2.0**exponent).to(dtype)
    x = whole[:, :channels]  # rows further apart than they are long
    factors = torch.rand(padded, generator=generator).add(0.1).to(dtype) if smooth else None
    codes, ascales, _ = quantize(x, padded, isa, smooth=None if factors is None else pack_vector(factors), shift=shift)
    expected = w4a8.quantize_tokens(x, None if factors is None else factors[:channels], shift)
    assert torch.equal(codes[:, :channels], expected[0])
    assert not codes[:, channels:].any()
    torch.testing.assert_close(ascales, expected[1], rtol=0, atol=0, equal_nan=True)  # fp16 overflows for the largest


@isas
def test_quantize_rounds_half_to_even(isa: str) -> None:
    steps = torch.arange(-127, 127.5, 0.5)  # the largest is 127, so one step is exactly 1
    codes, ascales, _ = quantize(steps[None], 512, isa)
    assert ascales.item() == 1.0
    assert torch.equal(codes[0, : steps.numel()], steps.round().to(torch.int8))


@isas
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("position", [0, 31, 66])
def test_quantize_marks_non_finite_tokens(isa: str, value: float, position: int) -> None:
    x = torch.ones(3, 67)
    x[1, position] = value
    codes, ascales, _ = quantize(x, 128, isa)
    assert torch.isnan(ascales).tolist() == [False, True, False]
    assert not codes[1].any()
    assert (codes[::2, :67] == 127).all()


@isas
@pytest.mark.parametrize("magnitude", [0.0, 1e-45, 1e-38, 2.0**-122, 2.0**-120, 3e38])
def test_quantize_extreme_tokens(isa: str, magnitude: float) -> None:
    x = torch.linspace(-1, 1, 64)[None] * magnitude
    codes, ascales, _ = quantize(x, 64, isa)
    expected = w4a8.quantize_tokens(x)
    assert torch.equal(codes, expected[0])
    assert torch.equal(ascales, expected[1])


@isas
@given(
    seed=seeds,
    tokens=st.integers(1, 60),
    channels=st.integers(1, 200) | st.sampled_from([64, 512, 544, 1056]),
    tiles=st.integers(1, 4),
    dtype=dtypes,
)
@examples
def test_lowrank_down(isa: str, seed: int, tokens: int, channels: int, tiles: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(seed)
    padded = (channels + 127) // 128 * 128
    x = torch.randn(tokens, channels, generator=generator).to(dtype)
    down = torch.randn(16 * tiles, padded, generator=generator).to(dtype)
    smooth = torch.full((padded,), 3.0)
    _, _, hidden = quantize(x, padded, isa, smooth=smooth, shift=SHIFT, down=pack_lowrank_down(down))
    torch.testing.assert_close(hidden, lowrank_down(x, down[:, :channels].contiguous()), rtol=1e-5, atol=1e-4)


@isas
@given(
    seed=seeds,
    tokens=st.sampled_from([1, 2, 3, 5, 7, 16, 17, 33, 70, 530]),
    blocks=st.integers(1, 2) | st.just(9),
    groups=st.integers(1, 5) | st.integers(15, 18),
    threads=st.integers(1, 3),
)
@examples
def test_sums_are_exact(isa: str, seed: int, tokens: int, blocks: int, groups: int, threads: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = random_codes(128 * blocks, 64 * groups, generator)
    _, multipliers = w4a8.fold_scales(codes, random_scales(128 * blocks, 64 * groups, torch.float32, generator))
    t8 = torch.randint(-127, 128, (tokens, 64 * groups), generator=generator, dtype=torch.int8)
    sums = accumulate(t8, pack_qweight(codes), multipliers, isa, threads)
    assert torch.equal(sums, w4a8.accumulate(t8, w4a8.decode_int8(codes, multipliers)))


@isas
def test_sums_of_every_code_and_multiplier(isa: str) -> None:
    """Each of the 16 codes with multipliers up to the largest one that keeps |q8| at 127, read back one by one."""
    codes = (torch.arange(128)[:, None] + torch.arange(64)[None]).remainder(16).sub(8).to(torch.int8)
    tokens = 127 * torch.eye(64, dtype=torch.int8)
    for start in range(0, 32514, 256 * 17):
        group = (start + 2 * torch.arange(128, dtype=torch.int32)[:, None]).to(torch.int16)
        reachable = (codes.int() * group.int()).abs() <= 127 * 256
        valid = torch.where(reachable, codes, 0).to(torch.int8)
        sums = accumulate(tokens, pack_qweight(valid), group, isa)
        assert torch.equal(sums.t(), 127 * w4a8.decode_int8(valid, group).int())


@isas
@pytest.mark.parametrize(("tokens", "inputs"), [(1, 4224), (19, 4224), (18, 8320)])
def test_sums_at_the_extremes_over_several_panels(isa: str, tokens: int, inputs: int) -> None:
    """Every product is +-127 * 127: nothing may saturate on the way, and more than one panel is summed."""
    signs = torch.randint(0, 2, (128, inputs), generator=torch.Generator().manual_seed(7)) * 2 - 1
    codes = (7 * signs).to(torch.int8)
    _, multipliers = w4a8.fold_scales(codes, torch.ones(128, inputs // 64))
    t8 = torch.full((tokens, inputs), 127, dtype=torch.int8)
    t8[:, ::3] = -127
    t8[0] = (127 * signs[0]).to(torch.int8)
    sums = accumulate(t8, pack_qweight(codes), multipliers, isa)
    assert torch.equal(sums, w4a8.accumulate(t8, w4a8.decode_int8(codes, multipliers)))
    assert sums[0, 0] == 127 * 127 * inputs


@isas
@given(
    seed=seeds,
    tokens=st.sampled_from([1, 4, 6, 18, 67, 100]),
    out_features=st.integers(1, 256) | st.integers(1030, 1100),
    rank=st.sampled_from([0, 16, 48]),
    threads=st.integers(1, 2),
    options=st.fixed_dictionaries(
        {name: st.booleans() for name in ("wcscales", "bias", "rank_scale", "gate", "residual")}
    ),
    activation=st.sampled_from(list(ACTIVATIONS)),
    dtype=dtypes,
    out_dtype=dtypes,
)
@settings(max_examples=30, deadline=None)
def test_linear(
    isa: str,
    seed: int,
    tokens: int,
    out_features: int,
    rank: int,
    threads: int,
    options: dict[str, bool],
    activation: str,
    dtype: torch.dtype,
    out_dtype: torch.dtype,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    n, k = (out_features + 127) // 128 * 128, 128

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    def optional(name: str, *shape: int) -> torch.Tensor | None:
        return normal(*shape) if options[name] else None

    codes = random_codes(n, k, generator)
    row_scales, multipliers = w4a8.fold_scales(codes, torch.full((n, k // 64), 0.03))
    t8, ascales = w4a8.quantize_tokens(normal(tokens, k))
    hidden, up = torch.randn(tokens, rank, generator=generator), normal(n, rank)
    rank_scale = torch.rand(rank, generator=generator) if options["rank_scale"] else None
    wcscales, bias = optional("wcscales", n), optional("bias", n)
    batch = 2 if tokens % 2 == 0 else 1
    gate, residual = optional("gate", batch, out_features), optional("residual", tokens, out_features)
    packed = [None if v is None else pack_vector(v) for v in (wcscales, bias)]
    qweight, proj_up = pack_qweight(codes), pack_lowrank_up(up)
    out = torch.empty(tokens, out_features, dtype=out_dtype)
    _C.w4a8_linear(
        address(t8), address(ascales), address(hidden), rank, address(qweight), address(row_scales),
        address(multipliers), address(proj_up), code(proj_up), address(rank_scale), address(packed[0]), code(packed[0]),
        address(packed[1]), code(packed[1]), tokens, n, k, out_features, ACTIVATIONS[activation], address(gate),
        code(gate), batch, address(residual), code(residual), address(out), code(out), threads, isa,
    )  # fmt: skip

    sums = w4a8.accumulate(t8, w4a8.decode_int8(codes, multipliers)).float()
    product = sums * ascales[:, None] * row_scales
    cropped = [None if v is None else v[:out_features].float() for v in (wcscales, bias)]
    expected = epilogue(
        product[:, :out_features].contiguous(), wcscales=cropped[0], bias=cropped[1], lora_act=hidden,
        proj_up=up[:out_features].contiguous(), rank_scale=rank_scale, activation=activation, gate=gate,  # type: ignore[arg-type]
        residual=residual, out_dtype=torch.float32,
    )  # fmt: skip
    # Terms that cancel leave the rounding of the largest one behind.
    torch.testing.assert_close(out.float(), expected, rtol=ROUNDING[out_dtype], atol=2e-4)


@isas
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_passes_non_finite_hidden_states_on(isa: str, dtype: torch.dtype) -> None:
    """Infinite hidden states give what fp32 arithmetic makes of them, and spoil no other token."""
    qweight = pack_qweight(torch.zeros(128, 64, dtype=torch.int8))
    row_scales, multipliers = w4a8.fold_scales(torch.zeros(128, 64, dtype=torch.int8), torch.ones(128, 1))
    t8, ascales = torch.zeros(5, 64, dtype=torch.int8), torch.ones(5)
    infinity = float("inf")
    hidden = torch.ones(5, 16)
    hidden[1, 3], hidden[2, 4], hidden[3, 5] = infinity, -infinity, float("nan")
    hidden[4, 6:8] = torch.tensor([infinity, -infinity])
    up = torch.ones(128, 16, dtype=dtype)
    proj_up, out = pack_lowrank_up(up), torch.empty(5, 128, dtype=dtype)
    _C.w4a8_linear(
        address(t8), address(ascales), address(hidden), 16, address(qweight), address(row_scales), address(multipliers),
        address(proj_up), code(proj_up), 0, 0, 0, 0, 0, 5, 128, 64, 128, 0, 0, 0, 0, 0, 0, address(out), code(out), 1,
        isa,
    )  # fmt: skip
    top = 65504.0 if dtype == torch.float16 else infinity
    expected = torch.tensor([16.0, top, -top, float("nan"), float("nan")])
    torch.testing.assert_close(out.float(), expected[:, None].expand(5, 128), rtol=0, atol=0, equal_nan=True)


@isas
def test_linear_passes_nan_tokens_on_and_clamps_fp16(isa: str) -> None:
    codes = torch.full((128, 64), 7, dtype=torch.int8)
    row_scales, multipliers = w4a8.fold_scales(codes, torch.full((128, 1), 1000.0))
    t8, ascales = w4a8.quantize_tokens(torch.tensor([[1.0], [float("nan")], [-1.0]]).expand(3, 64))
    qweight = pack_qweight(codes)
    for activation in ACTIVATIONS.values():
        out = torch.empty(3, 128, dtype=torch.float16)
        _C.w4a8_linear(
            address(t8), address(ascales), 0, 0, address(qweight), address(row_scales), address(multipliers), 0, 0, 0,
            0, 0, 0, 0, 3, 128, 64, 128, activation, 0, 0, 0, 0, 0, address(out), 1, 1, isa,
        )  # fmt: skip
        assert (out[0] == 65504).all()
        assert out[1].isnan().all()
        assert (out[2] == (-65504 if activation == 0 else 0)).all()


@given(data=st.data())
@settings(max_examples=15, deadline=None)
def test_ranks_without_part_in_some_rows_change_nothing(data: st.DataObject) -> None:
    """Block-diagonal up factors, as those of adapters on fused linears: whole tiles of zeros are left out."""
    n, k, rank, tokens = 384, 128, 16 * data.draw(st.integers(1, 6)), data.draw(st.integers(1, 13))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    up = torch.randn(n, rank, generator=generator)
    for block in range(0, n, 128):
        for first in range(0, rank, 16):
            if data.draw(st.booleans()):
                up[block : block + 128, first : first + 16] = 0
    codes = torch.randint(-127, 128, (tokens, k), generator=generator, dtype=torch.int8)
    arguments = (
        codes, torch.rand(tokens, generator=generator), torch.randn(tokens, rank, generator=generator),
        torch.randint(-128, 128, (n, k // 2), generator=generator, dtype=torch.int8),
        torch.rand(n, generator=generator),
        torch.randint(0, 100, (n, k // 64), generator=generator, dtype=torch.int16),
    )  # fmt: skip
    scale = torch.randn(rank, generator=generator)

    def run(factor: torch.Tensor | None, hidden: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = torch.ops.nunchaku_kernels.w4a8_linear(
            *arguments[:2], hidden, *arguments[3:], factor, None if factor is None else scale, None, None,
            out_features=n, out_dtype=torch.float32,
        )  # fmt: skip
        return result

    plain = run(None, arguments[2][:, :0])
    given_sum = run(pack_lowrank_up(up), arguments[2])
    torch.testing.assert_close(given_sum - plain, (arguments[2] * scale) @ up.t(), rtol=1e-3, atol=1e-2)
