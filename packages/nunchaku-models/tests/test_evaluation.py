"""`nunchaku evaluate` end to end: the demo's rows, two pipelines, and what is refused."""

import json
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from PIL import Image

from nunchaku_models import NunchakuFluxTransformer2DModel, demo
from nunchaku_models.evaluation.run import OBJECTS
from nunchaku_models.evaluation.variants import GAINS, VARIANTS, Recipe, select

Cli = Callable[..., tuple[int, str, str]]
FEW = ("--num-prompts", 2, "--steps", 2, "--quiet")


def values(text: str) -> dict[str, float]:
    """Name -> value of a JSON report, whose shape is checked."""
    report = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert set(report) == {"machine", "commit", "rows"}
    assert all(set(row) == {"name", "value", "unit", "baseline", "ratio"} for row in report["rows"])
    names = [row["name"] for row in report["rows"]]
    assert len(names) == len(set(names))
    return {row["name"]: row["value"] for row in report["rows"]}


def drawn(pipe: Any, names: list[str]) -> list[Any]:
    """The demo's pictures as arrays, drawn without the code under test."""
    pipe.set_progress_bar_config(disable=True)
    arguments = {**demo.defaults(), "num_inference_steps": 2, "negative_prompt": [""] * len(names)}
    generators = [torch.Generator().manual_seed(seed) for seed in range(len(names))]
    pictures = pipe([f"{name}, noto style" for name in names], generator=generators, **arguments).images
    return [np.asarray(picture, dtype=np.float64) for picture in pictures]


# ----------------------------------------------------------------- the demo


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("work") / "files"


def test_demo(work: Path, cli: Cli, tmp_path: Path) -> None:
    sheet, rows = tmp_path / "sheet.png", ("svdq-int4-*/data-free", "w8a8*/data-free", "modulation*")
    run = ("evaluate", "--rows", *rows, "--work", work, *FEW, "--json")
    code, out, err = cli(*run, "--sheet", sheet)
    assert code == 0, err
    found = values(out)
    names = ("svdq-int4-w4a4", "svdq-int4-w4a8", "w8a8", "w8a8-modulation16", "modulation-w4a16")
    wanted = [f"{name}/data-free" for name in names]
    assert [name.removeprefix("psnr/") for name in found if re.fullmatch(r"psnr/[^/]+/[^/]+", name)] == wanted
    assert (found["setup/prompts"], found["setup/seeds"], found["setup/steps"]) == (2, 1, 2)
    assert "setup/calibration-prompts" not in found
    for row in wanted:
        for measure in ("psnr", "ssim", "semantic"):
            name = f"{measure}/{row}"
            assert found[f"{name}/ci95-low"] <= found[name] <= found[f"{name}/ci95-high"]
        assert 15 < found[f"psnr-worst/{row}"] <= found[f"psnr/{row}"] < 70
    assert 0 <= found["semantic/bf16"] <= 100
    gain = "gain/svdq-int4-w4a8/data-free-over-svdq-int4-w4a4/data-free"
    assert found[gain] == pytest.approx(found[f"psnr/{wanted[1]}"] - found[f"psnr/{wanted[0]}"], abs=0.02)
    assert found[f"{gain}/ci95-low"] <= found[gain] <= found[f"{gain}/ci95-high"]
    assert len([name for name in found if name.startswith("gain/")]) == 2 * 3
    # what only has 4-bit modulation layers bounds what has them and more
    assert found["psnr/w8a8/data-free"] < found["psnr/modulation-w4a16/data-free"] + 1
    assert found["psnr/w8a8-modulation16/data-free"] > found["psnr/w8a8/data-free"] + 3
    assert Image.open(sheet).height > 6 * 128 and Image.open(sheet).width > 2 * 128

    (file,) = work.iterdir()  # both arithmetics multiply the same file
    full = FluxPipeline.from_pretrained(demo.PIPELINE, dtype=torch.bfloat16)
    transformer = NunchakuFluxTransformer2DModel.from_pretrained(file, arithmetic="w4a4")
    objects = list(OBJECTS[:2])
    reference = drawn(full, objects)
    pictures = drawn(FluxPipeline(**{**full.components, "transformer": transformer}), objects)
    errors = [np.square(x - y).mean() for x, y in zip(pictures, reference, strict=True)]
    quality = [10 * math.log10(255**2 / error) for error in errors]
    assert found["psnr/svdq-int4-w4a4/data-free"] == pytest.approx(np.mean(quality), abs=0.01)
    assert found["psnr-worst/svdq-int4-w4a4/data-free"] == pytest.approx(min(quality), abs=0.01)


