"""A weight-only linear: its canonical form, and the tensors of a `nn.W4A16Linear` (packing.md 6).

8 bits are two planes of 4: `w = (high - 8) * 16 s + (low * s + zero)`, stored as one 4-bit weight of twice as many
input columns, the upper plane first. The kernels of 4 bits multiply it, with x twice.
"""

from dataclasses import dataclass

import torch

from nunchaku_kernels._checks import FLOAT_DTYPES, require_multiple, require_tensor
from nunchaku_kernels.formats.awq import pack_awq, pack_awq_int16, pack_awq_scales, unpack_awq, unpack_awq_scales

CODE_OF_ZERO = {4: 0, 8: 128}
"""Bits -> the code that stands for a group's zero."""


@dataclass(frozen=True)
class W4A16Weights:
    """`y = x W^T + proj_up (proj_down x)`, with `W = (code - CODE_OF_ZERO[bits]) * scale + zero`.

    Attributes:
        codes: uint8 [N, K], 0..15 (4 bits) or 0..255 (8 bits).
        scales, zeros: [N, G] of one float dtype; the group size is K / G. With 8 bits, products of a scale and
            the levels -8..7 must fit the dtype, or the upper plane is rounded.
        bits: 4 or 8.
        proj_down, proj_up: the low-rank branch, [R, K] and [N, R]; None without one.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    bits: int = 4
    proj_down: torch.Tensor | None = None
    proj_up: torch.Tensor | None = None

    def __post_init__(self) -> None:
        check_bits("bits", self.bits)
        n, k = require_tensor("codes", self.codes, (None, None), (torch.uint8,)).shape
        groups = require_tensor("scales", self.scales, (n, None), FLOAT_DTYPES).shape[1]
        require_multiple("scales", "G", groups, 1)
        require_multiple("codes", "K", k, groups)
        require_tensor("zeros", self.zeros, (n, groups), (self.scales.dtype,))
        if self.proj_down is None or self.proj_up is None:
            if self.proj_down is not self.proj_up:
                raise ValueError("proj_down and proj_up: expected both or neither, got one")
            return
        rank = require_tensor("proj_down", self.proj_down, (None, k), FLOAT_DTYPES).shape[0]
        require_tensor("proj_up", self.proj_up, (n, rank), FLOAT_DTYPES)

    @property
    def group_size(self) -> int:
        """Inputs per scale."""
        return self.codes.shape[1] // self.scales.shape[1]

    @property
    def rank(self) -> int:
        """Width of the low-rank branch."""
        return 0 if self.proj_up is None else self.proj_up.shape[1]

    def dequantize(self) -> torch.Tensor:
        """The weight with its branch, fp32 [N, K], unrounded."""
        shape = (*self.scales.shape, self.group_size)
        levels = self.codes.view(shape).float() - CODE_OF_ZERO[self.bits]
        weight = levels.mul_(self.scales.float().unsqueeze(-1)).add_(self.zeros.float().unsqueeze(-1))
        weight = weight.view(self.codes.shape)
        if self.proj_up is None or self.proj_down is None:
            return weight
        return weight.addmm_(self.proj_up.float(), self.proj_down.float())


def check_bits(name: str, bits: int) -> None:
    """Raises ValueError unless weights of so many bits can be stored."""
    if bits not in CODE_OF_ZERO:
        raise ValueError(f"{name}: expected 4 or 8, got {bits!r}")


def pack_w4a16(weights: W4A16Weights, container: torch.dtype = torch.int32) -> dict[str, torch.Tensor]:
    """Canonical to published order.

    Args:
        weights: N a multiple of 4, K of 64 and of the group size 64 or 128.
        container: dtype of `qweight`: int32, or int16 as in the T5 files.

    Raises:
        ValueError: 4-bit codes beyond 15, or a shape that does not fit.

    Returns:
        `qweight`, `wscales`, `wzeros`; `proj_down` and `proj_up` where there is a branch.
    """
    codes, scales, zeros = weights.codes, weights.scales, weights.zeros
    if weights.bits == 8:
        codes = torch.cat((codes >> 4, codes & 15), dim=1)
        zeros = torch.cat((-128 * scales, zeros), dim=1)
        scales = torch.cat((16 * scales, scales), dim=1)
    if container not in (torch.int32, torch.int16):
        raise TypeError(f"container: expected torch.int32 or torch.int16, got {container}")
    tensors = {
        "qweight": pack_awq(codes) if container == torch.int32 else pack_awq_int16(codes),
        "wscales": pack_awq_scales(scales, weights.group_size),
        "wzeros": pack_awq_scales(zeros, weights.group_size),
    }
    if weights.proj_down is not None and weights.proj_up is not None:
        tensors |= {"proj_down": weights.proj_down.contiguous(), "proj_up": weights.proj_up.contiguous()}
    return tensors


def unpack_w4a16(tensors: dict[str, torch.Tensor], bits: int, group_size: int) -> W4A16Weights:
    """Inverse of `pack_w4a16`: what is there decides about a branch, `bits` and `group_size` about the rest."""
    check_bits("bits", bits)
    codes = unpack_awq(tensors["qweight"])
    scales, zeros = (unpack_awq_scales(tensors[name], codes.shape[1], group_size) for name in ("wscales", "wzeros"))
    if bits == 8:
        (high, codes), (_, scales), (_, zeros) = (each.chunk(2, dim=1) for each in (codes, scales, zeros))
        codes = (high << 4) | codes
    branch = tensors.get("proj_down"), tensors.get("proj_up")
    return W4A16Weights(codes, scales, zeros, bits, *branch)
