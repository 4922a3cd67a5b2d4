"""Argument checks of the operators: every message names the argument, what was expected and what came."""

from collections.abc import Sequence

import torch

from nunchaku_kernels._checks import FLOAT_DTYPES as FLOATS
from nunchaku_kernels._checks import require_tensor

ACTIVATIONS = ("none", "gelu", "silu")

__all__ = ["ACTIVATIONS", "FLOATS", "check_choice", "check_optional", "check_tail", "check_tensor"]


def check_tensor(
    op: str,
    name: str,
    tensor: torch.Tensor,
    *,
    dtypes: Sequence[torch.dtype],
    shape: Sequence[int | None],
    device: torch.device,
) -> None:
    """Raise unless `tensor` has one of `dtypes`, the given `shape` (None matches any size) and lives on `device`.

    Raises:
        TypeError: wrong dtype.
        ValueError: wrong shape or device.
    """
    require_tensor(f"{op}: `{name}`", tensor, tuple(shape), dtypes)
    if tensor.device != device:
        raise ValueError(f"{op}: `{name}` must be on {device}, got {tensor.device}")


def check_optional(
    op: str,
    name: str,
    tensor: torch.Tensor | None,
    *,
    dtypes: Sequence[torch.dtype],
    shape: Sequence[int | None],
    device: torch.device,
) -> None:
    """`check_tensor` for an argument that may be absent."""
    if tensor is not None:
        check_tensor(op, name, tensor, dtypes=dtypes, shape=shape, device=device)


def check_choice(op: str, name: str, value: str, choices: Sequence[str]) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{op}: `{name}` must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_tail(
    op: str,
    *,
    rows: int,
    padded_out: int,
    out_features: int,
    lora_act: torch.Tensor,
    proj_up: torch.Tensor | None,
    rank_scale: torch.Tensor | None,
    wcscales: torch.Tensor | None,
    bias: torch.Tensor | None,
    activation: str,
    gate: torch.Tensor | None,
    residual: torch.Tensor | None,
    out_dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Check the arguments that every low-rank linear shares: the tail of its schema."""
    if not 0 < out_features <= padded_out:
        raise ValueError(f"{op}: `out_features` must be in 1..{padded_out}, got {out_features}")
    if out_dtype not in FLOATS:
        raise TypeError(f"{op}: `out_dtype` must be float32, float16 or bfloat16, got {out_dtype}")
    check_choice(op, "activation", activation, ACTIVATIONS)
    check_tensor(op, "lora_act", lora_act, dtypes=(torch.float32,), shape=(rows, None), device=device)
    rank = lora_act.shape[1]
    if proj_up is None and rank:
        raise ValueError(f"{op}: `lora_act` has rank {rank} but there is no `proj_up`")
    check_optional(op, "proj_up", proj_up, dtypes=FLOATS, shape=(padded_out, rank), device=device)
    check_optional(op, "rank_scale", rank_scale, dtypes=(torch.float32,), shape=(rank,), device=device)
    check_optional(op, "wcscales", wcscales, dtypes=FLOATS, shape=(padded_out,), device=device)
    check_optional(op, "bias", bias, dtypes=FLOATS, shape=(padded_out,), device=device)
    check_optional(op, "gate", gate, dtypes=FLOATS, shape=(None, out_features), device=device)
    if gate is not None and (gate.shape[0] == 0 or rows % gate.shape[0]):
        raise ValueError(f"{op}: `gate` has {gate.shape[0]} rows, which do not divide the {rows} tokens")
    check_optional(op, "residual", residual, dtypes=FLOATS, shape=(rows, out_features), device=device)
