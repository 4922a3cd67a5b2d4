"""The demo that ships: complete, drawn by the stock diffusers code, and the same object in 4 bits as in 16."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from PIL import Image

from nunchaku_models import NunchakuFluxTransformer2DModel, demo
from nunchaku_models.checkpoints import SafetensorsReader
from nunchaku_models.cli.main import main
from nunchaku_models.demo.judge import classify, load_judge
from nunchaku_models.inspection import inspect_checkpoint

PROMPTS = ["blue heart", "pizza"]


@pytest.fixture(scope="module")
def pipeline() -> Any:
    pipe = FluxPipeline.from_pretrained(demo.PIPELINE, dtype=torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: Any, name: str) -> Image.Image:
    arguments = {**demo.defaults(), "num_inference_steps": 10}
    generator = torch.Generator().manual_seed(0)
    return pipe(f"{name}, noto style", generator=generator, **arguments).images[0]


def psnr(a: Image.Image, b: Image.Image) -> float:
    difference = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    return float(10 * np.log10(255**2 / np.square(difference).mean()))


@pytest.mark.parametrize("name", PROMPTS)
def test_four_bits_draw_the_same_object(pipeline: Any, name: str) -> None:
    expected = draw(pipeline, name)
    transformer = NunchakuFluxTransformer2DModel.from_pretrained(demo.TRANSFORMER_INT4)
    four_bit = FluxPipeline(**{**pipeline.components, "transformer": transformer})
    four_bit.set_progress_bar_config(disable=True)
    picture = draw(four_bit, name)
    judge = load_judge()
    assert [guesses[0].name for guesses in classify([expected, picture], *judge)] == [name, name]
    assert psnr(picture, expected) > 20


def test_file_is_what_the_command_line_says() -> None:
    summary = inspect_checkpoint(demo.TRANSFORMER_INT4)
    assert summary["precision"] == "int4"
    assert summary["form"] == "nunchaku-v1"
    assert set(summary["ranks"]) == {"32"}
    with SafetensorsReader(demo.PIPELINE / "transformer" / "diffusion_pytorch_model.safetensors") as full:
        sixteen_bit = sum(full.info(name).nbytes for name in full)
    assert summary["bytes"] < 0.5 * sixteen_bit


def test_judge_knows_enough_classes() -> None:
    model, classes = load_judge()
    assert len(classes) == len(set(classes)) >= 500
    assert model.head.out_features == len(classes)


def test_defaults_are_arguments_of_the_pipeline(pipeline: Any) -> None:
    assert {"num_inference_steps", "height", "width", "max_sequence_length"} <= set(demo.defaults())
    assert demo.defaults(Path("nowhere")) == {}


def test_command_line_default_is_the_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "a red apple, noto style", "-o", str(tmp_path / "apple.png"), "--steps", "2"]) == 0
    assert Image.open(tmp_path / "apple.png").size == (128, 128)
    said = capsys.readouterr().out
    assert "w4a8" in said and "GiB" in said and "cpu" in said
