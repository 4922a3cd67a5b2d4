"""`nunchaku-lora`: what it says of files, what it writes, and that bad input ends in one sentence."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from nunchaku_lora.cli import main, parse_file
from nunchaku_lora.formats import Lora, ModuleLora, convert
from nunchaku_lora.formats.composing import compose, to_tensors

BLOCK = "lora_unet_double_blocks_0"


@pytest.fixture
def kohya(tmp_path: Path) -> Path:
    """A file of kohya's names: one fused projection with alpha, one MLP, a text encoder, a stray key."""
    tensors = {
        f"{BLOCK}_img_attn_qkv.lora_down.weight": torch.randn(4, 32),
        f"{BLOCK}_img_attn_qkv.lora_up.weight": torch.randn(96, 4),
        f"{BLOCK}_img_attn_qkv.alpha": torch.tensor(2.0),
        f"{BLOCK}_txt_mlp_0.lora_down.weight": torch.randn(8, 32).bfloat16(),
        f"{BLOCK}_txt_mlp_0.lora_up.weight": torch.randn(128, 8).bfloat16(),
        "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.randn(2, 8),
        "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": torch.randn(8, 2),
        "lora_te2_encoder_block_0.lora_down.weight": torch.randn(2, 8),
    }
    file = tmp_path / "kohya.safetensors"
    save_file(tensors, file)
    return file


def changes(lora: Lora) -> dict[str, torch.Tensor]:
    return {path: part.alpha / part.rank * part.up.double() @ part.down.double() for path, part in lora.modules.items()}


def test_inspect(kohya: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(kohya)]) == 0
    text = capsys.readouterr().out
    assert "kohya format, 8 keys" in text
    assert "rank 4 (3x), 8 (1x)" in text
    assert "transformer_blocks.*.attn.to_q" in text
    assert "left over: 1 keys" in text
    assert main(["inspect", str(kohya), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["layers"]["transformer_blocks.0.attn.to_q"] == {"rank": 4, "alpha": 2.0}
    assert found["text_encoder"] == 1
    assert len(found["skipped"]) == 1


@pytest.mark.parametrize("dtype", [None, "bfloat16", "float32"])
def test_convert(kohya: Path, tmp_path: Path, dtype: str | None) -> None:
    output = tmp_path / "out.safetensors"
    assert main(["convert", str(kohya), "-o", str(output), *(["--dtype", dtype] if dtype else [])]) == 0
    tensors = load_file(output)
    before, after = convert(load_file(kohya)), convert(tensors)
    assert after.format == "diffusers"
    assert not after.skipped
    assert set(after.modules) == set(before.modules)
    for path, change in changes(before).items():
        error = (changes(after)[path] - change).norm() / change.norm()
        assert float(error) < (1e-2 if dtype == "bfloat16" else 1e-12)
    if dtype:
        assert {str(v.dtype) for k, v in tensors.items() if "lora_" in k} == {f"torch.{dtype}"}


@given(strengths=st.lists(st.sampled_from([-1.0, 0.0, 0.5, 1.0, 2.0]), min_size=1, max_size=4), seed=st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_compositions_add_up(strengths: list[float], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for i, strength in enumerate(strengths):
        lora = Lora("test")
        for path, width in (("a", 6), ("x_embedder", 6 + i), (f"only.{i}", 3)):
            rank = 1 + (seed + i) % 3
            down, up = torch.randn(rank, width, generator=generator), torch.randn(5, rank, generator=generator)
            lora.modules[path] = ModuleLora(down, up, 1.5, torch.randn(5, generator=generator))
        parts.append((lora, strength))
    whole = compose(parts)
    again = convert(to_tensors(whole), linears=None)
    for lora in (whole, again):
        for path in lora.modules:
            expected = torch.zeros(5, lora.modules[path].down.shape[1], dtype=torch.float64)
            bias = torch.zeros(5)
            for part, strength in parts:
                if path in part.modules:
                    change = changes(part)[path]
                    expected[:, : change.shape[1]] += strength * change
                    bias += strength * part.modules[path].bias
            torch.testing.assert_close(changes(lora)[path], expected, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(lora.modules[path].bias, bias, rtol=1e-4, atol=1e-4)


def test_compose(kohya: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "both.safetensors"
    assert main(["compose", f"{kohya}:0.5", str(kohya), "-o", str(output)]) == 0
    assert "rank 8 (3x), 16 (1x)" in capsys.readouterr().out
    single, both = changes(convert(load_file(kohya))), changes(convert(load_file(output)))
    for path, change in single.items():
        torch.testing.assert_close(both[path], 1.5 * change, rtol=1e-2, atol=1e-2)


def test_what_cannot_be_composed(tmp_path: Path) -> None:
    down, up = torch.ones(1, 4), torch.ones(4, 1)
    plain, other = Lora("a", {"m": ModuleLora(down, up, 1.0)}), Lora("b", {"m": ModuleLora(torch.ones(1, 5), up, 1.0)})
    with pytest.raises(ValueError, match="m: the LoRAs are for different models, 4 x 5 and 4 x 4"):
        compose([(plain, 1.0), (other, 1.0)])
    with pytest.raises(ValueError, match="DoRA cannot be composed"):
        compose([(Lora("a", {"m": ModuleLora(down, up, 1.0, dora=torch.ones(4))}), 1.0)])
    norms = [Lora("a", vectors={"n": torch.full((2,), float(i))}) for i in range(2)]
    with pytest.raises(ValueError, match="n: two of the LoRAs replace this norm"):
        compose([(norm, 1.0) for norm in norms])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.safetensors", ("a.safetensors", 1.0)),
        ("a.safetensors:0.8", ("a.safetensors", 0.8)),
        ("a.safetensors:-1e-1", ("a.safetensors", -0.1)),
        ("C:/lora/a.safetensors", ("C:/lora/a.safetensors", 1.0)),
        ("a:b:.5", ("a:b", 0.5)),
    ],
)
def test_strengths_on_the_command_line(text: str, expected: tuple[str, float]) -> None:
    assert parse_file(text) == expected


def test_bad_input_ends_in_one_sentence(kohya: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    published = tmp_path / "published.safetensors"
    save_file({"transformer_blocks.0.qkv_proj.lora_down": torch.zeros(128, 16)}, published)
    output = str(tmp_path / "out.safetensors")
    bad: list[tuple[list[Any], str]] = [
        (["inspect", tmp_path / "absent.safetensors"], "does not exist"),
        (["inspect", published], "is a published fused file"),
        (["convert", kohya, "-o", tmp_path / "out.bin"], "must end in .safetensors"),
        (["convert", kohya, "-o", tmp_path / "no" / "out.safetensors"], "cannot be written"),
        (["convert", kohya, "-o", output, "--strict"], "1 keys left over"),
    ]
    for arguments, message in bad:
        assert main([str(argument) for argument in arguments]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert not Path(output).exists()


@pytest.mark.parametrize("strength", ["x", "nan", "1,5", ""])
def test_strengths_that_are_no_numbers_are_said_so(kohya: Path, strength: str) -> None:
    with pytest.raises(ValueError, match="must be a number"):
        parse_file(f"{kohya}:{strength}")
