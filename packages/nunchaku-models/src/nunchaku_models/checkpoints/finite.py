"""Whether the values of a tensor can be computed with."""

from __future__ import annotations

import torch


def is_finite(value: torch.Tensor) -> bool:
    """Whether no element is NaN or infinite; integers always are finite."""
    if not value.is_floating_point():
        return True
    if value.dtype == torch.float8_e4m3fn:
        # it has no infinity, and its two NaNs have all bits but the sign set
        return not bool((value.view(torch.uint8).bitwise_and(0x7F) == 0x7F).any())
    if value.itemsize == 1:
        value = value.to(torch.bfloat16)
    return bool(value.isfinite().all())
