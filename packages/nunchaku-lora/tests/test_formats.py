"""Every format of LoRA files, one synthetic file each: the right weights change rightly, every key is accounted for."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel

import nunchaku_lora
from nunchaku_kernels.formats import join_lowrank, pack_lowrank_down, pack_lowrank_up
from nunchaku_kernels.nn import LinearSlice
from nunchaku_lora.formats import convert
from nunchaku_lora.formats.names import flux_place, parse_key
from nunchaku_lora.formats.products import hadamard_product, kronecker_product, whole_matrix
from nunchaku_lora.loading import linears_of

Tensors = dict[str, torch.Tensor]
D, RANK = 128, 4
JOINT, SINGLE = "transformer_blocks.0", "single_transformer_blocks.0"
QKV = tuple(f"attn.to_{which}" for which in "qkv")
ADDED = tuple(f"attn.add_{which}_proj" for which in "qkv")

LINEARS = {
    **{f"{JOINT}.{name}": (D, D) for name in (*QKV, *ADDED, "attn.to_out.0", "attn.to_add_out")},
    **{f"{JOINT}.{name}.net.0.proj": (4 * D, D) for name in ("ff", "ff_context")},
    **{f"{JOINT}.{name}.net.2": (D, 4 * D) for name in ("ff", "ff_context")},
    **{f"{JOINT}.{name}.linear": (6 * D, D) for name in ("norm1", "norm1_context")},
    **{f"{SINGLE}.{name}": (D, D) for name in QKV},
    f"{SINGLE}.proj_mlp": (4 * D, D),
    f"{SINGLE}.proj_out": (D, 5 * D),
    f"{SINGLE}.norm.linear": (3 * D, D),
    "x_embedder": (D, 64),
    "context_embedder": (D, D),
    "time_text_embed.timestep_embedder.linear_1": (D, 256),
    "time_text_embed.timestep_embedder.linear_2": (D, D),
    "time_text_embed.text_embedder.linear_1": (D, D),
    "time_text_embed.text_embedder.linear_2": (D, D),
    "time_text_embed.guidance_embedder.linear_1": (D, 256),
    "time_text_embed.guidance_embedder.linear_2": (D, D),
    "norm_out.linear": (2 * D, D),
    "proj_out": (64, D),
}
"""Every linear of the small FLUX, by path: (out_features, in_features)."""

BFL = {
    **{
        f"double_blocks.0.{stream}_{name}": tuple(f"{JOINT}.{path}" for path in paths)
        for stream, names in {
            "img": {
                "attn.qkv": QKV,
                "attn.proj": ("attn.to_out.0",),
                "mlp.0": ("ff.net.0.proj",),
                "mlp.2": ("ff.net.2",),
                "mod.lin": ("norm1.linear",),
            },
            "txt": {
                "attn.qkv": ADDED,
                "attn.proj": ("attn.to_add_out",),
                "mlp.0": ("ff_context.net.0.proj",),
                "mlp.2": ("ff_context.net.2",),
                "mod.lin": ("norm1_context.linear",),
            },
        }.items()
        for name, paths in names.items()
    },
    "single_blocks.0.linear1": tuple(f"{SINGLE}.{name}" for name in (*QKV, "proj_mlp")),
    "single_blocks.0.linear2": (f"{SINGLE}.proj_out",),
    "single_blocks.0.modulation.lin": (f"{SINGLE}.norm.linear",),
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    "time_in.in_layer": ("time_text_embed.timestep_embedder.linear_1",),
    "time_in.out_layer": ("time_text_embed.timestep_embedder.linear_2",),
    "vector_in.in_layer": ("time_text_embed.text_embedder.linear_1",),
    "vector_in.out_layer": ("time_text_embed.text_embedder.linear_2",),
    "guidance_in.in_layer": ("time_text_embed.guidance_embedder.linear_1",),
    "guidance_in.out_layer": ("time_text_embed.guidance_embedder.linear_2",),
    "final_layer.linear": ("proj_out",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
}
"""Linears of the original FLUX -> the diffusers linears whose rows they have."""


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) / shape[-1] ** 0.5


def pairs(rank: int = RANK) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Path -> (down, up) of every linear."""
    return {
        path: (randn(rank, inputs, seed=2 * i), randn(outputs, rank, seed=2 * i + 1))
        for i, (path, (outputs, inputs)) in enumerate(LINEARS.items())
    }


def deltas(found: dict[str, tuple[torch.Tensor, torch.Tensor]], scale: float = 1.0) -> Tensors:
    return {path: scale * up.double() @ down.double() for path, (down, up) in found.items()}


def diffusers_file(
    prefix: str = "transformer.", ends: tuple[str, str] = ("lora_A", "lora_B"), alpha: float = 0
) -> Tensors:
    tensors = {}
    for path, (down, up) in pairs().items():
        tensors[f"{prefix}{path}.{ends[0]}.weight"], tensors[f"{prefix}{path}.{ends[1]}.weight"] = down, up
        if alpha:
            tensors[f"{prefix}{path}.alpha"] = torch.tensor(alpha)
    return tensors


