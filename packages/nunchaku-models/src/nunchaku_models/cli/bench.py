"""`nunchaku bench WHAT`: measure this machine."""

import argparse
import json
import re
import time
from typing import Any

DESCRIPTION = """\
Measure 4-bit operators on this machine against torch's own, in one process, taking turns. Ratios above 1 are better
than the named baseline; rows where we lose are printed too.

  nunchaku bench linear
  nunchaku bench linear --tokens 1 512 --shape 3072x9216 --isa avx2 avx512vnni --json
"""


def register(subparsers: Any) -> None:
    """Add the command's parser."""
    parser = subparsers.add_parser(
        "bench",
        help="measure this machine",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("what", choices=["linear"], help="linear: one layer, CPU")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 96, 512], metavar="M", help="rows of x")
    parser.add_argument("--shape", nargs="+", default=["3072x9216"], metavar="KxN", help="input x output channels")
    parser.add_argument("--isa", nargs="+", default=[], help="instruction sets to force (default: the best)")
    parser.add_argument("--threads", type=int, help="threads (default: torch's choice)")
    parser.add_argument("--seconds", type=float, default=2.0, help="measuring time per shape and M (2)")
    parser.add_argument(
        "--clock", choices=["elapsed", "cpu"], default="elapsed", help="cpu: processor time, for a busy machine"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measure and print."""
    shapes = [parse_shape(text) for text in args.shape]
    if min(args.tokens) < 1 or (args.threads is not None and args.threads < 1):
        raise ValueError("--tokens and --threads must be at least 1")

    import torch

    from nunchaku_kernels.bench import report, table
    from nunchaku_kernels.bench.linear import bench_linear

    if args.threads is not None:
        torch.set_num_threads(args.threads)
    clock = time.process_time if args.clock == "cpu" else time.perf_counter
    rows = list(bench_linear(args.tokens, shapes, isas=args.isa, seconds=args.seconds, clock=clock))
    print(json.dumps(report(rows), indent=2) if args.json else table(rows))
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
