"""Where each block of a transformer stands: its segment (one decision), its span (one residual), its part in them."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from nunchaku_cache.blocks import BlockSignature
from nunchaku_cache.families import BlockList, Family


@dataclass(frozen=True)
class Place:
    """Where a block stands.

    Attributes:
        name: path in the transformer.
        block: the module.
        blocks: declaration of its list.
        signature: of its forward.
        segment: index of its segment.
        decides: it runs always, and the segment's decision falls behind it.
        precedes: the segment's decision falls before it (no block runs always).
        span: index of its span in the segment; spans are runs of skippable blocks with the same streams.
        ends_span: whether it is the last one of its span, which adds the residual on a hit.
    """

    name: str
    block: nn.Module
    blocks: BlockList
    signature: BlockSignature
    segment: int
    decides: bool
    precedes: bool
    span: int
    ends_span: bool


@dataclass(frozen=True)
class Segment:
    """Blocks with one decision.

    Attributes:
        name: "all", or "joint" and "single".
        spans: how many runs of blocks with the same streams it has behind the deciding block.
        measured: how many of the deciding block's streams count in the distance; the first is the image.
    """

    name: str
    spans: int
    measured: int


@dataclass(frozen=True)
class Plan:
    """All segments and places of a transformer, in the order of its forward pass."""

    family: Family
    segments: tuple[Segment, ...]
    places: tuple[Place, ...]


def make_plan(transformer: nn.Module, family: Family, *, double: bool, first_block_runs: bool) -> Plan:
    """Divide the blocks of a transformer.

    Args:
        transformer: the model.
        family: its declaration.
        double: a segment per list of blocks, else one for all.
        first_block_runs: a segment's first block decides; else the decision precedes it.

    Raises:
        ValueError: a declared list is missing, or there are too few lists or blocks.
    """
    lists = [(blocks, list(_module_list(transformer, blocks.name))) for blocks in family.lists]
    lists = [(blocks, modules) for blocks, modules in lists if modules]
    if double and len(lists) < 2:
        names = " and ".join(blocks.name for blocks in family.lists)
        raise ValueError(f"DoubleFirstBlockCache: {family.transformer} has blocks only in {names}; use FirstBlockCache")
    groups = [[entry] for entry in lists] if double else [lists]
    labels = ("all",) if not double else ("joint", "single", *(blocks.name for blocks, _ in lists[2:]))
    segments, places = [], []
    for index, (group, name) in enumerate(zip(groups, labels, strict=False)):
        found = _segment_places(group, index, first_block_runs)
        if len(found) < 2 and not double:
            raise ValueError(f"{family.transformer}: a cache needs two blocks or more, this one has {len(found)}")
        places += found
        spans = len({place.span for place in found if not place.decides})
        # the published engine judges joint blocks by the image, single blocks by the whole sequence
        segments.append(Segment(name, spans, len(group[0][0].streams) if index else 1))
    return Plan(family, tuple(segments), tuple(places))


def _segment_places(
    group: Sequence[tuple[BlockList, list[nn.Module]]], segment: int, first_block_runs: bool
) -> list[Place]:
    flat = [
        (blocks, BlockSignature(module, blocks), f"{blocks.name}.{i}", module)
        for blocks, modules in group
        for i, module in enumerate(modules)
    ]
    first_skipped = 1 if first_block_runs else 0
    places, span = [], 0
    for i, (blocks, signature, name, module) in enumerate(flat):
        following = flat[i + 1][0] if i + 1 < len(flat) else None
        ends = following is None or (following.streams, following.order) != (blocks.streams, blocks.order)
        skipped = i >= first_skipped
        ends_span = ends and skipped
        places.append(
            Place(
                name=name,
                block=module,
                blocks=blocks,
                signature=signature,
                segment=segment,
                decides=not skipped,
                precedes=skipped and i == 0,
                span=span,
                ends_span=ends_span,
            )
        )
        span += ends_span
    return places


def _module_list(transformer: nn.Module, path: str) -> nn.ModuleList:
    try:
        found = transformer.get_submodule(path)
    except AttributeError as error:
        raise ValueError(f"{type(transformer).__name__} has no list of blocks {path!r}") from error
    if not isinstance(found, nn.ModuleList):
        raise ValueError(f"{type(transformer).__name__}.{path} is no ModuleList but {type(found).__name__}")
    return found
