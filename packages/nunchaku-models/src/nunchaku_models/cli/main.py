"""`nunchaku <command>`: finds the subcommands, runs one, turns errors into one sentence and an exit code.

Other packages add subcommands through the entry-point group `nunchaku.commands`: a function that takes the argparse
sub-parser collection, adds its parser and sets `run` to a function of the parsed arguments.
"""

import argparse
import contextlib
import importlib
import logging
import os
import sys
import traceback
from collections.abc import Sequence

from nunchaku_models import __version__
from nunchaku_models.cli.plugins import add_plugins, one_line

ENTRY_POINTS = "nunchaku.commands"
COMMANDS = ("generate", "quantize", "evaluate", "inspect", "doctor", "bench")

VERBOSE = "log what happens, and show tracebacks of errors"

EXIT_BAD_INPUT = 2
EXIT_INTERNAL = 1
EXIT_INTERRUPTED = 130

# What a file, a path, an argument, a device or an installation that is not as it should be raises. Anything else is
# a mistake in this program.
BAD_INPUT = (ValueError, TypeError, OSError, RuntimeError, ImportError, MemoryError)


def build_parser() -> argparse.ArgumentParser:
    """The whole command line, subcommands of other installed packages included."""
    parser = argparse.ArgumentParser(
        prog="nunchaku",
        description="4-bit diffusion transformers: draw pictures, quantise models, look into files.",
        epilog="`nunchaku <command> --help` explains a command, with examples.",
    )
    parser.add_argument("--version", action="version", version=f"nunchaku-models {__version__}")
    parser.add_argument("--verbose", action="store_true", help=VERBOSE)
    subparsers = parser.add_subparsers(title="commands", metavar="<command>", required=True)
    for name in COMMANDS:
        importlib.import_module(f"nunchaku_models.cli.{name}").register(subparsers)
    add_plugins(ENTRY_POINTS, subparsers, "command")
    for command in subparsers.choices.values():
        # after the command too; SUPPRESS keeps what was said before it
        with contextlib.suppress(argparse.ArgumentError):
            command.add_argument("--verbose", action="store_true", default=argparse.SUPPRESS, help=VERBOSE)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the console script.

    Returns:
        The exit code: 0, 1 for a mistake of this program, 2 for bad input, 130 when interrupted.

    Raises:
        SystemExit: the arguments cannot be understood (code 2), or help was asked for (code 0).
    """
    # Before torch loads OpenMP: threads that wait by spinning take the processor from whatever else runs, our own
    # kernels included (measured: as fast, with half the processor time).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    args = build_parser().parse_args(argv)
    if args.verbose:
        logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    try:
        result = args.run(args)
    except KeyboardInterrupt:
        print("nunchaku: interrupted; earlier files are untouched", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        return 0
    except Exception as error:
        if args.verbose:
            traceback.print_exc()
        if isinstance(error, BAD_INPUT):
            print(f"nunchaku: error: {one_line(error)}", file=sys.stderr)
            return EXIT_BAD_INPUT
        print(
            f"nunchaku: internal error ({type(error).__name__}: {one_line(error)}); run it with --verbose and report "
            "what it shows",
            file=sys.stderr,
        )
        return EXIT_INTERNAL
    return int(result or 0)


if __name__ == "__main__":
    sys.exit(main())
