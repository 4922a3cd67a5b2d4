"""The 4-bit floating-point code e2m1 of nvfp4: bit 3 is the sign, bits 0..2 index eight magnitudes (packing.md 1).

Two roundings exist and differ only on ties: hardware rounds activations half to even, the published quantiser rounds
weights half towards +infinity (packing.md 8.1).
"""

import functools
from itertools import pairwise

import torch

from nunchaku_kernels._checks import FLOAT_DTYPES, require_int_range, require_tensor

E2M1_MAGNITUDES: tuple[float, ...] = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1_MAX = 6.0

_MIDPOINTS = tuple((a + b) / 2 for a, b in pairwise(E2M1_MAGNITUDES))


def encode_nearest_even(values: torch.Tensor) -> torch.Tensor:
    """Nearest e2m1 code, ties to the even code, saturating to +-6: the conversion instruction used for activations.

    Args:
        values: floating point, any shape. The sign of zero and of values rounding to zero is kept (code 8 is -0);
            NaN becomes code 7, as the instruction does.

    Returns:
        int8 codes 0..15 of the same shape.
    """
    require_tensor("values", values, dtypes=(*FLOAT_DTYPES, torch.float64))
    magnitude = values.abs()
    # Three uniform ranges: codes 0..4 every half, 4..6 every one, 6..7 every two. Half to even is even codes in each.
    code = (magnitude.clamp(max=2) * 2).round_()
    code += magnitude.clamp(2, 4).round_() - 2
    code += (magnitude.clamp(4, 6) / 2).round_() - 2
    code = code.nan_to_num_(nan=7.0).to(torch.int8)
    return code + (torch.signbit(values) & ~values.isnan()).to(torch.int8) * 8


def encode_ties_up(values: torch.Tensor) -> torch.Tensor:
    """Nearest e2m1 code, ties towards +infinity, saturating to +-6: the published rule for weights.

    Args:
        values: finite floating point, any shape.

    Returns:
        int8 codes 0..15 of the same shape; -0 (code 8) is never produced.
    """
    require_tensor("values", values, dtypes=(*FLOAT_DTYPES, torch.float64))
    # Counting the midpoints that are <= value puts a tie on its upper neighbour. (A binary search is ten times slower.)
    rank = torch.full_like(values, -len(_MIDPOINTS), dtype=torch.int8)
    for midpoint in _MIDPOINTS:
        rank += values >= midpoint
        rank += values >= -midpoint
    return rank.abs() + (rank < 0).to(torch.int8) * 8


def round_ties_up(values: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """What `decode(encode_ties_up(values))` gives, in a tenth of the steps: for loops over short rows.

    Args:
        values: fp32 or fp64, finite, any shape.
        out: of the same shape and dtype, for the result; may be `values`.
    """
    require_tensor("values", values, dtypes=(torch.float32, torch.float64))
    numbers, midpoints = _ascending(values.device, values.dtype)
    return torch.take(numbers, torch.bucketize(values, midpoints, right=True), out=out)


@functools.cache
def _ascending(device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """The fifteen e2m1 numbers and the fourteen midpoints between them."""
    numbers = sorted({sign * magnitude for magnitude in E2M1_MAGNITUDES for sign in (1, -1)})
    midpoints = sorted(sign * midpoint for midpoint in _MIDPOINTS for sign in (1, -1))
    return torch.tensor(numbers, dtype=dtype, device=device), torch.tensor(midpoints, dtype=dtype, device=device)


def decode(codes: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Values of e2m1 codes.

    Args:
        codes: int8 or uint8, 0..15, any shape.
        dtype: floating dtype of the result; every value is exact in all of them.
    """
    require_tensor("codes", codes, dtypes=(torch.int8, torch.uint8))
    require_int_range("codes", codes, 0, 15)
    table = torch.tensor(
        [*E2M1_MAGNITUDES, *(-magnitude for magnitude in E2M1_MAGNITUDES)], dtype=dtype, device=codes.device
    )
    return table[codes.to(torch.int32)]
