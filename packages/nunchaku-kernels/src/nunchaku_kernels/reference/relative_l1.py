"""Relative L1 distance per sample: how far a residual has moved, as first-block caches measure it (surface.md 4.1)."""

from collections.abc import Sequence

import torch

from nunchaku_kernels._checks import FLOAT_DTYPES, require_tensor


def relative_l1(
    current: Sequence[torch.Tensor],
    previous: Sequence[torch.Tensor],
    origin: Sequence[torch.Tensor] | None = None,
    tokens: torch.Tensor | None = None,
) -> torch.Tensor:
    """`mean|previous - (current - origin)| / mean|previous|` per sample, over all streams together.

    `current - origin` is rounded to the dtype of the stream, in which a caller keeps it as the next `previous`; all
    else is fp32, summed in fp64.

    Args:
        current: [B, T, C] of each stream.
        previous: of the same shapes and dtypes.
        origin: the same; None: zero.
        tokens: int64 [B], the leading tokens of each sample that count, in every stream; None: all.

    Returns:
        fp32 [B]; 0 / 0 is NaN.
    """
    sums = torch.zeros(2, current[0].shape[0], dtype=torch.float64, device=current[0].device)
    for i, (new, old) in enumerate(zip(current, previous, strict=True)):
        require_tensor(f"current[{i}]", new, (None, None, None), FLOAT_DTYPES)
        require_tensor(f"previous[{i}]", old, tuple(new.shape), (new.dtype,))
        residual = new if origin is None else (new.float() - origin[i].float()).to(new.dtype)
        change, size = (old.float() - residual.float()).abs(), old.float().abs()
        if tokens is not None:
            counts = torch.arange(new.shape[1], device=new.device) < tokens.unsqueeze(1)
            change, size = change.where(counts[..., None], 0), size.where(counts[..., None], 0)
        sums += torch.stack([change.sum((1, 2), dtype=torch.float64), size.sum((1, 2), dtype=torch.float64)])
    return (sums[0] / sums[1]).float()
