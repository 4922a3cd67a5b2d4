"""Train the transformer and both text encoders together, and write the whole pipeline.

Flow matching on cached latents: ``x = (1 - sigma) * latents + sigma * noise``, the model predicts
``noise - latents``. Every tenth caption is empty, for classifier-free guidance. The stock pipeline
pads the prompt and masks nothing, so a few percent of the steps train with longer padding.

One step is a thousand small kernels, far more than the host can launch in time: the repeated blocks
are compiled and the whole step, sampling and optimiser included, is replayed as a CUDA graph, one
graph per text length.
"""

import argparse
import copy
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter

import torch
from data import Renderings, describe, draw_table, load_renderings
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from schedule import train_for
from text import build_clip, build_t5, train_clip_tokenizer, train_t5_tokenizer
from torch import Tensor, nn
from train_vae import encode_mean
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

GENERATION_DEFAULTS = {
    "num_inference_steps": 20,
    "true_cfg_scale": 1.5,
    "negative_prompt": "",
    "height": 128,
    "width": 128,
    "max_sequence_length": 32,
}

CAPTION_TOKENS = 32
"""Captions are cut here; padding to a longer text length comes on top."""

CLIP_TOKENS = 40
"""CLIP is causal and pooled at the end mark, so padding beyond the captions changes nothing."""

CAPTION_DROPOUT = 0.1


@dataclass(frozen=True)
class TextLength:
    """T5 tokens per prompt, how many pictures then fit a batch, and the share of steps."""

    tokens: int
    batch: int
    share: float


TEXT_LENGTHS = (
    TextLength(32, 256, 0.94),
    TextLength(128, 128, 0.03),
    TextLength(512, 64, 0.03),
)


def build_transformer() -> FluxTransformer2DModel:
    """Two joint and six single blocks of 256 channels, 11.1 M parameters.

    Modulations and the output start at zero, so every block starts as the identity.
    """
    transformer = FluxTransformer2DModel(
        in_channels=64,
        num_layers=2,
        num_single_layers=6,
        attention_head_dim=128,
        num_attention_heads=2,
        joint_attention_dim=256,
        pooled_projection_dim=128,
        guidance_embeds=False,
        axes_dims_rope=(16, 56, 56),
    )
    for name, module in transformer.named_modules():
        if isinstance(module, nn.Linear) and (name.endswith(("norm.linear", "norm1.linear", "norm1_context.linear"))):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    nn.init.zeros_(transformer.norm_out.linear.weight)
    nn.init.zeros_(transformer.proj_out.weight)
    nn.init.zeros_(transformer.proj_out.bias)
    return transformer


def cache_latents(vae: AutoencoderKL, pictures: Tensor) -> Tensor:
    """Scaled and packed latents (N, 64, 64) of every picture."""
    latents = (encode_mean(vae, pictures) - vae.config.shift_factor) * vae.config.scaling_factor
    return FluxPipeline._pack_latents(latents, *latents.shape)


