"""Low-rank adapters (LoRA) on a layer: what acts beside the stored tensors, and never in them.

An adapter is attached to a layer for a range of its output rows, or to a `LinearSlice`, which knows the ranges. The
layer asks its adapters for their terms on every call, so a strength, a factor or the set of active adapters may change
at any time without telling it; what kernels read is derived from the factors once and kept.
"""

import copy
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, Self

import torch
from torch.nn.functional import pad


class AdapterTerm(NamedTuple):
    """What an adapter adds to y = W x + bias: `strength * (up (down x) + bias + gain * (W x))`.

    Attributes:
        down: (r, in_features) of the original linear, any floating-point dtype and device.
        up: (out_features, r) of the original linear.
        strength: a number, or a 0-d tensor where it must change without recompilation.
        bias: (out_features), or None.
        gain: (out_features), what DoRA's factor of a row exceeds 1 by; None for plain LoRA. W is the stored weight
            with the stored low-rank branch.
    """

    down: torch.Tensor
    up: torch.Tensor
    strength: float | torch.Tensor = 1.0
    bias: torch.Tensor | None = None
    gain: torch.Tensor | None = None


class Adapter(Protocol):
    """Whatever has terms for a linear. Asked on every call of the layer: the answer must be cheap."""

    def terms(self) -> Sequence[AdapterTerm]:
        """The terms that act now; none while the adapter is off, or acts by itself."""
        ...


@dataclass(eq=False)
class LowRankAdapter:
    """An adapter of one term, whose fields may be assigned at any time. See `AdapterTerm`."""

    down: torch.Tensor
    up: torch.Tensor
    strength: float | torch.Tensor = 1.0
    bias: torch.Tensor | None = None
    gain: torch.Tensor | None = None

    def terms(self) -> tuple[AdapterTerm, ...]:
        """The one term."""
        return (AdapterTerm(self.down, self.up, self.strength, self.bias, self.gain),)


class Place(NamedTuple):
    """The place of a linear in the layer that computes it.

    Attributes:
        rows: the layer's output rows that are the linear's.
        columns: the linear's input columns that the layer holds.
        last: whether the columns are the linear's last, where a linear that is split by columns has its bias.
    """

    rows: tuple[int, int]
    columns: tuple[int, int]
    last: bool


class PlacedTerm(NamedTuple):
    """A term, in the coordinates of the original linear, with the place that this has in a layer."""

    term: AdapterTerm
    place: Place


class _Attachment(NamedTuple):
    adapter: Callable[[], Adapter | None]
    place: Place
    kept: bool


class AdapterSet:
    """The adapters of one layer.

    Those that are modules of their own (a wrapper around a linear) are held weakly: one that leaves the model takes its
    terms with it. Copies of a layer have the copies of its adapters.
    """

    def __init__(self) -> None:
        self._attachments: tuple[_Attachment, ...] = ()

    def attach(
        self, adapter: Adapter, rows: tuple[int, int], columns: tuple[int, int], *, last: bool = True, keep: bool = True
    ) -> None:
        """Add an adapter, once per place.

        Args:
            adapter: what is asked for terms.
            rows, columns, last: see `Place`.
            keep: hold a reference; else the adapter acts only for as long as somebody else holds it.
        """
        live = [found for found in self._attachments if found.adapter() is not None]
        if not any(found.adapter() is adapter and found.place.rows == rows for found in live):
            reference = _Kept(adapter) if keep else weakref.ref(adapter)
            live.append(_Attachment(reference, Place(rows, columns, last), keep))
        self._attachments = tuple(live)

    def detach(self, adapter: Adapter) -> None:
        """Remove an adapter from all its places; nothing happens if it has none."""
        self._attachments = tuple(found for found in self._attachments if found.adapter() not in (adapter, None))

    def placed(self) -> list[PlacedTerm]:
        """The terms that act now."""
        found = []
        for reference, place, _ in self._attachments:
            adapter = reference()
            if adapter is not None:
                for term in adapter.terms():
                    found.append(PlacedTerm(term, place))
        return found

    def __bool__(self) -> bool:
        return bool(self._attachments)

    def _live(self) -> list[tuple[Adapter, Place, bool]]:
        triples = [(reference(), place, keep) for reference, place, keep in self._attachments]
        return [(adapter, place, keep) for adapter, place, keep in triples if adapter is not None]

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        result = type(self)()
        memo[id(self)] = result
        result.__setstate__(copy.deepcopy(self._live(), memo))
        return result

    def __reduce__(self) -> Any:
        return type(self), (), self._live()

    def __setstate__(self, live: list[tuple[Adapter, Place, bool]]) -> None:
        for adapter, place, keep in live:
            self.attach(adapter, place.rows, place.columns, last=place.last, keep=keep)


