"""What a stored 4-bit weight stands for, as real numbers."""

import torch

from nunchaku_kernels.formats import SVDQWeights
from nunchaku_kernels.formats.e2m1 import decode


def dequantize(weights: SVDQWeights) -> torch.Tensor:
    """The quantised residual in the smoothed space, fp32 [N, K]: code value x group scale x wtscale x wcscales.

    Products of a 4-bit code and a stored scale are exact in fp32; the nvfp4 factors round once each.
    """
    return _grouped(weights) * _output_factors(weights).unsqueeze(1)


def effective_weight(weights: SVDQWeights) -> torch.Tensor:
    """The matrix the layer applies to its raw input when activations are not quantised, fp32 [N, K]."""
    lowrank = weights.proj_up.float() @ weights.proj_down.float()
    return dequantize(weights) / weights.smooth.float() + lowrank


def _grouped(weights: SVDQWeights) -> torch.Tensor:
    values = weights.codes.float() if weights.precision == "int4" else decode(weights.codes)
    grouped = values.view(weights.out_features, -1, weights.group_size)
    return (grouped * weights.scales.float().unsqueeze(-1)).reshape(values.shape)


def _output_factors(weights: SVDQWeights) -> torch.Tensor:
    factors = torch.ones(weights.out_features, device=weights.codes.device)
    if weights.wtscale is not None:
        factors = factors * weights.wtscale.float()
    if weights.wcscales is not None:
        factors = factors * weights.wcscales.float()
    return factors
