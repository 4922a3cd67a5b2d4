"""Train a style LoRA for the demo model, on its 16-bit or on its 4-bit transformer.

The ordinary way: PEFT's `LoraConfig`, diffusers' `add_adapter` and `save_lora_weights`, AdamW. On 4-bit layers the
rounded product runs forward, and the gradient towards the input goes through the dequantised weight.

Needs nunchaku-models for the demo, and pictures that its `demo-training/render.py` drew. Prints one JSON object with
the losses, on noise and noise levels that are the same for every run.
"""

import argparse
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import FluxPipeline, FluxTransformer2DModel
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import nunchaku_lora
from nunchaku_models import NunchakuFluxTransformer2DModel, demo
from nunchaku_models.demo.prompts import LONG_LIST, SHORT_LIST

CAPTIONS = ("{name}, {style} style", "a {name}, {style} style", "{name} in {style} style", "{style} style {name}")
CAPTION_DROPOUT = 0.1
TEXT_TOKENS = 32
ENCODED_AT_ONCE = 32
TARGETS = (
    r".*blocks\.\d+\.(attn\.(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out)"
    r"|ff\.net\.(0\.proj|2)|ff_context\.net\.(0\.proj|2)|proj_mlp|proj_out|norm\.linear|norm1\.linear"
    r"|norm1_context\.linear)"
)
"""Every linear of a FLUX block."""
HELD_OUT = SHORT_LIST[::4]
"""Objects whose drawings are never trained on: how they come out says how much is style and how much is memory."""
TRAINED = tuple(name for name in SHORT_LIST + LONG_LIST if name not in HELD_OUT)
"""As many as so small a LoRA can learn; with all drawings of the set it learns colours, but no shapes."""


@dataclass(frozen=True)
class Examples:
    """Encoded drawings of one style."""

    latents: Tensor
    """(n, 64, 64), packed and scaled"""
    text: Tensor
    """(n, captions, tokens, channels), of T5"""
    pooled: Tensor
    """(n, captions, channels), of CLIP"""

    def __len__(self) -> int:
        return len(self.latents)

    def take(self, index: Tensor, caption: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Latents, text and pooled text of some examples, each with one of its captions."""
        return self.latents[index], self.text[index, caption], self.pooled[index, caption]


@torch.no_grad()
def encode(pipe: FluxPipeline, folder: Path, rows: list[dict[str, str]]) -> Examples:
    """Latents and prompt embeddings of drawings, by the pipeline's own encoders."""
    latents, text, pooled = [], [], []
    for first in tqdm(range(0, len(rows), ENCODED_AT_ONCE), desc="encoding"):
        part = rows[first : first + ENCODED_AT_ONCE]
        pictures = np.stack([np.asarray(Image.open(folder / row["file_name"]).convert("RGB")) for row in part])
        pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2).to(pipe.device, pipe.vae.dtype) / 127.5 - 1
        scaled = (
            pipe.vae.encode(pixels).latent_dist.mean - pipe.vae.config.shift_factor
        ) * pipe.vae.config.scaling_factor
        latents.append(FluxPipeline._pack_latents(scaled, *scaled.shape))
        captions = [template.format(**row) for row in part for template in CAPTIONS]
        states, pool, _ = pipe.encode_prompt(captions, captions, max_sequence_length=TEXT_TOKENS)
        text.append(states.unflatten(0, (len(part), -1)))
        pooled.append(pool.unflatten(0, (len(part), -1)))
    return Examples(torch.cat(latents), torch.cat(text), torch.cat(pooled))


class FlowMatching:
    """Loss of a transformer that predicts `noise - latents` at `(1 - sigma) * latents + sigma * noise`."""

    def __init__(self, pipe: FluxPipeline) -> None:
        self.transformer = pipe.transformer
        self.ids = FluxPipeline._prepare_latent_image_ids(1, 8, 8, pipe.device, torch.bfloat16)

    def __call__(self, batch: tuple[Tensor, Tensor, Tensor], noise: Tensor, sigma: Tensor) -> Tensor:
        """Mean squared error, a scalar; noise (n, 64, 64), sigma (n)."""
        latents, text, pooled = batch
        (velocity,) = self.transformer(
            hidden_states=torch.lerp(latents, noise, sigma[:, None, None].to(latents.dtype)),
            encoder_hidden_states=text,
            pooled_projections=pooled,
            timestep=sigma.to(latents.dtype),
            img_ids=self.ids,
            txt_ids=torch.zeros(text.shape[1], 3, device=text.device, dtype=text.dtype),
            return_dict=False,
        )
        return F.mse_loss(velocity.float(), (noise - latents).float())

    @torch.no_grad()
    def measure(self, examples: Examples, draws: int = 8, batch: int = 128) -> float:
        """Mean loss over all examples, with evenly spread noise levels and fixed noise."""
        generator = torch.Generator().manual_seed(0)
        total = 0.0
        for draw in range(draws):
            for index in torch.arange(len(examples)).split(batch):
                spread = (torch.rand(len(index), generator=generator) + draw) / draws
                noise = torch.randn(len(index), *examples.latents.shape[1:], generator=generator)
                chosen = examples.take(index, index % len(CAPTIONS))
                loss = self(chosen, noise.to(examples.latents), spread.to(examples.latents.device))
                total += loss.item() * len(index)
        return total / (draws * len(examples))


