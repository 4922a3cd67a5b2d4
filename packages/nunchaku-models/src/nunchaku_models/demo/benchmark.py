"""The demo for benchmarks of other packages, which find this module by the entry-point group `nunchaku.demo`."""

from collections.abc import Sequence
from typing import Any

import torch

from nunchaku_models import demo
from nunchaku_models.demo.prompts import LONG_LIST
from nunchaku_models.evaluation.metrics import psnr, ssim

__all__ = ["arguments", "calibration_prompts", "pipeline", "prompts", "psnr", "ssim"]

CALIBRATION_PROMPTS = 16


def pipeline(dtype: torch.dtype) -> Any:
    """The pipeline before it was quantised, on the CPU."""
    from diffusers import FluxPipeline  # takes seconds

    return FluxPipeline.from_pretrained(demo.PIPELINE, dtype=dtype)


def arguments() -> dict[str, Any]:
    """What its call takes beside the prompts."""
    return demo.defaults()


def prompts() -> Sequence[str]:
    """Of pictures to compare; none of them is one of `calibration_prompts`."""
    return _in_style(LONG_LIST[: CALIBRATION_PROMPTS - 1 : -1])


def calibration_prompts() -> Sequence[str]:
    """Of pictures to fit something on."""
    return _in_style(LONG_LIST[:CALIBRATION_PROMPTS])


def _in_style(names: Sequence[str]) -> list[str]:
    return [f"{name}, noto style" for name in names]
