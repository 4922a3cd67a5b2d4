"""What adapters cost at the sizes of FLUX.1-dev: random 4-bit weights, a random LoRA over all linears.

OMP_NUM_THREADS=1 uv run python packages/nunchaku-lora/benchmarks/flux_size.py --steps 0 --cpu-time
    -o benchmarks/lora_flux_size.json

Needs nunchaku-models (for the model's layout) and 16 GB of memory. Times are in seconds, medians. With `--steps N`,
steps are timed too. `--cpu-time` leaves out the time that other processes take from this one. "as on a GPU" leaves out
the bytes of each tensor that are compared on CPUs only.
"""

import argparse
import json
import statistics
import time
import unittest.mock
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from torch import nn

import nunchaku_lora
from nunchaku_kernels.nn import GELU_SHIFT, ModulationLinear, QuantizedLinear, SVDQLinear, W4A16Linear, _derived
from nunchaku_lora.loading import linears_of
from nunchaku_models.families import FLUX, Modulation
from nunchaku_models.layers import empty_model, install, origins, plan_layers

CONFIG = {"guidance_embeds": True}


def random_flux(layers: int, singles: int, dtype: torch.dtype = torch.bfloat16) -> Any:
    """FLUX.1-dev, or fewer of its blocks, with 4-bit layers of random contents."""
    model = empty_model(FluxTransformer2DModel, CONFIG | {"num_layers": layers, "num_single_layers": singles})
    owners: dict[str, QuantizedLinear] = {}
    for planned in plan_layers(FLUX, model.config):
        linears = [model.get_submodule(path) for path in planned.sources]
        if isinstance(planned.spec, Modulation):
            linear = linears[0]
            owners[planned.path] = ModulationLinear(
                linear.in_features,
                linear.out_features,
                num_chunks=planned.spec.num_chunks,
                dtype=dtype,
                name=planned.path,
            )
            continue
        origin = origins(planned, [(linear.in_features, linear.out_features) for linear in linears])
        start, stop = origin[0].columns
        owners[planned.path] = SVDQLinear(
            stop - start,
            origin[-1].rows[1],
            dtype=dtype,
            shift=GELU_SHIFT if planned.spec.after_gelu else 0.0,
            name=planned.path,
            origin=origin,
        )
    install(model, owners)
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            value = torch.empty(parameter.shape, dtype=dtype if parameter.dtype.is_floating_point else parameter.dtype)
            if not value.dtype.is_floating_point:
                value.view(torch.int8).random_(-128, 128, generator=generator)
            elif "smooth" in name or isinstance(module, nn.RMSNorm):
                value.fill_(1)
            else:
                value.normal_(0, 0.02 if value.dim() == 2 else 0.01, generator=generator)
                value = value.abs() if name in ("wscales",) else value
            module._parameters[name] = nn.Parameter(value, requires_grad=False)
    assert FLUX.prepare is not None
    FLUX.prepare(model)
    return model.eval()


def random_lora(model: Any, rank: int, seed: int) -> dict[str, torch.Tensor]:
    """A diffusers file of one rank over all linears; q, k and v have their own down factors."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for path, module in linears_of(model).items():
        for which, shape in (("A", (rank, module.in_features)), ("B", (module.out_features, rank))):
            value = torch.empty(shape).normal_(0, 0.01, generator=generator)
            tensors[f"transformer.{path}.lora_{which}.weight"] = value.bfloat16()
    return tensors


def shared(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same file as kohya's trainers make it: one down factor for q, k and v."""
    down = {}
    for key, value in tensors.items():
        first = key
        for name in ("to_k", "to_v"):
            first = first.replace(f".{name}.lora_A", ".to_q.lora_A")
        for name in ("add_k_proj", "add_v_proj"):
            first = first.replace(f".{name}.lora_A", ".add_q_proj.lora_A")
        down[key] = tensors[first] if "lora_A" in key else value
    return down


def combine(layers: list[QuantizedLinear]) -> None:
    """What every 4-bit layer does about adapters on every call."""
    with torch.no_grad():
        for layer in layers:
            if isinstance(layer, SVDQLinear):
                layer._low_rank()
            elif isinstance(layer, W4A16Linear):
                layer._branch(layer._adapters.placed())


