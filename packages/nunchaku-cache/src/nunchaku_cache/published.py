"""The published engine's names, with its arguments and its meaning of them (spec/surface.md 4.2 to 4.4)."""

from typing import Any

from nunchaku_cache.handle import CacheHandle, apply
from nunchaku_cache.policy import DoubleFirstBlockCache, FirstBlockCache


def apply_cache_on_pipe(
    pipe: Any,
    *,
    residual_diff_threshold: float = 0.12,
    use_double_fb_cache: bool = False,
    residual_diff_threshold_multi: float | None = None,
    residual_diff_threshold_single: float | None = None,
) -> CacheHandle:
    """First-block caching under the name that users of the published engine know; calling again changes thresholds.

    Unlike there, other pipelines of the same class are left alone.

    Args:
        pipe: a pipeline, or a transformer.
        residual_diff_threshold: of the joint blocks, or of all blocks.
        use_double_fb_cache: decide joint and single blocks apart.
        residual_diff_threshold_multi: of the joint blocks; default: `residual_diff_threshold`. Negative: no caching.
        residual_diff_threshold_single: of the single blocks, with `use_double_fb_cache`; default: never skipped.

    Returns:
        The handle of `apply`.
    """
    multi = residual_diff_threshold if residual_diff_threshold_multi is None else residual_diff_threshold_multi
    if not use_double_fb_cache:
        return apply(pipe, FirstBlockCache(threshold=multi))
    single = -1.0 if residual_diff_threshold_single is None else residual_diff_threshold_single
    return apply(pipe, DoubleFirstBlockCache(threshold=multi, single_threshold=single))


def apply_cache_on_transformer(transformer: Any, **kwargs: Any) -> CacheHandle:
    """The same for a transformer; see `apply_cache_on_pipe`."""
    return apply_cache_on_pipe(transformer, **kwargs)
