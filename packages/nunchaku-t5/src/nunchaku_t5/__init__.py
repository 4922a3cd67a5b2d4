"""4-bit text encoders that are ordinary models of transformers.

Importing this package makes the method `nunchaku_w4a16` known to transformers: plain `from_pretrained` then loads
quantised folders, pipelines of diffusers with such a text encoder included.
"""

import logging

from nunchaku_t5.config import LayerForm, W4A16Config
from nunchaku_t5.encoder import NunchakuT5EncoderModel
from nunchaku_t5.errors import CheckpointError
from nunchaku_t5.layers import EncoderLinear, Int8Embedding
from nunchaku_t5.quantize import QuantizationReport, quantize_encoder
from nunchaku_t5.quantizer import W4A16Quantizer, register

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "EncoderLinear",
    "Int8Embedding",
    "LayerForm",
    "NunchakuT5EncoderModel",
    "QuantizationReport",
    "W4A16Config",
    "W4A16Quantizer",
    "quantize_encoder",
    "register",
]

logging.getLogger(__name__).addHandler(logging.NullHandler())
register()
