"""Files to files: what is written is what quantising in memory gives, and nothing on disk is lost."""

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from nunchaku_t5 import CheckpointError, NunchakuT5EncoderModel, quantize_encoder
from nunchaku_t5.convert import Conversion, EncoderQuantization
from nunchaku_t5.sources import EncoderSource, find

INPUTS = {"input_ids": torch.arange(9)[None] + 1, "attention_mask": torch.ones(1, 9)}


def convert(source: Path, output: Path, *, embeddings_twice: bool = False, **options: Any) -> Any:
    quantization = EncoderQuantization(EncoderSource(source), **options)
    return Conversion(quantization, output, embeddings_twice=embeddings_twice).run(threads=2)


@given(data=st.data())
def test_as_in_memory(tiny: SimpleNamespace, data: st.DataObject, tmp_path_factory: Any) -> None:
    dtype = data.draw(st.sampled_from([torch.bfloat16, torch.float16, torch.float32]))
    model = data.draw(tiny.encoders(dtype=dtype, vocab_size=20))
    folder = tmp_path_factory.mktemp("source")
    model.save_pretrained(folder / "t5", max_shard_size=data.draw(st.sampled_from(["50KB", "5GB"])))
    options = {
        "group_size": data.draw(st.sampled_from([64, 128])),
        "embedding_bits": data.draw(st.sampled_from([8, 16])),
    }
    output = folder / data.draw(st.sampled_from(["out", "out.safetensors"]))
    report = convert(folder / "t5", output, **options)
    half = torch.bfloat16 if dtype == torch.float32 else dtype
    wanted = quantize_encoder(model.to(half), **options)
    loaded = NunchakuT5EncoderModel.from_pretrained(output, dtype=half)
    assert type(loaded) is type(model)
    assert loaded.config.quantization_config.layers == model.config.quantization_config.layers
    assert report.four_bits + report.eight_bits == len(wanted.layers) and report.kept == wanted.kept
    assert report.bytes_after == sum(p.nbytes for p in loaded.parameters()) or half == torch.float16
    if dtype != torch.float32:  # from float32 codes are those of the unrounded weights
        states = tiny.encode(loaded, INPUTS)
        if half == torch.bfloat16:
            assert torch.equal(states, tiny.encode(model, INPUTS))
        assert tiny.relative_error(states, tiny.encode(model, INPUTS)) < 0.02


@pytest.mark.parametrize("which", ["prefix", "whole T5", "embed_tokens", "no config", "fp8"])
def test_single_files_as_they_come(which: str, tiny: SimpleNamespace, tmp_path: Path) -> None:
    model = tiny.make_encoder("umt5" if which == "prefix" else "t5")
    tensors = {name: value.clone() for name, value in model.state_dict().items() if "embed_tokens" not in name}
    tolerance = 0.0
    if which == "prefix":
        tensors = {f"text_encoders.umt5xxl.transformer.{name}": value for name, value in tensors.items()}
        tensors["vae.decoder.weight"] = torch.ones(3)
        tensors["text_encoders.umt5xxl.logit_scale"] = torch.ones(1)
    elif which == "whole T5":
        tensors["decoder.block.0.layer.0.SelfAttention.q.weight"] = torch.ones(3, 3)
        tensors["lm_head.weight"] = torch.ones(3, 3)
    elif which == "embed_tokens":
        tensors["encoder.embed_tokens.weight"] = tensors.pop("shared.weight")
    elif which == "fp8":
        tolerance = 0.15  # fp8 rounds by 2.6 %, and some codes become their neighbours
        for name in [name for name in tensors if "SelfAttention.o" in name or ".wo" in name]:
            scale = tensors[name].abs().amax().float() / 448
            tensors[name] = (tensors[name].float() / scale).to(torch.float8_e4m3fn)
            tensors[name.replace(".weight", ".scale_weight")] = scale
        tensors["scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
    save_file(tensors, tmp_path / "t5xxl.safetensors")
    convert(tmp_path / "t5xxl.safetensors", tmp_path / "out")
    quantize_encoder(model)
    loaded = NunchakuT5EncoderModel.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    wo = "encoder.block.0.layer.1.DenseReluDense.wo"
    assert tiny.relative_error(loaded.get_submodule(wo).dequantize(), model.get_submodule(wo).dequantize()) <= tolerance
    if tolerance == 0:
        assert torch.equal(tiny.encode(loaded, INPUTS), tiny.encode(model, INPUTS))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("encoder.embed_tokens.weight", torch.ones(3, 3)),
        ("encoder.block.1.layer.1.DenseReluDense.wo.scale_weight", torch.ones(3)),
        ("encoder.block.1.layer.1.DenseReluDense.wo.scale_weight", torch.ones(192)),
        ("encoder.block.1.layer.1.DenseReluDense.wo.scale_weight", torch.ones(0)),
        ("encoder.block.1.layer.1.DenseReluDense.wo.scale_weight", torch.ones(1, dtype=torch.int32)),
    ],
)
def test_tensors_that_do_not_fit(name: str, value: torch.Tensor, tiny: SimpleNamespace, tmp_path: Path) -> None:
    tensors = {key: value.clone() for key, value in tiny.make_encoder().state_dict().items() if "embed" not in key}
    tensors["encoder.block.1.layer.1.DenseReluDense.wo.scale_weight"] = torch.ones(128, 1)
    save_file(tensors, tmp_path / "t5.safetensors")
    EncoderSource(tmp_path / "t5.safetensors")
    save_file({**tensors, name: value}, tmp_path / "t5.safetensors")
    with pytest.raises(CheckpointError, match=name):
        EncoderSource(tmp_path / "t5.safetensors")


