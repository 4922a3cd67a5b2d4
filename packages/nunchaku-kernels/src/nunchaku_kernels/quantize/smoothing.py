"""Smoothing vectors: from weights alone, and the candidates from which calibration chooses (svdquant_algorithm.md 3).

The error of a 4-bit product is about `|W s|^2 |x / s|^2`, whose minimum is s_k ~ sqrt(x_k / w_k). The size of the
activations is unknown here, which leaves s_k ~ w_k ** -1/2. Measured on synthetic layers (heavy-tailed weights with a
low-rank part, channel spread 20 to 50 %, log-correlation rho of weight and activation size): against no smoothing the
W4A8 error changes by -2 to -4 % at rho = 0.3, -4 to -12 % at 0 and -6 to -21 % at -0.4; the W4A4 error by +1 to +5 %,
-3 to -7 % and -7 to -19 %. Root mean squares beat column maxima, which heavy tails make noisy.
A vector calibrated on activations is better where one can be had.
"""

from collections.abc import Iterator, Sequence

import torch

from nunchaku_kernels._checks import FLOAT_DTYPES, HALF_DTYPES, require_finite, require_tensor
from nunchaku_kernels.quantize._blocks import row_blocks

# A channel beyond this factor of the typical one is an outlier, which the low-rank branch takes better than smoothing.
_LIMIT = 16.0
# Wider where the size of a channel was measured: only what a 16-bit type holds badly is cut off.
_CALIBRATED_LIMIT = 1024.0


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


class InputSpans:
    """Absolute maximum and root mean square of each channel of a layer's input, over tokens given in parts.

    Args:
        columns: K.
        shift: added to the input first.
    """

    def __init__(self, columns: int, shift: float = 0.0, device: torch.device | str = "cpu") -> None:
        self.shift = shift
        self._tokens = 0
        self._absmax = torch.zeros(columns, device=device)
        self._squares = torch.zeros(columns, device=device)

    def update(self, x: torch.Tensor) -> None:
        """Take in tokens [M, K]."""
        t = require_tensor("x", x, (None, self._absmax.numel()), FLOAT_DTYPES).float() + self.shift
        if not len(t):
            return
        self._absmax = torch.maximum(self._absmax, t.abs().amax(dim=0))
        self._squares += t.square().sum(dim=0)
        self._tokens += t.shape[0]

    @property
    def absmax(self) -> torch.Tensor:
        """Largest magnitude, fp32 [K]."""
        return self._absmax

    @property
    def rms(self) -> torch.Tensor:
        """Root mean square, fp32 [K]."""
        return (self._squares / max(self._tokens, 1)).sqrt()


def published_candidates(
    spans: InputSpans, weights: Sequence[torch.Tensor], num_grids: int = 20
) -> Iterator[torch.Tensor]:
    """The published quantiser's candidates `x_absmax ** alpha / w_absmax ** beta`, 2 * num_grids - 1 of them.

    Args:
        spans: of the shared input.
        weights: [N, K], all that share it.
        num_grids: steps of alpha; beta is 0 or 1 - alpha.

    Yields:
        fp32 [K]; zeros become 1, and all of a vector with a value that is not finite.
    """
    columns = torch.stack([weight.float().abs().amax(dim=0) for weight in weights]).amax(dim=0)
    alphas = [step / num_grids for step in range(1, num_grids)]
    for alpha, beta in [(0.0, 0.0), *((a, 0.0) for a in alphas), *((a, 1 - a) for a in alphas)]:
        vector = spans.absmax.pow(alpha) / columns.pow(beta)
        vector = torch.where(vector == 0, 1.0, vector)
        yield vector if vector.isfinite().all() else torch.ones_like(vector)


def candidates(spans: InputSpans) -> Iterator[torch.Tensor]:
    """Powers of the input's root mean square, of its largest magnitude, and of the geometric mean of the two.

    The published candidates start from the largest magnitude alone. The error of quantised activations goes with the
    typical size of a channel: on the demo's layers the best of these has 20 to 45 % less W4A4 error than the best of
    the published ones where a norm comes before the layer, 0 to 20 % behind a GELU. Synthetic layers differ less.

    Yields:
        fp32 [K], geometric mean 1 before outliers are limited.
    """
    for size in (spans.rms, spans.absmax, (spans.rms * spans.absmax).sqrt()):
        used = size > 0
        logarithm = torch.where(used, size, 1.0).log()
        if used.any():
            logarithm = torch.where(used, logarithm - logarithm[used].mean(), 0.0)
        for alpha in (0.35, 0.5, 0.65, 0.8, 0.95):
            yield torch.exp(alpha * logarithm).clamp(1 / _CALIBRATED_LIMIT, _CALIBRATED_LIMIT)


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