def fused_pairs(stacked: bool = False) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """BFL name -> (down, up): one down factor for all rows, or a block of ranks for each of the fused linears."""
    found = {}
    for i, (name, paths) in enumerate(BFL.items()):
        heights = [LINEARS[path][0] for path in paths]
        rank = RANK * len(paths) if stacked else RANK
        down, up = randn(rank, LINEARS[paths[0]][1], seed=2 * i), randn(sum(heights), rank, seed=2 * i + 1)
        if stacked:
            keep = torch.zeros_like(up)
            top = 0
            for j, height in enumerate(heights):
                keep[top : top + height, j * RANK : (j + 1) * RANK] = 1
                top += height
            up = up * keep
        found[name] = down, up
    return found


def bfl_deltas(found: dict[str, tuple[torch.Tensor, torch.Tensor]], scale: float = 1.0) -> Tensors:
    expected = {}
    for name, (down, up) in found.items():
        whole = scale * up.double() @ down.double()
        if "adaLN" in name:
            whole = torch.cat(whole.chunk(2)[::-1])  # shift and scale
        heights = [LINEARS[path][0] for path in BFL[name]]
        expected.update(dict(zip(BFL[name], whole.split(heights), strict=True)))
    return expected


def bfl_file(
    found: dict[str, tuple[torch.Tensor, torch.Tensor]],
    *,
    prefix: str,
    underscores: bool = False,
    ends: tuple[str, str] = ("lora_down", "lora_up"),
    alpha: float = 0,
) -> Tensors:
    tensors = {}
    for name, (down, up) in found.items():
        spelled = prefix + (name.replace(".", "_") if underscores else name)
        tensors[f"{spelled}.{ends[0]}.weight"], tensors[f"{spelled}.{ends[1]}.weight"] = down, up
        if alpha:
            tensors[f"{spelled}.alpha"] = torch.tensor(alpha)
    return tensors


def xlabs() -> tuple[Tensors, Tensors]:
    names = {
        "double_blocks.0.processor.qkv_lora1": "double_blocks.0.img_attn.qkv",
        "double_blocks.0.processor.qkv_lora2": "double_blocks.0.txt_attn.qkv",
        "double_blocks.0.processor.proj_lora1": "double_blocks.0.img_attn.proj",
        "double_blocks.0.processor.proj_lora2": "double_blocks.0.txt_attn.proj",
        "single_blocks.0.processor.proj_lora": "single_blocks.0.linear2",
    }
    found = {other: fused_pairs()[other] for other in names.values()}
    tensors = {}
    for name, other in names.items():
        tensors[f"{name}.down.weight"], tensors[f"{name}.up.weight"] = found[other]
    expected = bfl_deltas(found)
    down, up = randn(RANK, D, seed=90), randn(3 * D, RANK, seed=91)
    tensors["single_blocks.0.processor.qkv_lora.down.weight"] = down
    tensors["single_blocks.0.processor.qkv_lora.up.weight"] = up
    whole = up.double() @ down.double()
    expected.update({f"{SINGLE}.{name}": part for name, part in zip(QKV, whole.chunk(3), strict=True)})
    return tensors, expected


def bfl_control() -> tuple[Tensors, Tensors]:
    found = fused_pairs()
    found["img_in"] = randn(RANK, 128, seed=50), randn(D, RANK, seed=51)  # twice as many channels: the layer grows
    tensors = bfl_file(found, prefix="", ends=("lora_A", "lora_B"))
    for name, (_, up) in list(found.items()):
        tensors[f"{name}.lora_B.bias"] = torch.zeros(up.shape[0])
    for stream in ("img", "txt"):
        for which in ("query", "key"):
            tensors[f"double_blocks.0.{stream}_attn.norm.{which}_norm.scale"] = torch.full((64,), 1.25)
    tensors["single_blocks.0.norm.query_norm.scale"] = torch.full((64,), 0.75)
    return tensors, bfl_deltas(found)


def lokr() -> tuple[Tensors, Tensors]:
    first, second = randn(4, 4, seed=1), randn(32, 32, seed=2)
    low = randn(32, 2, seed=3), randn(2, 32, seed=4)
    tensors = {
        f"lycoris_{JOINT.replace('.', '_')}_attn_to_q.lokr_w1": first,
        f"lycoris_{JOINT.replace('.', '_')}_attn_to_q.lokr_w2": second,
        f"lycoris_{JOINT.replace('.', '_')}_attn_to_q.alpha": torch.tensor(1e10),  # meaningless with whole factors
        "lora_unet_single_blocks_0_linear2.lokr_w1": randn(4, 4, seed=5),
        "lora_unet_single_blocks_0_linear2.lokr_w2_a": low[0],
        "lora_unet_single_blocks_0_linear2.lokr_w2_b": randn(2, 160, seed=6),
        "lora_unet_single_blocks_0_linear2.alpha": torch.tensor(1.0),
    }
    whole = torch.kron(randn(4, 4, seed=5).double(), low[0].double() @ randn(2, 160, seed=6).double())
    return tensors, {
        f"{JOINT}.attn.to_q": torch.kron(first.double(), second.double()),
        f"{SINGLE}.proj_out": 0.5 * whole,
    }


