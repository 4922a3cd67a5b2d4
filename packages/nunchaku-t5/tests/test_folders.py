"""Folders that lie: what a config says is compared with the tensors before a model is made of it."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import T5EncoderModel

from nunchaku_t5 import CheckpointError, NunchakuT5EncoderModel, W4A16Config, quantize_encoder
from nunchaku_t5.files import CONFIG_NAME, INDEX_NAME, WEIGHTS_NAME

Q = "encoder.block.0.layer.0.SelfAttention.q"
Damage = Callable[[Path], Any]


def config(**changes: Any) -> Damage:
    def apply(folder: Path) -> None:
        entries = json.loads((folder / CONFIG_NAME).read_text())
        (folder / CONFIG_NAME).write_text(json.dumps({**entries, **changes}))

    return apply


def quantization(**changes: Any) -> Damage:
    def apply(folder: Path) -> None:
        entries = json.loads((folder / CONFIG_NAME).read_text())
        config(quantization_config={**entries["quantization_config"], **changes})(folder)

    return apply


def text(content: str) -> Damage:
    return lambda folder: (folder / CONFIG_NAME).write_text(content)


def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Damage:
    def apply(folder: Path) -> None:
        stored = load_file(folder / WEIGHTS_NAME)
        change(stored)
        save_file(stored, folder / WEIGHTS_NAME, metadata={"format": "pt"})

    return apply


def retyped(name: str, dtype: torch.dtype) -> Damage:
    return tensors(lambda stored: stored.__setitem__(name, stored[name].to(dtype)))


def renamed(stored: dict[str, torch.Tensor]) -> None:
    for name in list(stored):
        stored[f"other.{name}"] = stored.pop(name)


def index(weight_map: Any) -> Damage:
    def apply(folder: Path) -> None:
        (folder / WEIGHTS_NAME).rename(folder.parent / "elsewhere.safetensors")
        names = {} if weight_map is None else {"weight_map": weight_map}
        (folder / INDEX_NAME).write_text(json.dumps({"metadata": {}, **names}))

    return apply


def folder_of(tiny: SimpleNamespace, path: Path, **options: Any) -> Path:
    model = tiny.make_encoder()
    quantize_encoder(model, **options)
    model.save_pretrained(path)
    return path


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (config(num_layers=10**9), "num_layers"),
        (config(d_ff=-4), "d_ff"),
        (config(num_heads="x"), "num_heads"),
        (config(vocab_size=10**15), "vocab_size"),
        (config(model_type=["t5"]), "T5"),
        (config(model_type=None), "T5"),
        (config(quantization_config=[1]), "object"),
        (config(quantization_config="4 bits"), "object"),
        (config(quantization_config={"quant_method": "other"}), "quant_method"),
        (quantization(group_size=128.0), "group_size"),
        (quantization(layers={}), "lacks"),
        (text("[1]"), "object"),
        (text(""), "JSON"),
        (text('{"a":' * 100_000), "JSON"),
        (index(["model.safetensors"]), "weight_map"),
        (index({"shared.weight": 3}), "'3'"),
        (index({"shared.weight": "../elsewhere.safetensors"}), "not in its folder"),
        (index({"shared.weight": "/elsewhere.safetensors"}), "not in its folder"),
        (index(None), "weight_map"),
        (tensors(renamed), "no T5 encoder"),
    ],
)
def test_lies(damage: Damage, word: str, tiny: SimpleNamespace, tmp_path: Path) -> None:
    folder = folder_of(tiny, tmp_path / "t5")
    damage(folder)
    with pytest.raises(CheckpointError, match=word) as caught:
        NunchakuT5EncoderModel.from_pretrained(folder, dtype=torch.bfloat16)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("load", [T5EncoderModel, NunchakuT5EncoderModel])
@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (quantization(layers={}), "quantization_config|lacks"),
        (retyped(f"{Q}.wscales", torch.int16), rf"{Q}.wscales.*int16"),
        (retyped(f"{Q}.qweight", torch.bfloat16), rf"{Q}.qweight.*bfloat16"),
        (retyped("encoder.final_layer_norm.weight", torch.int16), "final_layer_norm.*int16"),
        (retyped("shared.weight", torch.bfloat16), r"shared\.weight.*bfloat16"),
    ],
)
def test_what_stock_classes_refuse_too(
    damage: Damage, word: str, load: Any, tiny: SimpleNamespace, tmp_path: Path
) -> None:
    folder = folder_of(tiny, tmp_path / "t5", embedding_bits=8)
    damage(folder)
    with pytest.raises(CheckpointError, match=word):
        load.from_pretrained(folder, dtype=torch.bfloat16)


def test_files_with_none_of_the_layers(tiny: SimpleNamespace, tmp_path: Path) -> None:
    folder = folder_of(tiny, tmp_path / "t5")
    tensors(renamed)(folder)
    with pytest.raises(CheckpointError, match="none of the files"):
        T5EncoderModel.from_pretrained(folder)


def test_16_bits_are_not_taken_for_4(tiny: SimpleNamespace, tmp_path: Path) -> None:
    tiny.make_encoder().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="quantize_encoder"):
        T5EncoderModel.from_pretrained(tmp_path, quantization_config=W4A16Config())
