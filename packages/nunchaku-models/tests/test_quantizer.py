"""Quantising: what goes in, what comes out, and what stays when it fails."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import nunchaku_models.quantizer as quantizer
from nunchaku_kernels.nn import SVDQLinear
from nunchaku_models import NunchakuFluxTransformer2DModel, quantize_checkpoint
from nunchaku_models.checkpoints import CheckpointError, TensorInfo
from nunchaku_models.checkpoints.safetensors_header import build_header
from nunchaku_models.families import FLUX
from nunchaku_models.layers import quantized_layers
from nunchaku_models.published import file_metadata
from nunchaku_models.quantizer import plan, predicted_bytes

Forward = Callable[..., torch.Tensor]
Error = Callable[[torch.Tensor, torch.Tensor], float]
MakeTransformer = Callable[..., Any]


def quantize(source: Path, output: Path, **options: Any) -> Any:
    return quantize_checkpoint(source, output, progress=False, **options)


def same_tensors(one: Path, other: Path) -> None:
    first, second = load_file(one), load_file(other)
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value.view(torch.uint8), second[name].view(torch.uint8)), name


def leftovers(folder: Path) -> list[str]:
    return [entry.name for entry in folder.iterdir() if "tmp" in entry.name or "old" in entry.name]


BFL_TOP = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
    "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
    "time_text_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    "proj_out": "final_layer.linear",
}


def bfl_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state dict of a diffusers FLUX transformer under the names of the original files."""
    state = dict(state)
    result: dict[str, torch.Tensor] = {}

    def move(new: str, *old: str) -> None:
        for leaf in ("weight", "bias"):
            if f"{old[0]}.{leaf}" in state:
                result[f"{new}.{leaf}"] = torch.cat([state.pop(f"{name}.{leaf}") for name in old])

    for old, new in BFL_TOP.items():
        move(new, old)
    for leaf in ("weight", "bias"):
        scale, shift = state.pop(f"norm_out.linear.{leaf}").chunk(2)
        result[f"final_layer.adaLN_modulation.1.{leaf}"] = torch.cat([shift, scale])
    for name in list(state):
        match = re.match(r"(transformer_blocks|single_transformer_blocks)\.(\d+)\.", name)
        if match is None or name not in state:
            continue
        at, index = match.group(), match[2]
        if match[1] == "transformer_blocks":
            to = f"double_blocks.{index}."
            for kind, norm, q, k, v, out, ff in (
                ("img", "norm1", "to_q", "to_k", "to_v", "to_out.0", "ff"),
                ("txt", "norm1_context", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "ff_context"),
            ):
                move(f"{to}{kind}_mod.lin", f"{at}{norm}.linear")
                move(f"{to}{kind}_attn.qkv", *(f"{at}attn.{part}" for part in (q, k, v)))
                move(f"{to}{kind}_attn.proj", f"{at}attn.{out}")
                move(f"{to}{kind}_mlp.0", f"{at}{ff}.net.0.proj")
                move(f"{to}{kind}_mlp.2", f"{at}{ff}.net.2")
                added = "added_" if kind == "txt" else ""
                for part, word in (("q", "query"), ("k", "key")):
                    norm_weight = state.pop(f"{at}attn.norm_{added}{part}.weight")
                    result[f"{to}{kind}_attn.norm.{word}_norm.scale"] = norm_weight
        else:
            to = f"single_blocks.{index}."
            move(to + "modulation.lin", at + "norm.linear")
            move(to + "linear1", at + "attn.to_q", at + "attn.to_k", at + "attn.to_v", at + "proj_mlp")
            move(to + "linear2", at + "proj_out")
            for part, word in (("q", "query"), ("k", "key")):
                result[f"{to}norm.{word}_norm.scale"] = state.pop(f"{at}attn.norm_{part}.weight")
    assert not state, list(state)
    return {name: value.contiguous() for name, value in result.items()}


# ------------------------------------------------------------------------------------------------------ what it accepts


