"""Quantisers: published rounding rules, error bounds, determinism, and what each refinement buys."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nunchaku_kernels.formats import pack_svdq, unpack_svdq
from nunchaku_kernels.formats.e2m1 import decode
from nunchaku_kernels.quantize import (
    quantize_int4,
    quantize_nvfp4,
    quantize_svdq,
    quantize_w4a16,
    smoothing_from_weights,
    truncated_svd,
)
from nunchaku_kernels.quantize.nvfp4 import encode_e4m3_ties_up
from nunchaku_kernels.reference import w4a8, w4a16
from nunchaku_kernels.reference.weights import dequantize, effective_weight

PROPERTY = settings(deadline=None, max_examples=20)
SEEDS = st.integers(0, 2**32 - 1)
HALVES = st.sampled_from([torch.float16, torch.bfloat16])
SHIFT = 0.171875


def layer_weight(n: int, k: int, seed: int) -> Tensor:
    """Heavy-tailed rows and columns of unequal size, with a strong low-rank part, as trained layers have."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    strengths = torch.arange(1, 17) ** -0.7
    noise = normal(n, k) / normal(n, k).square().add(normal(n, k).square()).add(0.5).sqrt()
    return (noise + 3 * (normal(n, 16) * strengths) @ normal(16, k)) * 0.02 * normal(k).mul(0.4).exp()


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def dequantize_int4(codes: Tensor, scales: Tensor) -> Tensor:
    n, groups = scales.shape
    return (codes.view(n, groups, -1).double() * scales.double().unsqueeze(-1)).view_as(codes)


@PROPERTY
@given(SEEDS, st.integers(1, 5), st.integers(1, 4), HALVES, st.booleans())
def test_int4_rule(seed: int, n: int, groups: int, dtype: torch.dtype, search: bool) -> None:
    weight = layer_weight(n, groups * 64, seed)
    weight[0, :64] = 0
    codes, scales = quantize_int4(weight, dtype=dtype, scale_search=search)
    largest = weight.view(n, groups, 64).abs().amax(dim=-1)
    assert scales.dtype == dtype and scales[0, 0] == 1 and not codes[0, :64].any()
    if not search:
        expected = torch.where(largest == 0, 1.0, largest / 7).to(dtype)
        assert torch.equal(scales, expected)
        steps = weight / expected.float().repeat_interleave(64, dim=1)
        assert torch.equal(codes, steps.round().clamp(-7, 7).to(torch.int8))
    else:
        assert codes.min() >= -8 and codes.max() <= 7
        plain = dequantize_int4(*quantize_int4(weight, dtype=dtype)) - weight
        found = dequantize_int4(codes, scales) - weight
        # Per group never worse, but for fp32 rounding of the errors compared.
        plain_error, error = (e.view(n, groups, 64).square().sum(dim=-1) for e in (plain, found))
        assert (error <= plain_error * (1 + 1e-5)).all()


def test_int4_ties_and_negative_edge() -> None:
    weight = torch.zeros(2, 64)
    weight[0, :5] = torch.tensor([7.0, 0.5, 1.5, 2.5, -3.5])
    weight[1, :2] = torch.tensor([-8.0, 1.0])
    codes, scales = quantize_int4(weight)
    assert scales[0] == 1 and codes[0, :5].tolist() == [7, 0, 2, 2, -4]
    codes, scales = quantize_int4(weight, scale_search=True)
    assert scales[1] == 1 and codes[1, :2].tolist() == [-8, 1]


def test_e4m3_ties_up() -> None:
    table = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middle = (table[1:] + table[:-1]) / 2
    assert torch.equal(encode_e4m3_ties_up(table).float(), table)
    assert torch.equal(encode_e4m3_ties_up(middle).float(), table[1:])
    assert torch.equal(encode_e4m3_ties_up(torch.nextafter(middle, torch.zeros(126))).float(), table[:-1])
    special = encode_e4m3_ties_up(torch.tensor([1.0625, 1e9, math.inf, math.nan])).float()
    assert special[:3].tolist() == [1.125, 448.0, 448.0] and special[3].isnan()


def dequantize_nvfp4(codes: Tensor, micro_scales: Tensor, wtscale: Tensor) -> Tensor:
    n, groups = micro_scales.shape
    values = decode(codes).view(n, groups, 16).double() * micro_scales.double().unsqueeze(-1)
    return (values * wtscale.double()).view_as(codes)