def test_a_pipeline_folder(tiny: SimpleNamespace, tmp_path: Path, cli: Any) -> None:
    tiny.make_encoder().save_pretrained(tmp_path / "pipe" / "text_encoder_2")
    index = {"_class_name": "FluxPipeline", "text_encoder": ["transformers", "CLIPTextModel"]}
    index["text_encoder_2"] = ["transformers", "T5EncoderModel"]
    (tmp_path / "pipe" / "model_index.json").write_text(json.dumps(index))
    code, out, err = cli("quantize", tmp_path / "pipe", "-o", tmp_path / "out.safetensors", "--json")
    assert code == 0 and json.loads(out)["four_bits"] == 14 and "100%" in err
    first = (tmp_path / "out.safetensors").read_bytes()
    code, out, _ = cli("quantize", tmp_path / "pipe" / "text_encoder_2", "-o", tmp_path / "out.safetensors")
    assert code == 0 and "14 layers" in out
    assert (tmp_path / "out.safetensors").read_bytes() == first  # deterministic
    cli("quantize", tmp_path / "pipe", "-o", tmp_path / "pipe" / "four")
    (tmp_path / "pipe" / "text_encoder_2").rename(tmp_path / "original")
    (tmp_path / "pipe" / "four").rename(tmp_path / "pipe" / "text_encoder_2")
    loaded = NunchakuT5EncoderModel.from_pretrained(tmp_path / "pipe")
    assert torch.equal(
        tiny.encode(loaded, INPUTS),
        tiny.encode(NunchakuT5EncoderModel.from_pretrained(tmp_path / "out.safetensors"), INPUTS),
    )
    code, _, err = cli("quantize", tmp_path / "out.safetensors", "-o", tmp_path / "again.safetensors")
    assert code == 2 and "quantised already" in err
    index["text_encoder_3"] = ["transformers", "UMT5EncoderModel"]
    (tmp_path / "pipe" / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="2 T5 encoders"):
        EncoderSource(tmp_path / "pipe")


def test_embeddings_twice(tiny: SimpleNamespace, tmp_path: Path) -> None:
    tiny.make_encoder().save_pretrained(tmp_path / "t5")
    convert(tmp_path / "t5", tmp_path / "once.safetensors")
    convert(tmp_path / "t5", tmp_path / "twice.safetensors", embeddings_twice=True)
    once, twice = (load_file(tmp_path / f"{name}.safetensors") for name in ("once", "twice"))
    assert twice.keys() - once.keys() == {"encoder.embed_tokens.weight"}
    assert torch.equal(twice["encoder.embed_tokens.weight"], once["shared.weight"])
    with pytest.raises(ValueError, match="twice"):
        convert(tmp_path / "t5", tmp_path / "out", embeddings_twice=True)


@pytest.mark.parametrize("name", ["out", "out.safetensors"])
@pytest.mark.parametrize("how", ["interrupted", "infinite"])
def test_what_was_there_stays(name: str, how: str, tiny: SimpleNamespace, tmp_path: Path) -> None:
    model = tiny.make_encoder()
    if how == "infinite":
        model.encoder.block[1].layer[0].SelfAttention.v.weight.data[3, 5] = torch.inf
    model.save_pretrained(tmp_path / "t5")
    if name == "out":
        (tmp_path / name).mkdir()
    else:
        (tmp_path / name).write_text("mine")
    conversion = Conversion(EncoderQuantization(EncoderSource(tmp_path / "t5")), tmp_path / name)

    def stop(path: str, _: int) -> None:
        if how == "interrupted" and path == "encoder.block.1.layer.0.layer_norm":
            raise KeyboardInterrupt

    expected = KeyboardInterrupt if how == "interrupted" else CheckpointError
    with pytest.raises(expected, match=None if how == "interrupted" else r"block\.1\.layer\.0\.SelfAttention\.v"):
        conversion.run(stop)
    assert sorted(path.name for path in tmp_path.iterdir()) == [name, "t5"]
    if name != "out":
        assert (tmp_path / name).read_text() == "mine"


