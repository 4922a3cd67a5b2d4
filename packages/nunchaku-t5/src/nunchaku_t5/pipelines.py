"""What `nunchaku generate --t5` calls (entry-point group `nunchaku.text_encoders`)."""

import os
from typing import Any

import torch

from nunchaku_t5.convert import EncoderQuantization
from nunchaku_t5.encoder import NunchakuT5EncoderModel
from nunchaku_t5.errors import CheckpointError
from nunchaku_t5.quantize import HALF_DTYPES
from nunchaku_t5.sources import PIPELINE_INDEX, EncoderSource, encoder_part, find, pipeline_index

FOUR_BITS = "4bit"
"""Instead of a file: the pipeline's own encoder, quantised while it is loaded."""


def text_encoder(pipeline: str | os.PathLike[str], source: str, *, dtype: torch.dtype) -> dict[str, Any]:
    """A 4-bit T5 for a pipeline of diffusers.

    Args:
        pipeline: its folder or hub id.
        source: "4bit", or what `NunchakuT5EncoderModel.from_pretrained` takes.
        dtype: of the pipeline.

    Returns:
        The argument for the pipeline's `from_pretrained`: name of the part -> model.

    Raises:
        CheckpointError: the pipeline has no T5, or a file is not what it should be.
    """
    index = pipeline_index(pipeline)
    if index is None:
        raise CheckpointError(f"{pipeline} is no pipeline: it has no {PIPELINE_INDEX}")
    part = encoder_part(index)
    if source != FOUR_BITS:
        return {part: NunchakuT5EncoderModel.from_pretrained(source, dtype=dtype)}
    half = dtype if dtype in HALF_DTYPES else None
    return {part: EncoderQuantization(EncoderSource(find(pipeline)), dtype=half).load(dtype=dtype)}
