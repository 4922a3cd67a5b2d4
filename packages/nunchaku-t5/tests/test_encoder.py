"""A quantised encoder computes what its dequantised weights compute, and stays the same through files."""

import copy
import json
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import T5EncoderModel, UMT5EncoderModel
from transformers.activations import NewGELUActivation

import nunchaku_t5
from nunchaku_t5 import EncoderLinear, Int8Embedding, NunchakuT5EncoderModel, quantize_encoder
from nunchaku_t5._compat import DISK_HOLDS_INTEGERS

BF16_NOISE = 0.03
"""Two orders of summation of the same bf16 model of a few blocks."""


@given(data=st.data())
def test_computes_what_dequantised_weights_compute(tiny: SimpleNamespace, data: st.DataObject) -> None:
    model = data.draw(tiny.encoders())
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    quantize_encoder(
        model.to(dtype),
        group_size=data.draw(st.sampled_from([64, 128])),
        embedding_bits=data.draw(st.sampled_from([8, 16])),
    )
    plain = copy.deepcopy(model).dequantize()
    assert not any(isinstance(module, EncoderLinear | Int8Embedding) for module in plain.modules())
    inputs = data.draw(tiny.texts(model.config.vocab_size))
    limit = 1e-5 if dtype == torch.float32 else BF16_NOISE
    assert tiny.relative_error(tiny.encode(model, inputs), tiny.encode(plain, inputs)) < limit


@pytest.mark.parametrize("kind", ["t5", "umt5"])
def test_gelu_in_one_pass_is_the_same_function(kind: str, tiny: SimpleNamespace) -> None:
    model = tiny.make_encoder(kind, dtype=torch.float32)
    original = copy.deepcopy(model)
    quantize_encoder(model)
    original.load_state_dict(copy.deepcopy(model).dequantize().state_dict())
    here, there = ({type(m) for m in each.modules()} for each in (model, original))
    assert NewGELUActivation in there and NewGELUActivation not in here
    inputs = {"input_ids": torch.arange(40)[None], "attention_mask": torch.ones(1, 40)}
    assert tiny.relative_error(tiny.encode(model, inputs), tiny.encode(original, inputs)) < 1e-5


