"""Modules that keep the original linears' names alive.

A quantised layer (an *owner*) replaces one linear, several fused ones, or a range of one's input columns. Loaders,
PEFT and custom attention processors look for the original linears: each stays in the module tree under its own name
as a `LinearSlice`, which has no parameters and calls the owner for its range.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from nunchaku_kernels.nn.base import QuantizedLinear, drop_placeholder_weight


@dataclass(frozen=True)
class SlicePart:
    """A range of an owner's output rows, fed with a range of the slice's input columns."""

    owner: QuantizedLinear
    rows: tuple[int, int]
    columns: tuple[int, int]


class LinearSlice(nn.Module):
    """An original linear whose weights live in one owner, or, split by input columns, in several.

    `forward` calls the owners as modules, so that hooks on them (offloading) run; nothing is registered twice.

    Args:
        parts: the ranges that together make up the original linear. Their columns must tile 0..in_features and all
            must have the same number of rows.
    """

    def __init__(self, parts: Sequence[SlicePart]) -> None:
        super().__init__()
        if not parts:
            raise ValueError("LinearSlice: `parts` must not be empty")
        edges = [part.columns for part in parts]
        heights = {part.rows[1] - part.rows[0] for part in parts}
        if edges[0][0] != 0 or any(a[1] != b[0] for a, b in itertools.pairwise(edges)):
            raise ValueError(f"LinearSlice: the columns of `parts` must tile 0..in_features, got {edges}")
        if len(heights) != 1:
            raise ValueError(f"LinearSlice: all `parts` must have the same number of rows, got {sorted(heights)}")
        for part in parts:
            if part.columns[1] - part.columns[0] != part.owner.in_features or part.rows[1] > part.owner.out_features:
                raise ValueError(
                    f"LinearSlice: rows {part.rows} x columns {part.columns} do not fit an owner of "
                    f"{part.owner.out_features} x {part.owner.in_features}"
                )
        self.parts = tuple(parts)  # a tuple: the owners are registered elsewhere in the tree
        self.in_features = edges[-1][1]
        self.out_features = heights.pop()

    @property
    def weight(self) -> torch.Tensor:
        """Zeros of the original weight's shape, one element of storage: for code that asks for shape or dtype."""
        return self.parts[0].owner.weight[:1, :1].expand(self.out_features, self.in_features)

    @property
    def bias(self) -> torch.Tensor | None:
        """The original bias (out_features,) in natural order; that of a column-split linear is on its last part."""
        part = self.parts[-1]
        bias = part.owner.natural_bias()
        return None if bias is None else bias[part.rows[0] : part.rows[1]]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., in_features) -> (..., out_features), in the dtype of x."""
        total: torch.Tensor | None = None
        for part in self.parts:
            whole = len(self.parts) == 1
            y = part.owner(x if whole else x[..., part.columns[0] : part.columns[1]], rows=part.rows)
            total = y if total is None else total + y
        assert total is not None  # the constructor refuses an empty `parts`
        return total

    def _save_to_state_dict(self, destination: dict[str, torch.Tensor], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight"] = self.weight  # diffusers' LoRA loaders look shapes up there

    def _load_from_state_dict(self, state_dict: dict[str, torch.Tensor], prefix: str, *args: object) -> None:
        drop_placeholder_weight(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        """Shape, and the ranges of the owners."""
        ranges = ", ".join(f"rows {p.rows[0]}:{p.rows[1]} x columns {p.columns[0]}:{p.columns[1]}" for p in self.parts)
        return f"{self.in_features}, {self.out_features}, {ranges}"
