"""What is measured: our policies and the rivals', each over the settings that matter for it."""

import contextlib
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import nunchaku_cache
from nunchaku_cache import DoubleFirstBlockCache, FirstBlockCache, ScheduledCache, Trace, find_schedule
from nunchaku_cache.bench.measure import Bench, Enable

THRESHOLDS = (0.02, 0.04, 0.06, 0.08, 0.1, 0.12, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5)
OUR_THRESHOLDS = (0.04, 0.08, 0.12, 0.2, 0.3, 0.5)
SPEEDS = (1.25, 1.5, 1.75, 2.0, 2.25, 2.5, 2.75, 3.0, 3.5, 4.0)


@dataclass(frozen=True)
class Setting:
    """One setting of a method."""

    name: str
    enable: Enable


def _ours_first_block(bench: Bench) -> Iterator[Setting]:
    for threshold, order in product(OUR_THRESHOLDS, (0, 1)):
        policy = FirstBlockCache(threshold, accumulate=order > 0, order=order)
        yield Setting(f"threshold {threshold:g}, order {order}", _ours(policy))


def _ours_double(bench: Bench) -> Iterator[Setting]:
    for threshold, order in product(OUR_THRESHOLDS, (0, 1)):
        policy = DoubleFirstBlockCache(threshold, accumulate=order > 0, order=order)
        yield Setting(f"threshold {threshold:g}, order {order}", _ours(policy))


def _ours_scheduled(bench: Bench) -> Iterator[Setting]:
    trace: Trace = bench.calibrate(lambda pipe: nunchaku_cache.apply(pipe, ScheduledCache()).record())
    for computed, order in product(_computed_steps(bench.steps), (1, 2)):
        schedule = find_schedule(trace, computed, order=order)
        yield Setting(f"{computed} of {bench.steps} steps, order {order}", _ours(ScheduledCache(schedule)))


def _ours(policy: Any) -> Enable:
    def enable(pipe: Any) -> None:
        nunchaku_cache.apply(pipe, policy)

    return enable


def _computed_steps(steps: int) -> list[int]:
    return sorted({round(steps / speed) for speed in SPEEDS}, reverse=True)


def _diffusers(config: Any) -> Enable:
    def enable(pipe: Any) -> None:
        pipe.transformer.enable_cache(config)

    return enable


def _first_block(bench: Bench) -> Iterator[Setting]:
    from diffusers import FirstBlockCacheConfig

    for threshold in THRESHOLDS:
        config = FirstBlockCacheConfig(threshold=threshold)
        yield Setting(f"threshold {threshold:g}", _diffusers(config))


def _taylorseer(bench: Bench) -> Iterator[Setting]:
    from diffusers import TaylorSeerCacheConfig

    choices = [*product((2, 3, 4, 5, 6), (1, 2, 3), (2, 4), (True,)), *product((2, 4, 6), (1,), (2,), (False,))]
    for interval, order, before, lite in choices:
        config = TaylorSeerCacheConfig(
            cache_interval=interval,
            max_order=order,
            disable_cache_before_step=before,
            taylor_factors_dtype=bench.dtype,  # bfloat16 by default, whatever the model's is
            use_lite_mode=lite,
        )
        name = f"every {interval}, order {order}, from {before}{', lite' if lite else ''}"
        yield Setting(name, _diffusers(config))


def _magcache(bench: Bench) -> Iterator[Setting]:
    from diffusers import MagCacheConfig

    ratios = bench.calibrate(lambda pipe: _mag_ratios(pipe, bench.steps))
    for threshold, skips in product((0.03, 0.06, 0.12, 0.24, 0.5), (2, 3, 5)):
        config = MagCacheConfig(
            threshold=threshold,
            max_skip_steps=skips,
            retention_ratio=0.1,
            num_inference_steps=bench.steps,
            mag_ratios=list(ratios),
        )
        yield Setting(f"threshold {threshold:g}, at most {skips}", _diffusers(config))


