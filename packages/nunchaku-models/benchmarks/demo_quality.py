"""The demo model in 4 bits against itself in 16: PSNR, the judge's verdict, and a sheet to look at.

    python packages/nunchaku-models/benchmarks/demo_quality.py --output benchmarks/demo_quality.json --sheet sheet.webp

Same prompts, same noise. The sheet shows pairs: 16 bits above, 4 bits (w4a8) below.
"""

import argparse
import itertools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import FluxPipeline
from PIL import Image
from tqdm import tqdm

from nunchaku_kernels.bench import Row, report, table
from nunchaku_models import NunchakuFluxTransformer2DModel, demo
from nunchaku_models.demo.judge import classify, load_judge
from nunchaku_models.demo.prompts import SHORT_LIST
from nunchaku_models.demo.sheet import draw_sheet

BATCH = 8


def draw(pipe: Any, names: Sequence[str], seed: int, label: str) -> list[Image.Image]:
    """One picture per name; picture i starts from the noise of seed `1000 * seed + i`."""
    arguments = demo.defaults()
    negative = arguments.pop("negative_prompt", None)
    pictures: list[Image.Image] = []
    for first in tqdm(range(0, len(names), BATCH), desc=f"{label}, seed {seed}"):
        prompts = [f"{name}, noto style" for name in names[first : first + BATCH]]
        generators = [torch.Generator().manual_seed(1000 * seed + first + i) for i in range(len(prompts))]
        negatives = None if negative is None else [negative] * len(prompts)
        pictures += pipe(prompts, negative_prompt=negatives, generator=generators, **arguments).images
    return pictures


def psnr(picture: Image.Image, reference: Image.Image) -> float:
    """Peak signal-to-noise ratio of 8-bit RGB pictures, dB."""
    difference = np.asarray(picture, dtype=np.float64) - np.asarray(reference, dtype=np.float64)
    return float(10 * np.log10(255**2 / max(np.square(difference).mean(), 1e-9)))


def pairs_sheet(reference: Sequence[Image.Image], pictures: Sequence[Image.Image], names: Sequence[str]) -> Image.Image:
    """Rows of eight: 16 bits, and below each the same in 4 bits."""
    images: list[Image.Image] = []
    captions: list[str] = []
    for first in range(0, len(names), 8):
        row = slice(first, first + 8)
        images += [*reference[row], *pictures[row]]
        captions += [*(f"{name}, 16 bit" for name in names[row]), *("4 bit" for _ in names[row])]
    return draw_sheet(images, captions)


def main() -> None:
    """Draw, compare, print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1, help="pictures per prompt")
    parser.add_argument("--prompts", type=int, default=len(SHORT_LIST), help="how many of the 32 prompts")
    parser.add_argument("--arithmetic", nargs="+", default=["w4a8", "w4a4", "w4a16"])
    parser.add_argument("--transformer", type=Path, default=demo.TRANSFORMER_INT4, help="4-bit file to judge")
    parser.add_argument("--output", type=Path, help="write the JSON here too")
    parser.add_argument("--sheet", type=Path, help="write the sheet here")
    args = parser.parse_args()

    names = SHORT_LIST[: args.prompts]
    full = FluxPipeline.from_pretrained(demo.PIPELINE, dtype=torch.bfloat16)
    transformer = NunchakuFluxTransformer2DModel.from_pretrained(args.transformer, dtype=torch.bfloat16)
    quantized = FluxPipeline(**{**full.components, "transformer": transformer})
    for pipe in (full, quantized):
        pipe.set_progress_bar_config(disable=True)
    judge = load_judge()

    def score(pictures: Sequence[Image.Image]) -> float:
        right = [guess[0].name == name for guess, name in zip(classify(pictures, *judge), names, strict=True)]
        return 100 * sum(right) / len(right)

    reference = [draw(full, names, seed, "16 bit") for seed in range(args.seeds)]
    rows = [Row("semantic/bf16", float(np.mean([score(pictures) for pictures in reference])), "% right")]
    for arithmetic in args.arithmetic:
        transformer.set_arithmetic(arithmetic)
        drawn = [draw(quantized, names, seed, arithmetic) for seed in range(args.seeds)]
        pairs = zip(itertools.chain(*drawn), itertools.chain(*reference), strict=True)
        quality = [psnr(ours, theirs) for ours, theirs in pairs]
        rows.append(Row(f"psnr/svdq-int4-{arithmetic}/data-free", float(np.mean(quality)), "dB", "bf16 pictures"))
        rows.append(Row(f"psnr-worst/svdq-int4-{arithmetic}/data-free", min(quality), "dB", "bf16 pictures"))
        right = float(np.mean([score(pictures) for pictures in drawn]))
        rows.append(Row(f"semantic/svdq-int4-{arithmetic}/data-free", right, "% right", "bf16", right / rows[0].value))
        if args.sheet and arithmetic == args.arithmetic[0]:
            pairs_sheet(reference[0], drawn[0], names).save(args.sheet, quality=90, method=6)
    text = json.dumps(report(rows), indent=2)
    if args.output:
        args.output.write_text(text + os.linesep)
    print(table(rows))


if __name__ == "__main__":
    main()
