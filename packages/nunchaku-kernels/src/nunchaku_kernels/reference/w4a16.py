"""W4A16: 4-bit weights (AWQ) dequantised to 16 bits, 16-bit activations (packing.md 6 and 8.8)."""

import torch

from nunchaku_kernels._checks import FLOAT_DTYPES, require_tensor


def dequantize(codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
    """`code * scale + zero`, rounded once to the dtype of the scales.

    Args:
        codes: uint8 or int8 [N, K], 0..15.
        scales: [N, G]; the group size is K / G.
        zeros: [N, G] in weight units, stored negative (-zero point x scale).

    Returns:
        [N, K] of the dtype of `scales`.
    """
    require_tensor("codes", codes, (None, None), (torch.int8, torch.uint8))
    n, k = codes.shape
    require_tensor("scales", scales, (n, None), FLOAT_DTYPES)
    groups = scales.shape[1]
    if groups == 0 or k % groups:
        raise ValueError(f"scales: expected a number of groups that divides K = {k}, got {groups}")
    require_tensor("zeros", zeros, (n, groups), (scales.dtype,))
    # The product is exact in fp32, so this is the fused multiply-add of the definition.
    weight = codes.view(n, groups, k // groups).float() * scales.float().unsqueeze(-1) + zeros.float().unsqueeze(-1)
    return weight.to(scales.dtype).reshape(n, k)


def linear(
    x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """`x @ dequantize(codes, scales, zeros).T + bias`, fp32 accumulation, one rounding to the dtype of x.

    A kernel may leave weights exact instead: scale * sum(code * x) + zero * sum(x) of each group, in fp32.

    Args:
        x: [M, K].
        codes, scales, zeros: see `dequantize`.
        bias: [N], or None.

    Returns:
        [M, N] of the dtype of x.
    """
    require_tensor("x", x, (None, None), FLOAT_DTYPES)
    require_tensor("codes", codes, (None, x.shape[1]))
    y = x.float() @ dequantize(codes, scales, zeros).float().t()
    if bias is not None:
        y = y + require_tensor("bias", bias, (codes.shape[0],), FLOAT_DTYPES).float()
    return y.to(x.dtype)