def loha() -> tuple[Tensors, Tensors]:
    parts = {
        f"hada_{which}": tensor
        for which, tensor in {
            "w1_a": randn(3 * D, 3, seed=1),
            "w1_b": randn(3, D, seed=2),
            "w2_a": randn(3 * D, 3, seed=3),
            "w2_b": randn(3, D, seed=4),
        }.items()
    }
    tensors = {f"lora_unet_double_blocks_0_txt_attn_qkv.{name}": tensor for name, tensor in parts.items()}
    tensors["lora_unet_double_blocks_0_txt_attn_qkv.alpha"] = torch.tensor(6.0)
    products = [parts[f"hada_{w}_a"].double() @ parts[f"hada_{w}_b"].double() for w in ("w1", "w2")]
    whole = 2 * products[0] * products[1]
    return tensors, {f"{JOINT}.{name}": part for name, part in zip(ADDED, whole.chunk(3), strict=True)}


def different_ranks() -> tuple[Tensors, Tensors]:
    tensors, expected = {}, {}
    for i, (path, (outputs, inputs)) in enumerate(LINEARS.items()):
        rank = 1 + i % 7
        down, up, alpha = randn(rank, inputs, seed=i), randn(outputs, rank, seed=i + 50), 1.0 + i % 3
        tensors[f"transformer.{path}.lora_A.weight"], tensors[f"transformer.{path}.lora_B.weight"] = down, up
        tensors[f"transformer.{path}.alpha"] = torch.tensor(alpha)
        expected[path] = alpha / rank * up.double() @ down.double()
    return tensors, expected


def early_diffusers() -> tuple[Tensors, Tensors]:
    found = {path: pair for path, pair in pairs().items() if path.endswith(("to_q", "to_k", "add_v_proj"))}
    tensors = {}
    for path, (down, up) in found.items():
        stem = path.replace("attn.", "attn.processor.")
        tensors[f"transformer.{stem}_lora.down.weight"], tensors[f"transformer.{stem}_lora.up.weight"] = down, up
    return tensors, deltas(found)


def fused_diffusers() -> tuple[Tensors, Tensors]:
    down, up = randn(RANK, D), randn(3 * D, RANK, seed=1)
    tensors = {
        f"transformer.{JOINT}.attn.to_qkv.lora_A.weight": down,
        f"transformer.{JOINT}.attn.to_qkv.lora_B.weight": up,
    }
    whole = up.double() @ down.double()
    return tensors, {f"{JOINT}.{name}": part for name, part in zip(QKV, whole.chunk(3), strict=True)}


FUSED, STACKED = fused_pairs(), fused_pairs(stacked=True)
ROWS: dict[str, tuple[str, Callable[[], tuple[Tensors, Tensors]]]] = {
    "diffusers": ("diffusers", lambda: (diffusers_file(), deltas(pairs()))),
    "diffusers, no prefix": ("diffusers", lambda: (diffusers_file(prefix=""), deltas(pairs()))),
    "diffusers, alpha": ("diffusers", lambda: (diffusers_file(alpha=1.0), deltas(pairs(), 0.25))),
    "diffusers, lora_down": ("diffusers", lambda: (diffusers_file(ends=("lora_down", "lora_up")), deltas(pairs()))),
    "diffusers, ranks and alphas differ": ("diffusers", different_ranks),
    "diffusers, early": ("diffusers", early_diffusers),
    "diffusers, fused projections": ("diffusers", fused_diffusers),
    "PEFT": ("PEFT", lambda: (diffusers_file(prefix="base_model.model."), deltas(pairs()))),
    "PEFT, adapter name": (
        "PEFT",
        lambda: (
            {key.replace(".weight", ".default.weight"): v for key, v in diffusers_file("base_model.model.").items()},
            deltas(pairs()),
        ),
    ),
    "PEFT around transformer": (
        "PEFT",
        lambda: (diffusers_file(prefix="base_model.model.transformer."), deltas(pairs())),
    ),
    "kohya": (
        "kohya",
        lambda: (bfl_file(FUSED, prefix="lora_unet_", underscores=True, alpha=2.0), bfl_deltas(FUSED, 0.5)),
    ),
    "kohya, no alpha": ("kohya", lambda: (bfl_file(FUSED, prefix="lora_unet_", underscores=True), bfl_deltas(FUSED))),
    "kohya, stacked qkv": (
        "kohya",
        lambda: (bfl_file(STACKED, prefix="lora_unet_", underscores=True), bfl_deltas(STACKED)),
    ),
    "kohya, diffusers names": (
        "kohya",
        lambda: (
            {
                "lora_unet_" + stem.replace(".", "_") + f".{end}": value
                for key, value in diffusers_file("", ("lora_down", "lora_up")).items()
                for stem, end in [key.rsplit(".lora_", 1)]
                for end in [f"lora_{end}"]
            },
            deltas(pairs()),
        ),
    ),
    "OneTrainer": (
        "OneTrainer",
        lambda: (
            {
                "lora_transformer_" + path.replace(".", "_") + end: value
                for path, (down, up) in pairs().items()
                for end, value in (
                    (".lora_down.weight", down),
                    (".lora_up.weight", up),
                    (".alpha", torch.tensor(8.0)),
                )
            },
            deltas(pairs(), 2.0),
        ),
    ),
    "ComfyUI": ("ComfyUI", lambda: (bfl_file(FUSED, prefix="diffusion_model.", alpha=8.0), bfl_deltas(FUSED, 2.0))),
    "ComfyUI, whole model": ("ComfyUI", lambda: (bfl_file(FUSED, prefix="model.diffusion_model."), bfl_deltas(FUSED))),
    "ComfyUI, PEFT ends": (
        "ComfyUI",
        lambda: (bfl_file(FUSED, prefix="diffusion_model.", ends=("lora_A", "lora_B")), bfl_deltas(FUSED)),
    ),
    "BFL": ("BFL", lambda: (bfl_file(FUSED, prefix="", ends=("lora_A", "lora_B")), bfl_deltas(FUSED))),
    "fal Kontext": (
        "fal Kontext",
        lambda: (bfl_file(FUSED, prefix="base_model.model.", ends=("lora_A", "lora_B")), bfl_deltas(FUSED)),
    ),
    "XLabs": ("XLabs", xlabs),
    "BFL control": ("BFL control", bfl_control),
    "LoKr": ("LyCORIS", lokr),
    "LoHa": ("LyCORIS", loha),
}
"""Name -> the format's name, and what makes (tensors, path -> change of its weight)."""


