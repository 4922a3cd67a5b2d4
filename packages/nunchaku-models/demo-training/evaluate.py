"""Measure a demo pipeline: does it draw what was asked, and how well does its autoencoder see?

Prints the share of pictures whose name the judge puts first, for a short list of 32 objects and a
longer list of other ones, each with ", noto style", over several seeds; the autoencoder's PSNR over
all renderings; and writes a sheet of the 32 pictures.
"""

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from data import load_renderings
from diffusers import FluxPipeline
from PIL import Image
from tqdm import tqdm
from train_vae import decode, encode_mean, psnr

from nunchaku_models.demo.judge import EmojiClassifier, classify, load_judge
from nunchaku_models.demo.prompts import LONG_LIST, SHORT_LIST
from nunchaku_models.demo.sheet import draw_sheet


def generate(
    pipe: FluxPipeline, names: Sequence[str], seed: int, arguments: dict, suffix: str = ", noto style", batch: int = 64
) -> list[Image.Image]:
    """One picture per name; picture i starts from the noise of seed ``1000 * seed + i``."""
    arguments = dict(arguments)
    negative = arguments.pop("negative_prompt", None)
    images: list[Image.Image] = []
    for first in range(0, len(names), batch):
        prompts = [name + suffix for name in names[first : first + batch]]
        generators = [torch.Generator().manual_seed(1000 * seed + first + i) for i in range(len(prompts))]
        negatives = None if negative is None else [negative] * len(prompts)
        images += pipe(prompts, negative_prompt=negatives, generator=generators, **arguments).images
    return images


def right_first(
    images: Sequence[Image.Image], names: Sequence[str], judge: tuple[EmojiClassifier, list[str]]
) -> list[bool]:
    """For every picture: is its own name the judge's first guess?"""
    return [guesses[0].name == name for guesses, name in zip(classify(images, *judge), names, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--pipeline", type=Path, default=Path("pipeline"), help="pipeline folder (default: %(default)s)"
    )
    parser.add_argument("--data", type=Path, help="image folder; without it the autoencoder is not measured")
    parser.add_argument("--seeds", type=int, default=4, help="pictures per prompt (default: %(default)s)")
    parser.add_argument("--sheet", type=Path, help="write the 32 pictures of seed 0 here")
    args = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipe = FluxPipeline.from_pretrained(args.pipeline, dtype=torch.bfloat16).to(device)
    pipe.set_progress_bar_config(disable=True)
    arguments = json.loads((args.pipeline / "generation_defaults.json").read_text())
    judge = load_judge(device)

    for title, names in (("short list", SHORT_LIST), ("long list", LONG_LIST)):
        scores, missed = [], Counter[str]()
        for seed in tqdm(range(args.seeds), desc=title, leave=False):
            images = generate(pipe, names, seed, arguments)
            right = right_first(images, names, judge)
            scores.append(100 * sum(right) / len(right))
            missed.update(name for name, ok in zip(names, right, strict=True) if not ok)
            if args.sheet and seed == 0 and title == "short list":
                draw_sheet(images, names).save(args.sheet, quality=92, method=6)
        print(f"{title}: {len(names)} objects, {args.seeds} seeds, right class first {sum(scores) / len(scores):.1f} %")
        print(f"  per seed {[round(score, 1) for score in scores]}, missed {dict(missed.most_common())}")

    if args.data:
        pictures = load_renderings(args.data).pictures.to(device)
        quality = psnr(decode(pipe.vae, encode_mean(pipe.vae, pictures)), pictures)
        print(f"autoencoder in bf16: PSNR mean {quality.mean():.2f} dB, worst {quality.min():.2f} dB")


if __name__ == "__main__":
    main()
