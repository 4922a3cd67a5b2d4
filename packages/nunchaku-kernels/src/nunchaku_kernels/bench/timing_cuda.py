"""Timing functions on a CUDA device: alone on a rested GPU (burst), and back to back at its power limit (sustained)."""

import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch

MODES = ("sustained", "burst")
"""The second flatters: an engine runs at the power limit, where a kernel that needs less energy is the faster one."""

Call = Callable[[], object]
Measure = Callable[[], Mapping[str, float]]
"""Seconds per call, for each of `MODES`."""

_REST = 0.06
_LAUNCHES = 30
_CAPTURED_CALLS = 32
_SPIN_CYCLES = 500_000
_MOST_SPIN_CYCLES = 1 << 26


def interleaved_modes(
    rivals: Mapping[str, Sequence[Call]], prepare: Callable[[Sequence[Call]], Measure], *, rounds: int
) -> dict[str, dict[str, float]]:
    """Median seconds of one call of each rival and mode, over `rounds` in which the rivals take turns.

    Args:
        rivals: name -> the same work on different buffers, which are used in turn.
        prepare: makes a measurement of such calls, as `CudaTimer` does.
        rounds: how often each rival is measured.
    """
    measures = {name: prepare(calls) for name, calls in rivals.items()}
    results: dict[str, list[Mapping[str, float]]] = {name: [] for name in rivals}
    for _ in range(rounds):
        for name, measure in measures.items():
            results[name].append(measure())
    return {
        name: {mode: statistics.median(one[mode] for one in measured) for mode in MODES}
        for name, measured in results.items()
    }


class CudaTimer:
    """Measures calls on one device; `prepare` of `interleaved_modes`.

    Sustained: the mean over `seconds` of back-to-back calls, captured in a CUDA graph so that no rival waits for its
    host. Burst: 60 ms of rest, then the median of 30 single calls between two events, behind a kernel that spins until
    all of the call is queued. Events add one to two microseconds to a burst.
    """

    def __init__(self, device: torch.device, seconds: float) -> None:
        self.device = device
        self.seconds = seconds

    def __call__(self, calls: Sequence[Call]) -> Measure:
        with torch.cuda.device(self.device):
            for call in calls:
                call()  # warm up: lazy loading, plans, workspaces
            repeats = -(-_CAPTURED_CALLS // len(calls))
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                for call in itertools.chain.from_iterable([calls] * repeats):
                    call()
        turns = itertools.cycle(calls)

        def measure() -> dict[str, float]:
            with torch.cuda.device(self.device):
                return {
                    "burst": self._burst(turns),
                    "sustained": self._sustained(graph) / (repeats * len(calls)),
                }

        return measure

    def _sustained(self, graph: torch.cuda.CUDAGraph) -> float:
        """Seconds per replay."""
        replays = 1
        while True:
            begin, end = _event(), _event()
            begin.record()
            for _ in range(replays):
                graph.replay()
            end.record()
            end.synchronize()
            elapsed = begin.elapsed_time(end) / 1e3
            if elapsed >= 0.8 * self.seconds:
                return elapsed / replays
            replays = max(replays + 1, round(replays * self.seconds / elapsed))

    def _burst(self, turns: "itertools.cycle[Call]") -> float:
        torch.cuda.synchronize()
        time.sleep(_REST)
        times: list[float] = []
        spin = _SPIN_CYCLES
        while len(times) < _LAUNCHES:
            begin, end = _event(), _event()
            torch.cuda._sleep(spin)
            begin.record()
            next(turns)()
            end.record()
            late = begin.query()  # the GPU came here before the call was queued: its host's time would count
            end.synchronize()
            if late and spin < _MOST_SPIN_CYCLES:
                spin *= 2
            else:
                times.append(begin.elapsed_time(end) / 1e3)
        return statistics.median(times)


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)
