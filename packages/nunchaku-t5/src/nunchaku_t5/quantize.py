"""From float tensors to the tensors of quantised modules, for a model in memory."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from nunchaku_kernels.formats import W4A16Weights, pack_w4a16
from nunchaku_kernels.quantize import quantize_affine
from nunchaku_t5.config import GROUP_SIZES, LayerForm, W4A16Config
from nunchaku_t5.layers import fits, has_hooks, swap_layers, tied_names
from nunchaku_t5.quantizer import mark_quantized

HALF_DTYPES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class QuantizationReport:
    """What was quantised and what was not.

    Attributes:
        layers: module path -> form.
        kept: path of a linear, or of the embedding, left as it was -> why.
        bytes_before: of the model's tensors, tied ones once.
        bytes_after: the same afterwards.
    """

    layers: dict[str, LayerForm] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)
    bytes_before: int = 0
    bytes_after: int = 0

    def __str__(self) -> str:
        said = f"{len(self.layers)} layers quantised: {self.bytes_before / 1e9:.3f} -> {self.bytes_after / 1e9:.3f} GB"
        return said + "".join(f"\n  kept {name}: {why}" for name, why in self.kept.items())


def quantize_weight(weight: torch.Tensor, form: LayerForm, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """A linear's weight as the tensors of its quantised module, bias excepted, rounded to nearest.

    Args:
        weight: (N, K), any floating dtype.
        form: how to store it; without a low-rank branch, which takes data.
        dtype: of scales and zeros.

    Raises:
        ValueError: a weight that is not finite, or too large for `dtype`.
    """
    weight = weight if weight.dtype in (*HALF_DTYPES, torch.float32) else weight.float()
    rounded = quantize_affine(weight, form.group_size, bits=form.bits, search=False, dtype=dtype)
    return pack_w4a16(W4A16Weights(rounded.codes, rounded.scales, rounded.zeros, rounded.bits), torch.int16)


def quantize_rows(rows: torch.Tensor, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """An embedding's rows as the tensors of an `Int8Embedding`.

    Args:
        rows: (N, K), any floating dtype.
        dtype: of the scales.

    Returns:
        `weight` int8 (N, K) and `wscales` (N): row = weight * wscale.

    Raises:
        ValueError: a row that is not finite, or too large for `dtype`.
    """
    values = rows.float()
    scales = (values.abs().amax(dim=1) / 127).to(dtype)
    if not scales.isfinite().all():
        raise ValueError(f"rows must be finite, with scales that fit {dtype}")
    # A row of zeros, or one so small that its scale is 0, has codes 0.
    steps = torch.where(scales == 0, torch.inf, scales.float())
    codes = (values / steps.unsqueeze(1)).round_().clamp_(-127, 127).to(torch.int8)
    return {"weight": codes, "wscales": scales}


def quantize_module(
    module: nn.Module, weight: torch.Tensor, form: LayerForm, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """The weight of a linear or an embedding as the tensors of its quantised module, see above; bias excepted."""
    return quantize_rows(weight, dtype) if isinstance(module, nn.Embedding) else quantize_weight(weight, form, dtype)


def plan(
    model: Any, *, group_size: int = 128, embedding_bits: int = 16, skip: Collection[str] = ()
) -> tuple[dict[str, LayerForm], dict[str, str]]:
    """Which modules of a model to quantise.

    Args:
        model: a model of transformers; may be on the meta device.
        group_size: inputs per scale, 128 or 64. Linears that only 64 divides get 64.
        embedding_bits: 16, or 8 to quantise the input embeddings, too.
        skip: paths of linears, or of modules with some, to leave as they are.

    Returns:
        Module path -> form, and module path -> why of each linear (and embedding asked for) to keep.

    Raises:
        ValueError, TypeError: an argument is none of those named, or a path in `skip` is no module.
    """
    if isinstance(skip, str) or not isinstance(skip, Collection):
        raise TypeError(f"`skip` must be several module paths, got {skip!r}")
    default = LayerForm(group_size=group_size)
    if embedding_bits not in (8, 16):
        raise ValueError(f"`embedding_bits` must be 8 or 16, got {embedding_bits!r}")
    modules = dict(model.named_modules(remove_duplicate=False))
    for path in skip:
        if not path or path not in modules:
            raise ValueError(f"`skip`: {type(model).__name__} has no module {path!r}")
    outside = tied_names(model)
    output = model.get_output_embeddings()
    layers: dict[str, LayerForm] = {}
    kept: dict[str, str] = {}
    embedding = model.get_input_embeddings() if embedding_bits == 8 else None
    for name, module in model.named_modules():
        if embedding is not None and module is embedding:
            others = [other for other in outside.get(name, ()) if not isinstance(modules.get(other), nn.Embedding)]
            if others:
                kept[name] = f"shares its weight with {', '.join(others)}"
            elif has_hooks(module):
                kept[name] = "has hooks"
            elif not fits(module, LayerForm(bits=8)):
                kept[name] = f"a {type(module).__name__}"
            else:
                layers[name] = LayerForm(bits=8, group_size=group_size)
        if not isinstance(module, nn.Linear):
            continue
        form = next((form for form in _forms(default) if fits(module, form)), None)
        if any(name == path or name.startswith(f"{path}.") for path in skip):
            kept[name] = "asked for"
        elif name in outside:
            kept[name] = f"shares its weight with {', '.join(sorted(outside[name]))}"
        elif module is output:
            kept[name] = "output embeddings"
        elif type(module) is not nn.Linear:
            kept[name] = f"{type(module).__name__} is more than a linear"
        elif has_hooks(module):
            kept[name] = "has hooks"
        elif form is None:
            kept[name] = f"{module.in_features} inputs and {module.out_features} outputs; multiples of 64 and 4 needed"
        else:
            layers[name] = form
    return layers, kept


def _forms(default: LayerForm) -> Iterator[LayerForm]:
    yield default
    for size in sorted(GROUP_SIZES):
        if size < default.group_size:
            yield LayerForm(group_size=size)


@torch.no_grad()
def quantize_encoder(
    model: Any, *, group_size: int = 128, embedding_bits: int = 16, skip: Collection[str] = ()
) -> QuantizationReport:
    """Quantise the linears of an encoder of transformers in place: weights of 4 bits, 16-bit activations, no data.

    `model.save_pretrained(folder)` then writes what the stock `from_pretrained(folder)` of its class loads where
    `nunchaku_t5` is imported. Any model works whose linears are called as modules: T5, UMT5, CLIP, Gemma, Qwen2.5-VL.

    Args:
        model: in float32, float16 or bfloat16, on any device; on another than the CPU it is quantised there.
        group_size, embedding_bits, skip: see `plan`.

    Returns:
        What was quantised and what was kept.

    Raises:
        ValueError: an argument does not fit, the model is quantised already, nothing in it can be, or a weight is not
            finite, on the meta device or of another dtype (the message names it). The model is unchanged then.
        TypeError: no model of transformers.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"`model` must be a model of transformers, got {type(model).__name__}")
    if getattr(model, "hf_quantizer", None) is not None:
        raise ValueError(f"{type(model).__name__} is quantised already")
    layers, kept = plan(model, group_size=group_size, embedding_bits=embedding_bits, skip=skip)
    if not layers:
        why = "; ".join(f"{name}: {reason}" for name, reason in kept.items()) or "it has none"
        raise ValueError(f"{type(model).__name__} has no linear that could be quantised: {why}")
    before = _nbytes(model)
    # All tensors before the first swap: a weight that cannot be quantised leaves the model as it was.
    tensors: dict[str, dict[str, torch.Tensor]] = {}
    for name, form in layers.items():
        module = model.get_submodule(name)
        if module.weight.is_meta or module.weight.dtype not in (*HALF_DTYPES, torch.float32):
            found = "the meta device" if module.weight.is_meta else module.weight.dtype
            raise ValueError(f"{name}: weights must be in float32, float16 or bfloat16, and in memory; got {found}")
        try:
            tensors[name] = quantize_module(module, module.weight, form, module.weight.dtype)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        if getattr(module, "bias", None) is not None:
            tensors[name]["bias"] = module.bias
    swap_layers(model, layers)
    for name, stored in tensors.items():
        module = model.get_submodule(name)
        for key, tensor in stored.items():
            setattr(module, key, nn.Parameter(tensor.detach(), requires_grad=False))
    mark_quantized(model, W4A16Config(group_size, layers))
    return QuantizationReport(layers, kept, before, _nbytes(model))


def _nbytes(model: nn.Module) -> int:
    return sum(value.nbytes for value in (*model.parameters(), *model.buffers()))
