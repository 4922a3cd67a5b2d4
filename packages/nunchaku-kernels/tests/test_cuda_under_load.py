"""What shows only when a GPU is busy: rings that are filled again, kernels that start while the one in front ends."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from nunchaku_kernels.formats import SVDQWeights, pack_lowrank_down, pack_vector
from nunchaku_kernels.nn import SVDQLinear

pytestmark = pytest.mark.cuda

OPS = torch.ops.nunchaku_kernels
GPU = torch.device("cuda", 0)
TOKENS = 4608
LAUNCHES = 100


def randn(*shape: int, seed: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator(GPU).manual_seed(seed), device=GPU).to(dtype)


def same(one: tuple[torch.Tensor, ...], other: tuple[torch.Tensor, ...]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def back_to_back(run: Callable[[torch.Tensor], tuple[torch.Tensor, ...]], inputs: list[torch.Tensor]) -> Iterator[bool]:
    """Whether a run of launches without a pause has given what each gives alone, input by input in turn."""
    alone = []
    for x in inputs:
        alone.append(run(x))
        torch.cuda.synchronize()
    for first in range(0, LAUNCHES, 20):
        results = [run(inputs[i % len(inputs)]) for i in range(first, first + 20)]
        yield all(same(result, alone[i % len(inputs)]) for i, result in enumerate(results, first))


@pytest.mark.parametrize("rank", [0, 32])
@pytest.mark.parametrize("channels", [3072, 12288, 15360])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("norm", [False, True])
def test_quantisers_repeat(norm: bool, dtype: torch.dtype, channels: int, rank: int) -> None:
    inputs = [randn(TOKENS, channels, seed=seed, dtype=dtype) for seed in range(3)]
    smooth = pack_vector(randn(channels, seed=3, dtype=dtype).abs() + 0.1)
    down = pack_lowrank_down(randn(rank, channels, seed=4, dtype=dtype) / channels**0.5) if rank else None
    scale, shift = (randn(1, channels, seed=seed, dtype=dtype) / 3 for seed in (5, 6))

    def run(x: torch.Tensor) -> Any:
        if norm:
            return OPS.w4a8_quantize_norm(x, scale, shift, 1e-6, smooth, down)
        return OPS.w4a8_quantize(x, smooth, 0.0, down)

    assert all(back_to_back(run, inputs))


@pytest.mark.parametrize("rank", [0, 32])
@pytest.mark.parametrize("tokens", [64, 512, TOKENS])
def test_a_layer_waits_for_the_one_in_front(random_weights: Callable[..., SVDQWeights], tokens: int, rank: int) -> None:
    """A chain of layers in a CUDA graph, each reading what the one before has just written."""
    layers = [
        SVDQLinear.from_weights(random_weights(3072, 3072, rank=rank, seed=seed), name=f"layer {seed}").to(GPU)
        for seed in range(4)
    ]
    inputs = [randn(tokens, 3072, seed=seed, dtype=torch.bfloat16) for seed in range(4)]

    def chain(x: torch.Tensor, pause: bool) -> torch.Tensor:
        for turn in range(12):
            x = layers[turn % len(layers)](x)
            if pause:
                torch.cuda.synchronize()
        return x

    with torch.inference_mode():
        alone = [chain(x, pause=True) for x in inputs]
        assert not torch.equal(alone[0], alone[1]) and all(y.isfinite().all() for y in alone)
        given = inputs[0].clone()
        chain(given, pause=False)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = chain(given, pause=False)
        for i in range(LAUNCHES):
            given.copy_(inputs[i % len(inputs)])
            graph.replay()
            assert torch.equal(result, alone[i % len(inputs)]), i
        for i in range(LAUNCHES // 4):
            assert torch.equal(chain(inputs[i % len(inputs)], pause=False), alone[i % len(inputs)]), i
