"""Quantised folders in the hands of diffusers' own classes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, FluxPipeline, FluxTransformer2DModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from nunchaku_models import NunchakuFluxTransformer2DModel, quantize_checkpoint
from nunchaku_models.checkpoints import CheckpointError
from nunchaku_models.diffusers_quantizer import SVDQuantConfig
from nunchaku_models.layers import quantized_layers

Forward = Callable[..., torch.Tensor]


@pytest.fixture(scope="module")
def model(int4_file: Path) -> Any:
    return NunchakuFluxTransformer2DModel.from_pretrained(int4_file)


@pytest.fixture(scope="module")
def quantized_pipeline(pipeline_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("folders") / "pipeline-int4"
    quantize_checkpoint(pipeline_folder, folder, progress=False)
    return folder


def draw(pipe: Any) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(5)
    images = pipe(
        ["a cat", "a dog, big"], num_inference_steps=2, width=48, height=64, generator=generator, output_type="pt"
    ).images
    assert images.shape == (2, 3, 64, 48)
    return images


def test_stock_pipeline_and_ours_draw_the_same(
    quantized_pipeline: Path, pipeline_folder: Path, model: Any, tmp_path: Path
) -> None:
    stock = FluxPipeline.from_pretrained(quantized_pipeline, torch_dtype=torch.bfloat16)
    assert type(stock.transformer) is FluxTransformer2DModel
    assert len(quantized_layers(stock.transformer)) == 20
    wanted = draw(stock)
    ours = FluxPipeline.from_pretrained(pipeline_folder, transformer=model, torch_dtype=torch.bfloat16)
    assert torch.equal(draw(ours), wanted)
    assert torch.equal(draw(DiffusionPipeline.from_pretrained(quantized_pipeline, dtype=torch.bfloat16)), wanted)

    ours.save_pretrained(tmp_path / "saved")
    index = json.loads((tmp_path / "saved" / "model_index.json").read_text())
    assert index["transformer"] == ["nunchaku_models", "NunchakuFluxTransformer2DModel"]
    again = FluxPipeline.from_pretrained(tmp_path / "saved", torch_dtype=torch.bfloat16)
    assert type(again.transformer) is NunchakuFluxTransformer2DModel
    assert torch.equal(draw(again), wanted)

    stock.save_pretrained(tmp_path / "stock")
    again = FluxPipeline.from_pretrained(tmp_path / "stock", torch_dtype=torch.bfloat16)
    assert type(again.transformer) is FluxTransformer2DModel
    assert torch.equal(draw(again), wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, None])
def test_stock_transformer(dtype: torch.dtype | None, quantized_pipeline: Path, forward: Forward) -> None:
    stock = FluxTransformer2DModel.from_pretrained(quantized_pipeline / "transformer", torch_dtype=dtype)
    ours = NunchakuFluxTransformer2DModel.from_pretrained(quantized_pipeline, torch_dtype=dtype)
    assert stock.dtype == ours.dtype == (dtype or torch.bfloat16)
    assert torch.equal(forward(stock, dtype=stock.dtype), forward(ours, dtype=ours.dtype))


def test_stock_nvfp4_folder(nvfp4_file: Path, forward: Forward, tmp_path: Path) -> None:
    ours = NunchakuFluxTransformer2DModel.from_pretrained(nvfp4_file)
    ours.save_pretrained(tmp_path / "folder")
    stock = FluxTransformer2DModel.from_pretrained(tmp_path / "folder", torch_dtype=torch.bfloat16)
    assert torch.equal(forward(stock), forward(ours))
    assert stock.transformer_blocks[0].attn.to_qkv.wscales.dtype == torch.float8_e4m3fn


def test_stock_save_pretrained_in_shards(
    quantized_pipeline: Path, model: Any, forward: Forward, tmp_path: Path
) -> None:
    stock = FluxTransformer2DModel.from_pretrained(
        quantized_pipeline / "transformer", torch_dtype=torch.bfloat16, device_map={"": "cpu"}
    )
    stock.save_pretrained(tmp_path / "whole")
    stock.save_pretrained(tmp_path / "shards", max_shard_size="300KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    for folder in ("whole", "shards"):
        for cls in (FluxTransformer2DModel, NunchakuFluxTransformer2DModel):
            loaded = cls.from_pretrained(tmp_path / folder, torch_dtype=torch.bfloat16)
            assert torch.equal(forward(loaded), forward(model))


def test_folder_holds_no_placeholder_weights(quantized_pipeline: Path, model: Any, tmp_path: Path) -> None:
    FluxTransformer2DModel.from_pretrained(quantized_pipeline / "transformer").save_pretrained(tmp_path / "stock")
    for file in (quantized_pipeline / "transformer", tmp_path / "stock"):
        with safe_open(file / "diffusion_pytorch_model.safetensors", "pt") as opened:
            names = set(opened.keys())
        assert not any(name.endswith(("to_qkv.weight", "to_q.weight", "mlp_fc2.weight")) for name in names)
        assert "x_embedder.weight" in names


def test_config_of_the_folder(quantized_pipeline: Path) -> None:
    config = json.loads((quantized_pipeline / "transformer" / "config.json").read_text())
    assert config["_class_name"] == "FluxTransformer2DModel"
    assert config["quantization_config"] == {
        "quant_method": "svdquant",
        "precision": "int4",
        "rank": 32,
        "group_size": 64,
    }


@pytest.mark.parametrize(
    ("entries", "says"),
    [({"precision": "int3"}, "int3"), ({"precision": "nvfp4", "group_size": 64}, "16"), ({"group_size": 63}, "63")],
)
def test_bad_quantization_config(entries: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        SVDQuantConfig(**entries)


def change(folder: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    file = folder / "diffusion_pytorch_model.safetensors"
    tensors = {name: value.clone() for name, value in load_file(file).items()}
    edit(tensors)
    save_file(tensors, file, {"format": "pt"})


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda t: t.pop("transformer_blocks.0.attn.norm_q.weight"), "attn.norm_q"),
        (lambda t: t.pop("transformer_blocks.0.attn.to_qkv.wscales"), "to_qkv.*wscales"),
        (lambda t: t.pop("transformer_blocks.0.attn.to_qkv.bias"), "to_qkv.*bias"),
        (lambda t: t.update({"transformer_blocks.0.attn.to_qkv.qweight": torch.zeros(3, dtype=torch.int8)}), "qweight"),
        (lambda t: t["transformer_blocks.0.attn.to_qkv.wscales"].fill_(torch.nan), "to_qkv.wscales.*NaN"),
        (lambda t: [t.pop(k) for k in list(t) if k.endswith(".qweight")], "no 4-bit layers"),
    ],
)
def test_stock_loading_of_a_damaged_folder(edit: Any, says: str, model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "folder")
    change(tmp_path / "folder", edit)
    with pytest.raises(CheckpointError, match=says):
        FluxTransformer2DModel.from_pretrained(tmp_path / "folder", torch_dtype=torch.bfloat16)
