"""`apply` puts a cache on a pipeline or transformer; the handle it returns steers it and takes it off."""

import contextlib
import threading
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from nunchaku_cache.families import Family, family_of
from nunchaku_cache.policy import Policy, ScheduledCache, ThresholdPolicy
from nunchaku_cache.runtime import TransformerCache, cache_of
from nunchaku_cache.schedule import Trace
from nunchaku_cache.stats import Stats

TRANSFORMERS = ("transformer", "transformer_2")
"""Components of a pipeline that are cached: the denoiser, and the second one of models that have two."""


def apply(target: Any, policy: Policy, *, family: Family | None = None) -> "CacheHandle":
    """Cache a pipeline's transformer, or a transformer. A cache that is there already is replaced.

    Nothing but these very objects is changed: no class, no other pipeline, no copy of the model.

    Args:
        target: a diffusers pipeline or transformer.
        policy: `FirstBlockCache`, `DoubleFirstBlockCache`, `ScheduledCache` or `TeaCache`.
        family: declaration of a transformer that is not known, see `families`.

    Raises:
        TypeError: not a pipeline or transformer, or not a policy.
        ValueError: an undeclared transformer, or one that the policy does not suit; the message says what to do.
    """
    if not isinstance(policy, Policy):
        raise TypeError(
            "policy: expected FirstBlockCache, DoubleFirstBlockCache, ScheduledCache or TeaCache, got "
            f"{type(policy).__name__}"
        )
    transformers = _transformers(target)
    pipeline = None if isinstance(target, nn.Module) else target
    return CacheHandle(transformers, [family or family_of(t) for t in transformers], policy, pipeline)


def _transformers(target: Any) -> list[nn.Module]:
    if isinstance(target, nn.Module):
        found = [target]
    else:
        parts = [getattr(target, name, None) for name in TRANSFORMERS]
        found = [module for module in parts if isinstance(module, nn.Module)]
    if not found:
        raise TypeError(
            f"apply: expected a diffusers pipeline with a transformer, or a transformer, got {type(target).__name__}"
        )
    for module in found:
        if hasattr(module, "_orig_mod"):
            raise ValueError(
                "apply: the transformer was compiled as a whole, where nothing can be skipped; compile its blocks "
                "instead: transformer.compile_repeated_blocks()"
            )
    return found


class CacheHandle:
    """A cache at work.

    Attributes:
        stats: hits, misses and distances.
        trace: what `record` is filling just now.
    """

    def __init__(
        self, transformers: Sequence[nn.Module], families: Sequence[Family], policy: Policy, pipeline: Any
    ) -> None:
        self.stats = Stats()
        self._policy = policy
        self._lock = threading.Lock()
        self._disabled = 0
        self.trace: Trace | None = None
        self._pipeline = None if pipeline is None else weakref.ref(pipeline)
        self._caches = [TransformerCache(t, f, self) for t, f in zip(transformers, families, strict=True)]
        for transformer in transformers:
            earlier = cache_of(transformer)
            if earlier is not None:
                earlier.handle.remove()
        for cache in self._caches:
            cache.install()

    @property
    def policy(self) -> Policy:
        """The policy; another one of the same kind may be assigned at any time, with the same `order`."""
        return self._policy

    @policy.setter
    def policy(self, policy: Policy) -> None:
        if type(policy) is not type(self._policy):
            raise TypeError(
                f"policy: expected a {type(self._policy).__name__}, got {type(policy).__name__}; apply anew for another"
            )
        if policy.order != self._policy.order:
            self.reset()
        self._policy = policy

    @property
    def threshold(self) -> float:
        """The policy's threshold; may be assigned at any time, also between two steps.

        Raises:
            ValueError: the policy has none.
        """
        return self._with_threshold().threshold

    @threshold.setter
    def threshold(self, threshold: float) -> None:
        self._policy = self._with_threshold().with_threshold(threshold)

    def _with_threshold(self) -> ThresholdPolicy:
        if isinstance(self._policy, ScheduledCache):
            raise ValueError("threshold: a ScheduledCache has none; assign another policy")
        return self._policy

    @property
    def enabled(self) -> bool:
        """Whether blocks may be skipped."""
        return not self._disabled and (isinstance(self._policy, ScheduledCache) or self._policy.threshold >= 0)

    @property
    def num_steps(self) -> int | None:
        """Steps of a call, where policy or pipeline say."""
        if self._policy.num_steps is not None:
            return self._policy.num_steps
        pipeline = None if self._pipeline is None else self._pipeline()
        return getattr(pipeline, "_num_timesteps", None)

    @property
    def timesteps(self) -> Any:
        """The pipeline's schedule, an object that every call makes anew; None without a pipeline."""
        pipeline = None if self._pipeline is None else self._pipeline()
        return getattr(getattr(pipeline, "scheduler", None), "timesteps", None)

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """Compute everything meanwhile. Whatever was remembered is forgotten."""
        with self._lock:
            self._disabled += 1
        self.reset()
        try:
            yield
        finally:
            with self._lock:
                self._disabled -= 1

    @contextlib.contextmanager
    def record(self, max_gap: int = 16) -> Iterator[Trace]:
        """Compute every step meanwhile, and record how the transformer's outputs move, for `find_schedule`.

        Args:
            max_gap: how many steps back a forecast may look; so many outputs are held.

        Raises:
            ValueError: `max_gap` below 1, or the policy is no `ScheduledCache`.
            RuntimeError: a recording is under way.
        """
        if max_gap < 1:
            raise ValueError(f"max_gap: expected at least 1, got {max_gap}")
        if not isinstance(self._policy, ScheduledCache):
            raise ValueError(f"record: expected the policy ScheduledCache(), got {self._policy}")
        if self.trace is not None:
            raise RuntimeError("record: a recording is under way")
        self.reset()
        self.trace = Trace(self._caches[0].model, max_gap)
        try:
            yield self.trace
        finally:
            self.trace = None
            self.reset()

    def reset(self) -> None:
        """Forget all residuals, of all threads: the next step is computed."""
        for cache in self._caches:
            cache.reset()

    def remove(self) -> None:
        """Take the cache off; the transformer is as it was. Nothing happens the second time."""
        for cache in self._caches:
            cache.remove()

    def __repr__(self) -> str:
        return f"CacheHandle({self._policy}, {self.stats})"
