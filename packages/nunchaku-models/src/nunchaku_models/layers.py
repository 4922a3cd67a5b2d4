"""Swapping a model's linears for 4-bit layers, as its family's page declares and as the stored tensors say."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from nunchaku_kernels.nn import (
    GELU_SHIFT,
    LinearSlice,
    ModulationLinear,
    Origin,
    QuantizedLinear,
    SlicePart,
    SVDQLinear,
)
from nunchaku_kernels.ops import Arithmetic, check_arithmetic
from nunchaku_models.checkpoints import CheckpointError
from nunchaku_models.checkpoints.errors import shown
from nunchaku_models.families import Family, LowRankLinear, Modulation


class StoredTensor(Protocol):
    """What a file header says about one tensor."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> torch.dtype: ...


@dataclass(frozen=True)
class PlannedLayer:
    """One 4-bit layer of a concrete model: a family's declaration at one block.

    Attributes:
        path: module path of the owner.
        published: its key prefix in v1 files.
        sources: module paths of the diffusers linears it computes.
        spec: the declaration.
        smooth_with: module path of the owner whose smoothing vector it shares, or "".
    """

    path: str
    published: str
    sources: tuple[str, ...]
    spec: LowRankLinear | Modulation
    smooth_with: str = ""


def plan_layers(family: Family, config: Mapping[str, Any]) -> Iterator[PlannedLayer]:
    """All layers of `family` that can be 4-bit in a model of this configuration, block by block."""
    for block in family.blocks:
        for index in range(int(config[block.count])):
            at = f"{block.prefix}.{index}."
            for norm in block.modulation:
                yield PlannedLayer(at + norm.module, at + norm.module, (at + norm.module,), norm)
            for spec in block.low_rank:
                sources = tuple(at + source for source in spec.sources)
                shared = at + spec.smooth_with if spec.smooth_with else ""
                yield PlannedLayer(at + spec.module, at + spec.published, sources, spec, shared)


def source_columns(spec: LowRankLinear, in_features: int, out_features: int) -> tuple[int, int]:
    """The range of a source's input columns that its owner holds."""
    match spec.columns:
        case "head":
            return (0, out_features)
        case "tail":
            return (out_features, in_features)
        case _:
            return (0, in_features)


def swap_layers(
    model: nn.Module,
    family: Family,
    config: Mapping[str, Any],
    stored: Mapping[str, StoredTensor],
    *,
    dtype: torch.dtype,
    device: torch.device | str = "meta",
) -> list[str]:
    """Replace the linears of `model` for which `stored` has 4-bit tensors, in place; their values are loaded later.

    Args:
        model: a model of `family`, possibly on the meta device; layers without `<path>.qweight` stay as they are.
        config: its configuration.
        stored: name (v2, i.e. module tree) -> header entry of the file to be loaded.
        dtype: dtype of the layers' 16-bit tensors.

    Returns:
        Paths of the 4-bit layers.

    Raises:
        CheckpointError: a stored tensor does not fit the model; the message names it.
    """
    swapped: dict[str, QuantizedLinear] = {}
    for layer in plan_layers(family, config):
        if f"{layer.path}.qweight" not in stored:
            continue
        linears = [_source(model, path) for path in layer.sources]
        if isinstance(layer.spec, Modulation):
            owner: QuantizedLinear = _modulation(layer, linears[0], layer.spec, stored, dtype, device)
        else:
            owner = _low_rank(layer, linears, layer.spec, stored, dtype, device)
        _check_shapes(layer.path, owner, stored)
        swapped[layer.path] = owner
    install(model, swapped)
    return [*swapped]


