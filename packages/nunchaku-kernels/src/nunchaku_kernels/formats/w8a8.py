"""Published byte order of an 8-bit weight (packing.md 7). Its scales and bias are vectors as in `formats.svdq`."""

import torch

from nunchaku_kernels._checks import require_multiple, require_tensor


def pack_w8a8(weight: torch.Tensor) -> torch.Tensor:
    """int8 [N, K] to the published order int8 [N, K]; N a multiple of 128, K of 64."""
    n, k = _shape("weight", weight)
    # Four neighbours along K make a 32-bit word. N = 128-block, 16-row, half, row; K = 32-block, half, quarter
    tiles = weight.contiguous().view(torch.int32).view(n // 128, 8, 2, 8, k // 32, 2, 4)
    return tiles.permute(0, 4, 1, 3, 6, 2, 5).contiguous().view(torch.int8).view(n, k)


def unpack_w8a8(qweight: torch.Tensor) -> torch.Tensor:
    """Inverse of `pack_w8a8`."""
    n, k = _shape("qweight", qweight)
    tiles = qweight.contiguous().view(torch.int32).view(n // 128, k // 32, 8, 8, 4, 2, 2)
    return tiles.permute(0, 2, 5, 3, 1, 6, 4).contiguous().view(torch.int8).view(n, k)


def _shape(name: str, tensor: torch.Tensor) -> tuple[int, int]:
    require_tensor(name, tensor, (None, None), (torch.int8,))
    n, k = tensor.shape
    require_multiple(name, "N", n, 128)
    require_multiple(name, "K", k, 64)
    return n, k