def test_every_naming_gives_the_same_tensors(
    pipeline_folder: Path, transformer16: Any, int4_file: Path, tmp_path: Path
) -> None:
    state = {name: value.contiguous() for name, value in transformer16.state_dict().items()}
    original = bfl_names(state)
    files = {
        "diffusers": state,
        "bfl": original,
        "comfy": {f"model.diffusion_model.{name}": value for name, value in original.items()},
    }
    for naming, tensors in files.items():
        save_file(tensors, tmp_path / f"{naming}.safetensors")
        quantize(tmp_path / f"{naming}.safetensors", tmp_path / f"{naming}-int4.safetensors")
        same_tensors(tmp_path / f"{naming}-int4.safetensors", int4_file)
    quantize(pipeline_folder / "transformer", tmp_path / "folder-int4.safetensors")
    same_tensors(tmp_path / "folder-int4.safetensors", int4_file)
    transformer16.save_pretrained(tmp_path / "sharded", max_shard_size="500KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    quantize(tmp_path / "sharded", tmp_path / "sharded-int4.safetensors")
    same_tensors(tmp_path / "sharded-int4.safetensors", int4_file)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float16, torch.float32])
def test_dtypes_of_the_source(
    dtype: torch.dtype, transformer16: Any, forward: Forward, error: Error, tmp_path: Path
) -> None:
    state = {name: value.to(dtype).contiguous() for name, value in transformer16.state_dict().items()}
    save_file(bfl_names(state), tmp_path / "source.safetensors")
    quantize(tmp_path / "source.safetensors", tmp_path / "int4.safetensors")
    model = NunchakuFluxTransformer2DModel.from_pretrained(tmp_path / "int4.safetensors")
    assert model.dtype == torch.bfloat16
    reference = FluxTransformer2DModel.from_config(transformer16.config)
    reference.load_state_dict({name: value.float() for name, value in state.items()})
    assert error(forward(model), forward(reference.bfloat16())) < 0.15


@pytest.mark.parametrize("precision", ["int4", "nvfp4"])
@pytest.mark.parametrize("rank", [0, 16, 48])
def test_ranks(
    precision: str, rank: int, pipeline_folder: Path, transformer16: Any, forward: Forward, error: Error, tmp_path: Path
) -> None:
    report = quantize(pipeline_folder, tmp_path / "out.safetensors", precision=precision, rank=rank)
    assert report.quantized == 20 and report.kept == ()
    assert report.bytes_after == (tmp_path / "out.safetensors").stat().st_size
    model = NunchakuFluxTransformer2DModel.from_pretrained(tmp_path / "out.safetensors")
    assert {layer.rank for layer in quantized_layers(model).values() if isinstance(layer, SVDQLinear)} == {rank}
    assert error(forward(model), forward(transformer16)) < 0.2


def test_float16_output(
    pipeline_folder: Path, transformer16: Any, forward: Forward, error: Error, tmp_path: Path
) -> None:
    quantize(pipeline_folder, tmp_path / "out.safetensors", dtype="float16")
    model = NunchakuFluxTransformer2DModel.from_pretrained(tmp_path / "out.safetensors")
    assert {p.dtype for p in model.parameters() if p.is_floating_point()} == {torch.float16}
    assert error(forward(model, dtype=torch.float16), forward(transformer16)) < 0.15


