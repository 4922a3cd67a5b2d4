"""Train the judge: which emoji is this? On renderings only, never on generated pictures.

Half of every batch has been through the autoencoder, so that its reconstruction errors, which every
generated picture shows too, don't count as evidence. The other distortions (place, size, tilt,
colour, blur, noise) make the classes wide enough for pictures that are drawn slightly differently.
"""

import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from data import draw_table, load_renderings
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from schedule import train_for
from torch import Tensor
from train_vae import decode, encode_mean

from nunchaku_models.demo.judge import EmojiClassifier


def distort(pictures: Tensor) -> Tensor:
    """Random place, size, tilt, colour, blur and noise for every picture (B, 3, H, W) in [0, 1]."""
    batch, device = len(pictures), pictures.device

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.empty(batch, *shape, device=device).uniform_(low, high)

    angle, scale = uniform(-0.17, 0.17), uniform(0.85, 1.2)
    stretch = uniform(0.93, 1.07)
    theta = torch.stack(
        [
            torch.stack([scale * stretch * angle.cos(), -scale * angle.sin(), uniform(-0.12, 0.12)], dim=1),
            torch.stack([scale * angle.sin(), scale / stretch * angle.cos(), uniform(-0.12, 0.12)], dim=1),
        ],
        dim=1,
    )
    grid = F.affine_grid(theta, list(pictures.shape), align_corners=False)
    wobble = F.interpolate(
        uniform(-0.05, 0.05, 2, 5, 5), size=pictures.shape[2:], mode="bicubic", align_corners=True
    ).permute(0, 2, 3, 1)
    moved = 1 - F.grid_sample(1 - pictures, grid + wobble, align_corners=False)

    blurred = F.avg_pool2d(F.pad(moved, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    blur = uniform(-1, 1, 1, 1, 1).clamp(min=0)
    soft = moved + blur * (blurred - moved)

    gain, offset = uniform(0.85, 1.1, 3, 1, 1), uniform(-0.06, 0.06, 3, 1, 1)
    noise = uniform(-0.05, 0.08, 1, 1, 1).clamp(min=0) * torch.randn_like(soft)
    return (soft * gain + offset + noise).clamp(0, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data"), help="image folder (default: %(default)s)")
    parser.add_argument("--pipeline", type=Path, default=Path("pipeline"), help="pipeline folder with vae/")
    parser.add_argument("--out", type=Path, default=Path(), help="folder for classifier.safetensors and classes.json")
    parser.add_argument("--minutes", type=float, default=1.0, help="training time (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--learning-rate", type=float, default=4e-3)
    parser.add_argument("--trial-steps", type=int, default=100, help="steps that time the machine")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    torch.backends.cudnn.benchmark = True
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    renderings = load_renderings(args.data)
    vae = AutoencoderKL.from_pretrained(args.pipeline / "vae", dtype=torch.float32).to(device)
    original = renderings.pictures.to(device)
    reconstructed = (decode(vae, encode_mean(vae, original)) * 255).round().byte()
    pictures = torch.cat([original, reconstructed])
    labels = renderings.labels().to(device).repeat(2)
    table = draw_table(renderings.weights.sqrt().repeat(2)).to(device)

    model = EmojiClassifier(len(renderings.classes)).to(device).to(memory_format=torch.channels_last)
    print(f"{len(renderings.classes)} classes, {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters")
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=args.learning_rate, weight_decay=0.02, fused=device.type == "cuda"
    )

    @torch.compile(disable=device.type == "cpu")
    def loss_fn(distorted: Tensor, target: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            logits = model(distorted)
        return F.cross_entropy(logits.float(), target, label_smoothing=0.05)

    running = torch.zeros((), device=device)

    def step_fn(step: int, learning_rate: float) -> None:
        index = table[torch.randint(len(table), (args.batch,), device=device)]
        distorted = distort(pictures[index].float() / 255).contiguous(memory_format=torch.channels_last)
        loss = loss_fn(distorted, labels[index])
        loss.backward()
        optimizer.param_groups[0]["lr"] = learning_rate
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        running.lerp_(loss.detach(), 0.02)

    train_for(
        args.minutes,
        step_fn,
        peak=args.learning_rate,
        warmup=200,
        trial_steps=args.trial_steps,
        synchronize=torch.cuda.synchronize if device.type == "cuda" else lambda: None,
        status=lambda: f"loss {running.item():.3f}",
        description="classifier",
    )

    model.bfloat16().float().eval()  # measure the weights that are stored
    with torch.no_grad():
        for title, shown in (
            ("as rendered", original.float() / 255),
            ("reconstructed", reconstructed.float() / 255),
            ("distorted", distort(original.float() / 255)),
        ):
            guesses = torch.cat([model(chunk).argmax(dim=1) for chunk in shown.split(256)])
            right = (guesses == labels[: len(original)]).float().mean()
            print(f"right class first, {title}: {100 * right:.1f} %")

    args.out.mkdir(parents=True, exist_ok=True)
    state = {name: value.cpu().contiguous() for name, value in model.bfloat16().state_dict().items()}
    save_file(state, args.out / "classifier.safetensors")
    (args.out / "classes.json").write_text(json.dumps(renderings.classes, indent=0) + "\n")


if __name__ == "__main__":
    main()
