"""Train the autoencoder: 128x128x3 pictures <-> 16x16x16 latents.

Loss: absolute error of the pixels and of their horizontal and vertical differences (flat art is all
edges), plus squared error, plus a small KL term that keeps the latents near a unit Gaussian.
Half the point of the latents is to be drawn by a small transformer that is never exact, so the
decoder is trained with noise on them: up to ``--latent-noise`` of their standard deviation.
Afterwards the latents' mean and standard deviation are measured and stored in the configuration
as ``shift_factor`` and ``scaling_factor``, where `FluxPipeline` looks for them.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from data import draw_table, load_renderings
from diffusers import AutoencoderKL
from schedule import train_for
from torch import Tensor

EVALUATION_BATCH = 64


def build_vae() -> AutoencoderKL:
    """8x down, 16 latent channels, 4.0 M parameters; 64 channels at full size, for edges."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(64, 64, 128, 128),
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=32,
        sample_size=128,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
        force_upcast=False,
    )


def augment(pictures: Tensor) -> Tensor:
    """Move every picture, scale and mirror half of them, permute the colours of a quarter.

    ``pictures`` is (B, 3, H, W) in [-1, 1]. Unscaled pictures move by whole pixels and stay sharp.
    """
    batch, _, height, width = pictures.shape
    device = pictures.device
    half = torch.rand(batch, device=device) < 0.5
    scale = torch.where(half, torch.empty(batch, device=device).uniform_(0.75, 1.4), 1.0)
    mirror = torch.where(torch.rand(batch, device=device) < 0.5, -1.0, 1.0)
    shift = torch.randint(-10, 11, (batch, 2), device=device) * 2 / torch.tensor([width, height], device=device)

    theta = torch.zeros(batch, 2, 3, device=device)
    theta[:, 0, 0] = scale * mirror
    theta[:, 1, 1] = scale
    theta[:, :, 2] = shift
    grid = F.affine_grid(theta, list(pictures.shape), align_corners=False)
    moved = 1 - F.grid_sample(1 - pictures, grid, align_corners=False)  # zero padding is white

    order = torch.rand(batch, 3, device=device).argsort(dim=1)
    order = torch.where(torch.rand(batch, 1, device=device) < 0.25, order, torch.arange(3, device=device))
    return moved.gather(1, order[:, :, None, None].expand_as(moved))


def reconstruction_loss(decoded: Tensor, target: Tensor) -> Tensor:
    """Pixels, squared pixels and first differences."""
    error = decoded - target
    edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
    return error.abs().mean() + 2 * error.square().mean() + edges


@torch.no_grad()
def encode_mean(vae: AutoencoderKL, pictures: Tensor) -> Tensor:
    """Latent means of uint8 pictures, unscaled."""
    return torch.cat(
        [vae.encode(chunk.to(vae.dtype) / 127.5 - 1).latent_dist.mode() for chunk in pictures.split(EVALUATION_BATCH)]
    )


@torch.no_grad()
def decode(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Unscaled latents to pictures in [0, 1]."""
    decoded = torch.cat([vae.decode(chunk.to(vae.dtype)).sample for chunk in latents.split(EVALUATION_BATCH)])
    return (decoded.float() / 2 + 0.5).clamp(0, 1)


def psnr(decoded: Tensor, pictures: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of every picture in dB; ``decoded`` in [0, 1], ``pictures`` uint8."""
    return -10 * (decoded - pictures / 255).square().mean(dim=(1, 2, 3)).log10()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data"), help="image folder (default: %(default)s)")
    parser.add_argument("--pipeline", type=Path, default=Path("pipeline"), help="pipeline folder; vae/ is written")
    parser.add_argument("--minutes", type=float, default=5.0, help="training time (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--kl-weight", type=float, default=2e-4, help="per latent element (default: %(default)s)")
    parser.add_argument("--latent-noise", type=float, default=0.4, help="largest, in deviations (default: %(default)s)")
    parser.add_argument("--resume", action="store_true", help="continue from the autoencoder in the pipeline folder")
    parser.add_argument("--trial-steps", type=int, default=200, help="steps that time the machine")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    renderings = load_renderings(args.data)
    pictures = renderings.pictures.to(device)
    table = draw_table(renderings.weights).to(device)
    vae = AutoencoderKL.from_pretrained(args.pipeline / "vae").float() if args.resume else build_vae()
    vae.to(device, memory_format=torch.channels_last).train()
    print(f"{len(renderings)} pictures, {sum(p.numel() for p in vae.parameters()) / 1e6:.2f} M parameters")
    optimizer = torch.optim.AdamW(
        vae.parameters(), lr=args.learning_rate, betas=(0.9, 0.99), weight_decay=0.0, fused=device.type == "cuda"
    )

    @torch.compile(disable=device.type == "cpu")
    def loss_fn(target: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            mean, log_variance = vae.encoder(target).float().chunk(2, dim=1)
            log_variance = log_variance.clamp(-30, 20)
            noise_level = args.latent_noise * mean.detach().std() * torch.rand(len(mean), 1, 1, 1, device=device)
            deviation = (log_variance.exp() + noise_level.square()).sqrt()
            latents = mean + deviation * torch.randn_like(mean)
            decoded = vae.decoder(latents).float()
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        return reconstruction_loss(decoded, target) + args.kl_weight * kl

    running = torch.zeros((), device=device)

    def step_fn(step: int, learning_rate: float) -> None:
        index = table[torch.randint(len(table), (args.batch,), device=device)]
        target = augment(pictures[index].float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)
        loss = loss_fn(target)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = learning_rate
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        running.lerp_(loss.detach(), 0.02)

    train_for(
        args.minutes,
        step_fn,
        peak=args.learning_rate,
        warmup=500,
        trial_steps=args.trial_steps,
        synchronize=torch.cuda.synchronize if device.type == "cuda" else lambda: None,
        status=lambda: f"loss {running.item():.4f}",
        description="vae",
    )

    vae.eval().half().float()  # measure the weights that are stored
    latents = encode_mean(vae, pictures)
    vae.register_to_config(shift_factor=latents.mean().item(), scaling_factor=1 / latents.std().item())
    quality = psnr(decode(vae, latents), pictures)
    print(
        f"PSNR mean {quality.mean():.2f} dB, worst {quality.min():.2f} dB, best {quality.max():.2f} dB; "
        f"latents mean {latents.mean():.3f}, std {latents.std():.3f}, "
        f"per channel {[round(s, 2) for s in latents.std(dim=(0, 2, 3)).tolist()]}"
    )
    for level in (0.1, 0.2, 0.4):
        noisy = latents + level * latents.std() * torch.randn_like(latents)
        print(f"PSNR with latent noise {level}: mean {psnr(decode(vae, noisy), pictures).mean():.2f} dB")
    vae.half().save_pretrained(args.pipeline / "vae")


if __name__ == "__main__":
    main()
