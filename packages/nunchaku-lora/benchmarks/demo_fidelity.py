"""How near the 4-bit demo with a LoRA is to the 16-bit demo with the same LoRA, in PSNR of pictures.

uv run python packages/nunchaku-lora/benchmarks/demo_fidelity.py -o benchmarks/lora_fidelity.json

The LoRAs are random, of rank 16 on every linear of every block: they change the pictures, and mean nothing. Needs
nunchaku-models, whose demo is drawn.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import FluxPipeline
from torch import nn

import nunchaku_lora
from nunchaku_models import NunchakuFluxTransformer2DModel, demo
from nunchaku_models.demo.prompts import LONG_LIST, SHORT_LIST
from nunchaku_models.evaluation.drawing import draw
from nunchaku_models.evaluation.metrics import bootstrap, psnr

Strengths = tuple[float, ...]
CONDITIONS: dict[str, Strengths] = {
    "none": (),
    "one, strength -1": (-1.0,),
    "one, strength 1": (1.0,),
    "one, strength 2": (2.0,),
    "three": (1.0, 1.0, 1.0),
}
"""Strengths of the adapters that act, first one first."""
RANK, SIZE = 16, 0.02


def random_lora(transformer: nn.Module, seed: int) -> dict[str, torch.Tensor]:
    """A file in diffusers' format for all linears of all blocks."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for path, module in transformer.named_modules():
        if isinstance(module, nn.Linear) and "blocks" in path:
            down = torch.randn(RANK, module.in_features, generator=generator) / module.in_features**0.5
            up = SIZE * torch.randn(module.out_features, RANK, generator=generator)
            state[f"transformer.{path}.lora_A.weight"] = down.bfloat16()
            state[f"transformer.{path}.lora_B.weight"] = up.bfloat16()
    return state


def act(pipeline: Any, strengths: Strengths) -> None:
    """Let the first adapters act with these strengths, and no others."""
    if strengths:
        pipeline.enable_lora()
        pipeline.set_adapters([f"lora{i}" for i in range(len(strengths))], list(strengths))
    else:
        pipeline.disable_lora()


def main() -> None:
    """Draw every condition on both models, and write one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=8)
    arguments = parser.parse_args()

    nunchaku_lora.enable()
    full = FluxPipeline.from_pretrained(demo.PIPELINE, torch_dtype=torch.bfloat16)
    small = FluxPipeline.from_pretrained(
        demo.PIPELINE,
        transformer=NunchakuFluxTransformer2DModel.from_pretrained(demo.TRANSFORMER_INT4),
        torch_dtype=torch.bfloat16,
    )
    for i, state in enumerate([random_lora(full.transformer, seed) for seed in range(3)]):
        for pipeline in (full, small):
            pipeline.load_lora_weights(dict(state), adapter_name=f"lora{i}")

    prompts = [f"{name}, noto style" for name in SHORT_LIST + LONG_LIST][: arguments.prompts]
    options = {**demo.defaults(), "num_inference_steps": arguments.steps}
    rows = []
    without: list[Any] = []
    for name, strengths in CONDITIONS.items():
        drawn = []
        for pipeline, bits in ((full, 16), (small, 4)):
            act(pipeline, strengths)
            label = f"{name}, {bits} bits"
            drawn.append(draw(pipeline, prompts, seeds=1, batch=arguments.batch, arguments=options, label=label)[0])
        without = without or drawn[0]
        scores = bootstrap(np.array([psnr(b, a) for a, b in zip(*drawn, strict=True)]))
        effect = float(np.mean([psnr(b, a) for a, b in zip(without, drawn[0], strict=True)])) if strengths else None
        rows.append({"name": f"psnr/{name}", "unit": "dB", **scores._asdict(), "16-bit, with against without": effect})
        print(json.dumps(rows[-1]), flush=True)
    result = {"prompts": len(prompts), "steps": arguments.steps, "torch": torch.__version__, "rows": rows}
    scratch = arguments.output.with_suffix(".tmp")
    scratch.write_text(json.dumps(result, indent=2) + "\n")
    scratch.replace(arguments.output)


if __name__ == "__main__":
    main()
