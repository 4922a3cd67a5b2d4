"""The plain-torch arithmetics against the published kernels, stage by stage (golden groups B to F).

Following numerics.md: token codes are compared with the recorded agreement of an exact emulator (0.001 less, never more
than one step off); products start from the stored codes, scales and hidden state, and may be off by 1.5 times what the
published kernel itself is off from the real-number result.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from nunchaku_kernels.formats import pack_awq, pack_awq_int16, pack_awq_scales
from nunchaku_kernels.reference import w4a4, w4a16
from nunchaku_kernels.reference.epilogue import Activation, epilogue, lowrank_down

Load = Callable[[str], Any]
SHARE_MARGIN = 0.001
PRODUCT_FACTOR = 1.5

QUANTIZE = ["bf16_m256_k256_r32", "bf16_m300_k128_r16_nosmooth", "bf16_m256_k128_r16_ties", "fp16_m200_k128_r32"]
GEMM = [
    "bf16_m256_k256_n256_r32",
    "bf16_m200_k128_n128_r16_nobias",
    "bf16_m16_k3072_n128_r16_nosmooth",
    "bf16_m260_k128_n128_r32_lorascales",
    "bf16_m100_k128_n192_r16_npad",
    "fp16_m200_k128_n128_r32",
    "bf16_m64_k128_n128_r16_wcscales",
    "bf16_m64_k128_n128_r16_silu",
    "bf16_m1_k128_n128_r16",
]
SYNTHETIC = [
    "unsigned_synth_bf16_m200_k256_n128_r32",
    "signed_synth_bf16_m100_k256_n128_r16",
    "unsigned_synth_fp16_m100_k128_n128_r16",
]
MLP = ["bf16_m256_k128_h384_n128_r16_32", "bf16_m130_k128_h256_n128_r16_16", "fp16_m100_k128_h256_n128_r32_32"]
ROPE = ["bf16_m256_k128_h1_r32", "bf16_m208_k128_h1_r16", "fp16_m100_k128_h1_r16"]


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Frobenius norm of the difference over that of `expected`, in fp64."""
    difference = torch.linalg.vector_norm(actual.double() - expected.double())
    return float(difference / torch.linalg.vector_norm(expected.double()))


def assert_codes(actual: Tensor, expected: Tensor, emulator_share: float) -> None:
    """At least the emulator's share of equal codes, none off by more than one step."""
    distance = (actual.int() - expected.int()).abs()
    assert distance.max() <= 1
    assert (distance == 0).double().mean() >= emulator_share - SHARE_MARGIN


