"""Fitting to texts: what is folded changes nothing, what is fitted is better on other texts, and it gets into files."""

import copy
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import Unigram
from tokenizers.pre_tokenizers import Metaspace
from tokenizers.processors import TemplateProcessing
from transformers import T5TokenizerFast

from nunchaku_t5 import CheckpointError, LayerForm, NunchakuT5EncoderModel
from nunchaku_t5.calibration import Batch, EncoderBlocks, choose_eight_bits, read_texts, tokenized
from nunchaku_t5.calibration.methods import awq
from nunchaku_t5.convert import Conversion, EncoderQuantization
from nunchaku_t5.sources import EncoderSource

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def tokenizer() -> Any:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -1.0), *((letter, -2.0) for letter in LETTERS)]
    rules = Tokenizer(Unigram(pieces, unk_id=2))
    rules.pre_tokenizer = Metaspace()
    rules.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return T5TokenizerFast(tokenizer_object=rules, extra_ids=0)


def batches(vocabulary: int, seed: int, count: int = 4) -> list[Batch]:
    """Texts of unequal lengths, some of them unmasked; a few tokens are frequent, as in a language."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for index in range(count):
        ids = (torch.rand(6, 12, generator=generator) ** 3 * vocabulary).long()
        mask = torch.arange(12) < torch.randint(2, 13, (6, 1), generator=generator)
        made.append(Batch(ids, None if index % 3 == 2 else mask.long()))
    return made


def outlying(tiny: SimpleNamespace, **changes: Any) -> Any:
    """An encoder whose norms differ between channels, as trained ones do."""
    model = tiny.make_encoder(dtype=torch.float32, **changes)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "layer_norm" in name:
                value.copy_(torch.randn(value.shape).exp())
    return model


def error(tiny: SimpleNamespace, model: Any, quantized: Any, seed: int) -> float:
    """On texts that were not calibrated on."""
    total, size = 0.0, 0.0
    for batch in batches(model.config.vocab_size, seed + 1000):
        inputs = {"input_ids": batch.input_ids, "attention_mask": torch.ones_like(batch.input_ids)}
        if batch.attention_mask is not None:
            inputs["attention_mask"] = batch.attention_mask
        states = tiny.encode(model, inputs)
        total += float((tiny.encode(quantized, inputs) - states).square().sum())
        size += float(states.square().sum())
    return (total / size) ** 0.5


@settings(max_examples=6)
@given(data=st.data())
def test_awq_folds_what_it_smooths(tiny: SimpleNamespace, data: st.DataObject) -> None:
    act = data.draw(st.sampled_from(["gated-gelu", "relu", "gelu"]))
    model = outlying(
        tiny, kind=data.draw(st.sampled_from(["t5", "umt5"])), feed_forward_proj=act, seed=data.draw(st.integers(0, 99))
    )
    names = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    kept = data.draw(st.sets(st.sampled_from(names), max_size=3))
    forms = {name: LayerForm(group_size=64) for name in names if name not in kept}
    for block in EncoderBlocks(model, batches(model.config.vocab_size, 0), list(forms)):
        found = awq(block, forms, torch.bfloat16)
        for index in range(2):  # `module` is folded, not yet rounded
            assert tiny.relative_error(block.now.run(index), block.before.run(index)) < 1e-4
        assert set(found.weights) == {name for name in forms if name.startswith(f"{block.path}.")}


@pytest.mark.parametrize("kind", ["t5", "umt5"])
def test_fitted_is_better_and_bits_go_where_they_help(kind: str, tiny: SimpleNamespace, tmp_path: Path) -> None:
    model = outlying(tiny, kind=kind, seed=3)
    model.save_pretrained(tmp_path / "t5")
    texts = batches(model.config.vocab_size, 1, 8)
    errors = {}
    for name, options in {
        "nearest": None,
        "awq": {"method": "awq"},
        "fitted": {"eight_bits": 0.0},
        "rank": {"eight_bits": 0.0, "rank": 16},
        "eight": {"eight_bits": 0.2},
    }.items():
        quantization = EncoderQuantization(EncoderSource(tmp_path / "t5"))
        if options is not None:
            quantization.calibrate(texts, **options)
        output = tmp_path / f"{name}.safetensors" if name in ("awq", "rank") else tmp_path / name
        Conversion(quantization, output).run()
        loaded = NunchakuT5EncoderModel.from_pretrained(output, dtype=torch.float32)
        errors[name] = error(tiny, model, loaded, 1)
        forms = loaded.config.quantization_config.layers
        assert forms == quantization.layers
        bits = Counter(form.bits for form in forms.values())
        assert (bits[8] > 0) == (name == "eight")
        assert {form.rank for form in forms.values()} == {16 if name == "rank" else 0}
    assert errors["fitted"] < 0.9 * errors["nearest"], errors
    assert errors["rank"] < errors["fitted"] and errors["eight"] < errors["fitted"], errors
    assert errors["awq"] < 1.1 * errors["nearest"], errors


def test_budget_of_eight_bits(tiny: SimpleNamespace) -> None:
    model = outlying(tiny)
    names = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    forms = {name: LayerForm(group_size=64) for name in names} | {"shared": LayerForm(8)}
    texts = batches(model.config.vocab_size, 2, 2)
    assert choose_eight_bits(model, texts, forms, 0.0) == forms
    seen: list[tuple[int, int]] = []
    wide = choose_eight_bits(model, texts, forms, 10.0, lambda done, of: seen.append((done, of)))
    assert seen == [(1, 2), (2, 2)]
    assert all(wide[name] == LayerForm(8, 64) for name in names) and wide["shared"] == LayerForm(8)


def test_model_stays_as_it_is(tiny: SimpleNamespace) -> None:
    model = outlying(tiny)
    before = copy.deepcopy(model.state_dict())
    forms = {name: LayerForm(group_size=64) for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    for block in EncoderBlocks(model, batches(model.config.vocab_size, 0, 2), list(forms)):
        awq(block, forms, torch.bfloat16)
    after = model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_tokens(tmp_path: Path) -> None:
    texts = ["a", "the quick fox", "b " * 700, "of", "x y z"]
    made = tokenized(tokenizer(), texts, 30)
    masked = [batch for batch in made if batch.attention_mask is not None]
    assert sum(len(batch.input_ids) for batch in masked) == len(texts)
    assert masked[0].input_ids.shape[1] == 512  # what is longer is cut, as pipelines do
    padded = [batch for batch in made if batch.attention_mask is None]
    assert sum(len(batch.input_ids) for batch in padded) == 3 and {b.input_ids.shape[1] for b in padded} == {128}
    assert all(batch.counted is None for batch in padded)
    with pytest.raises(CheckpointError, match="another's"):
        tokenized(tokenizer(), texts, 20)
    with pytest.raises(CheckpointError, match="does not know"):
        tokenized(tokenizer(), ["ÄÖÜ ß", "123"], 30)


def test_texts(tmp_path: Path) -> None:
    file = tmp_path / "texts.txt"
    for content in (b"# for calibration\none\n\n  two \n", b"\xef\xbb\xbfone\r\n\r\ntwo\r\n"):
        file.write_bytes(content)
        assert read_texts(file) == ["one", "two"]
    for content in (b"", b"\n \n", b"# one\n", b"\xff\xfe\xff"):
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"texts\.txt"):
            read_texts(file)
    with pytest.raises(CheckpointError, match="nothing"):
        read_texts(tmp_path / "nothing")


def test_command(tiny: SimpleNamespace, tmp_path: Path, cli: Any) -> None:
    tiny.make_encoder(num_layers=2).save_pretrained(tmp_path / "t5")
    (tmp_path / "texts.txt").write_text("a quick fox\nthe lazy dog\n")
    options = ("quantize", tmp_path / "t5", "-o", tmp_path / "out", "--calibrate", tmp_path / "texts.txt")
    code, _, err = cli(*options)
    assert code == 2 and "--tokenizer" in err and not (tmp_path / "out").exists()
    tokenizer().save_pretrained(tmp_path / "t5")
    code, out, err = cli(*options, "--rank", 8, "--eight-bits", 0)
    assert code == 0 and "14 layers in 4 bits, 0 in 8" in out and "2 texts" in err
    config = NunchakuT5EncoderModel.from_pretrained(tmp_path / "out").config.quantization_config
    assert {form.rank for form in config.layers.values()} == {8}
    other = ("quantize", tmp_path / "t5", "-o", tmp_path / "other")
    texts_of = ("--calibrate", tmp_path / "texts.txt")
    for wrong, word in (
        (("--rank", "-1"), "rank"),
        (("--eight-bits", "-1"), "eight_bits"),
        (("--eight-bits", "nan"), "eight_bits"),
        (("--eight-bits", "101"), "eight_bits"),
        (("--method", "awq", "--rank", "8"), "rank"),
    ):
        code, _, err = cli(*other, *texts_of, *wrong)
        assert code == 2 and f"`{word}`" in err
    for useless in (("--rank", 8), ("--method", "awq"), ("--eight-bits", 0), ("--tokenizer", "x"), ("--device", "cpu")):
        code, _, err = cli(*other, *useless)
        assert code == 2 and "--calibrate" in err and useless[0] in err
    code, _, err = cli(*options)
    assert code == 2 and "exists" in err and "calibrating" not in err  # not found out after the work
    assert not (tmp_path / "other").exists()


def test_a_single_file_has_no_tokenizer(tiny: SimpleNamespace, tmp_path: Path, cli: Any) -> None:
    tiny.make_encoder().save_pretrained(tmp_path / "t5")
    (tmp_path / "texts.txt").write_text("a quick fox\n")
    file = tmp_path / "t5" / "model.safetensors"
    options = ("quantize", file, "-o", tmp_path / "out", "--calibrate", tmp_path / "texts.txt")
    code, _, err = cli(*options)
    assert code == 2 and "--tokenizer" in err and "model.safetensors is a single file" in err
    tokenizer().save_pretrained(tmp_path / "tokenizer")
    code, out, _ = cli(*options, "--tokenizer", tmp_path / "tokenizer", "--eight-bits", 100)
    assert code == 0 and "0 layers in 4 bits, 14 in 8" in out
