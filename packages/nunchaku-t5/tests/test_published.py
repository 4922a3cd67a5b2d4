"""The published single file: bytes as the specification has them, and every lie in one refused before allocation."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from nunchaku_t5 import CheckpointError, NunchakuT5EncoderModel, quantize_encoder

Tensors = dict[str, torch.Tensor]
PRODUCT_FACTOR = 1.5  # golden/README.md 5
PUBLISHED_NAMES = {"wscales": "scales", "wzeros": "scaled_zeros"}


def published(model: Any) -> tuple[Tensors, dict[str, str]]:
    """The file that a quantised model stands for: published names, embeddings twice, config in the metadata."""
    tensors = {}
    for name, value in model.state_dict().items():
        stem, _, last = name.rpartition(".")
        tensors[f"{stem}.{PUBLISHED_NAMES.get(last, last)}"] = value.clone()
    config = {key: value for key, value in model.config.to_dict().items() if key != "quantization_config"}
    return tensors, {"config": json.dumps(config), "model_class": "NunchakuT5EncoderModel"}


@pytest.fixture(scope="module")
def file(tiny: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A published file; not to be changed."""
    model = tiny.make_encoder()
    quantize_encoder(model)
    path = tmp_path_factory.mktemp("published") / "awq-int4-t5.safetensors"
    tensors, metadata = published(model)
    save_file(tensors, path, metadata=metadata)
    return path


@given(data=st.data())
def test_loads_unmodified(tiny: SimpleNamespace, data: st.DataObject, tmp_path_factory: Any) -> None:
    model = data.draw(tiny.encoders(dtype=data.draw(st.sampled_from([torch.bfloat16, torch.float16]))))
    quantize_encoder(model, group_size=data.draw(st.sampled_from([64, 128])))
    tensors, metadata = published(model)
    if data.draw(st.booleans()):
        del tensors["encoder.embed_tokens.weight"]
    path = tmp_path_factory.mktemp("published") / "t5.safetensors"
    save_file(tensors, path, metadata=metadata)
    source = data.draw(st.sampled_from([path, str(path), path.parent]))
    loaded, said = NunchakuT5EncoderModel.from_pretrained(source, dtype=model.dtype, output_loading_info=True)
    assert not any(said.values()), said
    assert type(loaded) is type(model)
    inputs = data.draw(tiny.texts(model.config.vocab_size))
    states = tiny.encode(loaded, inputs)
    if model.dtype == torch.float16:  # transformers then keeps `wo` in float32, so that its scales are exact
        assert tiny.relative_error(states, tiny.encode(model, inputs)) < 5e-3
    else:
        assert torch.equal(states, tiny.encode(model, inputs))


def test_without_a_config_it_is_read_off_the_tensors(file: Path, tiny: SimpleNamespace, tmp_path: Path) -> None:
    save_file(load_file(file), tmp_path / "plain.safetensors")
    inputs = {"input_ids": torch.arange(9)[None], "attention_mask": torch.ones(1, 9)}
    wanted, found = (
        tiny.encode(NunchakuT5EncoderModel.from_pretrained(path, dtype=torch.bfloat16), inputs)
        for path in (file, tmp_path / "plain.safetensors")
    )
    assert torch.equal(wanted, found)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_golden_products(dtype: str, golden: Callable[[str], Any], tiny: SimpleNamespace, tmp_path: Path) -> None:
    """A file whose `q` holds the published kernel's packed tensors gives that kernel's products."""
    name = f"F_gemm_awq_{dtype}_n128_k768"
    tensors, params, errors = golden(name)
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    model = tiny.make_encoder(d_model=params["K"], d_kv=32, num_heads=4, d_ff=128, dtype=half)
    quantize_encoder(model)
    stored, metadata = published(model)
    path = "encoder.block.1.layer.0.SelfAttention.q"
    for part, packed in (("qweight", "qweight"), ("scales", "wscales"), ("scaled_zeros", "wzeros")):
        assert stored[f"{path}.{part}"].shape == tensors[f"packed.{packed}"].shape
        stored[f"{path}.{part}"] = tensors[f"packed.{packed}"]
    save_file(stored, tmp_path / "t5.safetensors", metadata=metadata)
    layer = NunchakuT5EncoderModel.from_pretrained(tmp_path / "t5.safetensors", dtype=half).get_submodule(path)
    for m in params["m_list"]:
        limit = PRODUCT_FACTOR * errors[f"m{m}"]["relerr_vs_ideal"]
        assert tiny.relative_error(layer(tensors["x"][:m]), tensors[f"ref.out_m{m}"]) <= limit


def test_golden_conversion(golden: Callable[[str], Any], tiny: SimpleNamespace, tmp_path: Path) -> None:
    """The published packer's bytes for an `o` stand for the weight that went into it."""
    tensors, params, _ = golden("A_w4a16_tinychat_bf16_n64_k256_g128")
    model = tiny.make_encoder(d_model=params["N"], d_kv=64, num_heads=4, d_ff=128)
    quantize_encoder(model)
    stored, metadata = published(model)
    path = "encoder.block.0.layer.0.SelfAttention.o"
    for part, packed in (("qweight", "qweight"), ("scales", "wscales"), ("scaled_zeros", "wzeros")):
        stored[f"{path}.{part}"] = tensors[f"packed.{packed}"]
    save_file(stored, tmp_path / "t5.safetensors", metadata=metadata)
    layer = NunchakuT5EncoderModel.from_pretrained(tmp_path / "t5.safetensors", dtype=torch.bfloat16)
    weight = layer.get_submodule(path).dequantize()
    assert tiny.relative_error(weight, tensors["in.weight"]) < 4e-3  # bf16 rounding of weight and zeros
    assert layer.get_submodule(path).group_size == params["group_size"]