def test_same_seed_same_bytes(pipeline_folder: Path, int4_file: Path, tmp_path: Path) -> None:
    quantize(pipeline_folder, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == int4_file.read_bytes()


@pytest.mark.parametrize("precision", ["int4", "nvfp4"])
@pytest.mark.parametrize(
    "shape",
    [
        {"num_attention_heads": 3, "attention_head_dim": 64, "axes_dims_rope": (8, 28, 28)},  # 192
        {
            "num_attention_heads": 5,
            "attention_head_dim": 16,
            "axes_dims_rope": (4, 6, 6),
        },  # 80
        {
            "num_attention_heads": 1,
            "attention_head_dim": 128,
            "guidance_embeds": True,
            "out_channels": 3,
            "axes_dims_rope": (16, 56, 56),
        },
    ],
)
def test_widths_that_need_padding(
    precision: str,
    shape: dict[str, Any],
    make_transformer: MakeTransformer,
    forward: Forward,
    error: Error,
    tmp_path: Path,
) -> None:
    original = make_transformer(**shape)
    original.save_pretrained(tmp_path / "source")
    quantize(tmp_path / "source", tmp_path / "out.safetensors", precision=precision, rank=16)
    model = NunchakuFluxTransformer2DModel.from_pretrained(tmp_path / "out.safetensors")
    assert error(forward(model), forward(original)) < 0.2
    quantize(tmp_path / "source", tmp_path / "folder", precision=precision, rank=16)
    stock = FluxTransformer2DModel.from_pretrained(tmp_path / "folder", torch_dtype=torch.bfloat16)
    assert torch.equal(forward(stock), forward(model))


def test_narrow_linears_stay_16_bit_and_are_listed(
    make_transformer: MakeTransformer, forward: Forward, error: Error, tmp_path: Path
) -> None:
    # width 48: only the linears behind the GELU (192 channels) are wide enough, and of proj_out only one half is
    original = make_transformer(num_attention_heads=3, attention_head_dim=16, axes_dims_rope=(4, 6, 6))
    original.save_pretrained(tmp_path / "source")
    report = quantize(tmp_path / "source", tmp_path / "out.safetensors", rank=16)
    assert report.quantized == 2
    for expected in ("transformer_blocks.0.attn.to_q", "transformer_blocks.0.norm1.linear"):
        assert expected in report.kept
    assert report.kept.count("single_transformer_blocks.0.proj_out") == 1
    model = NunchakuFluxTransformer2DModel.from_pretrained(tmp_path / "out.safetensors")
    assert set(quantized_layers(model)) == {f"transformer_blocks.0.{ff}.net.2" for ff in ("ff", "ff_context")}
    assert error(forward(model), forward(original)) < 0.1

    make_transformer(
        num_attention_heads=1, attention_head_dim=8, axes_dims_rope=(4, 2, 2), num_layers=1, num_single_layers=1
    ).save_pretrained(tmp_path / "small")
    with pytest.raises(CheckpointError, match="wide enough"):
        quantize(tmp_path / "small", tmp_path / "none.safetensors")
    assert not (tmp_path / "none.safetensors").exists()


def test_only_one_kind_of_block(
    make_transformer: MakeTransformer, forward: Forward, error: Error, tmp_path: Path
) -> None:
    original = make_transformer(num_layers=0)
    original.save_pretrained(tmp_path / "source")
    quantize(tmp_path / "source", tmp_path / "out.safetensors", precision="nvfp4")
    model = NunchakuFluxTransformer2DModel.from_pretrained(tmp_path / "out.safetensors")
    assert error(forward(model), forward(original)) < 0.2


@pytest.mark.parametrize("which", ["int4_file", "nvfp4_file"])
def test_tensors_lie_aligned_in_the_file(which: str, request: pytest.FixtureRequest) -> None:
    """Readers in other languages take views of the mapped file, which need aligned offsets."""
    file = request.getfixturevalue(which)
    with file.open("rb") as opened:
        header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
    sizes = {"I32": 4, "I16": 2, "BF16": 2, "I8": 1, "F8_E4M3": 1}
    for name, entry in header.items():
        if name != "__metadata__":
            assert entry["data_offsets"][0] % sizes[entry["dtype"]] == 0, name


# ------------------------------------------------------------------------------------------------------------ file size


def shapes_of(config: dict[str, Any]) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
    with torch.device("meta"):
        model = FluxTransformer2DModel.from_config(config)
    infos = {k: TensorInfo(k, torch.bfloat16, tuple(v.shape)) for k, v in model.state_dict().items()}
    return dict(model.config), infos


@pytest.mark.parametrize("which", ["int4_file", "nvfp4_file"])
def test_predicted_bytes_are_the_bytes(which: str, request: pytest.FixtureRequest, transformer16: Any) -> None:
    file = request.getfixturevalue(which)
    precision, rank = ("int4", 32) if which == "int4_file" else ("nvfp4", 16)
    config, infos = shapes_of(transformer16.config)
    predicted = predicted_bytes(plan(FLUX, config, infos, precision=precision, rank=rank), infos)  # type: ignore[arg-type]
    assert predicted == sum(value.nbytes for value in load_file(file).values())
    with file.open("rb") as opened:
        assert file.stat().st_size == 8 + int.from_bytes(opened.read(8), "little") + predicted


def test_flux_dev_fits_its_budget() -> None:
    config, infos = shapes_of({
        "num_layers": 19, "num_single_layers": 38, "attention_head_dim": 128, "num_attention_heads": 24,
        "joint_attention_dim": 4096, "pooled_projection_dim": 768, "in_channels": 64, "guidance_embeds": True,
    })  # fmt: skip
    assert sum(torch.Size(info.shape).numel() for info in infos.values()) == 11_901_408_320
    job = plan(FLUX, config, infos, precision="int4", rank=32)
    assert not job.kept
    predicted = predicted_bytes(job, infos)
    assert 6.0 < predicted / 2**30 <= 6.35
    shapes = {name: info.shape for name, info in infos.items()}
    header = build_header([*job.tensors(shapes)], file_metadata("FluxTransformer2DModel", config, "int4", 32))
    assert len(header) < predicted / 100  # so the file is within 1 % of its formula


# -------------------------------------------------------------------------------------------------------------- folders


def test_whole_pipeline_folder(pipeline_folder: Path, int4_file: Path, tmp_path: Path) -> None:
    shutil.copytree(pipeline_folder, tmp_path / "source")
    pipeline_folder = tmp_path / "source"
    before = {path: path.read_bytes() for path in pipeline_folder.rglob("*") if path.is_file()}
    (pipeline_folder / "single-file.safetensors").write_bytes(b"24 GB more")
    report = quantize(pipeline_folder, tmp_path / "out")
    (pipeline_folder / "single-file.safetensors").unlink()
    assert report.output == tmp_path / "out"
    assert {path: path.read_bytes() for path in pipeline_folder.rglob("*") if path.is_file()} == before
    for path in pipeline_folder.rglob("*"):
        relative = path.relative_to(pipeline_folder)
        if path.is_file() and relative.parts[0] != "transformer":
            assert (tmp_path / "out" / relative).read_bytes() == path.read_bytes()
    assert not leftovers(tmp_path)
    assert not (tmp_path / "out" / "single-file.safetensors").exists()
    pipe = FluxPipeline.from_pretrained(tmp_path / "out", torch_dtype=torch.bfloat16)
    ours = NunchakuFluxTransformer2DModel.from_pretrained(int4_file)
    theirs = pipe.transformer.state_dict()
    for name, value in ours.state_dict().items():
        assert torch.equal(value, theirs[name]), name


def test_folder_over_its_own_kind_and_over_others(pipeline_folder: Path, tmp_path: Path) -> None:
    transformer = pipeline_folder / "transformer"
    quantize(transformer, tmp_path / "out", rank=16)
    quantize(transformer, tmp_path / "out", rank=32)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["rank"] == 32
    (tmp_path / "out" / "README.md").write_text("mine")
    with pytest.raises(CheckpointError, match=r"README\.md"):
        quantize(transformer, tmp_path / "out")
    for source in (pipeline_folder, transformer):
        (tmp_path / "a-file").write_text("mine")
        with pytest.raises(CheckpointError, match="a-file"):
            quantize(source, tmp_path / "a-file")
        assert (tmp_path / "a-file").read_text() == "mine"
    with pytest.raises(CheckpointError, match="empty"):
        quantize(pipeline_folder, tmp_path / "out")
    assert (tmp_path / "out" / "README.md").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    quantize(pipeline_folder, tmp_path / "empty")
    assert (tmp_path / "empty" / "model_index.json").is_file()
    assert not leftovers(tmp_path)


def test_output_inside_its_source_is_refused(pipeline_folder: Path, tmp_path: Path) -> None:
    source = tmp_path / "pipe"
    shutil.copytree(pipeline_folder, source)
    with pytest.raises(CheckpointError, match="inside"):
        quantize(source, source / "int4")
    with pytest.raises(CheckpointError):
        quantize(source, source)
    with pytest.raises(CheckpointError):
        quantize(source / "transformer", source / "transformer")
    weights = source / "transformer" / "diffusion_pytorch_model.safetensors"
    with pytest.raises(CheckpointError, match="itself"):
        quantize(weights, weights)
    with pytest.raises(CheckpointError, match="itself"):
        quantize(source, weights)
    assert weights.read_bytes() == (pipeline_folder / "transformer" / weights.name).read_bytes()
    assert not leftovers(source)


def test_paths_relative_to_the_working_folder(
    pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(pipeline_folder.parent))
    quantize(Path("~/pipeline"), Path("out"), rank=0)
    assert (tmp_path / "out" / "vae").is_dir()
    empty = tmp_path / "here"
    empty.mkdir()
    monkeypatch.chdir(empty)
    quantize(Path("~/pipeline"), Path("."), rank=0)
    assert (empty / "model_index.json").is_file()


@pytest.mark.parametrize("output", ["missing/out.safetensors", "missing/out", "file/out", "file/out.safetensors"])
@pytest.mark.parametrize("source", ["", "transformer"])
def test_missing_parent(output: str, source: str, pipeline_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match=r"missing|file"):
        quantize(pipeline_folder / source, tmp_path / output)
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_parent(pipeline_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    for name in ("out.safetensors", "out"):
        with pytest.raises(CheckpointError, match="locked"):
            quantize(pipeline_folder, tmp_path / "locked" / name)


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    "options",
    [
        {"precision": "int3"},
        {"precision": "INT4"},
        {"rank": 7},
        {"rank": -16},
        {"rank": 2048},
        {"rank": True},
        {"rank": 32.0},
        {"dtype": "float32"},
        {"dtype": "float8"},
        {"dtype": torch.int8},
        {"seed": -1},
        {"seed": 2**64},
    ],
)
def test_bad_options(options: dict[str, Any], pipeline_folder: Path, tmp_path: Path) -> None:
    with pytest.raises((ValueError, TypeError), match=next(iter(options))):
        quantize(pipeline_folder, tmp_path / "out.safetensors", **options)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("output", ["model.gguf", "model.bin", "model.ckpt", "model.pt"])
def test_other_formats_are_not_written(output: str, pipeline_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="safetensors"):
        quantize(pipeline_folder, tmp_path / output)
    assert not any(tmp_path.iterdir())


def test_quantised_input_is_refused(int4_file: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="already quantised"):
        quantize(int4_file, tmp_path / "twice.safetensors")
    assert not any(tmp_path.iterdir())


BLOCK = "single_transformer_blocks.1."


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        (BLOCK + "proj_mlp.weight", "nan", "proj_mlp.weight"),
        (BLOCK + "attn.to_k.weight", "inf", "to_k.weight"),
        (BLOCK + "proj_out.bias", "nan", "proj_out.bias"),
        (BLOCK + "norm.linear.bias", "nan", "norm.linear.bias"),
        (BLOCK + "norm.linear.weight", "nan", "norm.linear.weight"),
        ("transformer_blocks.0.attn.to_add_out.weight", "nan", "to_add_out.weight"),
        ("norm_out.linear.weight", "nan", "norm_out.linear.weight"),
        (BLOCK + "attn.to_k.weight", "drop", "to_k.weight"),
        (BLOCK + "attn.to_k.bias", "drop", "to_k.bias"),
        (BLOCK + "attn.norm_k.weight", "drop", "norm_k.weight"),
        ("proj_out.bias", "drop", "proj_out.bias"),
        (BLOCK + "proj_out.weight", "narrow", "proj_out.weight"),
        (BLOCK + "attn.to_k.weight", "narrow", "to_k.weight"),
        (BLOCK + "attn.to_v.bias", "short", "to_v.bias"),
        (BLOCK + "attn.norm_k.weight", "short", "norm"),
        ("something.else.weight", "new", "something.else.weight"),
        ("single_transformer_blocks.9.attn.to_v.bias", "new", "number"),
    ],
)
def test_bad_tensors_are_named(name: str, change: str, says: str, transformer16: Any, tmp_path: Path) -> None:
    state = {key: value.contiguous() for key, value in transformer16.state_dict().items()}
    if change in ("nan", "inf"):
        state[name] = state[name].clone()
        state[name].view(-1)[-1] = float(change)
    elif change == "drop":
        del state[name]
    elif change == "narrow":
        state[name] = state[name][:, :-64].contiguous()
    elif change == "short":
        state[name] = state[name][:-1].contiguous()
    else:
        state[name] = torch.zeros(3)
    save_file(state, tmp_path / "bad.safetensors")
    output = tmp_path / "out.safetensors"
    output.write_bytes(b"earlier")
    with pytest.raises(CheckpointError, match=re.escape(says)) as caught:
        quantize(tmp_path / "bad.safetensors", output)
    assert "bad.safetensors" in str(caught.value)
    assert "to_q" not in str(caught.value)  # no wrong suspect
    assert output.read_bytes() == b"earlier"
    assert len(list(tmp_path.iterdir())) == 2


