"""How near the 4-bit demo with a LoRA is to the 16-bit demo with the same LoRA, in PSNR of pictures.

uv run python packages/nunchaku-lora/benchmarks/demo_fidelity.py -o benchmarks/lora_fidelity.json

Random LoRAs of rank 16 on every linear of every block change the pictures and mean nothing; the trained one is that of
demo-training. Beside the 4-bit demo there is a control: diffusers' own model and PEFT's own LoRA on weights that went
through 4 bits and back. What it loses is the weights' share; what the 4-bit demo loses beyond it is that of our kernels
and of 8-bit activations. Needs nunchaku-models, whose demo is drawn.
"""

import argparse
import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import FluxPipeline
from torch import nn

import nunchaku_lora
from nunchaku_kernels.bench import report
from nunchaku_models import NunchakuFluxTransformer2DModel, demo
from nunchaku_models.demo.prompts import LONG_LIST, SHORT_LIST
from nunchaku_models.evaluation.drawing import draw
from nunchaku_models.evaluation.metrics import bootstrap, psnr

TRAINED = Path(__file__).parents[1] / "tests" / "data" / "twemoji-16bit.safetensors"
CONDITIONS: dict[str, dict[str, float]] = {
    "noto/none": {},
    "noto/one, strength -1": {"random0": -1.0},
    "noto/one, strength 1": {"random0": 1.0},
    "noto/one, strength 2": {"random0": 2.0},
    "noto/three": {"random0": 1.0, "random1": 1.0, "random2": 1.0},
    "twemoji/none": {},
    "twemoji/trained, strength -1": {"trained": -1.0},
    "twemoji/trained, strength 1": {"trained": 1.0},
    "twemoji/trained, strength 2": {"trained": 2.0},
}
"""Style of the prompts and name -> strengths of the adapters that act. A style's first condition is without any."""
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


def weights_through_4_bits(full: nn.Module, small: nn.Module) -> nn.Module:
    """A copy of a diffusers transformer with the weights that the layers of a 4-bit one stand for."""
    model = copy.deepcopy(full)
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear):
            counterpart: Any = small.get_submodule(path)
            if not isinstance(counterpart, nn.Linear):
                module.weight.data.copy_(counterpart.dequantize())
    return model


def act(pipeline: Any, strengths: dict[str, float]) -> None:
    """Let these adapters act, and no others."""
    if strengths:
        pipeline.enable_lora()
        pipeline.set_adapters(list(strengths), list(strengths.values()))
    else:
        pipeline.disable_lora()


def main() -> None:
    """Draw every condition on all models, and write one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()

    nunchaku_lora.enable()
    full = FluxPipeline.from_pretrained(demo.PIPELINE, torch_dtype=torch.bfloat16)
    four_bits = NunchakuFluxTransformer2DModel.from_pretrained(demo.TRANSFORMER_INT4)
    through = weights_through_4_bits(full.transformer, four_bits)
    pipelines = {
        "16 bits": full,
        "4 bits": FluxPipeline(**{**full.components, "transformer": four_bits}),
        "control": FluxPipeline(**{**full.components, "transformer": through}),
    }
    random = {f"random{seed}": random_lora(full.transformer, seed) for seed in range(3)}
    for pipeline in pipelines.values():
        pipeline.to(arguments.device)
        for name, state in random.items():
            pipeline.load_lora_weights(dict(state), adapter_name=name)
        pipeline.load_lora_weights(TRAINED, adapter_name="trained")

    objects = (SHORT_LIST + LONG_LIST)[: arguments.prompts]
    options = {**demo.defaults(), "num_inference_steps": arguments.steps}
    rows = []
    without: dict[str, float] = {}
    plain: dict[str, list[Any]] = {}
    for name, strengths in CONDITIONS.items():
        style = name.split("/")[0]
        prompts = [f"{thing}, {style} style" for thing in objects]
        drawn = {}
        for label, pipeline in pipelines.items():
            act(pipeline, strengths)
            (drawn[label],) = draw(
                pipeline, prompts, seeds=1, batch=arguments.batch, arguments=options, label=f"{name}, {label}"
            )
        unchanged = plain.setdefault(style, drawn["16 bits"])
        effect = float(np.mean([psnr(b, a) for a, b in zip(unchanged, drawn["16 bits"], strict=True)]))
        for label in ("4 bits", "control"):
            scores = bootstrap(np.array([psnr(b, a) for a, b in zip(drawn["16 bits"], drawn[label], strict=True)]))
            alone = without.setdefault(f"{style}/{label}", scores.mean)
            row: dict[str, Any] = {"name": f"psnr/{label}/{name}", "value": scores.mean, "unit": "dB"}
            row |= {"baseline": f"no adapters: {alone:.2f} dB", "ratio": scores.mean / alone}
            row |= {"low": scores.low, "high": scores.high, "16-bit, with against without": effect}
            rows.append(row)
            print(json.dumps(row), flush=True)
    result = {**report([]), "prompts": len(objects), "steps": arguments.steps, "rows": rows}
    scratch = arguments.output.with_suffix(".tmp")
    scratch.write_text(json.dumps(result, indent=2) + "\n")
    scratch.replace(arguments.output)


if __name__ == "__main__":
    main()
