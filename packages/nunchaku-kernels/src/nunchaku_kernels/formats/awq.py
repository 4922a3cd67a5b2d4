"""Published byte order of a W4A16 (AWQ) linear and of the adaptive-norm modulation built on it (packing.md 6)."""

import torch
from torch.nn.functional import pad

from nunchaku_kernels._checks import ceil_to, require_int_range, require_multiple, require_tensor

# Group counts are padded to a multiple of eight per this many scale blocks (packing.md 6).
_SCALE_BLOCKS = {32: 4, 64: 2, 128: 1}


def pack_awq_int16(codes: torch.Tensor) -> torch.Tensor:
    """Unsigned 4-bit codes to the published order, container of the T5 checkpoints.

    Args:
        codes: int8 or uint8 [N, K], 0..15; N a multiple of 4, K of 64.

    Returns:
        int16 [N/4, K]; the same bytes as `pack_awq`.
    """
    require_tensor("codes", codes, (None, None), (torch.int8, torch.uint8))
    n, k = codes.shape
    require_multiple("codes", "N", n, 4)
    require_multiple("codes", "K", k, 64)
    require_int_range("codes", codes, 0, 15)
    # N = quad, row; K = 64-block, half, nibble, position. Four nibbles, 8 columns apart, share a 16-bit word.
    tiles = codes.to(torch.uint8).reshape(n // 4, 4, k // 64, 2, 4, 8).permute(0, 2, 1, 3, 5, 4)
    pairs = tiles[..., 0::2] | (tiles[..., 1::2] << 4)
    return pairs.contiguous().view(torch.int16).view(n // 4, k)


def pack_awq(codes: torch.Tensor) -> torch.Tensor:
    """Like `pack_awq_int16`, in the container of the modulation layers: int32 [N/4, K/2]."""
    return pack_awq_int16(codes).view(torch.int32)


def unpack_awq(qweight: torch.Tensor) -> torch.Tensor:
    """Inverse of `pack_awq` and `pack_awq_int16`.

    Args:
        qweight: int32 [N/4, K/2] or int16 [N/4, K].

    Returns:
        uint8 [N, K], 0..15.
    """
    require_tensor("qweight", qweight, (None, None), (torch.int16, torch.int32))
    quads, width = qweight.shape
    k = width * qweight.element_size() // 2
    require_multiple("qweight", "K", k, 64)
    packed = qweight.contiguous().view(torch.uint8).view(quads, k // 64, 4, 2, 8, 2)
    nibbles = torch.stack((packed & 0xF, packed >> 4), dim=-1)
    # now quad, 64-block, row, half, position, nibble pair, nibble parity
    return nibbles.permute(0, 2, 1, 3, 5, 6, 4).reshape(quads * 4, k)


def padded_groups(groups: int, group_size: int) -> int:
    """Rows of a published scale tensor: `groups` rounded up to 8 (group size 128 and up), 16 (64) or 32 (32)."""
    if group_size < 128 and group_size not in _SCALE_BLOCKS:
        raise ValueError(f"group_size: expected 32, 64, 128 or more, got {group_size}")
    return ceil_to(groups, 8 * _SCALE_BLOCKS.get(group_size, 1))


def pack_awq_scales(scales: torch.Tensor, group_size: int) -> torch.Tensor:
    """Group scales or zeros [N, G], any dtype, to the published [Gpad, N]: natural order, padding rows zero."""
    require_tensor("scales", scales, (None, None))
    groups = scales.shape[1]
    return pad(scales.t(), (0, 0, 0, padded_groups(groups, group_size) - groups)).contiguous()


def unpack_awq_scales(wscales: torch.Tensor, in_features: int, group_size: int) -> torch.Tensor:
    """Inverse of `pack_awq_scales`: [Gpad, N] to [N, in_features / group_size]."""
    require_tensor("wscales", wscales, (None, None))
    require_multiple("in_features", "in_features", in_features, group_size)
    groups = in_features // group_size
    if wscales.shape[0] < groups:
        raise ValueError(f"wscales: expected at least {groups} rows, got {wscales.shape[0]}")
    return wscales[:groups].t().contiguous()


def to_channel_major(rows: torch.Tensor, chunks: int) -> torch.Tensor:
    """Output rows of a modulation linear from [chunk][channel] (diffusers) to [channel][chunk] (published).

    Args:
        rows: [chunks * D, ...], any dtype: weight codes, scales [N, G] or bias.
    """
    channels = _channels("rows", rows, chunks)
    return rows.unflatten(0, (chunks, channels)).transpose(0, 1).flatten(0, 1)


def from_channel_major(rows: torch.Tensor, chunks: int) -> torch.Tensor:
    """Inverse of `to_channel_major`."""
    channels = _channels("rows", rows, chunks)
    return rows.unflatten(0, (channels, chunks)).transpose(0, 1).flatten(0, 1)


def fold_unit_scale(bias: torch.Tensor, chunks: int) -> torch.Tensor:
    """Adds the 1 of `x * (1 + scale)` to the scale chunks of a modulation bias (checkpoint_format.md 3).

    Args:
        bias: [chunks * D] in diffusers' chunk order. Chunks 1 and chunks - 2 are scales: 1 of 3, 1 and 4 of 6.

    Returns:
        A new tensor; the addition is rounded in the dtype of `bias`.
    """
    return _shift_scale_chunks(bias, chunks, 1.0)


def unfold_unit_scale(bias: torch.Tensor, chunks: int) -> torch.Tensor:
    """Inverse of `fold_unit_scale`, up to the rounding of the two additions."""
    return _shift_scale_chunks(bias, chunks, -1.0)


def _shift_scale_chunks(bias: torch.Tensor, chunks: int, amount: float) -> torch.Tensor:
    require_tensor("bias", bias, (None,))
    channels = _channels("bias", bias, chunks)
    folded = bias.clone().view(chunks, channels)
    for chunk in {1, chunks - 2} & set(range(chunks)):
        folded[chunk] += amount
    return folded.view(-1)


def _channels(name: str, rows: torch.Tensor, chunks: int) -> int:
    require_tensor(name, rows)
    if chunks <= 0:
        raise ValueError(f"chunks: expected a positive number, got {chunks}")
    if rows.dim() == 0 or rows.shape[0] % chunks:
        raise ValueError(f"{name}: expected a first dimension divisible by {chunks} chunks, got {list(rows.shape)}")
    return rows.shape[0] // chunks