Q = "encoder.block.0.layer.0.SelfAttention.q"


def change(entry: str, value: Any, *without: str) -> Callable[[Tensors, dict[str, str]], None]:
    """Change an entry of the config, and leave some out."""

    def apply(_: Tensors, metadata: dict[str, str]) -> None:
        entries = {**json.loads(metadata["config"]), entry: value}
        metadata["config"] = json.dumps({key: value for key, value in entries.items() if key not in without})

    return apply


def drop(name: str) -> Callable[[Tensors, dict[str, str]], None]:
    return lambda tensors, _: tensors.__delitem__(name)


def put(name: str, value: Any) -> Callable[[Tensors, dict[str, str]], None]:
    return lambda tensors, _: tensors.__setitem__(name, value)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (change("num_layers", 10**9), ["num_layers", "2"]),
        (change("d_model", 10**9), ["d_model", "128"]),
        (change("vocab_size", -1), ["vocab_size"]),
        (change("num_heads", 3), ["num_heads"]),
        (change("d_kv", "many"), ["d_kv"]),
        (change("model_type", "llama"), ["model_type", "llama"]),
        (change("model_type", "umt5"), ["umt5", "t5"]),
        (change("model_type", ["t5"]), ["model_type"]),
        (change("layer_norm_epsilon", float("nan")), ["layer_norm_epsilon"]),
        (change("layer_norm_epsilon", -1.0), ["layer_norm_epsilon"]),
        (change("relative_attention_max_distance", 0), ["relative_attention_max_distance"]),
        (change("relative_attention_max_distance", 8), ["relative_attention_max_distance", "32"]),
        (change("feed_forward_proj", "gated-nothing", "dense_act_fn"), ["config"]),
        (change("feed_forward_proj", "relu", "is_gated_act"), ["feed_forward_proj"]),
        (lambda _, metadata: metadata.__setitem__("config", "[1]"), ["config", "object"]),
        (lambda _, metadata: metadata.__setitem__("config", "{" * 100_000), ["config", "JSON"]),
        (drop(f"{Q}.scales"), [f"{Q}", "scales"]),
        (drop(f"{Q}.scaled_zeros"), [f"{Q}.wzeros"]),
        (drop("encoder.final_layer_norm.weight"), ["final_layer_norm"]),
        (drop("encoder.block.0.layer.0.layer_norm.weight"), ["block"]),
        (drop("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"), ["relative_attention_bias"]),
        (put(f"{Q}.qweight", torch.zeros(32, 128, dtype=torch.int32)), [Q, "int16"]),
        (put(f"{Q}.qweight", torch.zeros(31, 128, dtype=torch.int16)), ["d_kv", "31"]),
        (put(f"{Q}.scales", torch.ones(9, 128)), [Q, "9"]),
        (put(f"{Q}.scaled_zeros", torch.ones(8, 127)), [f"{Q}.wzeros", "127"]),
        (put(f"{Q}.scales", torch.full((8, 128), torch.nan)), [Q, "NaN"]),
        (put(f"{Q}.scales", torch.ones(8, 128, dtype=torch.int16)), [Q, "int16"]),
        (put("encoder.final_layer_norm.weight", torch.ones(128, dtype=torch.int16)), ["final_layer_norm", "int16"]),
        (put("shared.weight", torch.ones(50, 128, dtype=torch.int8)), ["shared", "int8"]),
        (put(f"{Q}.bias", torch.ones(128)), [f"{Q}.bias"]),
        (put("decoder.block.0.weight", torch.ones(1)), ["decoder.block.0.weight"]),
        (put("encoder.block.0.layer.0.layer_norm.qweight", torch.zeros(1, 128, dtype=torch.int16)), ["layer_norm"]),
        (put(f"{Q}.wscales", torch.ones(8, 128)), ["both names"]),
    ],
)
def test_lies(damage: Callable[[Tensors, dict[str, str]], None], words: list[str], file: Path, tmp_path: Path) -> None:
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    damage(tensors, metadata)
    path = tmp_path / "damaged.safetensors"
    save_file(tensors, path, metadata=metadata)
    with pytest.raises(CheckpointError) as caught:
        NunchakuT5EncoderModel.from_pretrained(path, dtype=torch.bfloat16)
    assert all(word in str(caught.value) for word in words), caught.value
    assert "damaged.safetensors" in str(caught.value) or "NaN" in words


@pytest.mark.parametrize("content", [b"", b"\x80\x04.", b"{}", b"\xff" * 64, (10**12).to_bytes(8, "little") + b"{}"])
def test_no_safetensors_file(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "t5.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"t5\.safetensors"):
        NunchakuT5EncoderModel.from_pretrained(path)


def test_other_places(file: Path, tiny: SimpleNamespace, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        NunchakuT5EncoderModel.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"no \.safetensors"):
        NunchakuT5EncoderModel.from_pretrained(tmp_path)
    tiny.make_encoder().save_pretrained(tmp_path / "16")
    with pytest.raises(CheckpointError, match="not quantised"):
        NunchakuT5EncoderModel.from_pretrained(tmp_path / "16")
    with pytest.raises(CheckpointError, match="no 4-bit layers"):
        NunchakuT5EncoderModel.from_pretrained(tmp_path / "16" / "model.safetensors")


def test_a_file_does_not_choose_whose_code_runs(file: Path, tmp_path: Path) -> None:
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    for name in ("attn_implementation", "_attn_implementation"):
        change(name, "some/repository")({}, metadata)
    save_file(load_file(file), tmp_path / "t5.safetensors", metadata=metadata)
    loaded = NunchakuT5EncoderModel.from_pretrained(tmp_path / "t5.safetensors")
    assert loaded.config._attn_implementation in ("eager", "sdpa")
