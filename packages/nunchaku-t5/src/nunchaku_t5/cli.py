"""`nunchaku-t5 <command>`, and the same commands as `nunchaku t5 <command>`."""

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nunchaku_t5 import __version__

DESCRIPTION = """\
4-bit T5 and UMT5 text encoders.

  nunchaku-t5 quantize my-pipeline/ -o t5-4bit/
  nunchaku-t5 quantize t5xxl_fp16.safetensors -o t5-4bit.safetensors

To draw with one: nunchaku generate PROMPT -o FILE --t5 t5-4bit/
"""

QUANTIZE = """\
Quantise the linears of a T5 or UMT5 encoder to 4 bits. Without texts no data is needed.

  nunchaku-t5 quantize my-pipeline/ -o t5-4bit/
  nunchaku-t5 quantize my-pipeline/ -o t5-4bit/ --calibrate prompts.txt
  nunchaku-t5 quantize black-forest-labs/FLUX.1-dev -o t5-4bit/
  nunchaku-t5 quantize t5xxl_fp16.safetensors -o t5-4bit.safetensors

SOURCE is a folder or hub id of an encoder, of a whole T5, or of a pipeline of diffusers that has one; or a single file
(16-bit or fp8). OUT is a folder, which the stock `T5EncoderModel.from_pretrained` loads where nunchaku_t5 is imported,
or a .safetensors file in the published layout. Nothing is overwritten but a file of that name.
"""

NEED_TEXTS = ("tokenizer", "method", "rank", "eight_bits", "device")
"""Options of `quantize` that say how to calibrate."""

BAD_INPUT = (ValueError, TypeError, OSError, RuntimeError, ImportError, MemoryError)
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130


def register(subparsers: Any) -> None:
    """Add `t5` to the commands of `nunchaku` (entry-point group `nunchaku.commands`)."""
    parser = subparsers.add_parser(
        "t5",
        help="quantise T5 text encoders",
        description=DESCRIPTION.replace("nunchaku-t5", "nunchaku t5"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_commands(parser, "nunchaku t5")


def add_commands(parser: argparse.ArgumentParser, program: str = "nunchaku-t5") -> None:
    """Add the subcommands to a parser; each sets `run`."""
    commands = parser.add_subparsers(title="commands", metavar="<command>", required=True)
    quantize = commands.add_parser(
        "quantize",
        help="4-bit weights from 16-bit ones",
        description=QUANTIZE.replace("nunchaku-t5", program),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    quantize.add_argument("source", metavar="SOURCE", help="folder, file or hub id")
    quantize.add_argument("-o", "--output", required=True, metavar="OUT", help="folder or .safetensors file to write")
    quantize.add_argument("--subfolder", metavar="NAME", help="part of the folder or repository that has the encoder")
    quantize.add_argument("--group-size", type=int, choices=(64, 128), default=128, help="weights per scale (128)")
    quantize.add_argument(
        "--embedding-bits", type=int, choices=(8, 16), default=16, help="8: int8 embeddings, half their size (16)"
    )
    quantize.add_argument("--dtype", choices=("bfloat16", "float16"), help="of what stays in 16 bits (the source's)")
    quantize.add_argument(
        "--embeddings-twice",
        action="store_true",
        help="write the embeddings under both of their names, for loaders that insist (single files)",
    )
    quantize.add_argument("--calibrate", metavar="TEXTS", help="fit to texts like these, one per line; slow, better")
    quantize.add_argument("--tokenizer", metavar="FOLDER", help="folder or hub id (default: the one beside SOURCE)")
    quantize.add_argument("--method", choices=("fitted", "awq"), help="with texts: ours, or as published (fitted)")
    quantize.add_argument("--rank", type=int, help="with texts: width of a low-rank branch per linear (0)")
    quantize.add_argument(
        "--eight-bits", type=float, metavar="PERCENT",
        help="with texts: how much the linears may grow by storing some of them in 8 bits (7)",
    )  # fmt: skip
    quantize.add_argument("--device", help="with texts: torch device to fit on (cuda if there is one)")
    quantize.add_argument("--json", action="store_true", help="print one JSON object instead of sentences")
    quantize.set_defaults(run=run_quantize)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the console script: 0, 2 for bad input with one sentence on stderr, 130 when interrupted."""
    parser = argparse.ArgumentParser(
        prog="nunchaku-t5", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"nunchaku-t5 {__version__}")
    add_commands(parser)
    args = parser.parse_args(argv)
    # Before torch loads OpenMP: threads that wait by spinning take the processor from whatever else runs.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        return int(args.run(args) or 0)
    except KeyboardInterrupt:
        print("nunchaku-t5: interrupted; earlier files are untouched", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BAD_INPUT as error:
        print(f"nunchaku-t5: error: {' '.join(str(error).split())}", file=sys.stderr)
        return EXIT_BAD_INPUT


def run_quantize(args: argparse.Namespace) -> int:
    """Check, convert with progress on stderr, report."""
    if args.calibrate is None:
        useless = [name for name in NEED_TEXTS if getattr(args, name) is not None]
        if useless:
            said = ", ".join(f"--{name.replace('_', '-')}" for name in useless)
            raise ValueError(f"{said}: only with texts; give some with --calibrate")
    import torch
    from tqdm import tqdm

    from nunchaku_t5.convert import Conversion, EncoderQuantization
    from nunchaku_t5.sources import EncoderSource, find

    quantization = EncoderQuantization(
        EncoderSource(find(args.source, subfolder=args.subfolder)),
        group_size=args.group_size,
        embedding_bits=args.embedding_bits,
        dtype=None if args.dtype is None else getattr(torch, args.dtype),
    )
    conversion = Conversion(quantization, Path(args.output), embeddings_twice=args.embeddings_twice)
    if args.calibrate is not None:
        calibrate(quantization, args)
    started = time.monotonic()
    with tqdm(total=quantization.bytes_before, unit="B", unit_scale=True, desc="quantize") as bar:
        report = conversion.run(lambda _, nbytes: bar.update(nbytes) and None)
    seconds = time.monotonic() - started
    if args.json:
        print(json.dumps({**asdict(report), "seconds": round(seconds, 2)}, indent=2))
        return 0
    print(
        f"{report.output}: {report.four_bits} layers in 4 bits, {report.eight_bits} in 8; "
        f"{report.bytes_before / 1e6:.1f} -> {report.bytes_after / 1e6:.1f} MB, {seconds:.1f} s"
    )
    for name, why in report.kept.items():
        print(f"  kept {name} in 16 bits: {why}")
    return 0


def calibrate(quantization: Any, args: argparse.Namespace) -> None:
    """Fit to the texts that were named, with progress on stderr."""
    import torch
    from tqdm import tqdm

    from nunchaku_t5.calibration import find_tokenizer, read_texts, tokenized

    texts = read_texts(Path(args.calibrate))
    tokenizer = find_tokenizer(args.source, args.tokenizer)
    batches = tokenized(tokenizer, texts, quantization.source.config.vocab_size)
    print(f"calibrating on {len(texts)} texts", file=sys.stderr)
    share = None if args.eight_bits is None else args.eight_bits / 100
    options = {"method": args.method, "rank": args.rank, "eight_bits": share}
    with tqdm(desc="choose what gets 8 bits", unit="batch", delay=1) as bar:

        def on_batch(done: int, of: int) -> None:
            bar.total = of
            bar.update(done - bar.n)

        quantization.calibrate(
            batches,
            **{name: value for name, value in options.items() if value is not None},
            device=args.device or ("cuda" if torch.cuda.is_available() else "cpu"),
            on_batch=on_batch,
        )
