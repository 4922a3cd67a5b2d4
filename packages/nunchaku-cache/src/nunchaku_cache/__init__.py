"""Caching for the transformers of diffusers: skip the blocks whose work has changed little since the last step.

`handle = apply(pipe, FirstBlockCache(threshold=0.12))`; see the README.
"""

import logging
from typing import TYPE_CHECKING

from nunchaku_cache.policy import DoubleFirstBlockCache, FirstBlockCache, ScheduledCache, TeaCache
from nunchaku_cache.schedule import Schedule, Trace, find_schedule
from nunchaku_kernels.lazy import lazy_names as _lazy_names

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

# torch takes seconds to import; the policies need none
__getattr__, __dir__ = _lazy_names(__name__, _LAZY)
