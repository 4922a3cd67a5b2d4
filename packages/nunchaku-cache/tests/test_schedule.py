"""Schedules: the best of all, found without trying all, and files that say what is wrong with them."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import nunchaku_cache
from nunchaku_cache import FirstBlockCache, Schedule, Trace, find_schedule

Case = Any


@st.composite
def traces(draw: st.DrawFn) -> Trace:
    steps, gap = draw(st.integers(1, 7)), draw(st.integers(1, 4))
    trace = Trace("Toy", gap)
    for step in range(steps):
        trace.add("all", step, 0, ())
        for distance in range(1, min(step, gap) + 1):
            trace.add("all", step, distance, draw(st.lists(st.integers(0, 20).map(float), min_size=1, max_size=2)))
    return trace


def cost(trace: Trace, computed: tuple[int, ...], steps: int) -> float:
    """Total error of computing these steps."""
    total = 0.0
    for step in range(steps):
        gap = step - max(chosen for chosen in computed if chosen <= step)
        total += trace.error("all", step, gap) if gap else 0.0
    return total


@given(trace=traces(), data=st.data())
def test_no_schedule_is_better(trace: Trace, data: st.DataObject) -> None:
    steps = len(trace.errors["all"])
    computed = data.draw(st.integers(1, steps))
    choices = [(0, *rest) for rest in itertools.combinations(range(1, steps), computed - 1)]
    least = min(cost(trace, choice, steps) for choice in choices)
    if least == float("inf"):
        with pytest.raises(ValueError, match="gaps of more than"):
            find_schedule(trace, computed)
        return
    found = find_schedule(trace, computed)
    chosen = tuple(step for step, skipped in enumerate(found.skip) if not skipped)
    assert len(chosen) == computed and chosen[0] == 0
    assert cost(trace, chosen, steps) == pytest.approx(least)
    assert found.error * max(1, sum(found.skip)) == pytest.approx(least)


def test_recorded_found_saved_loaded_used(flux: Case, tmp_path: Path) -> None:
    model = flux.make()
    plain = flux.denoise(model, (0, 1))
    handle = nunchaku_cache.apply(model, FirstBlockCache(threshold=float("inf")))
    with handle.record(max_gap=3) as trace:
        assert torch.equal(flux.denoise(model, (0, 1)), plain), "recording changes nothing"
        flux.denoise(model, (2,))
    assert [len(steps[0]) for steps in trace.errors["all"]] == [0, 3, 3, 3, 3, 3, 3, 3]
    assert trace.error("all", 2, 2) > trace.error("all", 2, 1) > 0
    found = find_schedule(trace, 4)
    found.save(tmp_path / "flux.json")
    assert Schedule.load(tmp_path / "flux.json") == found
    handle = nunchaku_cache.apply(model, FirstBlockCache(schedule=found.skip))
    drawn = flux.denoise(model, (0, 1))
    assert handle.stats.hit_pattern() == [(skipped, skipped) for skipped in found.skip]
    assert 0 < (drawn - plain).abs().max() < 0.2 * plain.abs().max()


def test_what_cannot_be_recorded_or_found_says_so(flux: Case) -> None:
    handle = nunchaku_cache.apply(flux.make(), FirstBlockCache())
    with pytest.raises(ValueError, match="max_gap"), handle.record(max_gap=0):
        pass
    with handle.record() as trace:
        with pytest.raises(RuntimeError, match="under way"), handle.record():
            pass
        with pytest.raises(ValueError, match="nothing was recorded of 'all'"):
            find_schedule(trace, 1)
    trace.add("all", 2, 0, ())
    for computed in (0, 4):
        with pytest.raises(ValueError, match="expected 1 to 3"):
            find_schedule(trace, computed)


GOOD = {"format": "nunchaku-cache schedule 1", "model": "M", "segment": "all", "skip": [False, True], "error": 0.1}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "format"),
        ({"model": 3}, "model"),
        ({"segment": None}, "segment"),
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
