"""Layers: 4-bit linears, and the slices that keep the original linears' names alive."""

from nunchaku_kernels.nn.adapters import Adapter, AdapterTerm, LowRankAdapter
from nunchaku_kernels.nn.base import Origin, QuantizedLinear
from nunchaku_kernels.nn.slices import LinearSlice, SlicePart, is_fused
from nunchaku_kernels.nn.svdq import GELU_SHIFT, QuantizedActivation, SVDQLinear
from nunchaku_kernels.nn.w4a16 import ModulationLinear, W4A16Linear

__all__ = [
    "GELU_SHIFT",
    "Adapter",
    "AdapterTerm",
    "LinearSlice",
    "LowRankAdapter",
    "ModulationLinear",
    "Origin",
    "QuantizedActivation",
    "QuantizedLinear",
    "SVDQLinear",
    "SlicePart",
    "W4A16Linear",
    "is_fused",
]
