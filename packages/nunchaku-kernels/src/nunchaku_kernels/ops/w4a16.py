"""W4A16: weight-only 4 bits in the AWQ order, for modulation (M = 1..8) and text encoders."""

import torch

from nunchaku_kernels.formats import padded_groups, unpack_awq, unpack_awq_scales
from nunchaku_kernels.ops import _native
from nunchaku_kernels.ops._checks import FLOATS, check_optional, check_tensor, device_of
from nunchaku_kernels.ops._library import fake, implement
from nunchaku_kernels.ops._native import dense, dense_rows, dtype_code, place, pointer
from nunchaku_kernels.reference import w4a16 as reference

GROUP_SIZES = (64, 128)
"""Channels per scale: 64 for modulation, 128 for T5."""


@implement("w4a16_linear", "CompositeExplicitAutograd")
def _linear(
    x: torch.Tensor,
    qweight: torch.Tensor,
    wscales: torch.Tensor,
    wzeros: torch.Tensor,
    bias: torch.Tensor | None,
    group_size: int,
) -> torch.Tensor:
    op = "w4a16_linear"
    device = device_of(op, "x", x)
    check_tensor(op, "x", x, dtypes=FLOATS, shape=(None, None), device=device)
    tokens, width = x.shape
    if group_size not in GROUP_SIZES or width == 0 or width % group_size:
        raise ValueError(f"{op}: `group_size` must be 64 or 128 and divide the {width} channels of x, got {group_size}")
    check_tensor(op, "qweight", qweight, dtypes=(torch.int32, torch.int16), shape=(None, None), device=device)
    container = qweight.dtype
    if qweight.shape[0] == 0 or qweight.shape[1] * container.itemsize != width * 2:
        raise ValueError(f"{op}: `qweight` must hold rows of {width} channels, got {container} {tuple(qweight.shape)}")
    rows, groups = qweight.shape[0] * 4, padded_groups(width // group_size, group_size)
    check_tensor(op, "wscales", wscales, dtypes=FLOATS, shape=(groups, rows), device=device)
    check_tensor(op, "wzeros", wzeros, dtypes=(wscales.dtype,), shape=(groups, rows), device=device)
    check_optional(op, "bias", bias, dtypes=FLOATS, shape=(rows,), device=device)
    native = _native.kernels(device)
    if native is None:
        scales = unpack_awq_scales(wscales, width, group_size)
        zeros = unpack_awq_scales(wzeros, width, group_size)
        return reference.linear(x, unpack_awq(qweight), scales, zeros, bias)
    x, qweight, wscales, wzeros, bias = dense_rows(x), dense(qweight), dense(wscales), dense(wzeros), dense(bias)
    out = torch.empty(tokens, rows, dtype=x.dtype, device=device)
    if tokens:
        native.w4a16_linear(
            pointer(x), dtype_code(x), tokens, width, x.stride(0), pointer(qweight), pointer(wscales),
            pointer(wzeros), dtype_code(wscales), pointer(bias), dtype_code(bias), rows, group_size, pointer(out),
            dtype_code(out), *place(device, tokens * rows * width),
        )  # fmt: skip
    return out


@fake("w4a16_linear")
def _(
    x: torch.Tensor,
    qweight: torch.Tensor,
    wscales: torch.Tensor,
    wzeros: torch.Tensor,
    bias: torch.Tensor | None,
    group_size: int,
) -> torch.Tensor:
    return x.new_empty(x.shape[0], qweight.shape[0] * 4)
