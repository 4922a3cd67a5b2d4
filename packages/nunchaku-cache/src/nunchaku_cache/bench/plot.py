"""A picture of a sweep: the front of every method, PSNR against speed."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nunchaku_cache.bench.settings import OURS, RIVALS
from nunchaku_cache.bench.sweep import Point, Psnr, Speed, front

SLOWEST, FASTEST = 1.2, 4.0
"""Ends of the panels."""
LOWEST = 35.0
"""dB at the foot of the panels; what is worse is of no use to anybody."""
COLOURS = 32

ROWS: tuple[tuple[str, Speed, Psnr, str, str], ...] = (
    ("bfloat16", "speed", "psnr", "times fewer block FLOPs", "bfloat16\nPSNR, dB"),
    ("bfloat16", "wall", "psnr", "times less time", "bfloat16\nPSNR, dB"),
    ("float32", "speed", "unrounded", "times fewer block FLOPs", "float32, not rounded\nto 8 bits: PSNR, dB"),
)
"""dtype, abscissa, ordinate, and their labels."""

STYLES: dict[str, dict[str, Any]] = {
    "ours-scheduled": {"color": "#0b57d0", "linewidth": 2.6, "zorder": 5},
    "ours-first-block": {"color": "#4a90e2", "linewidth": 1.6, "zorder": 4},
    "ours-double-first-block": {"color": "#4a90e2", "linewidth": 1.6, "linestyle": (0, (2, 1)), "zorder": 4},
    "diffusers-taylorseer": {"color": "#d9480f", "linewidth": 1.3},
    "diffusers-first-block": {"color": "#d9480f", "linewidth": 1.0, "linestyle": (0, (1, 1))},
    "diffusers-magcache": {"color": "#d9480f", "linewidth": 1.0, "linestyle": (0, (4, 2))},
    "cache-dit": {"color": "#2b8a3e", "linewidth": 1.3},
}


def draw(points: Sequence[Point], file: Path) -> None:
    """Write a PNG: a column of panels per number of steps, a row per dtype and measure of speed.

    Args:
        points: of a sweep.
        file: to write.

    Raises:
        ValueError: there are no points.
    """
    from matplotlib.figure import Figure
    from PIL import Image

    if not points:
        raise ValueError(f"{file}: nothing was measured that could be drawn")
    rows = [row for row in ROWS if any(point.dtype == row[0] for point in points)]
    columns = sorted({point.steps for point in points})
    figure = Figure(figsize=(3 * max(2, len(columns)), 2.5 * len(rows) + 0.4), dpi=100, layout="constrained")
    panels = figure.subplots(len(rows), len(columns), squeeze=False, sharex=True, sharey="row")
    for panel, steps in zip(panels[0], columns, strict=True):
        panel.set_title(f"{steps} steps", fontsize=9)
    for line, (dtype, speed, psnr, below, beside) in zip(panels, rows, strict=True):
        best = 0.0
        for panel, steps in zip(line, columns, strict=True):
            here = [point for point in points if (point.dtype, point.steps) == (dtype, steps)]
            best = max(best, _panel(panel, here, speed, psnr))
            panel.set_xlabel(below, fontsize=8)
        line[0].set_xlim(SLOWEST, FASTEST)
        line[0].set_ylim(min(LOWEST, best - 1), best + 1.5)
        line[0].set_ylabel(beside, fontsize=8)
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png")
    # the few colours of a plot need no 24 bits each; by coverage, not by count, or those of thin lines get lost
    reduced = Image.open(drawn).convert("RGB").quantize(COLOURS, method=Image.Quantize.MAXCOVERAGE)
    reduced.save(file, format="PNG", optimize=True)


def _panel(panel: Any, points: Sequence[Point], speed: Speed, psnr: Psnr) -> float:
    """Draw the fronts; returns the best PSNR that is to be seen."""
    best = 0.0
    for method in (*OURS, *RIVALS):
        line = front([point for point in points if point.method == method], speed, psnr)
        best = max([best, *(y for x, y in line if SLOWEST <= x <= FASTEST)])
        style = {"marker": ".", "markersize": 4, **STYLES[method]}
        panel.plot([x for x, _ in line], [y for _, y in line], label=method, **style)
    panel.tick_params(labelsize=8)
    panel.grid(alpha=0.3)
    return best
