"""The 4-bit floating-point code e2m1 of nvfp4: bit 3 is the sign, bits 0..2 index eight magnitudes (packing.md 1).

Two roundings exist and differ only on ties: hardware rounds activations half to even, the published quantiser rounds
weights half towards +infinity (packing.md 8.1).
"""

import torch

from nunchaku_kernels._checks import FLOAT_DTYPES, require_int_range, require_tensor

E2M1_MAGNITUDES: tuple[float, ...] = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1_MAX = 6.0

_MIDPOINTS = tuple((a + b) / 2 for a, b in zip(E2M1_MAGNITUDES[:-1], E2M1_MAGNITUDES[1:], strict=True))


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
    code = torch.zeros_like(values, dtype=torch.int8)
    for index, midpoint in enumerate(_MIDPOINTS):
        # A midpoint lies between codes index and index + 1: the tie goes up only if index + 1 is even.
        code += magnitude >= midpoint if index % 2 else magnitude > midpoint
    code += torch.signbit(values).to(torch.int8) * 8
    return torch.where(values.isnan(), 7, code)


def encode_ties_up(values: torch.Tensor) -> torch.Tensor:
    """Nearest e2m1 code, ties towards +infinity, saturating to +-6: the published rule for weights.

    Args:
        values: finite floating point, any shape.

    Returns:
        int8 codes 0..15 of the same shape; -0 (code 8) is never produced.
    """
    require_tensor("values", values, dtypes=(*FLOAT_DTYPES, torch.float64))
    ascending = [-midpoint for midpoint in reversed(_MIDPOINTS)] + list(_MIDPOINTS)
    boundaries = torch.tensor(ascending, dtype=values.dtype, device=values.device)
    # right=True counts the boundaries that are <= value, so that a tie lands on the upper neighbour.
    rank = torch.bucketize(values, boundaries, right=True, out_int32=True).to(torch.int8) - 7
    return torch.where(rank < 0, 8 - rank, rank)


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