@pytest.mark.parametrize("output", ["t5/model.safetensors", "link.safetensors", "t5/../t5/model.safetensors"])
def test_the_source_is_not_overwritten(output: str, tiny: SimpleNamespace, tmp_path: Path, cli: Any) -> None:
    tiny.make_encoder().save_pretrained(tmp_path / "t5")
    (tmp_path / "link.safetensors").symlink_to("t5/model.safetensors")
    before = (tmp_path / "t5" / "model.safetensors").read_bytes()
    for source in ("t5", "t5/model.safetensors", "link.safetensors"):
        code, _, err = cli("quantize", tmp_path / source, "-o", tmp_path / output)
        assert code == 2 and "another name" in err
    assert (tmp_path / "t5" / "model.safetensors").read_bytes() == before


def test_what_is_no_file_is_not_replaced(tiny: SimpleNamespace, tmp_path: Path, cli: Any) -> None:
    tiny.make_encoder().save_pretrained(tmp_path / "t5")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "out.safetensors").symlink_to("pipe")
    code, _, err = cli("quantize", tmp_path / "t5", "-o", tmp_path / "out.safetensors")
    assert code == 2 and "regular file" in err
    assert (tmp_path / "pipe").is_fifo()


def test_threads_of_torch_are_as_before(tiny: SimpleNamespace, tmp_path: Path) -> None:
    tiny.make_encoder().save_pretrained(tmp_path / "t5")
    torch.set_num_threads(2)
    try:
        convert(tmp_path / "t5", tmp_path / "out")
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("nowhere", "-o", "out"), "hub"),
        (("t5", "-o", "full"), "exists"),
        (("t5", "-o", "out.gguf"), "ends in .safetensors"),
        (("other", "-o", "out"), "quantize_encoder"),
        (("t5", "-o", "no/such/out"), "does not exist"),
        (("t5", "-o", "no/such/out.safetensors"), "does not exist"),
        (("empty", "-o", "out"), "no .safetensors"),
        (("t5", "-o", "out", "--embeddings-twice"), "twice"),
        (("t5", "-o", "out", "--group-size", "32"), "32"),
        (("t5", "-o", "out", "--subfolder", "other"), "other"),
        (("bad", "-o", "out"), "final_layer_norm"),
        (("bin", "-o", "out"), "no .safetensors"),
        (("strange", "-o", "out"), "wo.extra"),
        (("lying", "-o", "out"), "d_model"),
        (("outside", "-o", "out"), "not in its folder"),
    ],
)
def test_wrong_arguments(
    arguments: tuple[str, ...], word: str, tiny: SimpleNamespace, tmp_path: Path, cli: Any, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("t5", "bad", "full", "lying", "strange", "outside"):
        tiny.make_encoder().save_pretrained(tmp_path / name)
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    save_file({"text_model.final_layer_norm.weight": torch.ones(8)}, "other/model.safetensors")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "pytorch_model.bin").write_bytes(b"\x80\x04")
    tensors = load_file("t5/model.safetensors")
    save_file(
        {**tensors, "encoder.block.0.layer.1.DenseReluDense.wo.extra": torch.ones(1)}, "strange/model.safetensors"
    )
    del tensors["encoder.final_layer_norm.weight"]
    save_file(tensors, "bad/model.safetensors")
    config = json.loads(Path("lying/config.json").read_text())
    Path("lying/config.json").write_text(json.dumps({**config, "d_model": 1 << 40}))
    Path("outside/model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"shared.weight": "../t5/model.safetensors"}})
    )
    code, out, err = cli("quantize", *arguments)
    assert code == 2 and not out and word in err and "Traceback" not in err
    assert not (tmp_path / "out").exists()


def test_help(cli: Any) -> None:
    for what in ((), ("quantize",)):
        code, out, _ = cli(*what, "--help")
        assert code == 0 and "nunchaku-t5 quantize" in out and max(map(len, out.splitlines())) <= 130


def test_find_takes_local_paths_first(tmp_path: Path) -> None:
    assert find(tmp_path) == tmp_path
    assert find(tmp_path, subfolder="t5") == tmp_path / "t5"
