"""The published recipe: SVDQuant as its authors' quantiser does it (svdquant_algorithm.md 3, 4, 7).

Smoothing by grid search per group of layers, judged by the output of the module around them; a branch fitted until the
judged error rises; the residual rounded to the nearest or with GPTQ. Different on purpose: behind a shift every stage
quantises activations unsigned, as the layer does; a joint attention is judged by both its outputs; statistics of the
unquantised activations come from every recorded call, judgements from a few.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from nunchaku_kernels.formats import SVDQWeights, pack_svdq
from nunchaku_kernels.nn import QuantizedLinear, SVDQLinear
from nunchaku_kernels.quantize import (
    InputMoments,
    published_candidates,
    quantize_modulation,
)
from nunchaku_models.calibration.blocks import LoadedBlock
from nunchaku_models.calibration.layers import (
    SAMPLED_TOKENS,
    BlockLayer,
    Results,
    Settings,
    grouped,
    observe,
    same_smoothing,
    watch,
)
from nunchaku_models.calibration.records import Call
from nunchaku_models.families import LowRankLinear, Modulation
from nunchaku_models.layers import install, origins

MAX_FITS = 100
"""Of the low-rank branch, if its error never rises."""


def calibrate_block(
    model: nn.Module, block: LoadedBlock, layers: Sequence[BlockLayer], settings: Settings, results: Results
) -> Iterator[Call | BlockLayer]:
    """Quantise the layers of a block into `results`, and advance the block.

    Args:
        model: the transformer that the block is in.

    Yields:
        Each call that the block ran on and each layer that is done, for progress.
    """
    low_rank = [layer for layer in layers if not layer.is_modulation]
    judges = {path: _ModuleJudge(model, block, path) for path in _judging_modules(low_rank)}
    yield from observe(block, low_rank, settings)
    smooth: dict[str, torch.Tensor] = {}
    for members in grouped(low_rank, same_smoothing):
        chosen = _searched_smoothing(members, judges, settings)
        smooth |= {layer.path: chosen for layer in members}
    moments = {
        layer.path: InputMoments(smooth[layer.path], layer.shift, "w4a16")
        for layer in (low_rank if settings.gptq else ())
    }
    with watch(block, [layer for layer in low_rank if settings.gptq], lambda layer, x: moments[layer.path].update(x)):
        yield from block.advance()
    for layer in layers:
        if isinstance(layer.plan.spec, Modulation):
            chunks = layer.plan.spec.num_chunks
            results[layer.path] = quantize_modulation(layer.weight, layer.bias, chunks, dtype=settings.dtype)
        else:
            judge = _of(judges, _fit_judge(layer))
            hessian = _second_moment(moments[layer.path]) if settings.gptq else None
            results[layer.path] = pack_svdq(_fitted(layer, smooth[layer.path], judge, hessian, settings))
        yield layer


def _judging_modules(layers: Sequence[BlockLayer]) -> list[str]:
    specs = [layer.plan.spec for layer in layers]
    paths = [spec.judged_by for spec in specs if isinstance(spec, LowRankLinear) and spec.judged_by is not None]
    return list(dict.fromkeys(paths))


def _judged_by(layer: BlockLayer) -> str | None:
    assert isinstance(layer.plan.spec, LowRankLinear)
    return layer.plan.spec.judged_by


def _fit_judge(layer: BlockLayer) -> str | None:
    """The module that judges a layer's branch: that of fused projections; other layers are judged by themselves."""
    return _judged_by(layer) if len(layer.plan.sources) > 1 else None


def _of(judges: Mapping[str, "_ModuleJudge"], path: str | None) -> "_ModuleJudge | None":
    return None if path is None else judges[path]


