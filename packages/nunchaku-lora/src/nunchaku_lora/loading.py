"""`load_lora_weights`: any file onto a model or pipeline, checked as a whole before anything changes, with a report."""

import collections
import logging
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.lora_base import _fetch_state_dict
from diffusers.loaders.lora_pipeline import FluxLoraLoaderMixin
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from nunchaku_kernels.nn import LinearSlice, QuantizedLinear
from nunchaku_lora.formats import (
    MAX_RANK,
    LinearShape,
    Lora,
    ModuleLora,
    NothingFitsError,
    Source,
    convert,
    convert_published,
    is_published,
    read_lora,
)
from nunchaku_lora.peft_layer import QuantizedLoraLinear
from nunchaku_lora.registration import is_enabled

logger = logging.getLogger(__name__)

Linear = nn.Linear | QuantizedLinear | LinearSlice


@dataclass(frozen=True)
class LoadReport:
    """What became of a LoRA file.

    Attributes:
        adapter: the adapter's name in the model.
        format: what people call the file's format.
        applied: keys of the file that act now.
        skipped: (key, reason) of the others; together they are all keys.
        ranks: module path -> rank of its adapter.
        notes: conversions that are not exact.
    """

    adapter: str
    format: str
    applied: tuple[str, ...]
    skipped: tuple[tuple[str, str], ...]
    ranks: Mapping[str, int]
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        ranks = sorted(set(self.ranks.values()))
        spread = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}" if ranks else "0"
        lines = [
            f"{self.adapter}: {self.format} format, {len(self.applied)} of {len(self.applied) + len(self.skipped)} "
            f"keys applied to {len(self.ranks)} layers, rank {spread}"
        ]
        for reason, count in collections.Counter(reason for _, reason in self.skipped).items():
            example = next(key for key, other in self.skipped if other == reason)
            lines.append(f"  skipped {count}: {reason}, such as {example}")
        return "\n".join([*lines, *(f"  {note}" for note in self.notes[:5])])


def load_lora_weights(
    target: Any,
    source: Source,
    *,
    adapter_name: str | None = None,
    strict: bool = False,
    hotswap: bool = False,
    max_rank: int = MAX_RANK,
    **fetch: Any,
) -> LoadReport:
    """Load a LoRA of any format.

    Args:
        target: a diffusers pipeline with a `transformer`, or a diffusers model.
        source: a safetensors file, a folder with one, a hub id, or tensors by name.
        adapter_name: its name; default: `default_0`, `default_1`, ...
        strict: raise if any key of the file is left over.
        hotswap: replace the weights of the adapter of that name.
        max_rank: ranks that an adapter which is no product of two matrices (LoKr, LoHa) gets at most.
        fetch: `weight_name`, `subfolder`, `revision`, `token`, `cache_dir`, `local_files_only`, `force_download` of a
            hub id.

    Returns:
        The report, which `report(target, adapter_name)` gives again later.

    Raises:
        ValueError: the file is damaged or for another model, or `strict` and something was skipped; the message names a
            key. Nothing on the model has changed then.
        RuntimeError: `enable()` was not called.
    """
    if not is_enabled():
        raise RuntimeError("call nunchaku_lora.enable() before loading adapters")
    model = getattr(target, "transformer", target)
    if not isinstance(model, nn.Module) or not hasattr(model, "load_lora_adapter"):
        raise TypeError(f"expected a diffusers pipeline or model that takes LoRA, got {type(target).__name__}")
    name = _adapter_name(model, adapter_name, hotswap)
    tensors, configuration = _fetched(source, fetch)
    lora = prepare(model, tensors, configuration, max_rank)
    encoder = getattr(target, "text_encoder", None) if target is not model else None
    text = _for_text_encoder(lora, encoder, hotswap)
    result = LoadReport(
        name,
        lora.format,
        tuple(lora.applied),
        tuple(lora.skipped),
        {path: part.rank for path, part in lora.modules.items()},
        tuple(lora.notes),
    )
    if not result.applied:
        raise ValueError(f"no key of this LoRA fits {type(model).__name__}: {result}")
    if strict and result.skipped:
        key, reason = result.skipped[0]
        raise ValueError(f"{len(result.skipped)} keys would be skipped, the first is {key!r}: {reason}")
    _inject(target, model, lora, name, hotswap)
    if text:
        _inject_text(target, encoder, text, name)
    vars(model).setdefault("_lora_reports", {})[name] = result
    if result.skipped:
        logger.warning("%s", result)
    return result


