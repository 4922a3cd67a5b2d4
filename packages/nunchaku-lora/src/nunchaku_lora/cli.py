"""`nunchaku-lora <command>`, and the same commands as `nunchaku lora <command>`."""

import argparse
import collections
import json
import os
import re
import secrets
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nunchaku_lora import __version__

if TYPE_CHECKING:
    import torch

    from nunchaku_lora.formats import Lora

DESCRIPTION = """\
Look into LoRA files, convert them and put several into one.

  nunchaku-lora inspect style.safetensors
  nunchaku-lora convert style-kohya.safetensors -o style.safetensors --dtype bfloat16
  nunchaku-lora compose style.safetensors:0.8 turbo.safetensors -o both.safetensors

Files may be of any format that FLUX.1 LoRAs come in; what is written has diffusers' names. To draw with a LoRA:
nunchaku generate PROMPT -o FILE --lora style.safetensors:0.8
"""

DTYPES = ("bfloat16", "float16", "float32")
BAD_INPUT = (ValueError, TypeError, OSError, RuntimeError)
EXIT_BAD_INPUT = 2


def register(subparsers: Any) -> None:
    """Add `lora` to the commands of `nunchaku` (entry-point group `nunchaku.commands`)."""
    parser = subparsers.add_parser(
        "lora",
        help="inspect, convert and compose LoRA files",
        description=DESCRIPTION.replace("nunchaku-lora", "nunchaku lora"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_commands(parser)


def add_commands(parser: argparse.ArgumentParser) -> None:
    """Add the subcommands to a parser; each sets `run`."""
    commands = parser.add_subparsers(title="commands", metavar="<command>", required=True)
    inspect = commands.add_parser("inspect", help="say what a file holds, and what of it nobody could apply")
    inspect.add_argument("file", help=".safetensors file, or folder with one")
    inspect.add_argument("--json", action="store_true", help="print one JSON object instead of sentences")
    inspect.set_defaults(run=run_inspect)
    convert = commands.add_parser("convert", help="write a file with diffusers' names")
    convert.add_argument("file", help=".safetensors file, or folder with one")
    convert.set_defaults(run=run_convert)
    compose = commands.add_parser("compose", help="put several LoRAs, each with its strength, into one file")
    compose.add_argument("files", nargs="+", metavar="FILE[:STRENGTH]", help="files, with strengths other than 1")
    compose.set_defaults(run=run_compose)
    for command in (convert, compose):
        command.add_argument("-o", "--output", required=True, metavar="FILE", help="file to write: .safetensors")
        command.add_argument("--dtype", choices=DTYPES, help="of the factors (default: as they come)")
        command.add_argument("--strict", action="store_true", help="fail if any key of a file is left over")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the console script: 0, or 2 for bad input with one sentence on stderr."""
    parser = argparse.ArgumentParser(
        prog="nunchaku-lora", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"nunchaku-lora {__version__}")
    add_commands(parser)
    args = parser.parse_args(argv)
    try:
        return int(args.run(args) or 0)
    except BAD_INPUT as error:
        print(f"nunchaku-lora: error: {' '.join(str(error).split())}", file=sys.stderr)
        return EXIT_BAD_INPUT


def parse_file(text: str) -> tuple[str, float]:
    """ "style.safetensors:0.8" -> ("style.safetensors", 0.8); without a number behind a colon, the strength is 1."""
    match = re.fullmatch(r"(.+):([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)", text)
    if match:
        return match[1], float(match[2])
    file, _, strength = text.rpartition(":")
    if Path(file).is_file() and not Path(text).exists():
        raise ValueError(f"the strength of {file} must be a number, got {strength!r}")
    return text, 1.0


def run_inspect(args: argparse.Namespace) -> int:
    """Print what a file holds."""
    lora, tensors = _converted(args.file)
    ranks = collections.Counter(part.rank for part in lora.modules.values())
    scales = collections.Counter(round(part.alpha / part.rank, 6) for part in lora.modules.values())
    kinds = collections.Counter(re.sub(r"\.\d+\.", ".*.", path, count=1) for path in lora.modules)
    size = sum(tensor.nbytes for tensor in tensors.values())
    extras = {
        "dora": sum(part.dora is not None or part.gain is not None for part in lora.modules.values()),
        "bias": sum(part.bias is not None for part in lora.modules.values()),
        "norms": len(lora.vectors),
        "text_encoder": len(lora.text_encoder),
    }
    if args.json:
        found = {
            "format": lora.format,
            "keys": len(tensors),
            "bytes": size,
            "dtypes": sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()}),
            "layers": {path: {"rank": part.rank, "alpha": part.alpha} for path, part in sorted(lora.modules.items())},
            **extras,
            "skipped": [list(item) for item in lora.skipped],
            "notes": lora.notes,
        }
        print(json.dumps(found, indent=2))
        return 0
    dtypes = ", ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()}))
    print(f"{args.file}: {lora.format} format, {len(tensors)} keys, {size / 2**20:.1f} MiB in {dtypes}")
    print(f"  rank {_counts(ranks)}; alpha / rank {_counts(scales)}")
    for kind, count in sorted(kinds.items()):
        print(f"  {count:4} x {kind}")
    for name, count in extras.items():
        if count:
            print(f"  {count:4} x {name.replace('_', ' ')}")
    _print_rest(lora)
    return 0


def run_convert(args: argparse.Namespace) -> int:
    """Write a file under diffusers' names."""
    from nunchaku_lora.formats.composing import to_tensors

    output = _checked_output(args.output)
    lora, _ = _converted(args.file, strict=args.strict)
    _write(to_tensors(lora, _dtype(args.dtype)), output)
    print(f"wrote {output}: {len(lora.modules)} layers, from the {lora.format} format")
    _print_rest(lora)
    return 0


def run_compose(args: argparse.Namespace) -> int:
    """Write one file that does what several do together."""
    from nunchaku_lora.formats.composing import compose, to_tensors

    output = _checked_output(args.output)
    parts = []
    for text in args.files:
        file, strength = parse_file(text)
        lora, _ = _converted(file, strict=args.strict)
        _print_rest(lora, file)
        parts.append((lora, strength))
    whole = compose(parts)
    _write(to_tensors(whole, _dtype(args.dtype)), output)
    ranks = collections.Counter(part.rank for part in whole.modules.values())
    print(f"wrote {output}: {len(whole.modules)} layers, rank {_counts(ranks)}")
    return 0


def _converted(file: str, strict: bool = False) -> "tuple[Lora, dict[str, torch.Tensor]]":
    from nunchaku_lora.formats import convert, is_published, read_lora

    tensors, configuration = read_lora(file)
    if is_published(list(tensors)):
        raise ValueError(
            f"{file} is a published fused file: it holds a base model's branch too, and only "
            "pipe.load_lora_weights, which has that model, can tell them apart"
        )
    lora = convert(tensors, configuration=configuration)
    if strict and lora.skipped:
        raise ValueError(f"{file}: {len(lora.skipped)} keys left over, such as {lora.skipped[0][0]!r}")
    return lora, tensors


def _print_rest(lora: "Lora", file: str = "") -> None:
    where = f"{file}: " if file else ""
    for reason, count in collections.Counter(reason for _, reason in lora.skipped).items():
        example = next(key for key, other in lora.skipped if other == reason)
        print(f"  {where}left over: {count} keys ({reason}), such as {example}")
    for note in lora.notes:
        print(f"  {where}{note}")


def _counts(counter: "collections.Counter[Any]") -> str:
    if len(counter) == 1:
        return str(next(iter(counter)))
    return ", ".join(f"{value} ({count}x)" for value, count in counter.most_common(6))


def _dtype(name: str | None) -> "torch.dtype | None":
    import torch

    return None if name is None else getattr(torch, name)


def _checked_output(name: str) -> Path:
    path = Path(name)
    if path.suffix not in (".safetensors", ".sft"):
        raise ValueError(f"{path}: the name of a LoRA file must end in .safetensors")
    if not path.resolve().parent.is_dir() or path.is_dir():
        raise ValueError(f"{path}: cannot be written")
    return path


def _write(tensors: "dict[str, torch.Tensor]", path: Path) -> None:
    from safetensors.torch import save_file

    temporary = path.with_name(f".{path.stem}-{secrets.token_hex(4)}{path.suffix}")
    try:
        save_file(tensors, temporary, metadata={"format": "pt"})
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(main())
