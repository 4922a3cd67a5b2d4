"""Timing functions against each other."""

import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence


def interleaved_medians(
    rivals: Mapping[str, Sequence[Callable[[], object]]],
    *,
    seconds: float = 2.0,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Median time of one call of each rival, in seconds.

    The rivals take turns, so that a machine that slows down slows all of them; each rotates over its own copies, so
    that none finds its weights in a cache.

    Args:
        rivals: name -> the same work on different buffers.
        seconds: time spent on measuring, all rivals together; every rival runs at least three times.
        clock: `time.process_time` counts processor time, for machines that others use too.
    """
    turns = {name: itertools.cycle(calls) for name, calls in rivals.items()}
    for calls in rivals.values():
        calls[0]()  # warm up: lazy initialisation, first-touch of outputs
    times: dict[str, list[float]] = {name: [] for name in rivals}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(times.values()))) < 3:
        for name, turn in turns.items():
            call = next(turn)
            start = clock()
            call()
            times[name].append(clock() - start)
    return {name: statistics.median(measured) for name, measured in times.items()}
