"""One answer from all versions of transformers."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM

from nunchaku_t5 import CheckpointError, EncoderLinear, Int8Embedding, quantize_encoder
from nunchaku_t5._compat import check_arriving, restore_integers, tied_weights


def language_model(tie: bool) -> Any:
    config = Qwen2Config(
        vocab_size=50, hidden_size=128, intermediate_size=192, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=tie,
    )  # fmt: skip
    return Qwen2ForCausalLM(config)


@pytest.mark.parametrize("kind", ["t5", "umt5"])
def test_scales_are_tied_as_embeddings_are(kind: str, tiny: SimpleNamespace) -> None:
    model = tiny.make_encoder(kind)
    weights = {"encoder.embed_tokens.weight": "shared.weight"}
    assert dict(tied_weights(model)) == weights
    quantize_encoder(model, embedding_bits=8)
    assert dict(tied_weights(model)) == {**weights, "encoder.embed_tokens.wscales": "shared.wscales"}
    assert dict(tied_weights(model.dequantize())) == weights


@pytest.mark.parametrize("tie", [True, False])
def test_embeddings_tied_to_an_output_are_kept(tie: bool) -> None:
    model = language_model(tie)
    report = quantize_encoder(model, embedding_bits=8)
    assert ("model.embed_tokens" in report.layers) != tie
    assert ("lm_head" in report.kept.get("model.embed_tokens", "")) == tie
    assert report.kept["lm_head"] == ("shares its weight with model.embed_tokens" if tie else "output embeddings")


@pytest.mark.parametrize("module", [EncoderLinear(64, 8, group_size=64, bias=False), Int8Embedding(9, 64)])
def test_integers_that_were_cast(module: Any) -> None:
    originals = {}
    for name, dtype in module.integers.items():
        limits = torch.iinfo(dtype)
        shape = module.get_parameter(name).shape
        originals[name] = torch.randint(limits.min, limits.max + 1, shape, dtype=dtype)
        setattr(module, name, nn.Parameter(originals[name].float(), requires_grad=False))
    restore_integers(module, module.integers)
    for name, original in originals.items():
        value = module.get_parameter(name)
        assert value.dtype == original.dtype and torch.equal(value, original) and not value.requires_grad


def test_shapes_are_compared_on_arrival() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    handles = check_arriving(model, "folder")
    model.load_state_dict(model.state_dict())
    wrong = {"weight": torch.ones(2, 5)}
    with pytest.raises(CheckpointError, match=r"folder: 1\.weight .*\[2, 3\].*\[2, 5\]"):
        model[1].load_state_dict(wrong, strict=False)
    for handle in handles:
        handle.remove()
    with pytest.raises(RuntimeError, match="size mismatch"):
        model[1].load_state_dict(wrong, strict=False)
