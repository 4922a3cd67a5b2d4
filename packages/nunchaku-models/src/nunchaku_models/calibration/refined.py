"""The refined recipe: smoothing by output error, then weights fitted to the moments of the inputs (quantize/refine.py).

All statistics come from the unquantised model. Letting each layer see the quantised layers before it was tried on the
demo, and so was fitting it to what the unquantised model would have given there: pictures lost 0.3 dB either way.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch

from nunchaku_kernels.formats import pack_svdq
from nunchaku_kernels.quantize import (
    InputMoments,
    candidates,
    quantize_modulation,
    quantize_refined,
)
from nunchaku_models.calibration.blocks import LoadedBlock
from nunchaku_models.calibration.layers import BlockLayer, Results, Settings, grouped, observe, same_input, watch
from nunchaku_models.calibration.records import Call
from nunchaku_models.families import Modulation


def refine_block(
    block: LoadedBlock, layers: Sequence[BlockLayer], settings: Settings, results: Results
) -> Iterator[Call | BlockLayer]:
    """Quantise the layers of a block into `results`, and advance the block.

    Yields:
        Each call that the block ran on (all of them twice) and each layer that is done, for progress.
    """
    low_rank = [layer for layer in layers if not layer.is_modulation]
    yield from observe(block, low_rank, settings)
    moments: dict[str, InputMoments] = {}
    gathering: list[BlockLayer] = []
    for members in grouped(layers, same_input):
        shared = _moments(members, settings)
        moments |= {layer.path: shared for layer in members}
        gathering.append(members[0])

    def take(layer: BlockLayer, x: torch.Tensor) -> None:
        moments[layer.path].update(x, held_out=block.current.held_out)

    with watch(block, gathering, take):
        yield from block.advance()
    for layer in layers:
        results[layer.path] = _quantized(layer, moments, settings)
        yield layer


def _moments(members: Sequence[BlockLayer], settings: Settings) -> InputMoments:
    """Empty moments of layers with the same input, with the smoothing vector that suits them best."""
    first = members[0]
    if first.is_modulation:
        ones = torch.ones(first.weight.shape[1], dtype=settings.dtype, device=settings.device)
        return InputMoments(ones, arithmetic="w4a16")

    def error(smooth: torch.Tensor) -> float:
        # one fit of the branch, rounded to the nearest: the whole fit for each vector would take ten times as long
        return sum(layer.error(layer.quantized(smooth, settings, num_iters=1), settings) for layer in members)

    stored = [vector.to(settings.dtype) for vector in candidates(first.spans)]
    return InputMoments(min(stored, key=error), first.shift, settings.arithmetic)


def _quantized(layer: BlockLayer, moments: Mapping[str, InputMoments], settings: Settings) -> dict[str, torch.Tensor]:
    spec = layer.plan.spec
    if isinstance(spec, Modulation):
        return quantize_modulation(
            layer.weight, layer.bias, spec.num_chunks, dtype=settings.dtype, moments=moments[layer.path]
        )
    refined = quantize_refined(
        layer.weight,
        layer.bias,
        moments[layer.path],
        precision=settings.precision,
        rank=settings.rank,
        segments=layer.segments,
        dtype=settings.dtype,
        generator=settings.generator(),
    )
    return pack_svdq(refined.weights)
