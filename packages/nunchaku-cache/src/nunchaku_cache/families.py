"""What the cache has to know of a transformer: which lists of blocks, and how a block takes and returns its streams.

One row per model. Everything between the blocks (embeddings, ControlNet residuals, concatenation of streams, the last
norm) stays the model's own and runs on every step.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class BlockList:
    """A `ModuleList` of blocks that are called one after another.

    Attributes:
        name: attribute of the transformer; dots reach into submodules.
        streams: arguments of a block's forward that its outputs replace. The first one is that of the image.
        returns: streams in the order in which a block returns them; None: as `streams`. A block of one stream returns a
            tensor, others a tuple.
        shared: arguments that belong to all samples, whatever their first dimension. All other tensors whose first
            dimension is the number of samples are taken for one row per sample.
        stacked: arguments that hold several rows per sample, as [row 0 of all samples, row 1 of all samples, ...].
        valid: argument that marks valid tokens (batch, tokens), which come before all padding; padded tokens do not
            count in distances. None in a call: all are valid.
        written: argument of the transformer which, when given, makes it write into what a block returned.
    """

    name: str
    streams: tuple[str, ...] = ("hidden_states",)
    returns: tuple[str, ...] | None = None
    shared: tuple[str, ...] = ()
    stacked: tuple[str, ...] = ()
    valid: str | None = None
    written: str | None = None

    def __post_init__(self) -> None:
        if not self.streams:
            raise ValueError(f"BlockList {self.name!r}: `streams` is empty; name the argument that a block returns")
        if self.returns is not None and sorted(self.returns) != sorted(self.streams):
            raise ValueError(
                f"BlockList {self.name!r}: `returns` must be `streams` in another order, got {self.returns}"
            )

    @property
    def order(self) -> tuple[str, ...]:
        """Streams in the order in which a block returns them."""
        return self.streams if self.returns is None else self.returns


@dataclass(frozen=True)
class Family:
    """The declaration of one transformer class.

    Attributes:
        transformer: name of its class; subclasses are found too.
        lists: in the order in which the forward pass calls them. The double first-block cache decides each apart.
        sample: argument of the forward pass that holds the noisy input, a tensor or a list with one per sample.
        timestep: its argument that holds the timestep or sigma.
        rising: whether that value rises from step to step.
        call: its arguments that are the same objects on all steps of one call of a pipeline, and others on the next
            call: by them, interleaved calls are told apart. Tensors, or lists of them.
        modulated: (block, arguments by name) -> the first block's modulated input, for `TeaCache`.
        tea_coefficients: of TeaCache's polynomial, highest power first.
    """

    transformer: str
    lists: tuple[BlockList, ...]
    sample: str = "hidden_states"
    timestep: str = "timestep"
    rising: bool = False
    call: tuple[str, ...] = ("encoder_hidden_states",)
    modulated: Callable[[nn.Module, dict[str, Any]], torch.Tensor] | None = None
    tea_coefficients: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if not self.lists:
            raise ValueError(f"Family {self.transformer!r}: `lists` is empty; name the ModuleLists of its blocks")


def _norm1(block: nn.Module, arguments: dict[str, Any]) -> torch.Tensor:
    """Of blocks that open with an adaptive norm of the timestep embedding."""
    norm: Any = block.norm1
    modulated: torch.Tensor = norm(arguments["hidden_states"], emb=arguments["temb"])[0]
    return modulated


_TWO_STREAMS = ("hidden_states", "encoder_hidden_states")
_TEXT_FIRST = ("encoder_hidden_states", "hidden_states")
_ROTARY = ("image_rotary_emb",)
_FLUX_IDS = ("encoder_hidden_states", "pooled_projections", "img_ids", "txt_ids")

FLUX_TEA_COEFFICIENTS = (498.651651, -283.781631, 55.8554382, -3.82021401, 0.264230861)
"""Of FLUX.1-dev (spec/surface.md 4.5), highest power first."""

FAMILIES = (
    Family(
        "FluxTransformer2DModel",
        (
            BlockList("transformer_blocks", _TWO_STREAMS, _TEXT_FIRST, shared=_ROTARY),
            BlockList("single_transformer_blocks", _TWO_STREAMS, _TEXT_FIRST, shared=_ROTARY),
        ),
        call=_FLUX_IDS,
        modulated=_norm1,
        tea_coefficients=FLUX_TEA_COEFFICIENTS,
    ),
    Family(
        "Flux2Transformer2DModel",
        (
            BlockList("transformer_blocks", _TWO_STREAMS, _TEXT_FIRST, shared=_ROTARY),
            BlockList("single_transformer_blocks", shared=_ROTARY),
        ),
        call=("encoder_hidden_states", "img_ids", "txt_ids"),
    ),
    Family(
        "ChromaTransformer2DModel",
        (
            BlockList("transformer_blocks", _TWO_STREAMS, _TEXT_FIRST, shared=_ROTARY),
            BlockList("single_transformer_blocks", shared=_ROTARY, written="controlnet_single_block_samples"),
        ),
        call=("encoder_hidden_states", "img_ids", "txt_ids"),
    ),
    Family(
        "QwenImageTransformer2DModel",
        (BlockList("transformer_blocks", _TWO_STREAMS, _TEXT_FIRST, shared=_ROTARY, stacked=("temb",)),),
        call=("encoder_hidden_states", "encoder_hidden_states_mask"),
    ),
    Family(
        "SD3Transformer2DModel",
        (BlockList("transformer_blocks", _TWO_STREAMS, _TEXT_FIRST),),
        call=("encoder_hidden_states", "pooled_projections"),
        modulated=_norm1,
    ),
    Family(
        "AuraFlowTransformer2DModel",
        (BlockList("joint_transformer_blocks", _TWO_STREAMS, _TEXT_FIRST), BlockList("single_transformer_blocks")),
        modulated=_norm1,
    ),
    # the pipeline casts encoder_hidden_states on every step, the mask stays
    Family("SanaTransformer2DModel", (BlockList("transformer_blocks"),), call=("encoder_attention_mask",)),
    Family(
        "PixArtTransformer2DModel",
        (BlockList("transformer_blocks"),),
        call=("encoder_hidden_states", "encoder_attention_mask"),
    ),
    Family(
        "ZImageTransformer2DModel",
        (BlockList("layers", streams=("x",), valid="attn_mask"),),
        sample="x",
        timestep="t",
        rising=True,
        call=("cap_feats",),
    ),
    Family(
        "Lumina2Transformer2DModel",
        (BlockList("layers", valid="attention_mask"),),
        rising=True,
        call=("encoder_hidden_states", "encoder_attention_mask"),
    ),
    Family("CogVideoXTransformer3DModel", (BlockList("transformer_blocks", _TWO_STREAMS, shared=_ROTARY),)),
    Family("CogView4Transformer2DModel", (BlockList("transformer_blocks", _TWO_STREAMS, shared=_ROTARY),)),
    Family("MochiTransformer3DModel", (BlockList("transformer_blocks", _TWO_STREAMS, shared=_ROTARY),), rising=True),
    Family("WanTransformer3DModel", (BlockList("blocks", shared=("rotary_emb",)),)),
    Family("LTXVideoTransformer3DModel", (BlockList("transformer_blocks"),)),
    Family(
        "HunyuanVideoTransformer3DModel",
        (
            BlockList("transformer_blocks", _TWO_STREAMS, shared=("freqs_cis",)),
            BlockList("single_transformer_blocks", _TWO_STREAMS, shared=_ROTARY),
        ),
        call=("encoder_hidden_states", "encoder_attention_mask", "pooled_projections"),
    ),
)

_registered = {family.transformer: family for family in FAMILIES}


def register(family: Family) -> None:
    """Declare a transformer class, or declare one anew, for all later `apply` calls."""
    _registered[family.transformer] = family


def families() -> tuple[str, ...]:
    """Names of the declared transformer classes."""
    return tuple(_registered)


def family_of(transformer: nn.Module) -> Family:
    """The declaration of a transformer's class or of the nearest of its bases.

    Raises:
        ValueError: none is declared; the message shows what to declare.
    """
    for base in type(transformer).__mro__:
        if base.__name__ in _registered:
            return _registered[base.__name__]
    raise ValueError(_unknown(transformer))


def _unknown(transformer: nn.Module) -> str:
    name = type(transformer).__name__
    lists = [
        f"{path} ({len(module)} x {type(module[0]).__name__})"
        for path, module in transformer.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) > 1 and path.count(".") == 0
    ]
    return (
        f"{name} is not declared. It has these lists of modules: {', '.join(lists) or 'none'}. Say which are called "
        "one after another, and which arguments of a block its outputs replace:\n"
        f'  family = nunchaku_cache.Family("{name}", lists=(nunchaku_cache.BlockList("transformer_blocks", '
        'streams=("hidden_states", "encoder_hidden_states")),))\n'
        "  nunchaku_cache.apply(transformer, policy, family=family)\n"
        f"Declared are: {', '.join(families())}."
    )
