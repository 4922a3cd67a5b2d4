"""From a quantised checkpoint of any naming to a model, and back to a published file."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nunchaku_kernels.nn import SVDQLinear
from nunchaku_kernels.ops import Arithmetic
from nunchaku_models.checkpoints import (
    Checkpoint,
    CheckpointError,
    DiffusersView,
    StreamingWriter,
    TensorInfo,
    atomic_folder,
    by_alignment,
    detect_form,
    detect_precision,
    flux_config,
    is_finite,
    is_quantised,
    open_checkpoint,
    require_family,
    v1_to_v2,
    v2_to_v1,
)
from nunchaku_models.checkpoints.detect import split_prefix
from nunchaku_models.diffusers_quantizer import SVDQuantConfig, family_of, mark_quantized, placeholder_keys
from nunchaku_models.dtypes import BY_NAME, parse_dtype
from nunchaku_models.families import FAMILIES
from nunchaku_models.layers import check_names, empty_model, quantized_layers, set_arithmetic, swap_layers
from nunchaku_models.published import file_metadata, folder_config, plain_config, weights_name


def load_transformer(
    model_class: Any,
    path: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    arithmetic: Arithmetic | None = None,
    **hub: Any,
) -> Any:
    """Load a quantised transformer from a published file (v1 or v2 names), a folder, or a hub path.

    Args:
        model_class: the diffusers class to build, or a subclass.
        path: see `checkpoints.open_checkpoint`.
        dtype: of the 16-bit tensors; default: that of the file.
        device: where the tensors go.
        arithmetic: how 4-bit layers are multiplied; default: the device's best.
        hub: `subfolder`, `revision`, `cache_dir`, `token`, `local_files_only`, ...

    Raises:
        CheckpointError: not a quantised checkpoint of a known family, or tensors that do not fit it.
        ValueError: an arithmetic that the file's precision does not have, or a dtype that layers do not compute in.
    """
    if dtype is not None:
        dtype = parse_dtype(dtype, argument="torch_dtype")
    with open_checkpoint(path, **hub) as source:
        family = FAMILIES[require_family(list(source), source.where)]
        form = detect_form(source)
        if not is_quantised(form):
            raise CheckpointError(
                f"{source.where} is not quantised; run `nunchaku quantize` on it, or load it with diffusers"
            )
        if form == "nunchaku-lite":
            raise CheckpointError(
                f"{source.where} is in diffusers' nunchaku_lite form (unfused layers), which is not supported; "
                "quantise the original model, or use the published single file"
            )
        precision = detect_precision(source)
        config = flux_config(source)
        prefix, own_names = split_prefix(source, source.where)
        names = {v1_to_v2(own.removeprefix(prefix)): own for own in own_names}
        stored = {name: source.info(own) for name, own in names.items()}
        dtype = dtype or _stored_dtype(stored)
        model = empty_model(model_class, config)
        try:
            swap_layers(model, family, config, stored, dtype=dtype)
        except ValueError as error:
            raise CheckpointError(f"{source.where}: {error}") from error
        _fill(model, source, names, dtype, torch.device(device))
        ranks = [layer.rank for layer in quantized_layers(model).values() if isinstance(layer, SVDQLinear)]
    if family.prepare is not None:
        family.prepare(model)
    mark_quantized(model, SVDQuantConfig(precision, rank=max(ranks, default=0)))
    if arithmetic is not None:
        set_arithmetic(model, arithmetic)
    return model.eval()


def load_16bit_weights(transformer: nn.Module, view: DiffusersView) -> None:
    """Overwrite a 16-bit transformer's values with those of a checkpoint of any naming, tensor by tensor.

    Raises:
        CheckpointError: another architecture than the transformer's, a quantised one, or values that do not fit.
    """
    if quantized_layers(transformer):
        raise CheckpointError("the base pipeline's own transformer is quantised; a 16-bit base is needed")
    own = transformer.state_dict()
    if {name: tuple(value.shape) for name, value in own.items()} != {n: tuple(view.info(n).shape) for n in view}:
        raise CheckpointError(f"{view.where} is not of the same architecture as the base pipeline's transformer")
    for name, value in own.items():
        value.copy_(view.tensor(name))
        if not is_finite(value):
            raise CheckpointError(f"{view.where}: {name} holds NaN, infinity or values too large for {value.dtype}")
        view.release(name)


def save_file(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a quantised transformer as one published file (v1 names, metadata), atomically.

    Raises:
        ValueError: the model has no 4-bit layers or no family.
        CheckpointError: the file cannot be written.
    """
    tensors = {v2_to_v1(name): value for name, value in stored_state(model).items()}
    infos = by_alignment([TensorInfo(name, value.dtype, tuple(value.shape)) for name, value in tensors.items()])
    with StreamingWriter(path, infos, published_metadata(model)) as writer:
        for info in infos:
            writer.write(info.name, tensors[info.name])


