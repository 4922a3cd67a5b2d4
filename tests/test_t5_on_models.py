"""A 4-bit T5 in a pipeline: plain diffusers loads it, and draws what it draws with 16 bits."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline
from transformers import T5EncoderModel

import nunchaku_models  # noqa: F401 - tells diffusers about 4-bit transformers
from nunchaku_models import demo
from nunchaku_models.cli.main import main
from nunchaku_models.evaluation.metrics import psnr
from nunchaku_t5 import EncoderLinear, NunchakuT5EncoderModel, quantize_encoder

PROMPTS = ["a red apple, noto style", "a cat face, fluent style"]
LEAST_PSNR = 30.0
"""dB; what a 4-bit T5 may cost a picture."""


def draw(pipeline: Any, prompt: str) -> Any:
    return pipeline(
        prompt, generator=torch.Generator().manual_seed(0), **{**demo.defaults(), "num_inference_steps": 6}
    ).images[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo pipeline with its T5 in 4 bits, written by `save_pretrained`; not to be changed."""
    target = tmp_path_factory.mktemp("demo") / "pipeline"
    shutil.copytree(demo.PIPELINE, target)
    shutil.rmtree(target / "text_encoder_2")
    encoder = T5EncoderModel.from_pretrained(demo.PIPELINE / "text_encoder_2", dtype=torch.bfloat16)
    quantize_encoder(encoder)
    encoder.save_pretrained(target / "text_encoder_2")
    return target


@pytest.fixture(scope="module")
def pipeline16() -> Any:
    return FluxPipeline.from_pretrained(demo.PIPELINE, dtype=torch.bfloat16)


def test_plain_diffusers_loads_and_draws_the_same(folder: Path, pipeline16: Any, tmp_path: Path) -> None:
    pipeline = FluxPipeline.from_pretrained(folder, dtype=torch.bfloat16)
    assert isinstance(pipeline.text_encoder_2, T5EncoderModel)
    assert sum(isinstance(module, EncoderLinear) for module in pipeline.text_encoder_2.modules()) == 28
    pictures = {}
    for prompt in PROMPTS:
        pictures[prompt] = draw(pipeline, prompt)
        assert psnr(pictures[prompt], draw(pipeline16, prompt)) >= LEAST_PSNR
    pipeline.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["text_encoder_2"] == [
        "transformers",
        "T5EncoderModel",
    ]
    again = FluxPipeline.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert psnr(draw(again, PROMPTS[0]), pictures[PROMPTS[0]]) == 100


def test_other_prompts_draw_other_pictures(pipeline16: Any) -> None:
    """The limit above separates: with another prompt it is far from held."""
    assert psnr(draw(pipeline16, PROMPTS[0]), draw(pipeline16, PROMPTS[1])) < LEAST_PSNR - 10


def onto_cpu(onto: str) -> Callable[[Any], Any]:
    from diffusers.hooks import apply_group_offloading

    cpu = torch.device("cpu")
    options: dict[str, Any] = {"offload_type": onto}
    if onto == "block_level":
        options["num_blocks_per_group"] = 1
    return lambda model: apply_group_offloading(model, onload_device=cpu, offload_device=cpu, **options)


@pytest.mark.parametrize("how", ["cpu_offload", "sequential", "leaf_level", "block_level", "disk"])
def test_offloading_changes_no_bit(how: str, folder: Path, tmp_path: Path) -> None:
    """A machine without a GPU moves tensors from the CPU to the CPU, by the same hooks."""
    import accelerate

    model = NunchakuT5EncoderModel.from_pretrained(folder / "text_encoder_2", dtype=torch.bfloat16)
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        wanted = model(ids).last_hidden_state
        if how == "disk":
            device_map = {"shared": "cpu", "encoder.embed_tokens": "cpu", "encoder.final_layer_norm": "cpu"}
            device_map |= {f"encoder.block.{i}": "cpu" if i < 2 else "disk" for i in range(4)} | {
                "encoder.dropout": "cpu"
            }
            model = T5EncoderModel.from_pretrained(
                folder / "text_encoder_2", dtype=torch.bfloat16, device_map=device_map, offload_folder=tmp_path
            )
        elif how == "cpu_offload":
            accelerate.cpu_offload_with_hook(model, torch.device("cpu"))
        elif how == "sequential":
            accelerate.cpu_offload(model, torch.device("cpu"), offload_buffers=True)
        else:
            onto_cpu(how)(model)
        assert torch.equal(model(ids).last_hidden_state, wanted)


def test_generate(tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def generate(name: str, *options: object) -> bytes:
        arguments = ["generate", PROMPTS[0], "-o", tmp_path / name, "--steps", 2, "--size", 64, *options]
        code = main([str(argument) for argument in arguments])
        assert code == 0, capsys.readouterr().err
        return (tmp_path / name).read_bytes()

    plain, four = generate("plain.png"), generate("four.png", "--t5", "4bit")
    assert plain != four
    assert generate("folder.png", "--t5", folder / "text_encoder_2") == four
    assert generate("pipeline.png", "--t5", folder) == four  # its T5 is taken
    assert generate("base.png", "--model", demo.TRANSFORMER_INT4, "--base", folder) == four
    for wrong in (demo.PIPELINE, tmp_path / "nothing.safetensors", demo.PIPELINE / "text_encoder_2"):
        code = main(["generate", PROMPTS[0], "-o", str(tmp_path / "no.png"), "--t5", str(wrong)])
        assert code == 2 and "Traceback" not in capsys.readouterr().err
    assert not (tmp_path / "no.png").exists()


def test_without_nunchaku_t5(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers.quantizers import auto

    from nunchaku_models import generation

    monkeypatch.setattr(generation, "entry_points", lambda group: [])
    monkeypatch.delitem(auto.AUTO_QUANTIZER_MAPPING, "nunchaku_w4a16")
    for options in (["--t5", "4bit"], ["--model", str(folder)]):
        assert main(["generate", PROMPTS[0], "-o", str(tmp_path / "no.png"), *options]) == 2
        assert "nunchaku-t5" in capsys.readouterr().err


def test_bench(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "t5", "--size", "large", "--tokens", "3", "--seconds", "0.01", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    assert rows["t5/w4a16/large-block/m3"]["value"] > 0 and rows["t5/w4a16/large-block/bytes"]["ratio"] > 3
    for wrong in (["--size", "huge"], ["--tokens", "0"], ["--seconds", "0"]):
        assert main(["bench", "t5", *wrong]) == 2
        assert "Traceback" not in capsys.readouterr().err
