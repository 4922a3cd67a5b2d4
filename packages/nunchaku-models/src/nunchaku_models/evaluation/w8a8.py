"""8-bit weights, 8-bit activations: the simple method that 4 bits are judged against."""

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.functional import linear


def int8_codes(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x (M, K) float32 -> codes (M, K) float32, integers in -127..127, and scales (M, 1): absmax of each row / 127."""
    scales = x.abs().amax(dim=-1, keepdim=True) / 127
    # a row of zeros has codes of zero under any scale
    scales = torch.where(scales > 0, scales, 1.0)
    return torch.round(x / scales).clamp(-127, 127), scales


class W8A8Linear(nn.Module):
    """y = (x / smooth) (W smooth)^T + bias, both factors rounded to int8: one scale per row of W, one per token.

    The product of the codes is an integer below 2^24 for up to 1,040 channels, so float32 computes it exactly; beyond,
    it is rounded to 24 bits.

    Args:
        weight: (N, K).
        bias: (N,) or None.
        smooth: (K,) divisors of the input; None for ones.
        widths: input channels of the parts that have scales of their own; default: one part. FLUX's single-block
            output reads attention and MLP side by side, whose ranges differ.

    Raises:
        ValueError: `widths` do not add up to K.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        *,
        smooth: torch.Tensor | None = None,
        widths: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.widths = tuple(widths or (self.in_features,))
        if sum(self.widths) != self.in_features:
            raise ValueError(f"widths must add up to {self.in_features}, got {self.widths}")
        divisor = torch.ones(self.in_features, device=weight.device) if smooth is None else smooth.float()
        parts = [int8_codes(part) for part in (weight.float() * divisor).split(self.widths, dim=1)]
        self.smooth: torch.Tensor
        self.codes: torch.Tensor
        self.scales: torch.Tensor
        self.bias: torch.Tensor | None
        self.register_buffer("smooth", divisor)
        self.register_buffer("codes", torch.cat([codes for codes, _ in parts], dim=1).to(torch.int8))
        self.register_buffer("scales", torch.cat([scales for _, scales in parts], dim=1))
        self.register_buffer("bias", None if bias is None else bias.float())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., K) -> (..., N), in the dtype of x."""
        y = torch.zeros_like(self.scales[:, 0]) if self.bias is None else self.bias
        tokens = (x.reshape(-1, self.in_features).float() / self.smooth).split(self.widths, dim=1)
        weights = self.codes.split(self.widths, dim=1)
        for part, weight, weight_scales in zip(tokens, weights, self.scales.unbind(1), strict=True):
            codes, token_scales = int8_codes(part)
            y = y + linear(codes, weight.float()) * token_scales * weight_scales
        return y.to(x.dtype).reshape(*x.shape[:-1], self.out_features)
