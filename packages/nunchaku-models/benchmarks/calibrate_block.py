"""Time of `nunchaku quantize --calibrate` on real-size FLUX blocks, projected to FLUX.1-dev.

Writes a transformer of one block with random heavy-tailed weights (quantize_block.py), makes random calls of it at
1024 x 1024, and times the block's calibration, its first-block inputs and one 16-bit step. The projection adds what the
whole model needs: every block, and drawing the calibration prompts.

    python packages/nunchaku-models/benchmarks/calibrate_block.py --device cuda --output benchmarks/calibrate_block.json
"""

import argparse
import json
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from quantize_block import JOINT_BLOCKS, SINGLE_BLOCKS, write_model
from tqdm import tqdm

from nunchaku_kernels.bench import Row, report, table
from nunchaku_models.calibration.blocks import BlockStream, LoadedBlock
from nunchaku_models.calibration.layers import BlockLayer, Results, Settings
from nunchaku_models.calibration.published import calibrate_block
from nunchaku_models.calibration.records import Call
from nunchaku_models.calibration.refined import refine_block
from nunchaku_models.calibration.run import TOKENS_PER_CHANNEL
from nunchaku_models.checkpoints import DiffusersView, flux_config, open_checkpoint
from nunchaku_models.families import FLUX
from nunchaku_models.layers import plan_layers

WIDEST = 4 * 3072
PROMPTS, STEPS = 64, 28
LIMIT_SECONDS = 3600.0


def random_calls(count: int, image_tokens: int, text_tokens: int) -> list[Call]:
    """Calls of FLUX.1 with random inputs, of which a quarter is held out."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).bfloat16()

    side = math.isqrt(image_tokens)
    ids = torch.zeros(side, side, 3)
    ids[..., 1], ids[..., 2] = torch.arange(side)[:, None], torch.arange(side)
    calls = []
    for index in range(count):
        arguments = {
            "hidden_states": normal(1, image_tokens, 64),
            "encoder_hidden_states": normal(1, text_tokens, 4096),
            "pooled_projections": normal(1, 768),
            "timestep": torch.rand(1, generator=generator).bfloat16(),
            "img_ids": ids.view(-1, 3),
            "txt_ids": torch.zeros(text_tokens, 3),
            "guidance": torch.full((1,), 3.5),
            "return_dict": False,
        }
        calls.append(Call(arguments, index >= count * 3 // 4))
    return calls


def measure(file: Path, recipe: str, calls: list[Call], settings: Settings) -> tuple[float, float]:
    """Seconds of calibrating the file's one block, and of running it once on one call."""
    with open_checkpoint(file) as source:
        view = DiffusersView(source)
        config = flux_config(source)
        stream = BlockStream(view, FLUX, config, calls, dtype=settings.dtype, device=settings.device)
        block = next(iter(stream))
        arguments = block.arguments(block.calls[0])
        once = min(_timed(settings, lambda: _run(block, arguments)) for _ in range(3))
        layers = [BlockLayer.load(layer, block.path, view, settings) for layer in plan_layers(FLUX, config)]
        results: Results = {}
        if recipe == "refined":
            work = refine_block(block, layers, settings, results)
        else:
            work = calibrate_block(stream.model, block, layers, settings, results)
        return _timed(settings, lambda: [None for _ in tqdm(work, total=2 * len(calls) + len(layers))]), once


@torch.no_grad()
def _run(block: LoadedBlock, arguments: dict[str, Any]) -> None:
    block.module(**arguments)


def _timed(settings: Settings, run: object) -> float:
    started = time.monotonic()
    run()  # type: ignore[operator]
    if settings.device.type == "cuda":
        torch.cuda.synchronize()
    return time.monotonic() - started


def main() -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=int, default=24, help="attention heads of 128 channels (24: real size)")
    parser.add_argument("--recipes", nargs="+", default=["refined"], help="refined, svdquant, svdquant-gptq")
    parser.add_argument("--precision", default="int4")
    parser.add_argument("--image-tokens", type=int, default=4096)
    parser.add_argument("--text-tokens", type=int, default=512)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="write the JSON here too")
    args = parser.parse_args()
    device = torch.device(args.device)
    count = round(TOKENS_PER_CHANNEL * WIDEST * args.heads / 24 / args.image_tokens)
    calls = random_calls(count, args.image_tokens, args.text_tokens)
    rows = [Row("calibrate/flux.1-dev/calls", count, "calls")]
    for recipe in args.recipes:
        settings = Settings(
            precision=args.precision,
            rank=32,
            dtype=torch.bfloat16,
            arithmetic="nvfp4" if args.precision == "nvfp4" else "w4a4",
            gptq=recipe.endswith("gptq"),
            seed=0,
            device=device,
        )
        seconds, step = 0.0, 0.0
        for name, joint, single, times in (("joint", 1, 0, JOINT_BLOCKS), ("single", 0, 1, SINGLE_BLOCKS)):
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder) / "block.safetensors"
                write_model(file, joint, single, args.heads)
                if device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                block, once = measure(file, recipe.removesuffix("-gptq"), [*calls], settings)
            rows.append(Row(f"calibrate/flux-{name}-block/{args.precision}/{recipe}", block, "s"))
            if device.type == "cuda":
                peak = torch.cuda.max_memory_allocated() / 2**30
                rows.append(Row(f"calibrate/flux-{name}-block/{args.precision}/{recipe}/memory", peak, "GiB"))
            seconds += times * block
            step += times * once
        drawing = PROMPTS * STEPS * step
        rows.append(Row(f"calibrate/flux.1-dev/{PROMPTS} prompts x {STEPS} steps", drawing, "s"))
        whole = seconds + drawing
        limit = f"limit {LIMIT_SECONDS:.0f} s"
        rows.append(
            Row(f"calibrate/flux.1-dev/{args.precision}/{recipe}/projected", whole, "s", limit, LIMIT_SECONDS / whole)
        )
        print(table(rows), flush=True)
    text = json.dumps(report(rows), indent=2)
    print(text)
    if args.output:
        args.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
