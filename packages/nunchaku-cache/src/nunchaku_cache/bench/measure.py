"""Draw with a cache and without: pictures, executed block FLOPs, seconds."""

import contextlib
import copy
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

Enable = Callable[[Any], None]
"""Puts a cache on a pipeline."""

SAME_ROUNDED = 100.0
"""dB; what equal 8-bit pictures count as: more than those that differ by one level in one value."""
SAME = 120.0
"""dB; what equal unrounded pictures count as: about the rounding of float32."""


class Demo(Protocol):
    """The model that is measured, from whoever has one; a module of such functions is one."""

    def pipeline(self, dtype: torch.dtype) -> Any:
        """A diffusers pipeline."""

    def arguments(self) -> dict[str, Any]:
        """What its call takes beside the prompts."""

    def prompts(self) -> Sequence[str]:
        """Of the pictures that are compared."""

    def calibration_prompts(self) -> Sequence[str]:
        """Others, on which schedules and ratios may be fitted."""

    def psnr(self, picture: Any, reference: Any) -> float:
        """Of two PIL pictures, in dB."""

    def ssim(self, picture: Any, reference: Any) -> float:
        """Of two PIL pictures."""


@dataclass(frozen=True)
class Conditions:
    """What is the same for all dtypes and numbers of steps.

    Attributes:
        prompts: how many of the model's prompts are drawn.
        calibration: how many of its calibration prompts, at most, schedules and ratios are fitted on.
        settings: at most so many per method, spread over all of them; None for all.
        batch: pictures per call.
        rounds: how often everything is drawn; the fastest counts.
        device: torch device.
    """

    prompts: int
    calibration: int
    settings: int | None
    batch: int
    rounds: int
    device: str


@dataclass
class Drawn:
    """Pictures, (channels, height, width) in 0..1 each, and what they cost."""

    pictures: list[torch.Tensor]
    flops: float
    seconds: float


class BlockWork:
    """Counts the FLOPs of all linears in a transformer's blocks, as they are executed."""

    def __init__(self, transformer: nn.Module) -> None:
        self.flops = 0.0
        blocks = [module for module in transformer.children() if isinstance(module, nn.ModuleList)]
        for linear in {m for block in blocks for m in block.modules() if isinstance(m, nn.Linear)}:
            linear.register_forward_hook(self._count)

    def _count(self, linear: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        self.flops += 2.0 * inputs[0].numel() * output.shape[-1]


class Quality(NamedTuple):
    """How near pictures are to the uncached ones.

    Attributes:
        psnr, worst: of 8-bit pictures, mean and least, in dB. Rounding hides errors below half a level, and makes a
            whole level of some of them.
        unrounded: mean PSNR before that rounding, in dB.
        ssim: mean, of 8-bit pictures.
    """

    psnr: float
    worst: float
    unrounded: float
    ssim: float


class Bench:
    """One model, dtype and number of steps; every cache gets a copy of the transformer, so that none meets another.

    Args:
        demo: the model.
        dtype: of its parameters and activations.
        steps: of a call.
        conditions: see there.

    Raises:
        ValueError: the model has fewer prompts.
    """

    def __init__(self, demo: Demo, *, dtype: torch.dtype, steps: int, conditions: Conditions) -> None:
        self._demo = demo
        self._prompts = list(demo.prompts())[: conditions.prompts]
        if len(self._prompts) < conditions.prompts:
            raise ValueError(f"the model has {len(self._prompts)} prompts, {conditions.prompts} were asked for")
        self._conditions = conditions
        self._pipe = demo.pipeline(dtype).to(conditions.device)
        self._pipe.set_progress_bar_config(disable=True)
        self._arguments = {**demo.arguments(), "num_inference_steps": steps}
        self.dtype = dtype
        self.steps = steps
        first = self._prompts[: conditions.batch]
        self.call(self._pipe, first, range(len(first)), num_inference_steps=2)  # the first call of a shape is slow
        self.plain = self.draw(lambda pipe: None)

    def draw(self, enable: Enable) -> Drawn:
        """All pictures, in batches; the time of the fastest of some rounds.

        Raises:
            FloatingPointError: a picture is not finite.
        """
        pipe = self._own_pipeline()
        work = BlockWork(pipe.transformer)
        enable(pipe)
        seconds: list[float] = []
        pictures: list[torch.Tensor] = []
        for _ in range(self._conditions.rounds):
            work.flops, pictures = 0.0, []
            _synchronize(pipe.device)
            begun = time.perf_counter()
            for first in range(0, len(self._prompts), self._conditions.batch):
                prompts = self._prompts[first : first + self._conditions.batch]
                pictures += self.call(pipe, prompts, range(first, first + len(prompts)))
            _synchronize(pipe.device)
            seconds.append(time.perf_counter() - begun)
        if not all(picture.isfinite().all() for picture in pictures):
            raise FloatingPointError("pictures with values that are not finite")
        return Drawn(pictures, work.flops, min(seconds))

    def calibrate(self, enable: Callable[[Any], AbstractContextManager[Any]]) -> Any:
        """Draw the calibration prompts in one call, inside of what `enable` returns; returns what that gave."""
        pipe = self._own_pipeline()
        prompts = list(self._demo.calibration_prompts())[: self._conditions.calibration]
        with enable(pipe) as found:
            self.call(pipe, prompts, range(10_000, 10_000 + len(prompts)))
        return found

    def call(self, pipe: Any, prompts: Sequence[str], seeds: Sequence[int], **changes: Any) -> list[torch.Tensor]:
        """One call of a pipeline: a picture per prompt, from the noise of its seed (drawn on the CPU)."""
        arguments = {**self._arguments, "output_type": "pt", **changes}
        negative = arguments.pop("negative_prompt", None)
        negatives = {} if negative is None else {"negative_prompt": [negative] * len(prompts)}
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        return list(pipe(list(prompts), generator=generators, **negatives, **arguments).images)

    def quality(self, drawn: Drawn) -> Quality:
        """To the uncached pictures."""
        pairs = list(zip(drawn.pictures, self.plain.pictures, strict=True))
        to = self._pipe.image_processor
        rounded = [to.numpy_to_pil(to.pt_to_numpy(torch.stack(pair))) for pair in pairs]
        psnr = [min(SAME_ROUNDED, self._demo.psnr(picture, reference)) for picture, reference in rounded]
        ssim = [self._demo.ssim(picture, reference) for picture, reference in rounded]
        unrounded = statistics.fmean(psnr_unrounded(picture, reference) for picture, reference in pairs)
        return Quality(statistics.fmean(psnr), min(psnr), unrounded, statistics.fmean(ssim))

    def _own_pipeline(self) -> Any:
        """A pipeline with a transformer of its own, and a class: cache-dit wraps the call of a pipeline's class."""
        original = type(self._pipe)
        kind = type(original.__name__, (original,), {"__module__": original.__module__})
        pipe = kind(**{**self._pipe.components, "transformer": copy.deepcopy(self._pipe.transformer)})
        pipe.set_progress_bar_config(disable=True)
        return pipe


def psnr_unrounded(picture: torch.Tensor, reference: torch.Tensor) -> float:
    """Of pictures with values in 0..1, in dB, at most `SAME`."""
    error = float((picture.double() - reference.double()).square().mean())
    return min(SAME, -10 * math.log10(error)) if error else SAME


@contextlib.contextmanager
def full_float32() -> Iterator[None]:
    """Products in float32 are not rounded to TF32 or bfloat16, as cuDNN's are by default."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
