"""What calibration must remember of a layer's inputs: first and second moments, before and after quantisation.

With them the squared error of the layer's output over all calibration tokens is known exactly for any weights, so the
tokens themselves need not be kept (K = 12288 and 500,000 tokens: 12 GB of tokens, 3.6 GB of moments).
"""

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
    """Means [K] and covariances [K, K], fp32, of three versions of a layer's inputs.

    "input" is what the layer gets, "quantized" what its quantised path makes of that, "reference" what the layer would
    get in the unquantised model: where earlier layers are quantised already, a layer that is fitted to the reference
    makes up for their errors.
    """

    input_mean: torch.Tensor
    quantized_mean: torch.Tensor
    reference_mean: torch.Tensor
    input: torch.Tensor
    input_quantized: torch.Tensor
    quantized: torch.Tensor
    reference: torch.Tensor
    reference_input: torch.Tensor
    reference_quantized: torch.Tensor

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
        additions = {
            "quantized": variance,
            "input_quantized": variance * smooth,
            "reference_quantized": variance * smooth,
            "input": variance * smooth.square(),
            "reference_input": variance * smooth.square(),
            "reference": variance * smooth.square(),
        }
        return replace(self, **{name: _plus_diagonal(getattr(self, name), more) for name, more in additions.items()})

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


class InputMoments:
    """Moments of the inputs of a layer, gathered over calibration tokens; some are held out, to judge a fit by.

    Args:
        smooth: divisors [K] as stored, fp16 or bf16.
        shift: see `nn.SVDQLinear`.
        arithmetic: how activations will be quantised.
        has_reference: whether `update` is told the inputs of the unquantised model too.
    """

    def __init__(
        self,
        smooth: torch.Tensor,
        shift: float = 0.0,
        arithmetic: Arithmetic = "w4a4",
        *,
        has_reference: bool = False,
    ) -> None:
        require_tensor("smooth", smooth, (None,), HALF_DTYPES)
        self.smooth = smooth
        self.shift = shift
        self.arithmetic = arithmetic
        self.has_reference = has_reference
        columns, parts = smooth.numel(), 3 if has_reference else 2
        self._origins: list[torch.Tensor] | None = None
        self._tokens = [0, 0]
        # Index 0 of either: the tokens to fit to; 1: those held out.
        self._sums = smooth.new_zeros(2, parts, columns, dtype=torch.float32)
        self._products = smooth.new_zeros(2, parts * (parts + 1) // 2, columns, columns, dtype=torch.float32)

    def update(self, x: torch.Tensor, reference: torch.Tensor | None = None, *, held_out: bool = False) -> None:
        """Take tokens in.

        Args:
            x: fp32, fp16 or bf16 [M, K], on the device of `smooth`.
            reference: the same tokens of the unquantised model [M, K], if the moments have a reference.
            held_out: keep these for judging.
        """
        columns = self.smooth.numel()
        require_tensor("x", x, (None, columns), FLOAT_DTYPES)
        if (reference is not None) != self.has_reference:
            raise ValueError(f"reference: expected {'a tensor' if self.has_reference else 'None'}, got the opposite")
        if reference is not None:
            require_tensor("reference", reference, (x.shape[0], columns), FLOAT_DTYPES)
        for first in range(0, x.shape[0], _CHUNK):
            rows = slice(first, first + _CHUNK)
            self._take(x[rows], None if reference is None else reference[rows], int(held_out))
        self._tokens[held_out] += x.shape[0]

    def _take(self, x: torch.Tensor, reference: torch.Tensor | None, fold: int) -> None:
        parts = [x.float(), quantized_activations(x, self.smooth, self.shift, self.arithmetic)]
        if reference is not None:
            parts.append(reference.float())
        if self._origins is None:
            # Moments about a point near the mean: about zero they would lose their digits to a large mean.
            self._origins = [part.mean(dim=0) for part in parts]
        parts = [part - origin for part, origin in zip(parts, self._origins, strict=True)]
        products = iter(self._products[fold])
        for index, part in enumerate(parts):
            self._sums[fold, index] += part.sum(dim=0)
            for other in parts[: index + 1]:
                next(products).addmm_(part.t(), other)

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
        means = self._sums[folds].sum(dim=0) / tokens
        products = iter(self._products[folds].sum(dim=0) / tokens)
        central = {}
        for row in range(means.shape[0]):
            for column in range(row + 1):
                central[row, column] = next(products).addr_(means[row], means[column], alpha=-1)
        absolute = [mean + origin for mean, origin in zip(means, self._origins, strict=True)]
        if not all(values.isfinite().all() for values in (*absolute, *(m.diagonal() for m in central.values()))):
            raise ValueError("x: expected finite activations, got NaN or infinity")
        reference = 2 if self.has_reference else 0
        return Covariances(
            input_mean=absolute[0],
            quantized_mean=absolute[1],
            reference_mean=absolute[reference],
            input=central[0, 0],
            input_quantized=central[1, 0].t(),
            quantized=central[1, 1],
            reference=central[reference, reference],
            reference_input=central[reference, 0],
            reference_quantized=central[2, 1] if self.has_reference else central[1, 0].t(),
        )