def weights(model: Any, weight_of: Any) -> Tensors:
    """The weight of every linear, everything included."""
    return {path: weight_of(model.get_submodule(path), model.get_submodule(path).in_features) for path in LINEARS}


def assert_change(after: Tensors, before: Tensors, expected: Tensors, tolerance: float = 1e-5) -> None:
    for path, weight in after.items():
        wanted = torch.zeros_like(weight)
        wanted[:, : before[path].shape[1]] = before[path]
        if path in expected:
            wanted[:, : expected[path].shape[1]] += expected[path]
        assert float((weight - wanted).norm() / wanted.norm()) < tolerance, path


def test_the_table_covers_every_linear(make_model: Any) -> None:
    assert {path: (m.out_features, m.in_features) for path, m in linears_of(make_model()).items()} == LINEARS


@pytest.mark.parametrize("row", ROWS)
def test_every_format_changes_the_right_weights(make_pipe: Any, weight_of: Any, tmp_path: Path, row: str) -> None:
    name, make = ROWS[row]
    tensors, expected = make()
    pipe = make_pipe()
    before = weights(pipe.transformer, weight_of)
    state = {key: value.clone() for key, value in pipe.transformer.state_dict().items()}
    file = tmp_path / "lora.safetensors"
    save_file({key: value.contiguous() for key, value in tensors.items()}, file)
    report = pipe.load_lora_weights(file, adapter_name="it", strict=True, max_rank=4096)
    assert report.format == name
    assert sorted(report.applied) == sorted(tensors)
    assert not report.skipped
    assert set(report.ranks) == set(expected)
    assert nunchaku_lora.report(pipe, "it") is report
    assert pipe.get_list_adapters() == {"transformer": ["it"]}
    assert_change(weights(pipe.transformer, weight_of), before, expected)
    pipe.set_adapters(["it"], [-0.5])
    assert_change(
        weights(pipe.transformer, weight_of), before, {path: -0.5 * delta for path, delta in expected.items()}
    )
    pipe.unload_lora_weights(reset_to_overwritten_params=True)
    after = pipe.transformer.state_dict()
    assert after.keys() == state.keys()
    assert all(torch.equal(after[key], state[key]) for key in state)


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.float64]
)
def test_every_dtype(make_pipe: Any, weight_of: Any, dtype: torch.dtype) -> None:
    pipe = make_pipe()
    before = weights(pipe.transformer, weight_of)
    tensors = {key: value.to(dtype) for key, value in diffusers_file().items()}
    pipe.load_lora_weights(tensors, strict=True)
    expected = {
        path: tensors[f"transformer.{path}.lora_B.weight"].double()
        @ tensors[f"transformer.{path}.lora_A.weight"].double()
        for path in LINEARS
    }
    assert_change(weights(pipe.transformer, weight_of), before, expected)


def dora_file(axis: int = 1) -> tuple[Tensors, dict[str, torch.Tensor]]:
    tensors, lengths = {}, {}
    for path in (f"{JOINT}.attn.to_q", f"{SINGLE}.proj_out", f"{JOINT}.norm1.linear", f"{JOINT}.ff.net.2"):
        down, up = pairs()[path]
        tensors[f"transformer.{path}.lora_A.weight"], tensors[f"transformer.{path}.lora_B.weight"] = down, up
        tensors[f"transformer.{path}.alpha"] = torch.tensor(2.0)
        lengths[path] = 0.5 + torch.rand(LINEARS[path][1 - axis], generator=torch.Generator().manual_seed(5))
        shape = (-1, 1) if axis == 1 else (1, -1)
        tensors[f"transformer.{path}.dora_scale"] = lengths[path].reshape(shape)
    return tensors, lengths


def test_dora_is_exact(make_pipe: Any, weight_of: Any, tmp_path: Path) -> None:
    pipe = make_pipe()
    before = weights(pipe.transformer, weight_of)
    tensors, lengths = dora_file()
    report = pipe.load_lora_weights(tensors, adapter_name="it", strict=True)
    assert len(report.applied) == len(tensors)
    expected = {}
    for path, length in lengths.items():
        down, up = pairs()[path]
        adapted = before[path] + 0.5 * up.double() @ down.double()
        expected[path] = length.double().unsqueeze(1) * adapted / adapted.norm(dim=1, keepdim=True) - before[path]
    assert_change(weights(pipe.transformer, weight_of), before, expected)
    pipe.set_adapters(["it"], [0.5])
    half = weights(pipe.transformer, weight_of)
    assert_change(half, before, {path: 0.5 * delta for path, delta in expected.items()})
    pipe.fuse_lora(components=["transformer"])
    assert_change(weights(pipe.transformer, weight_of), before, {path: 0.5 * d for path, d in expected.items()})
    pipe.unfuse_lora(components=["transformer"])
    pipe.transformer.save_lora_adapter(tmp_path, "it")
    pipe.unload_lora_weights()
    assert_change(weights(pipe.transformer, weight_of), before, {})
    pipe.load_lora_weights(tmp_path, strict=True)
    assert_change(weights(pipe.transformer, weight_of), before, expected, 1e-4)


