"""The layers of one block while they are calibrated: their weights, and what was seen of their inputs."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch

from nunchaku_kernels.formats import SVDQWeights
from nunchaku_kernels.formats.svdq import Precision
from nunchaku_kernels.nn import GELU_SHIFT
from nunchaku_kernels.ops import Arithmetic
from nunchaku_kernels.quantize import InputSpans, quantize_svdq, relative_output_error
from nunchaku_models.calibration.blocks import LoadedBlock
from nunchaku_models.calibration.records import Call
from nunchaku_models.checkpoints import DiffusersView
from nunchaku_models.families import LowRankLinear
from nunchaku_models.layer_weights import layer_bias, layer_columns, layer_segments, layer_weight
from nunchaku_models.layers import PlannedLayer

SAMPLED_TOKENS = 4096
"""Tokens of each layer's input that smoothing vectors are judged on."""

Results = dict[str, dict[str, torch.Tensor]]
"""Path of a layer -> name -> published tensor."""


@dataclass(frozen=True)
class Settings:
    """What every layer is quantised with.

    Attributes:
        precision, rank, dtype: as in `quantize_checkpoint`.
        arithmetic: how activations will be quantised.
        gptq: whether the published recipe rounds its residual with GPTQ.
        seed: of everything random.
        device: where layers are worked on.
    """

    precision: Precision
    rank: int
    dtype: torch.dtype
    arithmetic: Arithmetic
    gptq: bool
    seed: int
    device: torch.device

    def generator(self) -> torch.Generator:
        """A fresh one, so that a layer's result does not depend on the layers before it."""
        return torch.Generator().manual_seed(self.seed)


@dataclass(eq=False)
class BlockLayer:
    """A planned layer of the block at hand.

    Attributes:
        plan: what it computes.
        block: path of the block.
        weight: (N, K), on the device.
        bias: (N,) or None.
        segments: rows of each source.
        shift: added to the input of its quantised path.
        edges: the columns of its source's input that it takes.
        spans: of its input.
        sample: some tokens of its input (T, K).
    """

    plan: PlannedLayer
    block: str
    weight: torch.Tensor
    bias: torch.Tensor | None
    segments: list[int]
    shift: float
    edges: tuple[int, int]
    spans: InputSpans = field(init=False)
    sample: torch.Tensor = field(init=False)

    @classmethod
    def load(cls, plan: PlannedLayer, block: str, view: DiffusersView, settings: Settings) -> "BlockLayer":
        """The layer with its weights, which are checked when it is quantised."""
        width, rows = view.info(f"{plan.sources[0]}.weight").shape[1], layer_segments(view, plan)
        bias = layer_bias(view, plan)
        behind_gelu = isinstance(plan.spec, LowRankLinear) and plan.spec.after_gelu
        return cls(
            plan,
            block,
            layer_weight(view, plan).to(settings.device),
            None if bias is None else bias.to(settings.device),
            rows,
            GELU_SHIFT if behind_gelu and settings.precision == "int4" else 0.0,
            layer_columns(plan, width, rows[0]),
        )

    @property
    def path(self) -> str:
        """Module path in the transformer."""
        return self.plan.path

    @property
    def source(self) -> str:
        """Path inside the block of a linear that gets the layer's input."""
        return self.plan.sources[0].removeprefix(f"{self.block}.")

    @property
    def is_modulation(self) -> bool:
        """Whether the layer is weight-only, without low-rank branch."""
        return not isinstance(self.plan.spec, LowRankLinear)

    def quantized(self, smooth: torch.Tensor, settings: Settings, **how: Any) -> SVDQWeights:
        """`quantize_svdq` of the layer; `how` says what the settings leave open."""
        return quantize_svdq(
            self.weight,
            self.bias,
            precision=settings.precision,
            rank=settings.rank,
            smooth=smooth,
            shift=self.shift,
            segments=self.segments,
            dtype=settings.dtype,
            generator=settings.generator(),
            **how,
        )

    def error(self, weights: SVDQWeights, settings: Settings) -> float:
        """Relative output error of these weights on the sample."""
        return relative_output_error(
            self.weight, self.bias, weights, self.sample, shift=self.shift, arithmetic=settings.arithmetic
        )


def grouped(layers: Sequence[BlockLayer], key: Callable[[BlockLayer], str]) -> list[list[BlockLayer]]:
    """The layers with the same key together, in the order in which the keys appear."""
    groups: dict[str, list[BlockLayer]] = {}
    for layer in layers:
        groups.setdefault(key(layer), []).append(layer)
    return list(groups.values())


def same_input(layer: BlockLayer) -> str:
    """The key of layers that get the same tensor."""
    other = isinstance(layer.plan.spec, LowRankLinear) and layer.plan.spec.other_input
    return layer.path if other else same_smoothing(layer)


def same_smoothing(layer: BlockLayer) -> str:
    """The key of layers that the published quantiser gives one smoothing vector."""
    return layer.plan.smooth_with or layer.path


def watch(
    block: LoadedBlock, layers: Iterable[BlockLayer], hook: Callable[[BlockLayer, torch.Tensor], None]
) -> AbstractContextManager[None]:
    """Within the context, `hook(layer, x)` gets the input (M, K) of each layer whenever the block runs."""

    def hooked(layer: BlockLayer) -> Callable[[torch.Tensor], None]:
        return lambda x: hook(layer, x[:, layer.edges[0] : layer.edges[1]])

    return block.watching([(layer.source, hooked(layer)) for layer in layers])


def observe(block: LoadedBlock, layers: Sequence[BlockLayer], settings: Settings) -> Iterator[Call]:
    """Run the block on all calls; afterwards the layers know spans and a sample of their inputs."""
    per_call = -(-SAMPLED_TOKENS // len(block.calls))
    chance = settings.generator()
    sampled: dict[str, list[torch.Tensor]] = {layer.path: [] for layer in layers}
    for layer in layers:
        layer.spans = InputSpans(layer.weight.shape[1], layer.shift, settings.device)

    def look(layer: BlockLayer, x: torch.Tensor) -> None:
        layer.spans.update(x)
        picked = torch.randperm(x.shape[0], generator=chance)[:per_call]
        sampled[layer.path].append(x[picked.to(x.device)])

    with watch(block, layers, look):
        yield from block.sweep()
    for layer in layers:
        layer.sample = torch.cat(sampled[layer.path])
