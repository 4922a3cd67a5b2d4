"""`W4A16Linear` and `ModulationLinear` against the float linears they were made from and against their reference."""

import copy
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nunchaku_kernels import reference
from nunchaku_kernels.formats import (
    W4A16Weights,
    from_channel_major,
    pack_awq,
    pack_awq_int16,
    pack_awq_scales,
    pack_w4a16,
    unpack_awq,
    unpack_awq_scales,
)
from nunchaku_kernels.nn import ModulationLinear, W4A16Linear
from nunchaku_kernels.quantize import quantize_affine, quantize_w4a16
from nunchaku_kernels.quantize.modulation import quantize_modulation

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ROUNDING = {torch.float32: 2**-18, torch.float16: 2**-10, torch.bfloat16: 2**-7}


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def make_layer(
    n: int = 20, k: int = 128, group_size: int = 64, container: torch.dtype = torch.int32, bias: bool = True
) -> tuple[W4A16Linear, torch.Tensor]:
    """A layer, and the weight it holds."""
    codes, scales, zeros = quantize_w4a16(randn(n, k), group_size, symmetric=False, dtype=torch.bfloat16)
    layer = W4A16Linear(k, n, bias=bias, group_size=group_size, container=container, device="meta", name="block.wo")
    tensors = {
        "qweight": pack_awq(codes) if container == torch.int32 else pack_awq_int16(codes),
        "wscales": pack_awq_scales(scales, group_size),
        "wzeros": pack_awq_scales(zeros, group_size),
    }
    layer.load_packed(tensors | ({"bias": randn(n, seed=1, dtype=torch.bfloat16)} if bias else {}))
    return layer, reference.w4a16.dequantize(codes, scales, zeros).float()


def make_modulation(chunks: int, channels: int = 8, k: int = 64) -> tuple[ModulationLinear, torch.Tensor, torch.Tensor]:
    """A layer, and the weight and bias it stands for, chunk-major, without the folded 1."""
    n = chunks * channels
    weight, bias = randn(n, k) / 8, randn(n, seed=1)
    layer = ModulationLinear(k, n, num_chunks=chunks, device="meta", name="norm1.linear")
    layer.load_packed(quantize_modulation(weight, bias, chunks))
    scales, zeros = (unpack_awq_scales(tensor, k, 64) for tensor in (layer.wscales, layer.wzeros))
    stored = reference.w4a16.dequantize(unpack_awq(layer.qweight), scales, zeros).float()
    return layer, from_channel_major(stored, chunks), bias


@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_forward_is_the_dequantised_linear(data: st.DataObject) -> None:
    group_size = data.draw(st.sampled_from([64, 128]))
    n, k = 4 * data.draw(st.integers(1, 12)), group_size * data.draw(st.integers(1, 3))
    container, dtype = data.draw(st.sampled_from([torch.int32, torch.int16])), data.draw(st.sampled_from(DTYPES))
    layer, weight = make_layer(n, k, group_size, container, data.draw(st.booleans()))
    shape = data.draw(st.sampled_from([(), (0,), (1,), (3,), (2, 0), (2, 3), (1, 2, 3)]))
    x = randn(*shape, k, dtype=dtype)
    y = layer(x)
    expected = x.float() @ weight.t() + (0 if layer.bias is None else layer.bias.float())
    assert y.dtype == dtype
    atol = ROUNDING[dtype] * float(expected.abs().amax()) if y.numel() else 0.0
    torch.testing.assert_close(y.float(), expected, rtol=ROUNDING[dtype], atol=atol)
    start = data.draw(st.integers(0, n - 1))
    stop = data.draw(st.integers(start + 1, n))
    assert torch.equal(layer(x, rows=(start, stop)), y[..., start:stop])
    assert layer.weight.shape == (n, k)


