"""What a model family declares. Loading, saving, quantising and inspecting are written once, against this."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import nn

Columns = Literal["all", "head", "tail"]


@dataclass(frozen=True)
class LowRankLinear:
    """A 4-bit linear with a low-rank branch (`SVDQLinear`): the layer, and the diffusers linears it computes.

    Attributes:
        module: path of the owner inside its block, which is also its key in v2 files.
        published: its key in v1 files.
        sources: diffusers linears, inside the block, whose rows are concatenated in this order.
        columns: input columns of the (single) source that the owner holds: "all"; "head", the first out_features of
            them; or "tail", the rest. Two owners with "head" and "tail" split one linear.
        after_gelu: fed by a GELU: int4 files shift its input so that activations are unsigned.
        smooth_with: owner in the same block whose smoothing vector this one shares (same input, or by convention).
        other_input: it shares by convention of the published quantiser only, its input is another tensor.
        judged_by: module inside the block by whose output the published quantiser judges smoothing; "" for the whole
            block, None for the layer itself.
    """

    module: str
    published: str
    sources: tuple[str, ...]
    columns: Columns = "all"
    after_gelu: bool = False
    smooth_with: str = ""
    other_input: bool = False
    judged_by: str | None = None


@dataclass(frozen=True)
class Modulation:
    """The weight-only 4-bit linear of an adaptive layer norm (`ModulationLinear`); same name in all file formats.

    Attributes:
        module: path inside the block.
        num_chunks: vectors per channel, 6 or 3.
    """

    module: str
    num_chunks: int


@dataclass(frozen=True)
class Block:
    """One kind of transformer block.

    Attributes:
        prefix: name of the module list.
        count: key of the model configuration that holds the number of blocks.
        low_rank: its `SVDQLinear` layers.
        modulation: its `ModulationLinear` layers.
        renamed: (v1 key, module path) of 16-bit tensors whose published v1 name differs.
        returns: what a block returns, as names of its arguments that the next block takes.
    """

    prefix: str
    count: str
    low_rank: tuple[LowRankLinear, ...]
    modulation: tuple[Modulation, ...]
    renamed: tuple[tuple[str, str], ...] = ()
    returns: tuple[str, ...] = ("hidden_states",)


@dataclass(frozen=True)
class Family:
    """A page: everything that this project needs to know about one model architecture.

    Attributes:
        name: e.g. "flux".
        transformer_class: class name in diffusers.
        blocks: the quantised kinds of blocks.
        prepare: called with a model whose layers were just swapped, to put in what uses them fused (processors).
    """

    name: str
    transformer_class: str
    blocks: tuple[Block, ...]
    prepare: Callable[[nn.Module], None] | None = None