def _searched_smoothing(
    members: Sequence[BlockLayer], judges: Mapping[str, "_ModuleJudge"], settings: Settings
) -> torch.Tensor:
    """The vector of the grid with the least error; of equals the last."""
    first = members[0]
    judge = _of(judges, _judged_by(first))
    best: tuple[float, torch.Tensor] | None = None
    for candidate in published_candidates(first.spans, [layer.weight for layer in members]):
        smooth = candidate.to(settings.dtype)
        if not (smooth.isfinite() & (smooth > 0)).all():
            continue
        weights = [layer.quantized(smooth, settings, num_iters=1, scale_search=False) for layer in members]
        if judge is not None:
            error = judge.error(list(zip(members, weights, strict=True)), settings)
        else:
            error = sum(layer.error(made, settings) for layer, made in zip(members, weights, strict=True))
        if best is None or error <= best[0]:
            best = (error, smooth)
    assert best is not None  # the first candidate is ones
    return best[1]


def _fitted(
    layer: BlockLayer,
    smooth: torch.Tensor,
    judge: "_ModuleJudge | None",
    hessian: torch.Tensor | None,
    settings: Settings,
) -> SVDQWeights:
    def error(weights: SVDQWeights) -> float:
        if judge is None:
            return layer.error(weights, settings)
        return judge.error([(layer, weights)], settings)

    return layer.quantized(smooth, settings, num_iters=MAX_FITS, scale_search=False, judge=error, hessian=hessian)


def _second_moment(moments: InputMoments) -> torch.Tensor:
    """`E[t t^T]` of the smoothed, shifted inputs t, unquantised."""
    known = moments.covariances()
    return known.quantized.addr(known.quantized_mean, known.quantized_mean)


class _ModuleJudge:
    """The error of a module's output with some of its linears quantised, on a few of the calls that reach it.

    Args:
        model: the transformer.
        block: the block, before its first sweep: the calls are taken from that.
        path: of the module inside the block; "" for the block.
    """

    def __init__(self, model: nn.Module, block: LoadedBlock, path: str) -> None:
        self._model = model
        self._module = block.module.get_submodule(path)
        self._calls: list[tuple[tuple[Any, ...], dict[str, Any], list[torch.Tensor]]] = []
        size = block.calls[0].arguments["hidden_states"].shape[:2].numel()
        self._wanted = max(1, SAMPLED_TOKENS // size)
        self._every = max(1, len(block.calls) // self._wanted)
        self._seen = 0
        self._handle = self._module.register_forward_hook(self._keep, with_kwargs=True)

    def _keep(self, _: Any, positional: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        if self._seen % self._every == 0:
            self._calls.append((positional, named, _tensors(output)))
        self._seen += 1
        if len(self._calls) == self._wanted:
            self._handle.remove()

    @torch.no_grad()
    def error(self, layers: Sequence[tuple[BlockLayer, SVDQWeights]], settings: Settings) -> float:
        """Summed squared error of all outputs, with these layers quantised."""
        self._handle.remove()
        owners: dict[str, QuantizedLinear] = {}
        for layer, weights in layers:
            sizes = [(layer.weight.shape[1], rows) for rows in layer.segments]
            owner = SVDQLinear.from_weights(
                weights, shift=layer.shift, name=layer.path, origin=origins(layer.plan, sizes)
            )
            owner.set_arithmetic(settings.arithmetic)
            owners[layer.path] = owner
        with _installed(self._model, owners):
            error = 0.0
            for positional, named, expected in self._calls:
                reached = _tensors(self._module(*positional, **named))
                for value, meant in zip(reached, expected, strict=True):
                    error += float((value.float() - meant.float()).square().sum(dtype=torch.float64))
        return error


def _tensors(output: Any) -> list[torch.Tensor]:
    return list(output) if isinstance(output, tuple) else [output]


@contextmanager
def _installed(model: nn.Module, owners: Mapping[str, QuantizedLinear]) -> Iterator[None]:
    """`install` for the duration of the context."""
    replaced = {origin.name for owner in owners.values() for origin in owner.origin} | owners.keys()
    before = {path: model.get_submodule(path) if _exists(model, path) else None for path in replaced}
    install(model, owners)
    try:
        yield
    finally:
        for path, module in before.items():
            parent, _, name = path.rpartition(".")
            if module is None:
                delattr(model.get_submodule(parent), name)
            else:
                setattr(model.get_submodule(parent), name, module)


def _exists(model: nn.Module, path: str) -> bool:
    parent, _, name = path.rpartition(".")
    return name in model.get_submodule(parent)._modules
