"""`nunchaku bench WHAT`: measure this machine, and the quantiser.

Other packages add benchmarks of their own through the entry-point group `nunchaku.bench`: a function that takes the
argparse sub-parser collection of `bench`, adds its parser and sets `run` to a function of the parsed arguments.
"""

import argparse
import contextlib
import json
import re
import time
from typing import Any

from nunchaku_models.cli.plugins import add_plugins

ENTRY_POINTS = "nunchaku.bench"

DESCRIPTION = """\
Measure, and say what against: ratios above 1 are better than the named baseline; rows where we lose are printed too.

  nunchaku bench linear
  nunchaku bench quantizer --shape 3072x3072 --json
"""

LINEAR = """\
Measure 4-bit operators on this machine against torch's own, in one process, taking turns.

On a GPU each row is timed twice: "sustained", back to back at the power limit, and "burst", one call on a rested GPU;
rivals are torch in bf16 and fp8; the default shapes are those of FLUX and T5, and take about two minutes.

  nunchaku bench linear
  nunchaku bench linear --tokens 1 512 --shape 3072x9216 --isa avx2 avx512vnni --json
  nunchaku bench linear --device cuda --json
"""

QUANTIZER = """\
What each step of quantising a layer buys: output error on tokens that were not calibrated on, from round-to-nearest
through published SVDQuant to our calibrated quantiser, and parts of ours left out. Layers and tokens are made up from a
seed; a shape with K > N is taken for a down-projection behind a GELU. A 3072x3072 layer takes minutes on two cores; the
default shapes, FLUX's, are for a GPU.

  nunchaku bench quantizer --quick
  nunchaku bench quantizer --shape 3072x3072 --json
  nunchaku bench quantizer --device cuda --precision nvfp4
"""


