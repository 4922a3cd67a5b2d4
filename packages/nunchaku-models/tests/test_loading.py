"""A quantised file or folder becomes the model that was quantised, through every way in and out."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from nunchaku_models import NunchakuFluxTransformer2DModel, NunchakuFluxTransformer2dModel, arithmetics
from nunchaku_models.checkpoints import CheckpointError, v1_to_v2
from nunchaku_models.layers import quantized_layers
from nunchaku_models.loading import stored_state
from nunchaku_models.quantizer import quantize_checkpoint

Forward = Callable[..., torch.Tensor]
Error = Callable[[torch.Tensor, torch.Tensor], float]


def metadata(file: Path) -> dict[str, str]:
    with safe_open(file, "pt") as opened:
        return dict(opened.metadata())


def rewrite(
    source: Path, target: Path, change: Callable[[dict[str, torch.Tensor]], None], extra: dict[str, str] | None = None
) -> Path:
    tensors = load_file(source)
    change(tensors)
    save_file(tensors, target, {**metadata(source), **(extra or {})})
    return target


def same_state(one: Any, other: Any) -> None:
    first, second = stored_state(one), stored_state(other)
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert value.dtype == second[name].dtype, name
        assert torch.equal(value.view(torch.uint8), second[name].view(torch.uint8)), name


@pytest.fixture(scope="module")
def model(int4_file: Path) -> Any:
    return NunchakuFluxTransformer2DModel.from_pretrained(int4_file)


# ------------------------------------------------------------------------------------------------- what comes out of it


@pytest.mark.parametrize("which", ["int4_file", "nvfp4_file"])
def test_output_is_close_to_16_bit(
    which: str, request: pytest.FixtureRequest, transformer16: Any, forward: Forward, error: Error
) -> None:
    model = NunchakuFluxTransformer2DModel.from_pretrained(request.getfixturevalue(which))
    assert len(quantized_layers(model)) == 10 + 2 * 5
    assert error(forward(model), forward(transformer16)) < 0.15


def test_picture_is_close_to_16_bit(pipeline_folder: Path, int4_file: Path) -> None:
    base = FluxPipeline.from_pretrained(pipeline_folder, torch_dtype=torch.bfloat16)
    base.set_progress_bar_config(disable=True)
    ours = FluxPipeline(**{**base.components, "transformer": NunchakuFluxTransformer2DModel.from_pretrained(int4_file)})
    ours.set_progress_bar_config(disable=True)

    def draw(pipe: Any) -> torch.Tensor:
        picture = pipe(
            "a red apple", num_inference_steps=2, width=64, height=64, generator=torch.Generator().manual_seed(3),
            output_type="pt",
        ).images  # fmt: skip
        return picture.float()

    difference = (draw(ours) - draw(base)).square().mean()
    assert -10 * torch.log10(difference) > 25  # decibels


def test_float32_arithmetic_oracle(int4_file: Path, forward: Forward, error: Error) -> None:
    """All arithmetics of a precision describe the same matrix: they agree up to the rounding of activations."""
    model = NunchakuFluxTransformer2DModel.from_pretrained(int4_file, torch_dtype=torch.float32)
    exact = {}
    for arithmetic in ("w4a16", "w4a8", "w4a4"):
        model.set_arithmetic(arithmetic)  # type: ignore[arg-type]
        exact[arithmetic] = forward(model, dtype=torch.float32)
    assert error(exact["w4a8"], exact["w4a16"]) < 0.03
    assert error(exact["w4a4"], exact["w4a16"]) < 0.25


# --------------------------------------------------------------------------------------------------------- ways to load


def test_v2_keys_and_legacy_folder_load_the_same(int4_file: Path, model: Any, tmp_path: Path) -> None:
    tensors = load_file(int4_file)
    v2 = {v1_to_v2(name): value for name, value in tensors.items()}
    assert v2.keys() != tensors.keys()
    save_file(v2, tmp_path / "v2.safetensors", metadata(int4_file))
    same_state(NunchakuFluxTransformer2DModel.from_pretrained(tmp_path / "v2.safetensors"), model)

    legacy = tmp_path / "legacy"
    legacy.mkdir()
    blocks = {k: v for k, v in tensors.items() if k.startswith(("transformer_blocks.", "single_transformer_blocks."))}
    save_file(blocks, legacy / "transformer_blocks.safetensors")
    save_file({k: v for k, v in tensors.items() if k not in blocks}, legacy / "unquantized_layers.safetensors")
    (legacy / "config.json").write_text(metadata(int4_file)["config"])
    same_state(NunchakuFluxTransformer2DModel.from_pretrained(legacy), model)
    (legacy / "config.json").unlink()  # axes cannot be seen in tensors; those of head dimension 128 are known
    same_state(NunchakuFluxTransformer2DModel.from_pretrained(str(legacy)), model)


def test_alias_and_smooth_orig_missing(int4_file: Path, model: Any, forward: Forward, tmp_path: Path) -> None:
    assert NunchakuFluxTransformer2dModel is NunchakuFluxTransformer2DModel

    def drop(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.endswith(".smooth_orig")]:
            del tensors[name]

        for name in [name for name in tensors if "single" in name and name.endswith("out_proj.bias")]:
            assert not tensors.pop(name).any()  # the bias of the split linear is on its other part

    file = rewrite(int4_file, tmp_path / "no-orig.safetensors", drop)
    assert torch.equal(forward(NunchakuFluxTransformer2dModel.from_pretrained(file)), forward(model))


def test_file_without_metadata_loads(int4_file: Path, model: Any, tmp_path: Path) -> None:
    save_file(load_file(int4_file), tmp_path / "bare.safetensors")
    same_state(NunchakuFluxTransformer2DModel.from_pretrained(tmp_path / "bare.safetensors"), model)


@pytest.mark.parametrize("name", ["torch_dtype", "dtype"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtype(
    name: str, dtype: torch.dtype, int4_file: Path, transformer16: Any, forward: Forward, error: Error
) -> None:
    model = NunchakuFluxTransformer2DModel.from_pretrained(int4_file, **{name: dtype})
    assert model.dtype == dtype
    assert {p.dtype for p in model.parameters() if p.is_floating_point()} == {dtype}
    output = forward(model, dtype=dtype)
    assert output.dtype == dtype
    assert error(output, forward(transformer16)) < 0.15


def test_dtype_keeps_float8_scales(nvfp4_file: Path, forward: Forward) -> None:
    model = NunchakuFluxTransformer2DModel.from_pretrained(nvfp4_file, torch_dtype=torch.float16)
    scales = {p.dtype for name, p in model.named_parameters() if name.endswith("attn.to_qkv.wscales")}
    assert scales == {torch.float8_e4m3fn}
    assert forward(model, dtype=torch.float16).isfinite().all()


@pytest.mark.parametrize("device_map", ["cpu", {"": "cpu"}, {"": torch.device("cpu")}, torch.device("cpu"), None])
def test_device_map(device_map: Any, int4_file: Path) -> None:
    model = NunchakuFluxTransformer2DModel.from_pretrained(int4_file, device_map=device_map)
    assert {p.device.type for p in model.parameters()} == {"cpu"}


@pytest.mark.parametrize(
    ("argument", "value", "says"),
    [
        ("device_map", "auto", "device_map"),
        ("device_map", {"transformer_blocks": "cpu"}, "device_map"),
        ("device", "warp", "warp"),
        ("torch_dtype", torch.int8, "torch_dtype"),
        ("torch_dtype", "bfloat17", "torch_dtype"),
        ("arithmetic", "w3a3", "w4a8"),
        ("arithmetic", "nvfp4", "int4 weights cannot be multiplied as 'nvfp4'"),
        ("low_cpu_mem_usage", False, "low_cpu_mem_usage"),
        ("quantisation", 1, "quantisation"),
    ],
)
def test_unusable_arguments(argument: str, value: Any, says: str, int4_file: Path) -> None:
    with pytest.raises((ValueError, TypeError, RuntimeError), match=says):
        NunchakuFluxTransformer2DModel.from_pretrained(int4_file, **{argument: value})


def test_arithmetic_argument(int4_file: Path) -> None:
    model = NunchakuFluxTransformer2DModel.from_pretrained(int4_file, arithmetic="w4a4")
    assert arithmetics(model)["w4a4"] == 8 + 2 * 4


def test_pipeline_folder_and_subfolder_as_path(int4_file: Path, model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "pipe" / "transformer")
    same_state(NunchakuFluxTransformer2DModel.from_pretrained(tmp_path / "pipe", subfolder="transformer"), model)
    (tmp_path / "pipe" / "model_index.json").write_text("{}")
    same_state(NunchakuFluxTransformer2DModel.from_pretrained(tmp_path / "pipe"), model)


# --------------------------------------------------------------------------------------------------------- ways to save


@pytest.mark.parametrize("which", ["int4_file", "nvfp4_file"])
def test_round_trips_are_bit_exact(which: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    original = request.getfixturevalue(which)
    model = NunchakuFluxTransformer2DModel.from_pretrained(original)
    model.save_pretrained(tmp_path / "again.safetensors")
    before, after = load_file(original), load_file(tmp_path / "again.safetensors")
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert value.dtype == after[name].dtype and value.shape == after[name].shape, name
        assert torch.equal(value.view(torch.uint8), after[name].view(torch.uint8)), name
    assert metadata(original) == metadata(tmp_path / "again.safetensors")
    model.save_pretrained(tmp_path / "folder")
    same_state(NunchakuFluxTransformer2DModel.from_pretrained(tmp_path / "folder"), model)
    model.save_pretrained(tmp_path / "folder")  # over its own kind


def test_save_pretrained_arguments(model: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="safe_serialization"):
        model.save_pretrained(tmp_path / "x", safe_serialization=False)
    with pytest.raises(ValueError, match="push_to_hub"):
        model.save_pretrained(tmp_path / "x", push_to_hub=True)
    model.save_pretrained(tmp_path / "x", is_main_process=False)
    assert not (tmp_path / "x").exists()
    model.save_pretrained(tmp_path / "x", variant="fp16")
    same_state(NunchakuFluxTransformer2DModel.from_pretrained(tmp_path / "x", variant="fp16"), model)
    (tmp_path / "x" / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"notes\.txt"):
        model.save_pretrained(tmp_path / "x")
    assert (tmp_path / "x" / "notes.txt").read_text() == "mine"


def test_saving_a_16_bit_model_of_our_class_is_refused(tmp_path: Path) -> None:
    plain = NunchakuFluxTransformer2DModel(num_layers=0, num_single_layers=0, num_attention_heads=1)
    with pytest.raises(ValueError, match="no 4-bit layers"):
        plain.save_pretrained(tmp_path / "plain")
    assert not any(tmp_path.iterdir())


def test_the_model_outlives_its_file(int4_file: Path, model: Any, forward: Forward, tmp_path: Path) -> None:
    copy = tmp_path / "copy.safetensors"
    shutil.copy(int4_file, copy)
    loaded = NunchakuFluxTransformer2DModel.from_pretrained(copy)
    copy.write_bytes(b"\0" * copy.stat().st_size)
    assert torch.equal(forward(loaded), forward(model))


# ------------------------------------------------------------------------------------------------------ damaged tensors


def drop(name: str) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.__delitem__(name)


def put(name: str, make: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.__setitem__(name, make(tensors.get(name, torch.zeros(1))).contiguous())


def poison(value: torch.Tensor) -> torch.Tensor:
    value = value.clone()
    value.view(-1)[3] = float("nan")
    return value


JOINT, SINGLE = "transformer_blocks.0.", "single_transformer_blocks.0."


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (drop(JOINT + "qkv_proj.wscales"), "attn.to_qkv"),
        (drop(JOINT + "qkv_proj.smooth"), "smooth_factor"),
        (drop(JOINT + "norm1.linear.wzeros"), "wzeros"),
        (drop(JOINT + "norm_q.weight"), "attn.norm_q"),
        (drop("proj_out.bias"), "proj_out.bias"),
        (drop(JOINT + "mlp_fc1.bias"), "bias"),
        (drop(JOINT + "norm1.linear.bias"), "bias"),
        (drop(SINGLE + "mlp_fc2.bias"), "bias"),
        (drop("x_embedder.weight"), "FLUX"),
        (drop(SINGLE + "out_proj.qweight"), "proj_out"),
        (put(JOINT + "qkv_proj.qweight", lambda t: t[:128]), "qweight"),
        (put(JOINT + "qkv_proj.qweight", lambda t: t.to(torch.int16)), "qweight"),
        (put(JOINT + "qkv_proj.qweight", lambda t: t.float()), "qweight"),
        (put(JOINT + "qkv_proj.lora_down", lambda t: t[:, :5]), "rank"),
        (put(JOINT + "qkv_proj.lora_down", lambda t: t.reshape(-1)), "proj_down"),
        (put(JOINT + "mlp_fc1.bias", lambda t: t[:-1]), "bias"),
        (put(JOINT + "mlp_fc1.wscales", lambda t: t.to(torch.int8)), "wscales"),
        (put(JOINT + "norm_q.weight", lambda t: t.reshape(1, -1)), "norm"),
        (put("x_embedder.bias", lambda t: t.reshape(2, -1)), "x_embedder.bias"),
        (put("norm_out.linear.bias", lambda t: t.reshape(2, -1)), "norm_out.linear.bias"),
        (put("surprise.weight", lambda t: t), "surprise"),
        (put("transformer_blocks.7.norm_q.weight", lambda t: t), "transformer_blocks"),
        (put(JOINT + "mlp_fc1.wscales", poison), "mlp_fc1|ff.net.0.proj.wscales"),
        (put(JOINT + "norm1.linear.bias", poison), "norm1.linear.bias"),
        (put("x_embedder.weight", poison), "x_embedder.weight"),
    ],
)
def test_damaged_tensors_are_named(
    change: Callable[[dict[str, torch.Tensor]], None], says: str, int4_file: Path, tmp_path: Path
) -> None:
    file = rewrite(int4_file, tmp_path / "damaged.safetensors", change)
    with pytest.raises(CheckpointError, match=says) as caught:
        NunchakuFluxTransformer2DModel.from_pretrained(file)
    assert "damaged.safetensors" in str(caught.value)


def test_16_bit_and_other_files_are_refused(pipeline_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nunchaku quantize"):
        NunchakuFluxTransformer2DModel.from_pretrained(pipeline_folder)
    with pytest.raises(CheckpointError, match="VAE"):
        NunchakuFluxTransformer2DModel.from_pretrained(pipeline_folder / "vae")
    with pytest.raises(CheckpointError, match="does not exist"):
        NunchakuFluxTransformer2DModel.from_pretrained(tmp_path / "nothing.safetensors")


def test_metadata_that_contradicts_the_tensors(int4_file: Path, tmp_path: Path) -> None:
    config = json.loads(metadata(int4_file)["config"])
    config["num_layers"] = 300
    file = rewrite(int4_file, tmp_path / "lie.safetensors", lambda _: None, {"config": json.dumps(config)})
    with pytest.raises(CheckpointError, match="num_layers"):
        NunchakuFluxTransformer2DModel.from_pretrained(file)


def test_rank_zero_files_need_no_empty_factors(pipeline_folder: Path, tmp_path: Path) -> None:
    quantize_checkpoint(pipeline_folder, tmp_path / "full.safetensors", rank=0, progress=False)

    def drop_empty(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name, value in tensors.items() if not value.numel()]:
            del tensors[name]

    bare_file = rewrite(tmp_path / "full.safetensors", tmp_path / "bare.safetensors", drop_empty)
    assert len(load_file(bare_file)) < len(load_file(tmp_path / "full.safetensors"))
    bare = NunchakuFluxTransformer2DModel.from_pretrained(bare_file)
    assert not any(parameter.is_meta for parameter in bare.parameters())
    same_state(bare, NunchakuFluxTransformer2DModel.from_pretrained(tmp_path / "full.safetensors"))


def test_values_too_large_for_float16_are_named(int4_file: Path, tmp_path: Path) -> None:
    name = "transformer_blocks.0.norm1.linear.bias"

    def enlarge(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = torch.full_like(tensors[name], 1e5)

    file = rewrite(int4_file, tmp_path / "large.safetensors", enlarge)
    with pytest.raises(CheckpointError, match=rf"{name} holds values too large for torch.float16"):
        NunchakuFluxTransformer2DModel.from_pretrained(file, torch_dtype=torch.float16)


def test_a_config_that_names_our_class_is_accepted(int4_file: Path, tmp_path: Path) -> None:
    NunchakuFluxTransformer2DModel.from_pretrained(int4_file).save_pretrained(tmp_path / "folder")
    config = json.loads((tmp_path / "folder" / "config.json").read_text())
    config["_class_name"] = "NunchakuFluxTransformer2DModel"
    (tmp_path / "folder" / "config.json").write_text(json.dumps(config))
    assert NunchakuFluxTransformer2DModel.from_pretrained(tmp_path / "folder").config.num_layers


def test_the_factor_of_a_whole_weight_keeps_its_dtype(nvfp4_file: Path, tmp_path: Path) -> None:
    exact = 1.0770679e-4  # between two bfloat16

    def widen(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.endswith(".wtscale")]:
            tensors[name] = torch.tensor([exact])

    file = rewrite(nvfp4_file, tmp_path / "wide.safetensors", widen)
    model = NunchakuFluxTransformer2DModel.from_pretrained(file, torch_dtype=torch.bfloat16)
    found = {name: value for name, value in model.half().named_parameters() if name.endswith(".wtscale")}
    assert found
    for name, value in found.items():
        assert value.dtype == torch.float32 and float(value) == pytest.approx(exact, rel=1e-7), name
