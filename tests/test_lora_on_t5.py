"""PEFT on a 4-bit T5: what it adds and its gradients are those on the same weights in 16 bits."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from transformers import T5Config, T5EncoderModel

import nunchaku_lora
from nunchaku_t5 import quantize_encoder

IDS = torch.arange(1, 12)[None]


@pytest.fixture(autouse=True)
def enabled() -> Iterator[None]:
    nunchaku_lora.enable()
    yield
    nunchaku_lora.disable()


def encoder() -> Any:
    torch.manual_seed(0)
    config = T5Config(
        d_model=128, d_kv=32, d_ff=192, num_heads=4, num_layers=2, vocab_size=50, feed_forward_proj="gated-gelu"
    )
    model = T5EncoderModel(config).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.dim() == 2 and "relative" not in name:
                value.normal_(std=value.shape[1] ** -0.5)
    quantize_encoder(model)
    return model


@pytest.mark.parametrize("targets", [["q", "v"], ["wi_0", "wi_1", "wo"], r".*\.(q|k|v|o|wi_0|wi_1|wo)"])
def test_adapters_act_as_on_16_bits(targets: Any) -> None:
    four = encoder()
    plain = copy.deepcopy(four).dequantize()
    config = LoraConfig(r=8, target_modules=targets, init_lora_weights=False)
    four = get_peft_model(four, config)
    plain = get_peft_model(plain, LoraConfig(r=8, target_modules=targets))
    set_peft_model_state_dict(plain, get_peft_model_state_dict(four))
    states, wanted = (model(input_ids=IDS).last_hidden_state for model in (four, plain))
    with torch.no_grad(), plain.disable_adapter():
        assert (plain(input_ids=IDS).last_hidden_state - wanted).norm() > 0.1 * wanted.norm()
    assert (states - wanted).norm() < 1e-3 * wanted.norm()
    for result in (states, wanted):
        result.square().sum().backward()
    gradients = {name: value.grad for name, value in plain.named_parameters() if "lora_" in name}
    for name, value in four.named_parameters():
        if "lora_" in name:
            assert (value.grad - gradients[name]).norm() < 1e-2 * gradients[name].norm(), name
