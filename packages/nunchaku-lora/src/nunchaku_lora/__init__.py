"""LoRA on 4-bit diffusion transformers, through the ordinary PEFT and diffusers calls.

Call `enable()` once; see the README.
"""

import logging
from typing import TYPE_CHECKING

from nunchaku_kernels.lazy import lazy_names as _lazy_names

if TYPE_CHECKING:
    from nunchaku_lora.adapters import keep_joined, reset, set_strength
    from nunchaku_lora.loading import LoadReport, load_lora_weights, report
    from nunchaku_lora.registration import disable, enable, is_enabled

__version__ = "0.1.0"

logging.getLogger(__name__).addHandler(logging.NullHandler())

_LAZY = {
    "LoadReport": "nunchaku_lora.loading",
    "disable": "nunchaku_lora.registration",
    "enable": "nunchaku_lora.registration",
    "is_enabled": "nunchaku_lora.registration",
    "keep_joined": "nunchaku_lora.adapters",
    "load_lora_weights": "nunchaku_lora.loading",
    "report": "nunchaku_lora.loading",
    "reset": "nunchaku_lora.adapters",
    "set_strength": "nunchaku_lora.adapters",
}
__all__ = [
    "LoadReport",
    "disable",
    "enable",
    "is_enabled",
    "keep_joined",
    "load_lora_weights",
    "report",
    "reset",
    "set_strength",
]

# diffusers and peft take seconds to import; `nunchaku --help` should not wait for them
__getattr__, __dir__ = _lazy_names(__name__, _LAZY)
