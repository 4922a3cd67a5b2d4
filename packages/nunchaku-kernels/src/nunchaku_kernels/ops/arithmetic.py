"""One checkpoint, many arithmetics: what a stored precision can be multiplied as, and what a device does best."""

from typing import Literal, get_args

import torch

from nunchaku_kernels.ops import _native

Arithmetic = Literal["w4a8", "w4a4", "nvfp4", "w4a16"]

ARITHMETICS: dict[str, tuple[Arithmetic, ...]] = {
    "int4": ("w4a8", "w4a4", "w4a16"),
    "nvfp4": ("nvfp4", "w4a16"),
}
"""Stored precision -> the ways to multiply it, most exact integers first. Every one runs on every device torch
supports, by the plain-torch reference where there is no kernel."""


def check_arithmetic(owner: str, precision: str, arithmetic: str) -> None:
    """Raise ValueError unless weights stored as `precision` can be multiplied as `arithmetic`."""
    possible = ARITHMETICS[precision]
    if arithmetic not in possible:
        known = "" if arithmetic in get_args(Arithmetic) else " (unknown)"
        raise ValueError(
            f"{owner}: {precision} weights cannot be multiplied as {arithmetic!r}{known}; "
            f"possible: {', '.join(possible)}"
        )


def default_arithmetic(precision: str, device: torch.device) -> Arithmetic:
    """The arithmetic with a kernel on `device`; the 16-bit product of dequantised weights where there is none."""
    native = device.type == "cpu" or (device.type == "cuda" and _native.kernels(device) is not None)
    return "w4a8" if precision == "int4" and native else "w4a16"
