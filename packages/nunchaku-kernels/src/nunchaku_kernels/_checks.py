"""Argument checks of the plain-torch modules: every message names the argument, what was expected and what came."""

from collections.abc import Collection

import torch

HALF_DTYPES = (torch.float16, torch.bfloat16)
FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def require_tensor(
    name: str,
    value: object,
    shape: tuple[int | None, ...] | None = None,
    dtypes: Collection[torch.dtype] | None = None,
) -> torch.Tensor:
    """Returns `value` if it is a tensor of one of `dtypes` and of `shape` (None: any size).

    Raises:
        TypeError: not a tensor, or of another dtype.
        ValueError: another number of dimensions or another size.
    """
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    if dtypes is not None and value.dtype not in dtypes:
        expected = " or ".join(str(dtype) for dtype in dtypes)
        raise TypeError(f"{name}: expected dtype {expected}, got {value.dtype}")
    if shape is not None:
        fits = value.dim() == len(shape) and all(
            size is None or size == given for size, given in zip(shape, value.shape, strict=True)
        )
        if not fits:
            expected = ", ".join("any" if size is None else str(size) for size in shape)
            raise ValueError(f"{name}: expected shape [{expected}], got {list(value.shape)}")
    return value


def require_multiple(name: str, dimension: str, size: int, factor: int) -> None:
    """Raises ValueError unless `size` is a positive multiple of `factor`."""
    if size <= 0 or size % factor:
        raise ValueError(f"{name}: expected {dimension} to be a positive multiple of {factor}, got {size}")


def require_finite(name: str, value: torch.Tensor) -> None:
    """Raises ValueError if `value` holds NaN or infinity."""
    # The extrema are enough: aminmax propagates NaN, and infinities are extrema. One pass, no temporary.
    if value.numel() and not torch.stack(torch.aminmax(value)).isfinite().all():
        raise ValueError(f"{name}: expected finite values, got NaN or infinity")


def require_int_range(name: str, value: torch.Tensor, low: int, high: int) -> None:
    """Raises ValueError unless every element of an integer tensor lies in low..high."""
    if value.numel():
        smallest, largest = (int(bound) for bound in torch.aminmax(value))
        if smallest < low or largest > high:
            raise ValueError(f"{name}: expected values in {low}..{high}, got {smallest}..{largest}")


def ceil_to(size: int, factor: int) -> int:
    """The smallest multiple of `factor` that is not below `size`."""
    return -(-size // factor) * factor
