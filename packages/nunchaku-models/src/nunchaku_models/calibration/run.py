"""Calibrating a whole transformer: record calls, then go through it block by block, keeping what is done."""

import gc
import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm import tqdm

from nunchaku_kernels import __version__ as kernels_version
from nunchaku_kernels.ops import Arithmetic, check_arithmetic
from nunchaku_models import __version__
from nunchaku_models.calibration.blocks import BlockStream, LoadedBlock
from nunchaku_models.calibration.layers import BlockLayer, Results, Settings
from nunchaku_models.calibration.published import calibrate_block
from nunchaku_models.calibration.records import Call, record_calls
from nunchaku_models.calibration.refined import refine_block
from nunchaku_models.calibration.work import WorkFolder
from nunchaku_models.checkpoints import CheckpointError, DiffusersView
from nunchaku_models.families import Family
from nunchaku_models.layers import PlannedLayer

TOKENS_PER_CHANNEL = 48
"""Tokens to calibrate on, for each input channel of the widest layer."""
MAX_BATCH = 16
_SMALL_MODEL = 1_000_000_000
"""Parameters below which several prompts are drawn at once: a large model fills its device with one."""


@dataclass(frozen=True)
class Calibration:
    """How to calibrate.

    Attributes:
        recipe: "svdquant" as published, or "refined".
        prompts: what to draw.
        gptq: with "svdquant", round the residual with GPTQ; "refined" always does more than that.
        base: pipeline that completes the transformer, None if the model is a pipeline.
        arithmetic: how the layers will be multiplied; None for the format's own 4-bit activations.
        device: where to run; None for a GPU if there is one.
        offload: keep on the GPU only the part that runs.
        steps, size, guidance: of the calibration pictures; None for the pipeline's own.
    """

    recipe: Literal["svdquant", "refined"]
    prompts: tuple[str, ...]
    gptq: bool = False
    base: str | os.PathLike[str] | None = None
    arithmetic: Arithmetic | None = None
    device: str | None = None
    offload: bool = False
    steps: int | None = None
    size: tuple[int, int] | None = None
    guidance: float | None = None


class CalibratedLayers:
    """The quantised layers of a finished calibration.

    Args:
        work: where they are.
        blocks: path of a layer -> path of its block.
    """

    def __init__(self, work: WorkFolder, blocks: Mapping[str, str]) -> None:
        self._work, self._blocks = work, blocks

    def tensors(self, layer: PlannedLayer) -> Mapping[str, torch.Tensor]:
        """Name -> published tensor."""
        return self._work.layer(self._blocks[layer.path], layer.path)


def calibrate(
    view: DiffusersView,
    family: Family,
    config: Mapping[str, Any],
    layers: Sequence[PlannedLayer],
    model: str | os.PathLike[str],
    options: Calibration,
    *,
    precision: Literal["int4", "nvfp4"],
    rank: int,
    dtype: torch.dtype,
    seed: int,
    work: WorkFolder,
    progress: bool = True,
) -> CalibratedLayers:
    """Quantise every layer for the inputs it gets while the pipeline draws the prompts.

    Args:
        view: the 16-bit transformer.
        family, config: its page and configuration.
        layers: what to quantise.
        model: where `view` came from; a pipeline, unless the options name a base.
        options: see there.
        precision, rank, dtype, seed: as in `quantize_checkpoint`.
        work: where finished steps are kept, and found again.
        progress: show bars with the remaining time.

    Raises:
        ValueError, CheckpointError: a pipeline, prompt setting or device that does not fit.
    """
    from nunchaku_models.generation import resolve_device  # imports as in `_recorded`

    place = resolve_device(options.device)
    if not work.has_calls():
        work.keep_calls(_recorded(view, layers, model, options, dtype, seed, progress))
    arithmetic = options.arithmetic or ("nvfp4" if precision == "nvfp4" else "w4a4")
    check_arithmetic("calibration", precision, arithmetic)
    settings = Settings(precision, rank, dtype, arithmetic, options.gptq, seed, place)
    stream = BlockStream(view, family, config, work.calls(), dtype=dtype, device=place)
    blocks = {layer.path: path for path in stream.paths for layer in layers if layer.path.startswith(f"{path}.")}
    total = sum(_cost(view, layer) for layer in layers)
    with tqdm(total=total, unit="param", unit_scale=True, desc="calibrate", disable=not progress) as bar:
        for block in stream:
            planned = [layer for layer in layers if blocks[layer.path] == block.path]
            share = sum(_cost(view, layer) for layer in planned)
            if work.has_block(block.path, [layer.path for layer in planned]):
                for _ in block.advance():
                    pass
                bar.update(share)
                bar.unpause()
                continue
            for done in _calibrated(stream, block, planned, view, options, settings, work):
                bar.update(min(share * done, total - bar.n))  # shares add up to 1 but for rounding
    return CalibratedLayers(work, blocks)