@contextlib.contextmanager
def _mag_ratios(pipe: Any, steps: int) -> Iterator[list[float]]:
    """Ratios of a call, which MagCache only logs and prints; of the first pass of guidance it reports."""
    from diffusers import MagCacheConfig
    from diffusers.hooks import mag_cache

    ratios: list[float] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            numbers = re.search(r"\[([-0-9.,e\s]+)\]", record.getMessage())
            if numbers and not ratios:
                ratios.extend(float(number) for number in numbers[1].split(","))

    listener = Listener()
    level = mag_cache.logger.level
    mag_cache.logger.addHandler(listener)
    mag_cache.logger.setLevel(logging.INFO)
    pipe.transformer.enable_cache(MagCacheConfig(calibrate=True, num_inference_steps=steps))
    try:
        yield ratios
    finally:
        mag_cache.logger.setLevel(level)
        mag_cache.logger.removeHandler(listener)
        if not ratios:
            raise RuntimeError("MagCache's calibration has reported no ratios")


def _cache_dit(bench: Bench) -> Iterator[Setting]:
    import cache_dit
    from cache_dit import DBCacheConfig, TaylorSeerCalibratorConfig

    for handler in logging.getLogger("CACHE_DIT").handlers:  # its other loggers share them, and say much
        handler.setLevel(logging.ERROR)

    def enable_with(calibrator: Any, **options: Any) -> Enable:
        def enable(pipe: Any) -> None:
            # the demo runs its guidance as a second pass, which cache-dit does not expect of FLUX
            config = DBCacheConfig(num_inference_steps=bench.steps, enable_separate_cfg=True, **options)
            cache_dit.enable_cache(pipe, cache_config=config, calibrator_config=calibrator())

        return enable

    def calibrators() -> Iterator[tuple[str, Callable[[], Any]]]:
        yield "no forecast", lambda: None
        for order in (1, 2):
            yield f"Taylor {order}", partial(TaylorSeerCalibratorConfig, taylorseer_order=order)

    for (first, last), threshold, (forecast, calibrator) in product(
        ((1, 0), (1, 1)), (0.06, 0.12, 0.2, 0.3, 0.5), calibrators()
    ):
        for warmup, continuous in ((2, -1), (4, 3)):
            yield Setting(
                f"F{first}B{last}, threshold {threshold:g}, {forecast}, warm-up {warmup}, in a row {continuous}",
                enable_with(
                    calibrator,
                    Fn_compute_blocks=first,
                    Bn_compute_blocks=last,
                    residual_diff_threshold=threshold,
                    max_warmup_steps=warmup,
                    max_continuous_cached_steps=continuous,
                ),
            )
    masks = {f"every {every}": _every(bench.steps, every) for every in (2, 3, 4, 5)}
    for name in ("slow", "medium", "fast", "ultra"):
        masks[name] = cache_dit.steps_mask(total_steps=bench.steps, mask_policy=name)
    for (name, mask), (forecast, calibrator) in product(masks.items(), calibrators()):
        yield Setting(
            f"F1B0, mask {name}, {forecast}",
            enable_with(
                calibrator,
                Fn_compute_blocks=1,
                Bn_compute_blocks=0,
                steps_computation_mask=mask,
                steps_computation_policy="static",
            ),
        )


def _every(steps: int, every: int) -> list[int]:
    """Compute the first three steps and then every n-th."""
    return [int(step < 3 or (step - 3) % every == every - 1) for step in range(steps)]


OURS: Mapping[str, Callable[[Bench], Iterator[Setting]]] = {
    "ours-first-block": _ours_first_block,
    "ours-double-first-block": _ours_double,
    "ours-scheduled": _ours_scheduled,
}
"""Methods of this package, and their settings; calibration prompts are drawn for those that are fitted."""

RIVALS: Mapping[str, Callable[[Bench], Iterator[Setting]]] = {
    "diffusers-first-block": _first_block,
    "diffusers-taylorseer": _taylorseer,
    "diffusers-magcache": _magcache,
    "cache-dit": _cache_dit,
}
"""The same of diffusers, and of the package cache-dit."""
