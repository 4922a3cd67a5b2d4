"""Row blocks: quantisers work on a few megabytes at a time, so that temporaries stay in cache and memory stays flat."""

from collections.abc import Iterator

import torch

_BLOCK_ELEMENTS = 1 << 20


def row_blocks(rows: int, columns: int) -> Iterator[slice]:
    """Slices that cover `rows` rows, each about a million elements."""
    step = max(1, _BLOCK_ELEMENTS // max(columns, 1))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def group_absmax(groups: torch.Tensor) -> torch.Tensor:
    """`max |w|` over the last axis, propagating NaN; two reductions are faster than a temporary of absolute values."""
    return torch.maximum(groups.amax(dim=-1), -groups.amin(dim=-1))


def require_finite_scales(scales: torch.Tensor) -> None:
    """Raises ValueError if a scale is not finite: maxima carry every NaN and infinity of the weight into its scales."""
    if not scales.isfinite().all():
        raise ValueError(
            f"weight: expected finite values whose scales fit {scales.dtype}, got NaN, infinity or overflow"
        )
