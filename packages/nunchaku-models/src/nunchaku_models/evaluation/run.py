"""Draw the 16-bit pictures, draw them again with every other transformer, compare."""

import gc
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from nunchaku_kernels.nn import SVDQLinear
from nunchaku_kernels.ops import check_arithmetic
from nunchaku_models import demo
from nunchaku_models.checkpoints import (
    CheckpointError,
    DiffusersView,
    detect_form,
    detect_precision,
    is_quantised,
    open_checkpoint,
)
from nunchaku_models.demo.judge import classify, load_judge
from nunchaku_models.demo.prompts import LONG_LIST, SHORT_LIST
from nunchaku_models.evaluation.drawing import draw
from nunchaku_models.evaluation.metrics import Values, psnr, ssim
from nunchaku_models.evaluation.sheet import MAX_COLUMNS, thumbnail
from nunchaku_models.evaluation.transformers import NotHere, Workshop
from nunchaku_models.evaluation.variants import GAINS, Variant
from nunchaku_models.generation import LoadedPipeline, call_arguments, load_pipeline
from nunchaku_models.layers import quantized_layers
from nunchaku_models.loading import load_16bit_weights

OBJECTS = SHORT_LIST + LONG_LIST
"""What the demo can be asked to draw, best known first."""
NUM_PROMPTS = 64
CALIBRATION_PROMPTS = 256
DTYPE_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}

Pictures = list[list[Image.Image]]
"""[seed][prompt]"""


@dataclass(frozen=True)
class Scores:
    """One row, picture by picture; P prompts, S seeds.

    Attributes:
        psnr: (P, S) dB against the 16-bit pictures.
        ssim: (P, S).
        right: (P, S) whether the judge recognises the object; None without a judge.
    """

    psnr: Values
    ssim: Values
    right: NDArray[np.bool_] | None = None


@dataclass
class Evaluation:
    """What was drawn, and how near each row came.

    Attributes:
        reference: name of the 16-bit row.
        prompts: what was drawn.
        seeds: pictures per prompt.
        steps: denoising steps.
        calibrate: number of calibration prompts; None without rows that take them.
        right: (P, S) the judge on the 16-bit pictures; None without a judge.
        scores: row -> its scores.
        skipped: row -> why it was not run.
        gains: pairs of rows to be compared picture by picture.
        thumbnails: row, the 16-bit one first -> the first pictures of the first seed.
    """

    reference: str
    prompts: list[str]
    seeds: int
    steps: int
    calibrate: int | None = None
    right: NDArray[np.bool_] | None = None
    scores: dict[str, Scores] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    gains: tuple[tuple[str, str], ...] = ()
    thumbnails: dict[str, list[Image.Image]] = field(default_factory=dict)

    def add(self, row: str, pictures: Pictures, reference: Pictures, right: NDArray[np.bool_] | None = None) -> None:
        """Score a row's pictures.

        Raises:
            ValueError: they differ from the 16-bit ones in size.
        """
        pairs = [list(zip(*both, strict=True)) for both in zip(pictures, reference, strict=True)]
        self.scores[row] = Scores(
            np.array([[psnr(*pair) for pair in seed] for seed in pairs]).T,
            np.array([[ssim(*pair) for pair in seed] for seed in pairs]).T,
            right,
        )
        self.keep(row, pictures)

    def keep(self, row: str, pictures: Pictures) -> None:
        """Keep what a contact sheet shows of a row."""
        self.thumbnails[row] = [thumbnail(picture) for picture in pictures[0][:MAX_COLUMNS]]


def evaluate_demo(
    variants: Sequence[Variant],
    *,
    num_prompts: int = NUM_PROMPTS,
    seeds: int = 1,
    calibrate: int = CALIBRATION_PROMPTS,
    work: Path | None = None,
    steps: int | None = None,
    batch: int = 32,
    device: str | None = None,
    dtype: str | None = None,
    progress: bool = True,
) -> Evaluation:
    """Compare the demo model's transformers with its 16-bit one.

    Args:
        variants: the rows.
        num_prompts: objects to draw, 2 to `len(OBJECTS)`, each in noto style.
        seeds: pictures per prompt.
        calibrate: number of calibration prompts of the recipes that take them.
        work: existing folder that keeps the 4-bit files for the next run; None for a temporary one.
        steps: denoising steps; None for the demo's own.
        batch: pictures drawn at once.
        device, dtype: see `generation.load_pipeline`.
        progress: show bars.

    Raises:
        ValueError, CheckpointError: an argument out of range, or a transformer that cannot be made.
    """
    if not 2 <= num_prompts <= len(OBJECTS):
        raise ValueError(f"the demo has from 2 to {len(OBJECTS)} prompts, got {num_prompts}")
    names = OBJECTS[:num_prompts]
    prompts = [f"{name}, noto style" for name in names]
    loaded = load_pipeline(demo.PIPELINE, device=device, dtype=dtype)
    full = loaded.pipeline
    judge = load_judge()
    arguments = call_arguments(full, loaded.defaults, steps=steps)

    def drawn(pipeline: Any, label: str) -> Pictures:
        return draw(pipeline, prompts, seeds=seeds, batch=batch, arguments=arguments, label=label, progress=progress)

    def judged(pictures: Pictures) -> NDArray[np.bool_]:
        guesses = [classify(seed, *judge) for seed in pictures]
        return np.array([[g[0].name == n for g, n in zip(seed, names, strict=True)] for seed in guesses]).T

    result = Evaluation(
        reference=DTYPE_NAMES[full.transformer.dtype],
        prompts=[*names],
        seeds=seeds,
        steps=arguments["num_inference_steps"],
        calibrate=calibrate if any(v.recipe and v.recipe.calibrated for v in variants) else None,
        gains=GAINS,
    )
    reference = drawn(full, result.reference)
    result.right = judged(reference)
    result.keep(result.reference, reference)
    with tempfile.TemporaryDirectory(prefix="nunchaku-evaluate-") as temporary:
        workshop = Workshop(full.transformer, work or Path(temporary), calibrate=calibrate, progress=progress)
        for number, variant in enumerate(variants, start=1):
            try:
                transformer = workshop.make(variant)
            except NotHere as reason:
                result.skipped[variant.row] = str(reason)
                continue
            pipeline = type(full)(**{**full.components, "transformer": transformer})
            pictures = drawn(pipeline, f"{variant.row} ({number} of {len(variants)})")
            result.add(variant.row, pictures, reference, judged(pictures))
    return result


