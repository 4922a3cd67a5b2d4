"""One call's branch under a schedule: the transformer runs, or its output is forecast from earlier ones."""

from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

from nunchaku_cache.policy import ScheduledCache
from nunchaku_cache.residuals import ResidualHistory
from nunchaku_cache.schedule import Trace


class ScheduledBranch:
    """What one branch of one call remembers: its place in the schedule, and the last computed outputs in float32.

    Outputs are as small as the latents, so they are copied: pipelines may write into what they got.
    """

    def __init__(self, name: str, order: int) -> None:
        self.name = name
        self.step = 0
        self._order = order
        self.forget_outputs()

    def forget_outputs(self) -> None:
        """As before the first computed step; the place in the schedule stays."""
        # the samples of a call share their timesteps: one history for all
        self._history = ResidualHistory(1, self._order)
        self._dtypes: list[torch.dtype] = []
        self._spec: Any = None
        self._trail: deque[list[torch.Tensor]] = deque()

    def skips(self, policy: ScheduledCache, total_steps: int | None) -> bool:
        """Whether this step is to be forecast."""
        schedule = policy.schedule
        if schedule is None or self._spec is None or total_steps not in (None, len(schedule.skip)):
            return False
        return self.step < len(schedule.skip) and schedule.skip[self.step]

    @torch.no_grad()
    def forecast(self, policy: ScheduledCache, position: float) -> Any:
        """The output at a timestep, in the form that the transformer has."""
        assert policy.schedule is not None
        tensors = self._history.predict((position,), policy.schedule.damping[self.step])
        leaves = [tensor.to(dtype) for tensor, dtype in zip(tensors, self._dtypes, strict=True)]
        self.step += 1
        return tree_unflatten(leaves, self._spec)

    @torch.no_grad()
    def record(self, output: Any, position: float, trace: Trace | None) -> None:
        """Take note of a computed output.

        Args:
            output: of the transformer: tensors in any structure.
            position: its timestep.
            trace: gets its inner products with earlier ones; None: forecasts may be made from it.

        Raises:
            TypeError: there is something else than tensors in the output.
        """
        leaves, spec = tree_flatten(output)
        if not all(isinstance(leaf, torch.Tensor) for leaf in leaves):
            raise TypeError(f"ScheduledCache: the output holds {sorted({type(leaf).__name__ for leaf in leaves})}")
        new = [leaf.to(torch.float32, copy=True) for leaf in leaves]
        if trace is None:
            self._dtypes, self._spec = [leaf.dtype for leaf in leaves], spec
            self._history.record(new, (position,), None)
        else:
            products = [_inner(new, earlier) for earlier in (new, *self._trail)]
            trace.add(self.step, position, torch.stack(products).tolist())
            self._trail.appendleft(new)
            while len(self._trail) > trace.max_gap:
                self._trail.pop()
        self.step += 1


def run_step(
    branch: ScheduledBranch,
    policy: ScheduledCache,
    position: float,
    total_steps: int | None,
    trace: Trace | None,
    run: Callable[[], Any],
) -> tuple[Any, bool]:
    """The transformer's output at one step, and whether it was forecast.

    Args:
        branch: of the call.
        policy: with the schedule.
        position: timestep.
        total_steps: of the call, where known.
        trace: what is being recorded; then every step is computed.
        run: runs the transformer.
    """
    if trace is None and branch.skips(policy, total_steps):
        return branch.forecast(policy, position), True
    output = run()
    branch.record(output, position, trace)
    return output, False


def _inner(a: list[torch.Tensor], b: list[torch.Tensor]) -> torch.Tensor:
    """Inner product of outputs, a scalar float64 (float32 where the device has no more)."""
    wide = torch.float32 if a[0].device.type == "mps" else torch.float64
    return torch.stack([(x * y).sum(dtype=wide) for x, y in zip(a, b, strict=True)]).sum()
