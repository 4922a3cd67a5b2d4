"""What other packages add to the command line through entry points."""

import sys
from importlib.metadata import entry_points
from typing import Any


def add_plugins(group: str, parsers: Any, what: str) -> None:
    """Let the entry points of a group, functions of an argparse sub-parser collection, add their parsers.

    Args:
        group: of the entry points.
        parsers: the collection.
        what: one of them is, for messages.
    """
    for entry in entry_points(group=group):
        try:
            entry.load()(parsers)
        except Exception as error:
            # one broken plug-in must not take the others away
            print(f"nunchaku: the {what} {entry.name!r} is not available: {one_line(error)}", file=sys.stderr)


def one_line(error: BaseException) -> str:
    """The message of an error on one line; its class name where it has none."""
    text = " ".join(str(error).split())
    return text or type(error).__name__
