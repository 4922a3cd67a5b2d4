"""Quantised matrices while they are being made: codes, scales, and what numbers a code stands for."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch

from nunchaku_kernels.formats.e2m1 import decode, encode_ties_up, round_ties_up
from nunchaku_kernels.formats.svdq import GROUP_SIZES, Precision
from nunchaku_kernels.quantize._blocks import round_within_, row_blocks
from nunchaku_kernels.quantize.int4 import INT4_MAX, INT4_MIN, quantize_int4
from nunchaku_kernels.quantize.nvfp4 import quantize_nvfp4


class GroupedCodes(ABC):
    """A matrix in codes, whose rows are cut into groups: a weight is `level * step + offset`, where the level is what
    its code stands for, and step and offset are its group's. What rounding (`gptq`) needs to know of a format."""

    @property
    @abstractmethod
    def group_size(self) -> int:
        """Inputs per scale."""

    @abstractmethod
    def steps(self, rows: slice = slice(None)) -> torch.Tensor:
        """All scale factors of each group multiplied, fp32 [N, G]."""

    @abstractmethod
    def levels(self, rows: slice = slice(None)) -> torch.Tensor:
        """What the codes stand for before scaling, fp32 [N, K]."""

    def offsets(self, rows: slice = slice(None)) -> torch.Tensor | None:
        """What is added to each group, fp32 [N, G]; None where a format has no such thing."""
        return None

    @abstractmethod
    def nearest(
        self, values: torch.Tensor, lowest: int | None = None, *, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The level nearest to each of `values`, fp32, in `out` (may be `values`); none below `lowest`, if given."""

    @abstractmethod
    def with_levels(self, levels: torch.Tensor) -> Self:
        """The same scales with other levels, fp32 [N, K], each one that a code stands for."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """N, K."""

    def dequantize(self, rows: slice = slice(None)) -> torch.Tensor:
        """fp32 values of some rows."""
        steps, levels, offsets = self.steps(rows), self.levels(rows), self.offsets(rows)
        values = levels.view(*steps.shape, -1) * steps.unsqueeze(-1)
        if offsets is not None:
            values += offsets.unsqueeze(-1)
        return values.reshape(levels.shape)

    def subtracted_from(self, target: torch.Tensor) -> torch.Tensor:
        """`target` minus the values, a new fp32 [N, K]."""
        difference = torch.empty_like(target)
        for rows in row_blocks(*target.shape):
            torch.sub(target[rows], self.dequantize(rows), out=difference[rows])
        return difference

    def times(self, vector: torch.Tensor) -> torch.Tensor:
        """`sum_k value[n,k] vector[k]`, fp32 [N]."""
        return torch.cat([self.dequantize(rows) @ vector for rows in row_blocks(*self.shape)])


@dataclass(frozen=True)
class QuantizedResidual(GroupedCodes):
    """The 4-bit part of an SVDQuant linear.

    Attributes:
        codes: int8 [N, K]; int4 -8..7, or e2m1 0..15.
        scales: half [N, K/64] or float8_e4m3fn [N, K/16].
        wtscale: nvfp4 factor of the whole matrix [1], or None.
        wcscales: nvfp4 factors of the rows [N], or None.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    wtscale: torch.Tensor | None = None
    wcscales: torch.Tensor | None = None

    @property
    def precision(self) -> Precision:
        """Read off the dtype of the scales."""
        return "nvfp4" if self.scales.dtype == torch.float8_e4m3fn else "int4"

    @property
    def group_size(self) -> int:
        return GROUP_SIZES[self.precision]

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.codes.shape
        return rows, columns

    def steps(self, rows: slice = slice(None)) -> torch.Tensor:
        steps = self.scales[rows].float()
        if self.wtscale is not None:
            steps = steps * self.wtscale.float()
        if self.wcscales is not None:
            steps = steps * self.wcscales[rows].float().unsqueeze(1)
        return steps

    def levels(self, rows: slice = slice(None)) -> torch.Tensor:
        codes = self.codes[rows]
        return decode(codes) if self.precision == "nvfp4" else codes.float()

    def nearest(
        self, values: torch.Tensor, lowest: int | None = None, *, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """See `GroupedCodes`; `lowest` counts for int4 only."""
        if self.precision == "nvfp4":
            return round_ties_up(values, out=out)
        levels = values.clone() if out is None else out if out is values else out.copy_(values)
        return round_within_(levels, INT4_MIN if lowest is None else lowest, INT4_MAX)

    def with_levels(self, levels: torch.Tensor) -> Self:
        codes = encode_ties_up(levels) if self.precision == "nvfp4" else levels.to(torch.int8)
        return replace(self, codes=codes)


def quantize_residual(
    residual: torch.Tensor,
    precision: Precision,
    members: Sequence[int],
    dtype: torch.dtype,
    *,
    scale_search: bool = True,
    symmetric: bool = False,
) -> QuantizedResidual:
    """Round to nearest.

    Args:
        residual: fp32 [N, K], K a multiple of the group size.
        precision: "int4" or "nvfp4".
        members: row counts of fused members; with several, nvfp4 gives each its own tensor scale (`wcscales`).
        dtype: of the 16-bit scales.
        scale_search: search each group's scale by its error instead of taking the largest magnitude.
        symmetric: see `quantize_int4`.
    """
    if precision == "int4":
        return QuantizedResidual(*quantize_int4(residual, dtype=dtype, scale_search=scale_search, symmetric=symmetric))
    parts = [quantize_nvfp4(part, dtype, scale_search=scale_search) for part in residual.split(list(members))]
    codes, micro_scales, tensor_scales = zip(*parts, strict=True)
    if len(parts) == 1:
        return QuantizedResidual(codes[0], micro_scales[0], wtscale=tensor_scales[0])
    wcscales = torch.cat([scale.expand(rows) for scale, rows in zip(tensor_scales, members, strict=True)])
    # Bytes, since not every device concatenates float8.
    joined = torch.cat([scales.view(torch.uint8) for scales in micro_scales]).view(torch.float8_e4m3fn)
    return QuantizedResidual(torch.cat(codes), joined, wcscales=wcscales)
