"""Activations as a layer's arithmetic sees them: quantised and decoded again, for judging and calibrating weights."""

import torch
from torch.nn.functional import pad

from nunchaku_kernels._checks import FLOAT_DTYPES, ceil_to, require_tensor
from nunchaku_kernels.formats.e2m1 import decode
from nunchaku_kernels.ops.arithmetic import Arithmetic
from nunchaku_kernels.reference import nvfp4, w4a4, w4a8


def quantized_activations(
    x: torch.Tensor, smooth: torch.Tensor, shift: float = 0.0, arithmetic: Arithmetic = "w4a4"
) -> torch.Tensor:
    """What the quantised path of a layer multiplies its weights with, by the reference quantiser of `arithmetic`.

    Args:
        x: fp32, fp16 or bf16 [M, K]; any K, the last group is padded with zeros.
        smooth: divisors [K].
        shift: added before smoothing; if positive, "w4a4" uses unsigned codes, as `nn.SVDQLinear` does.
        arithmetic: "w4a16" smooths and rounds nothing to 4 or 8 bits.

    Returns:
        fp32 [M, K], an approximation of `(x + shift) / smooth`.
    """
    require_tensor("x", x, (None, None), FLOAT_DTYPES)
    columns = x.shape[1]
    require_tensor("smooth", smooth, (columns,), FLOAT_DTYPES)
    if arithmetic == "w4a16":
        return (x + shift if shift else x).float() / smooth.float()
    padding = ceil_to(columns, 64) - columns
    if padding:
        x, smooth = pad(x, (0, padding), value=-shift), pad(smooth, (0, padding), value=1.0)
    if arithmetic == "w4a4":
        codes, scales = w4a4.quantize_tokens(x, smooth, shift, unsigned=shift > 0)
        values = codes.float()
    elif arithmetic == "w4a8":
        codes, token_scales = w4a8.quantize_tokens(x, smooth, shift)
        values, scales = codes.float(), token_scales.unsqueeze(1)
    elif arithmetic == "nvfp4":
        if shift:
            raise ValueError(f"shift: expected 0 with arithmetic 'nvfp4', got {shift}")
        codes, scales = nvfp4.quantize_tokens(x, smooth)
        values = decode(codes)
    else:
        raise ValueError(f"arithmetic: expected 'w4a4', 'w4a8', 'nvfp4' or 'w4a16', got {arithmetic!r}")
    decoded = values.unflatten(1, (scales.shape[1], -1)) * scales.float().unsqueeze(-1)
    return decoded.flatten(1)[:, :columns]