@PROPERTY
@given(SEEDS, st.integers(1, 5), st.integers(1, 6), HALVES, st.booleans())
def test_nvfp4_rule(seed: int, n: int, groups: int, dtype: torch.dtype, search: bool) -> None:
    weight = layer_weight(n, groups * 16, seed)
    weight[0, :16] = 0
    codes, micro_scales, wtscale = quantize_nvfp4(weight, dtype, scale_search=search)
    assert wtscale.shape == (1,) and wtscale.dtype == dtype and micro_scales.dtype == torch.float8_e4m3fn
    assert not codes[0, :16].any() and (codes != 8).all() and codes.min() >= 0 and codes.max() <= 15
    largest = weight.view(n, groups, 16).abs().amax(dim=-1)
    error = (dequantize_nvfp4(codes, micro_scales, wtscale) - weight).view(n, groups, 16)
    if search:
        plain = dequantize_nvfp4(*quantize_nvfp4(weight, dtype)).view_as(error) - weight.view_as(error)
        assert (error.square().sum(dim=-1) <= plain.square().sum(dim=-1) * (1 + 1e-5) + 1e-30).all()
    else:
        scale = wtscale.float()
        if largest.max() > 0:
            assert torch.equal(scale, (largest.max() / 6 / 448).to(dtype).float().view(1))
        assert torch.equal(micro_scales.float(), encode_e4m3_ties_up(largest / 6 / scale).float())
        # Half the widest spacing (2 of 6) and the rounding of the scale, three mantissa bits or a subnormal step.
        bound = largest / 6 * (1 + 6 / 16) * 1.0001 + 6 * 2**-9 * scale
        assert (error.abs() <= bound.unsqueeze(-1)).all()


def test_nvfp4_ties_up() -> None:
    weight = torch.zeros(1, 16)
    weight[0, :8] = torch.tensor([6.0, 2.5, -2.5, 0.25, -0.25, 0.75, 5.0, -5.0])
    weight *= 448
    codes, micro_scales, wtscale = quantize_nvfp4(weight)
    assert wtscale == 1 and micro_scales.float() == 448
    assert decode(codes)[0, :8].tolist() == [6.0, 3.0, -2.0, 0.5, 0.0, 1.0, 6.0, -4.0]
    codes, micro_scales, wtscale = quantize_nvfp4(torch.zeros(2, 32))
    assert wtscale == 1 and not codes.any() and not micro_scales.float().any()


@PROPERTY
@given(SEEDS, st.booleans(), HALVES)
def test_w4a16_quantisers(seed: int, search: bool, dtype: torch.dtype) -> None:
    weight = layer_weight(6, 256, seed) + 0.05
    codes, scales, zeros = quantize_w4a16(weight, dtype=dtype, scale_search=search)
    assert torch.equal(zeros, -7 * scales) and codes.dtype == torch.uint8 and codes.max() <= 15
    symmetric = relative_error(w4a16.dequantize(codes, scales, zeros), weight)
    if not search:
        signed, expected = quantize_int4(weight, dtype=dtype)
        assert torch.equal(codes.to(torch.int8) - 7, signed) and torch.equal(scales, expected)

    codes, scales, zeros = quantize_w4a16(weight, 128, symmetric=False, dtype=dtype)
    restored = codes.double() * scales.double().repeat_interleave(128, 1) + zeros.double().repeat_interleave(128, 1)
    groups = weight.view(6, 2, 128)
    low, high = groups.amin(dim=-1), groups.amax(dim=-1)
    rounding = (low.abs() + high - low) * torch.finfo(dtype).eps
    bound = (high - low) / 30 * 1.01 + rounding
    assert ((restored - weight).view(6, 2, 128).abs() <= bound.unsqueeze(-1)).all()
    assert symmetric < 0.2
    constant = quantize_w4a16(torch.full((2, 128), 0.5), 128, symmetric=False)
    assert torch.equal(w4a16.dequantize(*constant), torch.full((2, 128), 0.5))


@pytest.mark.parametrize(("n", "k", "rank"), [(300, 700, 8), (700, 300, 32), (40, 30, 16), (30, 40, 50), (300, 300, 0)])
def test_truncated_svd(n: int, k: int, rank: int) -> None:
    weight = layer_weight(n, k, 7)
    up, down = truncated_svd(weight, rank)
    assert up.shape == (n, rank) and down.shape == (rank, k)
    values = torch.linalg.svdvals(weight)
    optimum = values[rank:].square().sum().sqrt()
    assert (weight - up @ down).norm() <= optimum * 1.02 + 1e-5 * values[0]
    kept = min(rank, n, k)
    torch.testing.assert_close(up.norm(dim=0)[:kept], values[:kept], rtol=0.05, atol=1e-4)
    torch.testing.assert_close(down[:kept] @ down[:kept].t(), torch.eye(kept), atol=1e-4, rtol=0)


