"""The tensors of a modulation layer give back the linear they were made from, in diffusers' order."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nunchaku_kernels.nn import ModulationLinear
from nunchaku_kernels.quantize import InputMoments, quantize_modulation


def layer_of(weight: torch.Tensor, bias: torch.Tensor | None, chunks: int, dtype: torch.dtype) -> ModulationLinear:
    layer = ModulationLinear(weight.shape[1], weight.shape[0], num_chunks=chunks, dtype=dtype, device="meta")
    layer.load_packed(quantize_modulation(weight, bias, chunks, dtype=dtype))
    return layer


@settings(deadline=None, max_examples=20)
@given(
    chunks=st.sampled_from([3, 6]),
    channels=st.sampled_from([4, 20, 64]),
    width=st.sampled_from([64, 192]),
    with_bias=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_forward_is_the_original_linear(chunks: int, channels: int, width: int, with_bias: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(chunks * channels, width, generator=generator)
    bias = torch.randn(chunks * channels, generator=generator) if with_bias else None
    # the identity reads the whole weight back, element by element
    x = torch.eye(width)
    layer = layer_of(weight, bias, chunks, torch.float32)
    expected = torch.nn.functional.linear(x, weight, bias)
    error = (layer(x) - expected).abs().t().view(chunks * channels, width // 64, 64)
    largest = weight.view(chunks * channels, width // 64, 64).abs().amax(dim=-1, keepdim=True)
    # the searched scales go down to max|w| / 8.5, which clips the largest weight to 7 / 8.5 of itself
    assert (error <= (1 - 7 / 8.5) * largest + 1e-4).all()
    assert error.square().mean() < (largest / 7).square().mean() / 10


def test_chunks_carry_the_one_of_the_scales() -> None:
    weight, x = torch.zeros(6 * 8, 64), torch.zeros(2, 64)
    chunks = layer_of(weight, None, 6, torch.bfloat16).chunks(x.bfloat16())
    assert [float(chunk.unique()) for chunk in chunks] == [0, 1, 0, 0, 1, 0]
    assert not layer_of(weight, None, 6, torch.bfloat16)(x.bfloat16()).any()


def test_bad_values_are_named() -> None:
    with pytest.raises(ValueError, match="bias: expected finite"):
        quantize_modulation(torch.randn(24, 64), torch.full((24,), torch.nan), 6)
    with pytest.raises(ValueError, match="weight"):
        quantize_modulation(torch.full((24, 64), torch.nan), None, 6)
    with pytest.raises(ValueError, match="chunks"):
        quantize_modulation(torch.randn(24, 64), None, 5)


@pytest.mark.parametrize("chunks", [3, 6])
@pytest.mark.parametrize("with_bias", [False, True])
def test_codes_fitted_to_the_inputs(chunks: int, with_bias: bool) -> None:
    generator = torch.Generator().manual_seed(chunks)
    weight = torch.randn(16 * chunks, 192, generator=generator)
    bias = torch.randn(16 * chunks, generator=generator) if with_bias else None
    # few directions and a large mean, as embeddings of time and text have
    x = torch.randn(300, 12, generator=generator) @ torch.randn(12, 192, generator=generator) + 3
    moments = InputMoments(torch.ones(192, dtype=torch.bfloat16), arithmetic="w4a16")
    moments.update(x)
    exact = torch.nn.functional.linear(x, weight, bias)

    def error(fitted: InputMoments | None) -> float:
        layer = ModulationLinear(192, 16 * chunks, num_chunks=chunks, device="meta")
        layer.load_packed(quantize_modulation(weight, bias, chunks, moments=fitted))
        return float((layer(x.bfloat16()).float() - exact).square().mean() / exact.var(dim=0).mean())

    assert error(moments) < 0.5 * error(None) < 0.01
