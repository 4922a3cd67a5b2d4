"""Gradients of 4-bit layers: rounding is treated as the identity (straight through)."""

from collections.abc import Callable
from typing import Any

import torch

Function = Callable[..., torch.Tensor]


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, run: Function, surrogate: Function, *tensors: torch.Tensor | None) -> torch.Tensor:
        ctx.surrogate = surrogate
        ctx.save_for_backward(*tensors)
        with torch.no_grad():  # torch.export traces it as if gradients were recorded
            return run()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        tensors: tuple[torch.Tensor | None, ...] = ctx.saved_tensors
        wanted = [index for index, needed in enumerate(ctx.needs_input_grad[2:]) if needed]

        def towards_wanted(*given: torch.Tensor) -> torch.Tensor:
            inputs = list(tensors)
            for index, tensor in zip(wanted, given, strict=True):
                inputs[index] = tensor
            result: torch.Tensor = ctx.surrogate(*inputs)
            return result

        # Not torch.autograd.grad: what that gives has no gradient of its own, and torch.compile does not follow it.
        pull = torch.func.vjp(towards_wanted, *(tensors[index] for index in wanted))[1]
        gradients: list[torch.Tensor | None] = [None] * len(tensors)
        for index, gradient in zip(wanted, pull(grad), strict=True):
            gradients[index] = gradient
        return None, None, *gradients


def straight_through(run: Function, surrogate: Function, *tensors: torch.Tensor | None) -> torch.Tensor:
    """`run()`, with the gradient of `surrogate(*tensors)` towards those of `tensors` that require one.

    Args:
        run: computes the result by operators, which record no gradient.
        surrogate: the same function of `tensors` in differentiable torch, on dequantised weights. Called in the
            backward pass only, which costs it two matrix products and the dequantised weight for its duration; the
            gradient is differentiable again.
        tensors: everything a gradient may be asked for; None for what is absent.
    """
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        result: torch.Tensor = _StraightThrough.apply(run, surrogate, *tensors)
        return result
    return run()