def unpack_tokens(packed: Tensor, rows: int) -> Tensor:
    """Signed kernel-side activation codes int8 [Mp, K/2] to [rows, K] (golden README 2, qact)."""
    padded, half = packed.shape
    nibbles = torch.stack(((packed << 4) >> 4, packed >> 4), dim=-1)
    # 256-block, 64-block, 16-row, row, quarter, k-half, row-half, nibble
    tiles = nibbles.view(padded // 256, half // 32, 16, 8, 4, 2, 2, 8)
    return tiles.permute(0, 2, 6, 3, 1, 5, 4, 7).reshape(padded, half * 2)[:rows]


def unpack_token_scales(packed: Tensor, rows: int) -> Tensor:
    """Kernel-side activation scales [G, Mp] to [rows, G] (golden README 2, ascales)."""
    groups, padded = packed.shape
    tiles = packed.view(padded // 256, groups, 16, 8, 2)
    return tiles.permute(0, 2, 4, 3, 1).reshape(padded, groups)[:rows]


def unpack_hidden(packed: Tensor, rows: int) -> Tensor:
    """Kernel-side low-rank hidden state [Mp, R] to [rows, R] (golden README 2, lora_act)."""
    padded, rank = packed.shape
    # 256-block, 16-rank, 16-row, rank-half, row-half, parity, row, pair
    tiles = packed.view(padded // 256, rank // 16, 16, 2, 2, 2, 8, 4)
    return tiles.permute(0, 2, 4, 6, 1, 3, 7, 5).reshape(padded, rank)[:rows]


def assert_quantized(file: Any, x: Tensor) -> None:
    tensors = file.tensors
    codes, ascales = w4a4.quantize_tokens(x, tensors["smooth"])
    hidden = lowrank_down(x, tensors["lora_down"])
    assert_codes(codes, tensors["ref.qact_logical"], file.errors["qact_vs_emulator_frac_equal"])
    assert torch.equal(ascales, tensors["ref.ascales_logical"])
    assert relative_error(hidden, tensors["ref.lora_act_logical"]) < 1e-6


@pytest.mark.parametrize("name", QUANTIZE)
def test_quantize(golden: Load, name: str) -> None:
    file = golden(f"B_quantize_{name}")
    assert_quantized(file, file.tensors["x"])


def test_quantize_glu(golden: Load) -> None:
    file = golden("B_quantize_bf16_m150_k256_r32_glu")
    value, gate = file.tensors["x"][:, 0::2], file.tensors["x"][:, 1::2]
    x = value * torch.nn.functional.silu(gate.float()).to(gate.dtype)
    codes, ascales = w4a4.quantize_tokens(x, file.tensors["smooth"])
    assert_codes(codes, file.tensors["ref.qact_logical"], file.errors["qact_vs_emulator_frac_equal"])
    assert relative_error(ascales, file.tensors["ref.ascales_logical"]) < 1e-3
    # The rounded product of the two halves differs by an ulp here and there from the kernel's approximate sigmoid.
    assert relative_error(lowrank_down(x, file.tensors["lora_down"]), file.tensors["ref.lora_act_logical"]) < 3e-3


def stored_product(
    tensors: dict[str, Tensor],
    prefix: str,
    stored: tuple[Tensor, Tensor, Tensor],
    *,
    rank_scale: Tensor | None = None,
    activation: Activation = "none",
) -> Tensor:
    """A linear from stored token codes, token scales and hidden state."""
    codes, ascales, hidden = stored
    accumulator = w4a4.product(codes, ascales, tensors[f"{prefix}w_q"], tensors[f"{prefix}w_scales"])
    return epilogue(
        accumulator,
        wcscales=tensors.get(f"{prefix}wcscales"),
        bias=tensors.get(f"{prefix}bias"),
        lora_act=hidden,
        proj_up=tensors[f"{prefix}lora_up"],
        rank_scale=rank_scale,
        activation=activation,
        out_dtype=tensors["ref.out"].dtype,
    )


@pytest.mark.parametrize("name", GEMM)
def test_gemm(golden: Load, name: str) -> None:
    file = golden(f"C_gemm_{name}")
    tensors = file.tensors
    assert_quantized(file, tensors["x"])
    scales = torch.tensor(file.params.get("lora_scales") or [1.0]).repeat_interleave(16)
    rank = tensors["lora_up"].shape[1]
    out = stored_product(
        tensors,
        "",
        (tensors["ref.qact_logical"], tensors["ref.ascales_logical"], tensors["ref.lora_act_logical"]),
        rank_scale=scales[:rank] if len(scales) >= rank else None,
        activation="silu" if file.params["fuse_silu"] else "none",
    )
    assert relative_error(out, tensors["ref.out"]) <= PRODUCT_FACTOR * file.errors["out_relerr_vs_ideal"]


@pytest.mark.parametrize("name", SYNTHETIC)
def test_synthetic_gemm(golden: Load, name: str) -> None:
    file = golden(f"C_gemm_{name}")
    tensors = file.tensors
    out = stored_product(tensors, "", (tensors["act_q"], tensors["act_scales"], tensors["lora_act"]))
    assert relative_error(out, tensors["ref.out"]) <= PRODUCT_FACTOR * file.errors["out_relerr_vs_ideal"]


@pytest.mark.parametrize("name", MLP)
def test_mlp(golden: Load, name: str) -> None:
    file = golden(f"D_mlp_{name}")
    tensors, errors, rows = file.tensors, file.errors, file.params["M"]
    stored = (
        unpack_tokens(tensors["ref.fc1_qact"], rows),
        unpack_token_scales(tensors["ref.fc1_ascales"], rows),
        unpack_hidden(tensors["ref.fc1_lora_act"], rows),
    )
    codes, ascales = w4a4.quantize_tokens(tensors["x"], tensors["fc1.smooth"])
    assert_codes(codes, stored[0], errors["fc1_qact_vs_emulator_frac_equal"])
    assert torch.equal(ascales, stored[1])
    hidden_states = stored_product(tensors, "fc1.", stored, activation="gelu")
    reference = tensors["ref.gelu_out"]
    assert relative_error(hidden_states, reference) <= PRODUCT_FACTOR * errors["gelu_out_relerr_vs_ideal"]

    codes, ascales = w4a4.quantize_tokens(reference, tensors["fc2.smooth"], file.params["shift"], unsigned=True)
    assert_codes(codes, tensors["ref.fc2_qact_logical"], errors["fc2_qact_vs_emulator_frac_equal"])
    assert torch.equal(ascales, tensors["ref.fc2_ascales_logical"])
    stored = (
        tensors["ref.fc2_qact_logical"],
        tensors["ref.fc2_ascales_logical"],
        tensors["ref.fc2_lora_act_logical"],
    )
    assert relative_error(lowrank_down(reference, tensors["fc2.lora_down"]), stored[2]) < 1e-6
    out = stored_product(tensors, "fc2.", stored)
    assert relative_error(out, tensors["ref.out"]) <= PRODUCT_FACTOR * errors["out_relerr_vs_ideal"]


def normalize_and_rotate(head: Tensor, weight: Tensor, rotary: Tensor, epsilon: float) -> Tensor:
    """RMS norm and rotation of adjacent pairs, fp32 [M, 128]; `rotary` [M, 64, 2] holds (sin, cos)."""
    head = head * torch.rsqrt(head.square().mean(dim=-1, keepdim=True) + epsilon) * weight.float()
    even, odd = head.unflatten(-1, (-1, 2)).unbind(-1)
    sin, cos = rotary.unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


@pytest.mark.parametrize("name", ROPE)
def test_qkv_norm_rope(golden: Load, name: str) -> None:
    file = golden(f"E_qkv_rope_{name}")
    tensors, rows, heads = file.tensors, file.params["M"], file.params["heads"]
    stored = (
        unpack_tokens(tensors["ref.qact"], rows),
        unpack_token_scales(tensors["ref.ascales"], rows),
        unpack_hidden(tensors["ref.lora_act"], rows),
    )
    codes, ascales = w4a4.quantize_tokens(tensors["x"], tensors["smooth"])
    assert_codes(codes, stored[0], file.errors["qact_vs_emulator_frac_equal"])
    assert torch.equal(ascales, stored[1])
    assert relative_error(lowrank_down(tensors["x"], tensors["lora_down"]), stored[2]) < 1e-6

    qkv = stored_product(tensors, "", stored).float().view(rows, 3, heads, 128)
    out = qkv.clone()
    for part, weight in enumerate((tensors["norm_q"], tensors["norm_k"])):
        for head in range(heads):
            out[:, part, head] = normalize_and_rotate(
                qkv[:, part, head], weight, tensors["rotary_emb"], file.params["eps"]
            )
    error = relative_error(out.reshape(rows, -1).to(tensors["x"].dtype), tensors["ref.out"])
    assert error <= PRODUCT_FACTOR * file.errors["out_relerr_vs_ideal"]


@pytest.mark.parametrize(
    "name",
    [
        "gemv_awq_bf16_n256_k512",
        "gemv_awq_bf16_n64_k3072",
        "gemv_awq_fp16_n128_k256_asym",
        "gemm_awq_bf16_n128_k768",
        "gemm_awq_fp16_n128_k768",
    ],
)
def test_awq(golden: Load, name: str) -> None:
    file = golden(f"F_{name}")
    tensors, group_size = file.tensors, file.params["group_size"]
    scales, zeros = tensors["w_scales"], -tensors["w_zeros"]
    if file.params["symmetric"]:
        zeros = zeros * scales
    pack = pack_awq if tensors["packed.qweight"].dtype == torch.int32 else pack_awq_int16
    assert torch.equal(pack(tensors["w_q"]), tensors["packed.qweight"])
    assert torch.equal(pack_awq_scales(scales, group_size), tensors["packed.wscales"])
    assert torch.equal(pack_awq_scales(zeros, group_size), tensors["packed.wzeros"])
    for m in file.params["m_list"]:
        out = w4a16.linear(tensors["x"][:m], tensors["w_q"], scales, zeros)
        limit = PRODUCT_FACTOR * file.errors[f"m{m}"]["relerr_vs_ideal"]
        assert relative_error(out, tensors[f"ref.out_m{m}"]) <= limit
