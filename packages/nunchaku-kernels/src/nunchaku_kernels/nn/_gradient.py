"""Gradients of 4-bit layers: rounding is treated as the identity (straight through)."""

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable

Function = Callable[..., torch.Tensor]


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, run: Function, surrogate: Function, *tensors: torch.Tensor | None) -> torch.Tensor:
        ctx.surrogate = surrogate
        ctx.save_for_backward(*tensors)
        return run()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        wanted = ctx.needs_input_grad[2:]
        with torch.enable_grad():
            inputs = [
                None if tensor is None else tensor.detach().requires_grad_(needed)
                for tensor, needed in zip(ctx.saved_tensors, wanted, strict=True)
            ]
            output = ctx.surrogate(*inputs)
        leaves = [tensor for tensor in inputs if tensor is not None and tensor.requires_grad]
        gradients = iter(torch.autograd.grad(output, leaves, grad, allow_unused=True))
        return None, None, *(next(gradients) if needed else None for needed in wanted)


def straight_through(run: Function, surrogate: Function, *tensors: torch.Tensor | None) -> torch.Tensor:
    """`run()`, with the gradient of `surrogate(*tensors)` towards those of `tensors` that require one.

    Args:
        run: computes the result by operators, which record no gradient.
        surrogate: the same function of `tensors` in differentiable torch, on dequantised weights. Called in the
            backward pass only, which costs it two matrix products and the dequantised weight for its duration.
        tensors: everything a gradient may be asked for; None for what is absent.
    """
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        result: torch.Tensor = _StraightThrough.apply(run, surrogate, *tensors)
        return result
    return run()