def _calibrated(
    stream: BlockStream,
    block: LoadedBlock,
    planned: Sequence[PlannedLayer],
    view: DiffusersView,
    options: Calibration,
    settings: Settings,
    work: WorkFolder,
) -> Iterator[float]:
    """Calibrate a block; yields shares of the work, which add up to 1."""
    results: Results = {}
    try:
        loaded = [BlockLayer.load(plan, block.path, view, settings) for plan in planned]
        steps = 2 * len(block.calls) + len(loaded)
        if options.recipe == "refined":
            work_on = refine_block(block, loaded, settings, results)
        else:
            work_on = calibrate_block(stream.model, block, loaded, settings, results)
        for _ in work_on:
            yield 1 / steps
    except ValueError as error:
        raise CheckpointError(f"{block.path} of {view.where}: {error}") from error
    work.keep_block(block.path, results)


def _recorded(
    view: DiffusersView,
    layers: Sequence[PlannedLayer],
    model: str | os.PathLike[str],
    options: Calibration,
    dtype: torch.dtype,
    seed: int,
    progress: bool,
) -> list[Call]:
    """Run the 16-bit pipeline on the prompts."""
    # they import diffusers, which takes seconds and which quantising without data does without
    from nunchaku_models.generation import call_arguments, load_pipeline
    from nunchaku_models.loading import load_16bit_weights

    root = options.base if options.base is not None else model
    loaded = load_pipeline(root, device=options.device, dtype=dtype, offload=options.offload)
    if options.base is not None:
        load_16bit_weights(loaded.pipeline.transformer, view)
    arguments = call_arguments(
        loaded.pipeline, loaded.defaults, steps=options.steps, size=options.size, guidance=options.guidance
    )
    small = sum(value.numel() for value in loaded.pipeline.transformer.parameters()) < _SMALL_MODEL
    batch = max(1, min(MAX_BATCH, len(options.prompts) // 4)) if small else 1
    widest = max(view.info(f"{layer.sources[0]}.weight").shape[1] for layer in layers)
    calls = record_calls(
        loaded.pipeline,
        options.prompts,
        arguments,
        batch=batch,
        tokens=TOKENS_PER_CHANNEL * widest,
        seed=seed,
        progress=progress,
    )
    del loaded
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return calls


def fingerprint(
    view: DiffusersView, options: Calibration, *, precision: str, rank: int, dtype: torch.dtype, seed: int
) -> dict[str, Any]:
    """Everything that a calibration's result depends on, as plain values."""
    header = hashlib.sha256()
    for name in sorted(view):
        info = view.info(name)
        header.update(f"{name} {info.dtype} {info.shape}".encode())
        value = view.tensor(name).reshape(-1)
        header.update(value[:: max(1, value.numel() // 64)].float().numpy().tobytes())
        view.release(name)
    prompts = hashlib.sha256(json.dumps(options.prompts).encode()).hexdigest()
    return {
        "model": header.hexdigest(),
        "recipe": options.recipe,
        "prompts": prompts,
        "gptq": options.gptq and options.recipe == "svdquant",
        "base": None if options.base is None else os.fspath(options.base),
        "arithmetic": options.arithmetic,
        "steps": options.steps,
        "size": None if options.size is None else list(options.size),
        "guidance": options.guidance,
        "precision": precision,
        "rank": rank,
        "dtype": str(dtype),
        "seed": seed,
        "nunchaku-models": __version__,
        "nunchaku-kernels": kernels_version,
    }


def work_path(output: Path) -> Path:
    """Where an unfinished calibration for this output is kept."""
    return output.with_name(f"{output.name}.calibration")


def _cost(view: DiffusersView, layer: PlannedLayer) -> int:
    return sum(math.prod(view.info(f"{source}.weight").shape) for source in layer.sources)
