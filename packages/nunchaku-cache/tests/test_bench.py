"""The benchmark: fronts and comparisons against slow definitions, and a whole sweep of a tiny model."""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from nunchaku_cache.bench import command, settings
from nunchaku_cache.bench import sweep as sweeping
from nunchaku_cache.bench.measure import SAME, Bench, Conditions, full_float32, psnr_unrounded
from nunchaku_cache.bench.results import Results
from nunchaku_cache.bench.settings import OURS, RIVALS, Setting
from nunchaku_cache.bench.sweep import SPEEDS, Failure, Point, compare, front, psnr_at, spread, sweep

Case = Any
PROPERTY = hypothesis_settings(deadline=None, max_examples=60)
STEPS = 8
CONDITIONS = Conditions(prompts=3, calibration=2, settings=2, batch=2, rounds=1, device="cpu")

SPEED = st.floats(1, 5).map(lambda x: round(x, 1))
DECIBELS = st.floats(20, 80).map(lambda x: round(x, 0))  # coarse, so that points tie


@st.composite
def a_point(draw: st.DrawFn) -> Point:
    method = draw(st.sampled_from(["ours-scheduled", "ours-first-block", "cache-dit", "diffusers-magcache"]))
    dtype, steps = draw(st.sampled_from([("bfloat16", 20), ("float32", 20), ("float32", 28)]))
    speed, wall = draw(SPEED), draw(SPEED)
    return Point(dtype, steps, method, "", speed, wall, draw(DECIBELS), 0, draw(DECIBELS), 0)


POINTS = st.lists(a_point(), max_size=12)


def slow_front(points: Sequence[Point], speed: str, psnr: str) -> list[tuple[float, float]]:
    pairs = {(getattr(p, speed), getattr(p, psnr)) for p in points if p.speed > 1}
    return sorted(a for a in pairs if not any(a != b and b[0] >= a[0] and b[1] >= a[1] for b in pairs))


def slow_psnr_at(line: Sequence[tuple[float, float]], speed: float) -> float | None:
    if not line or speed > line[-1][0]:
        return None
    return float(np.interp(speed, *zip(*line, strict=True)))


@PROPERTY
@given(points=POINTS, speed=st.sampled_from(["speed", "wall"]), psnr=st.sampled_from(["psnr", "unrounded"]))
def test_front(points: list[Point], speed: Any, psnr: Any) -> None:
    assert front(points, speed, psnr) == slow_front(points, speed, psnr)


@PROPERTY
@given(points=POINTS, speed=SPEED)
def test_psnr_at_a_speed(points: list[Point], speed: float) -> None:
    line = front(points)
    assert psnr_at(line, speed) == pytest.approx(slow_psnr_at(line, speed))


@PROPERTY
@given(points=POINTS)
def test_comparison(points: list[Point]) -> None:
    expected = {}
    for dtype, steps in {(p.dtype, p.steps) for p in points}:
        for axis, psnr, unit, suffix in [
            ("speed", "psnr", "x", ""),
            ("speed", "unrounded", "x", "/unrounded"),
            ("wall", "psnr", "x-time", ""),
        ]:
            for speed in SPEEDS:
                at = {}
                for method in (*OURS, *RIVALS):
                    these = [p for p in points if (p.dtype, p.steps, p.method) == (dtype, steps, method)]
                    at[method] = slow_psnr_at(slow_front(these, axis, psnr), speed)
                rivals = [value for method, value in at.items() if method in RIVALS and value is not None]
                for method in OURS:
                    value = at[method]
                    if value is not None:
                        name = f"cache/{dtype}/steps{steps}/{speed:g}{unit}/{method}{suffix}"
                        expected[name] = value, max(rivals, default=None)
    rows = list(compare(points))
    assert {row.name for row in rows} == set(expected) and len(rows) == len(expected)
    for row in rows:
        value, rival = expected[row.name]
        assert row.value == pytest.approx(value) and row.unit == "dB"
        if rival is None:
            assert row.baseline is None and row.ratio is None
        else:
            assert row.baseline is not None and row.baseline.split(": ")[0] in RIVALS
            assert row.baseline.endswith(f" {rival:.2f} dB")
            assert row.ratio == pytest.approx(10 ** (value / 10) / 10 ** (rival / 10))


