"""JSON from untrusted files: size, depth and duplicate keys are checked before or while parsing.

`json.loads` alone recurses once per bracket (a deep document exhausts the stack), keeps the last of two equal keys
and accepts NaN. Everything here raises `CheckpointError` instead.
"""

from __future__ import annotations

import json
import re
from typing import Any

from nunchaku_models.checkpoints.errors import CheckpointError, shown

# A string (skipped: its brackets do not count), or one bracket. Possessive quantifiers keep the match free of
# backtracking state, whatever the length of the string.
_STRING_OR_BRACKET = re.compile(r'"(?:[^"\\]++|\\.)*+"|([\[{])|[\]}]', re.DOTALL)


def _check_depth(text: str, max_depth: int, where: str) -> None:
    depth = 0
    for match in _STRING_OR_BRACKET.finditer(text):
        token = match.group()
        if token[0] == '"':
            continue
        depth += 1 if match.group(1) else -1
        if depth > max_depth:
            raise CheckpointError(f"{where} nests JSON deeper than {max_depth} levels; it is damaged or hostile")


def _unique_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {shown(twice)} occurs twice")
    return result


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def parse_json(text: str | bytes, *, where: str, max_bytes: int = 1 << 20, max_depth: int = 16) -> Any:
    """The value of a JSON document.

    Args:
        text: the document; bytes must be UTF-8.
        where: what the document is, for messages ("the metadata entry 'config' of model.safetensors").
        max_bytes: longest accepted document; memory while parsing is bounded by a small multiple of it.
        max_depth: most nested brackets accepted.

    Raises:
        CheckpointError: too long, too deep, not UTF-8, not JSON, NaN or infinity, or a key given twice.
    """
    if len(text) > max_bytes:
        raise CheckpointError(f"{where} is {len(text):,} long, more than the {max_bytes:,} this reader accepts")
    if isinstance(text, bytes):
        try:
            text = text.decode("utf-8")
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{where} is not UTF-8 text ({error.reason} at byte {error.start})") from None
    _check_depth(text, max_depth, where)
    try:
        return json.loads(text, object_pairs_hook=_unique_object, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} is not valid JSON: {error}") from None


def parse_json_object(
    text: str | bytes, *, where: str, max_bytes: int = 1 << 20, max_depth: int = 16
) -> dict[str, Any]:
    """`parse_json` for a document that must be an object."""
    value = parse_json(text, where=where, max_bytes=max_bytes, max_depth=max_depth)
    if not isinstance(value, dict):
        raise CheckpointError(f"{where} must be a JSON object, not a {type(value).__name__}")
    return value
