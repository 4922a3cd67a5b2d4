"""Float tensors to 4-bit tensors: round to nearest, searched scales, smoothing, low-rank branches, calibration."""

from nunchaku_kernels.quantize.activations import quantized_activations
from nunchaku_kernels.quantize.affine import AffineCodes, quantize_affine
from nunchaku_kernels.quantize.awq import quantize_w4a16
from nunchaku_kernels.quantize.error import relative_output_error
from nunchaku_kernels.quantize.fitted import fit_w4a16
from nunchaku_kernels.quantize.in_order import BlockInputs, replace_weights
from nunchaku_kernels.quantize.int4 import quantize_int4
from nunchaku_kernels.quantize.lowrank import truncated_svd
from nunchaku_kernels.quantize.metric import InputMetric, PairedMoments
from nunchaku_kernels.quantize.modulation import quantize_modulation
from nunchaku_kernels.quantize.moments import InputMoments
from nunchaku_kernels.quantize.nvfp4 import quantize_nvfp4
from nunchaku_kernels.quantize.plain_awq import awq_round, awq_smoothing
from nunchaku_kernels.quantize.refine import Refined, quantize_refined
from nunchaku_kernels.quantize.sensitivity import choose_wider, output_sensitivities
from nunchaku_kernels.quantize.smoothing import InputSpans, candidates, published_candidates, smoothing_from_weights
from nunchaku_kernels.quantize.svdq import quantize_svdq

__all__ = [
    "AffineCodes",
    "BlockInputs",
    "InputMetric",
    "InputMoments",
    "InputSpans",
    "PairedMoments",
    "Refined",
    "awq_round",
    "awq_smoothing",
    "candidates",
    "choose_wider",
    "fit_w4a16",
    "output_sensitivities",
    "published_candidates",
    "quantize_affine",
    "quantize_int4",
    "quantize_modulation",
    "quantize_nvfp4",
    "quantize_refined",
    "quantize_svdq",
    "quantize_w4a16",
    "quantized_activations",
    "relative_output_error",
    "replace_weights",
    "smoothing_from_weights",
    "truncated_svd",
]
