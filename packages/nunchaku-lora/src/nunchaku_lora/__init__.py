"""LoRA on 4-bit diffusion transformers, through the ordinary PEFT and diffusers calls.

Call `enable()` once; see the README.
"""

import logging

from nunchaku_lora.adapters import reset
from nunchaku_lora.loading import LoadReport, load_lora_weights, report
from nunchaku_lora.registration import disable, enable, is_enabled

__version__ = "0.1.0"

logging.getLogger(__name__).addHandler(logging.NullHandler())

__all__ = ["LoadReport", "disable", "enable", "is_enabled", "load_lora_weights", "report", "reset"]
