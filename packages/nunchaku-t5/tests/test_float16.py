"""float16 holds what T5's feed-forward parts make of it: activations beyond 65504 do not overflow."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nunchaku_t5 import EncoderLinear, NunchakuT5EncoderModel, quantize_encoder

FLOAT16_MAX = 65504
FLOAT16_NOISE = 0.02
"""Rounding of scales and states; what overflow leaves is far off, or not finite."""


def overflowing(tiny: SimpleNamespace, *, beyond: float = 4e5, **changes: Any) -> Any:
    """An encoder, float32, whose feed-forward parts reach `beyond` in every block, and its largest activations."""
    model = tiny.make_encoder(dtype=torch.float32, **changes)
    largest: list[float] = []
    for block in model.encoder.block:
        part = block.layer[1].DenseReluDense
        with torch.no_grad():
            block.layer[1].layer_norm.weight.mul_(50)  # neither weights nor inputs alone exceed float16
            for name, inner in part.named_children():
                if name.startswith("wi"):
                    inner.weight.mul_((beyond**0.5 if hasattr(part, "wi_1") else beyond) / 50)
        part.dropout.register_forward_hook(lambda _, x, y: largest.append(float(y.detach().abs().max())))
    return model, largest


@given(data=st.data())
def test_loaded_in_float16(tiny: SimpleNamespace, data: st.DataObject, tmp_path_factory: Any) -> None:
    kind, act = data.draw(st.sampled_from(["t5", "umt5"])), data.draw(st.sampled_from(["gated-gelu", "relu"]))
    model, largest = overflowing(tiny, kind=kind, feed_forward_proj=act, seed=data.draw(st.integers(0, 100)))
    inputs = data.draw(tiny.texts(model.config.vocab_size))
    quantize_encoder(model)
    wanted = tiny.encode(model, inputs)
    assert max(largest) > 2 * FLOAT16_MAX
    folder = tmp_path_factory.mktemp("float16")
    model.save_pretrained(folder)
    loaded = NunchakuT5EncoderModel.from_pretrained(folder, dtype=torch.float16)
    assert loaded.shared.weight.dtype == torch.float16
    given = tiny.encode(loaded, inputs)
    assert given.isfinite().all() and tiny.relative_error(given, wanted) < FLOAT16_NOISE
    moved = NunchakuT5EncoderModel.from_pretrained(folder, dtype=torch.float32).to(torch.float16)
    given = tiny.encode(moved, inputs)
    assert given.isfinite().all() and tiny.relative_error(given, wanted) < FLOAT16_NOISE


def test_16_bits_overflow_there(tiny: SimpleNamespace) -> None:
    """The test above tests something: transformers' float32 `wo` alone comes too late for these activations."""
    model, _ = overflowing(tiny)
    model.half()
    for block in model.encoder.block:
        block.layer[1].DenseReluDense.wo.float()
    states = tiny.encode(model, {"input_ids": torch.arange(9)[None], "attention_mask": torch.ones(1, 9)})
    assert not states.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_only_float16_is_widened(dtype: torch.dtype) -> None:
    x = torch.randn(3, 64).to(dtype)
    for wide in (False, True):
        layer = EncoderLinear(64, 8, group_size=64, bias=False, wide=wide, dtype=dtype)
        layer.load_packed(
            {
                "qweight": torch.zeros(2, 64, dtype=torch.int16),
                "wscales": torch.ones(16, 8, dtype=dtype),
                "wzeros": torch.ones(16, 8, dtype=dtype),
            }
        )
        widened = wide and dtype == torch.float16
        assert layer(x).dtype == layer.weight.dtype == (torch.float32 if widened else dtype)
        assert layer.weight.shape == (8, 64) and layer.weight.untyped_storage().nbytes() <= 4


def test_whose_feed_forward_parts(tiny: SimpleNamespace, tmp_path: Path) -> None:
    model = tiny.make_encoder()
    quantize_encoder(model)
    wide = {name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, EncoderLinear) and m.wide}
    assert wide == {"wi_0", "wi_1", "wo"}