def register(subparsers: Any) -> None:
    """Add the command's parsers."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = subparsers.add_parser("bench", help="measure this machine", description=DESCRIPTION, formatter_class=raw)
    kinds = parser.add_subparsers(title="what to measure", metavar="<what>", required=True)

    linear = kinds.add_parser("linear", help="one layer", description=LINEAR, formatter_class=raw)
    linear.add_argument("--device", default="cpu", help="torch device (cpu)")
    linear.add_argument("--tokens", type=int, nargs="+", metavar="M", help="rows of x (1 16 96 512; on a GPU 4608)")
    linear.add_argument(
        "--shape", nargs="+", metavar="KxN", help="input x output channels (3072x9216; on a GPU FLUX's, and T5's)"
    )
    linear.add_argument(
        "--isa", nargs="+", help="instruction sets to force (default: the best; on a GPU also every other kernel set)"
    )
    linear.add_argument(
        "--seconds", type=float, help="measuring time per shape and M (2; on a GPU per rival and round, 0.12)"
    )
    linear.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    linear.add_argument("--clock", choices=["elapsed", "cpu"], help="cpu: processor time, for a busy machine (elapsed)")
    linear.set_defaults(run=run_linear)

    quantizer = kinds.add_parser(
        "quantizer", help="the steps of quantising a layer", description=QUANTIZER, formatter_class=raw
    )
    quantizer.add_argument("--shape", nargs="+", metavar="KxN", help="input x output channels (default: FLUX's)")
    quantizer.add_argument("--quick", action="store_true", help="two small shapes")
    quantizer.add_argument("--precision", choices=["int4", "nvfp4"], default="int4", help="of the weights (int4)")
    quantizer.add_argument(
        "--arithmetic",
        choices=["w4a4", "w4a8", "nvfp4", "w4a16"],
        help="how activations are quantised (w4a4, nvfp4 with nvfp4 weights)",
    )
    quantizer.add_argument(
        "--tokens", type=int, metavar="M", help="tokens to calibrate on (default: 4 per input channel, at most 16384)"
    )
    quantizer.add_argument("--device", default="cpu", help="torch device (cpu)")
    quantizer.add_argument("--seed", type=int, default=0, help="seed of layers and tokens (0)")
    quantizer.set_defaults(run=run_quantizer)

    add_plugins(ENTRY_POINTS, kinds, "benchmark")
    for kind in kinds.choices.values():
        with contextlib.suppress(argparse.ArgumentError):  # a plug-in may have its own
            kind.add_argument("--json", action="store_true", help="print one JSON object")
        # as the command line's own, which stands before or after a command
        with contextlib.suppress(argparse.ArgumentError):
            kind.add_argument("--verbose", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)


def run_linear(args: argparse.Namespace) -> int:
    """Measure and print."""
    shapes = [parse_shape(text) for text in args.shape or []]
    if min(args.tokens or [1]) < 1 or (args.threads is not None and args.threads < 1):
        raise ValueError("--tokens and --threads must be at least 1")
    if args.seconds is not None and not args.seconds > 0:
        raise ValueError(f"--seconds must be above 0, got {args.seconds}")

    import torch

    if torch.device(args.device).type != "cpu":
        return _run_linear_cuda(args, shapes)
    from nunchaku_kernels.bench.linear import bench_linear

    if args.threads is not None:
        torch.set_num_threads(args.threads)
    rows = bench_linear(
        args.tokens or [1, 16, 96, 512],
        shapes or [(3072, 9216)],
        isas=args.isa or [],
        seconds=args.seconds or 2.0,
        clock=time.process_time if args.clock == "cpu" else time.perf_counter,
    )
    return _print(rows, args.json)


def _run_linear_cuda(args: argparse.Namespace, shapes: list[tuple[int, int]]) -> int:
    """Measure, with progress on stderr, and print."""
    if args.threads is not None or args.clock is not None:
        raise ValueError("--threads and --clock are for the CPU; a GPU times itself")

    from tqdm import tqdm

    from nunchaku_kernels.bench.linear_cuda import SECONDS, SHAPES, TOKENS, WEIGHT_ONLY, bench_linear_cuda

    with tqdm(unit="layer", delay=1) as bar:

        def on_step(name: str) -> None:
            bar.set_description(name)
            bar.update()

        rows = bench_linear_cuda(
            args.tokens or TOKENS,
            shapes or SHAPES,
            weight_only=() if args.tokens or shapes else WEIGHT_ONLY,
            isas=args.isa,
            seconds=args.seconds or SECONDS,
            device=args.device,
            on_step=on_step,
        )
        return _print(rows, args.json)


def run_quantizer(args: argparse.Namespace) -> int:
    """Measure, with progress on stderr, and print."""
    if args.quick and args.shape:
        raise ValueError("--quick and --shape exclude each other")
    named = [parse_shape(text) for text in args.shape or []]

    from tqdm import tqdm

    from nunchaku_kernels.bench.quantizer import QUICK_SHAPES, SHAPES, STEPS, bench_quantizer

    shapes = named or (QUICK_SHAPES if args.quick else SHAPES)
    with tqdm(total=len(shapes) * len(STEPS), unit="step") as bar:

        def on_step(name: str) -> None:
            bar.set_description(name)
            bar.update()

        rows = bench_quantizer(
            shapes,
            precision=args.precision,
            arithmetic=args.arithmetic,
            tokens=args.tokens,
            seed=args.seed,
            device=args.device,
            on_step=on_step,
        )
        return _print(rows, args.json)


def _print(rows: Any, as_json: bool) -> int:
    from nunchaku_kernels.bench import report, table

    measured = list(rows)
    print(json.dumps(report(measured), indent=2) if as_json else table(measured))
    return 0


def parse_shape(text: str) -> tuple[int, int]:
    """ "3072x9216" -> (K, N).

    Raises:
        ValueError: anything else.
    """
    match = re.fullmatch(r"(\d{1,6})x(\d{1,6})", text)
    if match is None:
        raise ValueError(f"--shape must be KxN, e.g. 3072x9216; got {text!r}")
    return int(match[1]), int(match[2])
