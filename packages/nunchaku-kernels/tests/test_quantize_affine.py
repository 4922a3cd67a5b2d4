"""Asymmetric groups: the search never loses, 8 bits survive being two planes, GPTQ and descent are the textbooks'."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nunchaku_kernels.formats import W4A16Weights, pack_w4a16, unpack_awq, unpack_awq_scales, unpack_w4a16
from nunchaku_kernels.quantize import AffineCodes, quantize_affine, quantize_w4a16
from nunchaku_kernels.quantize.gptq import compensation, descend, gptq
from nunchaku_kernels.reference import w4a16 as reference

PROPERTY = settings(deadline=None, max_examples=25)
SEEDS = st.integers(0, 2**32 - 1)
DTYPES = st.sampled_from([torch.bfloat16, torch.float16])


def weight_of(seed: int, n: int, k: int, size: float = 0.02) -> Tensor:
    """Heavy tails, off centre, a constant group, a group of zeros."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, k, generator=generator) * torch.randn(n, k, generator=generator).exp()
    weight += torch.randn(n, 1, generator=generator)
    weight[0, :64], weight[-1, -64:] = 0.7, 0
    return weight * size


def moment_of(seed: int, k: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3 * k, k, generator=generator) @ torch.randn(k, k, generator=generator) / k**0.5
    x *= torch.randn(k, generator=generator).exp()
    return x.t() @ x / len(x)


def objective(target: Tensor, codes: AffineCodes, hessian: Tensor) -> float:
    missed = target.double() - codes.dequantize().double()
    return float(((missed @ hessian.double()) * missed).sum())


# ----------------------------------------------------------------- rounding to nearest


@PROPERTY
@given(SEEDS, st.integers(2, 9), st.integers(1, 4), st.sampled_from([64, 128]), DTYPES)
def test_whole_ranges_are_plain_rounding(seed: int, n: int, groups: int, size: int, dtype: torch.dtype) -> None:
    weight = weight_of(seed, n, groups * size)
    mine = quantize_affine(weight, size, search=False, dtype=dtype)
    grouped = weight.float().view(n, groups, size)
    zeros = grouped.amin(dim=2).to(dtype)
    span = grouped.amax(dim=2) - grouped.amin(dim=2)
    scales = (span / torch.full_like(span, 15)).to(dtype)
    scales = torch.where(scales == 0, 1.0, scales)  # of a constant group
    codes = ((grouped - zeros.float()[..., None]) / scales.float()[..., None]).round().clamp(0, 15).view(n, -1).byte()
    assert torch.equal(mine.codes, codes) and torch.equal(mine.scales, scales) and torch.equal(mine.zeros, zeros)
    for same, found in zip(
        quantize_w4a16(weight, size, symmetric=False, dtype=dtype), (codes, scales, zeros), strict=True
    ):
        assert torch.equal(same, found)
    values = reference.dequantize(codes, scales.float(), zeros.float())
    assert torch.equal(mine.dequantize(), values)
    assert torch.equal(mine.with_levels(mine.levels()).codes, codes)


@PROPERTY
@given(SEEDS, st.booleans(), DTYPES)
def test_search_never_loses(seed: int, weighted: bool, dtype: torch.dtype) -> None:
    weight = weight_of(seed, 8, 256)
    importance = torch.randn(256, generator=torch.Generator().manual_seed(seed)).exp() if weighted else torch.ones(256)
    importance[3::50] = 0

    def errors(codes: AffineCodes) -> Tensor:
        squares = (codes.dequantize() - weight).double().square() * importance
        return squares.view(8, 2, 128).sum(dim=-1)

    plain = errors(quantize_affine(weight, 128, search=False, dtype=dtype))
    found = errors(quantize_affine(weight, 128, importance=importance, dtype=dtype))
    assert (found <= plain * (1 + 1e-5)).all()
    assert found.sum() < 0.95 * plain.sum()


