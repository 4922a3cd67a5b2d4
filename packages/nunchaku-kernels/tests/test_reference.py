"""The plain-torch arithmetics: exact where fixed to the bit, else within their bounds of the real-number layer."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nunchaku_kernels.formats import SVDQWeights
from nunchaku_kernels.formats.e2m1 import decode
from nunchaku_kernels.reference import nvfp4, w4a4, w4a8, w4a16
from nunchaku_kernels.reference.epilogue import epilogue, lowrank_down
from nunchaku_kernels.reference.weights import dequantize, effective_weight

PROPERTY = settings(deadline=None, max_examples=30)
SEEDS = st.integers(0, 2**32 - 1)
SHIFT = 0.171875


def random_weights(n: int, k: int, rank: int, precision: str, seed: int, dtype: torch.dtype) -> SVDQWeights:
    """A layer with every optional tensor and scales over several orders of magnitude."""
    torch_rng = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=torch_rng)

    codes = torch.randint(-8, 8, (n, k), generator=torch_rng, dtype=torch.int8)
    scales = normal(n, k // (64 if precision == "int4" else 16)).exp() * 0.05
    return SVDQWeights(
        precision=precision,  # type: ignore[arg-type]
        codes=codes if precision == "int4" else codes & 0xF,
        scales=scales.to(dtype) if precision == "int4" else scales.to(torch.float8_e4m3fn),
        smooth=normal(k).mul(0.3).exp().to(dtype),
        smooth_orig=torch.ones(k, dtype=dtype),
        proj_down=normal(rank, k).to(dtype),
        proj_up=(normal(n, rank) * 0.1).to(dtype),
        bias=normal(n).to(dtype),
        wtscale=torch.tensor([0.7], dtype=dtype) if precision == "nvfp4" else None,
        wcscales=normal(n).mul(0.2).exp().to(dtype),
    )


def real_linear(x: Tensor, weights: SVDQWeights, shift: float) -> tuple[Tensor, Tensor, Tensor]:
    """The layer in real numbers (fp64): its output, the quantised path's input and its weight."""
    t = (x.double() + shift) / weights.smooth.double()
    weight = dequantize(weights).double()
    lowrank = x.double() @ weights.proj_down.double().t() @ weights.proj_up.double().t()
    assert weights.bias is not None
    return t @ weight.t() + lowrank + weights.bias.double(), t, weight


def fp32_slack(x: Tensor, weights: SVDQWeights, t: Tensor, weight: Tensor) -> Tensor:
    """Room for fp32 accumulation: a few roundings of the sum of magnitudes, per output."""
    lowrank = x.double().abs() @ weights.proj_down.double().abs().t() @ weights.proj_up.double().abs().t()
    return 1e-5 * (t.abs() @ weight.abs().t() + lowrank + 1)


@PROPERTY
@given(SEEDS, st.integers(1, 6), st.integers(1, 5), st.sampled_from([torch.float16, torch.bfloat16]), st.booleans())
def test_folded_weights(seed: int, rows: int, groups: int, dtype: torch.dtype, sparse: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-8, 8, (rows, groups * 64), generator=generator, dtype=torch.int8)
    if sparse:
        codes[:, :64] = 0
        codes[0] = 0
    scales = (torch.randn(rows, groups, generator=generator) * 3).exp().to(dtype)
    row_scales, multipliers = w4a8.fold_scales(codes, scales)
    decoded = w4a8.decode_int8(codes, multipliers)

    assert row_scales.dtype == torch.float32 and multipliers.dtype == torch.int16
    assert (multipliers % 2 == 0).all() and (multipliers >= 0).all()
    assert (decoded >= -127).all() and (decoded <= 127).all()
    zero_groups = ~codes.view(rows, groups, 64).any(dim=-1)
    assert not multipliers[zero_groups].any()
    assert not decoded[codes == 0].any()
    assert (row_scales[~codes.any(dim=1)] == 1).all()

    exact = codes.view(rows, groups, 64).double() * scales.double().unsqueeze(-1)
    steps = (decoded.double().view_as(exact) * row_scales.double().view(-1, 1, 1) - exact).abs()
    # Half a step of the row, plus the rounding of the multiplier (8 / 256) and of the offset (1 / 256).
    assert (steps <= row_scales.double().view(-1, 1, 1) * (0.5 + 9 / 256 + 1e-6)).all()


