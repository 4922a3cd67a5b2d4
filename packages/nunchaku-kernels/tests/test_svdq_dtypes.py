"""Every precision, arithmetic and dtype at a width where careless 16-bit arithmetic overflows."""

import pytest
import torch

from nunchaku_kernels.nn import SVDQLinear
from nunchaku_kernels.quantize import quantize_svdq, smoothing_from_weights
from nunchaku_kernels.reference.weights import effective_weight

CASES = [
    ("int4", "w4a8", 0.08),
    ("int4", "w4a4", 0.25),
    ("int4", "w4a16", 0.01),
    ("nvfp4", "nvfp4", 0.2),
    ("nvfp4", "w4a16", 0.01),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("precision", "arithmetic", "tolerance"), CASES)
@pytest.mark.parametrize("segments", [None, [128, 128]], ids=["one", "fused"])
def test_wide_layers_and_large_inputs_stay_right(
    precision: str, arithmetic: str, tolerance: float, dtype: torch.dtype, segments: list[int] | None
) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = 0.02 * torch.randn(256, 3072, generator=generator)
    weights = quantize_svdq(
        weight,
        torch.randn(256, generator=generator),
        precision=precision,  # type: ignore[arg-type]
        rank=16,
        smooth=smoothing_from_weights(weight),
        segments=segments,
        num_iters=1,
    )
    layer = SVDQLinear.from_weights(weights).to(dtype)
    layer.set_arithmetic(arithmetic)  # type: ignore[arg-type]
    x = (4 * torch.randn(5, 3072, generator=generator)).to(dtype)
    expected = x.float() @ effective_weight(weights).t()
    assert weights.bias is not None
    expected = expected + weights.bias.float()
    error = (layer(x).float() - expected).norm() / expected.norm()
    assert error < tolerance, f"relative error {error:.3f}"