class Captions(nn.Module):
    """Token tables on the device; draws ready batches without a host synchronisation."""

    clip_ids: Tensor
    t5_ids: Tensor
    empty_clip_ids: Tensor
    empty_t5_ids: Tensor

    def __init__(
        self,
        clip_tokenizer: CLIPTokenizer,
        t5_tokenizer: T5TokenizerFast,
        renderings: Renderings,
        variants: int,
        seed: int,
    ) -> None:
        super().__init__()
        rng = random.Random(seed)
        texts = [
            describe(name, style, rng)
            for name, style in zip(renderings.names, renderings.styles, strict=True)
            for _ in range(variants)
        ]

        def encode(tokenizer: CLIPTokenizer | T5TokenizerFast, length: int, texts: list[str]) -> Tensor:
            encoded = tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
            return encoded.input_ids.int()

        shape = (len(renderings), variants, -1)
        self.register_buffer("clip_ids", encode(clip_tokenizer, CLIP_TOKENS, texts).view(shape))
        self.register_buffer("t5_ids", encode(t5_tokenizer, CAPTION_TOKENS, texts).view(shape))
        self.register_buffer("empty_clip_ids", encode(clip_tokenizer, CLIP_TOKENS, [""]))
        self.register_buffer("empty_t5_ids", encode(t5_tokenizer, CAPTION_TOKENS, [""]))
        self.t5_padding = t5_tokenizer.pad_token_id

    def draw(self, picture: Tensor, t5_length: int) -> tuple[Tensor, Tensor]:
        """One random caption, sometimes none, for every picture index: CLIP ids and T5 ids."""
        variant = torch.randint(self.t5_ids.shape[1], picture.shape, device=picture.device)
        empty = torch.rand(len(picture), 1, device=picture.device) < CAPTION_DROPOUT
        clip_ids = torch.where(empty, self.empty_clip_ids, self.clip_ids[picture, variant])
        t5_ids = torch.where(empty, self.empty_t5_ids, self.t5_ids[picture, variant])
        return clip_ids, nn.functional.pad(t5_ids, (0, t5_length - CAPTION_TOKENS), value=self.t5_padding)


class FlowMatching(nn.Module):
    """The three trained networks and their loss on a batch."""

    def __init__(self, transformer: FluxTransformer2DModel, clip: CLIPTextModel, t5: T5EncoderModel) -> None:
        super().__init__()
        self.transformer = transformer
        self.clip = clip
        self.t5 = t5
        self.register_buffer("img_ids", FluxPipeline._prepare_latent_image_ids(1, 8, 8, "cpu", torch.float32))

    def forward(self, latents: Tensor, clip_ids: Tensor, t5_ids: Tensor) -> Tensor:
        batch, device = len(latents), latents.device
        # Logit-normal noise levels, with a uniform share so that both ends are seen.
        normal = torch.randn(batch, device=device).sigmoid()
        uniform = torch.rand(batch, device=device)
        sigma = torch.where(torch.rand(batch, device=device) < 0.8, normal, uniform)
        noise = torch.randn_like(latents)
        noisy = torch.lerp(latents, noise, sigma[:, None, None])
        with torch.autocast(device.type, torch.bfloat16, cache_enabled=False):
            (velocity,) = self.transformer(
                hidden_states=noisy,
                encoder_hidden_states=self.t5(t5_ids).last_hidden_state,
                pooled_projections=self.clip(clip_ids).pooler_output,
                timestep=sigma,
                img_ids=self.img_ids,
                txt_ids=torch.zeros(t5_ids.shape[1], 3, device=device),
                return_dict=False,
            )
        return (velocity.float() - (noise - latents)).square().mean()


