"""What the kernels read of an `SVDQLinear` that has adapters: its own low-rank branch, longer by their ranks."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from nunchaku_kernels._checks import ceil_to
from nunchaku_kernels.formats import (
    join_lowrank,
    pack_lowrank_down,
    pack_lowrank_up,
    pack_vector,
    unpack_lowrank_up,
)
from nunchaku_kernels.formats.svdq import RANK_ALIGNMENT
from nunchaku_kernels.nn._derived import DerivedTensors
from nunchaku_kernels.nn.adapters import (
    Group,
    PlacedTerm,
    check_terms,
    group_terms,
    ingredients,
    needs_gradient,
    stacked_down,
    stacked_up,
    strength_pattern,
    strength_vector,
    strengths_of,
    summed,
    tensors_of,
    total_rank,
)


class LowRank(NamedTuple):
    """The tensors of a layer's tail in the published order, N and K padded: `proj_down` (K, R), `proj_up` (N, R),
    `rank_scale` (R) float32 or None, `bias` (N) or None, `wcscales` (N) or None."""

    proj_down: torch.Tensor
    proj_up: torch.Tensor
    rank_scale: torch.Tensor | None
    bias: torch.Tensor | None
    wcscales: torch.Tensor | None


class AtZero(NamedTuple):
    """What a layer's main product is for x = 0, where that is not 0."""

    product: Callable[[], torch.Tensor]  # gives it, (N) in natural order
    sources: tuple[torch.Tensor, ...]  # what it is made from


class _Factors(NamedTuple):
    proj_down: torch.Tensor
    proj_up: torch.Tensor
    firsts: tuple[int, ...]  # of each group of terms that share ranks, the index of the first
    vectors: DerivedTensors  # the latest `_Vectors` that went with them


class _Vectors(NamedTuple):
    rank_scale: torch.Tensor
    bias: torch.Tensor | None
    wcscales: torch.Tensor | None


class RankAxis:
    """Joins stored and adapters' factors: the factors when one of them changes, a few vectors when a strength does.

    In a compiled graph, and where a gradient towards a factor is asked for, everything is made anew by differentiable
    operations.

    Args:
        factors: where joined factors are kept; those of sets of adapters that acted before too, as far as it keeps any.
    """

    def __init__(self, factors: DerivedTensors) -> None:
        self._factors = factors
        self._joined = DerivedTensors()

    def clear(self) -> None:
        """Free what was made from `factors`, which may be cleared, too."""
        self._joined.clear()

    def extend(
        self,
        label: str,
        stored: LowRank,
        placed: Sequence[PlacedTerm],
        at_zero: AtZero | None,
    ) -> LowRank:
        """`stored` with the terms of adapters.

        Args:
            label: how error messages call the layer.
            stored: the layer's own.
            placed: at least one term.
            at_zero: for a layer with a shift: a row's gain must scale W x and leave W times the shift.

        Raises:
            ValueError: a term's shapes are not those of its place.
        """
        if torch.compiler.is_compiling() or needs_gradient(placed):
            check_terms(label, placed)
            groups = group_terms(placed, share=False)
            down, up = _join(stored, placed, groups)
            return LowRank(down, up, *_vectors(stored, placed, groups, down.shape[1], at_zero))
        key, tensors = ingredients(placed)
        # Where terms are nothing but factors and numbers, bias and wcscales stay the layer's own and need no look.
        plain = len(tensors) == 2 * len(placed)
        for own in stored[:3] if plain else stored:
            if own is None:
                key.append(len(tensors))
            else:
                tensors.append(own)
        if at_zero is not None and not plain:
            tensors += at_zero.sources

        def make() -> LowRank:
            factors = self._joined_factors(label, stored, placed)

            def make_vectors() -> _Vectors:
                with torch.inference_mode(False), torch.no_grad():  # what is kept must be usable outside of either
                    groups = [Group(placed[i], []) for i in factors.firsts]
                    return _vectors(stored, placed, groups, factors.proj_down.shape[1], at_zero)

            return LowRank(factors.proj_down, factors.proj_up, *factors.vectors.get(tensors, make_vectors, key))

        joined: LowRank = self._joined.get(tensors, make, key)
        return LowRank(*joined[:3], stored.bias, stored.wcscales) if plain else joined

    def _joined_factors(self, label: str, stored: LowRank, placed: Sequence[PlacedTerm]) -> _Factors:
        gains = tensors_of(placed, "gain")
        # With gains, the stored up factor is scaled by a strength too.
        strengths = strengths_of(placed) if gains else None
        layout = (tuple(item.place for item in placed), strength_pattern(placed), strengths)
        sources = (stored.proj_down, stored.proj_up, *tensors_of(placed, "down", "up"), *gains)
        if gains:
            sources += tensors_of(placed, "strength")

        def make() -> _Factors:
            check_terms(label, placed)
            with torch.inference_mode(False), torch.no_grad():
                groups = group_terms(placed, share=True)
                down, up = _join(stored, placed, groups)
            firsts = (next(i for i, item in enumerate(placed) if item is group.first) for group in groups)
            return _Factors(down, up, tuple(firsts), DerivedTensors())

        factors: _Factors = self._factors.get(sources, make, layout)
        return factors


def _join(stored: LowRank, placed: Sequence[PlacedTerm], groups: Sequence[Group]) -> tuple[torch.Tensor, torch.Tensor]:
    """The down and the up factor of the layer and of all groups, in the published order."""
    width, height = stored.proj_down.shape[0], stored.proj_up.shape[0]
    ranks = ceil_to(total_rank(groups), RANK_ALIGNMENT)
    down = pack_lowrank_down(stacked_down(groups, ranks, width, stored.proj_down))
    up = pack_lowrank_up(stacked_up(groups, height, ranks, stored.proj_up))
    own_up, factor = stored.proj_up, summed(placed, "gain", height, down.device)
    if factor is not None and own_up.shape[1]:
        scaled = unpack_lowrank_up(own_up).float() * (1 + factor).unsqueeze(1)
        own_up = pack_lowrank_up(scaled.to(own_up.dtype))
    return join_lowrank(stored.proj_down, down), join_lowrank(own_up, up)


def _vectors(
    stored: LowRank,
    placed: Sequence[PlacedTerm],
    groups: Sequence[Group],
    rank: int,
    at_zero: AtZero | None,
) -> _Vectors:
    own, device, height = stored.proj_down.shape[1], stored.proj_down.device, stored.proj_up.shape[0]
    scale = stored.rank_scale
    if scale is None:
        scale = torch.ones(own, dtype=torch.float32, device=device)
    rank_scale = torch.cat([scale, strength_vector(groups, rank - own, device)])
    bias, more = stored.bias, summed(placed, "bias", height, device)
    wcscales, gain = stored.wcscales, summed(placed, "gain", height, device)
    if gain is not None and at_zero is not None:
        surplus = gain * at_zero.product()
        more = -surplus if more is None else more - surplus
    if more is not None:
        more = pack_vector(more)
        bias = more if bias is None else bias.float() + more
    if gain is not None:
        factor = pack_vector(1 + gain)
        wcscales = factor if wcscales is None else wcscales.float() * factor
    return _Vectors(rank_scale, bias, wcscales)
