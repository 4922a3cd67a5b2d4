"""Attention heads out of a fused q, k and v projection: RMS norm and rotary embedding of q and k, heads first."""

import torch

from nunchaku_kernels._checks import require_tensor

HEAD_DIM = 128


def split_heads(
    y: torch.Tensor,
    samples: int,
    *,
    norm_q: torch.Tensor | None = None,
    norm_k: torch.Tensor | None = None,
    eps: float = 1e-6,
    rotary: torch.Tensor | None = None,
) -> torch.Tensor:
    """y (samples * T, 3 * H * 128), q before k before v -> (3, samples, H, T, 128) of the same dtype.

    A head x of q or k becomes x / sqrt(mean(x^2) + eps) * norm, then its pairs of neighbouring channels are rotated:
    (x0, x1) -> (x0 cos - x1 sin, x1 cos + x0 sin). Both are computed in fp32 and rounded once.

    Args:
        y: what the projection gave, rounded to its output dtype.
        samples: how many equal shares of the tokens are sequences of their own.
        norm_q, norm_k: (128) weights, or both None for no norm.
        eps: added to the mean square.
        rotary: float32 (T, 64, 2), cosine and sine of every pair, or None for no rotation.

    Raises:
        ValueError: shapes do not fit each other.
    """
    m, n = y.shape
    if samples < 1 or m % samples or n % (3 * HEAD_DIM):
        raise ValueError(f"y: expected (samples * T, 3 * H * {HEAD_DIM}) with {samples} samples, got {tuple(y.shape)}")
    tokens = m // samples
    heads = y.view(samples, tokens, 3, n // 3 // HEAD_DIM, HEAD_DIM).permute(2, 0, 3, 1, 4).to(torch.float32, copy=True)
    for part, norm in ((0, norm_q), (1, norm_k)):
        if norm is not None:
            require_tensor("norm", norm, (HEAD_DIM,), (torch.float32, torch.float16, torch.bfloat16))
            square = heads[part].square().mean(-1, keepdim=True)
            heads[part] = heads[part] * torch.rsqrt(square + eps) * norm.float()
        if rotary is not None:
            require_tensor("rotary", rotary, (tokens, HEAD_DIM // 2, 2), (torch.float32,))
            cosine, sine = rotary.unbind(-1)
            real, imaginary = heads[part].unflatten(-1, (-1, 2)).unbind(-1)
            turned = torch.stack((real * cosine - imaginary * sine, imaginary * cosine + real * sine), dim=-1)
            heads[part] = turned.flatten(-2)
    return heads.to(y.dtype)
