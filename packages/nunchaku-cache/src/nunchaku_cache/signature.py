"""The arguments of a transformer's forward pass, by name and as something comparable."""

import inspect
from collections.abc import Hashable, Mapping
from typing import Any

from torch import nn

from nunchaku_cache.families import Family


class ForwardSignature:
    """Names positional arguments."""

    def __init__(self, transformer: nn.Module, family: Family) -> None:
        """
        Raises:
            ValueError: the forward has no argument of a declared name.
        """
        names = list(inspect.signature(type(transformer).forward).parameters)[1:]
        for name in (family.sample, family.timestep, *family.call):
            if name not in names:
                raise ValueError(
                    f"Family {family.transformer!r}: {type(transformer).__name__}.forward has no argument {name!r}, "
                    f"only {', '.join(names)}"
                )
        self._names = names

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """All given arguments by name."""
        return {**dict(zip(self._names, args, strict=False)), **kwargs}


def simple_values(value: Any) -> Hashable:
    """Numbers, strings and the like inside an argument, however deep; everything else counts as one and the same."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return tuple(map(simple_values, value))
    if isinstance(value, dict):
        return tuple(sorted((str(key), simple_values(item)) for key, item in value.items()))
    return ...