@PROPERTY
@given(SEEDS, st.integers(1, 3), st.sampled_from([64, 128]), DTYPES, st.sampled_from([1e-3, 0.02, 30.0]))
def test_eight_bits_are_two_planes(seed: int, groups: int, size: int, dtype: torch.dtype, magnitude: float) -> None:
    weight = weight_of(seed, 8, groups * size, magnitude)
    codes = quantize_affine(weight, size, bits=8, dtype=dtype)
    step = codes.steps().repeat_interleave(size, dim=1)
    low, high = (
        f(weight.view(8, groups, size), dim=-1).repeat_interleave(size, dim=1) for f in (torch.amin, torch.amax)
    )
    # at most half a step, and what the rounding of the zero costs
    zero_error = codes.zeros.abs().float().repeat_interleave(size, dim=1) * torch.finfo(dtype).eps
    coarse = torch.where(high > low, step, 0)  # a constant group is its zero
    assert ((codes.dequantize() - weight).abs() <= coarse / 2 + zero_error + 1e-6 * high.abs()).all()
    assert (step <= torch.clamp((high - low) / 255 * (1 + 1 / 16) * 1.01, min=2**-24)).logical_or(step == 1).all()

    form = W4A16Weights(codes.codes, codes.scales, codes.zeros, 8)
    tensors = pack_w4a16(form, torch.int16)
    assert tensors["qweight"].shape == (2, 2 * groups * size)
    again = unpack_w4a16(tensors, 8, size)
    assert torch.equal(again.codes, form.codes) and torch.equal(again.zeros, form.zeros)
    assert torch.equal(again.scales, form.scales)
    # Planes as a kernel dequantises them, each weight rounded to 16 bits: the upper one exactly.
    planes = unpack_awq(tensors["qweight"])
    parts = (unpack_awq_scales(tensors[name], planes.shape[1], size) for name in ("wscales", "wzeros"))
    upper, lower = reference.dequantize(planes, *parts).float().chunk(2, dim=1)
    exact_upper = (form.codes // 16).float().sub(8) * 16 * step
    assert torch.equal(upper, exact_upper)
    lost = (upper + lower - form.dequantize()).abs()
    assert (
        lost <= (15 * step + codes.zeros.abs().float().repeat_interleave(size, dim=1)) * torch.finfo(dtype).eps
    ).all()


def test_wrong_arguments_are_named() -> None:
    weight = torch.randn(4, 128)
    for arguments, message in (
        ({"bits": 5}, "bits: expected 4 or 8, got 5"), ({"group_size": 48}, "weight: expected K"),
        ({"importance": torch.ones(64)}, "importance"), ({"importance": -torch.ones(128)}, "importance: .*negative"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            quantize_affine(weight, **({"group_size": 128} | arguments))
    with pytest.raises(ValueError, match="weight: expected finite"):
        quantize_affine(weight.fill_(torch.nan), 128)
    with pytest.raises(ValueError, match=r"scales fit torch\.float16"):
        quantize_affine(torch.tensor([[-1e6, 1e6] * 64]), 128, dtype=torch.float16)


# ----------------------------------------------------------------- GPTQ and descent


@pytest.mark.parametrize("bits", [4, 8])
def test_gptq_is_optimal_brain_quantisation(bits: int) -> None:
    target, hessian = weight_of(5, 24, 256), moment_of(6, 256)
    start = quantize_affine(target, 128, bits=bits, dtype=torch.bfloat16)
    actual = gptq(target, start, hessian, damping=0.05)
    # In fp64: every column is rounded, its row of the inverse corrects the others, then it leaves the inverse.
    h = hessian.double() + 0.05 * hessian.diagonal().double().mean() * torch.eye(256)
    inverse, work = torch.linalg.inv(h), target.double().clone()
    steps, zeros = (part.double().repeat_interleave(128, dim=1) for part in (start.steps(), start.zeros))
    levels = torch.zeros_like(work)
    for k in torch.argsort(hessian.diagonal(), descending=True, stable=True).tolist():
        levels[:, k] = start.nearest((work[:, k] - zeros[:, k]) / steps[:, k])
        error = (work[:, k] - levels[:, k] * steps[:, k] - zeros[:, k]) / inverse[k, k]
        work -= torch.outer(error, inverse[k])
        inverse -= torch.outer(inverse[:, k], inverse[k]) / inverse[k, k]
    # fp32 may tip a value at the middle of two levels, and with it what follows in its row; finer steps, more often
    assert (actual.levels() != levels).any(dim=1).sum() <= (1 if bits == 4 else 5)
    assert torch.equal(actual.scales, start.scales) and torch.equal(actual.zeros, start.zeros)
    assert torch.equal(gptq(target, start, compensation(hessian, 0.05)).codes, actual.codes)
    assert objective(target, actual, hessian) < 0.7 * objective(target, start, hessian)


def plain_descent(target: Tensor, start: AffineCodes, hessian: Tensor) -> AffineCodes:
    """One sweep in fp64, with what is missed computed anew at every step; scale and zero by least squares."""
    h, size, levels = hessian.double(), start.group_size, start.levels().double()
    steps, zeros = start.steps().double(), start.zeros.double()

    def missed() -> Tensor:
        values = levels.view(*steps.shape, size) * steps.unsqueeze(-1) + zeros.unsqueeze(-1)
        return target.double() - values.view_as(levels)

    for group in range(steps.shape[1]):
        rows = slice(group * size, (group + 1) * size)
        for n in range(len(levels) if start.bits == 4 else 0):
            basis = torch.zeros(2, levels.shape[1], dtype=torch.float64)
            basis[0, rows], basis[1, rows] = levels[n, rows], 1
            here, normal = missed()[n], basis @ h @ basis.t()
            before = steps[n, group].clone(), zeros[n, group].clone()
            least = here @ h @ here
            move = torch.linalg.solve(normal, basis @ h @ here)
            steps[n, group] = (before[0] + move[0]).to(start.scales.dtype).double()
            left = missed()[n]  # for the scale as it is stored
            zeros[n, group] = (before[1] + (basis[1] @ h @ left) / normal[1, 1]).to(start.scales.dtype).double()
            left = missed()[n]
            if left @ h @ left >= least:
                steps[n, group], zeros[n, group] = before
        for k in range(rows.start, rows.stop):
            levels[:, k] = start.nearest(levels[:, k] + (missed() @ h[:, k]) / (h[k, k] * steps[:, group]))
    result = start.with_levels(levels.float())
    return AffineCodes(result.codes, steps.to(start.scales.dtype), zeros.to(start.zeros.dtype), start.bits)


@pytest.mark.parametrize("bits", [4, 8])
def test_descent_is_one_plain_sweep(bits: int) -> None:
    generator = torch.Generator().manual_seed(3)
    target, hessian = torch.randn(16, 128, generator=generator) * 0.02, moment_of(7, 128)
    start = quantize_affine(target, 64, bits=bits, dtype=torch.bfloat16)
    result, expected = descend(target, start, hessian), plain_descent(target, start, hessian)
    differ = [(mine != other).any(dim=1) for mine, other in (
        (result.codes, expected.codes), (result.scales, expected.scales), (result.zeros, expected.zeros)
    )]  # fmt: skip
    assert torch.stack(differ).any(dim=0).sum() <= (1 if bits == 4 else 4)


@PROPERTY
@given(SEEDS, st.booleans(), st.sampled_from([4, 8]))
def test_descent_never_increases_the_error(seed: int, rounded_well: bool, bits: int) -> None:
    target, hessian = weight_of(seed, 6, 256), moment_of(seed, 256)
    hessian[:, 7] = hessian[7] = 0
    start = quantize_affine(target, 128, bits=bits, dtype=torch.bfloat16)
    if rounded_well:
        start = gptq(target, start, hessian)
    better = descend(target, start, hessian)
    slack = 1e-6 * float(((target @ hessian) * target).sum())
    assert objective(target, better, hessian) <= objective(target, start, hessian) + slack
    assert torch.equal(better.codes[:, 7], start.codes[:, 7])
    if bits == 8:
        assert torch.equal(better.scales, start.scales) and torch.equal(better.zeros, start.zeros)