def install(model: nn.Module, owners: Mapping[str, QuantizedLinear]) -> None:
    """Put 4-bit layers in the place of the linears they come from, whose names slices take over.

    Args:
        model: has the linears that the layers' `origin` names.
        owners: path -> layer.

    Raises:
        CheckpointError: the layers hold only some columns of a linear.
    """
    parts: dict[str, list[SlicePart]] = {}
    for path, owner in owners.items():
        for origin in owner.origin:
            if origin.name != path:
                parts.setdefault(origin.name, []).append(SlicePart(owner, origin.rows, origin.columns))
    for path, pieces in parts.items():
        if pieces[0].columns[0] != 0 or pieces[-1].columns[1] != _source(model, path).in_features:
            raise CheckpointError(f"{path}: the file holds only columns {[p.columns for p in pieces]} of this layer")
    for path, owner in owners.items():
        set_module(model, path, owner)
    for path, pieces in parts.items():
        # a slice counts columns from its own input, its parts tile them in order
        set_module(model, path, LinearSlice(pieces))


def origins(layer: PlannedLayer, linears: Sequence[tuple[int, int]]) -> tuple[Origin, ...]:
    """Which rows and columns of a low-rank layer come from which of its linears, given as (in, out) features."""
    assert isinstance(layer.spec, LowRankLinear)
    found, row = [], 0
    for path, (in_features, out_features) in zip(layer.sources, linears, strict=True):
        columns = source_columns(layer.spec, in_features, out_features)
        found.append(Origin(path, (row, row + out_features), columns))
        row += out_features
    return tuple(found)


def empty_model(model_class: Any, config: Mapping[str, Any]) -> Any:
    """A diffusers model of this configuration whose parameters have shapes and no memory."""
    # slow to import, like diffusers, and not needed to read a file header
    import accelerate

    with accelerate.init_empty_weights():
        return model_class.from_config(config)


def check_names(model: nn.Module, stored: Iterable[str], where: str) -> None:
    """Raise `CheckpointError` unless the parameters of `model`, its layers swapped, are the stored tensors."""
    given = set(stored)
    # factors of rank 0 need not be in the file
    wanted = {name for name, value in model.named_parameters() if name in given or value.numel()}
    for names, which in ((wanted - given, "does not have"), (given - wanted, "has more than the model:")):
        if names:
            sample = ", ".join(sorted(shown(name) for name in names)[:3])
            raise CheckpointError(f"{where} {which} {len(names)} tensors, such as {sample}")


