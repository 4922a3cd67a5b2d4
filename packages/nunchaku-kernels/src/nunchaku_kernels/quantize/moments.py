"""What calibration must remember of a layer's inputs: first and second moments, before and after quantisation.

With them the squared error of the layer's output over all calibration tokens is known exactly for any weights, so the
tokens themselves need not be kept (K = 12288 and 500,000 tokens: 12 GB of tokens, 3.6 GB of moments).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace

import torch
from torch.nn.functional import pad

from nunchaku_kernels._checks import FLOAT_DTYPES, HALF_DTYPES, require_tensor
from nunchaku_kernels.ops.arithmetic import Arithmetic
from nunchaku_kernels.quantize.activations import quantized_activations

_CHUNK = 8192
"""Tokens worked on at a time."""

_LEAST_VARIANCE = 1e-3

_FOLDS = {"fit": [0], "held out": [1], "all": [0, 1]}


@dataclass(frozen=True)
class Covariances:
    """Means [K] and covariances [K, K], fp32, of a layer's inputs ("input") and of what its quantised path makes of
    them ("quantized")."""

    input_mean: torch.Tensor
    quantized_mean: torch.Tensor
    input: torch.Tensor
    input_quantized: torch.Tensor
    quantized: torch.Tensor

    def with_prior(self, weight: float, smooth: torch.Tensor) -> "Covariances":
        """As if there had been further inputs: every channel by itself, quantised without error.

        What calibration data does not show is then left as the original weights have it, instead of being given away
        to make the error on the data smaller.

        Args:
            weight: variance of these inputs, relative to that of each channel in the data; a channel that hardly varies
                there counts as a thousandth of the average one, or its weights would be lost.
            smooth: divisors fp32 [K].
        """
        variance = self.quantized.diagonal()
        variance = weight * variance.clamp(min=_LEAST_VARIANCE * float(variance.mean()))
        return replace(
            self,
            quantized=_plus_diagonal(self.quantized, variance),
            input_quantized=_plus_diagonal(self.input_quantized, variance * smooth),
            input=_plus_diagonal(self.input, variance * smooth.square()),
        )

    def padded(self, padding: int) -> "Covariances":
        """With `padding` more channels that are always zero."""
        if not padding:
            return self
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return Covariances(**{k: pad(v, (0, padding) if v.dim() == 1 else (0, padding) * 2) for k, v in values.items()})


def _plus_diagonal(matrix: torch.Tensor, more: torch.Tensor) -> torch.Tensor:
    result = matrix.clone()
    result.diagonal().add_(more)
    return result


@contextmanager
def _tensor_cores() -> Iterator[None]:
    """fp32 products on CUDA with factors rounded to 11 bits (activations come with 8 or 11) and fp32 sums: these are
    the exact moments of inputs that differ in the last bit, in an eighth of the time."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


class InputMoments:
    """Moments of the inputs of a layer, gathered over calibration tokens; some are held out, to judge a fit by.

    Args:
        smooth: divisors [K] as stored, fp16 or bf16.
        shift: see `nn.SVDQLinear`.
        arithmetic: how activations will be quantised.
    """

    def __init__(self, smooth: torch.Tensor, shift: float = 0.0, arithmetic: Arithmetic = "w4a4") -> None:
        require_tensor("smooth", smooth, (None,), HALF_DTYPES)
        self.smooth = smooth
        self.shift = shift
        self.arithmetic = arithmetic
        columns = smooth.numel()
        self._origins: list[torch.Tensor] | None = None
        self._tokens = [0, 0]
        # Index 0 of either: the tokens to fit to; 1: those held out.
        self._sums = smooth.new_zeros(2, 2, columns, dtype=torch.float32)
        self._products = smooth.new_zeros(2, 3, columns, columns, dtype=torch.float32)

    def update(self, x: torch.Tensor, *, held_out: bool = False) -> None:
        """Take tokens in.

        Args:
            x: fp32, fp16 or bf16 [M, K], on the device of `smooth`.
            held_out: keep these for judging.
        """
        require_tensor("x", x, (None, self.smooth.numel()), FLOAT_DTYPES)
        for first in range(0, x.shape[0], _CHUNK):
            self._take(x[first : first + _CHUNK], int(held_out))
        self._tokens[held_out] += x.shape[0]

    def _take(self, x: torch.Tensor, fold: int) -> None:
        parts = [x.float(), quantized_activations(x, self.smooth, self.shift, self.arithmetic)]
        if self._origins is None:
            # Moments about a point near the mean: about zero they would lose their digits to a large mean.
            self._origins = [part.mean(dim=0) for part in parts]
        given, quantized = (part - origin for part, origin in zip(parts, self._origins, strict=True))
        self._sums[fold, 0] += given.sum(dim=0)
        self._sums[fold, 1] += quantized.sum(dim=0)
        products = self._products[fold]
        with _tensor_cores():
            products[0].addmm_(given.t(), given)
            products[1].addmm_(given.t(), quantized)
            products[2].addmm_(quantized.t(), quantized)

    @property
    def has_held_out(self) -> bool:
        """Whether both kinds of tokens were taken in."""
        return min(self._tokens) > 0

    def covariances(self, which: str = "all") -> Covariances:
        """Means and covariances over the tokens to "fit" to, over those "held out", or over "all".

        Raises:
            ValueError: another word; no such token was taken in; or one that is not finite, or whose square is not.
        """
        if which not in _FOLDS:
            raise ValueError(f"which: expected 'fit', 'held out' or 'all', got {which!r}")
        folds = _FOLDS[which]
        tokens = sum(self._tokens[fold] for fold in folds)
        if not tokens or self._origins is None:
            raise ValueError(f"x: expected at least one token ({which}), got none")
        given, quantized = self._sums[folds].sum(dim=0) / tokens
        products = self._products[folds].sum(dim=0) / tokens
        result = Covariances(
            input_mean=given + self._origins[0],
            quantized_mean=quantized + self._origins[1],
            input=products[0].addr_(given, given, alpha=-1),
            input_quantized=products[1].addr_(given, quantized, alpha=-1),
            quantized=products[2].addr_(quantized, quantized, alpha=-1),
        )
        finite = (result.input_mean, result.quantized_mean, result.input.diagonal(), result.quantized.diagonal())
        if not all(values.isfinite().all() for values in finite):
            raise ValueError("x: expected finite activations, got NaN or infinity")
        return result
