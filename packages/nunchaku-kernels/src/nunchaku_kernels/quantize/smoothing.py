"""Smoothing vectors from weights alone, for quantising without calibration data (svdquant_algorithm.md 3).

The error of a 4-bit product is about `|W s|^2 |x / s|^2`, whose minimum is s_k ~ sqrt(x_k / w_k). The size of the
activations is unknown here, which leaves s_k ~ w_k ** -1/2. Measured on synthetic layers (heavy-tailed weights with a
low-rank part, channel spread 20 to 50 %, log-correlation rho of weight and activation size): against no smoothing the
W4A8 error changes by -2 to -4 % at rho = 0.3, -4 to -12 % at 0 and -6 to -21 % at -0.4; the W4A4 error by +1 to +5 %,
-3 to -7 % and -7 to -19 %. Root mean squares beat column maxima, which heavy tails make noisy.
A vector calibrated on activations is better where one can be had.
"""

from collections.abc import Sequence

import torch

from nunchaku_kernels._checks import FLOAT_DTYPES, HALF_DTYPES, require_finite, require_tensor
from nunchaku_kernels.quantize._blocks import row_blocks

# A channel beyond this factor of the typical one is an outlier, which the low-rank branch takes better than smoothing.
_LIMIT = 16.0


def smoothing_from_weights(
    weights: torch.Tensor | Sequence[torch.Tensor], *, beta: float = 0.5, dtype: torch.dtype = torch.bfloat16
) -> torch.Tensor:
    """`s_k = rms_n(W[n,k]) ** -beta`, with geometric mean 1 before it is limited to 1/16..16.

    Args:
        weights: fp32, fp16 or bf16 [N, K], finite; or several that share their input, each counted alike whatever its
            magnitude and number of rows.
        beta: 0 gives ones, 1 makes all weight columns equally large.
        dtype: fp16 or bf16, of the result.

    Returns:
        [K], positive and finite; 1 for channels without weights.
    """
    members = [weights] if isinstance(weights, torch.Tensor) else list(weights)
    if not members:
        raise ValueError("weights: expected at least one tensor, got none")
    if dtype not in HALF_DTYPES:
        raise TypeError(f"dtype: expected float16 or bfloat16, got {dtype}")
    if not 0 <= beta <= 1:
        raise ValueError(f"beta: expected a number in 0..1, got {beta}")
    columns = require_tensor("weights[0]", members[0], (None, None), FLOAT_DTYPES).shape[1]
    energy = torch.zeros(columns, device=members[0].device)
    for index, weight in enumerate(members):
        require_tensor(f"weights[{index}]", weight, (None, columns), FLOAT_DTYPES)
        energy += _column_energy(f"weights[{index}]", weight)
    used = energy > 0
    logarithm = torch.where(used, energy, 1.0).log() / 2
    if used.any():
        logarithm = torch.where(used, logarithm - logarithm[used].mean(), 0.0)
    return torch.exp(-beta * logarithm).clamp(1 / _LIMIT, _LIMIT).to(dtype)


def _column_energy(name: str, weight: torch.Tensor) -> torch.Tensor:
    """Share of every column in the squared norm of the matrix, fp32 [K]; zeros for a zero matrix."""
    energy = torch.zeros(weight.shape[1], device=weight.device)
    if not weight.numel():
        return energy
    # Relative to the largest entry, so that squares neither overflow nor vanish.
    low, high = torch.aminmax(weight)
    require_finite(name, torch.stack((low, high)))
    largest = torch.maximum(high, -low).float()
    unit = torch.where(largest > 0, largest, 1.0)
    for rows in row_blocks(*weight.shape):
        block = weight[rows].float() / unit
        # A product with ones sums rows several times faster than a reduction over the first axis.
        energy += torch.ones_like(block[:, 0]) @ block.square_()
    total = energy.sum()
    return energy / torch.where(total > 0, total, 1.0)
