"""LoRA files: reading, recognising and converting every format in use for FLUX.1."""

from nunchaku_lora.formats.canonical import MAX_RANK, LinearShape, Lora, ModuleLora, NothingFitsError, convert
from nunchaku_lora.formats.names import format_name
from nunchaku_lora.formats.published import convert_published, is_published
from nunchaku_lora.formats.reading import Source, read_lora

__all__ = [
    "MAX_RANK",
    "LinearShape",
    "Lora",
    "ModuleLora",
    "NothingFitsError",
    "Source",
    "convert",
    "convert_published",
    "format_name",
    "is_published",
    "read_lora",
]
