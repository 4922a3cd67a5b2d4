"""The decision for one sample, against one that looks at the whole history each time."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nunchaku_cache import DoubleFirstBlockCache, FirstBlockCache, TeaCache
from nunchaku_cache.policy import Progress, Rule, is_hit

distances = st.floats(0, 1) | st.sampled_from([0.0, 0.5, math.inf, math.nan])
thresholds = st.floats(-0.1, 1) | st.sampled_from([0.0, 0.5, math.inf])
rules = st.builds(
    Rule,
    threshold=thresholds,
    warmup_steps=st.integers(0, 4),
    final_steps=st.integers(0, 4),
    max_consecutive_hits=st.none() | st.integers(0, 4),
    accumulate=st.booleans(),
    schedule=st.none() | st.lists(st.booleans() | thresholds, max_size=12).map(tuple),
)


def obviously_hit(rule: Rule, history: list[tuple[bool, float]], distance: float, steps: int) -> bool:
    """From all earlier (hit, distance): the conditions as the documentation states them, one after another."""
    step = len(history)
    if all(hit for hit, _ in history):
        return False  # nothing was computed yet
    if step < rule.warmup_steps or steps - step <= rule.final_steps:
        return False
    row = []  # distances of the hits since the last computed step
    for hit, known in history:
        row = [*row, known] if hit else []
    if rule.max_consecutive_hits is not None and len(row) + 1 > rule.max_consecutive_hits:
        return False
    threshold = rule.threshold
    if rule.schedule is not None:
        if step >= len(rule.schedule) or rule.schedule[step] is False:
            return False
        if rule.schedule[step] is True:
            return True
        threshold = rule.schedule[step]
    return (sum(row) + distance if rule.accumulate else distance) < threshold


@given(rule=rules, given_distances=st.lists(distances, max_size=12), later=st.integers(0, 3))
def test_decisions_are_what_the_history_says(rule: Rule, given_distances: list[float], later: int) -> None:
    steps = len(given_distances) + later
    progress, history = Progress(), []
    for distance in given_distances:
        hit = is_hit(rule, progress, distance, steps)
        assert hit == obviously_hit(rule, history, distance, steps)
        progress.advance(hit, distance)
        history.append((hit, distance))


@given(rule=rules, given_distances=st.lists(distances, min_size=1, max_size=12))
def test_threshold_0_never_skips_and_the_first_step_never_is(rule: Rule, given_distances: list[float]) -> None:
    progress = Progress()
    assert not is_hit(rule, progress, given_distances[0], 12)
    never = Rule(0.0, accumulate=rule.accumulate)
    for distance in given_distances:
        assert not is_hit(never, progress, distance, None)
        progress.advance(False, distance)


def test_final_steps_need_the_number_of_steps() -> None:
    progress = Progress(step=1, has_residual=True)
    with pytest.raises(ValueError, match=r"final_steps=2.*num_steps"):
        is_hit(Rule(1.0, final_steps=2), progress, 0.0, None)


@pytest.mark.parametrize("kind", [FirstBlockCache, DoubleFirstBlockCache, TeaCache])
@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"threshold": math.nan}, ValueError),
        ({"threshold": "0.1"}, TypeError),
        ({"threshold": True}, TypeError),
        ({"warmup_steps": -1}, ValueError),
        ({"warmup_steps": 1.5}, TypeError),
        ({"final_steps": -1}, ValueError),
        ({"max_consecutive_hits": -1}, ValueError),
        ({"num_steps": 0}, ValueError),
        ({"order": 3}, ValueError),
        ({"order": -1}, ValueError),
    ],
)
def test_wrong_values_are_named(kind: Any, arguments: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error, match=next(iter(arguments))):
        kind(**arguments)


def test_wrong_schedules_and_coefficients_are_named() -> None:
    with pytest.raises(ValueError, match=r"schedule\[1\]"):
        FirstBlockCache(schedule=(True, math.nan))
    with pytest.raises(TypeError, match=r"single_schedule\[0\]"):
        DoubleFirstBlockCache(single_schedule=("yes",))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="accumulate"):
        FirstBlockCache(accumulate=1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="coefficients"):
        TeaCache(coefficients=())
    assert hash(FirstBlockCache(schedule=[False, True])) == hash(FirstBlockCache(schedule=(False, True)))


def test_single_blocks_follow_the_joint_ones_unless_said_otherwise() -> None:
    joint, single = DoubleFirstBlockCache(threshold=0.3, schedule=(False, 0.2)).rules()
    assert joint == single
    joint, single = DoubleFirstBlockCache(0.3, 0.4, schedule=(False,), single_schedule=(True,)).rules()
    assert (joint.threshold, joint.schedule) == (0.3, (False,))
    assert (single.threshold, single.schedule) == (0.4, (True,))
