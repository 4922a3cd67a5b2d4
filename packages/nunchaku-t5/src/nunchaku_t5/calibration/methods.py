"""Ways to fit a block's linears to calibration data."""

from collections.abc import Callable, Mapping, Sequence
from itertools import count
from typing import Any

import torch
from torch import nn

from nunchaku_kernels.formats import W4A16Weights
from nunchaku_kernels.quantize import (
    InputMetric,
    InputSpans,
    PairedMoments,
    awq_round,
    awq_smoothing,
    choose_wider,
    fit_w4a16,
    output_sensitivities,
    replace_weights,
)
from nunchaku_t5.calibration.blocks import Block, FittedBlock
from nunchaku_t5.calibration.texts import Batch
from nunchaku_t5.config import LayerForm
from nunchaku_t5.layers import stored_bytes

_READERS = ({"q", "k", "v"}, {"o"}, {"wi", "wi_0", "wi_1"}, {"wo"})
"""Linears of T5 that read the same tensor."""

SENSITIVITY_BATCHES = 8
"""Batches on which linears are compared: enough to tell which are worse by multiples, and each costs a rounding of all
weights."""

Method = Callable[[Block, Mapping[str, LayerForm], torch.dtype], FittedBlock]
"""(block, path -> form, dtype of scales) -> what becomes of it."""


def fitted(block: Block, forms: Mapping[str, LayerForm], dtype: torch.dtype) -> FittedBlock:
    """Searched ranges, GPTQ, coordinate descent (`fit_w4a16`), each linear fitted behind those quantised before it."""
    result = FittedBlock()
    for group in block.groups:
        metric = InputMetric(block.now.moments(group[0], block.originals[group[0]]))
        done: dict[str, W4A16Weights] = {}
        for names in _stacks(group, {name: forms[f"{block.path}.{name}"] for name in group}):
            form, weights = forms[f"{block.path}.{names[0]}"], [block.weight(name) for name in names]
            fit = fit_w4a16(
                torch.cat(weights), metric, group_size=form.group_size, bits=form.bits, rank=form.rank, dtype=dtype
            )
            done |= dict(zip(names, _unstacked(fit, [len(weight) for weight in weights]), strict=True))
        result.weights |= {f"{block.path}.{name}": weights for name, weights in done.items()}
        replace_weights(block.module, {name: weights.dequantize() for name, weights in done.items()})
    return result


def _stacks(group: Sequence[str], forms: Mapping[str, LayerForm]) -> list[list[str]]:
    """Linears with one input that are fitted together, which gives the same in less time: those of like form whose rows
    are independent, as they are without a low-rank branch."""
    stacks: dict[object, list[str]] = {}
    for name in group:
        stacks.setdefault(name if forms[name].rank else forms[name], []).append(name)
    return list(stacks.values())


def _unstacked(weights: W4A16Weights, rows: Sequence[int]) -> list[W4A16Weights]:
    if len(rows) == 1:
        return [weights]
    parts = (tensor.split(list(rows)) for tensor in (weights.codes, weights.scales, weights.zeros))
    return [W4A16Weights(codes, scales, zeros, weights.bits) for codes, scales, zeros in zip(*parts, strict=True)]


def awq(block: Block, forms: Mapping[str, LayerForm], dtype: torch.dtype) -> FittedBlock:
    """The method of the published file (svdquant_algorithm.md 9): inputs smoothed, ranges searched, rounded to nearest.

    What smooths an input is folded into what comes before it: the norm before q, k, v and wi; v before o; the linear
    half of a gated wi, or a wi with ReLU, before wo. Blocks are fitted to 16-bit inputs.

    Raises:
        ValueError: a layer is to be stored in 8 bits or with a low-rank branch.
    """
    result, module = FittedBlock(), block.module
    moments: dict[str, torch.Tensor] = {}
    for group in block.groups:
        form = forms[f"{block.path}.{group[0]}"]
        if form.bits != 4 or form.rank:
            raise ValueError(f"{block.path}.{group[0]}: AWQ has 4 bits and no branch, got {form}")
        weights = [block.weight(name) for name in group]
        columns, device = weights[0].shape[1], weights[0].device
        spans, sums = InputSpans(columns, device=device), PairedMoments(columns, device)
        for tokens in block.originals[group[0]]:
            spans.update(tokens)
            sums.update(tokens)
        front = _front(module, group[0])
        scale = torch.ones(columns, device=device)
        # A file that quantises some of the linears behind a norm only cannot have it divided for them alone.
        if front is not None and _all_readers(module, group):
            scale = awq_smoothing(weights, spans, sums.moment, group_size=form.group_size, dtype=dtype)
            with torch.no_grad():
                _divide_rows(module.get_submodule(front), scale)
                for name in group:
                    linear = module.get_submodule(name)
                    assert isinstance(linear, nn.Linear)
                    linear.weight.mul_(scale)
        for name in group:
            moments[name] = sums.moment / torch.outer(scale, scale)
    for name, moment in moments.items():
        linear = module.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        whole_range = name.rpartition(".")[2] in ("q", "k", "v")
        size = forms[f"{block.path}.{name}"].group_size
        result.weights[f"{block.path}.{name}"] = awq_round(
            linear.weight.detach(), None if whole_range else moment, group_size=size, dtype=dtype
        )
    for name, value in module.named_parameters():
        if f"{block.path}.{name.rpartition('.')[0]}" not in result.weights:
            result.changed[f"{block.path}.{name}"] = value.detach()
    return result


