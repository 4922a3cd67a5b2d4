"""Schedules: the best of all, found without trying all; forecasts; and files that say what is wrong with them."""

import itertools
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import nunchaku_cache
from nunchaku_cache import FirstBlockCache, Schedule, ScheduledCache, Trace, find_schedule
from nunchaku_cache.scheduled import ScheduledBranch

Case = Any


@st.composite
def outputs(draw: st.DrawFn) -> tuple[torch.Tensor, list[float]]:
    """Outputs (steps, channels) of a made-up call, and its falling timesteps."""
    steps = draw(st.integers(1, 7))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    gaps = draw(st.lists(st.floats(0.05, 1), min_size=steps, max_size=steps))
    return torch.randn(steps, 5, generator=generator, dtype=torch.float64), [sum(gaps[i:]) for i in range(steps)]


def trace_of(found: torch.Tensor, timesteps: list[float], max_gap: int) -> Trace:
    trace = Trace("Toy", max_gap)
    for step, timestep in enumerate(timesteps):
        trace.add(step, timestep, [float(found[step] @ found[step - gap]) for gap in range(min(step, max_gap) + 1)])
    return trace


def cost(found: torch.Tensor, timesteps: list[float], computed: tuple[int, ...], order: int, emphasis: float) -> float:
    """Weighted error of computing these steps: what lies outside of the span of the outputs that a forecast may use."""
    ways = [a - b for a, b in itertools.pairwise(timesteps)]
    ways = [*ways, ways[-1] if ways else 1.0]
    total = 0.0
    for step in range(len(timesteps)):
        if step in computed:
            continue
        nodes = sorted((node for node in computed if node < step), reverse=True)[: order + 1]
        basis = found[nodes].T
        missed = found[step] - basis @ torch.linalg.lstsq(basis, found[step][:, None]).solution[:, 0]
        weight = (ways[step] / sum(ways)) ** 2 * (sum(ways[step:]) / sum(ways)) ** -emphasis
        total += weight * float(missed.square().sum() / found[step].square().sum())
    return total


@given(call=outputs(), order=st.integers(0, 2), emphasis=st.sampled_from([0.0, 0.7, 2.0]), data=st.data())
def test_no_schedule_is_better(
    call: tuple[torch.Tensor, list[float]], order: int, emphasis: float, data: st.DataObject
) -> None:
    found, timesteps = call
    steps = len(timesteps)
    computed = data.draw(st.integers(1, steps))
    choices = [(0, *rest) for rest in itertools.combinations(range(1, steps), computed - 1)]
    least = min(cost(found, timesteps, choice, order, emphasis) for choice in choices)
    schedule = find_schedule(trace_of(found, timesteps, steps), computed, order=order, late_emphasis=emphasis)
    chosen = tuple(step for step, skipped in enumerate(schedule.skip) if not skipped)
    assert len(chosen) == computed and chosen[0] == 0
    assert cost(found, timesteps, chosen, order, emphasis) == pytest.approx(least, rel=1e-6, abs=1e-12)


@given(call=outputs(), max_gap=st.integers(1, 3), data=st.data())
def test_gaps_stay_within_what_was_recorded(
    call: tuple[torch.Tensor, list[float]], max_gap: int, data: st.DataObject
) -> None:
    found, timesteps = call
    steps = len(timesteps)
    computed = data.draw(st.integers(1, steps))
    trace = trace_of(found, timesteps, max_gap)
    if computed * (max_gap + 1) < steps:
        with pytest.raises(ValueError, match="gaps of more than"):
            find_schedule(trace, computed)
        return
    skip = find_schedule(trace, computed).skip
    assert all(len(list(run)) <= max_gap for skipped, run in itertools.groupby(skip) if skipped)


@given(call=outputs(), order=st.integers(0, 2), data=st.data())
def test_forecasts_are_projections(call: tuple[torch.Tensor, list[float]], order: int, data: st.DataObject) -> None:
    found, timesteps = call
    steps = len(timesteps)
    schedule = find_schedule(trace_of(found, timesteps, steps), data.draw(st.integers(1, steps)), order=order)
    policy = ScheduledCache(schedule)
    branch = ScheduledBranch("", policy.order)
    computed: list[int] = []
    for step, timestep in enumerate(timesteps):
        if not branch.skips(policy, steps):
            branch.record((found[step],), timestep, None)
            computed.append(step)
            continue
        (forecast,) = branch.forecast(policy, timestep)
        basis = found[computed[-order - 1 :]].T
        expected = basis @ torch.linalg.lstsq(basis, found[step][:, None]).solution[:, 0]
        torch.testing.assert_close(forecast, expected, rtol=1e-3, atol=1e-3)
    assert computed == [step for step, skipped in enumerate(schedule.skip) if not skipped]


@given(call=outputs(), order=st.integers(0, 2))
def test_undamped_forecasts_are_exact_on_polynomials(call: tuple[torch.Tensor, list[float]], order: int) -> None:
    coefficients, timesteps = call
    assume(len(timesteps) > order + 1)
    found = sum(coefficients[k] * torch.tensor(timesteps, dtype=torch.float64)[:, None] ** k for k in range(order + 1))
    skip = tuple(step > order for step in range(len(timesteps)))
    policy = ScheduledCache(Schedule("Toy", skip, tuple((1.0,) * (order + 1) if s else () for s in skip), 0.0))
    branch = ScheduledBranch("", policy.order)
    for step, timestep in enumerate(timesteps):
        if not branch.skips(policy, None):
            branch.record((found[step],), timestep, None)
            continue
        (forecast,) = branch.forecast(policy, timestep)
        torch.testing.assert_close(forecast, found[step], rtol=1e-2, atol=1e-2)  # differences in float32


