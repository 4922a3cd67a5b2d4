"""Every setting of every method on one model, and what is best at a speed."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch

from nunchaku_cache.bench.measure import Bench, Conditions, Demo, full_float32
from nunchaku_cache.bench.settings import OURS, RIVALS, Setting
from nunchaku_kernels.bench import Row

SPEEDS = (1.5, 2.0, 2.5, 3.0)
"""At which methods are compared."""
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}

T = TypeVar("T")
Speed = Literal["speed", "wall"]
Psnr = Literal["psnr", "unrounded"]


@dataclass(frozen=True)
class Point:
    """One setting, measured.

    Attributes:
        dtype: of the model, by name.
        steps: of a call.
        method, name: of the setting.
        speed: how many times fewer block FLOPs than without a cache.
        wall: how many times less time.
        psnr, worst, unrounded, ssim: see `Quality`.
    """

    dtype: str
    steps: int
    method: str
    name: str
    speed: float
    wall: float
    psnr: float
    worst: float
    unrounded: float
    ssim: float


@dataclass(frozen=True)
class Failure:
    """A setting that raised an error, or, without a name, all settings of a method."""

    dtype: str
    steps: int
    method: str
    name: str
    error: str


def sweep(
    demo: Demo,
    *,
    dtype: str,
    steps: int,
    conditions: Conditions,
    on_setting: Callable[[str, int], None] = lambda name, total: None,
) -> Iterator[Point | Failure]:
    """Measure all settings with one dtype and number of steps.

    Args:
        demo: the model.
        dtype: a name of `DTYPES`.
        steps: of a call.
        conditions: see there.
        on_setting: called before a setting is measured with its name and how many settings there are.

    Raises:
        Exception: what a method of ours raises; a rival's error becomes a `Failure`.
    """
    with full_float32():
        bench = Bench(demo, dtype=DTYPES[dtype], steps=steps, conditions=conditions)
        settings: list[tuple[str, Setting]] = []
        for method, listed in {**OURS, **RIVALS}.items():
            try:
                settings += [(method, setting) for setting in spread(list(listed(bench)), conditions.settings)]
            except Exception as error:
                yield _failure(error, dtype, steps, method, "")
        for method, setting in settings:
            on_setting(f"{dtype}, {steps} steps, {method}: {setting.name}", len(settings))
            try:
                drawn = bench.draw(setting.enable)
            except Exception as error:
                yield _failure(error, dtype, steps, method, setting.name)
                continue
            speed, wall = bench.plain.flops / max(1.0, drawn.flops), bench.plain.seconds / drawn.seconds
            yield Point(dtype, steps, method, setting.name, speed, wall, **bench.quality(drawn)._asdict())


def _failure(error: Exception, dtype: str, steps: int, method: str, name: str) -> Failure:
    """A rival's error, which must not end the others' measurement; ours is raised."""
    if method in OURS:
        raise error
    return Failure(dtype, steps, method, name, f"{type(error).__name__}: {error}"[:200])


def spread(items: Sequence[T], most: int | None) -> list[T]:
    """At most so many, at equal distances from the first to the last."""
    if most is None or len(items) <= most:
        return list(items)
    if most == 1:
        return [items[len(items) // 2]]
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def front(points: Sequence[Point], speed: Speed = "speed", psnr: Psnr = "psnr") -> list[tuple[float, float]]:
    """(speed, PSNR) of the points that no other one reaches in both, by speed.

    Settings that skip nothing are left out: an interpolation from there would be of nothing that was measured.
    """
    best: list[tuple[float, float]] = []
    skipping = {(getattr(point, speed), getattr(point, psnr)) for point in points if point.speed > 1}
    for found in sorted(skipping, reverse=True):
        if not best or found[1] > best[-1][1]:
            best.append(found)
    return best[::-1]


def psnr_at(line: Sequence[tuple[float, float]], speed: float) -> float | None:
    """PSNR on a front at a speed, interpolated linearly; None beyond its fast end."""
    after = next((i for i, (reached, _) in enumerate(line) if reached >= speed), None)
    if after is None:
        return None
    if after == 0:
        return line[0][1]
    (slow, high), (fast, low) = line[after - 1], line[after]
    return high + (speed - slow) / (fast - slow) * (low - high)


def compare(points: Sequence[Point]) -> Iterator[Row]:
    """PSNR of each of our methods at each speed, against that of the rival that is best there.

    At equal block FLOPs, before rounding to 8 bits too ("/unrounded"), and at equal time ("x-time"). The ratio is that
    of mean squared errors: 1 dB more is 1.26.
    """
    kinds: tuple[tuple[Speed, Psnr, str, str], ...] = (
        ("speed", "psnr", "x", ""),
        ("speed", "unrounded", "x", "/unrounded"),
        ("wall", "psnr", "x-time", ""),
    )
    for dtype, steps in dict.fromkeys((point.dtype, point.steps) for point in points):
        here = [point for point in points if (point.dtype, point.steps) == (dtype, steps)]
        for axis, psnr, unit, suffix in kinds:
            fronts = {
                method: front([point for point in here if point.method == method], axis, psnr)
                for method in (*OURS, *RIVALS)
            }
            for speed in SPEEDS:
                at = {method: found for method, line in fronts.items() if (found := psnr_at(line, speed)) is not None}
                rival = max((method for method in RIVALS if method in at), key=at.__getitem__, default=None)
                for method in OURS:
                    if method not in at:
                        continue
                    yield Row(
                        f"cache/{dtype}/steps{steps}/{speed:g}{unit}/{method}{suffix}",
                        at[method],
                        "dB",
                        None if rival is None else f"{rival}: {at[rival]:.2f} dB",
                        None if rival is None else 10 ** ((at[method] - at[rival]) / 10),
                    )
