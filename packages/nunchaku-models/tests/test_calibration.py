"""Quantising with calibration: what comes out."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline
from safetensors.torch import load_file, save_file

from nunchaku_kernels.formats import unpack_svdq
from nunchaku_kernels.quantize import quantize_int4
from nunchaku_models import NunchakuFluxTransformer2DModel, quantize_checkpoint
from nunchaku_models.calibration.records import record_calls
from nunchaku_models.families import FLUX, LowRankLinear
from nunchaku_models.layers import plan_layers, set_arithmetic, source_columns
from nunchaku_models.published import WEIGHTS_NAME

Error = Callable[[torch.Tensor, torch.Tensor], float]
PROMPTS = ["a cat", "two dogs"]
QKV = "transformer_blocks.0.qkv_proj.qweight"


def quantize(source: Path, output: Path, **options: Any) -> Any:
    """Calibrated on two small pictures, rank 16, unless told otherwise."""
    defaults: dict[str, Any] = {"calibrate": PROMPTS, "steps": 1, "size": (32, 32), "rank": 16, "progress": False}
    return quantize_checkpoint(source, output, **(defaults | options))


def layout(file: Path) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Name -> dtype and shape of the tensors of a file."""
    return {name: (value.dtype, tuple(value.shape)) for name, value in load_file(file).items()}


def same_tensors(one: Path, other: Path) -> None:
    """Two files hold the same bits under the same names."""
    first, second = load_file(one), load_file(other)
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value.view(torch.uint8), second[name].view(torch.uint8)), name


@pytest.fixture(scope="module")
def data_free(pipeline_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An int4 file of rank 16 that was made without data."""
    file = tmp_path_factory.mktemp("data-free") / "out.safetensors"
    quantize_checkpoint(pipeline_folder, file, rank=16, progress=False)
    return file


@pytest.fixture(scope="module")
def refined(pipeline_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The refined int4 file of `quantize` without more options; nothing else is in its folder."""
    file = tmp_path_factory.mktemp("refined") / "out.safetensors"
    quantize(pipeline_folder, file)
    return file


def test_refined_is_nearer_than_rounding(
    pipeline_folder: Path, transformer16: Any, data_free: Path, error: Error, tmp_path: Path
) -> None:
    """On a call that was not calibrated on, with 4-bit activations."""
    rtn, refined = tmp_path / "rtn.safetensors", tmp_path / "refined.safetensors"
    quantize_checkpoint(pipeline_folder, rtn, recipe="rtn", rank=0, progress=False)
    quantize(pipeline_folder, refined, calibrate=[*PROMPTS, "red", "blue"], steps=2, size=(128, 128))
    assert layout(refined) == layout(data_free)
    pipeline = FluxPipeline.from_pretrained(pipeline_folder, torch_dtype=torch.bfloat16)
    arguments = {"num_inference_steps": 1, "width": 64, "height": 64}
    call = record_calls(pipeline, ["a fox"], arguments, batch=1, tokens=1, seed=77, progress=False)[0].arguments

    def error_of(file: Path) -> float:
        model = NunchakuFluxTransformer2DModel.from_pretrained(file)
        set_arithmetic(model, "w4a4")
        with torch.no_grad():
            return error(model(**call)[0], transformer16(**call)[0])

    # measured: 0.0088, 0.0125, 0.0127
    assert error_of(refined) < 0.85 * min(error_of(rtn), error_of(data_free))


@pytest.mark.parametrize(
    "options", [{"recipe": "svdquant"}, {"recipe": "svdquant", "gptq": True}], ids=["svdquant", "svdquant+gptq"]
)
def test_svdquant(
    options: dict[str, Any],
    pipeline_folder: Path,
    transformer16: Any,
    data_free: Path,
    refined: Path,
    forward: Callable[..., torch.Tensor],
    error: Error,
    tmp_path: Path,
) -> None:
    report = quantize(pipeline_folder, tmp_path / "out.safetensors", **options)
    assert report.quantized == 20 and report.kept == ()
    assert layout(tmp_path / "out.safetensors") == layout(data_free)
    assert [entry.name for entry in tmp_path.iterdir()] == ["out.safetensors"]
    codes = {file: load_file(file)[QKV] for file in (tmp_path / "out.safetensors", data_free, refined)}
    assert len({value.numpy().tobytes() for value in codes.values()}) == 3
    model = NunchakuFluxTransformer2DModel.from_pretrained(tmp_path / "out.safetensors")
    assert error(forward(model), forward(transformer16)) < 0.2


def test_gptq_rounds_otherwise(pipeline_folder: Path, tmp_path: Path) -> None:
    """The branch and the smoothing are those of svdquant, the codes are not."""
    files = [tmp_path / name for name in ("nearest.safetensors", "gptq.safetensors")]
    for file, gptq in zip(files, (False, True), strict=True):
        quantize(pipeline_folder, file, recipe="svdquant", gptq=gptq, rank=0)
    nearest, gptq_tensors = (load_file(file) for file in files)
    smooth = QKV.replace("qweight", "smooth")
    assert torch.equal(nearest[smooth], gptq_tensors[smooth])
    assert not torch.equal(nearest[QKV], gptq_tensors[QKV])


def test_nvfp4(
    pipeline_folder: Path,
    transformer16: Any,
    nvfp4_file: Path,
    forward: Callable[..., torch.Tensor],
    error: Error,
    tmp_path: Path,
) -> None:
    quantize(pipeline_folder, tmp_path / "out.safetensors", precision="nvfp4")
    assert layout(tmp_path / "out.safetensors") == layout(nvfp4_file)
    model = NunchakuFluxTransformer2DModel.from_pretrained(tmp_path / "out.safetensors")
    assert error(forward(model), forward(transformer16)) < 0.2


def test_a_folder_for_another_arithmetic(pipeline_folder: Path, refined: Path, tmp_path: Path) -> None:
    """A whole pipeline is written, without the folder of unfinished work; the arithmetic changes what is fitted."""
    quantize(pipeline_folder, tmp_path / "out", arithmetic="w4a8")
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "model_index.json").is_file()
    codes = load_file(tmp_path / "out" / "transformer" / WEIGHTS_NAME)["transformer_blocks.0.attn.to_qkv.qweight"]
    assert not torch.equal(codes, load_file(refined)[QKV])


