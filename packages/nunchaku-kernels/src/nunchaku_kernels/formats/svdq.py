"""Published byte order of a W4A4 (SVDQuant) linear, int4 and nvfp4, and its canonical row-major form (packing.md 1-4).

Every layout is a fixed permutation inside tiles, written here as view -> permute -> reshape. The declared shape of a
published tensor is only a container: its elements follow the permuted order, not the declared axes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn.functional import pad

from nunchaku_kernels._checks import (
    FLOAT_DTYPES,
    HALF_DTYPES,
    ceil_to,
    require_int_range,
    require_multiple,
    require_tensor,
)

Precision = Literal["int4", "nvfp4"]

GROUP_SIZES: dict[str, int] = {"int4": 64, "nvfp4": 16}
CHANNEL_ALIGNMENT = 128
RANK_ALIGNMENT = 16

# Axes of a permuted view are named in the comments as they stand in the canonical tensor, outermost first.
_WORD_ORDER = (0, 4, 1, 3, 6, 2, 5)
_WORD_ORDER_INVERSE = (0, 2, 5, 3, 1, 6, 4)


def pack_qweight(codes: torch.Tensor) -> torch.Tensor:
    """4-bit codes to the published order (packing.md 1).

    Args:
        codes: int8 [N, K], -8..7 (int4) or 0..15 (e2m1); N a multiple of 128, K of 64.

    Returns:
        int8 [N, K/2].
    """
    require_tensor("codes", codes, (None, None), (torch.int8,))
    n, k = codes.shape
    require_multiple("codes", "N", n, CHANNEL_ALIGNMENT)
    require_multiple("codes", "K", k, 64)
    require_int_range("codes", codes, -8, 15)
    pairs = codes.contiguous().view(n, k // 2, 2)
    # Eight codes that are neighbours along K make one 32-bit word; from here on only words move.
    words = ((pairs[..., 0] & 0xF) | (pairs[..., 1] << 4)).view(torch.int32)
    # N = 128-block, 16-row, half, row; K = 64-block, half, quarter
    tiles = words.view(n // 128, 8, 2, 8, k // 64, 2, 4)
    return tiles.permute(_WORD_ORDER).contiguous().view(torch.int8).view(n, k // 2)


def unpack_qweight(qweight: torch.Tensor, *, signed: bool = True) -> torch.Tensor:
    """Inverse of `pack_qweight`.

    Args:
        qweight: int8 [N, K/2].
        signed: True reads two's complement -8..7 (int4), False 0..15 (e2m1).

    Returns:
        int8 [N, K].
    """
    require_tensor("qweight", qweight, (None, None), (torch.int8,))
    n, half_k = qweight.shape
    require_multiple("qweight", "N", n, CHANNEL_ALIGNMENT)
    require_multiple("qweight", "K/2", half_k, 32)
    words = qweight.contiguous().view(-1).view(torch.int32).view(n // 128, half_k // 32, 8, 8, 4, 2, 2)
    packed = words.permute(_WORD_ORDER_INVERSE).contiguous().view(torch.int8).view(n, half_k)
    # Shifts of int8 are arithmetic, so moving a nibble to the top and back extends its sign.
    low, high = (packed << 4) >> 4, packed >> 4
    if not signed:
        low, high = low & 0xF, high & 0xF
    return torch.stack((low, high), dim=-1).view(n, half_k * 2)


def pack_wscales(scales: torch.Tensor) -> torch.Tensor:
    """int4 group scales [N, G] to the published order [G, N], any dtype; N a multiple of 128 (packing.md 2)."""
    require_tensor("scales", scales, (None, None))
    n, groups = scales.shape
    require_multiple("scales", "N", n, CHANNEL_ALIGNMENT)
    # N = 128-block, 16-run, half, pair, parity
    tiles = scales.reshape(n // 128, 8, 2, 4, 2, groups)
    return tiles.permute(0, 5, 1, 3, 2, 4).reshape(groups, n)


def unpack_wscales(wscales: torch.Tensor) -> torch.Tensor:
    """Inverse of `pack_wscales`: [G, N] to [N, G]."""
    require_tensor("wscales", wscales, (None, None))
    groups, n = wscales.shape
    require_multiple("wscales", "N", n, CHANNEL_ALIGNMENT)
    tiles = wscales.reshape(n // 128, groups, 8, 4, 2, 2)
    return tiles.permute(0, 2, 4, 3, 5, 1).reshape(n, groups)


def pack_vector(vector: torch.Tensor) -> torch.Tensor:
    """Per-channel vector [N] (bias, smooth_factor, wcscales) to the published order; N a multiple of 128."""
    require_tensor("vector", vector, (None,))
    require_multiple("vector", "N", vector.shape[0], CHANNEL_ALIGNMENT)
    return pack_wscales(vector.unsqueeze(1)).squeeze(0)


def unpack_vector(vector: torch.Tensor) -> torch.Tensor:
    """Inverse of `pack_vector`."""
    require_tensor("vector", vector, (None,))
    require_multiple("vector", "N", vector.shape[0], CHANNEL_ALIGNMENT)
    return unpack_wscales(vector.unsqueeze(0)).squeeze(1)


def pack_micro_scales(scales: torch.Tensor) -> torch.Tensor:
    """nvfp4 micro-scales to the published order (packing.md 3).

    Args:
        scales: float8_e4m3fn [N, G], G = K/16; N a multiple of 128, G of 4.

    Returns:
        float8_e4m3fn [G, N].
    """
    require_tensor("scales", scales, (None, None), (torch.float8_e4m3fn,))
    n, groups = scales.shape
    require_multiple("scales", "N", n, CHANNEL_ALIGNMENT)
    require_multiple("scales", "G", groups, 4)
    # N = 128-block, 32-run, 8-run, row; G = quad, group. Bytes, since not every device permutes float8.
    tiles = scales.contiguous().view(torch.uint8).view(n // 128, 4, 4, 8, groups // 4, 4)
    return tiles.permute(0, 4, 3, 2, 1, 5).reshape(groups, n).view(torch.float8_e4m3fn)


def unpack_micro_scales(wscales: torch.Tensor) -> torch.Tensor:
    """Inverse of `pack_micro_scales`: float8_e4m3fn [G, N] to [N, G]."""
    require_tensor("wscales", wscales, (None, None), (torch.float8_e4m3fn,))
    groups, n = wscales.shape
    require_multiple("wscales", "N", n, CHANNEL_ALIGNMENT)
    require_multiple("wscales", "G", groups, 4)
    tiles = wscales.contiguous().view(torch.uint8).view(n // 128, groups // 4, 8, 4, 4, 4)
    return tiles.permute(0, 4, 3, 2, 1, 5).reshape(n, groups).view(torch.float8_e4m3fn)


def pack_lowrank_down(down: torch.Tensor) -> torch.Tensor:
    """Low-rank down factor [R, K] (hidden = x @ down.T) to the published order [K, R] (packing.md 4).

    K and R are multiples of 16. The result is not the transpose: only `unpack_lowrank_down` reads it.
    """
    require_tensor("down", down, (None, None))
    rank, k = down.shape
    _require_lowrank("down", "K", k, rank)
    # R = 16-tile, half, row; K = 16-tile, half, pair, parity
    tiles = _permuted(down, (rank // 16, 2, 8, k // 16, 2, 4), (3, 0, 2, 5, 1, 4))
    return tiles.reshape(k, rank)


def unpack_lowrank_down(proj_down: torch.Tensor) -> torch.Tensor:
    """Inverse of `pack_lowrank_down`: [K, R] to [R, K]."""
    require_tensor("proj_down", proj_down, (None, None))
    k, rank = proj_down.shape
    _require_lowrank("proj_down", "K", k, rank)
    tiles = proj_down.reshape(k // 16, rank // 16, 8, 4, 2, 2, 2)
    return tiles.permute(1, 4, 2, 0, 5, 3, 6).reshape(rank, k)


def pack_lowrank_up(up: torch.Tensor) -> torch.Tensor:
    """Low-rank up factor [N, R] (y += hidden @ up.T) to the published order [N, R]; both multiples of 16."""
    require_tensor("up", up, (None, None))
    n, rank = up.shape
    _require_lowrank("up", "N", n, rank)
    # N = 16-tile, half, row; R = 16-tile, half, pair, parity
    tiles = _permuted(up, (n // 16, 2, 8, rank // 16, 2, 4), (0, 3, 2, 5, 1, 4))
    return tiles.reshape(n, rank)


def unpack_lowrank_up(proj_up: torch.Tensor) -> torch.Tensor:
    """Inverse of `pack_lowrank_up`: [N, R] to [N, R]."""
    require_tensor("proj_up", proj_up, (None, None))
    n, rank = proj_up.shape
    _require_lowrank("proj_up", "N", n, rank)
    tiles = proj_up.reshape(n // 16, rank // 16, 8, 4, 2, 2, 2)
    return tiles.permute(0, 4, 2, 1, 5, 3, 6).reshape(n, rank)


def _permuted(factor: torch.Tensor, pairs: tuple[int, ...], order: tuple[int, ...]) -> torch.Tensor:
    """The pairs of neighbours of a matrix, seen in the shape `pairs`, in another order of axes; a pair stays together.

    Pairs of 16-bit elements move as one word, and in one pass for each value of the last two axes, which are halves:
    two to four times as fast as in one go, since torch's innermost loops would be of two steps. A gradient needs the
    elements.
    """
    plain = not torch.compiler.is_compiling() and not factor.requires_grad and factor.element_size() == 2
    if not (plain and factor.numel() and factor.is_contiguous() and factor.storage_offset() % 2 == 0):
        return factor.reshape(*pairs, 2).permute(*order, len(order))
    words = factor.view(torch.int32).view(pairs).permute(order)
    result = torch.empty(words.shape, dtype=words.dtype, device=words.device)
    for i in range(words.shape[-2]):
        for j in range(words.shape[-1]):
            result[..., i, j].copy_(words[..., i, j])
    return result.view(factor.dtype)


def join_lowrank(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Published factors [C, R1] and [C, R2] of the same channels, side by side: [C, R1 + R2], `first` first.

    Either order, down or up, is one of tiles of 16 channels by 16 ranks, so tiles move and their insides do not.
    """
    for name, factor in (("first", first), ("second", second)):
        require_tensor(name, factor, (first.shape[0], None))
        _require_lowrank(name, "C", first.shape[0], factor.shape[1])
    tiles = [
        factor.reshape(first.shape[0] // 16, factor.shape[1] // 16, 256).to(first.dtype) for factor in (first, second)
    ]
    return torch.cat(tiles, dim=1).reshape(first.shape[0], first.shape[1] + second.shape[1])


def _require_lowrank(name: str, dimension: str, channels: int, rank: int) -> None:
    require_multiple(name, dimension, channels, 16)
    if rank % RANK_ALIGNMENT:
        raise ValueError(f"{name}: expected R to be a multiple of {RANK_ALIGNMENT}, got {rank}")


@dataclass(frozen=True)
class SVDQWeights:
    """One 4-bit linear in canonical (row-major, readable) form; N outputs, K inputs, R the rank, padded or not.

    The layer computes, in real numbers (packing.md 8.4),
    `y = wtscale * wcscales[n] * sum_k value(codes[n,k]) scales[n,g] (x[k] + shift) / smooth[k] + bias[n]
    + sum_r proj_up[n,r] sum_k proj_down[r,k] x[k]`. The shift is a property of the layer, not of the file.

    Attributes:
        precision: "int4" (groups of 64) or "nvfp4" (groups of 16).
        codes: int8 [N, K]; int4 -8..7, or e2m1 codes 0..15.
        scales: half [N, K/64] (int4) or float8_e4m3fn [N, K/16] (nvfp4).
        smooth: half [K], the divisor of the quantised path.
        smooth_orig: half [K], the divisor before it was folded into the producer; never used in compute.
        proj_down: half [R, K], already divided by the smoothing: applies to the raw input.
        proj_up: half [N, R].
        bias: half [N], or None.
        wtscale: per-tensor factor [1], or None for 1 (nvfp4 only).
        wcscales: per-channel factors [N], or None for ones.
    """

    precision: Precision
    codes: torch.Tensor
    scales: torch.Tensor
    smooth: torch.Tensor
    smooth_orig: torch.Tensor
    proj_down: torch.Tensor
    proj_up: torch.Tensor
    bias: torch.Tensor | None = None
    wtscale: torch.Tensor | None = None
    wcscales: torch.Tensor | None = None

    def __post_init__(self) -> None:
        if self.precision not in GROUP_SIZES:
            raise ValueError(f"precision: expected 'int4' or 'nvfp4', got {self.precision!r}")
        require_tensor("codes", self.codes, (None, None), (torch.int8,))
        n, k = self.codes.shape
        require_multiple("codes", "K", k, self.group_size)
        scale_dtypes = HALF_DTYPES if self.precision == "int4" else (torch.float8_e4m3fn,)
        require_tensor("scales", self.scales, (n, k // self.group_size), scale_dtypes)
        require_tensor("smooth", self.smooth, (k,), HALF_DTYPES)
        require_tensor("smooth_orig", self.smooth_orig, (k,), HALF_DTYPES)
        require_tensor("proj_down", self.proj_down, (None, k), HALF_DTYPES)
        require_tensor("proj_up", self.proj_up, (n, self.rank), HALF_DTYPES)
        if self.bias is not None:
            require_tensor("bias", self.bias, (n,), HALF_DTYPES)
        if self.wtscale is not None:
            require_tensor("wtscale", self.wtscale, (1,), FLOAT_DTYPES)
        if self.wcscales is not None:
            require_tensor("wcscales", self.wcscales, (n,), FLOAT_DTYPES)

    @property
    def group_size(self) -> int:
        """Inputs per scale: 64 for int4, 16 for nvfp4."""
        return GROUP_SIZES[self.precision]

    @property
    def in_features(self) -> int:
        """K."""
        return self.codes.shape[1]

    @property
    def out_features(self) -> int:
        """N."""
        return self.codes.shape[0]

    @property
    def rank(self) -> int:
        """R, the rows of `proj_down`."""
        return self.proj_down.shape[0]


def pack_svdq(weights: SVDQWeights) -> dict[str, torch.Tensor]:
    """Pads and packs a linear into the published tensors (checkpoint_format.md 0).

    N and K are padded to 128 and R to 16: codes and low-rank factors with 0, every vector and the int4 scales with 1,
    as the published converter does; nvfp4 micro-scales with 0, which is their value for an all-zero group. A missing
    bias becomes zeros (its padding still 1).

    Returns:
        qweight, wscales, smooth_factor, smooth_factor_orig, proj_down, proj_up, bias; wtscale and wcscales if present.
    """
    n, k = weights.codes.shape
    more_n = ceil_to(n, CHANNEL_ALIGNMENT) - n
    more_k = ceil_to(k, CHANNEL_ALIGNMENT) - k
    more_r = ceil_to(weights.rank, RANK_ALIGNMENT) - weights.rank
    more_groups = more_k // weights.group_size
    if weights.precision == "int4":
        wscales = pack_wscales(pad(weights.scales, (0, more_groups, 0, more_n), value=1.0))
    else:
        padded = pad(weights.scales.view(torch.uint8), (0, more_groups, 0, more_n))
        wscales = pack_micro_scales(padded.view(torch.float8_e4m3fn))
    bias = weights.bias if weights.bias is not None else weights.smooth.new_zeros(n)
    tensors = {
        "qweight": pack_qweight(pad(weights.codes, (0, more_k, 0, more_n))),
        "wscales": wscales,
        "smooth_factor": pack_vector(pad(weights.smooth, (0, more_k), value=1.0)),
        "smooth_factor_orig": pack_vector(pad(weights.smooth_orig, (0, more_k), value=1.0)),
        "proj_down": pack_lowrank_down(pad(weights.proj_down, (0, more_k, 0, more_r))),
        "proj_up": pack_lowrank_up(pad(weights.proj_up, (0, more_r, 0, more_n))),
        "bias": pack_vector(pad(bias, (0, more_n), value=1.0)),
    }
    if weights.wtscale is not None:
        tensors["wtscale"] = weights.wtscale
    if weights.wcscales is not None:
        tensors["wcscales"] = pack_vector(pad(weights.wcscales, (0, more_n), value=1.0))
    return tensors


def unpack_svdq(
    tensors: Mapping[str, torch.Tensor], in_features: int | None = None, out_features: int | None = None
) -> SVDQWeights:
    """Inverse of `pack_svdq`.

    Args:
        tensors: published tensors under the names `pack_svdq` returns. `bias`, `wtscale` and `wcscales` may be
            missing; a missing `smooth_factor_orig` is taken from `smooth_factor`. The dtype of wscales tells the
            precision.
        in_features, out_features: sizes before padding, to crop to; None keeps the padded sizes.

    Raises:
        ValueError: a missing tensor, inconsistent shapes, or a crop that the padded size does not allow.
    """
    missing = [name for name in ("qweight", "wscales", "smooth_factor", "proj_down", "proj_up") if name not in tensors]
    if missing:
        raise ValueError(f"tensors: expected an SVDQuant linear, missing {', '.join(missing)}")
    precision: Precision = "nvfp4" if tensors["wscales"].dtype == torch.float8_e4m3fn else "int4"
    codes = unpack_qweight(tensors["qweight"], signed=precision == "int4")
    n = _cropped("out_features", out_features, codes.shape[0], CHANNEL_ALIGNMENT)
    k = _cropped("in_features", in_features, codes.shape[1], CHANNEL_ALIGNMENT)
    require_multiple("in_features", "in_features", k, GROUP_SIZES[precision])
    unpack_scales = unpack_wscales if precision == "int4" else unpack_micro_scales
    smooth = tensors["smooth_factor"]
    bias, wtscale, wcscales = tensors.get("bias"), tensors.get("wtscale"), tensors.get("wcscales")
    return SVDQWeights(
        precision=precision,
        codes=codes[:n, :k],
        scales=unpack_scales(tensors["wscales"])[:n, : k // GROUP_SIZES[precision]],
        smooth=unpack_vector(smooth)[:k],
        smooth_orig=unpack_vector(tensors.get("smooth_factor_orig", smooth))[:k],
        proj_down=unpack_lowrank_down(tensors["proj_down"])[:, :k],
        proj_up=unpack_lowrank_up(tensors["proj_up"])[:n],
        bias=None if bias is None else unpack_vector(bias)[:n],
        wtscale=None if wtscale is None else wtscale.reshape(-1),
        wcscales=None if wcscales is None else unpack_vector(wcscales)[:n],
    )


def _cropped(name: str, size: int | None, padded: int, alignment: int) -> int:
    if size is None:
        return padded
    if size <= 0 or ceil_to(size, alignment) != padded:
        raise ValueError(f"{name}: expected a size that pads to {padded}, got {size}")
    return size