@pytest.mark.parametrize("asked", [None, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("saved", [True, False])
def test_dequantised_in_one_dtype(
    asked: torch.dtype | None, dtype: torch.dtype, saved: bool, tiny: SimpleNamespace, tmp_path: Path
) -> None:
    """The config of a model that was never loaded has no dtype; saving leaves a name there, `.to()` what it was."""
    model = tiny.make_encoder(dtype=torch.bfloat16)
    if saved:
        model.save_pretrained(tmp_path)
    quantize_encoder(model, embedding_bits=8)
    inputs = {"input_ids": torch.arange(9)[None], "attention_mask": torch.ones(1, 9)}
    wanted = tiny.encode(model.to(dtype), inputs)
    plain = model.dequantize() if asked is None else model.dequantize(asked)
    assert len({value.dtype for value in plain.parameters()}) == 1
    assert plain.dtype in (asked, dtype)
    assert tiny.relative_error(tiny.encode(plain, inputs), wanted) < BF16_NOISE
    plain.save_pretrained(tmp_path / "plain")
    again = T5EncoderModel.from_pretrained(tmp_path / "plain", dtype=plain.dtype)
    assert tiny.relative_error(tiny.encode(again, inputs), tiny.encode(plain, inputs)) < BF16_NOISE


@given(data=st.data())
def test_padding_and_batch_change_nothing(tiny: SimpleNamespace, data: st.DataObject) -> None:
    model = data.draw(tiny.encoders(dtype=torch.float32))
    quantize_encoder(model)
    inputs = data.draw(tiny.texts(model.config.vocab_size))
    alone = [
        tiny.encode(model, {"input_ids": ids[mask.bool()][None], "attention_mask": mask[mask.bool()][None]})
        for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
    ]
    assert tiny.relative_error(tiny.encode(model, inputs), torch.cat(alone)) < 1e-5


@given(data=st.data())
def test_through_a_folder(tiny: SimpleNamespace, data: st.DataObject) -> None:
    model = data.draw(tiny.encoders())
    report = quantize_encoder(model, embedding_bits=data.draw(st.sampled_from([8, 16])))
    inputs = data.draw(tiny.texts(model.config.vocab_size))
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, max_shard_size=data.draw(st.sampled_from(["20KB", "5GB"])))
        stored = json.loads((Path(folder) / "config.json").read_text())
        for load in (type(model).from_pretrained, NunchakuT5EncoderModel.from_pretrained):
            loaded, said = load(folder, dtype=torch.bfloat16, output_loading_info=True)
            assert not any(said.values()), said
            assert type(loaded) is type(model) and loaded.is_quantized
            assert loaded.shared.weight is loaded.encoder.embed_tokens.weight
            assert torch.equal(tiny.encode(loaded, inputs), tiny.encode(model, inputs))
    assert stored["quantization_config"]["quant_method"] == "nunchaku_w4a16"
    assert set(stored["quantization_config"]["layers"]) == set(report.layers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("embedding_bits", [8, 16])
def test_compiles_as_one_graph(dtype: torch.dtype, embedding_bits: int, tiny: SimpleNamespace) -> None:
    model = tiny.make_encoder(dtype=dtype)
    quantize_encoder(model, embedding_bits=embedding_bits)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    ids = torch.arange(9)[None]
    for gradients in (False, True):
        with torch.set_grad_enabled(gradients):
            wanted = model(input_ids=ids).last_hidden_state
            exported = torch.export.export(model, (), {"input_ids": ids}).module()
            for same in (compiled, exported):
                found = same(input_ids=ids).last_hidden_state
                assert tiny.relative_error(found, wanted) < (1e-5 if dtype == torch.float32 else BF16_NOISE)


@pytest.mark.parametrize("ids", [[[-1]], [[1, 50]], torch.ones(50, 128, dtype=torch.uint8), torch.ones(1, 3)])
def test_ids_that_the_embedding_lacks(ids: Any) -> None:
    with pytest.raises((IndexError, RuntimeError), match=r"out of range|Expected tensor for argument #1 'indices'"):
        Int8Embedding(50, 128)(torch.as_tensor(ids))


def test_embeddings_are_stored_once(tiny: SimpleNamespace, tmp_path: Path) -> None:
    from safetensors import safe_open

    for bits in (8, 16):
        model = tiny.make_encoder()
        quantize_encoder(model, embedding_bits=bits)
        model.save_pretrained(tmp_path / str(bits))
        with safe_open(tmp_path / str(bits) / "model.safetensors", "pt") as file:
            assert [name for name in file.keys() if "shared" in name or "embed_tokens" in name] == (  # noqa: SIM118
                ["shared.weight", "shared.wscales"] if bits == 8 else ["shared.weight"]
            )


@pytest.mark.parametrize("kind", ["t5", "umt5"])
def test_is_what_transformers_makes_of_it(kind: str, tiny: SimpleNamespace, tmp_path: Path) -> None:
    model = tiny.make_encoder(kind)
    quantize_encoder(model)
    model.save_pretrained(tmp_path)
    loaded = NunchakuT5EncoderModel.from_pretrained(
        tmp_path, device="cpu", attn_implementation="eager", dtype=torch.bfloat16
    )
    assert isinstance(loaded, T5EncoderModel if kind == "t5" else UMT5EncoderModel)
    layer = loaded.encoder.block[0].layer[0].SelfAttention.q
    assert not any(value.requires_grad for value in layer.parameters())
    assert layer(torch.ones(3, 128)).isfinite().all()  # outside of no_grad, too
    assert loaded.dtype == torch.bfloat16 and loaded.device.type == "cpu" and not loaded.training
    assert loaded.config.model_type == kind and loaded.config._attn_implementation == "eager"
    inputs = {"input_ids": torch.arange(6)[None], "attention_mask": torch.ones(1, 6)}
    wanted = tiny.encode(model, inputs)
    assert tiny.relative_error(tiny.encode(loaded, inputs), wanted) < BF16_NOISE
    assert tiny.relative_error(tiny.encode(loaded.to(torch.float32), inputs), wanted) < BF16_NOISE
    assert loaded.dtype == torch.float32
    assert loaded.get_memory_footprint() < 0.75 * 2 * sum(p.numel() for p in tiny.make_encoder(kind).parameters())


@pytest.mark.filterwarnings("ignore:The following device_map keys")  # of the second name of the embeddings
def test_blocks_on_the_disk(tiny: SimpleNamespace, tmp_path: Path) -> None:
    model = tiny.make_encoder()
    quantize_encoder(model, embedding_bits=8)
    model.save_pretrained(tmp_path)
    outside = ("shared", "encoder.embed_tokens", "encoder.final_layer_norm", "encoder.dropout")
    devices = {**dict.fromkeys(outside, "cpu"), "encoder.block": "disk"}

    def load() -> Any:
        return T5EncoderModel.from_pretrained(
            tmp_path, dtype=torch.bfloat16, device_map=devices, offload_folder=tmp_path / "offloaded"
        )

    if not DISK_HOLDS_INTEGERS:
        with pytest.raises(NotImplementedError, match=r"transformers 5\.13"):
            load()
        return
    inputs = {"input_ids": torch.arange(6)[None], "attention_mask": torch.ones(1, 6)}
    assert torch.equal(tiny.encode(load(), inputs), tiny.encode(model, inputs))


def test_importing_twice_registers_once() -> None:
    nunchaku_t5.register()
    nunchaku_t5.register()


@given(data=st.data())
def test_error_is_that_of_4_bits(tiny: SimpleNamespace, data: st.DataObject) -> None:
    """Asymmetric rounding to 16 values over the range of a group of normal numbers: about 8 to 11 % per weight."""
    model = data.draw(tiny.encoders(dtype=torch.float32))
    before = {
        name: module.weight.detach().clone() for name, module in model.named_modules() if hasattr(module, "weight")
    }
    report = quantize_encoder(model, embedding_bits=8)
    assert report.layers and report.bytes_after < report.bytes_before
    for name, form in report.layers.items():
        stored = model.get_submodule(name).dequantize()
        error = tiny.relative_error(stored, before[name])
        assert error < (0.13 if form.bits == 4 else 0.012)
    for name, module in model.named_modules():
        if name not in report.layers and name != "encoder.embed_tokens" and name in before:
            assert torch.equal(module.weight, before[name])


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_gradients_reach_the_embeddings(attention: str, tiny: SimpleNamespace, tmp_path: Path) -> None:
    model: Any = tiny.make_encoder(dtype=torch.float32)
    if attention == "sdpa" and not model._supports_sdpa:
        pytest.skip("this transformers runs T5 with eager attention only")
    quantize_encoder(model)
    model.save_pretrained(tmp_path)
    model = T5EncoderModel.from_pretrained(tmp_path, attn_implementation=attention)
    x = torch.randn(1, 5, model.config.d_model, requires_grad=True)
    direction = torch.randn(x.shape)  # a norm's gradient vanishes: the final layer norm fixes it
    plain = copy.deepcopy(model).dequantize()
    gradients = []
    for each in (model, plain):
        x.grad = None
        each(inputs_embeds=x).last_hidden_state.mul(direction).sum().backward()
        gradients.append(x.grad.clone())
    assert tiny.relative_error(*gradients) < 1e-4
