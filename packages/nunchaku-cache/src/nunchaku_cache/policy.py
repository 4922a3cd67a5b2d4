"""When to skip: the policies, and the decision for one sample at one step. No torch here.

A *segment* is a run of blocks with one decision: the whole network, or (double first-block cache) the joint blocks and
the single blocks. Per segment and sample the decision sees the distance between what the segment's first block adds to
its stream now and what it added at the last computed step: mean|previous - current| / mean|previous|.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Self

from nunchaku_cache.schedule import MAX_ORDER, Schedule


@dataclass(frozen=True)
class Rule:
    """The numbers by which one segment is decided. See `FirstBlockCache` for their meaning."""

    threshold: float
    warmup_steps: int = 0
    final_steps: int = 0
    max_consecutive_hits: int | None = None
    accumulate: bool = False
    schedule: tuple[bool | float, ...] | None = None


@dataclass
class Progress:
    """What is remembered of one sample in one segment.

    Attributes:
        step: steps seen in this call.
        has_residual: a step was computed, so that there is something to reuse.
        consecutive_hits: since the last computed step.
        error: sum of the distances of those hits.
    """

    step: int = 0
    has_residual: bool = False
    consecutive_hits: int = 0
    error: float = 0.0

    def advance(self, hit: bool, distance: float | None) -> None:
        """Take note of a decision."""
        self.step += 1
        if hit:
            self.consecutive_hits += 1
            self.error += distance or 0.0
        else:
            self.has_residual = True
            self.consecutive_hits = 0
            self.error = 0.0


def is_hit(rule: Rule, progress: Progress, distance: float | None, total_steps: int | None) -> bool:
    """Whether the segment is skipped for this sample at this step.

    Args:
        rule: of the segment.
        progress: of the sample, before this step.
        distance: see the module; None or NaN where it is not known, which never allows a hit by distance.
        total_steps: of this call; needed for `final_steps` only.

    Raises:
        ValueError: `final_steps` without `total_steps`.
    """
    step = progress.step
    if not progress.has_residual or step < rule.warmup_steps:
        return False
    if rule.final_steps:
        if total_steps is None:
            raise ValueError(
                f"final_steps={rule.final_steps}: the number of steps is not known; pass `num_steps` to the policy, or "
                "apply the cache to the pipeline"
            )
        if step >= total_steps - rule.final_steps:
            return False
    if rule.max_consecutive_hits is not None and progress.consecutive_hits >= rule.max_consecutive_hits:
        return False
    threshold = rule.threshold
    if rule.schedule is not None:
        entry = rule.schedule[step] if step < len(rule.schedule) else False
        if isinstance(entry, bool):
            return entry
        threshold = entry
    if distance is None:
        return False
    # NaN compares false
    return (progress.error + distance if rule.accumulate else distance) < threshold


@dataclass(frozen=True)
class FirstBlockCache:
    """Run the first block; skip all others where what it adds has changed little since the last computed step.

    Attributes:
        threshold: skip below this distance (strictly: 0 never skips). A negative one switches the cache off.
        warmup_steps: steps at the beginning that are always computed. The first one always is.
        final_steps: steps at the end that are always computed.
        max_consecutive_hits: after so many skipped steps one is computed; None: no limit.
        accumulate: compare the sum of distances over the skipped steps in a row, this one included, instead of this
            one's: bounds the error of a row of hits.
        schedule: an entry per step: a number is that step's threshold, True skips and False computes whatever the
            distance; steps beyond its end are computed. The limits above hold all the same.
        order: what stands in for the skipped residual: 0, the last computed one; 1 or 2, a polynomial through the last
            two or three computed ones, in the timestep.
        num_steps: steps of a call, for `final_steps`, where the pipeline does not tell.
    """

    threshold: float = 0.12
    warmup_steps: int = 0
    final_steps: int = 0
    max_consecutive_hits: int | None = None
    accumulate: bool = False
    schedule: Sequence[bool | float] | None = None
    order: int = 0
    num_steps: int | None = None

    def __post_init__(self) -> None:
        check_policy(self)

    def rules(self) -> tuple[Rule, ...]:
        """One rule: all blocks are one segment."""
        return (rule_of(self, self.threshold, self.schedule),)

    def with_threshold(self, threshold: float) -> Self:
        """The same policy with another threshold."""
        return replace(self, threshold=threshold)


@dataclass(frozen=True)
class DoubleFirstBlockCache:
    """First-block caching of joint blocks and of single blocks apart: two first blocks run, two decisions fall.

    Attributes:
        threshold: of the joint blocks, see `FirstBlockCache`. A negative one switches the cache off.
        single_threshold: of the single blocks; a negative one computes them always; None: as `threshold`.
        single_schedule: of the single blocks; None: as `schedule`.

    The other attributes are those of `FirstBlockCache` and hold for both.
    """

    threshold: float = 0.12
    single_threshold: float | None = None
    warmup_steps: int = 0
    final_steps: int = 0
    max_consecutive_hits: int | None = None
    accumulate: bool = False
    schedule: Sequence[bool | float] | None = None
    single_schedule: Sequence[bool | float] | None = None
    order: int = 0
    num_steps: int | None = None

    def __post_init__(self) -> None:
        check_policy(self)

    def rules(self) -> tuple[Rule, ...]:
        """Two rules: joint blocks, single blocks."""
        single = self.threshold if self.single_threshold is None else self.single_threshold
        schedule = self.schedule if self.single_schedule is None else self.single_schedule
        return rule_of(self, self.threshold, self.schedule), rule_of(self, single, schedule)

    def with_threshold(self, threshold: float) -> Self:
        """The same policy with another threshold of the joint blocks."""
        return replace(self, threshold=threshold)


@dataclass(frozen=True)
class TeaCache:
    """TeaCache: skip all blocks by how far the modulated input of the first one has moved, summed since the last
    computed step (spec/surface.md 4.5). Distances are between neighbouring steps, and pass through a polynomial that
    was fitted per model.

    Attributes:
        threshold: skip while the sum is below; a negative one switches the cache off.
        coefficients: of the polynomial, highest power first; None: those of the model, where known.
        num_steps: of a call, where the pipeline does not tell: its last step is always computed.
        warmup_steps, final_steps, max_consecutive_hits, order: see `FirstBlockCache`.
    """

    threshold: float = 0.6
    coefficients: Sequence[float] | None = None
    num_steps: int | None = None
    warmup_steps: int = 0
    final_steps: int = 1
    max_consecutive_hits: int | None = None
    order: int = 0

    def __post_init__(self) -> None:
        check_policy(self)
        if self.coefficients is not None:
            found = tuple(float(value) for value in self.coefficients)
            if not found or not all(map(math.isfinite, found)):
                raise ValueError(f"coefficients: expected at least one finite number, got {self.coefficients!r}")
            object.__setattr__(self, "coefficients", found)

    def rules(self) -> tuple[Rule, ...]:
        """One rule: all blocks are one segment."""
        rule = Rule(self.threshold, self.warmup_steps, self.final_steps, self.max_consecutive_hits, accumulate=True)
        return (rule,)

    def with_threshold(self, threshold: float) -> Self:
        """The same policy with another threshold."""
        return replace(self, threshold=threshold)


@dataclass(frozen=True)
class ScheduledCache:
    """Skip the whole transformer at steps that were chosen beforehand, and forecast its output as was found best for
    each. Nothing is measured, no block runs. For one model and one number of steps: other calls are computed whole.

    Attributes:
        schedule: from `find_schedule`; None: every step is computed, for `handle.record`.
        num_steps: steps of a call, where the pipeline does not tell.
    """

    schedule: Schedule | None = None
    num_steps: int | None = None

    def __post_init__(self) -> None:
        if self.schedule is not None and not isinstance(self.schedule, Schedule):
            raise TypeError(f"schedule: expected a Schedule or None, got {type(self.schedule).__name__}")
        if self.num_steps is not None:
            _integer("num_steps", self.num_steps, 1)

    @property
    def order(self) -> int:
        """Of the forecast: how many computed outputs it looks at, but for the last."""
        return 0 if self.schedule is None else max(1, *map(len, self.schedule.damping)) - 1


ThresholdPolicy = FirstBlockCache | DoubleFirstBlockCache | TeaCache
Policy = ThresholdPolicy | ScheduledCache


def rule_of(
    policy: FirstBlockCache | DoubleFirstBlockCache, threshold: float, schedule: Sequence[bool | float] | None
) -> Rule:
    """The rule of a segment with its own threshold and schedule."""
    return Rule(
        threshold,
        policy.warmup_steps,
        policy.final_steps,
        policy.max_consecutive_hits,
        policy.accumulate,
        None if schedule is None else tuple(schedule),
    )


def check_policy(policy: "ThresholdPolicy") -> None:
    """Check what policies have in common, and turn schedules into tuples.

    Raises:
        TypeError: a value of another type.
        ValueError: a value out of range; the message names it.
    """
    for field in fields(policy):
        name, value = field.name, getattr(policy, field.name)
        if name in ("threshold", "single_threshold"):
            if value is None and name == "single_threshold":
                continue
            object.__setattr__(policy, name, _threshold(name, value))
        elif name in ("warmup_steps", "final_steps"):
            _integer(name, value, 0)
        elif name in ("max_consecutive_hits", "num_steps"):
            if value is not None:
                _integer(name, value, 0 if name == "max_consecutive_hits" else 1)
        elif name == "accumulate":
            if not isinstance(value, bool):
                raise TypeError(f"accumulate: expected True or False, got {value!r}")
        elif name == "order":
            _integer(name, value, 0)
            if value > MAX_ORDER:
                raise ValueError(f"order: expected 0 to {MAX_ORDER}, got {value}")
        elif name in ("schedule", "single_schedule") and value is not None:
            entries = tuple(
                entry if isinstance(entry, bool) else _threshold(f"{name}[{i}]", entry) for i, entry in enumerate(value)
            )
            object.__setattr__(policy, name, entries)


def _threshold(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name}: expected a number, got {value!r}")
    if math.isnan(value):
        raise ValueError(f"{name}: expected a number, got NaN")
    return float(value)


def _integer(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an integer, got {value!r}")
    if value < least:
        raise ValueError(f"{name}: expected at least {least}, got {value}")
