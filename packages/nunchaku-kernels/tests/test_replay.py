"""Recorded loops do what the loops do."""

from collections.abc import Callable

import pytest
import torch

from nunchaku_kernels.quantize import gptq as module
from nunchaku_kernels.quantize._replay import Replayed
from nunchaku_kernels.quantize.affine import quantize_affine
from nunchaku_kernels.quantize.residual import GroupedCodes, quantize_residual

STARTS: dict[str, Callable[[torch.Tensor], GroupedCodes]] = {
    "affine 4": lambda weight: quantize_affine(weight, 64, dtype=torch.bfloat16),
    "affine 8": lambda weight: quantize_affine(weight, 64, bits=8, dtype=torch.bfloat16),
    "int4": lambda weight: quantize_residual(weight, "int4", [200], torch.bfloat16),
    "nvfp4": lambda weight: quantize_residual(weight, "nvfp4", [200], torch.bfloat16),
}


def plain(function: Callable[..., None], changed: int) -> Callable[..., None]:
    return function


def in_two_steps(changed: torch.Tensor, added: torch.Tensor) -> None:
    changed.add_(added)
    changed.mul_(2)


def test_on_the_cpu_it_is_the_function() -> None:
    replayed, x = Replayed(in_two_steps, changed=1), torch.ones(3)
    for expected in (4.0, 10.0, 22.0):
        replayed(x, torch.ones(3))
        assert x.tolist() == [expected] * 3


@pytest.mark.cuda
def test_other_tensors_and_other_shapes() -> None:
    replayed = Replayed(in_two_steps, changed=1)
    for size in (5, 5, 5, 3, 5, 7):
        x, added = torch.randn(size, device="cuda"), torch.randn(size, device="cuda")
        expected, before = (x + added) * 2, added.clone()
        replayed(x, added)
        assert torch.equal(x, expected) and torch.equal(added, before)


@pytest.mark.cuda
@pytest.mark.parametrize("kind", STARTS)
def test_codes_are_the_same(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """448 columns: three whole blocks and a shorter one, two of whose channels are always zero."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(200, 448, generator=generator).cuda()
    x = torch.randn(900, 448, generator=generator).cuda() @ torch.randn(448, 448, generator=generator).cuda()
    x[:, [3, 440]] = 0
    hessian = x.t() @ x / len(x)
    start = STARTS[kind](weight)
    found = module.descend(weight, module.gptq(weight, start, hessian), hessian)
    monkeypatch.setattr(module, "Replayed", plain)
    expected = module.descend(weight, module.gptq(weight, start, hessian), hessian)
    assert torch.equal(found.levels(), expected.levels()) and torch.equal(found.steps(), expected.steps())
    assert not torch.equal(found.levels(), start.levels())