def stored_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict that belongs into a file: v2 names, no placeholders.

    Raises:
        ValueError: the model has no 4-bit layers.
    """
    if not quantized_layers(model):
        raise ValueError(f"{type(model).__name__} has no 4-bit layers; save it with diffusers")
    placeholders = placeholder_keys(model)
    return {name: value for name, value in model.state_dict().items() if name not in placeholders}


def published_metadata(model: nn.Module) -> dict[str, str]:
    """The metadata of a published file for this model."""
    layers = [layer for layer in quantized_layers(model).values() if isinstance(layer, SVDQLinear)]
    return file_metadata(
        family_of(model).transformer_class,
        plain_config(dict(model.config)),  # type: ignore[arg-type]
        layers[0].precision,
        max(layer.rank for layer in layers),
    )


def save_folder(model: nn.Module, path: str | os.PathLike[str], *, variant: str | None = None) -> None:
    """Write a quantised transformer as a diffusers folder (v2 names), atomically.

    Args:
        model: the transformer.
        path: folder to create; missing parents are created too.
        variant: as in diffusers, "fp16" for `diffusion_pytorch_model.fp16.safetensors`.

    Raises:
        ValueError: the model has no 4-bit layers or no family.
        CheckpointError: the folder exists with other files in it, or cannot be written.
    """
    tensors = stored_state(model)
    infos = by_alignment([TensorInfo(name, value.dtype, tuple(value.shape)) for name, value in tensors.items()])
    layers = [layer for layer in quantized_layers(model).values() if isinstance(layer, SVDQLinear)]
    config = plain_config(dict(model.config))  # type: ignore[arg-type]
    text = folder_config(
        family_of(model).transformer_class, config, layers[0].precision, max(layer.rank for layer in layers)
    )
    weights = weights_name(variant)
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be created: {error.strerror or error}") from error
    with atomic_folder(path, ["config.json", weights]) as folder:
        with StreamingWriter(folder / weights, infos, {"format": "pt"}) as writer:
            for info in infos:
                writer.write(info.name, tensors[info.name])
        (folder / "config.json").write_text(text)


def _stored_dtype(stored: Mapping[str, TensorInfo]) -> torch.dtype:
    """The 16-bit dtype of a file: that of its embedders."""
    dtype = stored["x_embedder.weight"].dtype
    return dtype if dtype in BY_NAME.values() else torch.bfloat16


def _fill(
    model: nn.Module, source: Checkpoint, names: Mapping[str, str], dtype: torch.dtype, device: torch.device
) -> None:
    """Give every parameter on the meta device its stored value."""
    check_names(model, names, source.where)
    for name, parameter in [*model.named_parameters()]:
        module, _, leaf = name.rpartition(".")
        if name not in names:  # a factor of rank 0
            empty = nn.Parameter(torch.empty_like(parameter, device=device), requires_grad=False)
            setattr(model.get_submodule(module), leaf, empty)
            continue
        given = source.tensor(names[name])
        # a factor of the whole tensor is stored with one dimension or with none
        if given.shape != parameter.shape and given.numel() + parameter.numel() != 2:
            raise CheckpointError(
                f"{source.where}: {name} must have shape {tuple(parameter.shape)}, has {tuple(given.shape)}"
            )
        if not is_finite(given):
            raise CheckpointError(f"{source.where}: {name} holds NaN or infinity; the file is damaged, get it again")
        keep = not parameter.is_floating_point() or parameter.dtype == torch.float8_e4m3fn or leaf == "wtscale"
        # a copy: the file may be replaced while the model lives
        value = given.reshape(parameter.shape).to(device, parameter.dtype if keep else dtype, copy=True)
        if not is_finite(value):
            raise CheckpointError(f"{source.where}: {name} holds values too large for {dtype}; load it as bfloat16")
        setattr(model.get_submodule(module), leaf, nn.Parameter(value, requires_grad=False))
        source.release(names[name])
