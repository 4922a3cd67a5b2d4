"""Caching for the transformers of diffusers: skip the blocks whose work has changed little since the last step.

`handle = apply(pipe, FirstBlockCache(threshold=0.12))`; see the README.
"""

import importlib
import logging
from typing import TYPE_CHECKING, Any

from nunchaku_cache.policy import DoubleFirstBlockCache, FirstBlockCache, ScheduledCache, TeaCache
from nunchaku_cache.schedule import Schedule, Trace, find_schedule

if TYPE_CHECKING:
    from nunchaku_cache.families import BlockList, Family, families, register
    from nunchaku_cache.handle import CacheHandle, apply
    from nunchaku_cache.published import apply_cache_on_pipe, apply_cache_on_transformer, tea_cache
    from nunchaku_cache.stats import Stats, StepRecord

__version__ = "0.1.0"

logging.getLogger(__name__).addHandler(logging.NullHandler())

_LAZY = {
    "BlockList": "nunchaku_cache.families",
    "CacheHandle": "nunchaku_cache.handle",
    "Family": "nunchaku_cache.families",
    "Stats": "nunchaku_cache.stats",
    "StepRecord": "nunchaku_cache.stats",
    "apply": "nunchaku_cache.handle",
    "apply_cache_on_pipe": "nunchaku_cache.published",
    "apply_cache_on_transformer": "nunchaku_cache.published",
    "families": "nunchaku_cache.families",
    "register": "nunchaku_cache.families",
    "tea_cache": "nunchaku_cache.published",
}
__all__ = [
    "BlockList",
    "CacheHandle",
    "DoubleFirstBlockCache",
    "Family",
    "FirstBlockCache",
    "Schedule",
    "ScheduledCache",
    "Stats",
    "StepRecord",
    "TeaCache",
    "Trace",
    "apply",
    "apply_cache_on_pipe",
    "apply_cache_on_transformer",
    "families",
    "find_schedule",
    "register",
    "tea_cache",
]


def __getattr__(name: str) -> Any:
    # torch takes seconds to import; the policies need none
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