def test_the_seed_makes_the_file(pipeline_folder: Path, refined: Path, tmp_path: Path) -> None:
    quantize(pipeline_folder, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == refined.read_bytes()
    quantize(pipeline_folder, tmp_path / "other.safetensors", seed=1)
    assert not torch.equal(load_file(tmp_path / "other.safetensors")[QKV], load_file(refined)[QKV])


def test_rtn_rounds_to_the_nearest(pipeline_folder: Path, transformer16: Any, tmp_path: Path) -> None:
    quantize_checkpoint(pipeline_folder / "transformer", tmp_path / "rtn", recipe="rtn", rank=0, progress=False)
    stored, state = load_file(tmp_path / "rtn" / WEIGHTS_NAME), transformer16.state_dict()
    checked = 0
    for layer in plan_layers(FLUX, transformer16.config):
        if not isinstance(layer.spec, LowRankLinear):
            continue
        weight = torch.cat([state[f"{source}.weight"] for source in layer.sources])
        start, stop = source_columns(layer.spec, weight.shape[1], weight.shape[0])
        prefix = f"{layer.path}."
        layer_tensors = {name.removeprefix(prefix): value for name, value in stored.items() if name.startswith(prefix)}
        found = unpack_svdq(layer_tensors, stop - start, weight.shape[0])
        codes, scales = quantize_int4(weight[:, start:stop])
        assert torch.equal(found.codes, codes) and torch.equal(found.scales, scales), layer.path
        assert found.rank == 0 and (found.smooth == 1).all()
        checked += 1
    assert checked == 16


def test_a_transformer_file_with_a_base(pipeline_folder: Path, transformer16: Any, tmp_path: Path) -> None:
    """Its values are calibrated, not those of the base's own transformer."""
    state = {name: value.clone() for name, value in transformer16.state_dict().items()}
    for name in state:
        if name.endswith("to_q.weight"):
            state[name] = state[name].flip(0)
    save_file(state, tmp_path / "tuned.safetensors")
    shutil.copytree(pipeline_folder, tmp_path / "whole")
    (inside,) = (tmp_path / "whole" / "transformer").glob("*.safetensors")
    save_file(state, inside, {"format": "pt"})
    quantize(tmp_path / "tuned.safetensors", tmp_path / "one.safetensors", base=pipeline_folder)
    quantize(tmp_path / "whole", tmp_path / "other.safetensors")
    same_tensors(tmp_path / "one.safetensors", tmp_path / "other.safetensors")
