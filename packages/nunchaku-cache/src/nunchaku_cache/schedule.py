"""Schedules found offline: record how residuals move on a few pictures, then choose the steps to compute."""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any, Self

FORMAT = "nunchaku-cache schedule 1"
MAX_STEPS = 10_000


@dataclass
class Trace:
    """What reusing residuals would have cost, recorded on calls in which every step was computed.

    Attributes:
        model: class name of the transformer.
        max_gap: how far back residuals were compared.
        errors: segment -> step -> gap - 1 -> errors, mean|R(step) - R(step - gap)| / mean|R(step)| per call, branch
            and sample, where R is what the skippable blocks add.
    """

    model: str
    max_gap: int
    errors: dict[str, list[list[list[float]]]] = field(default_factory=dict)

    def add(self, segment: str, step: int, gap: int, errors: Sequence[float]) -> None:
        """Take note of the errors of a step's samples."""
        steps = self.errors.setdefault(segment, [])
        while len(steps) <= step:
            steps.append([[] for _ in range(self.max_gap)])
        if gap:
            steps[step][gap - 1].extend(errors)

    def error(self, segment: str, step: int, gap: int) -> float:
        """Mean error of reusing at `step` what was computed `gap` steps before; infinite where it is not known."""
        known = self.errors[segment][step][gap - 1] if gap <= self.max_gap else []
        return sum(known) / len(known) if known else math.inf


@dataclass(frozen=True)
class Schedule:
    """Which steps to skip, for one model and number of steps: `FirstBlockCache(schedule=found.skip)`.

    Attributes:
        model: class name of the transformer.
        segment: "all", "joint" or "single".
        skip: per step.
        error: mean error of the skipped steps, as `Trace` measures it.
    """

    model: str
    segment: str
    skip: tuple[bool, ...]
    error: float

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a JSON file."""
        Path(path).write_text(json.dumps({"format": FORMAT, **asdict(self)}, indent=2) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read a file that `save` wrote.

        Raises:
            OSError: the file cannot be read.
            ValueError: it is not such a file; the message says what is wrong.
        """
        try:
            content = json.loads(Path(path).read_text())
        except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"{path}: not JSON: {error}") from error
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise ValueError(f'{path}: expected "format": {FORMAT!r}')
        wrong = _wrong_field(content)
        if wrong:
            raise ValueError(f"{path}: {wrong}")
        return cls(content["model"], content["segment"], tuple(content["skip"]), float(content["error"]))


def _wrong_field(content: dict[str, Any]) -> str:
    for name in ("model", "segment"):
        if not isinstance(content.get(name), str):
            return f"`{name}` must be a string, got {content.get(name)!r}"
    skip, error = content.get("skip"), content.get("error")
    if not isinstance(skip, list) or not 0 < len(skip) <= MAX_STEPS or not all(isinstance(s, bool) for s in skip):
        return f"`skip` must be a list of 1 to {MAX_STEPS} booleans"
    if skip[0]:
        return "`skip` must begin with false: the first step has nothing to reuse"
    if isinstance(error, bool) or not isinstance(error, int | float) or not math.isfinite(error) or error < 0:
        return f"`error` must be a number, 0 or more, got {error!r}"
    return ""


def find_schedule(trace: Trace, computed: int, *, segment: str = "all") -> Schedule:
    """The schedule with the least total error that computes so many steps (dynamic programming; exact).

    Args:
        trace: from `handle.record()`, of at least one whole call.
        computed: how many of its steps are computed; the first one always is.
        segment: whose; with a `DoubleFirstBlockCache` "joint" or "single".

    Raises:
        ValueError: nothing was recorded of the segment, or it cannot be done with so many steps.
    """
    if segment not in trace.errors:
        raise ValueError(f"segment: nothing was recorded of {segment!r}; recorded are {sorted(trace.errors)}")
    steps = len(trace.errors[segment])
    if not 1 <= computed <= steps:
        raise ValueError(f"computed: expected 1 to {steps}, the steps that were recorded, got {computed}")
    # reach[start][n]: error of computing `start` and skipping the n steps behind it
    reach = [
        list(
            accumulate(
                (trace.error(segment, start + gap, gap) for gap in range(1, min(trace.max_gap, steps - 1 - start) + 1)),
                initial=0.0,
            )
        )
        for start in range(steps)
    ]
    # best[i]: (error, computed steps) of the cheapest way to have computed step i as the last one so far
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, (0,))}
    for _ in range(computed - 1):
        following: dict[int, tuple[float, tuple[int, ...]]] = {}
        for last, (error, chosen) in best.items():
            for skipped, added in enumerate(reach[last]):
                step = last + skipped + 1
                if step < steps and error + added < following.get(step, (math.inf, ()))[0]:
                    following[step] = (error + added, (*chosen, step))
        best = following
    ends = [
        (error + reach[last][steps - 1 - last], chosen)
        for last, (error, chosen) in best.items()
        if steps - 1 - last < len(reach[last])
    ]
    total, chosen = min(ends, default=(math.inf, ()))
    if math.isinf(total):
        raise ValueError(
            f"computed: {computed} of {steps} steps leave gaps of more than {trace.max_gap}, which were not recorded"
        )
    skip = tuple(step not in chosen for step in range(steps))
    return Schedule(trace.model, segment, skip, total / max(1, sum(skip)))
