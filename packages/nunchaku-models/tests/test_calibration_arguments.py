"""Calibration's arguments and command line: what is refused, in one sentence, and leaves nothing behind."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nunchaku_models import quantize_checkpoint
from nunchaku_models.checkpoints import CheckpointError

Cli = Callable[..., tuple[int, str, str]]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"recipe": "refined"}, "'refined' needs calibration prompts"),
        ({"recipe": "svdquant"}, "'svdquant' needs calibration prompts"),
        ({"recipe": "data-free", "calibrate": 2}, "'data-free' takes no calibration prompts"),
        ({"recipe": "rtn", "rank": 0, "calibrate": 2}, "'rtn' takes no calibration prompts"),
        ({"recipe": "rtn", "rank": 16}, "rank must be 0, got 16"),
        ({"recipe": "best"}, "one of rtn, data-free, svdquant, refined, got 'best'"),
        ({"gptq": True}, "GPTQ needs calibration prompts"),
        ({"calibrate": 0}, "from 1 to 3840, got 0"),
        ({"calibrate": -1}, "from 1 to 3840, got -1"),
        ({"calibrate": 3841}, "from 1 to 3840, got 3841"),
        ({"calibrate": []}, "at least one prompt"),
        ({"calibrate": "a cat"}, "a number or a sequence of prompts, got 'a cat'"),
        ({"calibrate": ["a cat", 3]}, "a sequence of prompts"),
        ({"calibrate": True}, "a sequence of prompts, got True"),
        ({"calibrate": 2.0}, "a sequence of prompts, got 2.0"),
        ({"calibrate": Path("prompts.txt")}, "a sequence of prompts"),
        ({"base": "pipeline"}, "belong to a calibration"),
        ({"arithmetic": "w4a4"}, "belong to a calibration"),
        ({"device": "cpu"}, "belong to a calibration"),
        ({"offload": True}, "belong to a calibration"),
        ({"steps": 1}, "belong to a calibration"),
        ({"size": (32, 32)}, "belong to a calibration"),
        ({"guidance": 0.0}, "belong to a calibration"),
        ({"calibrate": 2, "arithmetic": "nvfp4"}, "int4 weights cannot be multiplied as 'nvfp4'"),
        ({"calibrate": 2, "precision": "nvfp4", "arithmetic": "w4a8"}, "nvfp4 weights cannot be multiplied as 'w4a8'"),
        ({"calibrate": 2, "arithmetic": "w3a3"}, "w3a3"),
        ({"calibrate": 2, "steps": 0}, "steps"),
        ({"calibrate": 2, "steps": -1}, "steps"),
        ({"calibrate": 2, "size": (32, 33)}, "size must be"),
        ({"calibrate": 2, "size": (32,) * 3}, "size must be"),
        ({"calibrate": 2, "device": "warp"}, "warp"),
        ({"calibrate": 2, "device": "cpu", "offload": True}, "CPU"),
    ],
)
def test_arguments(options: dict[str, Any], says: str, pipeline_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=re.escape(says)):
        quantize_checkpoint(pipeline_folder, tmp_path / "out.safetensors", progress=False, **options)
    assert not any(tmp_path.iterdir())


def test_pipelines_that_are_not_enough(pipeline_folder: Path, make_transformer: Any, tmp_path: Path) -> None:
    output = tmp_path / "out" / "out.safetensors"
    output.parent.mkdir()

    def fails(model: Path, says: str, **options: Any) -> None:
        with pytest.raises((CheckpointError, ValueError), match=says):
            quantize_checkpoint(model, output, calibrate=["a"], steps=1, size=(32, 32), progress=False, **options)
        assert not any(output.parent.iterdir())

    fails(pipeline_folder / "transformer", "model_index.json")
    fails(pipeline_folder / "transformer", "nowhere", base=tmp_path / "nowhere")
    make_transformer(num_single_layers=1).save_pretrained(tmp_path / "other")
    fails(tmp_path / "other", "not of the same architecture", base=pipeline_folder)


# -------------------------------------------------------------------------------------------------------- command line


def test_a_number_of_prompts(pipeline_folder: Path, cli: Cli, tmp_path: Path) -> None:
    small = ("--steps", 1, "--size", 32, "--rank", 16, "--quiet")
    code, out, err = cli("quantize", pipeline_folder, "-o", tmp_path / "out.safetensors", "--calibrate", 2, *small)
    assert code == 0, err
    assert re.fullmatch(r"wrote .*out\.safetensors: 20 layers in int4, [\d.]+ MB \([\d.]+x smaller\), [\d.]+ s\n", out)
    assert "prompts:" not in err and "calibrate:" not in err
    assert [entry.name for entry in tmp_path.iterdir()] == ["out.safetensors"]


@pytest.mark.filterwarnings("error::tqdm.TqdmWarning")  # of a bar beyond its end
def test_a_file_of_prompts(pipeline_folder: Path, cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("# comment\na cat\n\ntwo dogs\n")
    options = ("--steps", 1, "--size", "32x32", "--rank", 0, "--recipe", "svdquant", "--gptq")
    arguments = ("quantize", pipeline_folder, "-o", tmp_path / "one.safetensors", *options)
    code, _, err = cli(*arguments, "--calibrate", tmp_path / "prompts.txt")
    assert code == 0, err
    for bar in ("calibration prompts: 100%", "calibrate: 100%", "write: 100%"):
        assert bar in err
    quantize_checkpoint(
        pipeline_folder, tmp_path / "other.safetensors", recipe="svdquant", gptq=True, rank=0, progress=False,
        calibrate=("a cat", "two dogs"), steps=1, size=(32, 32),
    )  # fmt: skip
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "other.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--calibrate", "0"), "got 0"),
        (("--calibrate", "-3"), "'-3' is not a file"),
        (("--calibrate", "9999999999"), "'9999999999' is not a file"),
        (("--calibrate", "999999999"), "got 999999999"),
        (("--calibrate", "no.txt"), "'no.txt' is not a file"),
        (("--calibrate", "2", "--recipe", "rtn", "--rank", "0"), "takes no calibration prompts"),
        (("--recipe", "refined"), "needs calibration prompts"),
        (("--gptq",), "GPTQ needs"),
        (("--steps", "2"), "belong to a calibration"),
        (("--size", "32"), "belong to a calibration"),
        (("--calibrate", "2", "--steps", "0"), "steps"),
        (("--calibrate", "2", "--size", "33"), "multiples of 16"),
        (("--calibrate", "2", "--arithmetic", "nvfp4"), "cannot be multiplied"),
        (("--calibrate", "2", "--device", "warp"), "warp"),
        (("--calibrate", "2", "--base", "no-such-folder/x/y"), "no-such-folder"),
    ],
)
def test_options(options: tuple[str, ...], says: str, pipeline_folder: Path, cli: Cli, tmp_path: Path) -> None:
    code, out, err = cli("quantize", pipeline_folder, "-o", tmp_path / "out.safetensors", *options)
    lines = [line for line in err.splitlines() if line.startswith("nunchaku:")]
    assert code == 2 and not out and "Traceback" not in err
    assert len(lines) == 1 and says in lines[0] and len(lines[0]) < 700, err
    assert not any(tmp_path.iterdir())


def test_an_empty_file_of_prompts(pipeline_folder: Path, cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("# nothing\n")
    code, _, err = cli(
        "quantize", pipeline_folder, "-o", tmp_path / "o.safetensors", "--calibrate", tmp_path / "prompts.txt"
    )
    assert code == 2 and "has 0 prompts" in err
