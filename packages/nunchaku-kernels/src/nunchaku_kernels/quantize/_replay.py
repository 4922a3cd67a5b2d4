"""Loops of many small steps: on a GPU, where launching a step takes longer than it does, as a CUDA graph."""

from collections.abc import Callable

import torch


class Replayed:
    """A function that works in place on tensors, called again and again with others of the same shapes.

    On a GPU its second call records what it launches, over buffers of its own, and from then on the record is replayed
    for a fraction of the time; the first call is an ordinary one, and so is any with other shapes.

    Args:
        function: of tensors, without control flow that depends on their values, and without matrix products (their
            libraries keep workspaces for a stream, which would stay in the record's memory).
        changed: how many of the tensors, from the first one on, it changes.
    """

    def __init__(self, function: Callable[..., None], changed: int) -> None:
        self._function, self._changed = function, changed
        self._warm = False
        self._graph: torch.cuda.CUDAGraph | None = None
        self._buffers: list[torch.Tensor] = []

    def __call__(self, *tensors: torch.Tensor) -> None:
        """`function(*tensors)`."""
        if not (tensors[0].is_cuda and self._warm):
            self._function(*tensors)
            self._warm = True
            return
        if self._graph is None:
            self._buffers = [torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device) for tensor in tensors]
            self._graph = self._recorded(tensors[0].device)
        if any(buffer.shape != tensor.shape for buffer, tensor in zip(self._buffers, tensors, strict=True)):
            self._function(*tensors)
            return
        for buffer, tensor in zip(self._buffers, tensors, strict=True):
            buffer.copy_(tensor)
        self._graph.replay()
        for buffer, tensor in list(zip(self._buffers, tensors, strict=True))[: self._changed]:
            tensor.copy_(buffer)

    def _recorded(self, device: torch.device) -> torch.cuda.CUDAGraph:
        # Not by torch.cuda.graph, which collects garbage and empties caches first: it takes longer than what it saves.
        graph = torch.cuda.CUDAGraph()
        current, aside = torch.cuda.current_stream(device), torch.cuda.Stream(device)
        aside.wait_stream(current)
        with torch.cuda.stream(aside):
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                self._function(*self._buffers)
            finally:
                graph.capture_end()
        current.wait_stream(aside)
        return graph
