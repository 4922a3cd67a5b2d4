"""A cache on one transformer: what calls go through, and the state of the calls in progress."""

import contextlib
import logging
import threading
from collections.abc import Callable, Hashable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from nunchaku_cache.adapters import AdapterWatch
from nunchaku_cache.calls import Call, Calls, tensors_of
from nunchaku_cache.families import Family
from nunchaku_cache.forward_pass import Branch, ForwardPass, SegmentState, Settings
from nunchaku_cache.hooks import CallHook, ContextTap
from nunchaku_cache.measure import HostCopy
from nunchaku_cache.plan import Place, Plan, make_plan
from nunchaku_cache.policy import DoubleFirstBlockCache, ScheduledCache, TeaCache, ThresholdPolicy
from nunchaku_cache.scheduled import ScheduledBranch, run_step
from nunchaku_cache.signature import ForwardSignature, simple_values
from nunchaku_cache.stats import StepRecord

if TYPE_CHECKING:
    from nunchaku_cache.handle import CacheHandle


logger = logging.getLogger(__name__)


class _ThreadState(threading.local):
    """Of one thread: its calls in progress, the pass that runs, and the name given to `cache_context`."""

    def __init__(self) -> None:
        self.generation = 0
        self.calls: Calls[Any] = Calls()
        self.current: ForwardPass | None = None
        self.context: tuple[str, dict[str, Any]] = ("", {})
        self.adapters: Hashable = None