class _Kept:
    """A strong reference that is called like a weak one."""

    def __init__(self, adapter: Adapter) -> None:
        self._adapter = adapter

    def __call__(self) -> Adapter:
        return self._adapter


class Group(NamedTuple):
    """Terms that share ranks: one down factor, one strength, an up factor for each term's rows."""

    first: PlacedTerm
    members: list[PlacedTerm]


def group_terms(placed: Sequence[PlacedTerm], share: bool) -> list[Group]:
    """Terms of fused linears (q, k, v) that were trained on one down factor need its ranks only once.

    Args:
        placed: terms of one layer.
        share: compare the values of factors; else every term is a group of its own.
    """
    groups: list[Group] = []
    for item in placed:
        for group in groups if share else []:
            if _may_share(group, item):
                group.members.append(item)
                break
        else:
            groups.append(Group(item, [item]))
    return groups


def strength_pattern(placed: Sequence[PlacedTerm]) -> tuple[int, ...]:
    """For each term, the first one of the same strength: while this stands still, so do the groups."""
    strengths = [item.term.strength for item in placed]
    return tuple(next(j for j, other in enumerate(strengths) if _same(other, own)) for own in strengths)


def needs_gradient(placed: Sequence[PlacedTerm]) -> bool:
    """Whether a gradient is asked of any tensor of the terms."""
    return torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for item in placed for tensor in _tensors(item.term)
    )


def check_terms(label: str, placed: Sequence[PlacedTerm]) -> None:
    """Raise ValueError, naming the layer, unless every term has the shapes of its place."""
    for term, (rows, columns, last) in placed:
        n, (rank, width) = rows[1] - rows[0], term.down.shape if term.down.dim() == 2 else (0, 0)
        if rank < 1 or width < columns[1] or (last and width != columns[1]):
            expected = f"(rank, {'' if last else 'at least '}{columns[1]})"
            raise ValueError(f"{label}: an adapter's `down` must be {expected}, got {tuple(term.down.shape)}")
        if term.up.shape != (n, rank):
            raise ValueError(f"{label}: an adapter's `up` must be {(n, rank)}, got {tuple(term.up.shape)}")
        for name, vector in (("bias", term.bias), ("gain", term.gain)):
            if vector is not None and vector.shape != (n,):
                raise ValueError(f"{label}: an adapter's `{name}` must be {(n,)}, got {tuple(vector.shape)}")


def total_rank(groups: Sequence[Group]) -> int:
    """The ranks of all groups."""
    return sum(first.term.down.shape[0] for first, _ in groups)


def stacked_down(groups: Sequence[Group], ranks: int, width: int, like: torch.Tensor) -> torch.Tensor:
    """The down factors of all groups, (ranks, width) in the dtype and on the device of `like`, padded with zeros from
    `total_rank` and the layer's inputs on; differentiable."""
    result, rank = like.new_zeros(ranks, width), 0
    for first, _ in groups:
        down, (start, stop) = first.term.down, first.place.columns
        result[rank : rank + down.shape[0], : stop - start] = down[:, start:stop].to(result)
        rank += down.shape[0]
    return result


def stacked_up(groups: Sequence[Group], height: int, ranks: int, like: torch.Tensor) -> torch.Tensor:
    """The up factors of all groups, (height, ranks) as above, 0 outside their rows; differentiable."""
    result, rank = like.new_zeros(height, ranks), 0
    for first, members in groups:
        last = rank + first.term.down.shape[0]
        for item in members:  # whose rows are disjoint
            result[slice(*item.place.rows), rank:last] = item.term.up.to(result)
        rank = last
    return result


