"""Numbers that travel from the device to the host: distances and timesteps."""

from collections.abc import Sequence
from typing import Any

import torch

import nunchaku_kernels.ops  # noqa: F401 - registers the operators


def distances(
    current: Sequence[torch.Tensor],
    previous: Sequence[torch.Tensor],
    origin: Sequence[torch.Tensor] | None,
    tokens: torch.Tensor | None,
) -> list[float]:
    """mean|previous - (current - origin)| / mean|previous| per sample, over all streams.

    Args:
        current, previous, origin: tensors (batch, tokens, channels) per stream, compared in the dtype of `previous`; no
            origin: zero.
        tokens: how many tokens of each sample count, int64 (batch); None: all.
    """
    found: list[float] = torch.ops.nunchaku_kernels.relative_l1(
        _comparable(current, previous),
        _comparable(previous, previous),
        None if origin is None else _comparable(origin, previous),
        tokens,
    ).tolist()
    return found


def _comparable(streams: Sequence[torch.Tensor], like: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Streams as the operator takes them: dtypes may differ, under autocast, and videos be (batch, ..., channels)."""
    return [
        (stream if stream.dim() == 3 else stream.reshape(stream.shape[0], -1, stream.shape[-1])).to(
            torch.float32 if other.dtype == torch.float64 else other.dtype
        )
        for stream, other in zip(streams, like, strict=True)
    ]


def polynomial(coefficients: Sequence[float], x: float) -> float:
    """Value of a polynomial, highest power first."""
    result = 0.0
    for coefficient in coefficients:
        result = result * x + coefficient
    return result


class HostCopy:
    """A timestep on its way to the host. On a GPU the copy is queued now and waited for when it is read, so that the
    work queued meanwhile goes on."""

    def __init__(self, timestep: Any) -> None:
        """
        Raises:
            TypeError: no number and no tensor.
        """
        self._done: torch.cuda.Event | None = None
        if isinstance(timestep, int | float):
            timestep = torch.tensor(float(timestep))
        if not isinstance(timestep, torch.Tensor):
            raise TypeError(f"timestep: expected a tensor or a number, got {type(timestep).__name__}")
        timestep = timestep.detach()
        if timestep.dim() > 1:
            # one per token: known tokens have 0, those to be drawn the timestep
            timestep = timestep.flatten(1).amax(1)
        if timestep.is_cuda:
            with torch.cuda.device(timestep.device):
                self._host = torch.empty(timestep.shape, dtype=timestep.dtype, pin_memory=True)
                self._host.copy_(timestep, non_blocking=True)
                self._done = torch.cuda.Event()
                self._done.record()
        else:
            self._host = timestep

    def values(self, batch: int) -> tuple[float, ...]:
        """One value per sample; waits for the copy."""
        if self._done is not None:
            self._done.synchronize()
        found = [float(value) for value in self._host.flatten().tolist()]
        return tuple(found) if len(found) == batch else (found[0],) * batch