def form_of(n: int, k: int, bits: int, rank: int, group_size: int = 64, seed: int = 0) -> W4A16Weights:
    codes = quantize_affine(randn(n, k, seed=seed), group_size, bits=bits, dtype=torch.bfloat16)
    branch = (
        (randn(rank, k, seed=seed + 1).bfloat16() / 8, randn(n, rank, seed=seed + 2).bfloat16() / 8) if rank else ()
    )
    return W4A16Weights(codes.codes, codes.scales, codes.zeros, bits, *branch)


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_eight_bits_and_a_branch_are_the_linear_they_stand_for(data: st.DataObject) -> None:
    group_size, bits = data.draw(st.sampled_from([64, 128])), data.draw(st.sampled_from([4, 8]))
    n, k = 4 * data.draw(st.integers(1, 12)), group_size * data.draw(st.integers(1, 3))
    container, dtype = data.draw(st.sampled_from([torch.int32, torch.int16])), data.draw(st.sampled_from(DTYPES))
    form = form_of(n, k, bits, data.draw(st.sampled_from([0, 1, 5, 16])), group_size, data.draw(st.integers(0, 99)))
    bias = randn(n, seed=1, dtype=torch.bfloat16) if data.draw(st.booleans()) else None
    layer = W4A16Linear.from_weights(form, bias, container=container)
    weight = form.dequantize().double()
    # each stored 4-bit weight is rounded to bfloat16: of 8 bits, the lower nibbles with the zero
    steps = form.scales.double().repeat_interleave(group_size, dim=1)
    zeros = form.zeros.double().abs().repeat_interleave(group_size, dim=1)
    rounding = (15 * steps + zeros) * 2**-8
    x = randn(*data.draw(st.sampled_from([(), (0,), (1,), (3,), (2, 3)])), k, dtype=dtype)
    y = layer(x)
    expected = x.double() @ weight.t() + (0 if bias is None else bias.double())
    assert y.dtype == dtype and layer.rank == form.rank
    # the low-rank hidden state is rounded as well
    hidden = (x.double() @ form.proj_down.double().t()).abs() @ form.proj_up.double().abs().t() if form.rank else 0
    bound = x.double().abs() @ rounding.t() + ROUNDING[dtype] * (2 * expected.abs() + 2 * hidden + 0.01)
    assert ((y.double() - expected).abs() <= bound).all()
    assert ((layer.dequantize().double() - weight).abs() <= rounding + 1e-6).all()
    start = data.draw(st.integers(0, n - 1))
    assert torch.equal(layer(x, rows=(start, n)), y[..., start:])
    state = pack_w4a16(form, container) | ({} if bias is None else {"bias": bias})
    assert {key for key in layer.state_dict() if key != "weight"} == state.keys()


def test_eight_bits_are_as_exact_as_sixteen() -> None:
    """What storing 8 bits in two rounded planes loses, relative to the loss by 8 bits itself."""
    weight, x = randn(64, 512), randn(256, 512, seed=1, dtype=torch.bfloat16)
    form = form_of(64, 512, 8, 0, group_size=128)
    exact = x.double() @ form.dequantize().double().t()
    quantised = (exact - x.double() @ weight.double().t()).square().mean()
    planes = W4A16Linear.from_weights(form).dequantize().double()
    assert (exact - x.double() @ planes.t()).square().mean() < 0.05 * quantised


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_with_a_branch_and_eight_bits(dtype: torch.dtype) -> None:
    form = form_of(20, 128, 8, 6)
    layer = W4A16Linear.from_weights(form, randn(20, seed=4, dtype=torch.bfloat16))
    learned = [layer.bias, layer.proj_down, layer.proj_up]
    for parameter in learned:
        parameter.requires_grad_()
    x = randn(3, 2, 128, dtype=dtype).requires_grad_()
    seed = randn(3, 2, 20, seed=5, dtype=dtype)
    mine = torch.autograd.grad(layer(x), [x, *learned], seed)
    inputs, bias, down, up = (tensor.detach().double().requires_grad_() for tensor in (x, *learned))
    codes = W4A16Linear.from_weights(form_of(20, 128, 8, 0)).dequantize().double()
    y = inputs @ codes.t() + (inputs @ down.t()) @ up.t() + bias
    for given_gradient, wanted in zip(
        mine, torch.autograd.grad(y, [inputs, bias, down, up], seed.double()), strict=True
    ):
        tolerance = 2 * max(ROUNDING[dtype], 2**-8) * float(wanted.abs().max())
        torch.testing.assert_close(given_gradient.double(), wanted, rtol=2**-7, atol=tolerance)


