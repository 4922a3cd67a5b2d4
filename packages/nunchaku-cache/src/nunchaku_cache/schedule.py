"""Schedules found offline: record how a model's output moves on a few pictures, then choose the steps to compute.

A skipped step's output is forecast by the polynomial through the last computed ones, each of whose terms is multiplied
by a number that fits the recorded calls best. Inner products of outputs are all that is needed to know those numbers
and the error that stays, for any choice of steps. No torch here.
"""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

FORMAT = "nunchaku-cache schedule 1"
MAX_STEPS = 10_000
MAX_ORDER = 2
MAX_DAMPING = 1e3
"""Larger numbers in a file are no fit."""
LATE_EMPHASIS = 0.7
"""The best of -2, -1, 0 and 0.7 for the demo model's pictures, at 20, 28 and 50 steps."""


@dataclass
class Trace:
    """What was recorded of calls in which every step was computed.

    Attributes:
        model: class name of the transformer.
        max_gap: how far back residuals were compared.
        timesteps: per step, of the last call.
        products: step -> gap -> <output(step), output(step - gap)>, summed over calls, branches and samples.
    """

    model: str
    max_gap: int
    timesteps: list[float] = field(default_factory=list)
    products: list[list[float]] = field(default_factory=list)

    def add(self, step: int, timestep: float, products: Sequence[float]) -> None:
        """Take note of a step: inner products of its output with itself and those before it, nearest first."""
        while len(self.products) <= step:
            self.timesteps.append(timestep)
            self.products.append([0.0] * (1 + self.max_gap))
        self.timesteps[step] = timestep
        for gap, product in enumerate(products):
            self.products[step][gap] += product

    def product(self, a: int, b: int) -> float:
        """<output(a), output(b)>, of steps that are at most `max_gap` apart."""
        return self.products[max(a, b)][abs(a - b)]


