"""Relative L1 distance per sample, one pass over the streams and no temporary."""

from collections.abc import Sequence
from typing import Any

import torch

from nunchaku_kernels.ops import _native
from nunchaku_kernels.ops._checks import FLOATS, check_tensor, device_of
from nunchaku_kernels.ops._library import fake, implement
from nunchaku_kernels.ops._native import dense, dtype_code, place, pointer
from nunchaku_kernels.reference.relative_l1 import relative_l1 as reference

OP = "relative_l1"

_CUDA_BLOCK_TOKENS = 16
"""Summed by a thread block: FLUX's 4096 tokens then fill a GPU."""
_CPU_BLOCK_ELEMENTS = 1 << 16
"""Summed by a thread at a time: long beside handing them out, short beside its share."""


@implement(OP, "CompositeExplicitAutograd")
def _relative_l1(
    current: Sequence[torch.Tensor],
    previous: Sequence[torch.Tensor],
    origin: Sequence[torch.Tensor] | None = None,
    tokens: torch.Tensor | None = None,
) -> torch.Tensor:
    device = _check(current, previous, origin, tokens)
    native = _native.kernels(device)
    if native is None:
        return reference(current, previous, origin, tokens)
    sums = torch.zeros(current[0].shape[0], 2, dtype=torch.float64, device=device)
    tokens = dense(tokens)
    for i, stream in enumerate(current):
        # kept until the kernel has run: a tensor with scattered channels is copied
        new, old = _rows(stream), _rows(previous[i])
        start = None if origin is None else _rows(origin[i])
        block = _CUDA_BLOCK_TOKENS if device.type == "cuda" else max(1, _CPU_BLOCK_ELEMENTS // max(1, new.shape[2]))
        blocks = sums.new_empty(len(new), -(-new.shape[1] // block), 2)
        native.l1_change(
            *_activations(new), *_activations(start), *_activations(old), dtype_code(new), *new.shape, pointer(tokens),
            block, pointer(blocks), pointer(sums), *place(device, 10 * new.numel()),
        )  # fmt: skip
    return (sums[:, 0] / sums[:, 1]).float()


def _rows(x: torch.Tensor) -> torch.Tensor:
    """x (B, T, C) with its channels side by side, as the extension reads it."""
    return x if x.stride(2) == 1 else x.contiguous()


def _activations(x: torch.Tensor | None) -> tuple[int, int, int]:
    """Address, stride of samples, stride of tokens."""
    return (0, 0, 0) if x is None else (x.data_ptr(), x.stride(0), x.stride(1))


def _check(
    current: Sequence[torch.Tensor],
    previous: Sequence[torch.Tensor],
    origin: Sequence[torch.Tensor] | None,
    tokens: torch.Tensor | None,
) -> torch.device:
    """Raise unless the streams fit together; returns their device."""
    if not current:
        raise ValueError(f"{OP}: `current` must hold a tensor or more")
    for name, streams in (("previous", previous), ("origin", origin)):
        if streams is not None and len(streams) != len(current):
            raise ValueError(f"{OP}: `{name}` must hold {len(current)} tensors like `current`, got {len(streams)}")
    device = device_of(OP, "current[0]", current[0])
    for i, stream in enumerate(current):
        batch = current[0].shape[0] if i else None
        check_tensor(OP, f"current[{i}]", stream, dtypes=FLOATS, shape=(batch, None, None), device=device)
        like: dict[str, Any] = {"dtypes": (stream.dtype,), "shape": stream.shape, "device": device}
        check_tensor(OP, f"previous[{i}]", previous[i], **like)
        if origin is not None:
            check_tensor(OP, f"origin[{i}]", origin[i], **like)
    if tokens is not None:
        check_tensor(OP, "tokens", tokens, dtypes=(torch.int64,), shape=current[0].shape[:1], device=device)
    return device


@fake(OP)
def _(
    current: Sequence[torch.Tensor],
    previous: Sequence[torch.Tensor],
    origin: Sequence[torch.Tensor] | None = None,
    tokens: torch.Tensor | None = None,
) -> torch.Tensor:
    return current[0].new_empty(current[0].shape[0], dtype=torch.float32)