@PROPERTY
@given(count=st.integers(0, 60), most=st.none() | st.integers(1, 70))
def test_spread(count: int, most: int | None) -> None:
    chosen = spread(range(count), most)
    assert chosen == sorted(set(chosen)) and set(chosen) <= set(range(count))
    assert len(chosen) == (count if most is None else min(count, most))
    if len(chosen) > 1:
        assert chosen[0] == 0 and chosen[-1] == count - 1
        gaps = np.diff(chosen)
        assert gaps.max() - gaps.min() <= 1


@PROPERTY
@given(level=st.floats(1e-5, 1), seed=st.integers(0, 99))
def test_psnr_of_unrounded_pictures(level: float, seed: int) -> None:
    reference = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(seed))
    signs = torch.where(reference < 0.5, 1.0, -1.0).double()
    assert psnr_unrounded(reference.double() + level * signs, reference) == pytest.approx(
        -20 * np.log10(level), abs=1e-6
    )
    assert psnr_unrounded(reference, reference) == SAME


def test_float32_is_full_while_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with full_float32():
            assert not torch.backends.cudnn.allow_tf32 and torch.get_float32_matmul_precision() == "highest"
        assert torch.backends.cudnn.allow_tf32 and torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


class FluxTinyPipeline(FluxPipeline):
    """Its text encoder is a random number generator."""

    def encode_prompt(self, prompt: list[str], **_: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        dtype = self.transformer.dtype
        generators = [torch.Generator().manual_seed(len(text)) for text in prompt]
        embeds = torch.stack([torch.randn(5, 24, generator=generator) for generator in generators])
        pooled = torch.stack([torch.randn(20, generator=generator) for generator in generators])
        return embeds.to(dtype), pooled.to(dtype), torch.zeros(5, 3, dtype=dtype)


class TinyDemo:
    """A random FLUX that draws 32x32 pixels."""

    def __init__(self, flux: Case) -> None:
        self.flux = flux
        self.pipelines: list[FluxPipeline] = []

    def pipeline(self, dtype: torch.dtype) -> FluxPipeline:
        torch.manual_seed(1)
        vae = AutoencoderKL(
            latent_channels=2,
            block_out_channels=(8, 8),
            down_block_types=["DownEncoderBlock2D"] * 2,
            up_block_types=["UpDecoderBlock2D"] * 2,
            norm_num_groups=4,
            scaling_factor=1.0,
            shift_factor=0.0,
        )
        made = FluxTinyPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(),
            vae=vae,
            text_encoder=None,
            tokenizer=None,
            text_encoder_2=None,
            tokenizer_2=None,
            transformer=self.flux.make(),
        ).to(dtype)
        self.pipelines.append(made)
        return made

    def arguments(self) -> dict[str, Any]:
        return {"height": 16, "width": 16, "negative_prompt": "", "true_cfg_scale": 2.0, "num_inference_steps": 99}

    def prompts(self) -> list[str]:
        return ["a", "bb", "ccc", "dddd"]

    def calibration_prompts(self) -> list[str]:
        return ["eeeee", "ffffff", "ggggggg"]

    def psnr(self, picture: Any, reference: Any) -> float:
        error = np.square(np.asarray(picture, float) - np.asarray(reference, float)).mean()
        return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))

    def ssim(self, picture: Any, reference: Any) -> float:
        return 1.0


@pytest.fixture
def tiny_demo(flux: Case) -> TinyDemo:
    return TinyDemo(flux)