@dataclass(frozen=True)
class Schedule:
    """Which steps to skip, for one model and number of steps, and how to forecast them: see `ScheduledCache`.

    Attributes:
        model: class name of the transformer.
        skip: per step.
        damping: per step, what the terms of the forecasting polynomial are multiplied by, lowest first; empty for
            computed steps.
        error: of forecasts on the recorded calls, relative and root mean square.
    """

    model: str
    skip: tuple[bool, ...]
    damping: tuple[tuple[float, ...], ...]
    error: float

    def __post_init__(self) -> None:
        wrong = _wrong_field(asdict(self))
        if wrong:
            raise ValueError(f"Schedule: {wrong}")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a JSON file, as a whole or not at all."""
        scratch = Path(f"{os.fspath(path)}.tmp")
        scratch.write_text(json.dumps({"format": FORMAT, **asdict(self)}, indent=2) + "\n")
        scratch.replace(path)

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
        damping = tuple(tuple(map(float, terms)) for terms in content["damping"])
        return cls(content["model"], tuple(content["skip"]), damping, float(content["error"]))


def _wrong_field(content: dict[str, Any]) -> str:
    if not isinstance(content.get("model"), str):
        return f"`model` must be a string, got {content.get('model')!r}"
    skip, damping = content.get("skip"), content.get("damping")
    if not isinstance(skip, list | tuple) or not 0 < len(skip) <= MAX_STEPS:
        return f"`skip` must be a list of 1 to {MAX_STEPS} booleans"
    if not all(isinstance(entry, bool) for entry in skip):
        return f"`skip` must be a list of 1 to {MAX_STEPS} booleans"
    if skip[0]:
        return "`skip` must begin with false: the first step has nothing to reuse"
    if not isinstance(damping, list | tuple) or len(damping) != len(skip):
        return f"`damping` must have an entry for each of {len(skip)} steps"
    for step, (skipped, terms) in enumerate(zip(skip, damping, strict=True)):
        least, most = (1, MAX_ORDER + 1) if skipped else (0, 0)
        if not isinstance(terms, list | tuple) or not least <= len(terms) <= most:
            return f"`damping[{step}]` must be a list of {least} to {most} numbers, got {terms!r}"
        if not all(_is_number(term, MAX_DAMPING) for term in terms):
            return f"`damping[{step}]` must hold numbers of at most {MAX_DAMPING:g}, got {terms!r}"
    if not _is_number(content.get("error"), math.inf) or content["error"] < 0:
        return f"`error` must be a number, 0 or more, got {content.get('error')!r}"
    return ""


def _is_number(value: object, most: float) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value) and abs(value) <= most  # type: ignore[arg-type]


@dataclass(frozen=True)
class _Forecast:
    """The best forecast of a step from given ones: its damping, and the energy of what it misses."""

    damping: tuple[float, ...]
    error: float


class _Forecasts:
    """Best forecasts from a trace, each computed once."""

    def __init__(self, trace: Trace) -> None:
        self._trace = trace
        self._known: dict[tuple[int, ...], _Forecast] = {}

    def energy(self, step: int) -> float:
        """Of a step's outputs."""
        return self._trace.product(step, step)

    def best(self, step: int, nodes: tuple[int, ...]) -> _Forecast:
        """Of `step`, from the computed steps `nodes`, latest first; those beyond what was recorded are left out."""
        nodes = tuple(node for node in nodes if step - node <= self._trace.max_gap)
        key = (step, *nodes)
        if key not in self._known:
            self._known[key] = self._fit(step, nodes)
        return self._known[key]

    def _fit(self, step: int, nodes: tuple[int, ...]) -> _Forecast:
        """Least squares on the terms of Newton's polynomial, by their inner products."""
        x = self._trace.timesteps
        if len({x[node] for node in nodes}) < len(nodes):
            nodes = nodes[:1]  # no slope can be had from one timestep
        # terms[k][i]: coefficient of output(nodes[i]) in term k
        terms: list[list[float]] = []
        divided = [[float(i == k) for i in range(len(nodes))] for k in range(len(nodes))]
        product = 1.0
        for k in range(len(nodes)):
            terms.append([product * coefficient for coefficient in divided[0]])
            product *= x[step] - x[nodes[k]]
            divided = [
                [(a - b) / (x[nodes[i]] - x[nodes[i + k + 1]]) for a, b in zip(divided[i], divided[i + 1], strict=True)]
                for i in range(len(divided) - 1)
            ]

        def inner(a: list[float], b: list[float]) -> float:
            return math.fsum(
                p * q * self._trace.product(nodes[i], nodes[j]) for i, p in enumerate(a) for j, q in enumerate(b)
            )

        towards = [
            math.fsum(p * self._trace.product(node, step) for p, node in zip(term, nodes, strict=True))
            for term in terms
        ]
        gram = [[inner(a, b) for b in terms] for a in terms]
        damping = _solve(gram, towards)
        missed = self.energy(step) - math.fsum(d * t for d, t in zip(damping, towards, strict=True))
        return _Forecast(tuple(damping), max(0.0, missed))


def _solve(gram: list[list[float]], towards: list[float]) -> list[float]:
    """A symmetric positive system of up to three unknowns; unknowns that the data do not determine become 0."""
    factor: list[list[float]] = []
    free: list[bool] = []
    for i, row in enumerate(gram):
        lower = [0.0] * len(gram)
        for j in range(i):
            known = math.fsum(lower[k] * factor[j][k] for k in range(j))
            lower[j] = (row[j] - known) / factor[j][j] if free[j] else 0.0
        rest = row[i] - math.fsum(value * value for value in lower[:i])
        free.append(rest > 1e-9 * row[i])
        lower[i] = math.sqrt(rest) if free[i] else 1.0
        factor.append(lower)
    size = len(gram)
    half = [0.0] * size
    for i in range(size):
        if free[i]:
            half[i] = (towards[i] - math.fsum(factor[i][k] * half[k] for k in range(i))) / factor[i][i]
    result = [0.0] * size
    for i in reversed(range(size)):
        if free[i]:
            result[i] = (half[i] - math.fsum(factor[k][i] * result[k] for k in range(i + 1, size))) / factor[i][i]
    return result


