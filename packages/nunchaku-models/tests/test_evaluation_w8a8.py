"""The W8A8 linear against its formula in integers, and in a transformer."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nunchaku_kernels.nn import ModulationLinear
from nunchaku_models import NunchakuFluxTransformer2DModel
from nunchaku_models.evaluation.transformers import owners, smoothing_of, with_w4a16_modulation, with_w8a8
from nunchaku_models.evaluation.w8a8 import W8A8Linear


def expected(x: Any, weight: Any, bias: Any, smooth: Any, widths: list[int]) -> Any:
    """In numpy: integers multiplied as such, one token and one output at a time."""
    y, start = np.zeros((len(x), len(weight))), 0
    for width in widths:
        columns = slice(start, start + width)
        start += width
        for i, token in enumerate(x[:, columns] / smooth[columns]):
            token_scale = np.abs(token).max() / np.float32(127) or np.float32(1)
            for j, row in enumerate(weight[:, columns] * smooth[columns]):
                row_scale = np.abs(row).max() / np.float32(127) or np.float32(1)
                codes = np.rint(token / token_scale).astype(np.int64), np.rint(row / row_scale).astype(np.int64)
                y[i, j] += int(codes[0] @ codes[1]) * float(token_scale) * float(row_scale)
    return y + bias


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5), st.integers(1, 6), st.lists(st.integers(1, 40), min_size=1, max_size=3), st.integers(0, 99))
def test_against_integers(tokens: int, rows: int, widths: list[int], seed: int) -> None:
    generator, channels = np.random.default_rng(seed), sum(widths)
    x, weight = (generator.normal(size=(n, channels)).astype(np.float32) for n in (tokens, rows))
    bias = generator.normal(size=rows).astype(np.float32)
    smooth = generator.uniform(0.2, 5, channels).astype(np.float32)
    x[0], weight[-1] = x[0] * 0, weight[-1] * (seed % 2)  # zeros have no scale of their own
    layer = W8A8Linear(*map(torch.from_numpy, (weight, bias)), smooth=torch.from_numpy(smooth), widths=widths)
    assert layer.codes.dtype == torch.int8
    given_y = layer(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(given_y, expected(x, weight, bias, smooth, widths), rtol=1e-5, atol=1e-5)


def test_shapes_dtypes_and_defaults() -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(8, 32), torch.randn(2, 3, 32).bfloat16()
    layer = W8A8Linear(weight.bfloat16(), None)
    y = layer(x)
    assert y.shape == (2, 3, 8) and y.dtype == torch.bfloat16
    exact = x.float() @ weight.bfloat16().float().T
    assert 0.001 < float((y.float() - exact).norm() / exact.norm()) < 0.02
    with pytest.raises(ValueError, match="add up to 32"):
        W8A8Linear(weight, None, widths=[16, 15])


def test_smoothing_moves_an_outlier_where_it_does_less_harm() -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(16, 64), torch.randn(50, 64)
    x[:, 5] *= 100
    smooth = torch.ones(64)
    smooth[5] = 10
    exact = x @ weight.T
    plain, smoothed = ((W8A8Linear(weight, None, smooth=s)(x) - exact).norm() for s in (None, smooth))
    assert smoothed < 0.5 * plain


def test_a_transformer_in_8_bits(
    transformer16: Any, make_transformer: Callable[..., Any], int4_file: Any, forward: Any, error: Any
) -> None:
    model = make_transformer()
    paths = owners(model)
    linears = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert set(paths) < linears and len(paths) == 12 + 2 * 5
    smooth = smoothing_of(NunchakuFluxTransformer2DModel.from_pretrained(int4_file))
    assert any(vector.unique().numel() > 1 for vector in smooth.values())
    plain, smoothed = with_w8a8(make_transformer(), {}), with_w8a8(model, smooth)
    for path, layers in paths.items():
        layer = smoothed.get_submodule(path)
        assert isinstance(layer, W8A8Linear)
        assert torch.equal(layer.smooth, torch.cat([smooth[owner.path] for owner in layers]).float())
        assert len(layer.widths) == (2 if path.endswith("proj_out") else 1)
    wanted = forward(transformer16)
    for changed in (plain, smoothed):
        assert 0.0005 < error(forward(changed), wanted) < 0.02


def test_modulation_layers_of_rivals_are_ours(
    transformer16: Any, make_transformer: Callable[..., Any], int4_file: Any, forward: Any, error: Any
) -> None:
    """The same tensors as in a file that the quantiser wrote."""
    model = with_w4a16_modulation(make_transformer())
    ours = {n: m for n, m in model.named_modules() if isinstance(m, ModulationLinear)}
    four_bit = NunchakuFluxTransformer2DModel.from_pretrained(int4_file)
    theirs = {n: m for n, m in four_bit.named_modules() if isinstance(m, ModulationLinear)}
    assert ours.keys() == theirs.keys() and len(ours) == 4
    for name, layer in ours.items():
        for key, value in layer.named_parameters():
            assert torch.equal(value, theirs[name].get_parameter(key)), f"{name}.{key}"
    assert error(forward(model), forward(transformer16)) < 0.2