def graphed(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """Record ``step`` as a CUDA graph after three ordinary runs; on the CPU, ``step`` itself."""
    if device.type == "cpu":
        return step
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data"), help="image folder (default: %(default)s)")
    parser.add_argument("--pipeline", type=Path, default=Path("pipeline"), help="vae/ is read, the rest is written")
    parser.add_argument("--minutes", type=float, default=14.0, help="training time (default: %(default)s)")
    parser.add_argument("--checkpoint-minutes", type=float, default=4.0, help="write the pipeline this often")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--ema-decay", type=float, default=0.999)
    parser.add_argument("--batch-scale", type=float, default=1.0, help="multiplies every batch size")
    parser.add_argument("--caption-variants", type=int, default=48, help="captions drawn per picture")
    parser.add_argument("--trial-steps", type=int, default=300, help="steps that time the machine")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    torch.backends.cuda.enable_cudnn_sdp(False)  # its backward fails at these lengths
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    renderings = load_renderings(args.data)
    vae = AutoencoderKL.from_pretrained(args.pipeline / "vae", dtype=torch.float32).to(device)
    vae.register_to_config(_name_or_path="")  # a path of this machine, of no use to others
    latents = cache_latents(vae, renderings.pictures.to(device)).bfloat16()
    table = draw_table(renderings.weights).to(device)

    rng = random.Random(args.seed)
    corpus = [describe(n, s, rng) for n, s in zip(renderings.names, renderings.styles, strict=True) for _ in range(8)]
    clip_tokenizer, t5_tokenizer = train_clip_tokenizer(corpus), train_t5_tokenizer(corpus)
    captions = Captions(clip_tokenizer, t5_tokenizer, renderings, args.caption_variants, args.seed).to(device)
    length = (captions.t5_ids != captions.t5_padding).sum(dim=-1)
    print(f"{len(renderings)} pictures, T5 caption length mean {length.float().mean():.1f}, longest {length.max()}")

    model = FlowMatching(build_transformer(), build_clip(clip_tokenizer), build_t5(t5_tokenizer)).to(device)
    for name, part in model.named_children():
        print(f"{name}: {sum(p.numel() for p in part.parameters()) / 1e6:.2f} M parameters")
    averaged = copy.deepcopy(model).requires_grad_(False)
    parameters: list[Tensor] = list(model.parameters())
    average: list[Tensor] = list(averaged.parameters())
    if device.type == "cuda":
        torch._dynamo.config.recompile_limit = 64
        model.transformer.compile_repeated_blocks(fullgraph=True, dynamic=False)

    learning_rate_now = torch.zeros((), device=device)
    optimizer = torch.optim.AdamW(
        parameters,
        lr=learning_rate_now,
        betas=(0.9, 0.98),
        weight_decay=0.01,
        fused=device.type == "cuda",
        capturable=device.type == "cuda",
    )
    running = torch.zeros((), device=device)

    def training_step(text: TextLength) -> None:
        batch = max(1, int(text.batch * args.batch_scale))
        picture = table[torch.randint(len(table), (batch,), device=device)]
        loss = model(latents[picture].float(), *captions.draw(picture, text.tokens))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch._foreach_lerp_(average, parameters, 1 - args.ema_decay)
            running.lerp_(loss, 0.01)

    def save_pipeline() -> None:
        stored = copy.deepcopy(averaged).bfloat16()
        FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0, use_dynamic_shifting=False),
            vae=vae.half(),
            text_encoder=stored.clip,
            tokenizer=clip_tokenizer,
            text_encoder_2=stored.t5,
            tokenizer_2=t5_tokenizer,
            transformer=stored.transformer,
        ).save_pretrained(args.pipeline)
        (args.pipeline / "generation_defaults.json").write_text(json.dumps(GENERATION_DEFAULTS, indent=2) + "\n")

    started = perf_counter()
    steps = [graphed(partial(training_step, text), device) for text in TEXT_LENGTHS]
    print(f"compiled and recorded in {perf_counter() - started:.0f} s")
    if device.type == "cuda":
        for text, replay in zip(TEXT_LENGTHS, steps, strict=True):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for _ in range(10):
                replay()
            end.record()
            torch.cuda.synchronize()
            print(f"{text}: {begin.elapsed_time(end) / 10:.2f} ms per step")
    averaged.load_state_dict(model.state_dict())
    last_checkpoint = perf_counter()

    def step_fn(step: int, learning_rate: float) -> None:
        nonlocal last_checkpoint
        learning_rate_now.fill_(learning_rate)
        (replay,) = rng.choices(steps, [text.share for text in TEXT_LENGTHS])
        replay()
        if step % 100 == 0 and perf_counter() - last_checkpoint > 60 * args.checkpoint_minutes:
            save_pipeline()
            last_checkpoint = perf_counter()

    train_for(
        args.minutes,
        step_fn,
        peak=args.learning_rate,
        warmup=1000,
        trial_steps=args.trial_steps,
        synchronize=torch.cuda.synchronize if device.type == "cuda" else lambda: None,
        status=lambda: f"loss {running.item():.4f}",
        description="flux",
    )
    save_pipeline()


if __name__ == "__main__":
    main()