def test_dora_over_inputs_and_on_16_bit_layers_is_reported(make_pipe: Any) -> None:
    tensors, _ = dora_file(axis=0)
    square = {key: value for key, value in tensors.items() if "to_q" not in key}
    with pytest.raises(ValueError, match="DoRA over input channels"):
        make_pipe().load_lora_weights(square)
    tensors = diffusers_file()
    tensors["transformer.x_embedder.dora_scale"] = torch.ones(D, 1)
    report = make_pipe().load_lora_weights(tensors)
    assert {key for key, _ in report.skipped} == {key for key in tensors if "x_embedder" in key}
    assert len(report.applied) + len(report.skipped) == len(tensors)


def test_published_fused_files(make_pipe: Any, weight_of: Any) -> None:
    """Ranks of the base first, packed; modulation in channel-major rows; proj_out as two layers."""
    pipe = make_pipe(dtype=torch.bfloat16)
    model = pipe.transformer
    tensors: Tensors = {}
    expected: Tensors = {}

    def add(name: str, owner: Any, down: torch.Tensor, up: torch.Tensor) -> None:
        wide, high = owner.proj_down.shape[0], owner.proj_up.shape[0]
        down, up = (torch.nn.functional.pad(each, size) for each, size in (
            (down, (0, wide - down.shape[1], 0, 16 - down.shape[0])), (up, (0, 16 - up.shape[1], 0, high - up.shape[0]))
        ))  # fmt: skip
        tensors[f"{name}.lora_down"] = join_lowrank(owner.proj_down.detach(), pack_lowrank_down(down.bfloat16()))
        tensors[f"{name}.lora_up"] = join_lowrank(owner.proj_up.detach(), pack_lowrank_up(up.bfloat16()))

    down, up = randn(6, D).bfloat16(), randn(3 * D, 6, seed=1).bfloat16()
    add(f"{JOINT}.qkv_proj", model.transformer_blocks[0].attn.to_qkv, down, up)
    whole = up.double() @ down.double()
    expected |= {f"{JOINT}.{name}": part for name, part in zip(QKV, whole.chunk(3), strict=True)}
    down, up = randn(5, 5 * D, seed=2).bfloat16(), randn(D, 5, seed=3).bfloat16()
    part = model.single_transformer_blocks[0].proj_out
    assert isinstance(part, LinearSlice)
    add(f"{SINGLE}.out_proj", part.parts[0].owner, down[:, :D], up)
    add(f"{SINGLE}.mlp_fc2", part.parts[1].owner, down[:, D:], up)
    expected[f"{SINGLE}.proj_out"] = up.double() @ down.double()
    down, up = randn(16, D, seed=4).bfloat16(), randn(6 * D, 16, seed=5).bfloat16()
    expected[f"{JOINT}.norm1.linear"] = up.double() @ down.double()
    tensors[f"{JOINT}.norm1.linear.lora_down"] = down
    tensors[f"{JOINT}.norm1.linear.lora_up"] = up.unflatten(0, (6, D)).transpose(0, 1).flatten(0, 1)
    tensors[f"{JOINT}.norm1_context.linear.lora_down"] = torch.empty(0, D)
    tensors[f"{JOINT}.norm1_context.linear.lora_up"] = torch.empty(6 * D, 0)
    tensors["transformer.x_embedder.lora_A.weight"], tensors["transformer.x_embedder.lora_B.weight"] = (
        randn(3, 64, seed=6), randn(D, 3, seed=7)
    )  # fmt: skip
    expected["x_embedder"] = (
        tensors["transformer.x_embedder.lora_B.weight"].double()
        @ tensors["transformer.x_embedder.lora_A.weight"].double()
    )
    tensors[f"{JOINT}.norm_q.weight"] = torch.full((64,), 1.5)
    report = pipe.load_lora_weights(tensors, strict=True)
    assert len(report.applied) == len(tensors)
    assert report.ranks[f"{JOINT}.attn.to_q"] == 6
    model.float()
    after = weights(model, weight_of)
    pipe.unload_lora_weights()
    assert_change(after, weights(model, weight_of), expected, 4e-3)  # the factors are in bfloat16
    with pytest.raises(ValueError, match="another base model"):
        other = dict(tensors)
        other[f"{JOINT}.qkv_proj.lora_down"] = tensors[f"{JOINT}.qkv_proj.lora_down"] * 1.5
        pipe.load_lora_weights(other)


def test_the_same_down_factor_pays_its_ranks_once(make_pipe: Any) -> None:
    pipe = make_pipe()
    pipe.load_lora_weights(bfl_file(FUSED, prefix="lora_unet_", underscores=True))
    owner = pipe.transformer.transformer_blocks[0].attn.to_qkv
    with torch.no_grad():
        assert owner._low_rank().proj_down.shape[1] == owner.rank + 16
    pipe.unload_lora_weights()
    pipe.load_lora_weights(bfl_file(STACKED, prefix="lora_unet_", underscores=True))
    with torch.no_grad():
        assert owner._low_rank().proj_down.shape[1] == owner.rank + 16  # 3 x 4


