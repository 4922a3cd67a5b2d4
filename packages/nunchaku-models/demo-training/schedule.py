"""Training length in minutes, turned into steps; the learning rate follows the steps."""

import math
import time
from collections.abc import Callable

from tqdm import tqdm


def warmup_cosine(step: int, steps: int, peak: float, warmup: int) -> float:
    """Linear warm-up to ``peak``, then half a cosine down to zero at ``steps``."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return 0.5 * peak * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def train_for(
    minutes: float,
    step_fn: Callable[[int, float], None],
    *,
    peak: float,
    warmup: int,
    trial_steps: int,
    synchronize: Callable[[], None],
    status: Callable[[], str],
    description: str,
) -> int:
    """Call ``step_fn(step, learning_rate)`` for about ``minutes``; return the number of steps done.

    The first ``trial_steps`` are part of the warm-up and time the machine; from then on the number
    of steps is fixed, and the learning rate depends on the step alone.
    """
    warmup = max(warmup, trial_steps)
    start = timed_from = time.perf_counter()
    for step in tqdm(range(trial_steps), desc=f"{description}, timing", mininterval=10):
        if step == trial_steps // 2:  # compilation is over
            synchronize()
            timed_from = time.perf_counter()
        step_fn(step, peak * (step + 1) / warmup)
    synchronize()
    now = time.perf_counter()
    seconds_per_step = (now - timed_from) / (trial_steps - trial_steps // 2)
    steps = trial_steps + max(1, int((60 * minutes - (now - start)) / seconds_per_step))
    print(f"{description}: {1e3 * seconds_per_step:.2f} ms per step, {steps} steps")

    bar = tqdm(range(trial_steps, steps), desc=description, mininterval=10)
    for step in bar:
        step_fn(step, warmup_cosine(step, steps, peak, warmup))
        if step % 500 == 0:
            bar.set_postfix_str(status())
    synchronize()
    return steps
