"""Names of FLUX.1 tensors: v1 and v2 against the published manifests, BFL against diffusers' own converter."""

import itertools
import re
from pathlib import Path

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers
from safetensors.torch import save_file

from nunchaku_models.checkpoints import (
    CheckpointError,
    DiffusersView,
    SafetensorsReader,
    TensorInfo,
    v1_to_v2,
    v2_to_v1,
)
from nunchaku_models.checkpoints.flux_keys import BFL_PREFIXES, MODULES_V1_V2, bfl_rows, bfl_targets
from nunchaku_models.families.flux import FLUX

MANIFESTS = Path(__file__).resolve().parents[4] / "shared" / "spec" / "manifests"
needs_manifests = pytest.mark.skipif(not MANIFESTS.is_dir(), reason=f"the published key lists are not at {MANIFESTS}")

WIDTH = 3072  # diffusers' converter divides fused rows for this width only; few columns keep the tensors small


def manifest(name: str) -> dict[str, tuple[str, str]]:
    """Every tensor name of a manifest -> (dtype, shape)."""
    result = {}
    for line in (MANIFESTS / f"{name}.txt").read_text().splitlines():
        if match := re.fullmatch(r"(\S+) (\S+) (\[.*\]) x(\d+)", line):
            pattern, dtype, shape, count = match.groups()
            for index in range(int(count)):
                result[pattern.replace("{}", str(index))] = (dtype, shape)
    assert result
    return result


@needs_manifests
@pytest.mark.parametrize("precision", ["int4", "nvfp4"])
def test_v1_names_become_exactly_the_v2_names_and_back(precision: str) -> None:
    v1, v2 = manifest(f"flux_v1_{precision}"), manifest(f"flux_v2_{precision}")
    assert all(v2_to_v1(v1_to_v2(name)) == name for name in v1)
    assert all(v1_to_v2(v2_to_v1(name)) == name for name in v2)
    assert all(v1_to_v2(name) == name for name in v2)

    # Written by different tools: where v1 has the scalar wtscale, the v2 class has wcscales.
    def without_outer_scales(names: dict[str, tuple[str, str]]) -> dict[str, tuple[str, str]]:
        return {name: value for name, value in names.items() if not name.endswith((".wtscale", ".wcscales"))}

    assert without_outer_scales({v1_to_v2(name): value for name, value in v1.items()}) == without_outer_scales(v2)


def test_the_renames_agree_with_the_family_page() -> None:
    for block in FLUX.blocks:
        page = {layer.published: layer.module for layer in block.low_rank} | dict(block.renamed)
        assert {old: new for old, new in page.items() if old != new} == MODULES_V1_V2[block.prefix]


def test_suffixes_are_renamed_at_the_end_only() -> None:
    assert (
        v1_to_v2("transformer_blocks.3.mlp_fc1.smooth_orig") == "transformer_blocks.3.ff.net.0.proj.smooth_factor_orig"
    )
    assert v1_to_v2("transformer_blocks.3.mlp_fc1.smooth") == "transformer_blocks.3.ff.net.0.proj.smooth_factor"
    for name in (
        "proj_out.weight",
        "x_embedder.lora_down",
        "transformer_blocks.x.qkv_proj.bias",
        "transformer_blocks.3",
    ):
        assert v1_to_v2(name) == name == v2_to_v1(name)


def bfl_model(joint: int, single: int, *, guidance: bool, width: int, columns: int) -> dict[str, torch.Tensor]:
    """A random BFL state dict whose matrices have `columns` columns; written from the original model's modules."""
    rows = {"img_in": width, "txt_in": width, "final_layer.linear": 64, "final_layer.adaLN_modulation.1": 2 * width}
    for name in ("time_in", "vector_in", *(["guidance_in"] if guidance else [])):
        rows |= {f"{name}.in_layer": width, f"{name}.out_layer": width}
    norms = []
    for i in range(joint):
        for stream in ("img", "txt"):
            block = f"double_blocks.{i}.{stream}"
            rows |= {f"{block}_mod.lin": 6 * width, f"{block}_attn.qkv": 3 * width, f"{block}_attn.proj": width}
            rows |= {f"{block}_mlp.0": 4 * width, f"{block}_mlp.2": width}
            norms += [f"{block}_attn.norm.query_norm.scale", f"{block}_attn.norm.key_norm.scale"]
    for i in range(single):
        block = f"single_blocks.{i}"
        rows |= {f"{block}.modulation.lin": 3 * width, f"{block}.linear1": 7 * width, f"{block}.linear2": width}
        norms += [f"{block}.norm.query_norm.scale", f"{block}.norm.key_norm.scale"]
    state = {f"{name}.weight": torch.randn(count, columns) for name, count in rows.items()}
    state |= {f"{name}.bias": torch.randn(count) for name, count in rows.items()}
    return state | {name: torch.randn(8) for name in norms}


