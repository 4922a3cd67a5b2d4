"""4-bit text encoders that are ordinary models of transformers.

Importing this package makes the method `nunchaku_w4a16` known to transformers: plain `from_pretrained` then loads
quantised folders, pipelines of diffusers with such a text encoder included.
"""

import importlib
import logging
from typing import TYPE_CHECKING

from nunchaku_kernels.after_import import after_import as _after_import
from nunchaku_kernels.lazy import lazy_names as _lazy_names

if TYPE_CHECKING:
    from nunchaku_t5.config import LayerForm, W4A16Config
    from nunchaku_t5.encoder import NunchakuT5EncoderModel
    from nunchaku_t5.errors import CheckpointError
    from nunchaku_t5.layers import EncoderLinear, Int8Embedding
    from nunchaku_t5.quantize import QuantizationReport, quantize_encoder
    from nunchaku_t5.quantizer import W4A16Quantizer, register

__version__ = "0.1.0"

logging.getLogger(__name__).addHandler(logging.NullHandler())

_LAZY = {
    "CheckpointError": "nunchaku_t5.errors",
    "EncoderLinear": "nunchaku_t5.layers",
    "Int8Embedding": "nunchaku_t5.layers",
    "LayerForm": "nunchaku_t5.config",
    "NunchakuT5EncoderModel": "nunchaku_t5.encoder",
    "QuantizationReport": "nunchaku_t5.quantize",
    "W4A16Config": "nunchaku_t5.config",
    "W4A16Quantizer": "nunchaku_t5.quantizer",
    "quantize_encoder": "nunchaku_t5.quantize",
    "register": "nunchaku_t5.quantizer",
}
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

# transformers takes seconds to import; `nunchaku --help` should not wait for it
__getattr__, __dir__ = _lazy_names(__name__, _LAZY)


def _register() -> None:
    importlib.import_module("nunchaku_t5.quantizer")


# the package, not its module `auto`: what registers is imported from it
_after_import("transformers.quantizers", _register)
