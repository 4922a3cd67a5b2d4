"""Relative L1 distance per sample, one pass over the streams and no temporary."""

from collections.abc import Sequence

import torch

from nunchaku_kernels.ops._checks import FLOATS, check_tensor, device_of
from nunchaku_kernels.ops._library import fake, implement
from nunchaku_kernels.reference.relative_l1 import relative_l1 as reference

OP = "relative_l1"


@implement(OP, "CompositeExplicitAutograd")
def _relative_l1(
    current: Sequence[torch.Tensor],
    previous: Sequence[torch.Tensor],
    origin: Sequence[torch.Tensor] | None = None,
    tokens: torch.Tensor | None = None,
) -> torch.Tensor:
    _check(current, previous, origin, tokens)
    return reference(current, previous, origin, tokens)


def _check(
    current: Sequence[torch.Tensor],
    previous: Sequence[torch.Tensor],
    origin: Sequence[torch.Tensor] | None,
    tokens: torch.Tensor | None,
) -> torch.device:
    if not current:
        raise ValueError(f"{OP}: `current` must hold a tensor or more")
    for name, streams in (("previous", previous), ("origin", origin)):
        if streams is not None and len(streams) != len(current):
            raise ValueError(f"{OP}: `{name}` must hold {len(current)} tensors like `current`, got {len(streams)}")
    device, batch = device_of(OP, "current[0]", current[0]), current[0].shape[0]
    for i, stream in enumerate(current):
        check_tensor(OP, f"current[{i}]", stream, dtypes=FLOATS, shape=(batch, None, None), device=device)
        for name, streams in (("previous", previous), ("origin", origin)):
            if streams is not None:
                check_tensor(OP, f"{name}[{i}]", streams[i], dtypes=(stream.dtype,), shape=stream.shape, device=device)
    if tokens is not None:
        check_tensor(OP, "tokens", tokens, dtypes=(torch.int64,), shape=(batch,), device=device)
    return device


@fake(OP)
def _(
    current: Sequence[torch.Tensor],
    previous: Sequence[torch.Tensor],
    origin: Sequence[torch.Tensor] | None = None,
    tokens: torch.Tensor | None = None,
) -> torch.Tensor:
    return current[0].new_empty(current[0].shape[0], dtype=torch.float32)
