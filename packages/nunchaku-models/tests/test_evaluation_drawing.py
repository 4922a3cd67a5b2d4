"""Prompts files, friendly and hostile; which noise and which prompt every picture gets; contact sheets."""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from nunchaku_models.evaluation.drawing import draw
from nunchaku_models.evaluation.sheet import comparison_sheet, thumbnail
from nunchaku_models.generation import call_arguments
from nunchaku_models.prompts import read_prompts

LINE = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\n\r\0\ufeff"), min_size=1, max_size=30
).map(str.strip)
PROMPTS = st.lists(LINE.filter(lambda line: line and not line.startswith("#")), min_size=2, max_size=20)


@settings(max_examples=60, deadline=None)
@given(PROMPTS, st.sampled_from(["\n", "\r\n", "\r"]), st.booleans(), st.lists(LINE, max_size=5))
def test_prompts_come_back(
    tmp_path_factory: pytest.TempPathFactory, prompts: list[str], newline: str, mark: bool, comments: list[str]
) -> None:
    lines = [part for prompt in prompts for part in (f"  {prompt}\t", "", "   ")]
    for comment in comments:
        lines[1:1] = [f" # {comment}"]
    file = tmp_path_factory.getbasetemp() / "prompts.txt"
    file.write_bytes(newline.join(lines).encode("utf-8-sig" if mark else "utf-8"))
    assert read_prompts(file) == prompts


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "0 prompts"),
        (b"\n \n# a\n#b", "0 prompts"),
        (b"only one\n# not a second", "1 prompts"),
        (b"a cat\n" * 1001, "1001 prompts"),
        (b"a cat\n\xff\xfe", "not UTF-8"),
        ("ein Käfer\nzwei".encode("utf-16"), "not UTF-8"),
        (b"a\0b\nc", "NUL"),
        (b"x" * 10_001 + b"\nb", "10,001 characters"),
        (b"\n" * (4 << 20) + b"a", "larger than"),
    ],
)
def test_prompts_files_that_are_refused(content: bytes, says: str, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=says) as caught:
        read_prompts(file, minimum=2)
    assert "prompts.txt" in str(caught.value) and len(str(caught.value)) < 400


def test_what_is_no_prompts_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "nowhere", tmp_path / "pipe", "/dev/zero", "x" * 5000):
        with pytest.raises(ValueError, match=r"is not a file|cannot be read"):
            read_prompts(path)
    assert len(read_prompts(_written(tmp_path / "most.txt", "a cat\n" * 1000))) == 1000


def _written(file: Path, text: str) -> Path:
    file.write_text(text)
    return file


class FakePipeline:
    """Writes down what it is asked for; its pictures show where their noise came from."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def set_progress_bar_config(self, **_: Any) -> None:
        pass

    def __call__(self, prompt: list[str], generator: list[torch.Generator], **rest: Any) -> Any:
        self.calls.append({"prompt": prompt, **rest})
        seeds = [one.initial_seed() for one in generator]
        return SimpleNamespace(images=[Image.new("RGB", (1, 1), (s // 256, s % 256, 0)) for s in seeds])


@given(st.integers(1, 12), st.integers(1, 3), st.integers(1, 13), st.sampled_from([None, "", "blurry"]))
def test_noise_depends_on_prompt_and_seed_only(count: int, seeds: int, batch: int, negative: str | None) -> None:
    pipe, prompts = FakePipeline(), [f"prompt {i}" for i in range(count)]
    arguments = {"num_inference_steps": 3, **({} if negative is None else {"negative_prompt": negative})}
    drawn = draw(pipe, prompts, seeds=seeds, batch=batch, arguments=arguments, label="", progress=False)
    noise = [[r * 256 + g for r, g, _ in (p.getpixel((0, 0)) for p in pictures)] for pictures in drawn]
    assert noise == [[1000 * seed + i for i in range(count)] for seed in range(seeds)]
    assert [prompt for call in pipe.calls for prompt in call["prompt"]] == prompts * seeds
    for call in pipe.calls:
        assert len(call["prompt"]) <= batch and call["num_inference_steps"] == 3
        assert call.get("negative_prompt") == (None if negative is None else [negative] * len(call["prompt"]))


def test_call_arguments() -> None:
    class Pipeline:
        def __call__(self, prompt: str, num_inference_steps: int, width: int, height: int) -> None: ...

    defaults = {"num_inference_steps": 20, "width": 64}
    assert call_arguments(Pipeline(), defaults) == defaults
    assert call_arguments(Pipeline(), defaults, steps=2, size=(32, 48)) == {
        "num_inference_steps": 2,
        "width": 32,
        "height": 48,
    }
    with pytest.raises(ValueError, match="Pipeline does not take guidance_scale"):
        call_arguments(Pipeline(), defaults, guidance=3.0)
    with pytest.raises(ValueError, match="does not take banana"):
        call_arguments(Pipeline(), {"banana": 1})


# ----------------------------------------------------------------- sheets


def test_thumbnails_are_small_and_keep_their_shape() -> None:
    assert thumbnail(Image.new("RGB", (1024, 512))).size == (256, 128)
    assert thumbnail(Image.new("RGBA", (64, 128))).size == (64, 128)


def test_sheet_shows_every_picture_under_its_caption_beside_its_label() -> None:
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0)]
    pictures = [Image.new("RGB", (64, 64), colour) for colour in colours]
    captions = ["a cat", "\x1b[31m\n" + "very long " * 1000]
    sheet = comparison_sheet(
        captions, {"bf16": pictures[:2], "svdq/data-free": pictures[2:]}, {"svdq/data-free": "3 dB"}
    )
    counts = {colour: count for count, colour in sheet.getcolors(1 << 20)}
    assert all(counts[colour] == 64 * 64 for colour in colours)
    pixels = sheet.load()
    centres = {}
    for x in range(sheet.width):
        for y in range(sheet.height):
            if pixels[x, y] in colours:
                centres.setdefault(pixels[x, y], (x, y))
    (a, b, c, d) = (centres[colour] for colour in colours)
    assert a[1] == b[1] < c[1] == d[1] and a[0] == c[0] < b[0] == d[0]
    assert sheet.width < 400 and sheet.height < 220
    left = sheet.crop((0, c[1], c[0], c[1] + 64))
    assert left.getcolors() is not None and len(left.getcolors()) > 1  # its label


def test_sheet_is_never_wider_than_eight_pictures() -> None:
    pictures = [Image.new("RGB", (256, 256))] * 40
    assert comparison_sheet(["x"] * 40, {"row": pictures}, {}).width < 8 * 270 + 120
