"""The compiled W4A16 kernel against its plain-torch definition."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nunchaku_kernels import _C
from nunchaku_kernels.formats import pack_awq, pack_awq_int16, pack_awq_scales
from nunchaku_kernels.reference import w4a16

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
ROUNDING = {torch.float32: 2**-18, torch.float16: 2**-10, torch.bfloat16: 2**-7}

isas = pytest.mark.parametrize("isa", _C.isas())


def native(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    bias: torch.Tensor | None,
    group_size: int,
    isa: str,
    threads: int = 2,
) -> torch.Tensor:
    """y [M, N] from x [M, K], published qweight and canonical scales and zeros [N, G]."""
    tokens, channels = x.shape
    rows = scales.shape[0]
    wscales, wzeros = pack_awq_scales(scales, group_size), pack_awq_scales(zeros, group_size)
    out = torch.empty(tokens, rows, dtype=x.dtype)
    _C.w4a16_linear(
        x.data_ptr(), DTYPES[x.dtype], tokens, channels, x.stride(0), qweight.data_ptr(), wscales.data_ptr(),
        wzeros.data_ptr(), DTYPES[scales.dtype], 0 if bias is None else bias.data_ptr(),
        0 if bias is None else DTYPES[bias.dtype], rows, group_size, out.data_ptr(), DTYPES[out.dtype], threads, isa,
    )  # fmt: skip
    return out


@isas
@given(
    seed=st.integers(0, 2**31),
    tokens=st.sampled_from([1, 2, 3, 4, 5, 8, 13, 25, 33, 71]),
    quads=st.integers(1, 9) | st.integers(257, 280),
    groups=st.integers(1, 5),
    group_size=st.sampled_from([64, 128]),
    dtype=st.sampled_from(list(DTYPES)),
    scales_dtype=st.sampled_from(list(DTYPES)),
    biased=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_linear(
    isa: str,
    seed: int,
    tokens: int,
    quads: int,
    groups: int,
    group_size: int,
    dtype: torch.dtype,
    scales_dtype: torch.dtype,
    biased: bool,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows, channels = 4 * quads, group_size * groups
    codes = torch.randint(0, 16, (rows, channels), generator=generator, dtype=torch.uint8)
    scales = torch.rand(rows, groups, generator=generator).to(scales_dtype)
    zeros = (-8 * torch.rand(rows, groups, generator=generator)).to(scales_dtype)
    x = torch.randn(tokens, channels + 3, generator=generator).to(dtype)[:, :channels]
    bias = torch.randn(rows, generator=generator).to(dtype) if biased else None
    y = native(x, pack_awq(codes), scales, zeros, bias, group_size, isa)
    expected = w4a16.linear(x.float(), codes, scales, zeros, bias)
    # Terms that cancel leave the rounding of their sum's largest parts behind.
    terms = (x.float().abs() @ w4a16.dequantize(codes, scales, zeros).float().abs().t()).max().item()
    torch.testing.assert_close(y.float(), expected, rtol=ROUNDING[dtype], atol=2e-4 + terms * 2**-22)
    assert torch.equal(y, native(x, pack_awq_int16(codes), scales, zeros, bias, group_size, isa, threads=1))


@isas
@given(
    seed=st.integers(0, 2**31), tokens=st.integers(6, 70), kept=st.integers(5, 40), dtype=st.sampled_from(list(DTYPES))
)
@settings(max_examples=10, deadline=None)
def test_a_token_does_not_depend_on_its_neighbours(
    isa: str, seed: int, tokens: int, kept: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (36, 640), generator=generator, dtype=torch.uint8)
    scales = torch.rand(36, 10, generator=generator).to(dtype)
    x = torch.randn(tokens, 640, generator=generator).to(dtype)
    x[-1] = float("nan")
    chosen = torch.randperm(tokens - 1, generator=generator)[:kept]
    if len(chosen) > 4:  # fewer are multiplied in another order
        every, some = (native(rows, pack_awq(codes), scales, -8 * scales, None, 64, isa) for rows in (x, x[chosen]))
        assert torch.equal(every[chosen], some)


@isas
@pytest.mark.parametrize("tokens", [1, 2, 64])
@pytest.mark.parametrize(
    ("dtype", "x_dtype"), [*((dtype, torch.float32) for dtype in DTYPES), (torch.bfloat16, torch.bfloat16)]
)
def test_weights_are_rounded_like_the_definition(
    isa: str, tokens: int, dtype: torch.dtype, x_dtype: torch.dtype
) -> None:
    """One-hot tokens read the decoded weights back, bit for bit, over all codes."""
    generator = torch.Generator().manual_seed(3)
    codes = torch.arange(16, dtype=torch.uint8).repeat(64, 8)
    scales = torch.rand(64, 2, generator=generator).to(dtype)
    zeros = (-7.3 * scales.float()).to(dtype)
    weights = w4a16.dequantize(codes, scales, zeros)
    one_hot = torch.eye(128, dtype=x_dtype)
    for start in range(0, 128, tokens):
        y = native(one_hot[start : start + tokens], pack_awq(codes), scales, zeros, None, 64, isa)
        assert torch.equal(y.float(), weights[:, start : start + tokens].t().float())
