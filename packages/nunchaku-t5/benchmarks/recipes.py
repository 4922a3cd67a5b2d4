"""Ways to quantise a T5 encoder's linears, for `quality.py`: rivals, and each of our steps on top of the one before."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import T5EncoderModel

from nunchaku_kernels.formats import W4A16Weights, pack_w4a16
from nunchaku_kernels.nn import W4A16Linear
from nunchaku_kernels.quantize import (
    InputMetric,
    choose_wider,
    fit_w4a16,
    output_sensitivities,
    quantize_affine,
    quantize_w4a16,
    replace_weights,
)
from nunchaku_t5.calibration import METHODS, Batch, EncoderBlocks
from nunchaku_t5.config import LayerForm

GROUP_SIZE = 128
RANK = 16
STORED_DTYPE = torch.bfloat16


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
        for block in EncoderBlocks(self.model, self.batches, list(self.linears)):
            for group in block.groups:
                first = group[0]
                moments = block.now.moments(first, block.originals[first]) if paired else block.before.moments(first)
                metric = InputMetric(moments)
                made = {name: fit(f"{block.path}.{name}", block.weight(name), metric) for name in group}
                forms |= {f"{block.path}.{name}": form for name, form in made.items()}
                if paired:
                    replace_weights(block.module, {name: form.dequantize() for name, form in made.items()})
        return Quantized(forms)


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
    """AWQ as the published 4-bit T5 was made with it."""
    layers = dict.fromkeys(encoder.linears, LayerForm(group_size=GROUP_SIZE))
    result = Quantized()
    for block in EncoderBlocks(encoder.model, encoder.batches, list(encoder.linears)):
        made = METHODS["awq"](block, layers, STORED_DTYPE)
        result.forms |= made.weights
        result.folded |= made.changed
    return Quantized(result.forms, folded=result.folded)


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
    "5-8bits-7%": lambda encoder: fitted(encoder, wider=encoder.wider(0.07)),
    "5-8bits-20%": lambda encoder: fitted(encoder, wider=encoder.wider(0.2)),
    "6-8bits-20%-rank16": lambda encoder: fitted(encoder, wider=encoder.wider(0.2), rank=RANK),
}
BEST = "5-8bits-7%"
