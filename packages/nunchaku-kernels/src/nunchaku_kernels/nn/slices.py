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

from nunchaku_kernels.nn.adapters import Adapter
from nunchaku_kernels.nn.base import QuantizedLinear, check_input, drop_placeholder_weight


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
        for part in parts:
            (top, bottom), (left, right) = part.rows, part.columns
            if not 0 <= top < bottom <= part.owner.out_features or right - left != part.owner.in_features:
                raise ValueError(
                    f"LinearSlice: rows {part.rows} x columns {part.columns} do not fit an owner of "
                    f"{part.owner.out_features} x {part.owner.in_features}"
                )
        edges = [part.columns for part in parts]
        heights = {part.rows[1] - part.rows[0] for part in parts}
        if edges[0][0] != 0 or any(a[1] != b[0] for a, b in itertools.pairwise(edges)):
            raise ValueError(f"LinearSlice: the columns of `parts` must tile 0..in_features, got {edges}")
        if len(heights) != 1:
            raise ValueError(f"LinearSlice: all `parts` must have the same number of rows, got {sorted(heights)}")
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
        check_input(self._label, self.in_features, x)
        if len(self.parts) == 1:
            return self._part(self.parts[0], x)
        total = self._part(self.parts[0], x[..., : self.parts[0].columns[1]])
        for part in self.parts[1:]:
            total = total + self._part(part, x[..., part.columns[0] : part.columns[1]])
        return total

    def dequantize(self) -> torch.Tensor:
        """The original weight as the owners store it, (out_features, in_features) float32; without adapters."""
        return torch.cat([part.owner.dequantize()[slice(*part.rows)] for part in self.parts], dim=1)

    def forget(self) -> None:
        """See `QuantizedLinear.forget`, of all owners."""
        for part in self.parts:
            part.owner.forget()

    def attach(self, adapter: Adapter, *, keep: bool = True) -> None:
        """Let an adapter of the original linear act in the owners, on every path through them.

        Args:
            adapter, keep: see `QuantizedLinear.attach`.
        """
        for part in self.parts:
            part.owner.attach(adapter, part.rows, part.columns, last=part is self.parts[-1], keep=keep)

    def detach(self, adapter: Adapter) -> None:
        """Take an adapter off the owners again; nothing happens if it is not on them."""
        for part in self.parts:
            part.owner.detach(adapter)

    @staticmethod
    def _part(part: SlicePart, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = part.owner(x, rows=part.rows)
        return y

    def _label(self) -> str:
        return f"LinearSlice of {' and '.join(part.owner.label() for part in self.parts)}"

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


def is_fused(module: nn.Module) -> bool:
    """Whether calling a linear's owners does all that calling `module`, which has the linear's place, would do.

    So it is with slices and 4-bit layers as they were made, and with a wrapper around one that has an attribute
    `acts_on_owner` which is true: its adapters are attached to the owners. It is not with a hook, a replaced `forward`
    or any other module.
    """
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    if "forward" in vars(module) or any(hooks):
        return False
    if type(module) is LinearSlice or isinstance(module, QuantizedLinear):
        return True
    return bool(getattr(module, "acts_on_owner", False)) and is_fused(module.base_layer)  # type: ignore[arg-type]
