"""The command line: what it says, what it returns, and one sentence for every kind of bad input."""

import importlib.metadata
import json
import os
import re
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from nunchaku_models.cli import plugins
from nunchaku_models.generation import check_seed, check_steps, parse_lora, parse_size

Cli = Callable[..., tuple[int, str, str]]
SMALL = ("--steps", 1, "--size", 32)


def one_sentence(err: str, *words: str) -> None:
    """stderr holds one line for the user, which says what it should, and no traceback."""
    lines = [line for line in err.splitlines() if line.startswith("nunchaku:")]
    assert len(lines) == 1, err
    assert lines[0].startswith("nunchaku: error: ")
    assert "Traceback" not in err
    assert len(lines[0]) < 700
    for word in words:
        assert re.search(word, lines[0]), lines[0]


# ----------------------------------------------------------------- frame


@pytest.mark.parametrize("command", [(), ("generate",), ("quantize",), ("inspect",), ("doctor",)])
def test_help(command: tuple[str, ...], cli: Cli) -> None:
    code, out, err = cli(*command, "--help")
    assert code == 0 and not err
    assert "usage: nunchaku" in out and len(out) > 300
    assert max(map(len, out.splitlines())) <= 130
    if command in (("generate",), ("quantize",), ("inspect",)):
        assert f"  nunchaku {command[0]} " in out  # an example


def test_version(cli: Cli) -> None:
    code, out, _ = cli("--version")
    assert code == 0 and re.fullmatch(r"nunchaku-models \d+\.\d+\.\d+\n", out)


@pytest.mark.parametrize(
    "arguments", [(), ("draw",), ("generate",), ("generate", "a cat"), ("quantize", "x"), ("inspect", "x", "--jsn")]
)
def test_wrong_usage(arguments: tuple[str, ...], cli: Cli) -> None:
    code, out, err = cli(*arguments)
    assert code == 2 and not out
    assert "usage: nunchaku" in err and "error: " in err


class EntryPoint:
    def __init__(self, name: str, load: Callable[[], Any]) -> None:
        self.name, self.load = name, load


