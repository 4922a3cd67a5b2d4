"""Round-to-nearest 4-bit weights for 16-bit activations (packing.md 6): modulation layers and text encoders."""

import torch

from nunchaku_kernels._checks import FLOAT_DTYPES, require_multiple, require_tensor
from nunchaku_kernels.quantize._blocks import require_finite_scales, row_blocks
from nunchaku_kernels.quantize.int4 import INT4_MAX, quantize_int4

UINT4_MAX = 15


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
    require_tensor("weight", weight, (None, None), FLOAT_DTYPES)
    n, k = weight.shape
    require_multiple("weight", "K", k, group_size)
    scales = torch.empty(n, k // group_size, dtype=dtype or weight.dtype, device=weight.device)
    zeros = torch.empty_like(scales)
    codes = torch.empty(n, k, dtype=torch.uint8, device=weight.device)
    for rows in row_blocks(n, k):
        groups = weight[rows].float().view(-1, k // group_size, group_size)
        low, high = torch.aminmax(groups, dim=-1)
        block_zeros = low.to(zeros.dtype)
        block_scales = ((high - low) / torch.full_like(low, UINT4_MAX)).to(scales.dtype)
        # A constant group is its zero: any scale does, 1 avoids 0 / 0.
        block_scales = torch.where(block_scales == 0, 1.0, block_scales)
        steps = (groups - block_zeros.float().unsqueeze(-1)) / block_scales.float().unsqueeze(-1)
        codes[rows] = steps.round_().nan_to_num_(nan=0.0).clamp_(0, UINT4_MAX).to(torch.uint8).reshape(-1, k)
        scales[rows], zeros[rows] = block_scales, block_zeros
    require_finite_scales(scales)
    require_finite_scales(zeros)
    return codes, scales, zeros