def test_truncated_svd_generator() -> None:
    weight = layer_weight(400, 300, 1)
    state = torch.random.get_rng_state()
    first, second = truncated_svd(weight, 8), truncated_svd(weight, 8)
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    assert torch.equal(torch.random.get_rng_state(), state)
    seeded = [truncated_svd(weight, 8, generator=torch.Generator().manual_seed(3))[0] for _ in range(2)]
    assert torch.equal(*seeded) and not torch.equal(seeded[0], first[0])


@PROPERTY
@given(
    st.lists(st.lists(st.floats(-(2.0**99), 2.0**99, width=32), min_size=3, max_size=3), min_size=1, max_size=4),
    st.floats(0, 1),
    HALVES,
)
def test_smoothing_is_always_usable(rows: list[list[float]], beta: float, dtype: torch.dtype) -> None:
    weight = torch.tensor(rows)
    smooth = smoothing_from_weights([weight, torch.zeros(0, 3)], beta=beta, dtype=dtype)
    assert smooth.dtype == dtype and smooth.isfinite().all()
    assert (smooth >= 1 / 16).all() and (smooth <= 16).all()
    assert (smooth[~weight.any(dim=0)] == 1).all()


def test_smoothing_formula() -> None:
    weight = layer_weight(200, 64, 2)
    rms = weight.square().mean(dim=0).sqrt()
    expected = (rms / rms.log().mean().exp()) ** -0.5
    torch.testing.assert_close(smoothing_from_weights(weight), expected.bfloat16(), rtol=0.01, atol=0)
    assert (smoothing_from_weights(weight, beta=0.0) == 1).all()
    both = smoothing_from_weights([weight, 1000 * weight])
    assert torch.equal(both, smoothing_from_weights(weight))


@pytest.mark.parametrize("precision", ["int4", "nvfp4"])
def test_each_refinement_lowers_the_error(precision: str) -> None:
    weight = layer_weight(384, 512, 11)

    def error(**options: object) -> float:
        weights = quantize_svdq(weight, precision=precision, **options)  # type: ignore[arg-type]
        return relative_error(effective_weight(weights), weight)

    plain = error(rank=0, scale_search=False)
    searched = error(rank=0)
    branch = error(rank=32, num_iters=1)
    refitted = error(rank=32)
    assert refitted < branch < searched < plain < 0.25
    assert error(rank=64) < refitted


@PROPERTY
@given(
    SEEDS,
    st.integers(1, 40),
    st.integers(1, 200),
    st.integers(0, 24),
    st.sampled_from(["int4", "nvfp4"]),
    HALVES,
    st.booleans(),
)
def test_svdq_layer(seed: int, n: int, k: int, rank: int, precision: str, dtype: torch.dtype, with_bias: bool) -> None:
    weight = layer_weight(n, k, seed)
    bias = torch.randn(n) if with_bias else None
    smooth = smoothing_from_weights(weight)
    weights = quantize_svdq(weight, bias, precision=precision, rank=rank, smooth=smooth, dtype=dtype)  # type: ignore[arg-type]
    group = 64 if precision == "int4" else 16
    padded = math.ceil(k / group) * group
    assert weights.codes.shape == (n, padded) and weights.rank == rank and weights.proj_up.dtype == dtype
    assert torch.equal(weights.smooth[:k], smooth.to(dtype)) and (weights.smooth[k:] == 1).all()
    assert not weights.codes[:, k:].any() and not weights.proj_down[:, k:].any()
    assert (weights.bias is None) if bias is None else torch.equal(weights.bias, bias.to(dtype))  # type: ignore[arg-type]
    assert relative_error(effective_weight(weights)[:, :k], weight) < 0.2
    again = quantize_svdq(weight, bias, precision=precision, rank=rank, smooth=smooth, dtype=dtype)  # type: ignore[arg-type]
    assert torch.equal(again.codes, weights.codes) and torch.equal(again.proj_up, weights.proj_up)
    restored = unpack_svdq(pack_svdq(weights))
    assert torch.equal(restored.codes[:n, :padded], weights.codes)


def test_fused_members_keep_their_own_tensor_scale() -> None:
    members = [layer_weight(32, 128, 3), 100 * layer_weight(48, 128, 4), 0.01 * layer_weight(16, 128, 5)]
    sizes = [len(member) for member in members]
    weights = quantize_svdq(torch.cat(members), precision="nvfp4", segments=sizes)
    assert weights.wtscale is None and weights.wcscales is not None
    for part in weights.wcscales.split(sizes):
        assert (part == part[0]).all()
    assert len(set(weights.wcscales.tolist())) == 3
    for actual, expected in zip(effective_weight(weights).split(sizes), members, strict=True):
        assert relative_error(actual, expected) < 0.15
    single = quantize_svdq(members[0], precision="nvfp4", segments=[32])
    assert single.wcscales is None and single.wtscale is not None


