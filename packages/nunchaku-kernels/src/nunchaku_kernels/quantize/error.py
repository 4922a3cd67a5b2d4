"""How far a quantised linear is off, on given inputs."""

import torch

from nunchaku_kernels._checks import FLOAT_DTYPES, require_tensor
from nunchaku_kernels.formats import SVDQWeights
from nunchaku_kernels.ops.arithmetic import Arithmetic
from nunchaku_kernels.quantize.activations import quantized_activations
from nunchaku_kernels.quantize.residual import QuantizedResidual


def relative_output_error(
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    quantized: SVDQWeights,
    x: torch.Tensor,
    *,
    shift: float = 0.0,
    arithmetic: Arithmetic = "w4a4",
) -> float:
    """`E |y - y'|^2 / E |y - E y|^2` of a quantised linear against the original.

    Args:
        weight, bias: the original, [N, K] and [N] or None.
        quantized: its quantised form, K padded or not; a missing bias counts as zeros.
        x: fp32, fp16 or bf16 tokens [M, K].
        shift, arithmetic: how the layer will run.

    Returns:
        0 for a perfect layer; the plain squared error where y does not vary.
    """
    require_tensor("weight", weight, (None, None), FLOAT_DTYPES)
    columns = weight.shape[1]
    require_tensor("x", x, (None, columns), FLOAT_DTYPES)
    tokens = quantized_activations(x, quantized.smooth[:columns], shift, arithmetic)
    residual = QuantizedResidual(quantized.codes, quantized.scales, quantized.wtscale, quantized.wcscales)
    difference = tokens @ residual.dequantize()[:, :columns].t()
    if quantized.rank:
        down = quantized.proj_down[:, :columns].float()
        difference += (x.float() @ down.t()) @ quantized.proj_up.float().t()
    if quantized.bias is not None:
        difference += quantized.bias.float()
    original = torch.nn.functional.linear(x.float(), weight.float(), None if bias is None else bias.float())
    difference -= original
    variation = (original - original.mean(dim=0)).square().sum(dtype=torch.float64)
    error = difference.square().sum(dtype=torch.float64)
    return float(error / variation) if variation > 0 else float(error)
