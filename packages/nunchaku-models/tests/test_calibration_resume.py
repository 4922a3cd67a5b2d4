"""Calibrations that were interrupted: what they leave, and what is made of that."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import nunchaku_models.calibration.run as calibration
import nunchaku_models.quantizer as quantizer
from nunchaku_models import quantize_checkpoint
from nunchaku_models.calibration.blocks import LoadedBlock
from nunchaku_models.calibration.refined import refine_block
from nunchaku_models.checkpoints import CheckpointError
from nunchaku_models.cli.main import main

PROMPTS = ["a cat", "two dogs"]
BLOCKS = ["transformer_blocks.0", "single_transformer_blocks.0", "single_transformer_blocks.1"]


def quantize(source: Path, output: Path, **options: Any) -> Any:
    """Calibrated on two small pictures, rank 16, unless told otherwise."""
    defaults: dict[str, Any] = {"calibrate": PROMPTS, "steps": 1, "size": (32, 32), "rank": 16, "progress": False}
    return quantize_checkpoint(source, output, **(defaults | options))


def fail(*_: Any, **__: Any) -> Any:
    """Stands for what must not be done again."""
    pytest.fail("done again")


def interrupt(*_: Any, **__: Any) -> Any:
    """Ctrl-C."""
    raise KeyboardInterrupt


@pytest.fixture(scope="module")
def refined(pipeline_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file that `quantize` makes when it is not interrupted."""
    file = tmp_path_factory.mktemp("refined") / "out.safetensors"
    quantize(pipeline_folder, file)
    return file


