"""Float tensors to 4-bit tensors: round to nearest, searched scales, smoothing, low-rank branches, calibration."""

from nunchaku_kernels.quantize.activations import quantized_activations
from nunchaku_kernels.quantize.awq import quantize_w4a16
from nunchaku_kernels.quantize.error import relative_output_error
from nunchaku_kernels.quantize.int4 import quantize_int4
from nunchaku_kernels.quantize.lowrank import truncated_svd
from nunchaku_kernels.quantize.modulation import quantize_modulation
from nunchaku_kernels.quantize.moments import InputMoments
from nunchaku_kernels.quantize.nvfp4 import quantize_nvfp4
from nunchaku_kernels.quantize.refine import Refined, quantize_refined
from nunchaku_kernels.quantize.smoothing import InputSpans, candidates, published_candidates, smoothing_from_weights
from nunchaku_kernels.quantize.svdq import quantize_svdq

__all__ = [
    "InputMoments",
    "InputSpans",
    "Refined",
    "candidates",
    "published_candidates",
    "quantize_int4",
    "quantize_modulation",
    "quantize_nvfp4",
    "quantize_refined",
    "quantize_svdq",
    "quantize_w4a16",
    "quantized_activations",
    "relative_output_error",
    "smoothing_from_weights",
    "truncated_svd",
]