def report(target: Any, adapter_name: str) -> LoadReport:
    """The report of an adapter that was loaded onto a pipeline or model.

    Raises:
        KeyError: no adapter of that name was loaded here.
    """
    model = getattr(target, "transformer", target)
    reports: dict[str, LoadReport] = vars(model).get("_lora_reports", {})
    if adapter_name not in reports:
        raise KeyError(f"no report of an adapter {adapter_name!r}; there are {sorted(reports)}")
    return reports[adapter_name]


def linears_of(model: nn.Module) -> dict[str, Linear]:
    """Path -> linear that an adapter may be for, as the 16-bit model has them: owners of slices are not among them."""
    found: dict[str, Linear] = {}
    owners: set[int] = set()
    for path, module in model.named_modules():
        if ".lora_" in path or path.endswith(".base_layer"):
            continue
        base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        if isinstance(base, LinearSlice):
            owners |= {id(part.owner) for part in base.parts}
        if isinstance(base, Linear):
            found[path] = base
    return {path: module for path, module in found.items() if id(module) not in owners}


def prepare(
    model: nn.Module, tensors: Mapping[str, torch.Tensor], configuration: Mapping[str, Any], max_rank: int = MAX_RANK
) -> Lora:
    """Convert a LoRA for a model and check everything that loading it will do, without changing the model.

    Raises:
        ValueError: the file is damaged or for another model.
    """
    modules = linears_of(model)
    shapes = {
        path: LinearShape(
            module.in_features, module.out_features, path == "x_embedder" and isinstance(module, nn.Linear)
        )
        for path, module in modules.items()
    }
    if is_published(list(tensors)):
        lora, rest = convert_published(tensors, modules)
        if rest:
            _merge(lora, rest, shapes, configuration, max_rank)
    else:
        lora = convert(tensors, linears=shapes, configuration=configuration, max_rank=max_rank)
    for path, part in list(lora.modules.items()):
        module = modules[path]
        if part.dora is None and part.gain is None:
            continue
        if isinstance(module, QuantizedLinear | LinearSlice):
            lora.modules[path] = _with_gain(module, part)
        else:
            lora.drop(path, "DoRA on the 16-bit layers of a mixed model is not supported")
    parameters = dict(model.named_parameters())
    for name, vector in lora.vectors.items():
        if name not in parameters or parameters[name].shape != vector.shape:
            expected = tuple(parameters[name].shape) if name in parameters else "none"
            raise ValueError(f"{name}: the model has {expected}, the file {tuple(vector.shape)}")
    return lora


def _merge(
    lora: Lora,
    rest: Mapping[str, torch.Tensor],
    shapes: Mapping[str, LinearShape],
    configuration: Mapping[str, Any],
    max_rank: int,
) -> None:
    """Add the 16-bit part of a published file, whose keys are diffusers'."""
    try:
        other = convert(rest, linears=shapes, configuration=configuration, max_rank=max_rank)
    except NothingFitsError:
        lora.skipped += [(key, "not a key of a LoRA") for key in rest]
        return
    lora.modules.update(other.modules)
    lora.vectors.update(other.vectors)
    lora.applied += other.applied
    lora.skipped += other.skipped


def _with_gain(module: QuantizedLinear | LinearSlice, part: ModuleLora) -> ModuleLora:
    """DoRA as a factor per row: `m / |W + s B A|` on the weight, and in the up factor (arXiv 2402.09353, section 4).

    The factor is that of the file's strength; another strength goes the same way part of the distance.
    """
    if part.dora is None:
        return part
    weight = module.dequantize()
    down, up = part.down.to(weight), part.up.to(weight)
    lengths = torch.linalg.vector_norm(weight + part.alpha / part.rank * (up @ down), dim=1)
    factor = part.dora.to(weight) / lengths.clamp_min(torch.finfo(torch.float32).tiny)
    up = (factor.unsqueeze(1) * up).to(part.up.device)
    gain = ((factor - 1) * part.rank / part.alpha).to(part.up.device)
    return replace(part, up=up, gain=gain, dora=None)


