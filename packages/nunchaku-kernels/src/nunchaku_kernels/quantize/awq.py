"""Round-to-nearest 4-bit weights for 16-bit activations (packing.md 6): modulation layers and text encoders."""

import torch

from nunchaku_kernels.quantize.affine import quantize_affine
from nunchaku_kernels.quantize.int4 import INT4_MAX, quantize_int4


def quantize_w4a16(
    weight: torch.Tensor,
    group_size: int = 64,
    *,
    symmetric: bool = True,
    scale_search: bool = False,
    dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Unsigned codes with `w = code * scale + zero`.

    Symmetric (FLUX and Qwen modulation, group 64): signed codes stored with zero point 7, `zero = -7 * scale`.
    Asymmetric (T5, group 128): `zero = min`, `scale = (max - min) / 15` per group, both rounded before the codes.

    Args:
        weight: fp32, fp16 or bf16 [N, K], finite; K a multiple of `group_size`.
        group_size: inputs per scale.
        symmetric: see above.
        scale_search: choose each symmetric scale by squared error (see `quantize_int4`); codes then reach 0..15.
        dtype: dtype of scales and zeros; None for that of the weight.

    Returns:
        codes uint8 [N, K], scales [N, K / group_size], zeros [N, K / group_size].

    Raises:
        ValueError: `weight` is not finite, or too large for a scale of `dtype`.
    """
    if symmetric:
        # The stored range is -7..8, the searched one -8..7: quantise the negative. Rounding half to even is symmetric.
        negative, scales = quantize_int4(-weight, group_size, dtype, scale_search=scale_search)
        return (INT4_MAX - negative).to(torch.uint8), scales, -INT4_MAX * scales
    rounded = quantize_affine(weight, group_size, search=False, dtype=dtype)
    return rounded.codes, rounded.scales, rounded.zeros
