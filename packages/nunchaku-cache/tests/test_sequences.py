"""Random sequences of steps of several calls, against an obvious model of what should happen.

A toy transformer adds what it is told to: its first block `first`, the others `rest` in equal parts. So the model below
knows every distance, every residual and every result as plain numbers.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import nunchaku_cache
from nunchaku_cache import BlockList, Family, FirstBlockCache

BLOCKS = 3
THRESHOLDS = (0.0, 0.1037, 0.3071, 1.0019)  # no distance of round numbers is just as large


class ToyBlock(nn.Module):
    def __init__(self, index: int) -> None:
        super().__init__()
        self.index = index

    def forward(self, hidden_states: torch.Tensor, first: Any, rest: Any, broken: bool) -> torch.Tensor:
        if broken and self.index == 1:
            raise RuntimeError("broken on purpose")
        return hidden_states + (first if self.index == 0 else rest / (BLOCKS - 1))


class Toy(nn.Module):
    """hidden_states (B, T, C), first (B, 1, 1), rest (B, 1, 1) -> hidden_states + first + rest."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(ToyBlock(i) for i in range(BLOCKS))

    def forward(
        self, hidden_states: torch.Tensor, timestep: Any, prompt: Any, first: Any, rest: Any, broken: bool = False
    ) -> torch.Tensor:
        for block in self.blocks:
            hidden_states = block(hidden_states, first, rest, broken)
        return hidden_states


FAMILY = Family("Toy", (BlockList("blocks"),), call=("prompt",))


@dataclass
class Computed:
    """A computed step of one sample."""

    timestep: float
    first: float
    rest: float


@dataclass
class ModelOfSample:
    """All that ever happened to one sample of one branch: what was computed, and how many hits came behind it."""

    computed: list[Computed] = field(default_factory=list)
    row: list[float] = field(default_factory=list)

    def step(
        self, policy: FirstBlockCache, timestep: float, first: float, rest: float, index: int
    ) -> tuple[bool, float | None, float]:
        """Hit or not, the distance, and what stands for `rest`."""
        distance = None
        if self.computed:
            last = self.computed[-1].first
            change = abs(last - first)
            distance = change / abs(last) if last else change * math.inf  # 0 / 0 is NaN
        measure = sum(self.row) + (distance or 0) if policy.accumulate else distance
        limit = policy.max_consecutive_hits
        hit = (
            measure is not None
            and distance is not None
            and measure < policy.threshold
            and index >= policy.warmup_steps
            and (limit is None or len(self.row) < limit)
        )
        if hit:
            assert distance is not None
            self.row.append(distance)
            return True, distance, self.extrapolate(policy.order, timestep)
        self.row = []
        self.computed.append(Computed(timestep, first, rest))
        return False, distance, rest

    def extrapolate(self, order: int, timestep: float) -> float:
        """Lagrange's polynomial through the last computed values."""
        nodes = self.computed[-order - 1 :]
        total = 0.0
        for node in nodes:
            weight = 1.0
            for other in nodes:
                if other is not node:
                    weight *= (timestep - other.timestep) / (node.timestep - other.timestep)
            total += weight * node.rest
        return total


@dataclass
class ModelOfCall:
    """One call: where it is, and its branches."""

    prompt: torch.Tensor
    batch: int
    tokens: int
    timestep: float | None = None
    branch: int = 0
    branches: dict[int, list[ModelOfSample]] = field(default_factory=dict)
    steps: dict[int, int] = field(default_factory=dict)

    def enter(self, timestep: float) -> int:
        """The branch of a pass."""
        if timestep == self.timestep:
            self.branch += 1
        else:
            if self.timestep is not None and timestep > self.timestep:
                self.forget()
            self.timestep, self.branch = timestep, 0
        return self.branch

    def forget(self) -> None:
        """A new call, or an interrupted one."""
        self.branches, self.steps, self.timestep, self.branch = {}, {}, None, 0