def test_a_branch_and_eight_bits_survive_copies_conversions_and_compilation() -> None:
    layer, x = W4A16Linear.from_weights(form_of(24, 128, 8, 3), name="block.wo"), randn(2, 128)
    y = layer(x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), y)
    empty = W4A16Linear(128, 24, bias=False, bits=8, rank=3)
    empty.load_state_dict(layer.state_dict(), strict=True)
    assert torch.equal(empty(x), y)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), y, rtol=1e-5, atol=1e-5)
    assert "bits=8, rank=3" in repr(layer)
    before = layer.dequantize()
    layer.half()  # holds the scales of 8 bits, which have few digits; the lower plane is rounded otherwise
    torch.testing.assert_close(layer.dequantize(), before, rtol=0, atol=2**-7)


@pytest.mark.parametrize("chunks", [3, 6])
@pytest.mark.parametrize("dtype", DTYPES)
def test_modulation_is_the_original_linear(chunks: int, dtype: torch.dtype) -> None:
    layer, weight, bias = make_modulation(chunks)
    x = randn(2, 64, dtype=dtype)
    expected = x.float() @ weight.t() + bias
    tolerance = 2**-6 if dtype == torch.bfloat16 else 2**-7  # the stored bias has 8 bits
    torch.testing.assert_close(layer(x).float(), expected, rtol=tolerance, atol=4 * tolerance)
    assert layer(x).dtype == dtype
    plain, stored = expected.chunk(chunks, dim=-1), layer.chunks(x)
    for index, (one, other) in enumerate(zip(stored, plain, strict=True)):
        folded = other + 1 if index in (1, chunks - 2) else other
        torch.testing.assert_close(one.float(), folded, rtol=tolerance, atol=4 * tolerance)
    torch.testing.assert_close(layer.natural_bias().float(), bias, rtol=2**-7, atol=2**-7)
    assert torch.equal(layer(x, rows=(3, 17)), layer(x)[..., 3:17])
    assert layer(x[None]).shape == (1, 2, chunks * 8)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_are_those_of_the_dequantised_weight(dtype: torch.dtype) -> None:
    layer, weight = make_layer()
    layer.bias.requires_grad_()
    x = randn(3, 2, 128, dtype=dtype).requires_grad_()
    y = layer(x, rows=(3, 18))
    seed = randn(*y.shape, seed=5, dtype=dtype)
    dx, db = torch.autograd.grad(y, [x, layer.bias], seed)
    expected = seed.float() @ weight[3:18]
    atol = 2 * ROUNDING[dtype] * float(expected.abs().max())
    torch.testing.assert_close(dx.float(), expected, rtol=2 * ROUNDING[dtype], atol=atol)
    torch.testing.assert_close(db[3:18].float(), seed.float().sum(dim=(0, 1)), rtol=2**-7, atol=2**-6)
    modulation, _, _ = make_modulation(6)
    x = randn(1, 64).requires_grad_()
    modulation(x).sum().backward()
    assert x.grad.any()


