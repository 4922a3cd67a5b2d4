"""Packing single layers against the published packers, bit for bit in both directions (golden group A)."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad

from nunchaku_kernels.formats import (
    SVDQWeights,
    fold_unit_scale,
    from_channel_major,
    pack_awq,
    pack_awq_int16,
    pack_awq_scales,
    pack_lowrank_down,
    pack_lowrank_up,
    pack_micro_scales,
    pack_qweight,
    pack_svdq,
    pack_vector,
    pack_w8a8,
    pack_wscales,
    to_channel_major,
    unpack_awq,
    unpack_awq_scales,
    unpack_lowrank_down,
    unpack_lowrank_up,
    unpack_micro_scales,
    unpack_qweight,
    unpack_svdq,
    unpack_vector,
    unpack_w8a8,
    unpack_wscales,
)

Load = Callable[[str], Any]

# Names in the golden files are those of the v1 checkpoints.
V1_NAMES = {
    "smooth_factor": "smooth",
    "smooth_factor_orig": "smooth_orig",
    "proj_down": "lora_down",
    "proj_up": "lora_up",
}


def assert_same(actual: Tensor, expected: Tensor) -> None:
    """Same dtype, shape and bits; float8 and half are compared as integers so that -0 and NaN count."""
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    as_bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[actual.element_size()]
    assert torch.equal(actual.contiguous().view(as_bits), expected.contiguous().view(as_bits))


def test_primitives(golden: Load) -> None:
    tensors = golden("A_primitives_n128_k128").tensors
    cases: list[tuple[str, str, Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = [
        ("w_q", "qweight", pack_qweight, unpack_qweight),
        ("wscales_g64", "wscales_g64", pack_wscales, unpack_wscales),
        ("wscales_fp8_g16", "wscales_fp8_g16", pack_micro_scales, unpack_micro_scales),
        ("vector", "vector", pack_vector, unpack_vector),
    ]
    for rank in (16, 32, 48, 128):
        cases.append((f"lora_down_r{rank}", f"lora_down_r{rank}", pack_lowrank_down, unpack_lowrank_down))
        cases.append((f"lora_up_r{rank}", f"lora_up_r{rank}", pack_lowrank_up, unpack_lowrank_up))
    for canonical, published, pack, unpack in cases:
        assert_same(pack(tensors[f"in.{canonical}"]), tensors[f"packed.{published}"])
        assert_same(unpack(tensors[f"packed.{published}"]), tensors[f"in.{canonical}"])


@pytest.mark.parametrize(("name", "channels", "rank"), [("r20", 128, 32), ("padded", 128, 16)])
def test_padded_lowrank_primitives(golden: Load, name: str, channels: int, rank: int) -> None:
    tensors = golden("A_primitives_n128_k128").tensors
    down, up = tensors[f"in.lora_down_{name}"], tensors[f"in.lora_up_{name}"]
    down = pad(down, (0, channels - down.shape[1], 0, rank - down.shape[0]))
    up = pad(up, (0, rank - up.shape[1], 0, channels - up.shape[0]))
    assert_same(pack_lowrank_down(down), tensors[f"packed.lora_down_{name}"])
    assert_same(pack_lowrank_up(up), tensors[f"packed.lora_up_{name}"])


def converted(tensors: Mapping[str, Tensor], *, precision: str, smooth_fused: bool) -> SVDQWeights:
    """What the published converter makes of a layer: unsmoothed down factor, bias corrected for the shift."""
    codes = tensors["in.w_q" if precision == "int4" else "in.w_code"]
    n, k = codes.shape
    down, up = tensors["in.lora_down"], tensors["in.lora_up"]
    smooth = tensors.get("in.smooth", torch.ones(k, dtype=down.dtype))
    bias = tensors.get("in.bias", torch.zeros(n, dtype=down.dtype))
    applied = torch.ones_like(smooth) if smooth_fused else smooth
    down64 = down.double() / applied.double()
    if "in.shift" in tensors:
        bias = (bias.double() + up.double() @ down64 @ tensors["in.shift"].double().expand(k)).to(bias.dtype)
    factor = tensors.get("in.scale")
    return SVDQWeights(
        precision=precision,  # type: ignore[arg-type]
        codes=codes,
        scales=tensors["in.w_scales" if precision == "int4" else "in.subscale"],
        smooth=applied,
        smooth_orig=smooth,
        proj_down=down64.to(down.dtype),
        proj_up=up,
        bias=bias,
        wtscale=factor if factor is not None and factor.numel() == 1 else None,
        wcscales=factor if factor is not None and factor.numel() > 1 else None,
    )


@pytest.mark.parametrize(
    "name",
    [
        "A_w4a4_linear_bf16_n128_k256_r32",
        "A_w4a4_linear_bf16_n136_k192_r24_pad",
        "A_w4a4_linear_fp16_n128_k128_r16_nobias_nosmooth",
        "A_w4a4_linear_bf16_n128_k128_r32_smoothfused",
        "A_w4a4_linear_bf16_n128_k256_r16_shift",
        "A_nvfp4_linear_pertensor_n128_k256_r32",
        "A_nvfp4_linear_perchannel_n128_k128_r16",
    ],
)
def test_linear(golden: Load, name: str) -> None:
    file = golden(name)
    precision = "nvfp4" if "nvfp4" in name else "int4"
    weights = converted(file.tensors, precision=precision, smooth_fused=file.params.get("smooth_fused", False))
    packed = pack_svdq(weights)
    published = {key.removeprefix("packed."): value for key, value in file.tensors.items() if key.startswith("packed.")}
    assert {V1_NAMES.get(key, key) for key in packed} == published.keys()
    for key, value in packed.items():
        assert_same(value, published[V1_NAMES.get(key, key)])

    unpacked = unpack_svdq(
        {key: published[V1_NAMES.get(key, key)] for key in packed}, weights.in_features, weights.out_features
    )
    assert unpacked.precision == precision
    for attribute in ("codes", "scales", "smooth", "smooth_orig", "bias", "wtscale", "wcscales"):
        expected, actual = getattr(weights, attribute), getattr(unpacked, attribute)
        assert (actual is None) == (expected is None)
        if expected is not None:
            assert_same(actual, expected)
    rank = weights.rank
    assert_same(unpacked.proj_down[:rank], weights.proj_down)
    assert_same(unpacked.proj_up[:, :rank], weights.proj_up)
    assert not unpacked.proj_down[rank:].any() and not unpacked.proj_up[:, rank:].any()


@pytest.mark.parametrize(
    "name",
    [
        "A_w4a16_adanorm1_fp16_n64_k256_g64",
        "A_w4a16_adanorm3_bf16_n192_k128_g64",
        "A_w4a16_adanorm6_bf16_n192_k64_g64",
    ],
)
def test_modulation(golden: Load, name: str) -> None:
    file = golden(name)
    tensors, chunks, k = file.tensors, file.params["adanorm_splits"], file.params["K"]
    codes = to_channel_major(tensors["in.w_q"], chunks)
    scales = to_channel_major(tensors["in.w_scales"], chunks)
    assert_same(pack_awq(codes), tensors["packed.qweight"])
    assert_same(pack_awq_scales(scales, 64), tensors["packed.wscales"])
    assert_same(pack_awq_scales(-7 * scales, 64), tensors["packed.wzeros"])
    assert_same(to_channel_major(fold_unit_scale(tensors["in.bias"], chunks), chunks), tensors["packed.bias"])

    assert torch.equal(from_channel_major(unpack_awq(tensors["packed.qweight"]), chunks), tensors["in.w_q"])
    unpacked_scales = unpack_awq_scales(tensors["packed.wscales"], k, 64)
    assert_same(from_channel_major(unpacked_scales, chunks), tensors["in.w_scales"])


def test_tinychat(golden: Load) -> None:
    tensors = golden("A_w4a16_tinychat_bf16_n64_k256_g128").tensors
    assert_same(pack_awq_int16(tensors["in.w_q"]), tensors["packed.qweight"])
    assert_same(pack_awq_scales(tensors["in.w_scales"], 128), tensors["packed.wscales"])
    assert_same(pack_awq_scales(-tensors["in.w_zeros"], 128), tensors["packed.wzeros"])
    assert torch.equal(unpack_awq(tensors["packed.qweight"]), tensors["in.w_q"])


def test_w8a8(golden: Load) -> None:
    tensors = golden("A_w8a8_bf16_n128_k128").tensors
    assert_same(pack_w8a8(tensors["in.w_q"]), tensors["packed.qweight"])
    assert_same(unpack_w8a8(tensors["packed.qweight"]), tensors["in.w_q"])
    assert_same(pack_vector(tensors["in.w_scales"]), tensors["packed.wscales"])
    assert_same(pack_vector(tensors["in.bias"]), tensors["packed.bias"])