steps = st.fixed_dictionaries(
    {
        "call": st.integers(0, 2),
        "timestep": st.sampled_from(["down", "down", "down", "down", "same", "up"]),
        "action": st.sampled_from([""] * 12 + ["break", "threshold", "reset", "disabled", "new prompt", "new shape"]),
        "firsts": st.lists(st.integers(50, 150).map(lambda n: n / 100) | st.just(0.0), min_size=3, max_size=3),
        "rests": st.lists(st.integers(-16, 16).map(lambda n: n / 8), min_size=3, max_size=3),
        "threshold": st.sampled_from(THRESHOLDS),
    }
)
policies = st.builds(
    FirstBlockCache,
    threshold=st.sampled_from(THRESHOLDS[1:]),
    warmup_steps=st.integers(0, 2),
    max_consecutive_hits=st.none() | st.integers(0, 3),
    accumulate=st.booleans(),
    order=st.integers(0, 2),
)


@given(policy=policies, sequence=st.lists(steps, min_size=1, max_size=40))
@settings(max_examples=300, deadline=None)
def test_any_sequence_of_steps_does_what_the_model_says(
    policy: FirstBlockCache, sequence: list[dict[str, Any]]
) -> None:
    toy = Toy().double()
    handle = nunchaku_cache.apply(toy, policy, family=FAMILY)
    # two of them differ in nothing but that they have prompts of their own, of the same values
    calls = [ModelOfCall(torch.zeros(1), batch, 2) for batch in (2, 2, 3)]
    for number, step in enumerate(sequence, 1):
        call, action = calls[step["call"]], step["action"]
        if action == "threshold":
            handle.threshold = step["threshold"]
        elif action == "reset":
            handle.reset()
            for other in calls:
                other.forget()
        elif action == "new prompt":
            call.prompt = torch.full((1,), float(number))
            call.forget()
        elif action == "new shape":
            call.tokens += 1
            call.forget()
        current = handle.policy
        assert isinstance(current, FirstBlockCache)
        move = {"down": 0.875, "same": 1.0, "up": 1.25}[step["timestep"]]
        timestep = 1.0 if call.timestep is None else call.timestep * move
        firsts, rests = step["firsts"][: call.batch], step["rests"][: call.batch]
        arguments = {
            "hidden_states": torch.zeros(call.batch, call.tokens, 4, dtype=torch.float64),
            "timestep": torch.full((call.batch,), timestep, dtype=torch.float64),
            "prompt": call.prompt,
            "first": torch.tensor(firsts, dtype=torch.float64).view(-1, 1, 1),
            "rest": torch.tensor(rests, dtype=torch.float64).view(-1, 1, 1),
        }
        if action == "disabled":
            with handle.disabled():
                result = toy(**arguments)
            for other in calls:
                other.forget()
            torch.testing.assert_close(result, (arguments["first"] + arguments["rest"]).expand_as(result))
            continue
        handle.stats.reset()
        try:
            result = toy(**arguments, broken=action == "break")
        except RuntimeError:
            for other in calls:
                other.forget()
            continue
        branch = call.enter(timestep)
        samples = call.branches.setdefault(branch, [ModelOfSample() for _ in range(call.batch)])
        index = call.steps.get(branch, 0)
        call.steps[branch] = index + 1
        (record,) = handle.stats.steps
        for i, sample in enumerate(samples):
            hit, distance, rest = sample.step(current, timestep, firsts[i], rests[i], index)
            assert record.hit[i] == hit
            expected = torch.full((call.tokens, 4), firsts[i] + rest, dtype=torch.float64)
            torch.testing.assert_close(result[i], expected, rtol=1e-6, atol=1e-6)
            if distance is None:
                assert record.distance[i] is None
            else:
                torch.testing.assert_close(record.distance[i], distance, rtol=1e-5, atol=1e-7, equal_nan=True)
