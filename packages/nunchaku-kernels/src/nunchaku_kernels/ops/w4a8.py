"""W4A8: int8 activations with one scale per token, 4-bit weights decoded to int8 with one scale per row.

`design/numerics.md` states the contract in two stages: the same 16-bit x gives the same codes and scales on every
device, and the same codes give the same int32 sums. The CPU path is native; everywhere else (and where the extension
was not built) the plain-torch reference computes the same integers.
"""

from typing import Any

import torch
from torch.nn.functional import layer_norm

from nunchaku_kernels._checks import require_finite
from nunchaku_kernels.formats import unpack_qweight, unpack_wscales
from nunchaku_kernels.ops import _native
from nunchaku_kernels.ops._checks import (
    FLOATS,
    FP32,
    INT8,
    check_optional,
    check_quantize,
    check_tail,
    check_tensor,
    check_weight,
    device_of,
    padded_width,
)
from nunchaku_kernels.ops._library import fake, implement
from nunchaku_kernels.ops._native import (
    ACTIVATION_CODES,
    dense,
    dense_rows,
    dtype_code,
    place,
    pointer,
)
from nunchaku_kernels.ops._unpack import lowrank_activation, natural_smooth, padded_input, reference_epilogue
from nunchaku_kernels.reference import w4a8 as reference
from nunchaku_kernels.reference.heads import HEAD_DIM, split_heads

GROUP = reference.GROUP_SIZE
FP16_MAX = torch.finfo(torch.float16).max
MAX_INPUTS = 133_000
"""Above, an int32 sum of products of two int8 values could overflow."""