@pytest.mark.parametrize("prefix", ["", *BFL_PREFIXES])
@pytest.mark.parametrize("guidance", [False, True])
def test_bfl_files_read_as_diffusers_converts_them(tmp_path: Path, prefix: str, guidance: bool) -> None:
    state = bfl_model(2, 2, guidance=guidance, width=WIDTH, columns=2)
    path = tmp_path / "flux.safetensors"
    save_file({prefix + name: tensor for name, tensor in state.items()}, path)
    expected = convert_flux_transformer_checkpoint_to_diffusers(dict(state))
    with SafetensorsReader(path) as reader:
        view = DiffusersView(reader)
        assert view.form == "bfl"
        assert set(view) == set(expected) and len(view) == len(expected)
        for name, tensor in expected.items():
            assert view.info(name) == TensorInfo(name, torch.float32, tuple(tensor.shape))
            assert torch.equal(view.tensor(name), tensor)
            stop = tensor.shape[0] - 1
            assert torch.equal(view.rows(name, 1, stop), tensor[1:stop])
        # Cutting fused tensors copies nothing.
        fused = reader.tensor(prefix + "single_blocks.1.linear1.weight")
        assert view.tensor("single_transformer_blocks.1.proj_mlp.weight").data_ptr() == fused[3 * WIDTH :].data_ptr()


def test_every_bfl_tensor_is_used_once() -> None:
    state = bfl_model(1, 1, guidance=True, width=16, columns=1)
    rows = bfl_rows({name: TensorInfo(name, x.dtype, tuple(x.shape)) for name, x in state.items()}, "x")
    for name, tensor in state.items():
        used = sorted((part.start, part.stop) for part in rows.values() if part.source == name)
        assert used[0][0] == 0 and used[-1][1] == tensor.shape[0]
        assert all(before[1] == after[0] for before, after in itertools.pairwise(used))
    assert bfl_targets("double_blocks.0.img_attn.qkv") == []


def test_norms_resaved_as_weight_are_understood(tmp_path: Path) -> None:
    state = bfl_model(1, 1, guidance=False, width=16, columns=2)
    renamed = {name.replace("_norm.scale", "_norm.weight"): tensor for name, tensor in state.items()}
    save_file(renamed, tmp_path / "a.safetensors")
    view = DiffusersView(SafetensorsReader(tmp_path / "a.safetensors"))
    assert torch.equal(
        view.tensor("transformer_blocks.0.attn.norm_added_k.weight"),
        state["double_blocks.0.txt_attn.norm.key_norm.scale"],
    )


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("double_blocks.0.img_attn.qkv.weight", (33, 2), "does not fit"),
        ("double_blocks.0.img_attn.qkv.weight", (64, 2), "does not fit"),
        ("double_blocks.0.img_attn.qkv.bias", (), "does not fit"),
        ("single_blocks.0.linear1.weight", (48, 2), "does not fit"),
        ("final_layer.adaLN_modulation.1.weight", (33, 2), "does not fit"),
        ("double_blocks.0.img_attn.extra.weight", (3,), "1 tensors that FLUX.1 does not have"),
        ("double_blocks.0.img_attn.norm.key_norm.weight", (8,), "twice"),
        ("img_in.weight", (16,), "2-D 'img_in.weight'"),
    ],
)
def test_bfl_tensors_that_do_not_fit(name: str, shape: tuple[int, ...], message: str) -> None:
    state = bfl_model(1, 1, guidance=False, width=16, columns=2)
    infos = {key: TensorInfo(key, x.dtype, tuple(x.shape)) for key, x in state.items()}
    infos[name] = TensorInfo(name, torch.float32, shape)
    with pytest.raises(CheckpointError, match=message):
        bfl_rows(infos, "x")