def placed_rows(tensor: torch.Tensor, rows: tuple[int, int], total: int) -> torch.Tensor:
    """`tensor`, whose first dimension are `rows`, padded with zeros to `total` of them."""
    before, after = rows[0], total - rows[1]
    if before == after == 0:
        return tensor
    return pad(tensor, (*(0, 0) * (tensor.dim() - 1), before, after))


def summed(placed: Sequence[PlacedTerm], field: str, total: int, device: torch.device) -> torch.Tensor | None:
    """The vectors `field` ("bias" or "gain") of all terms, each times its strength: (total) float32, or None."""
    result = None
    for item in placed:
        vector = getattr(item.term, field)
        if vector is None or (not item.place.last and field == "bias"):
            continue
        spread = placed_rows(vector.to(device, torch.float32), item.place.rows, total) * item.term.strength
        result = spread if result is None else result + spread
    return result


def strength_vector(groups: Sequence[Group], ranks: int, device: torch.device) -> torch.Tensor:
    """The strength of every rank, (ranks) float32, zero beyond those of the groups."""
    strengths = [(first.term.strength, first.term.down.shape[0]) for first, _ in groups]
    used = sum(rank for _, rank in strengths)
    if not any(isinstance(value, torch.Tensor) for value, _ in strengths):
        values = [float(value) for value, rank in strengths for _ in range(rank)]
        return torch.tensor(values + [0.0] * (ranks - used), dtype=torch.float32, device=device)
    parts = [
        torch.as_tensor(value, dtype=torch.float32, device=device).reshape(1).expand(rank) for value, rank in strengths
    ]
    return pad(torch.cat(parts), (0, ranks - used))


def ingredients(placed: Sequence[PlacedTerm]) -> tuple[list[Any], list[torch.Tensor]]:
    """All that terms consist of: numbers and places, to be compared with `==`, and tensors, as many where the former
    are equal. Runs on every call of a layer."""
    key: list[Any] = []
    tensors: list[torch.Tensor] = []
    for (down, up, strength, bias, gain), place in placed:
        tensors += (down, up)
        number: float | None = None
        if type(strength) is float or not isinstance(strength, torch.Tensor):
            number = strength
        else:
            tensors.append(strength)
        if bias is not None:
            tensors.append(bias)
        if gain is not None:
            tensors.append(gain)
        key += (place, number, bias is None, gain is None)
    return key, tensors


def tensors_of(placed: Sequence[PlacedTerm], *fields: str) -> tuple[torch.Tensor, ...]:
    """Those of the terms' `fields` that are tensors."""
    values = (getattr(item.term, field) for item in placed for field in fields)
    return tuple(value for value in values if isinstance(value, torch.Tensor))


def strengths_of(placed: Sequence[PlacedTerm]) -> tuple[float | None, ...]:
    """The terms' strengths where they are numbers; None for tensors."""
    return tuple(None if isinstance(p.term.strength, torch.Tensor) else float(p.term.strength) for p in placed)


def _may_share(group: Group, item: PlacedTerm) -> bool:
    """Whether the members are at disjoint rows and the factors equal: an adapter twice on one linear stays two."""
    first = group.first
    if first.place.columns != item.place.columns or not _same(first.term.strength, item.term.strength):
        return False
    (start, stop), taken = item.place.rows, [other.place.rows for other in group.members]
    if any(start < other_stop and other_start < stop for other_start, other_stop in taken):
        return False
    mine, other = first.term.down, item.term.down
    if mine is other:
        return True
    comparable = mine.shape == other.shape and mine.dtype == other.dtype and mine.device == other.device
    return comparable and torch.equal(mine, other)


def _same(mine: float | torch.Tensor, other: float | torch.Tensor) -> bool:
    if isinstance(mine, torch.Tensor) or isinstance(other, torch.Tensor):
        return mine is other
    return mine == other or (mine != mine and other != other)  # NaN is no other strength than NaN


def _tensors(term: AdapterTerm) -> tuple[torch.Tensor | None, ...]:
    return term.down, term.up, term.bias, term.gain
