"""The published engine's names, with its arguments and its meaning of them (spec/surface.md 4.2 to 4.4)."""

import contextlib
from collections.abc import Iterator
from typing import Any

from nunchaku_cache.families import FLUX_TEA_COEFFICIENTS
from nunchaku_cache.handle import CacheHandle, apply
from nunchaku_cache.policy import DoubleFirstBlockCache, FirstBlockCache, TeaCache

TEA_COEFFICIENTS = {
    "flux": FLUX_TEA_COEFFICIENTS,
    "flux-kontext": (-1046.55119, 312.563399, -16.9500694, 0.410995971, 0.0374537863),
}
"""Published fits, highest power first."""


def apply_cache_on_pipe(
    pipe: Any,
    *,
    residual_diff_threshold: float = 0.12,
    use_double_fb_cache: bool = False,
    residual_diff_threshold_multi: float | None = None,
    residual_diff_threshold_single: float | None = None,
    shallow_patch: bool = False,
) -> CacheHandle:
    """First-block caching under the name that users of the published engine know; calling again changes thresholds.

    Unlike there, other pipelines of the same class are left alone.

    Args:
        pipe: a pipeline, or a transformer.
        residual_diff_threshold: of the joint blocks, or of all blocks.
        use_double_fb_cache: decide joint and single blocks apart.
        residual_diff_threshold_multi: of the joint blocks; default: `residual_diff_threshold`. Negative: no caching.
        residual_diff_threshold_single: of the single blocks, with `use_double_fb_cache`; default: never skipped.
        shallow_patch: without meaning here.

    Returns:
        The handle of `apply`.
    """
    multi = residual_diff_threshold if residual_diff_threshold_multi is None else residual_diff_threshold_multi
    if not use_double_fb_cache:
        return apply(pipe, FirstBlockCache(threshold=multi))
    single = -1.0 if residual_diff_threshold_single is None else residual_diff_threshold_single
    return apply(pipe, DoubleFirstBlockCache(threshold=multi, single_threshold=single))


@contextlib.contextmanager
def tea_cache(
    model: Any,
    *,
    num_steps: int = 50,
    rel_l1_thresh: float = 0.6,
    skip_steps: int = 0,
    enabled: bool = True,
    model_name: str = "flux",
) -> Iterator[CacheHandle]:
    """TeaCache as a context with the published arguments (spec/surface.md 4.5); removed at its end.

    Args:
        model: a transformer, or a pipeline.
        num_steps: of a call; the last one is always computed.
        rel_l1_thresh: skip while the summed distance is below.
        skip_steps: steps at the beginning that are always computed.
        enabled: False computes everything.
        model_name: "flux" or "flux-kontext": which published coefficients.

    Raises:
        ValueError: another model name.
    """
    if model_name not in TEA_COEFFICIENTS:
        raise ValueError(f"model_name: expected {' or '.join(TEA_COEFFICIENTS)}, got {model_name!r}")
    threshold = rel_l1_thresh if enabled else -1.0
    policy = TeaCache(threshold, TEA_COEFFICIENTS[model_name], num_steps=num_steps, warmup_steps=skip_steps)
    handle = apply(model, policy)
    try:
        yield handle
    finally:
        handle.remove()


def apply_cache_on_transformer(transformer: Any, **kwargs: Any) -> CacheHandle:
    """The same for a transformer; see `apply_cache_on_pipe`."""
    return apply_cache_on_pipe(transformer, **kwargs)