def test_weights_too_large_for_float16(transformer16: Any, tmp_path: Path) -> None:
    state = {key: value.float().contiguous() for key, value in transformer16.state_dict().items()}
    state["x_embedder.weight"] *= 1e9
    save_file(state, tmp_path / "large.safetensors")
    with pytest.raises(CheckpointError, match=r"x_embedder\.weight.*float16"):
        quantize(tmp_path / "large.safetensors", tmp_path / "out.safetensors", dtype="float16")


@pytest.mark.parametrize("output", ["out.safetensors", "out"])
@pytest.mark.parametrize("source", ["", "transformer"])
def test_interrupted(
    output: str, source: str, pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / output
    if output.endswith(".safetensors"):
        target.write_bytes(b"earlier")
    calls = []
    real = quantizer.quantize_svdq

    def stop_at_fifth(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(quantizer, "quantize_svdq", stop_at_fifth)
    with pytest.raises(KeyboardInterrupt):
        quantize(pipeline_folder / source, target)
    if output.endswith(".safetensors"):
        assert target.read_bytes() == b"earlier"
        assert [entry.name for entry in tmp_path.iterdir()] == [output]
    else:
        assert not any(tmp_path.iterdir())


def test_progress_bar(pipeline_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quantize_checkpoint(pipeline_folder, tmp_path / "out.safetensors", rank=0)
    shown = capsys.readouterr()
    assert "quantize" in shown.err and "100%" in shown.err and not shown.out
    quantize_checkpoint(pipeline_folder, tmp_path / "out.safetensors", rank=0, progress=False)
    shown = capsys.readouterr()
    assert not shown.err and not shown.out


def test_metadata_of_the_file(int4_file: Path, nvfp4_file: Path) -> None:
    for file, dtype, group, rank in ((int4_file, "int4", 64, 32), (nvfp4_file, "fp4_e2m1_all", 16, 16)):
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata()
        quantization = json.loads(metadata["quantization_config"])
        assert quantization["method"] == "svdquant" and quantization["rank"] == rank
        assert quantization["weight"]["dtype"] == dtype and quantization["weight"]["group_size"] == group
        assert json.loads(metadata["config"])["num_attention_heads"] == 2
        assert json.loads(metadata["comfy_config"])["model_class"] == "FluxSchnell"
        assert metadata["model_class"] == "NunchakuFluxTransformer2dModel"
