"""The one exception raised for weight files that cannot be used."""

from __future__ import annotations


class CheckpointError(ValueError):
    """A weight file (or folder, or hub id) is missing, damaged, hostile or of the wrong kind.

    The message is one sentence that says which file, what is wrong with it and what to do.
    """


def shown(name: object, limit: int = 120) -> str:
    """`repr(name)` for an error message, shortened: names come from untrusted files and may be megabytes long."""
    text = repr(name[: limit + 1] if isinstance(name, str) else name)
    return text if len(text) <= limit else text[:limit] + "..."