@pytest.fixture
def only_scheduled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Less to measure where it does not matter what."""
    for methods in (OURS, RIVALS):
        for method in set(methods) - {"ours-scheduled"}:
            monkeypatch.delitem(methods, method)


def test_flops_are_those_of_the_linears_in_the_blocks(tiny_demo: TinyDemo) -> None:
    bench = Bench(tiny_demo, dtype=torch.float32, steps=STEPS, conditions=CONDITIONS)
    width, text, image = 32, 5, 16
    modulation = 6 * width * width  # once per sample, for each stream of a joint block
    joint = (text + image) * width * (4 * width + 2 * 4 * width) + 2 * modulation
    single = (text + image) * width * (3 * width + 4 * width + 5 * width) + 3 * width * width
    passes = 2 * STEPS * CONDITIONS.prompts  # with guidance
    assert bench.plain.flops == 2 * passes * (2 * joint + 3 * single)


def test_a_sweep(tiny_demo: TinyDemo) -> None:
    call = FluxTinyPipeline.__call__
    seen: list[tuple[str, int]] = []
    found = list(
        sweep(
            tiny_demo,
            dtype="float32",
            steps=STEPS,
            conditions=CONDITIONS,
            on_setting=lambda name, total: seen.append((name, total)),
        )
    )
    assert FluxTinyPipeline.__call__ is call, "a rival has changed the class of everybody's pipelines"
    assert len(tiny_demo.pipelines) == 1
    points = [point for point in found if isinstance(point, Point)]
    failed = {failure.method for failure in found if isinstance(failure, Failure)}
    assert failed <= {"cache-dit"}, "an extra, which may be missing"
    assert {point.method for point in points} | failed == {*OURS, *RIVALS}
    assert len(points) == 2 * len({point.method for point in points}) == len(seen)
    assert {total for _, total in seen} == {len(points)}
    for point in points:
        assert (point.dtype, point.steps) == ("float32", STEPS)
        assert point.speed >= 1 and point.wall > 0
        assert point.worst <= point.psnr <= 100 and point.ssim == 1
        if point.speed == 1:
            assert point.unrounded == SAME, f"{point} skipped nothing"
    scheduled = [point for point in points if point.method == "ours-scheduled"]
    assert [point.speed for point in scheduled] == [8 / 6, 8 / 2]
    assert scheduled[0].unrounded > scheduled[1].unrounded


def test_the_same_pictures_whatever_the_batch(tiny_demo: TinyDemo) -> None:
    drawn = []
    for batch in (1, 3):
        conditions = Conditions(prompts=3, calibration=1, settings=1, batch=batch, rounds=2, device="cpu")
        bench = Bench(tiny_demo, dtype=torch.float32, steps=2, conditions=conditions)
        drawn.append(bench.plain)
    assert drawn[0].flops == drawn[1].flops
    for one, other in zip(drawn[0].pictures, drawn[1].pictures, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4)


def refuses(pipe: Any) -> None:
    raise LookupError("of no use here")


def spoils(pipe: Any) -> None:
    pipe.transformer.register_forward_hook(lambda module, inputs, outputs: (outputs[0] * float("nan"),))


def no_settings(bench: Bench) -> Iterator[Setting]:
    raise ImportError("not installed")


def test_errors_of_rivals_are_listed(
    tiny_demo: TinyDemo, only_scheduled: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(RIVALS, "missing", no_settings)
    monkeypatch.setitem(RIVALS, "refuses", lambda bench: iter([Setting("this one", refuses)]))
    monkeypatch.setitem(RIVALS, "spoils", lambda bench: iter([Setting("that one", spoils)]))
    found = list(sweep(tiny_demo, dtype="float32", steps=4, conditions=CONDITIONS))
    assert [one for one in found if isinstance(one, Failure)] == [
        Failure("float32", 4, "missing", "", "ImportError: not installed"),
        Failure("float32", 4, "refuses", "this one", "LookupError: of no use here"),
        Failure("float32", 4, "spoils", "that one", "FloatingPointError: pictures with values that are not finite"),
    ]
    assert len(found) == 5


@pytest.mark.parametrize("listing", [no_settings, lambda bench: iter([Setting("this one", refuses)])])
def test_errors_of_ours_are_raised(
    listing: Callable[[Bench], Iterator[Setting]],
    tiny_demo: TinyDemo,
    only_scheduled: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(OURS, "ours-scheduled", listing)
    with pytest.raises((ImportError, LookupError)):
        list(sweep(tiny_demo, dtype="float32", steps=4, conditions=CONDITIONS))


@PROPERTY
@given(points=POINTS)
def test_results_come_back_from_their_file(points: list[Point], tmp_path_factory: pytest.TempPathFactory) -> None:
    file = tmp_path_factory.mktemp("results") / "sweep.json"
    results = Results(CONDITIONS, points, [Failure("float32", 4, "cache-dit", "", "no")])
    results.save(file)
    assert Results.load(file) == results
    assert [path.name for path in file.parent.iterdir()] == ["sweep.json"]
    written = json.loads(file.read_text())
    assert {"machine", "commit", "rows"} < set(written) and len(written["rows"]) == len(list(compare(points)))
    asked = ["float32", "bfloat16"], [28, 20]
    missing = results.missing(*asked)
    assert missing == [
        (d, s) for d in asked[0] for s in asked[1] if not any((p.dtype, p.steps) == (d, s) for p in points)
    ]


Run = Callable[..., int]


@pytest.fixture
def run(tiny_demo: TinyDemo, monkeypatch: pytest.MonkeyPatch) -> Run:
    """The program, on the tiny model."""
    monkeypatch.setitem(sys.modules, "tiny_demo", tiny_demo)
    fixed = ("--demo", "tiny_demo", "--dtype", "float32", "--prompts", "2", "--settings", "2")

    def call(*arguments: Any) -> int:
        return command.main([*fixed, *map(str, arguments)])

    return call


def test_command(
    run: Run, only_scheduled: None, tiny_demo: TinyDemo, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from PIL import Image

    file, plot = tmp_path / "sweep.json", tmp_path / "sweep.png"
    assert run("--steps", 4, "--output", file, "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert set(printed) == {"machine", "commit", "rows"}
    assert printed["rows"] == json.loads(file.read_text())["rows"]
    assert {row["name"] for row in printed["rows"]} >= {"cache/float32/steps4/1.5x/ours-scheduled"}

    first = Results.load(file)
    assert run("--steps", 4, 5, "--output", file, "--plot", plot, "--resume") == 0
    assert "| cache/float32/steps5/" in capsys.readouterr().out
    both = Results.load(file)
    assert both.points[: len(first.points)] == first.points, "measured again"
    assert {point.steps for point in both.points} == {4, 5} and len(tiny_demo.pipelines) == 2
    with Image.open(plot) as picture:
        darkest, lightest = picture.convert("L").getextrema()
        assert picture.format == "PNG" and darkest < 128 and lightest == 255

    written = file.read_bytes()
    assert run("--steps", 4, 5, "--output", file, "--resume", "--prompts", 1) == 2
    assert "--prompts 2" in capsys.readouterr().err
    assert file.read_bytes() == written and len(tiny_demo.pipelines) == 2


def test_an_interruption_leaves_what_was_measured(
    run: Run, only_scheduled: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "sweep.json"
    scheduled = settings.OURS["ours-scheduled"]

    def until_5(bench: Bench) -> Iterator[Setting]:
        if bench.steps == 5:
            raise KeyboardInterrupt
        return scheduled(bench)

    monkeypatch.setitem(OURS, "ours-scheduled", until_5)
    with pytest.raises(KeyboardInterrupt):
        run("--steps", 4, 5, "--output", file)
    assert {point.steps for point in Results.load(file).points} == {4}


def test_what_rivals_print_is_not_our_output(
    run: Run, only_scheduled: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(RIVALS, "loud", lambda bench: iter([Setting("", lambda pipe: print("here I am"))]))
    assert run("--steps", 4, "--json") == 0
    out, err = capsys.readouterr()
    assert "here I am" in err and json.loads(out)["rows"]


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("--steps", "3"), "--steps must be at least 4, got 3"),
        (("--batch", "0"), "--batch"),
        (("--prompts", "5"), "has 4 prompts"),
        (("--resume",), "--output"),
        (("--output", "nowhere/sweep.json"), "nowhere"),
        (("--plot", "sweep.jpg"), ".png"),
        (("--demo", "no_such_module"), "no_such_module"),
    ],
)
def test_wrong_arguments(
    arguments: tuple[str, ...], word: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sweeping, "OURS", {})  # nothing is to be measured
    monkeypatch.setattr(sweeping, "RIVALS", {})
    assert run(*arguments) == 2
    assert word in capsys.readouterr().err


def test_a_file_of_something_else_is_not_resumed(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "sweep.json"
    for text in ("", "[]", '{"points": []}', '{"conditions": {"prompts": 2}, "points": [], "failures": []}'):
        file.write_text(text)
        assert run("--output", file, "--resume") == 2
        assert "does not hold results" in capsys.readouterr().err
        assert file.read_text() == text


def test_a_plot_without_matplotlib_is_refused_before_anything_is_measured(
    run: Run, tiny_demo: TinyDemo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None)
    assert run("--plot", tmp_path / "sweep.png") == 2
    assert "nunchaku-cache[bench]" in capsys.readouterr().err and not tiny_demo.pipelines


def test_no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "entry_points", lambda group: [])
    with pytest.raises(ValueError, match="install nunchaku-models"):
        command.find_demo(None)