def test_fold_scales_examples() -> None:
    codes = torch.zeros(2, 128, dtype=torch.int8)
    codes[0, 0], codes[0, 64] = -8, 7
    scales = torch.tensor([[1.0, 0.5], [3.0, 4.0]], dtype=torch.float16)
    row_scales, multipliers = w4a8.fold_scales(codes, scales)
    assert row_scales.tolist() == [np.float32(8 / 127), 1.0]
    assert multipliers.tolist() == [[2 * round(128 * 127 / 8), 2 * round(64 * 127 / 8)], [0, 0]]
    decoded = w4a8.decode_int8(codes, multipliers)
    assert decoded[0, 0] == -127 and decoded[0, 64] == 56


def tokens_by_scalar(x: Tensor, smooth: Tensor, shift: float) -> tuple[np.ndarray, np.ndarray]:
    """numerics.md in numpy fp32, one rounding per operation."""
    reciprocal = np.float32(1) / smooth.float().numpy()
    t = (x.float().numpy() + np.float32(shift)) * reciprocal
    mx = np.abs(t).max(axis=1)
    scales = np.where(mx == 0, np.float32(1), mx / np.float32(127))
    with np.errstate(divide="ignore", invalid="ignore"):
        codes = np.rint(t * (np.float32(127) / mx)[:, None])
    return np.where(mx[:, None] == 0, 0, codes).astype(np.int8), scales


@PROPERTY
@given(
    SEEDS,
    st.integers(1, 5),
    st.integers(1, 300),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    st.sampled_from([0.0, SHIFT]),
)
def test_w4a8_tokens_exact(seed: int, m: int, k: int, dtype: torch.dtype, shift: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(m, k, generator=generator) * torch.randn(m, 1, generator=generator).exp()).to(dtype)
    smooth = torch.randn(k, generator=generator).exp().to(dtype)
    codes, scales = w4a8.quantize_tokens(x, smooth, shift)
    expected_codes, expected_scales = tokens_by_scalar(x, smooth, shift)
    assert np.array_equal(codes.numpy(), expected_codes)
    assert np.array_equal(scales.numpy(), expected_scales)
    assert codes.abs().amax(dim=1).eq(127).all()


def test_w4a8_token_edges() -> None:
    tiny, huge = 2.0**-149, 3e38
    x = torch.tensor(
        [
            [0.0, 0.0, -0.0],
            [127.0, 0.5, -1.5],
            [127.0, 2.5, -0.5],
            [math.nan, 1.0, 2.0],
            [1.0, math.inf, 2.0],
            [-math.inf, math.nan, 0.0],
            [tiny, 0.0, -tiny],
            [huge, -huge / 2, 1.0],
        ]
    )
    codes, scales = w4a8.quantize_tokens(x)
    assert codes[:3].tolist() == [[0, 0, 0], [127, 0, -2], [127, 2, 0]]
    assert scales[:3].tolist() == [1.0, 1.0, 1.0]
    assert scales[3:6].isnan().all() and not codes[3:6].any()
    assert scales[6] == 1 and not codes[6].any()
    assert codes[7].tolist() == [127, -64, 0] and scales[7] == torch.tensor(huge) / torch.tensor(127.0)
    overflow = w4a8.quantize_tokens(torch.full((1, 2), huge), torch.full((2,), 0.5, dtype=torch.float16))
    assert overflow[1].isnan().all() and not overflow[0].any()


