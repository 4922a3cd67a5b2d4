"""What a run of skipped blocks would have added, remembered or forecast per sample."""

from collections.abc import Sequence

import torch


class ResidualHistory:
    """The last computed residuals of the streams of some blocks, as divided differences in the timestep.

    With R0, R1, R2 the last residuals, computed at x0, x1, x2 (Newton's form of the interpolating polynomial):
    R(x) = R0 + (x - x0) [R0, R1] + (x - x0) (x - x1) [R0, R1, R2]. Order 0 keeps R0 alone.

    A stream that the blocks do not return at all (None) has no residual.
    """

    def __init__(self, batch: int, order: int) -> None:
        self._order = order
        self._nodes: list[tuple[float, ...]] = [()] * batch
        self._differences: list[list[torch.Tensor] | None] = []

    @torch.no_grad()
    def record(
        self, residuals: Sequence[torch.Tensor | None], positions: Sequence[float], samples: Sequence[int] | None
    ) -> None:
        """Take over newly computed residuals.

        Args:
            residuals: a tensor (batch, ...) per stream, which is kept and must not change; None for an absent stream.
            positions: timestep per sample.
            samples: indices of the samples that were computed; None: all.
        """
        chosen = range(len(self._nodes)) if samples is None else samples
        steps: dict[tuple[float, ...], list[int]] = {}
        for i in chosen:
            nodes = self._nodes[i]
            if positions[i] in nodes:
                nodes = ()  # the same timestep again: no slope can be had from it
            steps.setdefault(tuple(positions[i] - node for node in nodes), []).append(i)
            self._nodes[i] = (positions[i], *nodes)[: self._order + 1]
        if not self._differences:
            self._differences = [None if new is None else [] for new in residuals]
        for kept, new in zip(self._differences, residuals, strict=True):
            if kept is not None and new is not None:
                for gaps, group in steps.items():
                    self._update(kept, new, gaps, group)

    def _update(self, kept: list[torch.Tensor], new: torch.Tensor, gaps: tuple[float, ...], group: list[int]) -> None:
        whole = len(group) == len(self._nodes)
        rows = slice(None) if whole else torch.tensor(group, device=new.device)
        value = new if whole else new[rows]
        for order in range(min(len(gaps), self._order) + 1):
            if order == len(kept):
                kept.append(value if whole else torch.zeros_like(new))
            previous = kept[order] if whole else kept[order][rows]
            if whole:
                kept[order] = value
            else:
                kept[order][rows] = value
            if order < min(len(gaps), self._order):
                value = (value - previous).div_(gaps[order])

    def forecast(self, positions: Sequence[float], sample: int) -> list[float]:
        """Factors of the differences for one sample at its position."""
        factors, product = [], 1.0
        for node in self._nodes[sample]:
            factors.append(product)
            product *= positions[sample] - node
        return factors

    def predict(self, positions: Sequence[float], damping: Sequence[float]) -> list[torch.Tensor]:
        """What the polynomial gives alone, where all samples have one position.

        Args:
            positions: timestep of the first sample.
            damping: what its terms are multiplied by, lowest first; those beyond its end by 0.
        """
        factors = [factor * damp for factor, damp in zip(self.forecast(positions, 0), damping, strict=False)]
        results = []
        for kept in self._differences:
            assert kept is not None
            results.append(_add_slopes(kept[0] * factors[0], kept, factors))
        return results

    def add_to(
        self, streams: Sequence[torch.Tensor | None], positions: Sequence[float], samples: Sequence[int] | None
    ) -> list[torch.Tensor | None]:
        """Streams (batch, ...) plus the residuals for these positions.

        Args:
            streams: left as they are if `samples` is None, else overwritten in the rows of those samples.
            positions: timestep per sample.
            samples: indices of the samples to add to; None: all.
        """
        chosen = range(len(self._nodes)) if samples is None else samples
        groups: dict[tuple[float, ...], list[int]] = {}
        for i in chosen:
            groups.setdefault(tuple(self.forecast(positions, i)), []).append(i)
        results: list[torch.Tensor | None] = []
        for stream, kept in zip(streams, self._differences, strict=True):
            if kept is None or stream is None:
                results.append(None)
                continue
            if samples is None and len(groups) == 1:
                results.append(_polynomial(stream, kept, next(iter(groups))))
                continue
            result = stream.clone() if samples is None else stream
            for factors, group in groups.items():
                rows = torch.tensor(group, device=stream.device)
                result[rows] = _polynomial(result[rows], [difference[rows] for difference in kept], factors)
            results.append(result)
        return results


def _polynomial(stream: torch.Tensor, differences: Sequence[torch.Tensor], factors: Sequence[float]) -> torch.Tensor:
    # under autocast the stream may have another dtype than what the skipped blocks return
    return _add_slopes(stream.to(differences[0].dtype) + differences[0], differences, factors)


def _add_slopes(result: torch.Tensor, differences: Sequence[torch.Tensor], factors: Sequence[float]) -> torch.Tensor:
    """All terms but the first, in place."""
    for difference, factor in zip(differences[1:], factors[1:], strict=False):
        result.add_(difference, alpha=factor)
    return result