@pytest.mark.parametrize("with_bias", [False, True])
def test_shift_does_not_change_the_layer(with_bias: bool) -> None:
    weight = layer_weight(96, 256, 8)
    bias = torch.randn(96) if with_bias else None
    smooth = smoothing_from_weights(weight)
    plain = quantize_svdq(weight, bias, smooth=smooth, scale_search=False)
    shifted = quantize_svdq(weight, bias, smooth=smooth, shift=SHIFT, scale_search=False)
    assert torch.equal(plain.codes, shifted.codes) and shifted.bias is not None
    x = torch.nn.functional.gelu(torch.randn(50, 256, generator=torch.Generator().manual_seed(1)), approximate="tanh")
    exact = x.double() @ effective_weight(shifted).double().t() + (0 if bias is None else bias.double())
    for weights, shift in ((plain, 0.0), (shifted, SHIFT)):
        assert relative_error(w4a8.linear(x, weights, shift=shift), exact) < 0.02
    # The quantised path of a zero input is the shift alone, and the bias takes it back to the last bits of its dtype.
    constant = SHIFT * (dequantize(shifted).double() / shifted.smooth.double()).sum(dim=1)
    rest = constant + shifted.bias.double() - (0 if bias is None else bias.double())
    assert (rest.abs() <= shifted.bias.double().abs() * 2**-8).all()


def test_strided_weights() -> None:
    weight = layer_weight(128, 64, 9)
    quantisers: list[Callable[[Tensor], tuple[Tensor, ...]]] = [
        quantize_int4,
        quantize_nvfp4,
        lambda w: quantize_w4a16(w, 128, symmetric=False),
        lambda w: (quantize_svdq(w).codes,),
    ]
    for quantize in quantisers:
        for strided, contiguous in zip(quantize(weight.t()), quantize(weight.t().contiguous()), strict=True):
            torch.testing.assert_close(strided.float(), contiguous.float(), atol=0, rtol=0)


def nan_weight() -> Tensor:
    weight = torch.zeros(64, 64)
    weight[3, 5] = math.nan
    return weight


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: quantize_svdq(nan_weight()), ValueError, "weight: expected finite"),
        (lambda: quantize_svdq(-math.inf * torch.ones(64, 64)), ValueError, "weight: expected finite"),
        (lambda: quantize_int4(nan_weight()), ValueError, "weight: expected finite"),
        (lambda: quantize_int4(torch.full((1, 64), 1e6), dtype=torch.float16), ValueError, "weight: .*float16"),
        (lambda: quantize_nvfp4(nan_weight()), ValueError, "weight: expected finite"),
        (lambda: quantize_w4a16(nan_weight(), symmetric=False), ValueError, "weight: expected finite"),
        (lambda: quantize_int4(torch.zeros(2, 65)), ValueError, "weight: expected K .* 64, got 65"),
        (lambda: quantize_svdq(torch.ones(64, 64, dtype=torch.int8)), TypeError, "weight: expected dtype"),
        (lambda: quantize_svdq(torch.ones(8, 64), torch.ones(9)), ValueError, r"bias: expected shape \[8\], got \[9\]"),
        (lambda: quantize_svdq(torch.ones(8, 64), torch.full((8,), math.nan)), ValueError, "bias: expected finite"),
        (lambda: quantize_svdq(torch.ones(8, 64), smooth=torch.zeros(64)), ValueError, "smooth: expected positive"),
        (lambda: quantize_svdq(torch.ones(8, 64), smooth=torch.ones(63)), ValueError, "smooth: expected shape"),
        (lambda: quantize_svdq(torch.ones(8, 64), rank=-1), ValueError, "rank: expected"),
        (lambda: quantize_svdq(torch.ones(8, 64), segments=[4, 5]), ValueError, "segments: .* add up to 8"),
        (lambda: quantize_svdq(torch.ones(8, 64), precision="nvfp4", shift=SHIFT), ValueError, "shift: expected 0"),
        (lambda: quantize_svdq(torch.ones(8, 64), precision="int8"), ValueError, "precision: .* got 'int8'"),  # type: ignore[arg-type]
        (lambda: quantize_svdq(torch.ones(8, 64), dtype=torch.float32), TypeError, "dtype: expected float16"),
        (lambda: quantize_svdq(torch.ones(0, 64)), ValueError, "weight: expected at least one row"),
        (lambda: truncated_svd(torch.ones(8, 64), -1), ValueError, "rank: expected"),
        (lambda: smoothing_from_weights([]), ValueError, "weights: expected at least one"),
        (lambda: smoothing_from_weights(torch.ones(8, 64), beta=2.0), ValueError, "beta: expected"),
        (lambda: smoothing_from_weights(nan_weight()), ValueError, r"weights\[0\]: expected finite"),
    ],
)
def test_wrong_arguments(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
