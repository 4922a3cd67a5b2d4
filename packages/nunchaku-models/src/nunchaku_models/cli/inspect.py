"""`nunchaku inspect FILE`: what a checkpoint is, from its header alone."""

import argparse
import json
from typing import Any

DESCRIPTION = """\
Say what a checkpoint holds without loading it: model family, naming scheme, precision, rank, layers, bytes. Reads the
header only, so a 24 GB file takes no longer than a small one.

  nunchaku inspect svdq-int4_r32-flux.1-dev.safetensors
  nunchaku inspect my-pipeline/ --json
"""


def register(subparsers: Any) -> None:
    """Add the command's parser."""
    parser = subparsers.add_parser(
        "inspect",
        help="what a checkpoint is, from its header alone",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", help="a .safetensors file, a diffusers folder, or a hub id")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--tensors", action="store_true", help="list every tensor too")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print what the checkpoint is."""
    from nunchaku_models.inspection import inspect_checkpoint

    summary = inspect_checkpoint(args.file, tensors=args.tensors)
    if args.json:
        print(json.dumps(summary, indent=2))
        return 0
    tensors = summary.pop("tensors", [])
    for key, value in summary.items():
        if isinstance(value, dict):
            value = ", ".join(f"{name}: {number}" for name, number in value.items()) or "-"
        elif isinstance(value, list):
            value = ", ".join(map(str, value)) or "-"
        elif key == "bytes":
            value = f"{value:,} ({value / 2**30:.2f} GiB)"
        print(f"{key.replace('_', ' '):<22} {'-' if value is None else printable(str(value))}")
    for tensor in tensors:
        print(f"  {printable(tensor['name'])} {tensor['dtype']} {tensor['shape']}")
    return 0


def printable(text: str) -> str:
    """`text` if a terminal shows it as it is; else with escapes, since it comes from an untrusted file."""
    return text if text.isascii() and text.isprintable() else ascii(text)
