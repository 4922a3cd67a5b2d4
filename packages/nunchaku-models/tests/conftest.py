"""A FLUX pipeline of random weights, small enough to be made, quantised and run in seconds."""

import os
import string
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported: no test may need a network

import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5TokenizerFast

from nunchaku_models import quantize_checkpoint
from nunchaku_models.cli.main import main

torch.set_num_threads(1)  # the tensors are tiny, and a second thread waits for its core on a busy machine

TINY = {
    "patch_size": 1,
    "in_channels": 64,
    "num_layers": 1,
    "num_single_layers": 2,
    "attention_head_dim": 64,
    "num_attention_heads": 2,
    "joint_attention_dim": 256,
    "pooled_projection_dim": 128,
    "guidance_embeds": False,
    "axes_dims_rope": (8, 28, 28),
}
MakeTransformer = Callable[..., Any]


@pytest.fixture(scope="session")
def make_transformer() -> MakeTransformer:
    """Builds a random FLUX transformer in bfloat16: one joint and two single blocks of width 128, or as told."""

    def make(**changes: Any) -> Any:
        torch.manual_seed(0)
        return FluxTransformer2DModel(**{**TINY, **changes}).bfloat16().eval()

    return make


@pytest.fixture(scope="session")
def transformer16(make_transformer: MakeTransformer) -> Any:
    """The 16-bit transformer of the pipeline; not to be changed."""
    return make_transformer()


@pytest.fixture(scope="session")
def pipeline_folder(transformer16: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The 16-bit pipeline as a diffusers folder; not to be changed."""
    torch.manual_seed(1)
    vae = AutoencoderKL(
        latent_channels=16,
        block_out_channels=(8, 8, 8, 8),
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        norm_num_groups=4,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=1.0,
        shift_factor=0.0,
    )
    clip = CLIPTextConfig(
        vocab_size=100,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
        projection_dim=128,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    t5 = T5Config(
        vocab_size=100, d_model=256, d_kv=64, d_ff=256, num_layers=1, num_heads=4, feed_forward_proj="gated-gelu"
    )
    vocabulary = {"<|startoftext|>": 0, "<|endoftext|>": 1}
    for character in string.ascii_lowercase + string.digits + ",":
        for token in (character, character + "</w>"):
            vocabulary[token] = len(vocabulary)
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -1.0)]
    folder = tmp_path_factory.mktemp("tiny") / "pipeline"
    FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae.bfloat16(),
        text_encoder=CLIPTextModel(clip).bfloat16(),
        tokenizer=CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77),
        text_encoder_2=T5EncoderModel(t5).bfloat16(),
        tokenizer_2=T5TokenizerFast(
            vocab=pieces + [(character, -2.0) for character in string.ascii_lowercase], extra_ids=0
        ),
        transformer=transformer16,
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def int4_file(pipeline_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The transformer as a published int4 file of rank 32; not to be changed."""
    file = tmp_path_factory.mktemp("int4") / "transformer-int4.safetensors"
    quantize_checkpoint(pipeline_folder, file, progress=False)
    return file


@pytest.fixture(scope="session")
def nvfp4_file(pipeline_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The transformer as a published nvfp4 file of rank 16; not to be changed."""
    file = tmp_path_factory.mktemp("nvfp4") / "transformer-nvfp4.safetensors"
    quantize_checkpoint(pipeline_folder, file, precision="nvfp4", rank=16, progress=False)
    return file


@pytest.fixture(scope="session")
def forward() -> Callable[..., torch.Tensor]:
    """Calls a FLUX transformer on random inputs: `forward(model, batch, text_tokens, image_tokens, **extra)`."""

    def call(model: Any, batch: int = 1, text: int = 7, image: int = 12, *, seed: int = 0, **extra: Any) -> Any:
        generator = torch.Generator().manual_seed(seed)
        config = model.config
        dtype = extra.pop("dtype", torch.bfloat16)

        def noise(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator).to(dtype)

        ids = torch.zeros(image, 3)
        ids[:, 1], ids[:, 2] = torch.arange(image) // 4, torch.arange(image) % 4
        with torch.no_grad():
            return model(
                hidden_states=noise(batch, image, config.in_channels),
                encoder_hidden_states=noise(batch, text, config.joint_attention_dim),
                pooled_projections=noise(batch, config.pooled_projection_dim),
                timestep=torch.full((batch,), 0.7, dtype=dtype),
                img_ids=ids,
                txt_ids=torch.zeros(text, 3),
                guidance=torch.full((batch,), 3.5) if config.guidance_embeds else None,
                return_dict=False,
                **extra,
            )[0]

    return call


def relative_error(given: torch.Tensor, wanted: torch.Tensor) -> float:
    """Root mean square of the difference over that of `wanted`."""
    given, wanted = given.detach().float(), wanted.detach().float()
    return float((given - wanted).norm() / wanted.norm())


@pytest.fixture(scope="session")
def error() -> Callable[[torch.Tensor, torch.Tensor], float]:
    """`relative_error`, for tests."""
    return relative_error


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[..., tuple[int, str, str]]]:
    """Runs the command line in this process: arguments -> (exit code, stdout, stderr)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    yield run