def set_module(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put `module` at a dotted path, which may be new, of an existing parent."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def quantized_layers(model: nn.Module) -> dict[str, QuantizedLinear]:
    """Path -> 4-bit layer of a model."""
    return {path: module for path, module in model.named_modules() if isinstance(module, QuantizedLinear)}


def set_arithmetic(model: nn.Module, arithmetic: Arithmetic | None) -> None:
    """Choose how every low-rank 4-bit layer of `model` is multiplied; None for each device's best.

    Raises:
        ValueError: the stored precision cannot be multiplied that way, or the model has no such layer. Nothing was
            changed then.
    """
    layers = [layer for layer in quantized_layers(model).values() if isinstance(layer, SVDQLinear)]
    if not layers:
        raise ValueError(f"{type(model).__name__} has no 4-bit layers to set an arithmetic on")
    if arithmetic is not None:  # all of them before the first is changed
        for layer in layers:
            check_arithmetic(layer.label(), layer.precision, arithmetic)
    for layer in layers:
        layer.set_arithmetic(arithmetic)


def arithmetics(model: nn.Module, device: torch.device | str | None = None) -> dict[str, int]:
    """How the layers of `model` are multiplied: arithmetic -> number of layers.

    Args:
        model: any model with 4-bit layers.
        device: where it runs, if its tensors wait elsewhere (offloading); default: where they are.
    """
    counts: dict[str, int] = {}
    for layer in quantized_layers(model).values():
        if isinstance(layer, SVDQLinear):
            key = str(layer.arithmetic if device is None else layer.arithmetic_on(torch.device(device)))
        else:
            key = "w4a16 (modulation)"
        counts[key] = counts.get(key, 0) + 1
    return counts


def _source(model: nn.Module, path: str) -> nn.Linear:
    try:
        module = model.get_submodule(path)
    except AttributeError as error:
        raise CheckpointError(f"{path}: the file has this layer, the model configuration has not") from error
    if not isinstance(module, nn.Linear):
        raise CheckpointError(f"{path}: expected a linear layer to replace, found {type(module).__name__}")
    return module


def _modulation(
    layer: PlannedLayer,
    linear: nn.Linear,
    spec: Modulation,
    stored: Mapping[str, StoredTensor],
    dtype: torch.dtype,
    device: torch.device | str,
) -> ModulationLinear:
    return ModulationLinear(
        linear.in_features,
        linear.out_features,
        num_chunks=spec.num_chunks,
        bias=_has_bias(layer, [linear], stored),
        container=stored[f"{layer.path}.qweight"].dtype,
        dtype=dtype,
        device=device,
        name=layer.path,
    )


def _low_rank(
    layer: PlannedLayer,
    linears: list[nn.Linear],
    spec: LowRankLinear,
    stored: Mapping[str, StoredTensor],
    dtype: torch.dtype,
    device: torch.device | str,
) -> SVDQLinear:
    if f"{layer.path}.wscales" not in stored:
        raise CheckpointError(f"{layer.path}: `wscales` is missing from the file")
    nvfp4 = stored[f"{layer.path}.wscales"].dtype == torch.float8_e4m3fn
    down = stored.get(f"{layer.path}.proj_down")
    origin = origins(layer, [(linear.in_features, linear.out_features) for linear in linears])
    start, stop = origin[0].columns
    return SVDQLinear(
        stop - start,
        origin[-1].rows[1],
        rank=down.shape[-1] if down is not None and down.shape else 0,
        bias=_has_bias(layer, linears, stored),
        precision="nvfp4" if nvfp4 else "int4",
        shift=GELU_SHIFT if spec.after_gelu and not nvfp4 else 0.0,
        smooth_orig=f"{layer.path}.smooth_factor_orig" in stored,
        wtscale=_float_dtype(stored.get(f"{layer.path}.wtscale")),
        wcscales=f"{layer.path}.wcscales" in stored,
        dtype=dtype,
        device=device,
        name=layer.path,
        origin=origin,
    )


def _float_dtype(info: StoredTensor | None) -> bool | torch.dtype:
    """The dtype of an optional stored tensor; True where it is none a layer can have, which the shape check refuses."""
    if info is None:
        return False
    return info.dtype if info.dtype in (torch.float32, torch.float16, torch.bfloat16) else True


def _has_bias(layer: PlannedLayer, linears: list[nn.Linear], stored: Mapping[str, StoredTensor]) -> bool:
    """Whether the layer must have a bias: if its linears have one (that of a split linear is on its last part)."""
    first_part = isinstance(layer.spec, LowRankLinear) and layer.spec.columns == "head"
    return f"{layer.path}.bias" in stored or (any(linear.bias is not None for linear in linears) and not first_part)


def _check_shapes(path: str, owner: QuantizedLinear, stored: Mapping[str, StoredTensor]) -> None:
    for key, value in owner.named_parameters():
        name = f"{path}.{key}"
        if name not in stored and not value.numel():
            continue  # factors of rank 0 need not be in the file
        if name not in stored:
            raise CheckpointError(f"{path}: `{key}` is missing from the file")
        given = stored[name]
        if tuple(given.shape) != tuple(value.shape) and value.numel() + len(given.shape) != 1:
            raise CheckpointError(f"{name}: expected shape {tuple(value.shape)}, the file has {tuple(given.shape)}")
        exact = not value.is_floating_point() or value.dtype == torch.float8_e4m3fn
        if (exact and given.dtype != value.dtype) or (not exact and not given.dtype.is_floating_point):
            raise CheckpointError(f"{name}: expected {value.dtype}, the file has {given.dtype}")
