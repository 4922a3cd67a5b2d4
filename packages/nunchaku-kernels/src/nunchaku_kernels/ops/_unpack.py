"""Calling the plain-torch reference with tensors in the published order."""

import torch
from torch.nn.functional import pad

from nunchaku_kernels.formats import unpack_lowrank_down, unpack_lowrank_up, unpack_vector
from nunchaku_kernels.reference.epilogue import epilogue, lowrank_down


def natural_smooth(smooth: torch.Tensor | None) -> torch.Tensor | None:
    """The smoothing vector (K) in natural channel order."""
    return None if smooth is None else unpack_vector(smooth)


def padded_input(x: torch.Tensor, width: int, shift: float = 0.0) -> torch.Tensor:
    """x (M, K') + shift, padded with zeros to (M, width): padding takes no part in a group's maximum.

    The sum is rounded to the dtype of x.
    """
    return pad(x + shift if shift else x, (0, width - x.shape[1]))


def lowrank_activation(x: torch.Tensor, proj_down: torch.Tensor | None) -> torch.Tensor:
    """x (M, K') and a published `proj_down` (K, R) or None -> float32 (M, R)."""
    if proj_down is None or proj_down.shape[1] == 0:
        return x.new_empty(x.shape[0], 0, dtype=torch.float32)
    return lowrank_down(x, unpack_lowrank_down(proj_down)[:, : x.shape[1]])


def reference_epilogue(
    accumulator: torch.Tensor,
    lora_act: torch.Tensor,
    proj_up: torch.Tensor | None,
    rank_scale: torch.Tensor | None,
    wcscales: torch.Tensor | None,
    bias: torch.Tensor | None,
    *,
    out_features: int,
    activation: str,
    gate: torch.Tensor | None,
    residual: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """The shared tail on an fp32 product (M, N), cropped to (M, out_features), contiguous."""
    y = epilogue(
        accumulator[:, :out_features],
        wcscales=None if wcscales is None else unpack_vector(wcscales)[:out_features],
        bias=None if bias is None else unpack_vector(bias)[:out_features],
        lora_act=None if proj_up is None else lora_act.float(),
        proj_up=None if proj_up is None else unpack_lowrank_up(proj_up)[:out_features],
        rank_scale=rank_scale,
        activation=activation,  # type: ignore[arg-type]  # checked by the operator
        gate=gate,
        residual=residual,
        out_dtype=out_dtype,
    )
    return y.contiguous()  # with nothing in the tail, y is still a view of the padded product
