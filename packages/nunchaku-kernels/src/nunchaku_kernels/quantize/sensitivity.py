"""Which linears of a model deserve more bits: what rounding each of them does to the model's output.

The size of a layer's own error says little: in the demo's text encoder the two layers that do most harm, q and k of the
first block, are the 5th and 9th by the error of their block's output.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack

import torch
from torch import nn

from nunchaku_kernels.quantize.affine import quantize_affine


def output_sensitivities(
    model: nn.Module,
    run: Callable[[int], torch.Tensor],
    batches: int,
    names: Sequence[str],
    *,
    group_size: int = 128,
    probes: int = 4,
    seed: int = 0,
) -> dict[str, float]:
    """For each linear, about `sum over tokens |change of the output|^2` when it alone is rounded to 4 bits.

    To first order the change of the output along a direction v is the gradient of `v . output` towards what the linear
    gives, times what rounding does to that. With random signs for v, its square is the sum asked for on average; so one
    backward pass serves all linears at once, where trying them takes a forward pass for each. Sequences of a batch do
    not see each other, so each is a sample of its own.

    Args:
        model: in float32 or bfloat16, without tensors that require gradients.
        run: gives the output for a batch, differentiable, tokens that do not count left out or zero. The first
            dimension of what the linears take is that of the sequences.
        batches: how many there are.
        names: of `nn.Linear`s of the model; K a multiple of `group_size`.
        group_size: of the rounding.
        probes: random directions for each batch.
        seed: of the directions.

    Returns:
        Name -> sum; a linear that is not used has 0.
    """
    if batches < 1 or probes < 1:
        raise ValueError(f"batches and probes: expected at least 1 of each, got {batches} and {probes}")
    generator = torch.Generator().manual_seed(seed)
    found = dict.fromkeys(names, 0.0)
    moved: dict[str, torch.Tensor] = {}

    def watch(name: str) -> Callable[[nn.Linear, tuple[torch.Tensor, ...], torch.Tensor], torch.Tensor]:
        def hook(linear: nn.Linear, arguments: tuple[torch.Tensor, ...], y: torch.Tensor) -> torch.Tensor:
            x, weight = arguments[0].detach(), linear.weight.detach()
            rounded = quantize_affine(weight, group_size, search=False, dtype=torch.bfloat16)
            change = x @ rounded.subtracted_from(weight.float()).to(x.dtype).t()
            if not y.requires_grad:
                y = y.detach().requires_grad_()  # the first linears: gradients begin here

            def meet(gradient: torch.Tensor) -> None:
                part = (gradient * change).flatten(1).sum(dim=1, dtype=torch.float64)
                moved[name] = moved[name] + part if name in moved else part

            y.register_hook(meet)
            return y

        return hook

    with ExitStack() as stack:
        for name in names:
            linear = model.get_submodule(name)
            if not isinstance(linear, nn.Linear):
                raise TypeError(f"{name}: expected an nn.Linear, got {type(linear).__name__}")
            stack.callback(linear.register_forward_hook(watch(name)).remove)
        for index in range(batches):
            with torch.enable_grad():
                output = run(index)
            for probe in range(probes):
                signs = torch.randint(0, 2, output.shape, generator=generator).mul_(2).sub_(1).to(output)
                moved.clear()
                output.backward(signs, retain_graph=probe + 1 < probes)
                for name, part in moved.items():
                    found[name] += float(part.square().sum()) / probes
    return found


def choose_wider(sensitivities: Mapping[str, float], sizes: Mapping[str, int], budget: int) -> list[str]:
    """The linears to store in 8 bits: those that hurt most for their size, as long as the budget lasts.

    Args:
        sensitivities: name -> harm done by 4 bits.
        sizes: name -> bytes that 8 bits take more.
        budget: bytes to spend.

    Returns:
        Names, the most harmful for its size first.
    """
    chosen, left = [], budget
    for name in sorted(sensitivities, key=lambda name: (-sensitivities[name] / max(sizes[name], 1), name)):
        if sensitivities[name] > 0 and sizes[name] <= left:
            chosen.append(name)
            left -= sizes[name]
    return chosen