def find_schedule(
    trace: Trace, computed: int, *, order: int = MAX_ORDER, late_emphasis: float = LATE_EMPHASIS
) -> Schedule:
    """The schedule with the least error that computes so many steps (dynamic programming; exact).

    The error is the mean square of what forecasts miss, in proportion to the step's output, weighted with the square of
    the way to the next timestep, and with the share of the way that is left to the power of `-late_emphasis`.

    Args:
        trace: from `handle.record()`, of at least one whole call.
        computed: how many of its steps are computed; the first one always is.
        order: of the forecast, 0 to 2.
        late_emphasis: 0 counts errors at all steps alike; more, late ones above early ones, which the steps that follow
            correct in part.

    Raises:
        ValueError: nothing was recorded, or it cannot be done with so many steps.
    """
    steps = len(trace.products)
    if not steps:
        raise ValueError("trace: nothing was recorded")
    if not 0 <= order <= MAX_ORDER:
        raise ValueError(f"order: expected 0 to {MAX_ORDER}, got {order}")
    if not 1 <= computed <= steps:
        raise ValueError(f"computed: expected 1 to {steps}, the steps that were recorded, got {computed}")
    forecasts = _Forecasts(trace)
    weights = _weights(trace.timesteps, late_emphasis)

    def cost(step: int, nodes: tuple[int, ...]) -> float:
        energy = forecasts.energy(step)
        return weights[step] * forecasts.best(step, nodes).error / energy if energy else 0.0

    # best[nodes]: (error, computed steps) of the cheapest way to have computed these last, latest first
    best: dict[tuple[int, ...], tuple[float, tuple[int, ...]]] = {(0,): (0.0, (0,))}
    for _ in range(computed - 1):
        following: dict[tuple[int, ...], tuple[float, tuple[int, ...]]] = {}
        for nodes, (error, chosen) in best.items():
            for step in range(nodes[0] + 1, min(steps, nodes[0] + trace.max_gap + 2)):
                reached = (step, *nodes)[: order + 1]
                if error < following.get(reached, (math.inf, ()))[0]:
                    following[reached] = (error, (*chosen, step))
                if step - nodes[0] <= trace.max_gap:
                    error += cost(step, nodes)
        best = following
    ends = [
        (error + sum(cost(step, nodes) for step in range(nodes[0] + 1, steps)), chosen)
        for nodes, (error, chosen) in best.items()
        if steps - 1 - nodes[0] <= trace.max_gap
    ]
    if not ends:
        raise ValueError(
            f"computed: {computed} of {steps} steps leave gaps of more than {trace.max_gap}, which were not recorded"
        )
    return _schedule(trace, min(ends)[1], order, forecasts)


def _weights(timesteps: Sequence[float], late_emphasis: float) -> list[float]:
    """How much an error at each step counts, see `find_schedule`. The last step goes as far as the one before."""
    ways = [abs(b - a) for a, b in pairwise(timesteps)]
    ways = [*ways, ways[-1] if ways else 1.0]
    total = sum(ways) or 1.0
    left = [sum(ways[step:]) / total or 1.0 for step in range(len(ways))]
    return [(way / total) ** 2 * share**-late_emphasis for way, share in zip(ways, left, strict=True)]


def _schedule(trace: Trace, chosen: tuple[int, ...], order: int, forecasts: _Forecasts) -> Schedule:
    damping: list[tuple[float, ...]] = []
    squares = []
    for step in range(len(trace.products)):
        if step in chosen:
            damping.append(())
            continue
        found = forecasts.best(step, tuple(node for node in reversed(chosen) if node < step)[: order + 1])
        damping.append(found.damping)
        energy = forecasts.energy(step)
        squares.append(found.error / energy if energy else 0.0)
    error = math.sqrt(sum(squares) / len(squares)) if squares else 0.0
    skip = tuple(bool(terms) for terms in damping)
    return Schedule(trace.model, skip, tuple(damping), error)
