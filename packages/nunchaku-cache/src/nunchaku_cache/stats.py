"""What the cache did: one record per step, branch and segment."""

import threading
from collections import deque
from dataclasses import dataclass

MAX_RECORDS = 10_000


@dataclass(frozen=True)
class StepRecord:
    """One decision.

    Attributes:
        segment: "all", "joint" or "single".
        branch: name given to `cache_context`, "" without; a second one at the same timesteps has "#2" behind it.
        step: index within the call and branch.
        timestep: per sample, as the transformer got it.
        distance: per sample, None where there was nothing to compare with.
        hit: per sample, whether the blocks were skipped.
    """

    segment: str
    branch: str
    step: int
    timestep: tuple[float, ...]
    distance: tuple[float | None, ...]
    hit: tuple[bool, ...]


class Stats:
    """Hits and misses, counted per sample and segment, and the latest decisions."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.reset()

    def reset(self) -> None:
        """Count from zero."""
        with self._lock:
            self.hits = 0
            self.misses = 0
            self._records: deque[StepRecord] = deque(maxlen=MAX_RECORDS)

    def add(self, record: StepRecord) -> None:
        """Take note of a decision."""
        with self._lock:
            hits = sum(record.hit)
            self.hits += hits
            self.misses += len(record.hit) - hits
            self._records.append(record)

    @property
    def steps(self) -> tuple[StepRecord, ...]:
        """The latest decisions, oldest first, at most 10 000."""
        with self._lock:
            return tuple(self._records)

    def distances(self, segment: str | None = None, branch: str | None = None) -> list[tuple[float | None, ...]]:
        """Distance per step and sample, of one segment and branch where these are named."""
        return [
            record.distance
            for record in self.steps
            if segment in (None, record.segment) and branch in (None, record.branch)
        ]

    def hit_pattern(self, segment: str | None = None, branch: str | None = None) -> list[tuple[bool, ...]]:
        """Hit or not, per step and sample."""
        return [
            record.hit for record in self.steps if segment in (None, record.segment) and branch in (None, record.branch)
        ]

    def __repr__(self) -> str:
        total = self.hits + self.misses
        share = f" ({self.hits / total:.0%} skipped)" if total else ""
        return f"Stats(hits={self.hits}, misses={self.misses}){share}"
