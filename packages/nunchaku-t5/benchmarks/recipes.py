"""Ways to quantise a T5 encoder's linears, for `quality.py`: rivals, and each of our steps on top of the one before."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import nn
from transformers import T5EncoderModel

from nunchaku_kernels.formats import W4A16Weights, pack_w4a16
from nunchaku_kernels.nn import W4A16Linear
from nunchaku_kernels.quantize import (
    BlockInputs,
    InputMetric,
    InputSpans,
    PairedMoments,
    awq_round,
    awq_smoothing,
    choose_wider,
    fit_w4a16,
    output_sensitivities,
    quantize_affine,
    quantize_w4a16,
    replace_weights,
)

GROUP_SIZE = 128
RANK = 16
STORED_DTYPE = torch.bfloat16


class Batch(NamedTuple):
    """Tokens [B, T]. Without `attention_mask` all are attended to, as FLUX runs T5; only `counted` ones are."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor | None

    @property
    def counted(self) -> torch.Tensor | None:
        """bool [B, T], or None for all."""
        return None if self.attention_mask is None else self.attention_mask.bool()


@dataclass
class Quantized:
    """What a recipe makes: for each linear its 4-bit or 8-bit form, or plain values; and other weights it changed.

    Attributes:
        forms: name -> quantised weight.
        values: name -> dequantised weight, of a rival whose form we do not have.
        nbytes: of all linears together.
        folded: parameter name -> new values.
    """

    forms: dict[str, W4A16Weights] = field(default_factory=dict)
    values: dict[str, torch.Tensor] = field(default_factory=dict)
    nbytes: int = 0
    folded: dict[str, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.nbytes += sum(stored_bytes(form) for form in self.forms.values())

    def applied_to(self, model: T5EncoderModel) -> T5EncoderModel:
        """A copy of `model` in bfloat16 with these linears in it."""
        result = copy.deepcopy(model).to(STORED_DTYPE)
        with torch.no_grad():
            for name, value in self.folded.items():
                result.get_parameter(name).copy_(value)
            for name, value in self.values.items():
                result.get_submodule(name).weight.copy_(value)
        for name, form in self.forms.items():
            parent, _, leaf = name.rpartition(".")
            setattr(result.get_submodule(parent), leaf, W4A16Linear.from_weights(form, name=name))
        return result


Recipe = Callable[["Encoder"], Quantized]


class Encoder:
    """A T5 encoder in float32 with calibration batches, and what several recipes need of it, made once."""

    def __init__(self, model: T5EncoderModel, batches: Sequence[Batch]) -> None:
        self.model, self.batches = model, batches
        self.linears = {name: module for name, module in model.named_modules() if type(module) is nn.Linear}
        self._sensitivities: dict[str, float] | None = None

    def each(self, make: Callable[[torch.Tensor], W4A16Weights]) -> Quantized:
        """Every linear by itself, without data."""
        return Quantized({name: make(linear.weight.detach()) for name, linear in self.linears.items()})

    def sensitivities(self) -> dict[str, float]:
        """Name -> what 4 bits in that linear alone do to the output."""
        if self._sensitivities is None:
            # Captions as they are read, without padding: what is measured in the end.
            masked = [batch for batch in self.batches if batch.attention_mask is not None]

            def run(index: int) -> torch.Tensor:
                batch = masked[index]
                return self.model(batch.input_ids, batch.attention_mask).last_hidden_state[batch.counted]

            self._sensitivities = output_sensitivities(
                self.model.requires_grad_(False), run, len(masked), list(self.linears), group_size=GROUP_SIZE
            )
        return self._sensitivities

    def wider(self, budget: float) -> list[str]:
        """The linears that get 8 bits.

        Args:
            budget: bytes for that, relative to those of all linears in 4 bits.
        """
        weights = {name: linear.weight.detach() for name, linear in self.linears.items()}
        four = {name: stored_bytes(round_to_nearest(weight)) for name, weight in weights.items()}
        extra = {name: stored_bytes(eight_bits(weight)) - four[name] for name, weight in weights.items()}
        return choose_wider(self.sensitivities(), extra, int(budget * sum(four.values())))

    def in_order(self, fit: Callable[[str, torch.Tensor, InputMetric], W4A16Weights], *, paired: bool) -> Quantized:
        """Every linear fitted to its inputs, block after block.

        Args:
            fit: name, weight, metric of the inputs -> quantised weight.
            paired: take the inputs that come out of quantised layers, and aim at the original outputs; else original
                inputs.
        """
        forms: dict[str, W4A16Weights] = {}
        for prefix, block, before, now in self.blocks(quantized=paired):
            groups = before.groups()
            originals = before.tokens([group[0] for group in groups])
            for group in groups:
                first = group[0]
                moments = now.moments(first, originals[first]) if paired else before.moments(first)
                metric = InputMetric(moments)
                for name in group:
                    forms[prefix + name] = fit(prefix + name, block.get_submodule(name).weight.detach(), metric)
                if paired:
                    replace_weights(block, {name: forms[prefix + name].dequantize() for name in group})
        return Quantized(forms)

    def blocks(self, *, quantized: bool) -> Iterator[tuple[str, nn.Module, BlockInputs, BlockInputs]]:
        """Block after block: prefix of names; a copy to put quantised weights in; the inputs of the original, and those
        of the copy.

        Args:
            quantized: lead the inputs of the next copies through the copies before, with what was put in them.
        """
        hidden, contexts = self._entry()
        arrived = list(hidden)
        masks = [batch.counted for batch in self.batches]

        def inputs(module: nn.Module, states: list[torch.Tensor]) -> BlockInputs:
            return BlockInputs(module, lambda i: module(states[i], *contexts[i])[0], masks)

        for index, original in enumerate(self.model.encoder.block):
            block = copy.deepcopy(original)
            before, now = inputs(original, hidden), inputs(block, arrived)
            yield f"encoder.block.{index}.", block, before, now
            hidden = before.outputs()
            arrived = now.outputs() if quantized else hidden

    @torch.no_grad()
    def _entry(self) -> tuple[list[torch.Tensor], list[tuple[torch.Tensor, torch.Tensor]]]:
        """For each batch, the hidden states that enter the first block; mask and position bias of all blocks."""
        hidden, contexts = [], []
        first, second = self.model.encoder.block[:2]
        for batch in self.batches:
            seen: dict[str, torch.Tensor] = {}
            handles = [
                first.register_forward_pre_hook(lambda _, given, to=seen: to.update(hidden=given[0], mask=given[1])),
                second.register_forward_pre_hook(lambda _, given, to=seen: to.update(bias=given[2])),
            ]
            self.model(batch.input_ids, batch.attention_mask)
            for handle in handles:
                handle.remove()
            hidden.append(seen["hidden"])
            contexts.append((seen["mask"], seen["bias"]))
        return hidden, contexts


def stored_bytes(form: W4A16Weights) -> int:
    """Of a linear's tensors in a file."""
    return sum(tensor.nbytes for tensor in pack_w4a16(form).values())


def round_to_nearest(weight: torch.Tensor, group_size: int = GROUP_SIZE) -> W4A16Weights:
    return W4A16Weights(*quantize_w4a16(weight, group_size, symmetric=False, dtype=STORED_DTYPE))


def eight_bits(weight: torch.Tensor) -> W4A16Weights:
    codes = quantize_affine(weight, GROUP_SIZE, bits=8, dtype=STORED_DTYPE)
    return W4A16Weights(codes.codes, codes.scales, codes.zeros, codes.bits)


def nf4(encoder: Encoder) -> Quantized:
    """bitsandbytes NF4: blocks of 64, one float32 maximum each."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    values, nbytes = {}, 0
    for name, linear in encoder.linears.items():
        packed, state = quantize_4bit(linear.weight.detach().contiguous(), quant_type="nf4", blocksize=64)
        values[name] = dequantize_4bit(packed, state)
        nbytes += packed.nbytes + state.absmax.nbytes
    return Quantized(values=values, nbytes=nbytes)


def plain_awq(encoder: Encoder) -> Quantized:
    """AWQ as the published 4-bit T5 was made with it: smoothing folded into norms, v and wi_1; q, k, v without range
    search."""
    moments: dict[str, torch.Tensor] = {}
    spans: dict[str, InputSpans] = {}
    members: dict[str, list[str]] = {}
    for prefix, _, before, _ in encoder.blocks(quantized=False):
        groups = before.groups()
        for group, tokens in zip(groups, before.tokens([group[0] for group in groups]).values(), strict=True):
            first = prefix + group[0]
            members[first] = [prefix + name for name in group]
            gathered, spans[first] = PairedMoments(tokens[0].shape[1]), InputSpans(tokens[0].shape[1])
            for x in tokens:
                gathered.update(x)
                spans[first].update(x)
            moments[first] = gathered.moment
    weights = {name: linear.weight.detach().clone() for name, linear in encoder.linears.items()}
    folded: dict[str, torch.Tensor] = {}
    ranges: dict[str, torch.Tensor | None] = {}
    smoothings = {
        first: awq_smoothing([weights[name] for name in group], spans[first], moments[first], group_size=GROUP_SIZE)
        for first, group in members.items()
    }
    for first, smooth in smoothings.items():
        for name in members[first]:
            weights[name] *= smooth
            ranges[name] = moments[first] / torch.outer(smooth, smooth)
            if name.endswith((".q", ".k", ".v")):
                ranges[name] = None
        if first.endswith(".o"):
            weights[first.removesuffix("o") + "v"] /= smooth.unsqueeze(1)
        elif first.endswith(".wo"):
            weights[first.removesuffix("wo") + "wi_1"] /= smooth.unsqueeze(1)
        else:
            norm = ".".join(first.split(".")[:5]) + ".layer_norm.weight"
            folded[norm] = encoder.model.get_parameter(norm).detach() / smooth
    forms = {
        name: awq_round(weight, ranges[name], group_size=GROUP_SIZE, dtype=STORED_DTYPE)
        for name, weight in weights.items()
    }
    return Quantized(forms, folded=folded)


def searched(name: str, weight: torch.Tensor, metric: InputMetric) -> W4A16Weights:
    codes = quantize_affine(weight, GROUP_SIZE, importance=metric.importance, dtype=STORED_DTYPE)
    return W4A16Weights(codes.codes, codes.scales, codes.zeros)


def fitted(
    encoder: Encoder, *, rank: int = 0, sweeps: int = 2, wider: Sequence[str] = (), paired: bool = True
) -> Quantized:
    """`fit_w4a16` of every linear; those in `wider` get 8 bits and no low-rank branch."""

    def fit(name: str, weight: torch.Tensor, metric: InputMetric) -> W4A16Weights:
        if name in wider:
            return fit_w4a16(weight, metric, group_size=GROUP_SIZE, bits=8, sweeps=0, dtype=STORED_DTYPE)
        return fit_w4a16(weight, metric, group_size=GROUP_SIZE, rank=rank, sweeps=sweeps, dtype=STORED_DTYPE)

    return encoder.in_order(fit, paired=paired)


RIVALS: Mapping[str, Recipe] = {
    "rtn-g128": lambda encoder: encoder.each(round_to_nearest),
    "rtn-g64": lambda encoder: encoder.each(lambda weight: round_to_nearest(weight, 64)),
    "bitsandbytes-nf4": nf4,
    "awq-g128": plain_awq,
}
STEPS: Mapping[str, Recipe] = {
    "1-searched-ranges": lambda encoder: encoder.in_order(searched, paired=False),
    "2-gptq": lambda encoder: fitted(encoder, sweeps=0, paired=False),
    "3-descent": lambda encoder: fitted(encoder, paired=False),
    "4-paired-inputs": lambda encoder: fitted(encoder),
    "5-rank16": lambda encoder: fitted(encoder, rank=RANK),
    "5-8bits-10%": lambda encoder: fitted(encoder, wider=encoder.wider(0.1)),
    "5-8bits-20%": lambda encoder: fitted(encoder, wider=encoder.wider(0.2)),
    "6-8bits-20%-rank16": lambda encoder: fitted(encoder, wider=encoder.wider(0.2), rank=RANK),
}
BEST = "5-8bits-20%"