class Stopwatch:
    """Times functions by a clock."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock

    def __call__(self, function: Callable[[], Any], repeat: int = 1) -> float:
        """The median time of a call."""
        times = []
        for _ in range(repeat):
            started = self.clock()
            function()
            times.append(self.clock() - started)
        return statistics.median(times)


def overhead(
    timed: Stopwatch, pipe: Any, layers: list[QuantizedLinear], other: dict[str, torch.Tensor]
) -> dict[str, float]:
    """What steps with adapter "a", and with another one in turn, do before they compute anything."""
    # the first step with an adapter, and every later one
    row = {"joining": timed(lambda: combine(layers)), "looking up": timed(lambda: combine(layers), 15)}
    pipe.load_lora_weights(other, adapter_name="b")
    nunchaku_lora.keep_joined(pipe, 6000)
    for name in ("b", "a"):
        pipe.set_adapters(name)
        combine(layers)

    def switch(name: str) -> None:
        pipe.set_adapters(name)
        combine(layers)

    def there_and_back() -> None:
        switch("b")
        switch("a")

    row["switching to an adapter that is joined"] = timed(there_and_back, 5) / 2
    pipe.delete_adapters("b")
    with unittest.mock.patch.object(_derived, "_sampled", lambda tensor: []):
        for layer in layers:
            layer.forget()
        combine(layers)
        row["looking up, as on a GPU"] = timed(lambda: combine(layers), 15)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--layers", type=int, default=19)
    parser.add_argument("--singles", type=int, default=38)
    parser.add_argument("--image-tokens", type=int, default=1024)
    parser.add_argument("--text-tokens", type=int, default=512)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--cpu-time", action="store_true")
    args = parser.parse_args()
    timed = Stopwatch(time.process_time if args.cpu_time else time.perf_counter)
    nunchaku_lora.enable()
    model = random_flux(args.layers, args.singles)
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(), vae=None, text_encoder=None, tokenizer=None, text_encoder_2=None,
        tokenizer_2=None, transformer=model,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(1)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).bfloat16()

    inputs = {
        "hidden_states": noise(1, args.image_tokens, 64),
        "encoder_hidden_states": noise(1, args.text_tokens, 4096),
        "pooled_projections": noise(1, 768),
        "timestep": torch.tensor([0.5]).bfloat16(),
        "img_ids": torch.zeros(args.image_tokens, 3),
        "txt_ids": torch.zeros(args.text_tokens, 3),
        "guidance": torch.tensor([3.5]).bfloat16(),
    }

    def step() -> None:
        with torch.no_grad():
            model(**inputs)

    found: dict[str, Any] = {
        "threads": torch.get_num_threads(),
        "clock": timed.clock.__name__,
        "blocks": [args.layers, args.singles],
    }
    if args.steps:
        step()
        found |= {"tokens": [args.image_tokens, args.text_tokens], "step": timed(step, args.steps)}
    layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    for rank in (16, 128):
        for kind in ("own", "shared"):
            tensors = [random_lora(model, rank, rank + i) for i in range(2)]
            tensors = tensors if kind == "own" else [shared(item) for item in tensors]
            row = {"load": timed(lambda: pipe.load_lora_weights(tensors[0], adapter_name="a"))}  # noqa: B023
            if args.steps:
                first = timed(step)
                row["step"] = timed(step, args.steps)
                row["first step, extra"] = first - row["step"]
            else:
                row |= overhead(timed, pipe, layers, tensors[1])
            row["set_strength"] = timed(lambda: nunchaku_lora.set_strength(pipe, {"a": 0.7}), 20)
            row["set_adapters"] = timed(lambda: pipe.set_adapters(["a"], [0.7]), 5)
            found[f"rank {rank}, down factors of q, k, v: {kind}"] = row
            pipe.unload_lora_weights()
        print(json.dumps(found, indent=2), flush=True)
    if args.output:
        args.output.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
