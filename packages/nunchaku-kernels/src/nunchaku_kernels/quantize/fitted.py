"""Weight-only quantisation fitted to calibration data: what a W4A16 linear of given size can do at best."""

import torch

from nunchaku_kernels._checks import FLOAT_DTYPES, HALF_DTYPES, require_finite, require_multiple, require_tensor
from nunchaku_kernels.formats import W4A16Weights
from nunchaku_kernels.quantize.affine import AffineCodes, quantize_affine
from nunchaku_kernels.quantize.gptq import descend, gptq
from nunchaku_kernels.quantize.metric import InputMetric


def fit_w4a16(
    weight: torch.Tensor,
    metric: InputMetric,
    *,
    group_size: int = 128,
    bits: int = 4,
    rank: int = 0,
    sweeps: int = 2,
    num_iters: int = 3,
    dtype: torch.dtype = torch.bfloat16,
) -> W4A16Weights:
    """Quantises `y = x @ weight.T` for the inputs that `metric` knows.

    Scales and zeros are searched for by the mean square of each input, codes are rounded with GPTQ, and coordinate
    descent then moves codes, scales and zeros. A low-rank branch is fitted to what the codes leave, the codes to what
    the branch leaves, and so on; the branch has the last word.

    Args:
        weight: fp32, fp16 or bf16 [N, K], finite; K a multiple of `group_size`. Rows are independent: linears with one
            input may be stacked, but share a branch then.
        metric: of the inputs.
        group_size: inputs per scale.
        bits: 4 or 8.
        rank: of the branch; 0 for none.
        sweeps: of coordinate descent after each rounding.
        num_iters: roundings where there is a branch, at least 1.
        dtype: of scales, zeros and factors.

    Raises:
        ValueError: an argument that does not fit.
    """
    require_tensor("weight", weight, (None, metric.hessian.shape[0]), FLOAT_DTYPES)
    require_multiple("weight", "K", weight.shape[1], group_size)
    require_finite("weight", weight)
    if dtype not in HALF_DTYPES:
        raise TypeError(f"dtype: expected float16 or bfloat16, got {dtype}")
    for name, value, least in (("rank", rank, 0), ("sweeps", sweeps, 0), ("num_iters", num_iters, 1)):
        if value < least:
            raise ValueError(f"{name}: expected at least {least}, got {value}")
    target = metric.target(weight.detach())

    def rounded(left: torch.Tensor) -> AffineCodes:
        start = quantize_affine(left, group_size, bits=bits, importance=metric.importance, dtype=dtype)
        codes = gptq(left, start, metric.compensation)
        for _ in range(sweeps):
            codes = descend(left, codes, metric.hessian)
        return codes

    codes = rounded(target)
    if not rank:
        return W4A16Weights(codes.codes, codes.scales, codes.zeros, bits)
    up, down = metric.low_rank(codes.subtracted_from(target), rank, dtype)
    for _ in range(num_iters - 1):
        codes = rounded(torch.addmm(target, up.float(), down.float(), alpha=-1))
        up, down = metric.low_rank(codes.subtracted_from(target), rank, dtype)
    return W4A16Weights(codes.codes, codes.scales, codes.zeros, bits, down, up)