def _front(block: nn.Module, name: str) -> str | None:
    """Path in the block of what gives a linear's input, where dividing its rows divides that; else None."""
    part, _, last = name.rpartition(".")
    if last in ("q", "k", "v", "wi", "wi_0", "wi_1"):
        return f"{part.rpartition('.')[0]}.layer_norm"
    if last == "o":
        return f"{part}.v"
    modules = dict(block.named_modules())
    if f"{part}.wi_1" in modules:
        return f"{part}.wi_1"
    return f"{part}.wi" if isinstance(getattr(modules[part], "act", None), nn.ReLU) else None


def _all_readers(block: nn.Module, group: Sequence[str]) -> bool:
    """Whether all linears that read the group's input are in the group."""
    part, _, last = group[0].rpartition(".")
    readers = next(names for names in _READERS if last in names)
    linears = {name for name, module in block.get_submodule(part).named_children() if isinstance(module, nn.Linear)}
    return {f"{part}.{name}" for name in readers & linears} == set(group)


def _divide_rows(module: nn.Module, scale: torch.Tensor) -> None:
    weight = module.get_parameter("weight")
    weight.div_(scale if weight.dim() == 1 else scale.unsqueeze(1))


METHODS: dict[str, Method] = {"fitted": fitted, "awq": awq}


def choose_eight_bits(
    model: Any,
    batches: Sequence[Batch],
    forms: Mapping[str, LayerForm],
    extra: float,
    on_batch: Callable[[int, int], None] = lambda done, of: None,
) -> dict[str, LayerForm]:
    """Store those linears in 8 bits that 4 bits hurt most, by what the encoder gives in the end.

    Args:
        model: in float32 or bfloat16.
        batches: of the masked ones some are used.
        forms: path -> form.
        extra: bytes that 8 bits may add, relative to those of all linears in 4 bits.
        on_batch: progress: told how many batches are begun, and of how many.

    Returns:
        `forms`, with other bits where it says so.
    """
    names = [name for name in forms if isinstance(model.get_submodule(name), nn.Linear)]
    masked = [batch for batch in batches if batch.attention_mask is not None]
    masked = masked[:: -(-len(masked) // SENSITIVITY_BATCHES) or 1]  # of all lengths: they are sorted by it
    wide = {name: LayerForm(8, forms[name].group_size, forms[name].rank) for name in names}
    sizes = {name: stored_bytes(model.get_submodule(name), forms[name]) for name in names}
    added = {name: stored_bytes(model.get_submodule(name), wide[name]) - sizes[name] for name in names}
    budget = int(extra * sum(sizes.values()))
    if budget < min(added.values(), default=0):
        return dict(forms)

    sizes_of_groups = sorted({forms[name].group_size for name in names})
    begun = count(1)

    def run(index: int) -> torch.Tensor:
        on_batch(next(begun), len(sizes_of_groups) * len(masked))
        batch = masked[index]
        states: torch.Tensor = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
        return states[batch.counted]

    model.requires_grad_(False)
    found: dict[str, float] = {}
    for size in sizes_of_groups:
        of_size = [name for name in names if forms[name].group_size == size]
        found |= output_sensitivities(model, run, len(masked), of_size, group_size=size)
    chosen = choose_wider(found, added, budget)
    return {**forms, **{name: wide[name] for name in chosen}}
