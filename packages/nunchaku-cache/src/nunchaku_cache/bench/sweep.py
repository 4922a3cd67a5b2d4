"""Every setting of every method on one model, and what is best at a speed."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from nunchaku_cache.bench.measure import Bench, Demo
from nunchaku_cache.bench.settings import OURS, our_settings, rival_settings

SPEEDS = (1.5, 2.0, 2.5, 3.0)
"""At which methods are compared."""


@dataclass(frozen=True)
class Point:
    """One setting, measured.

    Attributes:
        steps: of a call.
        method, name: of the setting.
        speed: how many times fewer block FLOPs than without a cache.
        wall: how many times less time.
        psnr, ssim: to the uncached pictures, mean; dB, and 0 to 1.
    """

    steps: int
    method: str
    name: str
    speed: float
    wall: float
    psnr: float
    ssim: float


@dataclass(frozen=True)
class Failure:
    """A setting that raised an error."""

    steps: int
    method: str
    name: str
    error: str


def sweep(
    demo: Demo, *, steps: int, batch: int, device: str, rounds: int, on_setting: Callable[[str, int], None]
) -> Iterator[Point | Failure]:
    """Measure all settings at one number of steps.

    Args:
        demo: the model.
        steps: of a call.
        batch: pictures per call.
        device: torch device.
        rounds: how often everything is drawn; the fastest counts.
        on_setting: called with a setting's name and how many there are, before it is measured.
    """
    bench = Bench(demo, steps=steps, batch=batch, device=device, rounds=rounds)
    settings = [*our_settings(bench), *rival_settings(bench)]
    for setting in settings:
        on_setting(f"{steps} steps: {setting.method}, {setting.name}", len(settings))
        try:
            drawn = bench.draw(setting.enable)
        except Exception as error:  # a rival's error must not end the others' measurement
            if setting.method in OURS:
                raise
            yield Failure(steps, setting.method, setting.name, f"{type(error).__name__}: {error}"[:200])
            continue
        psnr, ssim = bench.quality(drawn)
        speed, wall = bench.plain.flops / max(1.0, drawn.flops), bench.plain.seconds / drawn.seconds
        yield Point(steps, setting.method, setting.name, speed, wall, psnr, ssim)


def front(points: Sequence[Point]) -> list[Point]:
    """Those that no other one beats in both speed and PSNR, by speed."""
    best: list[Point] = []
    for point in sorted(points, key=lambda p: (-p.speed, -p.psnr)):
        if not best or point.psnr > best[-1].psnr:
            best.append(point)
    return best[::-1]


def psnr_at(points: Sequence[Point], speed: float) -> float | None:
    """PSNR on the front at a speed, interpolated linearly; None beyond its fast end."""
    line = front(points)
    faster = [p for p in line if p.speed >= speed]
    if not faster:
        return None
    after = faster[0]
    before = [p for p in line if p.speed < speed]
    if not before:
        return after.psnr
    share = (speed - before[-1].speed) / (after.speed - before[-1].speed)
    return before[-1].psnr + share * (after.psnr - before[-1].psnr)


def compare(points: Sequence[Point]) -> list[dict[str, Any]]:
    """Rows for a report: at each speed our best method against the best rival."""
    rows = []
    for steps in sorted({point.steps for point in points}):
        by_method: dict[str, list[Point]] = {}
        for point in points:
            if point.steps == steps:
                by_method.setdefault(point.method, []).append(point)
        for speed in SPEEDS:
            at = {method: psnr_at(found, speed) for method, found in by_method.items()}
            ours = max(((v, m) for m, v in at.items() if m in OURS and v is not None), default=None)
            rival = max(((v, m) for m, v in at.items() if m not in OURS and v is not None), default=None)
            if ours is None:
                continue
            rows.append(
                {
                    "name": f"cache/{steps} steps/{speed:g}x/{ours[1]}",
                    "value": ours[0],
                    "unit": "dB",
                    "baseline": None if rival is None else rival[1],
                    "ratio": None if rival is None else ours[0] / rival[0],
                    "baseline value": None if rival is None else rival[0],
                }
            )
    return rows
