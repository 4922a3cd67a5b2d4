"""Argument checks of the operators: every message names the argument, what was expected and what came.

They run on every call, so the messages are only built once something is wrong.
"""

from collections.abc import Collection, Sequence

import torch

from nunchaku_kernels._checks import FLOAT_DTYPES as FLOATS
from nunchaku_kernels._checks import require_tensor

ACTIVATIONS = ("none", "gelu", "silu")
CHANNEL_ALIGNMENT = 128
INT8 = (torch.int8,)
FP32 = (torch.float32,)

__all__ = [
    "ACTIVATIONS",
    "FLOATS",
    "FP32",
    "INT8",
    "check_choice",
    "check_optional",
    "check_quantize",
    "check_tail",
    "check_tensor",
    "check_weight",
    "device_of",
    "padded_width",
]


def device_of(op: str, name: str, tensor: torch.Tensor) -> torch.device:
    """Device of an operator's first tensor, where the others have to be. torch lets None through to Python kernels.

    Raises:
        TypeError: not a tensor.
    """
    return require_tensor(f"{op}: `{name}`", tensor).device


def check_tensor(
    op: str,
    name: str,
    tensor: torch.Tensor,
    *,
    dtypes: Collection[torch.dtype],
    shape: Sequence[int | None],
    device: torch.device,
) -> None:
    """Raise unless `tensor` is dense, of one of `dtypes` and of `shape` (None matches any size), and on `device`.

    Raises:
        TypeError: not a tensor, or wrong dtype or layout.
        ValueError: wrong shape or device, or a gradient is asked of an operator, which has none.
    """
    if (
        not isinstance(tensor, torch.Tensor)
        or tensor.dtype not in dtypes
        or tensor.layout is not torch.strided
        or (tensor.shape != shape and not _fits(tensor.shape, shape))  # mostly the first says enough, at once
    ):
        if isinstance(tensor, torch.Tensor) and tensor.layout is not torch.strided:
            raise TypeError(f"{op}: `{name}`: expected a dense tensor, got layout {tensor.layout}")
        require_tensor(f"{op}: `{name}`", tensor, tuple(shape), dtypes)
    if tensor.device != device:
        raise ValueError(f"{op}: `{name}` must be on {device}, got {tensor.device}")
    if tensor.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{op}: `{name}` requires grad, operators have no gradient: call the layer, or use torch.no_grad()"
        )


def _fits(given: Sequence[int], shape: Sequence[int | None]) -> bool:
    if len(given) != len(shape):
        return False
    for size, wanted in zip(given, shape, strict=True):  # noqa: SIM110 - `all` takes three times as long, ten times a call
        if wanted is not None and size != wanted:
            return False
    return True


def check_optional(
    op: str,
    name: str,
    tensor: torch.Tensor | None,
    *,
    dtypes: Collection[torch.dtype],
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


def padded_width(x: torch.Tensor, smooth: torch.Tensor | None, proj_down: torch.Tensor | None) -> int:
    """K after padding: from the per-channel tensors where there are any, else the width of x itself."""
    if smooth is not None:
        return smooth.numel()
    return x.shape[-1] if proj_down is None or proj_down.dim() == 0 else proj_down.shape[0]


def check_quantize(op: str, x: torch.Tensor, smooth: torch.Tensor | None, proj_down: torch.Tensor | None) -> int:
    """Check the tensors of a quantise operator; returns the padded K."""
    device = device_of(op, "x", x)
    check_tensor(op, "x", x, dtypes=FLOATS, shape=(None, None), device=device)
    width = padded_width(x, smooth, proj_down)
    if not 0 < x.shape[1] <= width or width % CHANNEL_ALIGNMENT:
        raise ValueError(
            f"{op}: `x` has {x.shape[1]} channels, expected 1 to {width} padded to a multiple of {CHANNEL_ALIGNMENT}"
        )
    check_optional(op, "smooth", smooth, dtypes=FLOATS, shape=(width,), device=device)
    check_optional(op, "proj_down", proj_down, dtypes=FLOATS, shape=(width, None), device=device)
    if proj_down is not None and proj_down.shape[1] % 16:
        raise ValueError(f"{op}: `proj_down` must have a rank that is a multiple of 16, got {proj_down.shape[1]}")
    return width


def check_weight(op: str, qweight: torch.Tensor, width: int | None, device: torch.device) -> tuple[int, int]:
    """Check 4-bit codes of K = `width` inputs (None: any number); returns the padded N and K."""
    check_tensor(
        op, "qweight", qweight, dtypes=INT8, shape=(None, None if width is None else width // 2), device=device
    )
    rows, half = qweight.shape
    if rows <= 0 or rows % CHANNEL_ALIGNMENT or half <= 0 or half * 2 % CHANNEL_ALIGNMENT:
        raise ValueError(
            f"{op}: `qweight` must have its N and K padded to multiples of {CHANNEL_ALIGNMENT}, "
            f"got N = {rows}, K = {half * 2}"
        )
    return rows, half * 2


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
    check_tensor(op, "lora_act", lora_act, dtypes=FLOATS, shape=(rows, None), device=device)
    rank = lora_act.shape[1]
    if rank % 16 or (rank and proj_up is None):
        raise ValueError(
            f"{op}: `lora_act` has rank {rank}, expected a multiple of 16, with a `proj_up` unless it is 0"
        )
    check_optional(op, "proj_up", proj_up, dtypes=FLOATS, shape=(padded_out, rank), device=device)
    check_optional(op, "rank_scale", rank_scale, dtypes=FP32, shape=(rank,), device=device)
    check_optional(op, "wcscales", wcscales, dtypes=FLOATS, shape=(padded_out,), device=device)
    check_optional(op, "bias", bias, dtypes=FLOATS, shape=(padded_out,), device=device)
    check_optional(op, "gate", gate, dtypes=FLOATS, shape=(None, out_features), device=device)
    if gate is not None and (gate.shape[0] == 0 or rows % gate.shape[0]):
        raise ValueError(f"{op}: `gate` has {gate.shape[0]} rows, which do not divide the {rows} tokens")
    check_optional(op, "residual", residual, dtypes=FLOATS, shape=(rows, out_features), device=device)
