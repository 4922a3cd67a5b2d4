"""On a GPU: encoders give what they give on the CPU, offloaded or not, and fitting to texts is as good."""

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import T5EncoderModel

from nunchaku_t5 import NunchakuT5EncoderModel, quantize_encoder
from nunchaku_t5.calibration import Batch
from nunchaku_t5.convert import Conversion, EncoderQuantization
from nunchaku_t5.sources import EncoderSource

pytestmark = pytest.mark.cuda

GPU = "cuda:0"
ROUNDING = {torch.bfloat16: 0.02, torch.float16: 0.004, torch.float32: 0.02}
"""Of hidden states behind a few blocks, relative; CUDA kernels take float32 inputs as bfloat16."""


def encode_there(tiny: SimpleNamespace, model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    states: torch.Tensor = tiny.encode(model, {name: value.to(GPU) for name, value in inputs.items()})
    assert states.is_cuda
    return states.cpu()


@settings(max_examples=25)
@given(data=st.data())
def test_gives_what_the_cpu_gives(tiny: SimpleNamespace, data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(sorted(ROUNDING, key=str)))
    model = data.draw(tiny.encoders(dtype=dtype))
    inputs = data.draw(tiny.texts(model.config.vocab_size))
    quantize_encoder(model, embedding_bits=data.draw(st.sampled_from([8, 16])))
    wanted = tiny.encode(copy.deepcopy(model).to(torch.float32), inputs)
    assert tiny.relative_error(encode_there(tiny, model.to(GPU), inputs), wanted) < ROUNDING[dtype]


@settings(max_examples=10)
@given(data=st.data())
def test_quantized_there(tiny: SimpleNamespace, data: st.DataObject) -> None:
    model = data.draw(tiny.encoders(dtype=torch.bfloat16))
    other = copy.deepcopy(model).to(GPU)
    quantize_encoder(model)
    quantize_encoder(other)
    for (name, here), there in zip(model.named_parameters(), other.parameters(), strict=True):
        assert there.is_cuda and torch.equal(here, there.cpu()), name


def test_long_texts_in_float16(tiny: SimpleNamespace) -> None:
    """What `test_float16` shows on the CPU, where another kernel takes many tokens."""
    model = tiny.make_encoder(dtype=torch.float32, d_model=256, d_ff=512)
    for block in model.encoder.block:
        with torch.no_grad():
            block.layer[1].DenseReluDense.wi_0.weight.mul_(600)
            block.layer[1].DenseReluDense.wi_1.weight.mul_(600)
    quantize_encoder(model)
    inputs = {"input_ids": torch.randint(0, 50, (2, 300)), "attention_mask": torch.ones(2, 300, dtype=torch.long)}
    wanted = tiny.encode(model, inputs)
    largest: list[float] = []
    part = model.encoder.block[0].layer[1].DenseReluDense
    part.dropout.register_forward_hook(lambda _, x, y: largest.append(float(y.abs().max())))
    given = encode_there(tiny, model.to(torch.float16).to(GPU), inputs)
    assert max(largest) > 65504
    assert given.isfinite().all() and tiny.relative_error(given, wanted) < 0.02


def test_loaded_there_and_moved(tiny: SimpleNamespace, tmp_path: Path) -> None:
    model = tiny.make_encoder()
    quantize_encoder(model)
    model.save_pretrained(tmp_path)
    inputs = {"input_ids": torch.arange(9)[None], "attention_mask": torch.ones(1, 9, dtype=torch.long)}
    wanted = encode_there(tiny, model.to(GPU), inputs)
    loaders = (T5EncoderModel, NunchakuT5EncoderModel)
    for placed in ({"device_map": GPU}, {"device_map": {"": 0}}, {"device_map": "auto"}):
        for loader in loaders:
            loaded = loader.from_pretrained(tmp_path, **placed)
            assert all(value.is_cuda for value in loaded.parameters())
            assert torch.equal(encode_there(tiny, loaded, inputs), wanted)
    here = NunchakuT5EncoderModel.from_pretrained(tmp_path)
    for _ in range(2):
        assert torch.equal(encode_there(tiny, here.to(GPU), inputs), wanted)
        assert tiny.encode(here.to("cpu"), inputs).device.type == "cpu"


def test_offloaded_by_accelerate(tiny: SimpleNamespace) -> None:
    """As `enable_model_cpu_offload` and `enable_sequential_cpu_offload` of diffusers do it."""
    accelerate = pytest.importorskip("accelerate")
    model = tiny.make_encoder()
    quantize_encoder(model)
    inputs = {"input_ids": torch.arange(9)[None], "attention_mask": torch.ones(1, 9, dtype=torch.long)}
    wanted = encode_there(tiny, copy.deepcopy(model).to(GPU), inputs)
    for offload in (accelerate.cpu_offload, accelerate.cpu_offload_with_hook):
        offloaded = copy.deepcopy(model)
        offload(offloaded, torch.device(GPU))
        assert torch.equal(encode_there(tiny, offloaded, inputs), wanted)


def test_in_a_graph(tiny: SimpleNamespace) -> None:
    """A captured encoder replays on new inputs."""
    model = tiny.make_encoder().to(GPU)
    quantize_encoder(model)
    x = torch.randn(1, 24, 128, device=GPU).bfloat16()
    with torch.no_grad():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                model(inputs_embeds=x)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            states = model(inputs_embeds=x).last_hidden_state
        for seed in range(3):
            x.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)))
            graph.replay()
            assert torch.equal(states, model(inputs_embeds=x).last_hidden_state)


@pytest.mark.parametrize("options", [{}, {"rank": 8}, {"method": "awq"}], ids=["fitted", "rank 8", "awq"])
def test_fitted_there(tiny: SimpleNamespace, options: dict[str, Any], tmp_path: Path) -> None:
    model = tiny.make_encoder(d_model=256, d_ff=512)
    folder = tmp_path / "original"
    model.save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    batches = [Batch((torch.rand(8, 16, generator=generator) ** 3 * 50).long(), None) for _ in range(4)]
    mask = (torch.arange(16) < torch.randint(2, 17, (8, 1), generator=generator)).long()
    batches += [Batch(batch.input_ids, mask) for batch in batches[:2]]
    inputs = {"input_ids": (torch.rand(32, 16) ** 3 * 50).long(), "attention_mask": torch.ones(32, 16)}
    wanted = tiny.encode(model.float(), inputs)
    errors = {}
    for device in ("cpu", GPU):
        quantization = EncoderQuantization(EncoderSource(folder))
        quantization.calibrate(batches, device=device, **options)
        Conversion(quantization, tmp_path / device.replace(":", "")).run()
        loaded = T5EncoderModel.from_pretrained(tmp_path / device.replace(":", ""), dtype=torch.float32)
        errors[device] = tiny.relative_error(tiny.encode(loaded, inputs), wanted)
    assert errors[GPU] < 1.05 * errors["cpu"]