def evaluate_pipelines(
    model: str,
    reference: str,
    prompts: Sequence[str],
    *,
    base: str | None = None,
    seeds: int = 1,
    steps: int | None = None,
    size: tuple[int, int] | None = None,
    guidance: float | None = None,
    batch: int = 1,
    arithmetic: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    progress: bool = True,
) -> Evaluation:
    """Compare a pipeline with a 16-bit one. They are loaded one after the other, never both.

    Args:
        model: see `generation.load_pipeline`; a transformer is completed by `base`, or else by the reference.
        reference: 16-bit pipeline folder or hub id; or a transformer file or folder, completed by `base`.
        prompts: 2 to 1000.
        base: pipeline folder or hub id.
        seeds: pictures per prompt.
        steps, size, guidance: call arguments of both; default: what the reference's folder recommends.
        batch: pictures drawn at once.
        arithmetic: how the 4-bit layers of `model` are multiplied.
        device, dtype: of both, see `generation.load_pipeline`.
        progress: show bars.

    Raises:
        ValueError, CheckpointError: an argument or a model that does not fit; the message says which.
    """
    if _is_transformer(reference) and base is None:
        raise ValueError(f"{reference} is a transformer; add --base with the pipeline that has the rest")
    rest = base or (reference if _is_transformer(model) else None)
    if _is_pipeline_folder(model):
        rest = None  # it is complete
    # read headers first: the second model is opened when the pictures of the first have long been drawn
    with open_checkpoint(reference) as source:
        if is_quantised(detect_form(source)):
            raise CheckpointError(f"{reference} is quantised; the reference must be a 16-bit model")
    with open_checkpoint(model) as source:
        if arithmetic is not None and not is_quantised(detect_form(source)):
            raise CheckpointError(f"{model} is not quantised: there is no arithmetic to choose")
        if arithmetic is not None:
            check_arithmetic(model, detect_precision(source), arithmetic)

    loaded = load_pipeline(base if _is_transformer(reference) else reference, device=device, dtype=dtype)
    if _is_transformer(reference):
        with open_checkpoint(reference) as source:
            load_16bit_weights(loaded.pipeline.transformer, DiffusersView(source))
    arguments = call_arguments(loaded.pipeline, loaded.defaults, steps=steps, size=size, guidance=guidance)

    def drawn(loaded: LoadedPipeline, label: str) -> Pictures:
        return draw(
            loaded.pipeline, prompts, seeds=seeds, batch=batch, arguments=arguments, label=label, progress=progress
        )

    name = DTYPE_NAMES[loaded.pipeline.transformer.dtype]
    expected = drawn(loaded, name)
    result = Evaluation(name, [*prompts], seeds, loaded.pipeline.num_timesteps)
    result.keep(name, expected)
    del loaded
    _free_memory()
    loaded = load_pipeline(model, base=rest, device=device, dtype=dtype, arithmetic=arithmetic)
    layers = quantized_layers(loaded.pipeline.transformer).values()
    used = sorted({str(layer.arithmetic) for layer in layers if isinstance(layer, SVDQLinear)})
    row = f"{Path(model).name}/{'+'.join(used) or name}"
    result.add(row, drawn(loaded, row), expected)
    return result


def _is_transformer(path: str) -> bool:
    """Whether a path means a transformer alone: a file, or a folder that is no pipeline."""
    local = Path(path).expanduser()
    alone = local.is_dir() and not _is_pipeline_folder(path)
    return alone or local.is_file() or path.endswith((".safetensors", ".sft"))


def _is_pipeline_folder(path: str) -> bool:
    return (Path(path).expanduser() / "model_index.json").is_file()


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
