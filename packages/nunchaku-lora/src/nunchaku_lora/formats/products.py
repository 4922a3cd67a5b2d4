"""Adapters that are not a product of two matrices, as one: LoKr, LoHa, whole differences."""

from typing import NamedTuple

import torch


class LowRankProduct(NamedTuple):
    """`up @ down`, (out_features, r) and (r, in_features) float32, and what it lacks of the original, relative."""

    up: torch.Tensor
    down: torch.Tensor
    error: float


def kronecker_product(first: torch.Tensor, second: torch.Tensor, max_rank: int) -> LowRankProduct:
    """The best product for `kron(first, second)`, of at most `max_rank` ranks.

    The singular vectors of a Kronecker product are the products of those of its factors, so only the factors are
    decomposed (Van Loan, "The ubiquitous Kronecker product", 2000, section 2).

    Args:
        first: (a, b).
        second: (c, d).
        max_rank: at least 1.
    """
    (u1, s1, v1), (u2, s2, v2) = (torch.linalg.svd(each.float(), full_matrices=False) for each in (first, second))
    values = torch.outer(s1, s2).flatten()
    order = values.argsort(descending=True)
    kept = order[: _rank(values[order], max_rank)]
    i, j = kept // len(s2), kept % len(s2)
    root = values[kept].sqrt()
    up = torch.einsum("ar,cr->acr", u1[:, i], u2[:, j]).flatten(0, 1) * root
    down = torch.einsum("rb,rd->rbd", v1[i], v2[j]).flatten(1) * root.unsqueeze(1)
    return LowRankProduct(up, down, _lost(values, values[kept]))


def hadamard_product(
    up1: torch.Tensor, down1: torch.Tensor, up2: torch.Tensor, down2: torch.Tensor, max_rank: int
) -> LowRankProduct:
    """A product for `(up1 @ down1) * (up2 @ down2)`, elementwise: exact if the ranks multiply to at most `max_rank`.

    Args:
        up1, up2: (out_features, r1), (out_features, r2).
        down1, down2: (r1, in_features), (r2, in_features).
        max_rank: at least 1.
    """
    up = torch.einsum("ni,nj->nij", up1.float(), up2.float()).flatten(1)
    down = torch.einsum("ik,jk->ijk", down1.float(), down2.float()).flatten(0, 1)
    if up.shape[1] <= max_rank:
        return LowRankProduct(up, down, 0.0)
    (q1, r1), (q2, r2) = torch.linalg.qr(up), torch.linalg.qr(down.t())
    core = whole_matrix(r1 @ r2.t(), max_rank)
    return LowRankProduct(q1 @ core.up, core.down @ q2.t(), core.error)


def whole_matrix(matrix: torch.Tensor, max_rank: int) -> LowRankProduct:
    """The best product for a matrix (out_features, in_features), of at most `max_rank` ranks."""
    u, s, v = torch.linalg.svd(matrix.float(), full_matrices=False)
    rank = _rank(s, max_rank)
    root = s[:rank].sqrt()
    return LowRankProduct(u[:, :rank] * root, v[:rank] * root.unsqueeze(1), _lost(s, s[:rank]))


def _rank(values: torch.Tensor, max_rank: int) -> int:
    """How many of the descending singular values are worth keeping; one at least."""
    significant = int((values > values[0] * 1e-6).sum()) if values[0] > 0 else 1
    return max(1, min(significant, max_rank))


def _lost(values: torch.Tensor, kept: torch.Tensor) -> float:
    total = float(values.double().square().sum())
    return 0.0 if total == 0 else max(0.0, 1 - float(kept.double().square().sum()) / total) ** 0.5
