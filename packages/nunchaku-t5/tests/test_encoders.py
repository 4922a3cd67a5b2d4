"""Any encoder of transformers by the same door: quantised in place, saved, loaded by its own class."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from nunchaku_t5 import CheckpointError, EncoderLinear, quantize_encoder

IDS = torch.tensor([[1, 5, 7, 9, 2], [1, 4, 2, 0, 0]])
MASK = (IDS != 0).long()


def clip() -> Any:
    config = transformers.CLIPTextConfig(
        vocab_size=50, hidden_size=128, intermediate_size=192, num_hidden_layers=2, num_attention_heads=2,
        projection_dim=64, eos_token_id=2, bos_token_id=1,
    )  # fmt: skip
    return transformers.CLIPTextModelWithProjection(config)


def gemma() -> Any:
    config = transformers.Gemma2Config(
        vocab_size=50, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=64, query_pre_attn_scalar=64,
    )  # fmt: skip
    return transformers.Gemma2Model(config)


def qwen() -> Any:
    text = {
        "vocab_size": 50, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
        "rope_theta": 1e4, "rope_scaling": {"type": "mrope", "mrope_section": [8, 12, 12]},
    }  # fmt: skip
    vision = {
        "depth": 1, "hidden_size": 64, "intermediate_size": 100, "num_heads": 2, "out_hidden_size": 128,
        "fullatt_block_indexes": [0], "patch_size": 4, "spatial_merge_size": 2, "window_size": 16,
    }  # fmt: skip
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


@torch.no_grad()
def states(model: Any) -> torch.Tensor:
    out = model(input_ids=IDS, attention_mask=MASK, output_hidden_states=True)
    return out.hidden_states[-1][MASK.bool()].float()


@pytest.mark.parametrize("make", [clip, gemma, qwen])
@pytest.mark.parametrize("embedding_bits", [16, 8])
def test_round_trip(make: Any, embedding_bits: int, tiny: SimpleNamespace, tmp_path: Path) -> None:
    torch.manual_seed(0)
    make().bfloat16().save_pretrained(tmp_path / "16")
    model = type(make()).from_pretrained(tmp_path / "16", dtype=torch.bfloat16)
    plain = states(model)
    # Gemma's multiplies its rows by a factor, or leaves that to the model, by the version of transformers
    ordinary = type(model.get_input_embeddings()) is nn.Embedding
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    report = quantize_encoder(model, embedding_bits=embedding_bits)
    quantized = {name for name, form in report.layers.items() if form.bits == 4}
    assert quantized | (report.kept.keys() & linears) == linears
    assert len(report.layers) - len(quantized) == (embedding_bits == 8 and ordinary)
    assert report.bytes_after < report.bytes_before
    wanted = states(model)
    assert 0.005 < tiny.relative_error(wanted, plain) < 0.3
    model.save_pretrained(tmp_path)
    loaded, said = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16, output_loading_info=True)
    assert not any(said.values()), said
    assert torch.equal(states(loaded), wanted)
    assert tiny.relative_error(states(loaded.dequantize()), wanted) < 0.03


def test_what_is_kept_and_why() -> None:
    model = qwen()
    report = quantize_encoder(model, skip=["model.language_model.layers.1", "model.visual.blocks.0.attn.proj"])
    assert "asked for" in report.kept["model.language_model.layers.1.mlp.up_proj"]
    assert "asked for" in report.kept["model.visual.blocks.0.attn.proj"]
    assert "multiples" in report.kept["model.visual.blocks.0.mlp.down_proj"]  # 100 inputs
    assert "lm_head" in report.kept
    assert all(name in str(report) for name in report.kept)
    assert report.layers["model.language_model.layers.0.mlp.down_proj"].group_size == 64  # 192 inputs
    assert report.layers["model.language_model.layers.0.mlp.up_proj"].group_size == 128
    assert {name for name, m in model.named_modules() if isinstance(m, EncoderLinear)} == set(report.layers)


def test_what_cannot_be_quantised(tiny: SimpleNamespace) -> None:
    with pytest.raises(TypeError, match="Sequential"):
        quantize_encoder(torch.nn.Sequential(torch.nn.Linear(64, 64)))
    for model, found in ((tiny.make_encoder(dtype=torch.float64), "float64"), (tiny.make_encoder().to("meta"), "meta")):
        with pytest.raises(ValueError, match=rf"SelfAttention\.q.*{found}"):
            quantize_encoder(model)
    with pytest.raises(ValueError, match=r"wi_0: 32 inputs.*multiples of 64"):
        quantize_encoder(tiny.make_encoder(d_model=32, d_kv=8, d_ff=32))


def test_a_refusal_changes_nothing(tiny: SimpleNamespace) -> None:
    model = clip()
    for arguments, word in (
        ({"group_size": 96}, "group_size"),
        ({"embedding_bits": 4}, "embedding_bits"),
        ({"skip": ["nothing"]}, "nothing"),
        ({"skip": [""]}, "''"),
        ({"group_size": 128.0}, "group_size"),
    ):
        with pytest.raises(ValueError, match=word):
            quantize_encoder(model, **arguments)
    for arguments, word in (({"skip": "text_model"}, "skip"), ({"skip": None}, "skip")):
        with pytest.raises(TypeError, match=word):
            quantize_encoder(model, **arguments)
    linear = model.text_model.encoder.layers[1].mlp.fc2
    right = linear.weight.data
    nan = torch.full_like(right, torch.nan)
    for wrong, word in ((nan, "finite"), (right.double(), "float64"), (right.to("meta"), "meta")):
        linear.weight = nn.Parameter(wrong)
        with pytest.raises(ValueError, match=rf"layers\.1\.mlp\.fc2.*{word}"):
            quantize_encoder(model)
    assert not any(isinstance(module, EncoderLinear) for module in model.modules())
    assert getattr(model, "hf_quantizer", None) is None
    small = tiny.make_encoder(d_model=32, d_kv=8, d_ff=32)
    with pytest.raises(ValueError, match="no linear"):
        quantize_encoder(small)
    done = clip()
    quantize_encoder(done)
    with pytest.raises(ValueError, match="already"):
        quantize_encoder(done)


def test_what_is_no_model_of_transformers() -> None:
    for wrong in (nn.Sequential(nn.Linear(128, 128)), None):
        with pytest.raises(TypeError, match=type(wrong).__name__):
            quantize_encoder(wrong)


def test_hooks_are_not_lost() -> None:
    model, called = clip(), []
    layers = model.text_model.encoder.layers
    layers[0].mlp.fc1.register_forward_hook(lambda *_: called.append("fc1"))
    layers[0].mlp.fc2.register_forward_pre_hook(lambda *_: called.append("fc2"))
    original = layers[1].mlp.fc1.forward
    layers[1].mlp.fc1.forward = lambda x: (called.append("forward"), original(x))[1]
    model.get_input_embeddings().register_forward_hook(lambda *_: called.append("embedding"))
    report = quantize_encoder(model.eval(), embedding_bits=8)
    assert sum(why == "has hooks" for why in report.kept.values()) == 4
    assert not any(module.training for module in model.modules())
    states(model)
    assert called == ["embedding", "fc1", "fc2", "forward"]


def test_a_folder_that_is_not_whole(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = clip()
    quantize_encoder(model)
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("fc1.wzeros"))
    save_file({key: value for key, value in tensors.items() if key != name}, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"fc1\.wzeros"):
        type(model).from_pretrained(tmp_path)
    save_file({**tensors, name: torch.ones(3, 3)}, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"fc1\.wzeros.*\[3, 3\]"):
        type(model).from_pretrained(tmp_path)