def test_plug_ins(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Any:
        raise ImportError("no module named\nwhatever")

    def good(subparsers: Any) -> None:
        parser = subparsers.add_parser("extra", help="from elsewhere")
        parser.set_defaults(run=lambda args: print("extra ran") or 3)

    def fails_when_run(subparsers: Any) -> None:
        parser = subparsers.add_parser("bug")
        parser.add_argument("--verbose", action="store_true")
        parser.set_defaults(run=lambda args: {}["nothing"])

    points = [EntryPoint("bad", broken), EntryPoint("extra", lambda: good), EntryPoint("bug", lambda: fails_when_run)]
    monkeypatch.setattr(plugins, "entry_points", lambda group: points if group == "nunchaku.commands" else [])
    code, out, err = cli("extra")
    assert code == 3 and out == "extra ran\n"
    assert err == "nunchaku: the command 'bad' is not available: no module named whatever\n"
    code, _, err = cli("bug")
    assert code == 1
    assert "internal error (KeyError: 'nothing')" in err and "Traceback" not in err


def test_our_entry_point_is_installed() -> None:
    scripts = importlib.metadata.entry_points(group="console_scripts", name="nunchaku")
    assert [script.value for script in scripts] == ["nunchaku_models.cli.main:main"]


def test_verbose_shows_tracebacks(cli: Cli, tmp_path: Path) -> None:
    for arguments in (("--verbose", "inspect", tmp_path), ("inspect", tmp_path, "--verbose")):
        code, _, said = cli(*arguments)
        assert code == 2
        assert "Traceback" in said and "no .safetensors" in said
    code, _, said = cli("inspect", tmp_path)
    assert code == 2 and "Traceback" not in said


def test_interrupt(cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def stop(*args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("nunchaku_models.quantizer.quantize_checkpoint", stop)
    code, _, err = cli("quantize", tmp_path, "-o", tmp_path / "x.safetensors")
    assert code == 130 and err == "nunchaku: interrupted; earlier files are untouched\n"


# ----------------------------------------------------------------- inspect


def test_inspect_text_and_json(int4_file: Path, nvfp4_file: Path, pipeline_folder: Path, cli: Cli) -> None:
    code, out, err = cli("inspect", int4_file)
    assert code == 0 and not err
    for words in ("flux", "nunchaku-v1", "int4", "32: 16", "num_layers: 1", "bfloat16: "):
        assert words in out
    for file, precision, layers in ((int4_file, "int4", 20), (nvfp4_file, "nvfp4", 20), (pipeline_folder, "16-bit", 0)):
        code, out, err = cli("inspect", file, "--json")
        summary = json.loads(out)
        assert code == 0 and not err
        assert summary["precision"] == precision and summary["quantized_layers"] == layers
        assert summary["family"] == "flux" and summary["config"]["num_single_layers"] == 2
        assert sum(summary["bytes_by_dtype"].values()) == summary["bytes"] > 0
    code, out, _ = cli("inspect", int4_file, "--json", "--tensors")
    tensors = {entry["name"]: entry for entry in json.loads(out)["tensors"]}
    assert tensors["transformer_blocks.0.qkv_proj.qweight"] == {
        "name": "transformer_blocks.0.qkv_proj.qweight", "dtype": "int8", "shape": [384, 64],
    }  # fmt: skip
    assert "transformer_blocks.0.qkv_proj.qweight int8 [384, 64]" in cli("inspect", int4_file, "--tensors")[1]


def test_inspect_prints_no_control_characters(int4_file: Path, cli: Cli, tmp_path: Path) -> None:
    with safe_open(int4_file, "pt") as opened:
        metadata = {**opened.metadata(), "model_class": "\x1b[31mred\x07 ☃"}
    save_file(load_file(int4_file), tmp_path / "escape.safetensors", metadata)
    code, out, _ = cli("inspect", tmp_path / "escape.safetensors", "--tensors")
    assert code == 0 and "\x1b" not in out and "\x07" not in out and "red" in out


def test_inspect_of_a_huge_file_reads_the_header(cli: Cli, tmp_path: Path, transformer16: Any) -> None:
    """A sparse file of 20 GB: reading its data would take minutes and the whole memory."""
    header: dict[str, Any] = {}
    end = 0
    for name, value in transformer16.state_dict().items():
        header[name] = {
            "dtype": "BF16", "shape": list(value.shape), "data_offsets": [end, end + 2 * value.numel()],
        }  # fmt: skip
        end += 2 * value.numel()
    for index in range(1, 1100):
        for part, shape in (("attn.to_v.weight", [3072, 3072]), ("attn.norm_q.weight", [64])):
            size = 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
            header[f"transformer_blocks.0.{part}.{index}"] = {
                "dtype": "BF16", "shape": shape, "data_offsets": [end, end + size],
            }  # fmt: skip
            end += size
    text = json.dumps(header).encode()
    file = tmp_path / "huge.safetensors"
    with file.open("wb") as opened:
        opened.write(len(text).to_bytes(8, "little") + text)
        opened.truncate(8 + len(text) + end)
    assert file.stat().st_size > 20e9
    started = time.monotonic()
    code, out, _ = cli("inspect", file, "--json")
    assert time.monotonic() - started < 5
    assert code == 0 and json.loads(out)["bytes"] == end


# ----------------------------------------------------------------- quantize


def test_quantize(pipeline_folder: Path, int4_file: Path, cli: Cli, tmp_path: Path) -> None:
    output = tmp_path / "out.safetensors"
    code, out, err = cli("quantize", pipeline_folder, "-o", output)
    assert code == 0
    assert re.fullmatch(r"wrote .*out\.safetensors: 20 layers in int4, [\d.]+ MB \([\d.]+x smaller\), [\d.]+ s\n", out)
    assert "quantize: 100%" in err
    assert output.read_bytes() == int4_file.read_bytes()
    code, out, err = cli("quantize", pipeline_folder, "-o", output, "--rank", 0, "--precision", "nvfp4", "--quiet")
    assert code == 0 and not err and "nvfp4" in out


def test_quantize_lists_what_stays(make_transformer: Any, cli: Cli, tmp_path: Path) -> None:
    make_transformer(
        num_attention_heads=3, attention_head_dim=16, axes_dims_rope=(4, 6, 6), num_single_layers=1
    ).save_pretrained(tmp_path / "source")
    code, out, _ = cli("quantize", tmp_path / "source", "-o", tmp_path / "out.safetensors", "--quiet")
    assert code == 0
    assert "kept in 16 bits: transformer_blocks.0.attn.to_q\n" in out
    assert "kept in 16 bits: single_transformer_blocks.0.proj_out\n" in out


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--precision", "int3"), "int3"),
        (("--rank", "5"), "16"),
        (("--dtype", "float8"), "float8"),
        (("--seed", "-1"), "seed"),
    ],
)
def test_quantize_options(options: tuple[str, ...], says: str, pipeline_folder: Path, cli: Cli, tmp_path: Path) -> None:
    code, out, err = cli("quantize", pipeline_folder, "-o", tmp_path / "out.safetensors", *options)
    assert code == 2 and not out
    one_sentence(err, says)
    assert not any(tmp_path.iterdir())


# ----------------------------------------------------------------- bad files


def make_bad_file(kind: str, file: Path, int4_file: Path) -> None:
    good = int4_file.read_bytes()
    length = int.from_bytes(good[:8], "little")
    if kind == "pickle":
        torch.save({"weight": torch.zeros(3)}, file, _use_new_zipfile_serialization=False)
    elif kind == "zip":
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("data.pkl", b"0")
    elif kind == "html":
        file.write_text("<!DOCTYPE html><html><body>404 Not Found</body></html>")
    elif kind == "empty":
        file.write_bytes(b"")
    elif kind == "truncated header":
        file.write_bytes(good[: length // 2])
    elif kind == "truncated":
        file.write_bytes(good[:-1000])
    elif kind == "huge header":
        file.write_bytes((2**62).to_bytes(8, "little") + good[8:])
    elif kind == "overlap":
        header = json.loads(good[8 : 8 + length])
        names = [name for name in header if name != "__metadata__"]
        header[names[3]]["data_offsets"] = header[names[2]]["data_offsets"]
        header[names[3]]["shape"], header[names[3]]["dtype"] = header[names[2]]["shape"], header[names[2]]["dtype"]
        text = json.dumps(header).encode()
        file.write_bytes(len(text).to_bytes(8, "little") + text + good[8 + length :])
    elif kind == "huge shape":
        text = json.dumps({"a": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 4]}}).encode()
        file.write_bytes(len(text).to_bytes(8, "little") + text + b"0000")
    elif kind == "deep":
        text = b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
        file.write_bytes(len(text).to_bytes(8, "little") + text)
    elif kind == "deep metadata":
        with safe_open(int4_file, "pt") as opened:
            metadata = {**opened.metadata(), "config": "[" * 50_000 + "]" * 50_000}
        save_file(load_file(int4_file), file, metadata)
    elif kind == "lora":
        save_file({"transformer.single_transformer_blocks.0.attn.to_k.lora_A.weight": torch.zeros(4, 4)}, file)
    elif kind == "vae":
        save_file({"decoder.conv_in.weight": torch.zeros(4), "encoder.down_blocks.0.resnets.0.a": torch.zeros(4)}, file)
    elif kind == "folder":
        file.mkdir()
    else:
        assert kind == "missing"


KINDS = {
    "pickle": "PyTorch", "zip": "zip", "html": "web page", "empty": "empty", "truncated header": "truncated",
    "truncated": "truncated", "huge header": "damaged", "overlap": "overlaps", "huge shape": "overflows",
    "deep": "header", "deep metadata": "deep", "lora": "LoRA", "vae": "VAE", "folder": "safetensors",
    "missing": "does not exist",
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_bad_files(kind: str, int4_file: Path, pipeline_folder: Path, cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "bad.safetensors"
    make_bad_file(kind, file, int4_file)
    for name in ("picture.png", "out.safetensors"):
        (tmp_path / name).write_bytes(b"earlier")
    for command in (
        ("inspect", file),
        ("inspect", file, "--json"),
        ("quantize", file, "-o", tmp_path / "out.safetensors"),
        ("generate", "a cat", "-o", tmp_path / "picture.png", "--model", file, "--base", pipeline_folder),
    ):
        code, out, err = cli(*command)
        assert code == 2 and not out, command
        one_sentence(err, KINDS[kind], "bad.safetensors")
    for name in ("picture.png", "out.safetensors"):
        assert (tmp_path / name).read_bytes() == b"earlier"
    assert {entry.name for entry in tmp_path.iterdir()} <= {"picture.png", "out.safetensors", "bad.safetensors"}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_output_places_that_cannot_be_written(pipeline_folder: Path, cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "folder.png").mkdir()
    for output in ("no/out.safetensors", "no/out", "folder.safetensors"):
        code, _, err = cli("quantize", pipeline_folder, "-o", tmp_path / output)
        assert code == 2
        one_sentence(err, "no|folder")
    for output in ("no/out.png", "folder.png", "out.gif", "out"):
        code, _, err = cli("generate", "a cat", "-o", tmp_path / output, "--model", pipeline_folder)
        assert code == 2
        one_sentence(err, "no|folder|must end in")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["folder.png", "folder.safetensors"]


# ----------------------------------------------------------------- generate


def test_generate(pipeline_folder: Path, int4_file: Path, cli: Cli, tmp_path: Path) -> None:
    picture = tmp_path / "cat.png"
    code, out, err = cli(
        "generate", "a cat", "-o", picture, "--model", int4_file, "--base", pipeline_folder, "--steps", 2, "--size",
        "64x32",
    )  # fmt: skip
    assert code == 0, err
    assert Image.open(picture).size == (64, 32)
    assert re.search(r"64x32, 2 steps, seed 0", out)
    assert re.search(r"[\d.]+ s to load, [\d.]+ s to draw, peak memory [\d.]+ GiB", out)
    assert re.search(r"w4a8 x 16.*bfloat16, on cpu", out)
    assert "100%" in err

    first = picture.read_bytes()
    for size, wanted in (("64x32", True), ("32", False)):
        code, out, _ = cli(
            "generate", "a cat", "-o", picture, "--model", int4_file, "--base", pipeline_folder, "--steps", 2, "--size",
            size, "--json",
        )  # fmt: skip
        assert code == 0 and (picture.read_bytes() == first) is wanted
    report = json.loads(out)
    assert (report["width"], report["height"], report["steps"], report["seed"]) == (32, 32, 2, 0)
    assert report["device"] == "cpu" and "w4a8" in report["arithmetic"] and report["dtype"] == "bfloat16"
    assert report["peak_memory_bytes"] > 1e8 and report["draw_seconds"] > 0 and report["load_seconds"] > 0
    assert [entry.name for entry in tmp_path.iterdir()] == ["cat.png"]


def test_generate_with_folders_and_defaults(pipeline_folder: Path, cli: Cli, tmp_path: Path) -> None:
    """A quantised pipeline folder and a 16-bit one need no --base; the folder may recommend arguments."""
    code, *_ = cli("quantize", pipeline_folder, "-o", tmp_path / "int4", "--quiet")
    assert code == 0
    defaults = {"num_inference_steps": 1, "height": 32, "width": 48}
    (tmp_path / "int4" / "generation_defaults.json").write_text(json.dumps(defaults))
    run = ("generate", "a cat", "-o", tmp_path / "cat.webp", "--json")
    code, out, err = cli(*run, "--model", tmp_path / "int4", "--arithmetic", "w4a4", "--dtype", "float32")
    assert code == 0, err
    report = json.loads(out)
    assert (report["width"], report["height"], report["steps"]) == (48, 32, 1)
    assert "w4a4 x 16" in report["arithmetic"] and report["dtype"] == "float32"
    code, out, err = cli(*run, "--model", pipeline_folder, *SMALL, "--dtype", "fp16")
    assert code == 0 and json.loads(out)["arithmetic"] == "16-bit" and json.loads(out)["dtype"] == "float16"

    code, _, err = cli(*run, "--model", pipeline_folder, "--arithmetic", "w4a8", *SMALL)
    assert code == 2
    one_sentence(err, "not quantised")
    for broken in ('{"num_inference_steps": [1]}', "[]", "{", '{"no_such_argument": 1}'):
        (tmp_path / "int4" / "generation_defaults.json").write_text(broken)
        code, _, err = cli(*run, "--model", tmp_path / "int4")
        assert code == 2
        one_sentence(err, "generation_defaults.json|no_such_argument")


@pytest.mark.parametrize("prompt", ["", " ", "🍎 émoji", "line\nbreak\ttab", "-", "a cat " * 600, "<|endoftext|>\0"])
def test_weird_prompts(
    prompt: str, pipeline_folder: Path, int4_file: Path, cli: Cli, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    code, _, err = cli(
        "generate", prompt, "-o", tmp_path / "out.jpg", "--model", int4_file, "--base", pipeline_folder, *SMALL
    )
    assert code == 0, err
    assert Image.open(tmp_path / "out.jpg").size == (32, 32)
    if len(prompt) > 1000:
        assert "truncated" in caplog.text + err


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--size", "0"), "size"),
        (("--size", "100"), "multiples of 16"),
        (("--size", "64x"), "size"),
        (("--size", "64x64x64"), "size"),
        (("--size", "99999999"), "size"),
        (("--size", "16384"), "4096"),
        (("--size", "-64"), "size"),
        (("--steps", "0"), "steps"),
        (("--steps", "-3"), "steps"),
        (("--steps", "1000000000"), "steps"),
        (("--seed", "-1"), "seed"),
        (("--seed", str(2**70)), "seed"),
        (("--device", "warp"), "warp"),
        (("--device", "meta"), "meta"),
        (("--device", "cuda:99"), "cuda:99"),
        (("--dtype", "int8"), "int8"),
        (("--arithmetic", "w3a3"), "w4a8"),
        (("--arithmetic", "nvfp4"), "int4 weights cannot be multiplied as 'nvfp4'"),
        (("--offload", "--device", "cpu"), "CPU"),
    ],
)
def test_generate_options(
    options: tuple[str, ...], says: str, pipeline_folder: Path, int4_file: Path, cli: Cli, tmp_path: Path
) -> None:
    (tmp_path / "out.png").write_bytes(b"earlier")
    code, out, err = cli(
        "generate", "a cat", "-o", tmp_path / "out.png", "--model", int4_file, "--base", pipeline_folder, *options
    )
    assert code == 2 and not out
    one_sentence(err, says)
    assert (tmp_path / "out.png").read_bytes() == b"earlier"


def test_models_that_are_not_there_or_not_enough(
    pipeline_folder: Path, int4_file: Path, cli: Cli, tmp_path: Path
) -> None:
    def fails(*options: object, says: str) -> None:
        code, out, err = cli("generate", "a cat", "-o", tmp_path / "out.png", *SMALL, *options)
        assert code == 2 and not out
        one_sentence(err, says)
        assert not (tmp_path / "out.png").exists()

    fails("--model", int4_file, says="--base")
    fails("--model", pipeline_folder / "transformer", says="--base")
    fails("--model", tmp_path / "nowhere", says="nowhere")
    fails("--model", "org/repo/file.safetensors", says="on the hub, add --base")
    fails("--model", "no-such-org/no-such-repository", says="no-such-org")
    fails("--model", int4_file, "--base", tmp_path / "nowhere", says="nowhere")
    fails("--model", int4_file, "--base", pipeline_folder / "vae", says="model_index")
    fails("--model", pipeline_folder, "--base", pipeline_folder, says="nunchaku quantize")
    fails("--model", pipeline_folder / "transformer", "--base", pipeline_folder, says="not quantised")


@pytest.mark.parametrize(
    ("part", "content"),
    [
        ("vae/diffusion_pytorch_model.safetensors", b"garbage"),
        ("vae/config.json", b"{"),
        ("text_encoder/model.safetensors", b"garbage"),
        ("tokenizer_2/tokenizer.json", b"garbage"),
        ("scheduler/scheduler_config.json", b"[]"),
        ("model_index.json", b"[]"),
        ("model_index.json", b'{"_class_name": "NoSuchPipeline", "_diffusers_version": "0.42.1"}'),
        ("model_index.json", b'{"_class_name": "DDPMPipeline", "_diffusers_version": "0.42.1"}'),
    ],
)
def test_broken_parts_of_a_base(
    part: str, content: bytes, pipeline_folder: Path, int4_file: Path, cli: Cli, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    base.mkdir()
    for path in pipeline_folder.rglob("*"):
        target = base / path.relative_to(pipeline_folder)
        if path.is_dir():
            target.mkdir(exist_ok=True)
        elif str(path.relative_to(pipeline_folder)) != part:
            target.parent.mkdir(exist_ok=True)
            os.link(path, target)
    (base / part).write_bytes(content)
    code, out, err = cli("generate", "a cat", "-o", tmp_path / "o.png", "--model", int4_file, "--base", base, *SMALL)
    assert code == 2 and not out
    one_sentence(err, "base")


def test_size_steps_seed() -> None:
    assert parse_size("1024") == (1024, 1024) and parse_size(" 64X32 ") == (64, 32)
    assert check_steps(1) == 1 and check_seed(2**63 - 1) == 2**63 - 1


# ----------------------------------------------------------------- doctor


def test_doctor(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nunchaku_models.demo.is_complete", lambda: True)
    code, out, _ = cli("doctor")
    assert code == 0
    for words in ("torch", "diffusers", "CPU kernels: portable", "int4 as w4a8"):
        assert words in out
    code, out, _ = cli("doctor", "--json")
    report = json.loads(out)
    assert code == 0 and report["packages"]["torch"] == importlib.metadata.version("torch")
    assert report["devices"][0]["device"] == "cpu" and report["problems"] == []

    monkeypatch.setenv("NUNCHAKU_CPU_ISA", "sse9")
    monkeypatch.setattr("nunchaku_models.demo.is_complete", lambda: False)
    code, out, _ = cli("doctor")
    assert code == 1
    assert "problem: NUNCHAKU_CPU_ISA='sse9'" in out and "problem: the demo pipeline is missing" in out


def test_lora_arguments(tmp_path: Path) -> None:
    file = tmp_path / "it.safetensors"
    file.touch()
    assert parse_lora(str(file)) == (str(file), 1.0)
    assert parse_lora(f"{file}:-.5") == (str(file), -0.5)
    assert parse_lora("org/repo") == ("org/repo", 1.0)
    with pytest.raises(ValueError, match=r"it\.safetensors must be a number, got 'x'"):
        parse_lora(f"{file}:x")
