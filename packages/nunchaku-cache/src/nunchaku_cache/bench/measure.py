"""Draw with a cache and without: pictures, executed block FLOPs, seconds."""

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

Enable = Callable[[Any], None]
"""Puts a cache on a pipeline."""


class Demo(Protocol):
    """The model that is measured, from whoever has one."""

    def pipeline(self) -> Any:
        """A diffusers pipeline in 16 bits."""

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


@dataclass
class Drawn:
    """Pictures and what they cost."""

    pictures: list[Any]
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


class Bench:
    """One model and number of steps; every cache gets a copy of the transformer, so that none meets another."""

    def __init__(self, demo: Demo, *, steps: int, batch: int, device: str, rounds: int) -> None:
        self._demo = demo
        self._batch = batch
        self._rounds = rounds
        self._pipe = demo.pipeline().to(device)
        self._pipe.set_progress_bar_config(disable=True)
        self._arguments = {**demo.arguments(), "num_inference_steps": steps}
        self.steps = steps
        self.call(self._pipe, list(demo.prompts())[:1], [0])  # warm-up
        self.plain = self.draw(lambda pipe: None)

    def draw(self, enable: Enable) -> Drawn:
        """All pictures, in batches; the time of the fastest of some rounds."""
        pipe = self._own_pipeline()
        work = BlockWork(pipe.transformer)
        enable(pipe)
        seconds: list[float] = []
        pictures: list[Any] = []
        for _ in range(self._rounds):
            work.flops, pictures = 0.0, []
            _synchronize(pipe.device)
            begun = time.perf_counter()
            for prompts, seeds in self._batches(self._demo.prompts()):
                pictures += self.call(pipe, prompts, seeds)
            _synchronize(pipe.device)
            seconds.append(time.perf_counter() - begun)
        return Drawn(pictures, work.flops, min(seconds))

    def calibrate(self, enable: Callable[[Any], AbstractContextManager[Any]]) -> Any:
        """Draw the calibration prompts in one call, inside of what `enable` returns; returns what that gave."""
        pipe, prompts = self._own_pipeline(), list(self._demo.calibration_prompts())
        with enable(pipe) as found:
            self.call(pipe, prompts, range(10_000, 10_000 + len(prompts)))
        return found

    def _own_pipeline(self) -> Any:
        """A pipeline with a transformer of its own."""
        own = copy.deepcopy(self._pipe.transformer)
        pipe = type(self._pipe)(**{**self._pipe.components, "transformer": own})
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def call(self, pipe: Any, prompts: Sequence[str], seeds: Sequence[int]) -> list[Any]:
        """One call of a pipeline: a picture per prompt, from the noise of its seed (drawn on the CPU)."""
        arguments = dict(self._arguments)
        negative = arguments.pop("negative_prompt", None)
        negatives = {} if negative is None else {"negative_prompt": [negative] * len(prompts)}
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        pictures: list[Any] = pipe(list(prompts), generator=generators, **negatives, **arguments).images
        return pictures

    def quality(self, drawn: Drawn) -> tuple[float, float]:
        """Mean PSNR (dB; pictures that are the same count as 100) and SSIM to the uncached pictures."""
        pairs = list(zip(drawn.pictures, self.plain.pictures, strict=True))
        psnr = [min(100.0, self._demo.psnr(picture, reference)) for picture, reference in pairs]
        ssim = [self._demo.ssim(picture, reference) for picture, reference in pairs]
        return sum(psnr) / len(psnr), sum(ssim) / len(ssim)

    def _batches(self, prompts: Sequence[str]) -> Iterator[tuple[Sequence[str], range]]:
        for first in range(0, len(prompts), self._batch):
            part = prompts[first : first + self._batch]
            yield part, range(first, first + len(part))


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
