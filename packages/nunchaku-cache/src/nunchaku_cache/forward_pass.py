"""One forward pass of a transformer under a cache: decides per segment, then skips or runs its blocks."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from nunchaku_cache.blocks import NotSplittableError, Streams
from nunchaku_cache.measure import HostCopy, distances, polynomial
from nunchaku_cache.plan import Place, Plan
from nunchaku_cache.policy import Progress, Rule, is_hit
from nunchaku_cache.residuals import ResidualHistory
from nunchaku_cache.stats import StepRecord

Inner = Callable[..., Any]


class SegmentState:
    """What one branch of one call remembers of a segment, for all samples."""

    def __init__(self, batch: int, spans: int, order: int) -> None:
        self.progress = [Progress() for _ in range(batch)]
        self.measured: list[torch.Tensor] | None = None
        self.residuals = [ResidualHistory(batch, order) for _ in range(spans)]


@dataclass
class Branch:
    """What one branch of one call remembers."""

    name: str
    segments: list[SegmentState]


@dataclass(frozen=True)
class Settings:
    """The policy as a forward pass needs it.

    Attributes:
        rules: per segment.
        order: of the forecast.
        tea_coefficients: of TeaCache's polynomial; None: distances are those of first blocks.
    """

    rules: tuple[Rule, ...]
    order: int
    tea_coefficients: tuple[float, ...] | None


@dataclass
class Decision:
    """Which samples skip a segment.

    Attributes:
        hits, misses: indices of samples.
        index: int64, the missing ones, where there are both kinds.
    """

    hits: list[int]
    misses: list[int]
    index: torch.Tensor | None


@dataclass
class Span:
    """Collects what the blocks of a span add, without what the model adds between them.

    Attributes:
        base: streams that went into the first block not yet accounted for.
        last: what the last block returned; the model hands it on unless it has added something.
        partial: what earlier blocks have added.
        finished: the residual was recorded or added.
    """

    base: list[torch.Tensor] | None = None
    last: Any = None
    partial: Streams | None = None
    finished: bool = False

    @torch.no_grad()
    def close(self, outputs: Streams) -> Streams:
        """Account for all blocks so far; returns what they have added."""
        assert self.base is not None
        added: Streams = [
            # under autocast the dtypes differ
            None if new is None else torch.sub(new, old.to(new.dtype))
            for new, old in zip(outputs, self.base, strict=True)
        ]
        if self.partial is not None:
            added = [
                None if new is None or old is None else new.add_(old)
                for new, old in zip(added, self.partial, strict=True)
            ]
        self.base, self.partial = None, added
        return added


class ForwardPass:
    """Runs the blocks of one forward pass.

    The residual of a span is the sum of what its blocks add to their inputs. What the model itself does between blocks
    (ControlNet residuals, concatenation) is no part of it and happens on every step, skipped or not.
    """

    def __init__(
        self,
        plan: Plan,
        settings: Settings,
        timestep: HostCopy,
        branch_at: Callable[[tuple[float, ...], Callable[[], list[SegmentState]]], Branch],
        total_steps: int | None,
        written: Collection[str],
        on_record: Callable[[StepRecord], None],
    ) -> None:
        """
        Args:
            plan: of the transformer.
            settings: of the policy.
            timestep: of the pass, on its way to the host.
            branch_at: (timesteps per sample, how to make segments for a new branch) -> the branch of the pass.
            total_steps: of the call, None if unknown.
            written: names of lists into whose outputs the model writes in this pass (`BlockList.written`).
            on_record: called with every decision.
        """
        self._plan = plan
        self._settings = settings
        self._timestep = timestep
        self._branch_at = branch_at
        self._total_steps = total_steps
        self._written = written
        self._on_record = on_record
        self._branch: Branch | None = None
        self._positions: tuple[float, ...] = ()
        self._decisions: dict[int, Decision] = {}
        self._spans: dict[tuple[int, int], Span] = {}
        self.blocks_seen = 0

    def run(self, place: Place, inner: Inner, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a block, or what stands in for it."""
        self.blocks_seen += 1
        if place.precedes:
            self._decide_before(place, args, kwargs)
        if place.decides:
            inputs = place.signature.inputs(args, kwargs)
            result = inner(*args, **kwargs)
            self._decide_behind(place, inputs, place.signature.outputs(result), args, kwargs)
            return result
        decision = self._decisions.get(place.segment)
        if decision is None:
            # the model left out the block that decides
            return inner(*args, **kwargs)
        span = self._spans.get((place.segment, place.span))
        if span is None:
            span = self._spans[place.segment, place.span] = Span()
        if not decision.misses:
            return self._skip(place, span, place.signature.inputs(args, kwargs))
        if span.last is not None and not place.signature.passes_on(span.last, args, kwargs):
            span.close(place.signature.outputs(span.last))
        span.last = None
        if span.base is None:
            span.base = place.signature.inputs(args, kwargs)
        if decision.index is None:
            result = inner(*args, **kwargs)
        else:
            result = _run_some(place, inner, args, kwargs, decision.index)
        if place.ends_span or place.blocks.name in self._written:
            return self._close(place, span, decision, result)
        span.last = result
        return result

    def unfinished(self) -> bool:
        """Whether blocks ran, or were skipped, whose span the model did not bring to its end."""
        return not all(span.finished for span in self._spans.values())

    def skipped(self) -> bool:
        """Whether a sample skipped blocks."""
        return any(decision.hits for decision in self._decisions.values())

    def _skip(self, place: Place, span: Span, inputs: list[torch.Tensor]) -> Any:
        """What all samples have behind a skipped block: the last one of a span adds what the span would have."""
        streams: Streams = [*inputs]
        if place.ends_span:
            streams = self._residual(place).add_to(streams, self._positions, None)
            span.finished = True
        return place.signature.result(streams)

    def _close(self, place: Place, span: Span, decision: Decision, result: Any) -> Any:
        """Account for what ran; at the end of a span, keep it, and add to the samples that skipped."""
        outputs = place.signature.outputs(result)
        residuals = span.close(outputs)
        if not place.ends_span:
            return result
        some = None if decision.index is None else decision.misses
        self._residual(place).record(residuals, self._positions, some)
        span.finished = True
        if decision.index is None:
            return result
        return place.signature.result(self._residual(place).add_to(outputs, self._positions, decision.hits))

    def _residual(self, place: Place) -> ResidualHistory:
        assert self._branch is not None
        return self._branch.segments[place.segment].residuals[place.span]

    @torch.no_grad()
    def _decide_behind(
        self, place: Place, before: list[torch.Tensor], after: Streams, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        segment = self._plan.segments[place.segment]
        if not segment.spans:
            return
        old = before[: segment.measured]
        new = [stream for stream in after[: segment.measured] if stream is not None]
        state = self._state(place, before[0])
        found: list[float] | None = None
        if state.measured is not None:
            found = distances(new, state.measured, old, place.signature.valid_tokens(args, kwargs))
        decision = self._decide(place, state, found, new[0].device)
        if state.measured is None:
            state.measured = [torch.sub(b, a) for b, a in zip(new, old, strict=True)]
        elif decision.index is None and decision.misses:
            for kept, b, a in zip(state.measured, new, old, strict=True):
                torch.sub(b, a, out=kept)
        elif decision.misses:
            for kept, b, a in zip(state.measured, new, old, strict=True):
                kept[decision.index] = b[decision.index] - a[decision.index]

    @torch.no_grad()
    def _decide_before(self, place: Place, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        modulated, coefficients = self._plan.family.modulated, self._settings.tea_coefficients
        assert modulated is not None and coefficients is not None
        current = [modulated(place.block, place.signature.by_name(args, kwargs))]
        state = self._state(place, current[0])
        found: list[float] | None = None
        if state.measured is not None:
            moved = distances(current, state.measured, None, place.signature.valid_tokens(args, kwargs))
            found = [abs(polynomial(coefficients, distance)) for distance in moved]
        self._decide(place, state, found, current[0].device)
        state.measured = current

    def _state(self, place: Place, stream: torch.Tensor) -> SegmentState:
        """State of a segment, for as many samples as the stream has; finds the branch first."""
        if self._branch is None:
            batch, order = stream.shape[0], self._settings.order
            self._positions = self._timestep.values(batch)
            self._branch = self._branch_at(
                self._positions, lambda: [SegmentState(batch, segment.spans, order) for segment in self._plan.segments]
            )
        return self._branch.segments[place.segment]

    def _decide(
        self, place: Place, state: SegmentState, found: Sequence[float] | None, device: torch.device
    ) -> Decision:
        assert self._branch is not None
        rule, steps = self._settings.rules[place.segment], self._total_steps
        per_sample: list[float | None] = [None] * len(state.progress) if found is None else list(found)
        hits: list[int] = []
        misses: list[int] = []
        for i, (progress, distance) in enumerate(zip(state.progress, per_sample, strict=True)):
            hit = is_hit(rule, progress, distance, steps)
            (hits if hit else misses).append(i)
        self._on_record(
            StepRecord(
                segment=self._plan.segments[place.segment].name,
                branch=self._branch.name,
                step=state.progress[0].step,
                timestep=self._positions,
                distance=tuple(per_sample),
                hit=tuple(i in hits for i in range(len(per_sample))),
            )
        )
        for i, (progress, distance) in enumerate(zip(state.progress, per_sample, strict=True)):
            progress.advance(i in hits, distance)
        index = torch.tensor(misses, device=device) if hits and misses else None
        decision = Decision(hits, misses, index)
        self._decisions[place.segment] = decision
        return decision


def _run_some(place: Place, inner: Inner, args: tuple[Any, ...], kwargs: dict[str, Any], samples: torch.Tensor) -> Any:
    """What a block returns that runs for some samples; the rows of the others are those of its inputs."""
    inputs = place.signature.inputs(args, kwargs)
    try:
        chosen_args, chosen_kwargs = place.signature.take(args, kwargs, inputs[0].shape[0], samples)
    except NotSplittableError:
        whole = place.signature.outputs(inner(*args, **kwargs))
        outputs: Streams = [None if stream is None else stream.index_select(0, samples) for stream in whole]
    else:
        outputs = place.signature.outputs(inner(*chosen_args, **chosen_kwargs))
    return place.signature.result(
        [
            None if new is None else old.index_copy(0, samples, new.to(old.dtype))
            for new, old in zip(outputs, inputs, strict=True)
        ]
    )