def test_what_means_nothing_is_reported(make_pipe: Any) -> None:
    tensors = diffusers_file()
    odd = {
        "transformer.transformer_blocks.7.attn.to_q.lora_A.weight": randn(4, D),
        "transformer.transformer_blocks.7.attn.to_q.lora_B.weight": randn(D, 4),
        "lora_te2_encoder_block_0.lora_down.weight": randn(4, 8),
        "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": randn(4, 8),
        "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": randn(8, 4),
        "something.else": torch.zeros(3),
        f"lora_unet_{JOINT.replace('.', '_')}_attn_to_q.lora_down.weight": randn(4, D),
        f"lora_unet_{JOINT.replace('.', '_')}_attn_to_q.lora_up.weight": randn(D, 4),
        f"transformer.{JOINT}.norm9.diff": torch.zeros(3),
    }
    pipe = make_pipe()
    report = pipe.load_lora_weights({**tensors, **odd}, adapter_name="it")
    assert sorted(report.applied) == sorted(tensors)
    assert sorted(key for key, _ in report.skipped) == sorted(odd)
    assert all(reason for _, reason in report.skipped)
    assert "skipped" in str(report)
    before = len(list(pipe.transformer.named_modules()))
    with pytest.raises(ValueError, match=f"{len(odd)} keys would be skipped"):
        pipe.load_lora_weights({**tensors, **odd}, adapter_name="other", strict=True)
    assert len(list(pipe.transformer.named_modules())) == before
    assert pipe.get_list_adapters() == {"transformer": ["it"]}


def test_text_encoders(make_pipe: Any, weight_of: Any) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1}
    encoder = CLIPTextModel(CLIPTextConfig(vocab_size=10, **sizes))
    pipe = make_pipe()
    pipe.register_modules(text_encoder=encoder)
    path = next(path for path, _ in encoder.named_modules() if path.endswith("layers.0.self_attn.q_proj"))
    before = weight_of(encoder.get_submodule(path), 64)
    down, up = randn(3, 64), randn(64, 3, seed=1)
    tensors = {
        "lora_te1_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight": down,
        "lora_te1_text_model_encoder_layers_0_self_attn_q_proj.lora_up.weight": up,
        "lora_te1_text_model_encoder_layers_0_self_attn_q_proj.alpha": torch.tensor(6.0),
    }
    report = pipe.load_lora_weights(tensors | diffusers_file(), adapter_name="it", strict=True)
    assert set(tensors) <= set(report.applied)
    change = weight_of(encoder.get_submodule(path), 64) - before
    torch.testing.assert_close(change, 2 * up.double() @ down.double(), rtol=1e-4, atol=1e-5)
    assert pipe.get_list_adapters() == {"text_encoder": ["it"], "transformer": ["it"]}
    pipe.unload_lora_weights()
    assert torch.equal(weight_of(encoder.get_submodule(path), 64), before)


def broken(**changes: Any) -> Tensors:
    tensors = diffusers_file()
    for key, value in changes.items():
        name = key.replace("__", ".")
        if value is None:
            del tensors[f"transformer.{JOINT}.attn.to_q.{name}"]
        else:
            tensors[f"transformer.{JOINT}.attn.to_q.{name}"] = value
    return tensors


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (lambda: broken(lora_A__weight=None), r"to_q\.lora_B\.weight: there is no down factor"),
        (lambda: broken(lora_B__weight=None), r"to_q\.lora_A\.weight: there is no up factor"),
        (lambda: broken(lora_A__weight=randn(4, 64)), r"to_q: the model has 128 inputs, the file's adapter 64"),
        (lambda: broken(lora_B__weight=randn(64, 4)), r"to_q: the model has 128 rows in .*to_q, the file 64"),
        (lambda: broken(lora_B__weight=randn(128, 5)), r"to_q\.lora_B\.weight: \(128, 5\).* differ in rank"),
        (lambda: broken(lora_A__weight=torch.empty(0, 128)), r"to_q\.lora_A\.weight: has no elements"),
        (lambda: broken(lora_A__weight=randn(4, 128) * torch.nan), r"to_q\.lora_A\.weight: has NaN or infinite"),
        (lambda: broken(lora_B__weight=randn(128, 4) + torch.inf), r"to_q\.lora_B\.weight: has NaN or infinite"),
        (lambda: broken(lora_A__weight=torch.zeros(4, 128, dtype=torch.int8)), r"expected a floating-point tensor"),
        (lambda: broken(lora_A__weight=randn(512)), r"expected a matrix, got shape \(512,\)"),
        (lambda: broken(alpha=torch.tensor([1.0, 2.0])), r"alpha must be one number"),
        (lambda: broken(alpha=torch.tensor(torch.nan)), r"alpha: has NaN"),
        (
            lambda: broken(lora_A__weight=None, lora_B__weight=None, alpha=torch.tensor(1.0)),
            r"to_q\.alpha: there are no weights for this alpha",
        ),
        (lambda: {"lora_unet_down_blocks_0_attentions_0.lora_down.weight": randn(4, 8)}, r"is for another model"),
        (lambda: {"model.layers.0.mlp.lora_A.weight": randn(4, 8)}, r"is for another model"),
        (lambda: {"a": torch.zeros(2)}, r"is for another model"),
        (dict, r"must be tensors by name"),
        (
            lambda: diffusers_file() | {"transformer.transformer_blocks.0.attn.norm_q.weight": torch.ones(65)},
            r"norm_q\.weight: the model has \(64,\), the file \(65,\)",
        ),
        (
            lambda: {"lora_unet_double_blocks_0_img_attn_qkv.lokr_w1": randn(4, 4)},
            r"LoKr needs lokr_w2 or both of",
        ),
        (lambda: {"lora_unet_double_blocks_0_img_attn_qkv.hada_w1_a": randn(4, 4)}, r"LoHa lacks hada_w1_b"),
        (lambda: {f"{JOINT}.qkv_proj.lora_down": randn(128, 32)}, r"there is no transformer_blocks\.0\.qkv_proj"),
    ],
)  # fmt: skip
def test_broken_files_change_nothing(make_pipe: Any, run: Any, tensors: Callable[[], Tensors], message: str) -> None:
    pipe = make_pipe()
    before = run(pipe.transformer)
    modules = [name for name, _ in pipe.transformer.named_modules()]
    with pytest.raises(ValueError, match=message):
        pipe.load_lora_weights(tensors())
    assert [name for name, _ in pipe.transformer.named_modules()] == modules
    assert not hasattr(pipe.transformer, "peft_config")
    assert torch.equal(run(pipe.transformer), before)


