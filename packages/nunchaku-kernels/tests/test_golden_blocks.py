"""Whole FLUX blocks as the published converter writes them, bit for bit (golden A_flux_*).

The tables below are the converter's conventions (svdquant_algorithm.md 8): which linears are fused, whose smoothing and
low-rank branch each owner takes, and where smoothing was folded into the producer.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from nunchaku_kernels.formats import (
    SVDQWeights,
    fold_unit_scale,
    pack_awq,
    pack_awq_scales,
    pack_svdq,
    to_channel_major,
)
from nunchaku_kernels.formats.e2m1 import decode

Load = Callable[[str], Any]


class Owner(NamedTuple):
    """One published linear: its members, and the keys its smoothing and its branch are stored under."""

    members: tuple[str, ...]
    smooth: str
    branch: str
    smooth_fused: bool = False
    shift: str | None = None


DOUBLE = {
    "qkv_proj": Owner(("attn.to_q", "attn.to_k", "attn.to_v"), "attn.to_q", "attn.to_q"),
    "qkv_proj_context": Owner(
        ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"), "attn.add_k_proj", "attn.add_k_proj"
    ),
    "out_proj": Owner(("attn.to_out.0",), "attn.to_out.0", "attn.to_out.0", smooth_fused=True),
    "out_proj_context": Owner(("attn.to_add_out",), "attn.to_out.0", "attn.to_add_out", smooth_fused=True),
    "mlp_fc1": Owner(("ff.net.0.proj",), "ff.net.0.proj", "ff.net.0.proj"),
    "mlp_fc2": Owner(("ff.net.2.linear",), "ff.net.2.linear", "ff.net.2.linear", shift="ff.net.2.shift"),
    "mlp_context_fc1": Owner(("ff_context.net.0.proj",), "ff_context.net.0.proj", "ff_context.net.0.proj"),
    "mlp_context_fc2": Owner(
        ("ff_context.net.2.linear",),
        "ff_context.net.2.linear",
        "ff_context.net.2.linear",
        shift="ff_context.net.2.shift",
    ),
}
SINGLE = {
    "qkv_proj": Owner(("attn.to_q", "attn.to_k", "attn.to_v"), "attn.to_q", "attn.to_q"),
    "out_proj": Owner(("proj_out.linears.0",), "proj_out.linears.0", "proj_out.linears.0", smooth_fused=True),
    "mlp_fc1": Owner(("proj_mlp",), "attn.to_q", "proj_mlp"),
    "mlp_fc2": Owner(
        ("proj_out.linears.1.linear",),
        "proj_out.linears.1.linear",
        "proj_out.linears.1.linear",
        shift="proj_out.linears.1.shift",
    ),
}
MODULATIONS = {"double": {"norm1.linear": 6, "norm1_context.linear": 6}, "single": {"norm.linear": 3}}
V1_NAMES = {
    "smooth_factor": "smooth",
    "smooth_factor_orig": "smooth_orig",
    "proj_down": "lora_down",
    "proj_up": "lora_up",
}


def int4_codes(weight: Tensor, scales: Tensor) -> Tensor:
    """Codes of a dequantised weight: exact up to the rounding of code * scale to 16 bits."""
    steps = scales.float().repeat_interleave(64, dim=1)
    return torch.round(weight.float() / steps).to(torch.int8)


def e2m1_codes(weight: Tensor, micro_scales: Tensor, tensor_scale: Tensor) -> Tensor:
    """Nearest table entry of a dequantised weight, the lower index on ties (so never -0)."""
    table = decode(torch.arange(16, dtype=torch.int8))
    values = weight.float() / tensor_scale.float() / micro_scales.float().repeat_interleave(16, dim=1)
    return (values.unsqueeze(-1) - table).abs().argmin(-1).to(torch.int8)


def assemble(file: Mapping[str, Tensor], block: str, owner: Owner, precision: str) -> SVDQWeights:
    """The canonical linear of one owner from the calibration outputs of its members."""
    codes, scales, factors, biases = [], [], [], []
    for member in owner.members:
        weight = file[f"state.{block}.{member}.weight"]
        scale = file[f"scale.{block}.{member}.weight.scale.0"]
        if precision == "int4":
            scales.append(scale.view(weight.shape[0], -1))
            codes.append(int4_codes(weight, scales[-1]))
        else:
            micro = file[f"scale.{block}.{member}.weight.scale.1"].view(weight.shape[0], -1)
            codes.append(e2m1_codes(weight, micro, scale))
            scales.append(micro.to(torch.float8_e4m3fn))
            factors.append(scale)
        biases.append(file[f"state.{block}.{member}.bias"])
    down, up = file[f"branch.{block}.{owner.branch}.a"], file[f"branch.{block}.{owner.branch}.b"]
    smooth = file[f"smooth.{block}.{owner.smooth}"]
    applied = torch.ones_like(smooth) if owner.smooth_fused else smooth
    down64 = down.double() / applied.double()
    bias = torch.cat(biases)
    shift = file.get(f"state.{block}.{owner.shift}")
    if shift is not None:
        bias = (bias.double() + up.double() @ down64 @ shift.double().expand(down.shape[1])).to(bias.dtype)
    fused = len(owner.members) > 1
    return SVDQWeights(
        precision=precision,  # type: ignore[arg-type]
        codes=torch.cat(codes),
        scales=torch.cat(scales),
        smooth=applied,
        smooth_orig=smooth,
        proj_down=down64.to(down.dtype),
        proj_up=up,
        bias=bias,
        wtscale=factors[0] if factors and not fused else None,
        wcscales=torch.cat([f.expand(len(c)) for f, c in zip(factors, codes, strict=True)])
        if factors and fused
        else None,
    )


def packed_modulation(file: Mapping[str, Tensor], module: str, chunks: int) -> dict[str, Tensor]:
    """A modulation linear: int4 codes stored with zero point 7, channel-major rows, 1 added to the scale chunks."""
    scales = file[f"scale.{module}.weight.scale.0"]
    scales = scales.view(scales.shape[0], -1)
    codes = int4_codes(file[f"state.{module}.weight"], scales) + 7
    channel_scales = to_channel_major(scales, chunks)
    return {
        "qweight": pack_awq(to_channel_major(codes, chunks)),
        "wscales": pack_awq_scales(channel_scales, 64),
        "wzeros": pack_awq_scales(-7 * channel_scales, 64),
        "bias": to_channel_major(fold_unit_scale(file[f"state.{module}.bias"], chunks), chunks),
    }


@pytest.mark.parametrize(
    ("kind", "precision"), [("double", "int4"), ("single", "int4"), ("single", "nvfp4")], ids="-".join
)
def test_block(golden: Load, kind: str, precision: str) -> None:
    file = golden(f"A_flux_{kind}_block_{precision}_d128_mlp128_r16").tensors
    block = "transformer_blocks.0" if kind == "double" else "single_transformer_blocks.0"
    actual: dict[str, Tensor] = {}
    for name, owner in (DOUBLE if kind == "double" else SINGLE).items():
        for key, value in pack_svdq(assemble(file, block, owner, precision)).items():
            actual[f"packed.{block}.{name}.{V1_NAMES.get(key, key)}"] = value
    for name, chunks in MODULATIONS[kind].items():
        for key, value in packed_modulation(file, f"{block}.{name}", chunks).items():
            actual[f"packed.{block}.{name}.{key}"] = value
    for key in file:
        if key.startswith("state.") and ".attn.norm_" in key:
            actual[key.replace("state.", "packed.").replace(".attn.", ".")] = file[key]

    assert actual.keys() == {key for key in file if key.startswith("packed.")}
    different = []
    for key, value in actual.items():
        assert value.dtype == file[key].dtype and value.shape == file[key].shape, key
        if not torch.equal(value.contiguous().view(torch.uint8), file[key].contiguous().view(torch.uint8)):
            different.append(key)
    assert not different
