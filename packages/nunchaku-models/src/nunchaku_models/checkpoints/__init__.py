"""Reading and writing weight files, safely, and the names of the tensors in them."""

from nunchaku_kernels.formats.svdq import Precision
from nunchaku_models.checkpoints.detect import (
    Form,
    detect_family,
    detect_form,
    detect_precision,
    is_quantised,
    quantization_of,
    require_family,
)
from nunchaku_models.checkpoints.diffusers_view import DiffusersView
from nunchaku_models.checkpoints.errors import CheckpointError
from nunchaku_models.checkpoints.finite import is_finite
from nunchaku_models.checkpoints.flux_config import comfy_config, flux_config, infer_flux_config, validate_flux_config
from nunchaku_models.checkpoints.flux_keys import v1_to_v2, v2_to_v1
from nunchaku_models.checkpoints.metadata import (
    FileMetadata,
    QuantizationMetadata,
    build_metadata,
    parse_metadata,
    parse_quantization,
)
from nunchaku_models.checkpoints.safetensors_file import SafetensorsReader, TensorSource
from nunchaku_models.checkpoints.safetensors_header import TensorInfo
from nunchaku_models.checkpoints.safetensors_writer import (
    StreamingWriter,
    atomic_folder,
    by_alignment,
    check_writable,
)
from nunchaku_models.checkpoints.sources import Checkpoint, ShardedReader, open_checkpoint

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "DiffusersView",
    "FileMetadata",
    "Form",
    "Precision",
    "QuantizationMetadata",
    "SafetensorsReader",
    "ShardedReader",
    "StreamingWriter",
    "TensorInfo",
    "TensorSource",
    "atomic_folder",
    "build_metadata",
    "by_alignment",
    "check_writable",
    "comfy_config",
    "detect_family",
    "detect_form",
    "detect_precision",
    "flux_config",
    "infer_flux_config",
    "is_finite",
    "is_quantised",
    "open_checkpoint",
    "parse_metadata",
    "parse_quantization",
    "quantization_of",
    "require_family",
    "v1_to_v2",
    "v2_to_v1",
    "validate_flux_config",
]