def test_recorded_found_saved_loaded_used(flux: Case, tmp_path: Path) -> None:
    model = flux.make()
    plain = flux.denoise(model, (0, 1))
    handle = nunchaku_cache.apply(model, ScheduledCache())
    with handle.record(max_gap=7) as trace:
        assert torch.equal(flux.denoise(model, (0, 1)), plain), "recording changes nothing"
        flux.denoise(model, (2,))
    steps = len(trace.timesteps)
    assert trace.timesteps == sorted(trace.timesteps, reverse=True)
    found = find_schedule(trace, 4)
    found.save(tmp_path / "flux.json")
    assert Schedule.load(tmp_path / "flux.json") == found
    assert list(tmp_path.iterdir()) == [tmp_path / "flux.json"]
    handle.stats.reset()
    handle.policy = ScheduledCache(found)
    drawn = flux.denoise(model, (0, 1))
    assert handle.stats.hit_pattern() == [(skipped, skipped) for skipped in found.skip]
    assert 0 < (drawn - plain).abs().max() < 0.2 * plain.abs().max()
    assert torch.equal(flux.denoise(model, (0, 1)), drawn), "the second call starts anew"
    handle.policy = ScheduledCache(find_schedule(trace, steps))
    assert torch.equal(flux.denoise(model, (0, 1)), plain)
    handle.remove()
    assert torch.equal(flux.denoise(model, (0, 1)), plain)


def test_batches_are_their_samples(flux: Case) -> None:
    model = flux.make()
    handle = nunchaku_cache.apply(model, ScheduledCache())
    with handle.record() as trace:
        flux.denoise(model, (5,))
    handle.policy = ScheduledCache(find_schedule(trace, 4))
    together = flux.denoise(model, (0, 1))
    alone = torch.cat([flux.denoise(model, (seed,)) for seed in (0, 1)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


def test_other_numbers_of_steps_are_computed_and_said(flux: Case, caplog: pytest.LogCaptureFixture) -> None:
    model = flux.make()
    plain = flux.denoise(model, (0,))
    handle = nunchaku_cache.apply(model, ScheduledCache(Schedule("M", (False, True), ((), (1.0,)), 0.1), num_steps=8))
    with caplog.at_level(logging.WARNING, logger="nunchaku_cache"):
        assert torch.equal(flux.denoise(model, (0,)), plain)
    assert "a schedule for 2 steps skips nothing in a call of 8" in caplog.text
    assert handle.stats.hits == 0


def test_what_cannot_be_recorded_or_found_says_so(flux: Case) -> None:
    with (
        pytest.raises(ValueError, match="expected the policy ScheduledCache"),
        nunchaku_cache.apply(flux.make(), FirstBlockCache()).record(),
    ):
        pass
    handle = nunchaku_cache.apply(flux.make(), ScheduledCache())
    with pytest.raises(ValueError, match="has none"):
        handle.threshold = 0.1
    with pytest.raises(ValueError, match="max_gap"), handle.record(max_gap=0):
        pass
    with handle.record() as trace:
        with pytest.raises(RuntimeError, match="under way"), handle.record():
            pass
        with pytest.raises(ValueError, match="nothing was recorded"):
            find_schedule(trace, 1)
    trace.add(2, 0.5, [1.0])
    for computed in (0, 4):
        with pytest.raises(ValueError, match="expected 1 to 3"):
            find_schedule(trace, computed)
    with pytest.raises(ValueError, match="order"):
        find_schedule(trace, 1, order=3)
    with pytest.raises(TypeError, match="schedule"):
        ScheduledCache([False, True])  # type: ignore[arg-type]


GOOD = {
    "format": "nunchaku-cache schedule 1",
    "model": "M",
    "skip": [False, True],
    "damping": [[], [1.0, 0.5]],
    "error": 0.1,
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "format"),
        ({"model": 3}, "model"),
        ({"damping": [[]]}, "damping"),
        ({"damping": [[], []]}, r"damping\[1\]"),
        ({"damping": [[1.0], [1.0]]}, r"damping\[0\]"),
        ({"damping": [[], [1, 2, 3, 4]]}, r"damping\[1\]"),
        ({"damping": [[], [1e9]]}, r"damping\[1\]"),
        ({"damping": [[], [float("inf")]]}, r"damping\[1\]"),
        ({"damping": [[], ["1"]]}, r"damping\[1\]"),
        ({"skip": []}, "skip"),
        ({"skip": [False, 1]}, "skip"),
        ({"skip": [True]}, "begin with false"),
        ({"skip": "no"}, "skip"),
        ({"error": -1}, "error"),
        ({"error": True}, "error"),
        ({"error": float("nan")}, "error"),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = tmp_path / "schedule.json"
    path.write_text(json.dumps(GOOD | change))
    with pytest.raises(ValueError, match=message) as error:
        Schedule.load(path)
    assert "schedule.json" in str(error.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000])
def test_files_that_are_no_schedule_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "schedule.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"schedule\.json"):
        Schedule.load(path)
    path.write_text(json.dumps(GOOD))
    assert Schedule.load(path).skip == (False, True)