class TransformerCache:
    """The cache of one transformer."""

    def __init__(self, transformer: nn.Module, family: Family, handle: "CacheHandle") -> None:
        """
        Raises:
            ValueError: the declaration does not fit the transformer, or the policy does not suit it.
        """
        self.handle = handle
        policy = handle.policy
        if isinstance(policy, TeaCache):
            _check_tea(policy, family)
        self._transformer = transformer
        self._family = family
        self._plan = None if isinstance(policy, ScheduledCache) else _plan(transformer, family, policy)
        self._signature = ForwardSignature(transformer, family)
        self._writing = [(blocks.name, blocks.written) for blocks in family.lists if blocks.written is not None]
        self._known_settings: tuple[ThresholdPolicy | None, Settings] = (None, Settings((), 0, None))
        self._adapters = AdapterWatch(transformer)
        self._warned: set[int | None] = set()
        self._generation = 0
        self._thread = _ThreadState()
        self._hook = CallHook(transformer, self._forward, self)
        places = () if self._plan is None else self._plan.places
        self._block_hooks = [CallHook(place.block, self._block_forward(place), self) for place in places]
        self._context_tap = ContextTap(self._context, transformer)

    @property
    def model(self) -> str:
        """Class name of the transformer."""
        return type(self._transformer).__name__

    def install(self) -> None:
        """Put the hooks in."""
        self._hook.install()
        for hook in self._block_hooks:
            hook.install()
        self._context_tap.install()

    def remove(self) -> None:
        """Take the hooks out."""
        self._context_tap.remove()
        for hook in (self._hook, *self._block_hooks):
            hook.remove()
        self.reset()

    def reset(self) -> None:
        """Forget the calls in progress of all threads, each when it comes by next."""
        self._generation += 1
        self._thread.calls.clear()

    def _block_forward(self, place: Place) -> Callable[..., Any]:
        thread = self._thread

        def call(inner: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            current = thread.current
            return inner(*args, **kwargs) if current is None else current.run(place, inner, args, kwargs)

        return call

    def _forward(self, inner: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        thread = self._thread
        if not self.handle.enabled or thread.current is not None:
            return inner(*args, **kwargs)
        self._forget_what_is_old(thread)
        for hook in self._block_hooks:
            if not hook.is_installed():
                hook.install()
        arguments = self._signature.bind(args, kwargs)
        call = thread.calls.find(self._key(arguments), self._witnesses(arguments), self.handle.timesteps)
        try:
            if self._plan is None:
                return self._run_scheduled(call, arguments, lambda: inner(*args, **kwargs))
            current = thread.current = self._pass(self._plan, call, arguments)
            result = inner(*args, **kwargs)
            self._check_complete(call, current)
        except BaseException:
            # the other branches of the same call are interrupted, too
            thread.calls.clear()
            raise
        finally:
            thread.current = None
        return result

    def _forget_what_is_old(self, thread: _ThreadState) -> None:
        """After a reset, and where adapters have changed: of calls on a schedule, all but their place in it."""
        adapters = self._adapters.fingerprint()
        if thread.generation != self._generation or (thread.adapters != adapters and self._plan is not None):
            thread.calls.clear()
        elif thread.adapters != adapters:
            for call in thread.calls:
                for branch in call.branches.values():
                    branch.forget_outputs()
        thread.generation, thread.adapters = self._generation, adapters

    def _branch_at(self, call: Call[Any], positions: tuple[float, ...]) -> tuple[int, str]:
        """Number and name of the branch of a pass."""
        name = self._thread.context[0]
        number = call.branch_at(positions, rising=self._family.rising, named=bool(name))
        label = call.number + number
        return number, f"{name}#{label + 1}" if label else name

    @property
    def _total_steps(self) -> int | None:
        return self._thread.context[1].get("num_inference_steps") or self.handle.num_steps

    def _run_scheduled(self, call: Call[Any], arguments: dict[str, Any], run: Callable[[], Any]) -> Any:
        policy, steps = self.handle.policy, self._total_steps
        assert isinstance(policy, ScheduledCache)
        if policy.schedule is not None and steps not in (None, len(policy.schedule.skip)):
            self._warn_of_steps(steps, len(policy.schedule.skip))
        positions = HostCopy(arguments.get(self._family.timestep)).values(1)
        number, name = self._branch_at(call, positions)
        if number not in call.branches:
            call.branches[number] = ScheduledBranch(name, policy.order)
        branch = call.branches[number]
        step = branch.step
        output, hit = run_step(branch, policy, positions[0], steps, self.handle.trace, run)
        samples = tensors_of(arguments.get(self._family.sample))
        batch = samples[0].shape[0] if len(samples) == 1 else len(samples)
        self.handle.stats.add(StepRecord("all", name, step, positions * batch, (None,) * batch, (hit,) * batch))
        return output

    def _warn_of_steps(self, steps: int | None, expected: int) -> None:
        if steps not in self._warned:
            self._warned.add(steps)
            logger.warning("%s: a schedule for %d steps skips nothing in a call of %d", self.model, expected, steps)

    def _pass(self, plan: Plan, call: Call[Any], arguments: dict[str, Any]) -> ForwardPass:
        def branch_at(positions: tuple[float, ...], make: Callable[[], list[SegmentState]]) -> Branch:
            number, name = self._branch_at(call, positions)
            if number not in call.branches:
                call.branches[number] = Branch(name, make())
            branch: Branch = call.branches[number]
            return branch

        return ForwardPass(
            plan,
            self._settings(),
            HostCopy(arguments.get(self._family.timestep)),
            branch_at,
            self._total_steps,
            [blocks for blocks, argument in self._writing if arguments.get(argument) is not None],
            self.handle.stats.add,
        )

    def _settings(self) -> Settings:
        policy, (known, settings) = self.handle.policy, self._known_settings
        assert not isinstance(policy, ScheduledCache)
        if policy is not known:
            coefficients = None
            if isinstance(policy, TeaCache):
                coefficients = tuple(policy.coefficients or self._family.tea_coefficients or ())
            settings = Settings(policy.rules(), policy.order, coefficients)
            self._known_settings = policy, settings
        return settings

    def _key(self, arguments: dict[str, Any]) -> Hashable:
        family = self._family
        shapes = tuple((t.shape, t.dtype, t.device) for t in tensors_of(arguments.get(family.sample)))
        others = {name: value for name, value in arguments.items() if name != family.timestep}
        return self._thread.context[0], shapes, simple_values(others)

    def _witnesses(self, arguments: dict[str, Any]) -> list[torch.Tensor]:
        return [tensor for name in self._family.call for tensor in tensors_of(arguments.get(name))]

    def _check_complete(self, call: Call[Any], current: ForwardPass) -> None:
        if not current.blocks_seen:
            raise RuntimeError(
                f"{self.model}: no block was called, so nothing can be skipped. Was the model "
                "compiled as a whole? Compile its blocks instead: transformer.compile_repeated_blocks()"
            )
        if current.unfinished():
            if current.skipped():
                raise RuntimeError(
                    f"{self.model}: the model did not call the last block of a list whose blocks "
                    "were skipped, so their residual is missing; remove the cache for such calls"
                )
            # it left blocks out: what was computed says nothing about other steps
            self._thread.calls.forget(call)

    @contextlib.contextmanager
    def _context(self, name: str, **details: Any) -> Iterator[None]:
        earlier, self._thread.context = self._thread.context, (name, details)
        try:
            yield
        finally:
            self._thread.context = earlier


def _plan(transformer: nn.Module, family: Family, policy: ThresholdPolicy) -> Plan:
    double = isinstance(policy, DoubleFirstBlockCache)
    return make_plan(transformer, family, double=double, first_block_runs=not isinstance(policy, TeaCache))


def cache_of(transformer: nn.Module) -> TransformerCache | None:
    """The cache that a transformer has."""
    hook = transformer.__dict__.get("_compiled_call_impl")
    return hook.owner if isinstance(hook, CallHook) else None


def _check_tea(policy: TeaCache, family: Family) -> None:
    if family.modulated is None:
        raise ValueError(
            f"TeaCache: how to get the modulated input of the first block of {family.transformer} is not declared "
            "(`Family.modulated`); use FirstBlockCache, which needs no fit"
        )
    if policy.coefficients is None and family.tea_coefficients is None:
        raise ValueError(
            f"TeaCache: no coefficients were published for {family.transformer}; pass `coefficients`, or use "
            "FirstBlockCache, which needs no fit"
        )