def _adapter_name(model: Any, name: str | None, hotswap: bool) -> str:
    taken = getattr(model, "peft_config", {})
    if name is None:
        name = next(f"default_{i}" for i in range(len(taken) + 1) if f"default_{i}" not in taken)
    if "." in name or not name:
        raise ValueError(f"an adapter's name must not be empty or have dots, got {name!r}")
    if name in taken and not hotswap:
        raise ValueError(f"there is an adapter {name!r} already; delete it, choose another name, or pass hotswap=True")
    if hotswap and name not in taken:
        raise ValueError(f"hotswap=True replaces an adapter, and there is none of the name {name!r}")
    return name


def _fetched(source: Source, fetch: Mapping[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors and configuration of a local file, of a mapping, or of the hub (through diffusers)."""
    if isinstance(source, Mapping):
        return read_lora(source)
    path = Path(source).expanduser()
    if path.exists() or os.fspath(source).endswith((".safetensors", ".sft")):
        if path.is_dir() and (fetch.get("weight_name") or fetch.get("subfolder")):
            path = path / (fetch.get("subfolder") or "") / (fetch.get("weight_name") or "")
        return read_lora(path)
    names = (
        "weight_name",
        "local_files_only",
        "cache_dir",
        "force_download",
        "proxies",
        "token",
        "revision",
        "subfolder",
    )
    arguments = {name: fetch.get(name) for name in names}
    tensors, metadata = _fetch_state_dict(
        pretrained_model_name_or_path_or_dict=os.fspath(source),
        use_safetensors=True,
        user_agent={"file_type": "attn_procs_weights", "framework": "pytorch"},
        allow_pickle=False,
        **arguments,
    )
    return dict(tensors), dict(metadata or {})


def _for_text_encoder(lora: Lora, encoder: Any, hotswap: bool) -> dict[str, ModuleLora]:
    """Adapters of the CLIP text encoder by its module paths; what cannot go there is moved to the skipped keys."""
    if not lora.text_encoder:
        return {}
    linears = linears_of(encoder) if isinstance(encoder, nn.Module) else {}
    spelled = {path.replace(".", "_"): path for path in linears}
    found = {}
    for module, part in list(lora.text_encoder.items()):
        flat = module.replace(".", "_")
        path = spelled.get(flat) or spelled.get(flat.removeprefix("text_model_")) or spelled.get(f"text_model_{flat}")
        if not linears:
            lora.drop(f"text_encoder.{module}", "there is no CLIP text encoder here")
        elif hotswap:
            lora.drop(f"text_encoder.{module}", "adapters of text encoders cannot be swapped while loaded")
        elif path is None:
            lora.drop(f"text_encoder.{module}", "the text encoder has no such layer")
        elif (part.up.shape[0], part.down.shape[1]) != (linears[path].out_features, linears[path].in_features):
            raise ValueError(f"{module}: an adapter of {tuple(part.up.shape)} does not fit the text encoder's {path}")
        elif part.dora is not None or part.gain is not None:
            lora.drop(f"text_encoder.{module}", "DoRA on text encoders is not supported")
        else:
            found[path] = part
    return found


def _state_and_configuration(modules: Mapping[str, ModuleLora], prefix: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """A diffusers state dict and the PEFT configuration that goes with it, both with the prefix.

    All modules get one alpha, the file's commonest, and what they lack of it goes into the up factor: `alpha_pattern`
    would match other modules by the ends of their names, and PEFT swaps only adapters whose patterns are equal.
    """
    alpha = collections.Counter(part.alpha for part in modules.values()).most_common(1)[0][0]
    rank = collections.Counter(part.rank for part in modules.values()).most_common(1)[0][0]
    biased = any(part.bias is not None for part in modules.values())
    state = {}
    for path, part in modules.items():
        up, factor = part.up, part.alpha / alpha
        if factor != 1:
            exact = math.frexp(factor)[0] == 0.5  # a power of two
            up = (up if exact else up.float()) * factor
        state[f"{prefix}.{path}.lora_A.weight"] = part.down.contiguous()
        state[f"{prefix}.{path}.lora_B.weight"] = up.contiguous()
        if biased:
            # PEFT multiplies it by alpha / rank
            bias = part.up.new_zeros(part.up.shape[0]) if part.bias is None else part.bias * (part.rank / alpha)
            state[f"{prefix}.{path}.lora_B.bias"] = bias
    configuration = {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {f"^{path}": part.rank for path, part in modules.items() if part.rank != rank},
        "target_modules": sorted(modules),
        "lora_bias": biased,
    }
    return state, {f"{prefix}.{key}": value for key, value in configuration.items()}


def _inject(target: Any, model: Any, lora: Lora, name: str, hotswap: bool) -> None:
    if lora.modules:
        state, metadata = _state_and_configuration(lora.modules, "transformer")
        _grow(model, state)
        pipeline = target if target is not model else None
        model.load_lora_adapter(
            state,
            prefix="transformer",
            adapter_name=name,
            metadata=metadata,
            hotswap=hotswap,
            low_cpu_mem_usage=True,
            _pipeline=pipeline,
        )
        alpha = metadata["transformer.lora_alpha"]
        for path, layer in model.named_modules():
            if isinstance(layer, LoraLayer) and name in layer.lora_A:
                _settle(layer, name, lora.modules.get(path), alpha, hotswap)
    if lora.vectors:
        before = getattr(model, "_transformer_norm_layers", None) or {}
        replaced = {name: model.get_parameter(name).detach().clone() for name in lora.vectors}
        model.load_state_dict(lora.vectors, strict=False)
        model._transformer_norm_layers = {**replaced, **before}


def _grow(model: Any, state: Mapping[str, torch.Tensor]) -> None:
    """Widen 16-bit layers to the inputs of a control LoRA, as diffusers does; with adapters that they have already.

    diffusers calls the layer by its name and reads its weight, so it has to find the layer where it was without PEFT.
    """
    wrappers = {}
    for path, layer in list(model.named_modules()):
        wanted = state.get(f"transformer.{path}.lora_A.weight")
        if isinstance(layer, LoraLayer) and wanted is not None and wanted.shape[1] > layer.in_features:
            wrappers[path] = layer
            model.set_submodule(path, layer.get_base_layer())
    try:
        FluxLoraLoaderMixin._maybe_expand_transformer_param_shape_or_error_(model, dict(state), prefix="transformer")
    finally:
        for path, layer in wrappers.items():
            layer.base_layer = model.get_submodule(path)
            model.set_submodule(path, layer)
            more = layer.base_layer.in_features - layer.in_features
            layer.in_features += more
            for down in layer.lora_A.values():
                weight = torch.nn.functional.pad(down.weight.detach(), (0, more))
                down.weight = nn.Parameter(weight, requires_grad=down.weight.requires_grad)
                down.in_features += more


def _settle(layer: LoraLayer, name: str, part: ModuleLora | None, alpha: float, hotswap: bool) -> None:
    """Finish what PEFT leaves undone: gains, and after a swap the numbers that strengths are computed from."""
    if hotswap and part is not None:
        layer.r[name], layer.lora_alpha[name] = part.rank, alpha
        scaling = layer.scaling[name]
        if isinstance(scaling, torch.Tensor):
            scaling.fill_(alpha / part.rank)
        else:
            layer.scaling[name] = alpha / part.rank
    if isinstance(layer, QuantizedLoraLinear):
        gain = None if part is None else part.gain
        if gain is not None and part is not None:
            gain = gain * (part.alpha / alpha)
        layer.set_gain(name, gain)


def _inject_text(target: Any, encoder: Any, modules: Mapping[str, ModuleLora], name: str) -> None:
    state, metadata = _state_and_configuration(modules, "text_encoder")
    target.load_lora_into_text_encoder(
        state,
        network_alphas=None,
        text_encoder=encoder,
        prefix="text_encoder",
        lora_scale=1.0,
        adapter_name=name,
        metadata=metadata,
        _pipeline=target,
        low_cpu_mem_usage=False,
    )