def test_files_that_are_not_lora_files(make_pipe: Any, tmp_path: Path) -> None:
    pipe = make_pipe()
    hostile = {
        "empty.safetensors": b"",
        "short.safetensors": b"\x08\x00\x00\x00\x00\x00\x00\x00{}",
        "long.safetensors": (2**62).to_bytes(8, "little") + b"{}",
        "offsets.safetensors": _with_header({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}),
        "overlap.safetensors": _with_header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}),
        "json.safetensors": (4).to_bytes(8, "little") + b"nope",
    }
    for name, content in hostile.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name} cannot be read as safetensors"):
            pipe.load_lora_weights(tmp_path / name)
    (tmp_path / "lora.bin").write_bytes(b"\x80\x02")
    with pytest.raises(ValueError, match="only safetensors files are read"):
        pipe.load_lora_weights(tmp_path / "lora.bin")
    with pytest.raises(ValueError, match="file in this folder, found 6"):
        pipe.load_lora_weights(tmp_path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        pipe.load_lora_weights(tmp_path / "absent.safetensors")


def _with_header(header: dict[str, Any]) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + b"\0" * 4


def test_configurations_give_alpha(make_pipe: Any, weight_of: Any, tmp_path: Path) -> None:
    pipe = make_pipe()
    before = weights(pipe.transformer, weight_of)
    save_file(diffusers_file(prefix="base_model.model."), tmp_path / "adapter_model.safetensors")
    configuration = {"lora_alpha": 8, "r": 4, "alpha_pattern": {"to_k": 1}, "use_rslora": True}
    (tmp_path / "adapter_config.json").write_text(json.dumps(configuration))
    pipe.load_lora_weights(tmp_path, strict=True)
    expected = {path: delta * (0.5 if path.endswith("to_k") else 4.0) for path, delta in deltas(pairs()).items()}
    assert_change(weights(pipe.transformer, weight_of), before, expected)


def test_metadata_of_diffusers_gives_alpha(make_pipe: Any, weight_of: Any, tmp_path: Path) -> None:
    """diffusers writes the configuration of each model of a pipeline under the model's name."""
    pipe = make_pipe()
    before = weights(pipe.transformer, weight_of)
    metadata = {"transformer.lora_alpha": 8, "transformer.r": 4, "transformer.alpha_pattern": {"to_k": 1}}
    metadata["text_encoder.lora_alpha"] = 100
    file = tmp_path / "it.safetensors"
    save_file(diffusers_file(), file, metadata={"lora_adapter_metadata": json.dumps(metadata)})
    pipe.load_lora_weights(file, strict=True)
    expected = {path: delta * (0.25 if path.endswith("to_k") else 2.0) for path, delta in deltas(pairs()).items()}
    assert_change(weights(pipe.transformer, weight_of), before, expected)


def test_what_the_pipeline_saves_it_loads_again(make_pipe: Any, run: Any, tmp_path: Path) -> None:
    pipe = make_pipe()
    config = LoraConfig(r=4, lora_alpha=2, target_modules=["to_q", "to_out.0"], init_lora_weights=False)
    pipe.transformer.add_adapter(config, "it")
    expected = run(pipe.transformer)
    pipe.save_lora_weights(
        tmp_path,
        transformer_lora_layers=get_peft_model_state_dict(pipe.transformer, adapter_name="it"),
        transformer_lora_adapter_metadata=pipe.transformer.peft_config["it"].to_dict(),
    )
    pipe.unload_lora_weights()
    pipe.load_lora_weights(tmp_path, strict=True)
    torch.testing.assert_close(run(pipe.transformer), expected, rtol=1e-4, atol=1e-4)


def test_saved_adapters_load_again(make_pipe: Any, run: Any, tmp_path: Path) -> None:
    pipe = make_pipe()
    tensors, _ = different_ranks()
    pipe.load_lora_weights(tensors, adapter_name="it")
    expected = run(pipe.transformer)
    pipe.transformer.save_lora_adapter(tmp_path, "it")
    pipe.unload_lora_weights()
    report = pipe.load_lora_weights(tmp_path, strict=True)
    assert report.ranks == {path: 1 + i % 7 for i, path in enumerate(LINEARS)}
    torch.testing.assert_close(run(pipe.transformer), expected, rtol=1e-4, atol=1e-4)


def test_swapping_adapters_of_other_ranks_and_alphas(make_pipe: Any, weight_of: Any) -> None:
    pipe = make_pipe()
    before = weights(pipe.transformer, weight_of)
    pipe.enable_lora_hotswap(target_rank=8)
    pipe.load_lora_weights(diffusers_file(alpha=3.0), adapter_name="it")
    assert_change(weights(pipe.transformer, weight_of), before, deltas(pairs(), 0.75))
    tensors, expected = different_ranks()
    pipe.load_lora_weights(tensors, adapter_name="it", hotswap=True)
    assert_change(weights(pipe.transformer, weight_of), before, expected)
    pipe.set_adapters(["it"], [0.5])
    assert_change(weights(pipe.transformer, weight_of), before, {path: 0.5 * d for path, d in expected.items()})


@given(
    kind=st.sampled_from(["kron", "hadamard", "whole"]),
    sizes=st.tuples(*[st.integers(1, 6)] * 4),
    rank=st.integers(1, 5),
    limit=st.integers(1, 40),
)
@settings(max_examples=40, deadline=None)
def test_products_are_the_best_of_their_rank(kind: str, sizes: tuple[int, ...], rank: int, limit: int) -> None:
    a, b, c, d = sizes
    if kind == "kron":
        first, second = randn(a, b, seed=1), randn(c, d, seed=2)
        whole, product = torch.kron(first, second), kronecker_product(first, second, limit)
    elif kind == "hadamard":
        parts = (
            randn(a * c, rank, seed=1),
            randn(rank, b * d, seed=2),
            randn(a * c, rank, seed=3),
            randn(rank, b * d, seed=4),
        )
        whole, product = (parts[0] @ parts[1]) * (parts[2] @ parts[3]), hadamard_product(*parts, limit)
    else:
        whole = randn(a * c, b * d)
        product = whole_matrix(whole, limit)
    values = torch.linalg.svdvals(whole.double())
    rest = float(values[product.up.shape[1] :].norm() / values.norm())
    error = float((product.up.double() @ product.down.double() - whole.double()).norm() / values.norm())
    assert product.up.shape[1] <= limit
    assert error == pytest.approx(rest, abs=1e-5)
    assert product.error == pytest.approx(error, abs=2e-3)


def test_names_without_a_model() -> None:
    for name, paths in BFL.items():
        for spelled in (name, name.replace(".", "_")):
            place = flux_place(spelled)
            assert place is not None
            assert place.paths == paths
    for path in LINEARS:
        place = flux_place(path.replace(".", "_"))
        assert place is not None
        assert place.paths == (path,)
    lora = convert(bfl_file(FUSED, prefix="lora_unet_", underscores=True, alpha=2.0))
    assert set(lora.modules) == set(LINEARS)
    for path, delta in bfl_deltas(FUSED, 0.5).items():
        part = lora.modules[path]
        torch.testing.assert_close(part.alpha / part.rank * part.up.double() @ part.down.double(), delta)


@given(st.text(max_size=60))
@settings(max_examples=200, deadline=None)
def test_any_key_is_taken_apart(key: str) -> None:
    parsed = parse_key(key)
    assert parsed.part in ("transformer", "text_encoder", "other text encoder")
    flux_place(parsed.module)


@pytest.mark.parametrize("control_first", [False, True])
def test_a_style_beside_a_control_lora(make_pipe: Any, weight_of: Any, control_first: bool) -> None:
    """The layer that a control LoRA widens may have an adapter already, or get a narrower one later."""
    pipe = make_pipe()
    before = weights(pipe.transformer, weight_of)
    control, expected = bfl_control()
    files = [("control", control), ("style", diffusers_file())]
    for name, tensors in files if control_first else files[::-1]:
        pipe.load_lora_weights(tensors, adapter_name=name, strict=True)
    pipe.set_adapters(["control", "style"], [1.0, 0.5])
    for path, delta in deltas(pairs(), 0.5).items():
        expected[path][:, : delta.shape[1]] += delta
    assert_change(weights(pipe.transformer, weight_of), before, expected)


def test_compiled_pipelines_swap_files_without_recompiling(make_pipe: Any, run: Any) -> None:
    torch.compiler.reset()
    pipe = make_pipe()
    pipe.enable_lora_hotswap(target_rank=8)
    pipe.load_lora_weights(diffusers_file(alpha=3.0), adapter_name="it")
    model = pipe.transformer
    model.compile(backend="aot_eager", fullgraph=True)
    first = run(model)
    tensors, _ = different_ranks()
    with torch.compiler.set_stance("fail_on_recompile"):
        pipe.load_lora_weights(tensors, adapter_name="it", hotswap=True)
        second = run(model)
        nunchaku_lora.set_strength(pipe, {"it": 0.5})
        third = run(model)
    model._compiled_call_impl = None
    torch.testing.assert_close(run(model), third, rtol=1e-4, atol=1e-4)
    nunchaku_lora.set_strength(pipe, {"it": 1.0})
    torch.testing.assert_close(run(model), second, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(first, second)