@implement("w4a8_fold_scales", "CompositeExplicitAutograd")
def _fold_scales(qweight: torch.Tensor, wscales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    op = "w4a8_fold_scales"
    device = device_of(op, "qweight", qweight)
    rows, width = check_weight(op, qweight, None, device)
    check_tensor(op, "wscales", wscales, dtypes=FLOATS, shape=(width // GROUP, rows), device=device)
    require_finite(f"{op}: `wscales`", wscales)
    native = _native.kernels(device)
    if native is None:
        return reference.fold_scales(unpack_qweight(qweight), unpack_wscales(wscales))
    qweight, wscales = dense(qweight), dense(wscales)
    row_scales = torch.empty(rows, dtype=torch.float32, device=device)
    multipliers = torch.empty(rows, width // GROUP, dtype=torch.int16, device=device)
    native.w4a8_fold_scales(
        pointer(qweight), pointer(wscales), dtype_code(wscales), rows, width, pointer(row_scales),
        pointer(multipliers), *place(device, rows * width),
    )  # fmt: skip
    return row_scales, multipliers


@fake("w4a8_fold_scales")
def _(qweight: torch.Tensor, wscales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    rows, half = qweight.shape
    return (
        qweight.new_empty(rows, dtype=torch.float32),
        qweight.new_empty(rows, half * 2 // GROUP, dtype=torch.int16),
    )


@implement("w4a8_quantize", "CompositeExplicitAutograd")
def _quantize(
    x: torch.Tensor, smooth: torch.Tensor | None, shift: float, proj_down: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    width = check_quantize("w4a8_quantize", x, smooth, proj_down)
    native = _native.kernels(x.device)
    if native is None:
        shifted = padded_input(x.float(), width, shift)  # in fp32: the definition does not round t to 16 bits
        codes, ascales = reference.quantize_tokens(shifted, natural_smooth(smooth))
        return codes, ascales, _for_tensor_cores(lowrank_activation(x, proj_down), proj_down)
    x, smooth = dense_rows(x), dense(smooth)
    # Tensor cores multiply 16-bit factors of one dtype; other branches are rare and go through torch.
    apart = proj_down is not None and x.is_cuda and not _fused_branch(x, proj_down)
    separate, proj_down = (proj_down, None) if apart else (None, dense(proj_down))
    tokens, channels = x.shape
    codes, ascales, lora_act = _outputs(x, width, proj_down)
    if tokens:
        native.w4a8_quantize(
            pointer(x), dtype_code(x), tokens, channels, x.stride(0), width, pointer(smooth), dtype_code(smooth),
            shift, pointer(proj_down), dtype_code(proj_down), lora_act.shape[1], pointer(codes), pointer(ascales),
            pointer(lora_act), *place(x.device, tokens * channels * (lora_act.shape[1] + 8)),
        )  # fmt: skip
    if separate is not None:
        lora_act = _for_tensor_cores(lowrank_activation(x, separate), separate)
    return codes, ascales, lora_act


def _lora_dtype(factor: torch.Tensor | None) -> torch.dtype:
    """Of the low-rank hidden state between the operators: tensor cores multiply it in the dtype of the factors."""
    return factor.dtype if factor is not None and factor.is_cuda else torch.float32


def _for_tensor_cores(lora_act: torch.Tensor, factor: torch.Tensor | None) -> torch.Tensor:
    """`lora_act` in that dtype; what is too large for fp16 becomes the largest number, as in the kernels."""
    dtype = _lora_dtype(factor)
    if dtype == torch.float16 and lora_act.dtype != dtype:
        lora_act = lora_act.clamp(-FP16_MAX, FP16_MAX)
    return lora_act.to(dtype)


def _fused_branch(x: torch.Tensor, proj_down: torch.Tensor | None) -> bool:
    """Whether CUDA kernels take the low-rank branch along."""
    return proj_down is None or (x.dtype != torch.float32 and proj_down.dtype == x.dtype)


def _outputs(
    x: torch.Tensor, width: int, proj_down: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    tokens, rank = x.shape[0], 0 if proj_down is None else proj_down.shape[1]
    return (
        torch.empty(tokens, width, dtype=torch.int8, device=x.device),
        torch.empty(tokens, dtype=torch.float32, device=x.device),
        torch.empty(tokens, rank, dtype=_lora_dtype(proj_down), device=x.device),
    )


@fake("w4a8_quantize")
def _fake_quantize(
    x: torch.Tensor, smooth: torch.Tensor | None, shift: float, proj_down: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _outputs(x, padded_width(x, smooth, proj_down), proj_down)


@implement("w4a8_quantize_norm", "CompositeExplicitAutograd")
def _quantize_norm(
    x: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    eps: float,
    smooth: torch.Tensor | None,
    proj_down: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    op = "w4a8_quantize_norm"
    width = check_quantize(op, x, smooth, proj_down)
    tokens, channels = x.shape
    check_tensor(op, "scale", scale, dtypes=(x.dtype,), shape=(None, channels), device=x.device)
    rows = scale.shape[0]
    check_tensor(op, "shift", shift, dtypes=(x.dtype,), shape=(rows, channels), device=x.device)
    if rows == 0 or tokens % rows:
        raise ValueError(f"{op}: `scale` has {rows} rows, which do not divide the {tokens} tokens")
    native = _native.kernels(x.device)
    if native is not None and x.is_cuda and _fused_branch(x, proj_down):
        x, smooth, proj_down, scale, shift = dense_rows(x), dense(smooth), dense(proj_down), dense(scale), dense(shift)
        codes, ascales, lora_act = _outputs(x, width, proj_down)
        if native.w4a8_quantize_norm(
            pointer(x), dtype_code(x), tokens, channels, x.stride(0), width, pointer(scale), pointer(shift), rows, eps,
            pointer(smooth), dtype_code(smooth), pointer(proj_down), dtype_code(proj_down), lora_act.shape[1],
            pointer(codes), pointer(ascales), pointer(lora_act), *place(x.device, 0),
        ):  # fmt: skip
            return codes, ascales, lora_act
    normalised = layer_norm(x.float(), (channels,), eps=eps).view(rows, tokens // rows, channels)
    modulated = torch.addcmul(shift.float().unsqueeze(1), normalised, 1 + scale.float().unsqueeze(1))
    return _quantize(modulated.view(tokens, channels).to(x.dtype), smooth, 0.0, proj_down)


@fake("w4a8_quantize_norm")
def _(
    x: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    eps: float,
    smooth: torch.Tensor | None,
    proj_down: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _fake_quantize(x, smooth, 0.0, proj_down)


@implement("w4a8_linear", "CompositeExplicitAutograd")
def _linear(
    codes: torch.Tensor,
    ascales: torch.Tensor,
    lora_act: torch.Tensor,
    qweight: torch.Tensor,
    row_scales: torch.Tensor,
    group_multipliers: torch.Tensor,
    proj_up: torch.Tensor | None,
    rank_scale: torch.Tensor | None,
    wcscales: torch.Tensor | None,
    bias: torch.Tensor | None,
    *,
    out_features: int,
    activation: str = "none",
    gate: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    op = "w4a8_linear"
    device = device_of(op, "codes", codes)
    check_tensor(op, "codes", codes, dtypes=INT8, shape=(None, None), device=device)
    tokens, width = codes.shape
    rows, _ = check_weight(op, qweight, width, device)
    _check_product(op, codes, ascales, row_scales, group_multipliers, rows, device)
    check_tail(
        op, rows=tokens, padded_out=rows, out_features=out_features, lora_act=lora_act, proj_up=proj_up,
        rank_scale=rank_scale, wcscales=wcscales, bias=bias, activation=activation, gate=gate, residual=residual,
        out_dtype=out_dtype, device=device,
    )  # fmt: skip
    native = _native.kernels(device)
    if native is None:
        sums = reference.accumulate(codes, reference.decode_int8(unpack_qweight(qweight), group_multipliers))
        product = sums.float() * ascales[:, None] * row_scales
        return reference_epilogue(
            product, lora_act, proj_up, rank_scale, wcscales, bias, out_features=out_features, activation=activation,
            gate=gate, residual=residual, out_dtype=out_dtype,
        )  # fmt: skip
    if proj_up is not None and proj_up.is_cuda and proj_up.dtype == torch.float32 and lora_act.shape[1]:
        # Tensor cores take 16-bit factors; an fp32 branch is rare and goes through torch.
        product = torch.ops.nunchaku_kernels.w4a8_linear(
            codes, ascales, lora_act[:, :0], qweight, row_scales, group_multipliers, None, None, None, None,
            out_features=rows, out_dtype=torch.float32,
        )  # fmt: skip
        return reference_epilogue(
            product, lora_act, proj_up, rank_scale, wcscales, bias, out_features=out_features, activation=activation,
            gate=gate, residual=residual, out_dtype=out_dtype,
        )  # fmt: skip
    codes, ascales, qweight = dense(codes), dense(ascales), dense(qweight)
    lora_act = dense(_for_tensor_cores(lora_act, proj_up))
    row_scales, group_multipliers, proj_up = dense(row_scales), dense(group_multipliers), dense(proj_up)
    rank_scale, wcscales, bias = dense(rank_scale), dense(wcscales), dense(bias)
    gate, residual = dense(gate), dense(residual)
    out = torch.empty(tokens, out_features, dtype=out_dtype, device=device)
    if tokens:
        native.w4a8_linear(
            pointer(codes), pointer(ascales), pointer(lora_act), lora_act.shape[1], pointer(qweight),
            pointer(row_scales), pointer(group_multipliers), pointer(proj_up), dtype_code(proj_up),
            pointer(rank_scale), pointer(wcscales), dtype_code(wcscales), pointer(bias), dtype_code(bias), tokens,
            rows, width, out_features, ACTIVATION_CODES[activation], pointer(gate), dtype_code(gate),
            0 if gate is None else gate.shape[0], pointer(residual), dtype_code(residual), pointer(out),
            dtype_code(out), *place(device, tokens * rows * width),
        )  # fmt: skip
    return out


def _check_product(
    op: str,
    codes: torch.Tensor,
    ascales: torch.Tensor,
    row_scales: torch.Tensor,
    group_multipliers: torch.Tensor,
    rows: int,
    device: torch.device,
) -> None:
    tokens, width = codes.shape
    if width >= MAX_INPUTS:
        raise ValueError(f"{op}: `codes` must have fewer than {MAX_INPUTS} channels (int32 sums), got {width}")
    check_tensor(op, "ascales", ascales, dtypes=FP32, shape=(tokens,), device=device)
    check_tensor(op, "row_scales", row_scales, dtypes=FP32, shape=(rows,), device=device)
    check_tensor(
        op, "group_multipliers", group_multipliers, dtypes=(torch.int16,), shape=(rows, width // GROUP), device=device
    )


@fake("w4a8_linear")
def _(codes: torch.Tensor, *_: Any, out_features: int, out_dtype: torch.dtype, **__: Any) -> torch.Tensor:
    return codes.new_empty(codes.shape[0], out_features, dtype=out_dtype)


@implement("w4a8_linear_heads", "CompositeExplicitAutograd")
def _linear_heads(
    codes: torch.Tensor,
    ascales: torch.Tensor,
    lora_act: torch.Tensor,
    qweight: torch.Tensor,
    row_scales: torch.Tensor,
    group_multipliers: torch.Tensor,
    proj_up: torch.Tensor | None,
    rank_scale: torch.Tensor | None,
    wcscales: torch.Tensor | None,
    bias: torch.Tensor | None,
    norm_q: torch.Tensor | None,
    norm_k: torch.Tensor | None,
    eps: float,
    rotary: torch.Tensor | None,
    out: torch.Tensor,
    first_token: int,
) -> None:
    op = "w4a8_linear_heads"
    device = device_of(op, "codes", codes)
    check_tensor(op, "codes", codes, dtypes=INT8, shape=(None, None), device=device)
    tokens, width = codes.shape
    rows, _ = check_weight(op, qweight, width, device)
    _check_product(op, codes, ascales, row_scales, group_multipliers, rows, device)
    check_tensor(op, "out", out, dtypes=FLOATS, shape=(3, None, None, None, HEAD_DIM), device=device)
    _, samples, heads, out_tokens, _ = out.shape
    if rows != 3 * heads * HEAD_DIM or not out.is_contiguous():
        raise ValueError(
            f"{op}: `out` must be contiguous (3, B, {rows // (3 * HEAD_DIM)}, T, {HEAD_DIM}) for the {rows} rows of "
            f"`qweight`, got {tuple(out.shape)} with strides {out.stride()}"
        )
    if samples == 0 or tokens % samples or not 0 <= first_token <= out_tokens - tokens // samples:
        raise ValueError(
            f"{op}: `out` holds {samples} samples of {out_tokens} tokens, which the {tokens} tokens do not fit from "
            f"`first_token` {first_token} on"
        )
    check_tail(
        op, rows=tokens, padded_out=rows, out_features=rows, lora_act=lora_act, proj_up=proj_up, rank_scale=rank_scale,
        wcscales=wcscales, bias=bias, activation="none", gate=None, residual=None, out_dtype=out.dtype, device=device,
    )  # fmt: skip
    if (norm_q is None) != (norm_k is None):
        raise ValueError(f"{op}: `norm_q` and `norm_k` must both be given, or neither")
    check_optional(op, "norm_q", norm_q, dtypes=FLOATS, shape=(HEAD_DIM,), device=device)
    check_optional(op, "norm_k", norm_k, dtypes=FLOATS, shape=(HEAD_DIM,), device=device)
    per_sample = tokens // samples
    check_optional(op, "rotary", rotary, dtypes=FP32, shape=(per_sample, HEAD_DIM // 2, 2), device=device)
    if not tokens:
        return
    native = _native.kernels(device) if codes.is_cuda else None
    if native is not None and out.dtype != torch.float32 and (proj_up is None or proj_up.dtype != torch.float32):
        codes, ascales, qweight, row_scales = dense(codes), dense(ascales), dense(qweight), dense(row_scales)
        lora_act = dense(_for_tensor_cores(lora_act, proj_up))
        group_multipliers, proj_up, rank_scale = dense(group_multipliers), dense(proj_up), dense(rank_scale)
        wcscales, bias, rotary = dense(wcscales), dense(bias), dense(rotary)
        norm_q, norm_k = dense(norm_q), dense(norm_k)
        if native.w4a8_linear_heads(
            pointer(codes), pointer(ascales), pointer(lora_act), lora_act.shape[1], pointer(qweight),
            pointer(row_scales), pointer(group_multipliers), pointer(proj_up), dtype_code(proj_up),
            pointer(rank_scale), pointer(wcscales), dtype_code(wcscales), pointer(bias), dtype_code(bias), tokens,
            rows, width, samples, heads, pointer(norm_q), dtype_code(norm_q), pointer(norm_k), dtype_code(norm_k),
            eps, pointer(rotary), first_token, out_tokens, pointer(out), dtype_code(out), *place(device, 0),
        ):  # fmt: skip
            return
    y = torch.ops.nunchaku_kernels.w4a8_linear(
        codes, ascales, lora_act, qweight, row_scales, group_multipliers, proj_up, rank_scale, wcscales, bias,
        out_features=rows, out_dtype=out.dtype,
    )  # fmt: skip
    out[:, :, :, first_token : first_token + per_sample] = split_heads(
        y, samples, norm_q=norm_q, norm_k=norm_k, eps=eps, rotary=rotary
    )


@fake("w4a8_linear_heads")
def _(*_: Any) -> None:
    return None