def batches(examples: Examples, size: int, empty: tuple[Tensor, Tensor], seed: int) -> Iterator[tuple]:
    """Endless random batches of `FlowMatching`'s arguments, the same for a seed on every device."""
    generator = torch.Generator().manual_seed(seed)
    like = examples.latents
    while True:
        index = torch.randint(len(examples), (size,), generator=generator)
        caption = torch.randint(len(CAPTIONS), (size,), generator=generator)
        latents, text, pooled = examples.take(index, caption)
        dropped = (torch.rand(size, generator=generator) < CAPTION_DROPOUT).to(like.device)
        text = torch.where(dropped[:, None, None], empty[0], text)
        pooled = torch.where(dropped[:, None], empty[1], pooled)
        noise = torch.randn(size, *like.shape[1:], generator=generator).to(like)
        sigma = torch.randn(size, generator=generator).sigmoid().to(like.device)
        yield (latents, text, pooled), noise, sigma


def main() -> None:
    """Train, measure, write one LoRA file in diffusers' format."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="image folder of render.py")
    parser.add_argument("--style", default="twemoji", help="style to learn (default: %(default)s)")
    parser.add_argument("--bits", type=int, choices=(4, 16), required=True, help="of the transformer it is trained on")
    parser.add_argument("-o", "--output", type=Path, required=True, help="LoRA file to write (.safetensors)")
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=4e-3)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    torch.manual_seed(arguments.seed)
    torch.backends.cuda.enable_cudnn_sdp(False)  # its backward fails at these lengths
    device = "cuda" if torch.cuda.is_available() else "cpu"
    nunchaku_lora.enable()
    transformer = (
        FluxTransformer2DModel.from_pretrained(demo.PIPELINE / "transformer", torch_dtype=torch.bfloat16)
        if arguments.bits == 16
        else NunchakuFluxTransformer2DModel.from_pretrained(demo.TRANSFORMER_INT4, torch_dtype=torch.bfloat16)
    )
    pipe = FluxPipeline.from_pretrained(demo.PIPELINE, transformer=transformer, torch_dtype=torch.bfloat16).to(device)

    rows = [json.loads(line) for line in (arguments.data / "metadata.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["style"] == arguments.style]
    trained = encode(pipe, arguments.data, [row for row in rows if row["name"] in TRAINED])
    held_out = encode(pipe, arguments.data, [row for row in rows if row["name"] in HELD_OUT])
    with torch.no_grad():
        empty_text, empty_pooled, _ = pipe.encode_prompt("", "", max_sequence_length=TEXT_TOKENS)

    loss_of = FlowMatching(pipe)
    before = {"trained": loss_of.measure(trained), "held out": loss_of.measure(held_out)}
    transformer.add_adapter(
        LoraConfig(r=arguments.rank, lora_alpha=arguments.rank, target_modules=TARGETS), adapter_name=arguments.style
    )
    parameters = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.data = parameter.data.float()
    optimizer = torch.optim.AdamW(parameters, lr=arguments.learning_rate, weight_decay=0.01)
    warmup, steps = 100, arguments.steps
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / steps))
    )

    transformer.train()
    running, started = torch.zeros((), device=device), perf_counter()
    source = batches(trained, arguments.batch, (empty_text, empty_pooled), arguments.seed)
    bar = tqdm(range(steps), desc=f"{arguments.bits} bits", mininterval=5)
    for step in bar:
        loss = loss_of(*next(source))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        running.lerp_(loss.detach(), max(0.01, 1 / (step + 1)))
        if step % 100 == 0:
            bar.set_postfix_str(f"loss {running.item():.4f}")
    seconds = perf_counter() - started
    transformer.eval()

    state = get_peft_model_state_dict(transformer, adapter_name=arguments.style)
    state = {key: tensor.bfloat16().contiguous() for key, tensor in state.items()}
    FluxPipeline.save_lora_weights(
        arguments.output.parent, transformer_lora_layers=state, weight_name=arguments.output.name
    )
    result = {
        "bits": arguments.bits,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "torch": torch.__version__,
        "examples": len(trained),
        "rank": arguments.rank,
        "parameters": sum(parameter.numel() for parameter in parameters),
        "steps": steps,
        "batch": arguments.batch,
        "milliseconds per step": 1e3 * seconds / steps,
        "loss before": before,
        "loss": {"trained": loss_of.measure(trained), "held out": loss_of.measure(held_out)},
        "running training loss": running.item(),
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
