"""`nunchaku bench cache`: every cache on a model, ours and the rivals', over all settings that matter."""

import argparse
import contextlib
import importlib.util
import json
import sys
from collections.abc import Sequence
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nunchaku_cache.bench.measure import Demo
    from nunchaku_cache.bench.results import Results

DESCRIPTION = """\
What caches cost a model's pictures, and what they save: PSNR and SSIM to the uncached pictures against block FLOPs and
time, for our policies, for the caches of diffusers and for cache-dit (where installed), each over many settings. Rows
compare each of our policies with the rival that is best at the same speed; a ratio is one of squared errors.

In bfloat16 the rounding of activations bounds every method (near 58 dB on the demo); float32 shows the error of the
caches alone, best in pictures that are not rounded to 8 bits. Times are those of whole calls, text encoders included:
they say something on an idle machine, with --rounds.

  nunchaku bench cache --quick
  nunchaku bench cache --dtype bfloat16 float32 --device cuda --output sweep.json --plot sweep.png

The whole sweep is for a GPU: 188 settings for each dtype and number of steps, hours on two cores. --output is written
after each of those; --resume takes up what was interrupted, and draws a plot of what is there.
"""

DEMOS = "nunchaku.demo"
"""Entry-point group of models to measure on, see `nunchaku_cache.bench.measure.Demo`; nunchaku-models has one."""

FULL = {"prompts": 12, "calibration": 16, "settings": None, "batch": 16, "rounds": 1, "device": "cpu"}
QUICK = {**FULL, "prompts": 2, "calibration": 2, "settings": 3}
STEPS, QUICK_STEPS = (20, 28, 50), (8,)
OPTIONS = ("prompts", "settings", "batch", "rounds", "device")
"""Conditions that the command line sets."""


def register(kinds: Any) -> None:
    """Add `cache` to what `nunchaku bench` measures (entry-point group `nunchaku.bench`)."""
    raw = argparse.RawDescriptionHelpFormatter
    add_arguments(kinds.add_parser("cache", help="caches", description=DESCRIPTION, formatter_class=raw))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options, and `run`."""
    parser.add_argument("--quick", action="store_true", help="8 steps, 2 prompts, 3 settings per method: a minute")
    parser.add_argument("--steps", type=int, nargs="+", metavar="N", help="denoising steps (20 28 50)")
    parser.add_argument(
        "--dtype", nargs="+", choices=["bfloat16", "float32"], default=["bfloat16"], help="of the model (bfloat16)"
    )
    parser.add_argument("--prompts", type=int, metavar="N", help="pictures per setting (12)")
    parser.add_argument("--settings", type=int, metavar="N", help="at most so many per method (all)")
    parser.add_argument("--batch", type=int, metavar="N", help="pictures per call (16)")
    parser.add_argument("--rounds", type=int, metavar="N", help="how often all is drawn; the fastest counts (1)")
    parser.add_argument("--device", help="torch device (cpu)")
    parser.add_argument("--demo", metavar="MODULE", help="what to measure on, a Python module (nunchaku-models' demo)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="JSON file for rows, all points and failures")
    parser.add_argument("--resume", action="store_true", help="measure only what --output lacks, under its conditions")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw PSNR against speed (needs matplotlib)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measure what is missing, with progress on stderr, write and print."""
    steps = args.steps or (QUICK_STEPS if args.quick else STEPS)
    _check(args, steps)

    from nunchaku_cache.bench.sweep import compare
    from nunchaku_kernels.bench import report, table

    results = _results(args)
    missing = results.missing(args.dtype, steps)
    if missing:
        _measure(find_demo(args.demo), results, missing, args.output)
    for failure in results.failures:
        print(f"not measured: {failure.method}, {failure.name or 'all'}: {failure.error}", file=sys.stderr)
    if args.plot:
        from nunchaku_cache.bench.plot import draw

        draw(results.points, args.plot)
    rows = list(compare(results.points))
    print(json.dumps(report(rows), indent=2) if args.json else table(rows))
    return 0


def _check(args: argparse.Namespace, steps: Sequence[int]) -> None:
    """Whatever would be a pity to learn after the measurement."""
    if min(steps) < 4:
        raise ValueError(f"--steps must be at least 4, got {min(steps)}")
    for name in ("prompts", "settings", "batch", "rounds"):
        given = getattr(args, name)
        if given is not None and given < 1:
            raise ValueError(f"--{name} must be at least 1, got {given}")
    if args.resume and not args.output:
        raise ValueError("--resume needs --output, the file with what was measured before")
    for file in (args.output, args.plot):
        if file is not None and not file.resolve().parent.is_dir():
            raise ValueError(f"{file}: the folder {file.resolve().parent} does not exist")
    if args.plot and args.plot.suffix != ".png":
        raise ValueError(f"--plot: the name must end in .png, got {args.plot}")
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--plot needs matplotlib; install nunchaku-cache[bench]")


def _results(args: argparse.Namespace) -> "Results":
    """Empty ones, or those of the file that is resumed."""
    from nunchaku_cache.bench.measure import Conditions
    from nunchaku_cache.bench.results import Results

    given = {name: getattr(args, name) for name in OPTIONS if getattr(args, name) is not None}
    if not (args.resume and args.output.exists()):
        return Results(Conditions(**{**(QUICK if args.quick else FULL), **given}))
    results = Results.load(args.output)
    for name, value in given.items():
        before = getattr(results.conditions, name)
        if value != before:
            raise ValueError(f"{args.output} was measured with --{name} {before}; it cannot be resumed with {value}")
    return results


def _measure(demo: "Demo", results: "Results", missing: Sequence[tuple[str, int]], output: Path | None) -> None:
    """Add to the results, and write them after each dtype and number of steps."""
    from tqdm import tqdm

    from nunchaku_cache.bench.sweep import Point, sweep

    for dtype, steps in missing:
        with tqdm(desc=f"{dtype}, {steps} steps", unit="setting", mininterval=1) as bar:

            def on_setting(name: str, total: int, bar: Any = bar) -> None:
                bar.total = total
                bar.set_postfix_str(name, refresh=False)
                bar.update()

            with contextlib.redirect_stdout(sys.stderr):  # rivals print
                found = list(
                    sweep(demo, dtype=dtype, steps=steps, conditions=results.conditions, on_setting=on_setting)
                )
        for one in found:
            if isinstance(one, Point):
                results.points.append(one)
            else:
                results.failures.append(one)
        if output:
            results.save(output)


def find_demo(name: str | None) -> "Demo":
    """The model to measure on.

    Args:
        name: "package.module" or "package.module:object"; None for the one that an installed package publishes.

    Raises:
        ValueError: there is none, or more than one.
        ImportError, AttributeError: the name leads nowhere.
    """
    if name is not None:
        found = [EntryPoint("demo", name, DEMOS)]
    else:
        found = list(entry_points(group=DEMOS))
    if len(found) != 1:
        names = ", ".join(entry.value for entry in found)
        raise ValueError(
            f"several models to measure on: {names}; name one with --demo"
            if found
            else "no model to measure on: install nunchaku-models, or name a module with --demo"
        )
    demo: Demo = found[0].load()
    return demo


def main(argv: Sequence[str] | None = None) -> int:
    """The benchmark as a program of its own; 0, or 2 where an argument or what is installed is not as it should be."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m nunchaku_cache.bench", description=DESCRIPTION, formatter_class=raw)
    add_arguments(parser)
    args = parser.parse_args(argv)
    try:
        return run(args)
    except (ValueError, OSError, ImportError, AttributeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