@PROPERTY
@given(SEEDS, st.integers(0, 5), st.integers(1, 6), st.integers(1, 3000), st.booleans())
def test_accumulate_exact(seed: int, m: int, n: int, k: int, extreme: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(-127, 128, (m, k), generator=generator, dtype=torch.int8)
    weight = torch.randint(-127, 128, (n, k), generator=generator, dtype=torch.int8)
    if extreme:
        tokens.fill_(-127)
        weight.fill_(127)
    total = w4a8.accumulate(tokens, weight)
    assert total.dtype == torch.int32
    assert torch.equal(total.long(), tokens.long() @ weight.long().t())


@PROPERTY
@given(SEEDS, st.integers(1, 7), st.integers(1, 40), st.integers(1, 4), st.integers(0, 20), st.booleans())
def test_w4a8_linear_bound(seed: int, m: int, n: int, groups: int, rank: int, shifted: bool) -> None:
    weights = random_weights(n, groups * 64, rank, "int4", seed, torch.bfloat16)
    x = torch.randn(m, groups * 64, generator=torch.Generator().manual_seed(seed))
    shift = SHIFT if shifted else 0.0
    expected, t, weight = real_linear(x, weights, shift)
    actual = w4a8.linear(x, weights, shift=shift)
    assert actual.dtype == torch.float32

    # |sum (w + dw)(t + dt) - w t| with |dt| <= a / 2 and |dw| <= (1/2 + 9/256) r, widened for fp32.
    token_step = 0.5001 * w4a8.quantize_tokens(x, weights.smooth, shift)[1].double().unsqueeze(1)
    assert weights.wcscales is not None
    factors = weights.wcscales.double().abs()
    weight_step = 0.5353 * w4a8.fold_scales(weights.codes, weights.scales)[0].double() * factors
    bound = t.abs().sum(dim=1, keepdim=True) * weight_step + token_step * weight.abs().sum(dim=1)
    bound = bound + token_step * weight_step * t.shape[1] + fp32_slack(x, weights, t, weight)
    assert ((actual.double() - expected).abs() <= bound).all()


@PROPERTY
@given(SEEDS, st.integers(1, 7), st.integers(1, 40), st.integers(1, 4), st.integers(0, 20), st.booleans())
def test_w4a4_linear_bound(seed: int, m: int, n: int, groups: int, rank: int, unsigned: bool) -> None:
    weights = random_weights(n, groups * 64, rank, "int4", seed, torch.bfloat16)
    x = torch.randn(m, groups * 64, generator=torch.Generator().manual_seed(seed))
    shift = SHIFT if unsigned else 0.0
    if unsigned:
        x = torch.nn.functional.gelu(x, approximate="tanh")
    expected, t, weight = real_linear(x, weights, shift)
    actual = w4a4.linear(x, weights, shift=shift, unsigned=unsigned)
    # In fp32 nothing rounds on the way: half a step of each token group remains.
    step = w4a4.quantize_tokens(x, weights.smooth, shift, unsigned=unsigned)[1].double().repeat_interleave(64, dim=1)
    bound = (0.5001 * step) @ weight.abs().t() + fp32_slack(x, weights, t, weight)
    assert ((actual.double() - expected).abs() <= bound).all()


def test_w4a4_token_edges() -> None:
    x = torch.zeros(4, 64, dtype=torch.bfloat16)
    x[1, :4] = torch.tensor([7.0, 2.5, -3.5, 0.5])
    x[2, 0] = math.nan
    x[3, 0], x[3, 1] = math.inf, 1.0
    codes, scales = w4a4.quantize_tokens(x)
    assert scales[0] == 0 and not codes[0].any()
    assert codes[1, :4].tolist() == [7, 2, -4, 0] and scales[1] == 1
    assert scales[2].isnan() and scales[3].isinf()
    weights = torch.ones(1, 64, dtype=torch.int8), torch.ones(1, 1, dtype=torch.bfloat16)
    assert w4a4.product(codes, scales, *weights)[2:].isfinite().logical_not().all()
    unsigned = w4a4.quantize_tokens(x[:2], None, unsigned=True)[0]
    assert (unsigned >= 0).all() and unsigned[1, 0] == 15


@PROPERTY
@given(SEEDS, st.integers(1, 6), st.integers(1, 8), st.sampled_from([torch.float16, torch.bfloat16, torch.float32]))
def test_nvfp4_tokens(seed: int, m: int, groups: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(m, groups * 16, generator=generator) * torch.randn(m, 1, generator=generator).exp()).to(dtype)
    smooth = torch.randn(groups * 16, generator=generator).exp().to(dtype)
    codes, scales = nvfp4.quantize_tokens(x, smooth)
    t = (x.float() / smooth.float()).to(dtype).double().view(m, groups, 16)
    largest = t.abs().amax(dim=-1)
    restored = decode(codes).double().view_as(t) * scales.double().unsqueeze(-1)
    # Half of the widest spacing (2 of 6), and the scale's own rounding to three mantissa bits.
    bound = largest / 6 * (1 + 6 / 16) + 2**-9
    assert ((restored - t).abs() <= bound.unsqueeze(-1)).all()


def test_nvfp4_token_edges() -> None:
    x = torch.zeros(5, 16)
    x[1, :3] = torch.tensor([6.0, 2.5, -5.0])
    x[2, 0] = math.nan
    x[3, 0] = -math.inf
    x[4, 0], x[4, 1] = 1e6, 448.0
    codes, scales = nvfp4.quantize_tokens(x)
    assert scales[0].float() == 0 and not codes[0].any()
    assert scales[1].float() == 1 and codes[1, :3].tolist() == [7, 4, 14]
    assert scales[2:4].float().isnan().all()
    assert scales[4].float() == 448 and codes[4, :2].tolist() == [7, 2]


@PROPERTY
@given(SEEDS, st.integers(1, 6), st.integers(1, 40), st.integers(1, 6), st.integers(0, 20))
def test_nvfp4_linear(seed: int, m: int, n: int, groups: int, rank: int) -> None:
    weights = random_weights(n, groups * 16, rank, "nvfp4", seed, torch.bfloat16)
    x = torch.randn(m, groups * 16, generator=torch.Generator().manual_seed(seed))
    codes, scales = nvfp4.quantize_tokens(x, weights.smooth)
    tokens = (decode(codes).view(m, groups, 16) * scales.float().unsqueeze(-1)).view(m, -1).double()
    expected, t, weight = real_linear(x, weights, 0.0)
    expected = expected + (tokens - t) @ weight.t()
    bound = fp32_slack(x, weights, tokens.abs() + t.abs(), weight)
    assert ((nvfp4.linear(x, weights).double() - expected).abs() <= bound).all()


@PROPERTY
@given(SEEDS, st.sampled_from([torch.float16, torch.bfloat16]), st.sampled_from([32, 64, 128]), st.booleans())
def test_w4a16(seed: int, dtype: torch.dtype, group_size: int, with_bias: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (12, 256), generator=generator, dtype=torch.uint8)
    scales = torch.rand(12, 256 // group_size, generator=generator).add(0.1).to(dtype)
    zeros = (-7.3 * scales).to(dtype)
    bias = torch.randn(12, generator=generator).to(dtype) if with_bias else None
    x = torch.randn(3, 256, generator=generator).to(dtype)
    exact = codes.double() * scales.double().repeat_interleave(group_size, 1)
    exact = (exact + zeros.double().repeat_interleave(group_size, 1)).to(dtype)
    assert torch.equal(w4a16.dequantize(codes, scales, zeros), exact)
    expected = x.double() @ exact.double().t() + (0 if bias is None else bias.double())
    actual = w4a16.linear(x, codes, scales, zeros, bias)
    assert actual.dtype == dtype
    bound = expected.abs() * torch.finfo(dtype).eps + 1e-5 * (x.double().abs() @ exact.double().abs().t())
    assert ((actual.double() - expected).abs() <= bound).all()


@PROPERTY
@given(SEEDS, st.integers(1, 3), st.integers(1, 4), st.sampled_from(["none", "gelu", "silu"]), st.integers(0, 9))
def test_epilogue(seed: int, batches: int, tokens: int, activation: str, rank: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    m, n = batches * tokens, 24

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    accumulator, hidden, rank_scale = normal(m, n), normal(m, rank), normal(rank)
    up, wcscales, bias, gate, residual = normal(n, rank), normal(n), normal(n), normal(batches, n), normal(m, n)
    y = accumulator.double() * wcscales.double() + bias.double()
    y = y + (hidden.double() * rank_scale.double()) @ up.double().t()
    if activation == "gelu":
        y = torch.nn.functional.gelu(y, approximate="tanh")
    elif activation == "silu":
        y = torch.nn.functional.silu(y)
    expected = residual.double() + gate.double().repeat_interleave(tokens, dim=0) * y
    actual = epilogue(
        accumulator,
        wcscales=wcscales,
        bias=bias,
        lora_act=hidden,
        proj_up=up,
        rank_scale=rank_scale,
        activation=activation,  # type: ignore[arg-type]
        gate=gate,
        residual=residual,
        out_dtype=torch.float32,
    )
    torch.testing.assert_close(actual.double(), expected, atol=1e-4, rtol=1e-5)


def test_epilogue_clamps_fp16() -> None:
    out = epilogue(torch.tensor([[1e6, -1e6, math.nan]]), out_dtype=torch.float16)
    assert out[0, :2].tolist() == [65504.0, -65504.0] and out[0, 2].isnan()


def test_effective_weight_is_the_unquantised_layer() -> None:
    for precision, k in (("int4", 192), ("nvfp4", 80)):
        weights = random_weights(20, k, 16, precision, 5, torch.float16)
        x = torch.randn(4, k)
        expected = real_linear(x, weights, 0.0)[0]
        assert weights.bias is not None
        actual = x @ effective_weight(weights).t() + weights.bias.float()
        torch.testing.assert_close(actual.double(), expected, atol=1e-3, rtol=1e-4)


def test_strided_tokens() -> None:
    x = torch.randn(128, 6)
    for quantize in (w4a8.quantize_tokens, w4a4.quantize_tokens, nvfp4.quantize_tokens):
        strided, contiguous = quantize(x.t()), quantize(x.t().contiguous())
        assert torch.equal(strided[0], contiguous[0])
        assert torch.equal(strided[1].float(), contiguous[1].float())


def int4_weights() -> SVDQWeights:
    return random_weights(8, 64, 4, "int4", 0, torch.bfloat16)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: w4a8.quantize_tokens(torch.zeros(2, 4, dtype=torch.int8)), TypeError, "x: expected dtype"),
        (lambda: w4a8.quantize_tokens(torch.zeros(2, 4), torch.ones(5)), ValueError, r"smooth: expected shape \[4\]"),
        (
            lambda: w4a8.fold_scales(torch.zeros(2, 64, dtype=torch.int8), torch.full((2, 1), math.nan)),
            ValueError,
            "scales: expected finite",
        ),
        (
            lambda: w4a8.accumulate(torch.zeros(2, 64, dtype=torch.int8), torch.zeros(2, 65, dtype=torch.int8)),
            ValueError,
            r"weight_codes: expected shape \[any, 64\]",
        ),
        (lambda: w4a8.linear(torch.zeros(2, 65), int4_weights()), ValueError, r"x: expected shape \[any, 64\]"),
        (lambda: nvfp4.linear(torch.zeros(2, 64), int4_weights()), ValueError, "weights: expected precision 'nvfp4'"),
        (lambda: w4a4.quantize_tokens(torch.zeros(2, 65)), ValueError, "x: expected K"),
        (lambda: lowrank_down(torch.zeros(2, 64), torch.zeros(4, 63)), ValueError, "proj_down"),
        (
            lambda: epilogue(torch.zeros(6, 4), gate=torch.zeros(4, 4), out_dtype=torch.float32),
            ValueError,
            "gate: expected a number of rows that divides 6, got 4",
        ),
        (
            lambda: epilogue(torch.zeros(6, 4), lora_act=torch.zeros(6, 2), out_dtype=torch.float32),
            TypeError,
            "proj_up: expected a torch.Tensor",
        ),
        (
            lambda: epilogue(torch.zeros(6, 4), activation="relu", out_dtype=torch.float32),  # type: ignore[arg-type]
            ValueError,
            "activation: expected one of none, gelu, silu, got 'relu'",
        ),
        (
            lambda: w4a16.dequantize(torch.zeros(4, 64, dtype=torch.uint8), torch.ones(4, 3), torch.ones(4, 3)),
            ValueError,
            "scales: expected a number of groups that divides K = 64, got 3",
        ),
    ],
)
def test_wrong_arguments(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