def test_gradients_of_gradients_and_of_compiled_layers() -> None:
    layer = W4A16Linear.from_weights(form_of(24, 128, 8, 3), randn(24, seed=4, dtype=torch.bfloat16)).float()
    weight, bias = layer.dequantize() - layer.proj_up @ layer.proj_down, layer.bias
    layer.proj_up.requires_grad_()

    def plain(x: torch.Tensor) -> torch.Tensor:
        return x @ weight.t() + x @ layer.proj_down.t() @ layer.proj_up.t() + bias

    torch.compiler.reset()
    given_gradients = []
    for function in (plain, layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        x = randn(5, 128).requires_grad_()
        wanted = [x, layer.proj_up]
        gradients = torch.autograd.grad(function(x).pow(3).sum(), wanted, create_graph=function in (plain, layer))
        if function in (plain, layer):
            gradients += torch.autograd.grad(gradients[0].square().sum(), wanted)
        given_gradients.append(gradients)
    for others in given_gradients[1:]:
        for mine, expected in zip(others, given_gradients[0], strict=False):
            torch.testing.assert_close(mine, expected, rtol=1e-3, atol=1e-4 * float(expected.detach().abs().max()))
    x = randn(5, 128).requires_grad_()
    exported = torch.export.export(layer, (x,)).module()
    torch.testing.assert_close(exported(x), layer(x), rtol=1e-5, atol=1e-5)


def test_copies_conversions_and_state() -> None:
    layer, x = make_modulation(6)[0], randn(2, 64)
    y = layer(x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), y)
    empty = ModulationLinear(64, 48, num_chunks=6)
    empty.load_state_dict(layer.state_dict(), strict=True)
    assert torch.equal(empty(x), y)
    layer.half()
    assert (layer.qweight.dtype, layer.wzeros.dtype, layer.weight.dtype) == (torch.int32, torch.float16, torch.float16)
    torch.testing.assert_close(layer(x), y, rtol=2**-6, atol=2**-6)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"in_features": 96}, ValueError, "`in_features`"), ({"in_features": 64}, ValueError, "`in_features`.*128"),
        ({"out_features": 6}, ValueError, "`out_features`"), ({"group_size": 0}, ValueError, "`group_size`.*0"),
        ({"group_size": 32}, ValueError, "`group_size`"), ({"group_size": 256}, ValueError, "`group_size`"),
        ({"bits": 5}, ValueError, "`bits`.*5"), ({"rank": -1}, ValueError, "`rank`.*-1"),
        ({"container": torch.int8}, TypeError, "`container`.*int8"), ({"dtype": torch.int32}, TypeError, "`dtype`"),
    ],
)  # fmt: skip
def test_wrong_layers_are_refused(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"t5: .*{message}"):
        W4A16Linear(**({"in_features": 128, "out_features": 8, "group_size": 128, "name": "t5"} | arguments))


@pytest.mark.parametrize("chunks", [-3, 0, 1, 2, 4, 5, 7])
def test_wrong_chunks_are_refused(chunks: int) -> None:
    with pytest.raises(ValueError, match="norm: `num_chunks` must be 3 or 6"):
        ModulationLinear(64, 840, num_chunks=chunks, name="norm")
    with pytest.raises(ValueError, match=r"norm: .*`out_features`"):
        ModulationLinear(64, 8, num_chunks=3, name="norm")


@pytest.mark.parametrize("rows", [(0, 0), (-1, 4), (4, 3), (0, 49)])
def test_wrong_calls_name_the_layer(rows: tuple[int, int]) -> None:
    layer, x = make_modulation(6)[0], randn(2, 64)
    with pytest.raises(ValueError, match=r"norm1\.linear: `rows`.*0\.\.48"):
        layer(x, rows=rows)
    plain, _ = make_layer(n=48)
    with pytest.raises(ValueError, match=r"block\.wo: `rows`.*0\.\.48"):
        plain(randn(2, 128), rows=rows)
    with pytest.raises(TypeError, match=r"block\.wo: `rows`"):
        plain(randn(2, 128), rows=(0, 4.0))
    for wrong, error in (
        (randn(2, 63), ValueError),
        (x.double(), TypeError),
        (x.to("meta"), ValueError),
        (None, TypeError),
    ):
        with pytest.raises(error, match=r"norm1\.linear: `x`"):
            layer(wrong)
        with pytest.raises(error, match=r"norm1\.linear: `x`"):
            layer.chunks(wrong)