def test_files_in_the_work_folder_are_used_again(work: Path, cli: Cli) -> None:
    run = ("evaluate", "--rows", "svdq-int4-w4a8/data-free", "--work", work, *FEW)
    code, first, err = cli(*run, "--json")
    assert code == 0 and not err
    (file,) = work.iterdir()
    assert re.fullmatch(r"data-free-int4-r32-s0-[0-9a-f]{12}\.safetensors", file.name)
    before = file.stat()
    code, second, _ = cli(*run, "--json", "--seeds", 2)
    assert code == 0 and file.stat().st_mtime_ns == before.st_mtime_ns and [*work.iterdir()] == [file]
    again = values(second)
    assert again["setup/seeds"] == 2
    assert again["psnr-worst/svdq-int4-w4a8/data-free"] <= values(first)["psnr-worst/svdq-int4-w4a8/data-free"]
    assert again["psnr/svdq-int4-w4a8/data-free"] != values(first)["psnr/svdq-int4-w4a8/data-free"]
    file.write_bytes(b"damaged")
    code, out, err = cli(*run)
    assert code == 2 and not out
    one_sentence(err, file.name)
    file.unlink()


@pytest.mark.parametrize("missing", ["bitsandbytes", "torchao"])
def test_rivals_that_are_missing_are_said_to_be(missing: str, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.setitem(sys.modules, f"{missing}.quantization", None)
    rows = ["nf4-w4a16/data-free"] if missing == "bitsandbytes" else ["torchao-fp8/data-free", "torchao-int8/data-free"]
    code, out, err = cli("evaluate", "--rows", *rows, *FEW)
    assert code == 0
    for row in rows:
        assert f"{row}: not run: " in err and "install nunchaku-models[evaluate]" in err
        assert row not in out
    assert re.search(r"^\| bf16 \| +\| +\| +\| [\d.]+ \[[\d.]+, [\d.]+\] % \|$", out, re.MULTILINE)


@pytest.mark.parametrize(("package", "row"), [("bitsandbytes", "nf4-w4a16"), ("torchao", "torchao-int8")])
def test_rivals_that_are_there(package: str, row: str, cli: Cli) -> None:
    pytest.importorskip(package)
    code, out, err = cli("evaluate", "--rows", f"{row}/*", *FEW, "--json")
    assert code == 0, err
    assert 20 < values(out)[f"psnr/{row}/data-free"] < 60


def test_the_table_of_rows() -> None:
    rows = [variant.row for variant in VARIANTS]
    assert len(rows) == len(set(rows))
    assert {row for pair in GAINS for row in pair} <= set(rows)
    assert len(GAINS) == len(set(GAINS)) and all(better != worse for better, worse in GAINS)
    assert [variant.row for variant in select([])] == rows
    assert [variant.row for variant in select(["w8a8/*", "rtn-*"])] == [
        row for row in rows if row.startswith(("rtn-", "w8a8/"))
    ]
    recipes = {variant.recipe for variant in VARIANTS if variant.recipe}
    names = {(recipe.file_name(n, s, d)) for recipe in recipes for n in (8, 64) for s in (0, 1) for d in ("a", "b")}
    # a data-free file does not depend on the number of calibration prompts
    assert len(names) == sum(8 if recipe.calibrated else 4 for recipe in recipes)


def test_arguments_of_the_quantiser() -> None:
    assert Recipe("data-free").arguments(9) == {"precision": "int4", "rank": 32}
    assert Recipe("rtn", rank=0).arguments(9) == {"precision": "int4", "rank": 0, "recipe": "rtn"}
    assert Recipe("svdquant", "nvfp4", gptq=True).arguments(9) == {
        "precision": "nvfp4",
        "rank": 32,
        "recipe": "svdquant",
        "calibrate": 9,
        "gptq": True,
    }


# ----------------------------------------------------------------- two pipelines


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.txt"
    file.write_text("# what to draw\na cat\n\na dog\na 🦊\n")
    return file


@pytest.fixture
def compare(cli: Cli, prompts: Path) -> Cli:
    def run(model: object, reference: object, *options: object) -> tuple[int, str, str]:
        return cli(
            "evaluate", "--model", model, "--reference", reference, "--prompts", prompts, "--steps", 2, "--size", 32,
            "--quiet", *options,
        )  # fmt: skip

    return run


def test_pipelines(int4_file: Path, pipeline_folder: Path, compare: Cli, tmp_path: Path) -> None:
    sheet = tmp_path / "sheet.png"
    code, out, err = compare(int4_file, pipeline_folder, "--json", "--sheet", sheet, "--arithmetic", "w4a4")
    assert code == 0, err
    found, row = values(out), f"{int4_file.name}/w4a4"
    assert (found["setup/prompts"], found["setup/steps"]) == (3, 2)
    assert 5 < found[f"psnr/{row}/ci95-low"] <= found[f"psnr/{row}"] <= found[f"psnr/{row}/ci95-high"] < 60
    assert found[f"ssim/{row}"] <= 1 and not [name for name in found if name.startswith(("semantic", "gain"))]
    assert Image.open(sheet).width > 3 * 32
    for same in (("--base", pipeline_folder), ("--batch", 1)):
        code, out, err = compare(int4_file, pipeline_folder, "--json", "--arithmetic", "w4a4", *same)
        assert code == 0 and values(out) == found, err


def test_a_pipeline_against_itself(pipeline_folder: Path, compare: Cli) -> None:
    code, out, err = compare(pipeline_folder, pipeline_folder, "--seeds", 2, "--batch", 2)
    assert code == 0, err
    assert "3 prompts x 2 seeds, 2 steps, against the bf16 pictures" in out
    assert "| pipeline/bf16 | 100.0 [100.0, 100.0] dB | 100.0 dB | 1.000 [1.000, 1.000] |" in out.splitlines()


def test_a_transformer_as_reference(
    pipeline_folder: Path, make_transformer: Callable[..., Any], compare: Cli, tmp_path: Path
) -> None:
    code, out, err = compare(pipeline_folder, pipeline_folder / "transformer", "--base", pipeline_folder)
    assert code == 0 and "| 100.0 [100.0, 100.0] dB |" in out, err
    changed = make_transformer()
    with torch.no_grad():
        for value in changed.parameters():
            value.mul_(1.05)
    changed.save_pretrained(tmp_path / "changed")
    code, out, err = compare(pipeline_folder, tmp_path / "changed", "--base", pipeline_folder, "--json")
    assert code == 0 and values(out)["psnr/pipeline/bf16"] < 60, err
    make_transformer(num_single_layers=1).save_pretrained(tmp_path / "other")
    code, out, err = compare(pipeline_folder, tmp_path / "other", "--base", pipeline_folder)
    assert code == 2 and not out
    one_sentence(err, "not of the same architecture")


# ----------------------------------------------------------------- what is refused


def one_sentence(err: str, *words: str) -> None:
    """stderr ends with one line for the user, which says what it should, and no traceback."""
    lines = [line for line in err.splitlines() if line.startswith("nunchaku:")]
    assert len(lines) == 1 and lines[0].startswith("nunchaku: error: "), err
    assert "Traceback" not in err and len(lines[0]) < 900
    for word in words:
        assert re.search(word, lines[0]), lines[0]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--rows", "svdq-int3"), r"no row matches 'svdq-int3'; there are rtn-int4-w4a4/data-free"),
        (("--num-prompts", 0), "--num-prompts"),
        (("--num-prompts", 1), "from 2 to 155 prompts"),
        (("--num-prompts", 500), "from 2 to 155 prompts"),
        (("--seeds", 0), "--seeds"),
        (("--seeds", 10**9), "--seeds"),
        (("--batch", -1), "--batch"),
        (("--calibrate", 0), "--calibrate"),
        (("--steps", 0), "steps"),
        (("--device", "warp"), "warp"),
        (("--dtype", "int8"), "int8"),
        (("--sheet", "no/sheet.png"), "does not exist"),
        (("--sheet", "sheet.gif"), "must end in"),
        (("--work", "/dev/null/x"), "--work"),
        (("--reference", "x"), "--reference needs --model"),
        (("--prompts", "x"), "--prompts needs --model"),
        (("--arithmetic", "w4a4"), "--arithmetic needs --model"),
        (("--guidance", "3"), "--guidance needs --model"),
        (("--model", "x"), "--model needs --reference"),
        (("--model", "x", "--reference", "y"), "--prompts"),
        (("--model", "x", "--reference", "y", "--prompts", "z", "--rows", "*"), "--rows is about the demo"),
        (("--model", "x", "--reference", "y", "--prompts", "z", "--work", "w"), "--work is about the demo"),
        (("--model", "x", "--reference", "y", "--prompts", "nowhere.txt"), "nowhere.txt"),
    ],
)
def test_options(options: tuple[object, ...], says: str, cli: Cli, tmp_path: Path) -> None:
    code, out, err = cli("evaluate", *options)
    assert code == 2 and not out
    one_sentence(err, says)


def test_models_that_do_not_fit(pipeline_folder: Path, int4_file: Path, compare: Cli, tmp_path: Path) -> None:
    def fails(model: object, reference: object, *options: object, says: str) -> None:
        code, out, err = compare(model, reference, *options, "--sheet", tmp_path / "sheet.png")
        assert code == 2 and not out
        one_sentence(err, says)
        assert not (tmp_path / "sheet.png").exists()

    fails(pipeline_folder, int4_file, says="is a transformer; add --base")
    fails(pipeline_folder, int4_file, "--base", pipeline_folder, says="reference must be a 16-bit model")
    fails(tmp_path / "nowhere", pipeline_folder, says="nowhere")
    fails(pipeline_folder, tmp_path / "nowhere", says="nowhere")
    fails(pipeline_folder, pipeline_folder, "--arithmetic", "w4a8", says="not quantised")
    fails(int4_file, pipeline_folder, "--arithmetic", "nvfp4", says="cannot be multiplied as 'nvfp4'")
    fails(pipeline_folder, pipeline_folder, "--size", "100", says="multiples of 16")