@pytest.fixture(scope="module")
def begun(pipeline_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What interrupting that quantisation at its second block left; not to be changed."""
    folder = tmp_path_factory.mktemp("begun")
    with pytest.MonkeyPatch.context() as patch:

        def interrupted(block: LoadedBlock, *rest: Any) -> Iterator[Any]:
            if block.path != BLOCKS[0]:
                raise KeyboardInterrupt
            return refine_block(block, *rest)

        patch.setattr(calibration, "refine_block", interrupted)
        (folder / "out.safetensors").write_bytes(b"earlier")
        with pytest.raises(KeyboardInterrupt):
            quantize(pipeline_folder, folder / "out.safetensors")
    return folder


@pytest.fixture
def unfinished(begun: Path, tmp_path: Path) -> Path:
    """A copy of `begun` without the earlier file: the output that is to be finished."""
    shutil.copytree(begun / "out.safetensors.calibration", tmp_path / "out.safetensors.calibration")
    return tmp_path / "out.safetensors"


def work_of(output: Path) -> Path:
    """The folder of unfinished work."""
    return output.with_name(f"{output.name}.calibration")


def contents(folder: Path) -> dict[str, bytes]:
    """Name -> bytes of a folder's files."""
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_what_an_interruption_leaves(begun: Path) -> None:
    assert sorted(entry.name for entry in begun.iterdir()) == ["out.safetensors", "out.safetensors.calibration"]
    assert (begun / "out.safetensors").read_bytes() == b"earlier"
    kept = {entry.name for entry in (begun / "out.safetensors.calibration").iterdir()}
    assert kept == {"settings.json", "calls.safetensors", f"{BLOCKS[0]}.safetensors"}


def test_finished_work_is_not_done_again(
    pipeline_folder: Path, unfinished: Path, refined: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []

    def counted(block: LoadedBlock, *rest: Any) -> Iterator[Any]:
        done.append(block.path)
        return refine_block(block, *rest)

    monkeypatch.setattr(calibration, "refine_block", counted)
    monkeypatch.setattr(calibration, "record_calls", fail)
    quantize(pipeline_folder, unfinished)
    assert done == BLOCKS[1:]
    assert unfinished.read_bytes() == refined.read_bytes()
    assert not work_of(unfinished).exists()


def test_an_interruption_while_drawing_leaves_nothing(
    pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that other settings can be tried without removing a folder."""
    monkeypatch.setattr(calibration, "record_calls", interrupt)
    with pytest.raises(KeyboardInterrupt):
        quantize(pipeline_folder, tmp_path / "out.safetensors")
    assert not any(tmp_path.iterdir())


def test_an_interruption_while_writing(
    pipeline_folder: Path, unfinished: Path, refined: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(quantizer, "_converted", interrupt)
        with pytest.raises(KeyboardInterrupt):
            quantize(pipeline_folder, unfinished)
    assert [entry.name for entry in unfinished.parent.iterdir()] == [work_of(unfinished).name]
    assert contents(work_of(unfinished)).keys() >= {f"{block}.safetensors" for block in BLOCKS}
    monkeypatch.setattr(calibration, "refine_block", fail)
    quantize(pipeline_folder, unfinished)
    assert unfinished.read_bytes() == refined.read_bytes()
    assert not work_of(unfinished).exists()


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"seed": 1}, "seed"),
        ({"rank": 32}, "rank"),
        ({"calibrate": PROMPTS[::-1]}, "prompts"),
        ({"steps": 2}, "steps"),
        ({"size": (32, 48)}, "size"),
        ({"guidance": 1.0}, "guidance"),
        ({"arithmetic": "w4a8"}, "arithmetic"),
        ({"precision": "nvfp4", "dtype": "float16"}, "dtype, precision"),
        ({"recipe": "svdquant", "gptq": True}, "gptq, recipe"),
    ],
)
def test_unfinished_work_with_other_settings(
    options: dict[str, Any], name: str, pipeline_folder: Path, unfinished: Path
) -> None:
    before = contents(work_of(unfinished))
    with pytest.raises(CheckpointError, match=rf"other settings \({name}\); remove it"):
        quantize(pipeline_folder, unfinished, **options)
    assert contents(work_of(unfinished)) == before and not unfinished.exists()


def test_unfinished_work_of_another_model(
    pipeline_folder: Path, transformer16: Any, unfinished: Path, tmp_path: Path
) -> None:
    before = contents(work_of(unfinished))
    state = {name: value.clone() for name, value in transformer16.state_dict().items()}
    state["proj_out.weight"] *= 2
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"other settings \(base, model\)"):
        quantize(tmp_path / "model.safetensors", unfinished, base=pipeline_folder)
    assert contents(work_of(unfinished)) == before


def test_a_foreign_folder_in_the_way(pipeline_folder: Path, tmp_path: Path) -> None:
    work = work_of(tmp_path / "out.safetensors")
    work.mkdir()
    (work / "holiday.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="no folder of this program"):
        quantize(pipeline_folder, tmp_path / "out.safetensors")
    assert contents(work) == {"holiday.txt": b"mine"}
    shutil.rmtree(work)
    work.write_text("mine")
    with pytest.raises(CheckpointError, match="cannot be used"):
        quantize(pipeline_folder, tmp_path / "out.safetensors")
    assert work.read_text() == "mine" and not (tmp_path / "out.safetensors").exists()


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "truncated": lambda file: file.write_bytes(file.read_bytes()[:-100]),
    "cut header": lambda file: file.write_bytes(file.read_bytes()[:50]),
    "empty": lambda file: file.write_bytes(b""),
    "text": lambda file: file.write_text("holiday " * 100),
    "other tensors": lambda file: save_file({"a": torch.zeros(1)}, file),
    "no index": lambda file: save_file({"a": torch.zeros(1)}, file, {"calls": '[{"held_out": 0}]'}),
    "no calls": lambda file: save_file({"a": torch.zeros(1)}, file, {"calls": "[]"}),
    "list": lambda file: save_file({"a": torch.zeros(1)}, file, {"calls": "[3]"}),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", ["calls", BLOCKS[0]])
def test_damaged_work(
    damage: str, name: str, pipeline_folder: Path, unfinished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "refine_block", fail)
    DAMAGE[damage](work_of(unfinished) / f"{name}.safetensors")
    with pytest.raises(CheckpointError, match=rf"{name}\.safetensors.*; remove .*\.calibration to start anew"):
        quantize(pipeline_folder, unfinished)
    assert not unfinished.exists()


def test_work_that_lacks_a_layer(pipeline_folder: Path, unfinished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found before the other blocks are worked on."""
    file = work_of(unfinished) / f"{BLOCKS[0]}.safetensors"
    tensors = load_file(file)
    save_file({name: value for name, value in tensors.items() if ".ff.net.2." not in name}, file)
    monkeypatch.setattr(calibration, "refine_block", fail)
    with pytest.raises(CheckpointError, match=r"does not hold the layer .*ff\.net\.2; remove .*\.calibration to start"):
        quantize(pipeline_folder, unfinished)


def test_damaged_settings(pipeline_folder: Path, unfinished: Path) -> None:
    (work_of(unfinished) / "settings.json").write_bytes(b"\xff{")
    with pytest.raises(CheckpointError, match="unreadable"):
        quantize(pipeline_folder, unfinished)


def test_a_device_that_is_not_there(pipeline_folder: Path, unfinished: Path) -> None:
    """Also when there is nothing left to record."""
    for device in ("warp", "cuda:99"):
        with pytest.raises(ValueError, match=f"{device}.* cannot be used here"):
            quantize(pipeline_folder, unfinished, device=device)


def test_the_command_says_that_it_can_go_on(
    pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(calibration, "refine_block", interrupt)
    output = tmp_path / "out.safetensors"
    command = ["quantize", str(pipeline_folder), "-o", str(output), "--calibrate", "2", "--steps", "1", "--size", "32"]
    assert main([*command, "--quiet"]) == 130
    said = capsys.readouterr().err
    assert f"{output}.calibration keeps what is finished" in said and "same command" in said
    monkeypatch.setattr(calibration, "record_calls", interrupt)
    assert main([*command, "--quiet", "-o", str(tmp_path / "other.safetensors")]) == 130
    assert "same command" not in capsys.readouterr().err
