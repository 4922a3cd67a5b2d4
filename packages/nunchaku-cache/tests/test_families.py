"""What holds for every declared transformer: exactness, independence of samples, no trace left."""

from typing import Any

import pytest
import torch
from torch import nn

import nunchaku_cache
from nunchaku_cache import DoubleFirstBlockCache, FirstBlockCache

Case = Any
SAMPLES = (0, 1, 2)


def median_distance(handle: nunchaku_cache.CacheHandle, segment: str) -> float:
    """A threshold that some samples pass at some steps."""
    known = sorted(d for distances in handle.stats.distances(segment) for d in distances if d is not None)
    assert known
    return known[len(known) // 2]


def test_threshold_0_changes_no_bit_and_nothing_is_left_behind(case: Case, model: nn.Module) -> None:
    before = [dict(module.__dict__) for module in model.modules()]
    plain = case.denoise(model, SAMPLES)
    handle = nunchaku_cache.apply(model, FirstBlockCache(threshold=0))
    assert torch.equal(case.denoise(model, SAMPLES), plain)
    assert handle.stats.hits == 0
    handle.remove()
    assert [dict(module.__dict__) for module in model.modules()] == before
    assert torch.equal(case.denoise(model, SAMPLES), plain)


def test_a_sample_in_a_batch_is_decided_and_drawn_as_if_alone(case: Case, model: nn.Module) -> None:
    plain = case.denoise(model, SAMPLES)
    handle = nunchaku_cache.apply(model, FirstBlockCache(threshold=0, order=1))
    try:
        case.denoise(model, SAMPLES)
        handle.threshold = median_distance(handle, "all")
        handle.stats.reset()
        batch = case.denoise(model, SAMPLES)
        pattern = handle.stats.hit_pattern()
        assert handle.stats.hits and handle.stats.misses > len(SAMPLES)
        for i in SAMPLES:
            handle.stats.reset()
            alone = case.denoise(model, (i,))
            assert handle.stats.hit_pattern() == [(hits[i],) for hits in pattern]
            with handle.disabled():
                noise_of_batching = (case.denoise(model, (i,))[0] - plain[i]).abs().max()
            assert (alone[0] - batch[i]).abs().max() <= 10 * noise_of_batching + 1e-5
    finally:
        handle.remove()


def test_joint_and_single_blocks_are_decided_apart(double_case: Case) -> None:
    model = double_case.make()
    plain = double_case.denoise(model, SAMPLES)
    handle = nunchaku_cache.apply(model, DoubleFirstBlockCache(threshold=0, single_threshold=0))
    assert torch.equal(double_case.denoise(model, SAMPLES), plain)
    joint, single = median_distance(handle, "joint"), median_distance(handle, "single")
    for policy, skips in (
        (DoubleFirstBlockCache(threshold=joint, single_threshold=-1), {"joint"}),
        (DoubleFirstBlockCache(threshold=0, single_threshold=single), {"single"}),
    ):
        handle = nunchaku_cache.apply(model, policy)
        double_case.denoise(model, SAMPLES)
        assert {record.segment for record in handle.stats.steps if any(record.hit)} == skips


def test_undeclared_transformers_are_told_what_to_declare() -> None:
    class Unknown(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])

    with pytest.raises(ValueError, match=r"(?s)Unknown is not declared.*layers \(2 x Linear\).*BlockList"):
        nunchaku_cache.apply(Unknown(), FirstBlockCache())
