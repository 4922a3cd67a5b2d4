"""Adapters on a whole 4-bit model: fused attention, stock attention and foreign processors see them exactly once."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from peft import LoraConfig
from PIL import Image
from safetensors.torch import save_file

import nunchaku_lora
from nunchaku_kernels.nn import QuantizedLinear
from nunchaku_models import NunchakuFluxTransformer2DModel, demo
from nunchaku_models.cli.main import main
from nunchaku_models.evaluation.metrics import psnr
from nunchaku_models.families.flux_attention import NunchakuFluxAttnProcessor

TRAINED = Path(__file__).parents[1] / "packages" / "nunchaku-lora" / "tests" / "data"


@pytest.fixture
def model() -> Iterator[Any]:
    """The demo transformer in float32, with products that do not round activations."""
    nunchaku_lora.enable()
    model = NunchakuFluxTransformer2DModel.from_pretrained(demo.TRANSFORMER_INT4).float()
    model.set_arithmetic("w4a16")
    yield model
    nunchaku_lora.disable()


def run(model: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    with torch.no_grad():
        output: torch.Tensor = model(
            hidden_states=noise(1, 8, model.config.in_channels),
            encoder_hidden_states=noise(1, 5, model.config.joint_attention_dim),
            pooled_projections=noise(1, model.config.pooled_projection_dim),
            timestep=torch.tensor([0.5]),
            img_ids=torch.zeros(8, 3),
            txt_ids=torch.zeros(5, 3),
            return_dict=False,
        )[0]
    return output


def count_owner_calls(model: Any) -> list[int]:
    calls = [0]
    owner = model.transformer_blocks[0].attn.to_qkv
    owner.register_forward_pre_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
    return calls


def test_fused_stock_and_foreign_attention_agree(model: Any) -> None:
    plain = run(model)
    targets = ["to_q", "to_v", "add_k_proj", "to_out.0", "proj_mlp", "proj_out", "norm1.linear", "ff.net.2"]
    model.add_adapter(LoraConfig(r=5, lora_alpha=5, target_modules=targets, init_lora_weights=False), "a")
    calls = count_owner_calls(model)
    fused = run(model)
    assert calls == [1]
    assert float((fused - plain).norm() / plain.norm()) > 1e-2
    model.set_attn_processor(FluxAttnProcessor())  # knows slices only
    torch.testing.assert_close(run(model), fused, rtol=1e-3, atol=1e-4)
    assert calls == [4]

    class Doubtful(FluxAttnProcessor):
        """A processor of somebody else's, which calls what it finds."""

    model.set_attn_processor(Doubtful())
    torch.testing.assert_close(run(model), fused, rtol=1e-3, atol=1e-4)
    model.set_attn_processor(NunchakuFluxAttnProcessor())
    model.disable_lora()
    assert torch.equal(run(model), plain)
    model.enable_lora()
    model.unload_lora()
    assert torch.equal(run(model), plain)


def test_adapters_are_not_saved_with_the_model(model: Any, tmp_path: Any) -> None:
    plain = run(model)
    model.add_adapter(LoraConfig(r=4, target_modules=["to_k"], init_lora_weights=False), "a")
    model.fuse_lora()
    model.unload_lora()
    assert not torch.equal(run(model), plain)
    model.save_pretrained(tmp_path / "saved.safetensors")
    again = NunchakuFluxTransformer2DModel.from_pretrained(tmp_path / "saved.safetensors", torch_dtype=torch.float32)
    again.set_arithmetic("w4a16")
    assert torch.equal(run(again), plain)
    assert sum(bool(layer._adapters) for layer in model.modules() if isinstance(layer, QuantizedLinear)) > 0


def test_generate_draws_with_loras(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    size = 256
    down, up = torch.randn(4, size) / 16, torch.randn(size, 4)
    names = ("lora_down.weight", down), ("lora_up.weight", up), ("alpha", torch.tensor(2.0))
    save_file(
        {f"lora_unet_single_blocks_0_linear2.{name}": value for name, value in names}, tmp_path / "bad.safetensors"
    )
    down = torch.randn(4, 5 * size) / 32
    names = ("lora_down.weight", down), ("lora_up.weight", up), ("alpha", torch.tensor(2.0))
    file = tmp_path / "lora.safetensors"
    save_file({f"lora_unet_single_blocks_0_linear2.{name}": value for name, value in names}, file)
    pictures = {}
    for name, loras in {
        "plain": [],
        "none": [f"{file}:0"],
        "style": [f"{file}:2"],
        "twice": [str(file), f"{file}:1"],
    }.items():
        picture = tmp_path / f"{name}.png"
        arguments = [part for lora in loras for part in ("--lora", lora)]
        assert main(["generate", "a red apple, noto style", "-o", str(picture), "--steps", "2", *arguments]) == 0
        pictures[name] = torch.frombuffer(bytearray(Image.open(picture).convert("RGB").tobytes()), dtype=torch.uint8)
        assert f"strength {loras[0][-1]}" in capsys.readouterr().out if name == "style" else True
    assert torch.equal(pictures["plain"], pictures["none"])
    assert not torch.equal(pictures["plain"], pictures["style"])
    difference = (pictures["style"].int() - pictures["twice"].int()).abs().float()
    assert float(difference.mean()) < 2  # the same adapter at 2, and twice at 1
    code = main(["generate", "x", "-o", str(tmp_path / "x.png"), "--lora", str(tmp_path / "bad.safetensors")])
    assert code == 2
    assert "proj_out: the model has 1280 inputs, the file's adapter 256" in capsys.readouterr().err
    nunchaku_lora.disable()


def test_a_trained_style_is_drawn(tmp_path: Path) -> None:
    """The LoRAs of packages/nunchaku-lora/demo-training, trained on 16 and on 4 bits, both work on the 4-bit model."""
    drawing = Image.open(TRAINED / "twemoji-carrot.webp")
    likeness = []
    for lora in (
        [],
        ["--lora", f"{TRAINED}/twemoji-16bit.safetensors"],
        ["--lora", f"{TRAINED}/twemoji-4bit.safetensors"],
    ):
        file = tmp_path / f"{len(likeness)}.png"
        assert main(["generate", "carrot, twemoji style", "-o", str(file), "--steps", "8", "--seed", "5", *lora]) == 0
        likeness.append(psnr(Image.open(file), drawing))
    nunchaku_lora.disable()
    without, *with_style = likeness
    assert without < 15
    assert min(with_style) > 21, f"{with_style} dB"
