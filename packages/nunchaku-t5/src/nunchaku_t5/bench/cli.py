"""`nunchaku bench t5`."""

import argparse
import json
import time
from typing import Any

DESCRIPTION = """\
One block of a T5 encoder with random weights: time and bytes in 4 bits, against torch in bf16 and, where it is
installed, bitsandbytes NF4, in one process, taking turns. XXL blocks take 2 GB of memory.

  nunchaku bench t5
  nunchaku bench t5 --tokens 128 --clock cpu --json
"""


def register(kinds: Any) -> None:
    """Add `t5` to what `nunchaku bench` measures (entry-point group `nunchaku.bench`)."""
    parser = kinds.add_parser(
        "t5",
        help="a block of a T5 text encoder",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--tokens", type=int, nargs="+", metavar="M", help="text lengths (16 77 128 256 512)")
    parser.add_argument("--size", default="xxl", help="xxl, xl or large (xxl)")
    parser.add_argument("--device", default="cpu", help="torch device (cpu)")
    parser.add_argument("--seconds", type=float, default=5.0, help="measuring time per length (5)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    parser.add_argument("--clock", choices=["elapsed", "cpu"], help="cpu: processor time, for a busy machine (elapsed)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measure, with progress on stderr, and print."""
    if not args.seconds > 0 or (args.threads is not None and args.threads < 1):
        raise ValueError("--seconds must be above 0, --threads at least 1")

    import torch
    from tqdm import tqdm

    from nunchaku_kernels.bench import report, table
    from nunchaku_t5.bench.block import TOKENS, bench_t5

    if args.threads is not None:
        torch.set_num_threads(args.threads)
    with tqdm(unit="step", delay=1) as bar:

        def on_step(name: str) -> None:
            bar.set_description(name)
            bar.update()

        rows = list(
            bench_t5(
                args.tokens or TOKENS,
                size=args.size,
                seconds=args.seconds,
                clock=time.process_time if args.clock == "cpu" else time.perf_counter,
                device=args.device,
                on_step=on_step,
            )
        )
    print(json.dumps(report(rows), indent=2) if args.json else table(rows))
    return 0
