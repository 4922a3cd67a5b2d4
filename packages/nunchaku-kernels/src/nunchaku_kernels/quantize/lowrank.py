"""Best low-rank approximation by randomised subspace iteration (Halko, Martinsson, Tropp 2011, algorithms 4.4 and 5.1).

A full singular value decomposition of a 9216 x 3072 matrix takes minutes on two cores; only the leading 32 directions
are wanted, and a residual slightly above the optimum costs nothing that 4-bit rounding does not drown.
"""

import torch

from nunchaku_kernels._checks import FLOAT_DTYPES, require_tensor

# Below this the exact decomposition is as fast as the iteration.
_EXACT_SIZE = 256


def truncated_svd(
    matrix: torch.Tensor,
    rank: int,
    *,
    oversample: int = 16,
    n_iter: int = 2,
    generator: torch.Generator | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors of the best approximation of `rank`: `matrix ~ up @ down`.

    Args:
        matrix: fp32 [N, K], finite (fp16 and bf16 are converted).
        rank: columns of `up`; above min(N, K) the rest is zero.
        oversample: extra directions carried along and dropped at the end.
        n_iter: passes over matrix and transpose after the first; each sharpens a slowly decaying spectrum.
        generator: source of the random start, on the device of `matrix` or the CPU; None for a fixed seed, so that the
            same matrix always gives the same factors.

    Returns:
        up fp32 [N, rank], carrying the singular values, and down fp32 [rank, K] with orthonormal rows.
    """
    require_tensor("matrix", matrix, (None, None), FLOAT_DTYPES)
    for name, value in (("rank", rank), ("oversample", oversample), ("n_iter", n_iter)):
        if value < 0:
            raise ValueError(f"{name}: expected a non-negative number, got {value}")
    n, k = matrix.shape
    matrix = matrix.float()
    if rank == 0:
        return matrix.new_zeros(n, 0), matrix.new_zeros(0, k)
    width = min(rank + oversample, n, k)
    if min(n, k) <= max(_EXACT_SIZE, width):
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    else:
        basis = _leading_columns(matrix, width, n_iter, generator)
        u, s, vh = torch.linalg.svd(basis.t() @ matrix, full_matrices=False)
        u = basis @ u
    kept = min(rank, s.numel())
    up, down = matrix.new_zeros(n, rank), matrix.new_zeros(rank, k)
    up[:, :kept] = u[:, :kept] * s[:kept]
    down[:kept] = vh[:kept]
    return up, down


def _leading_columns(matrix: torch.Tensor, width: int, n_iter: int, generator: torch.Generator | None) -> torch.Tensor:
    """Orthonormal [N, width] that spans nearly the leading left singular vectors."""
    if generator is None:
        generator = torch.Generator(device=matrix.device).manual_seed(0)
    start = torch.randn(matrix.shape[1], width, generator=generator, device=generator.device)
    basis = torch.linalg.qr(matrix @ start.to(matrix.device)).Q
    for _ in range(n_iter):
        basis = torch.linalg.qr(matrix.t() @ basis).Q
        basis = torch.linalg.qr(matrix @ basis).Q
    return basis
