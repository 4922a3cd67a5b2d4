"""What a sweep has found so far, in a file that an interruption leaves whole."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from nunchaku_cache.bench.measure import Conditions
from nunchaku_cache.bench.sweep import Failure, Point, compare
from nunchaku_kernels.bench import report


@dataclass
class Results:
    """Points and failures of one or more dtypes and numbers of steps."""

    conditions: Conditions
    points: list[Point] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)

    def missing(self, dtypes: Sequence[str], steps: Sequence[int]) -> list[tuple[str, int]]:
        """Those (dtype, steps) that have not been measured."""
        measured = {(point.dtype, point.steps) for point in self.points}
        asked = [(dtype, count) for dtype in dict.fromkeys(dtypes) for count in dict.fromkeys(steps)]
        return [pair for pair in asked if pair not in measured]

    def save(self, file: Path) -> None:
        """Write `{"machine", "commit", "rows", "conditions", "points", "failures"}` as JSON; atomic."""
        found = {**report(list(compare(self.points))), **asdict(self)}
        scratch = file.with_name(f".{file.name}.tmp")
        scratch.write_text(json.dumps(found, indent=1) + "\n")
        scratch.replace(file)

    @classmethod
    def load(cls, file: Path) -> "Results":
        """What `save` wrote.

        Raises:
            ValueError: the file has another content.
        """
        try:
            found = json.loads(file.read_text())
            return cls(
                Conditions(**found["conditions"]),
                [Point(**point) for point in found["points"]],
                [Failure(**failure) for failure in found["failures"]],
            )
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file} does not hold results of this benchmark: {error}") from error
