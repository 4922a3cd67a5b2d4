"""The published single file of a 4-bit T5 (checkpoint_format.md 8): names, metadata, and what they say."""

import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch

from nunchaku_kernels.formats import padded_groups
from nunchaku_t5.architecture import EMBEDDINGS, make_config
from nunchaku_t5.config import GROUP_SIZES, LayerForm, W4A16Config, parse_quantization
from nunchaku_t5.errors import CheckpointError, shown
from nunchaku_t5.files import TensorFiles, TensorInfo, parse_json

MODEL_CLASS = "NunchakuT5EncoderModel"
TENSOR_NAMES = {"wscales": "scales", "wzeros": "scaled_zeros"}
"""Name in a module -> name in a published file, where they differ."""
_MODULE_NAMES = {published: name for name, published in TENSOR_NAMES.items()}


def to_module_name(name: str) -> str:
    """`X.scales` -> `X.wscales`; other names as they are."""
    stem, dot, last = name.rpartition(".")
    return stem + dot + _MODULE_NAMES.get(last, last)


def to_published_name(name: str) -> str:
    """`X.wscales` -> `X.scales`; other names as they are."""
    stem, dot, last = name.rpartition(".")
    return stem + dot + TENSOR_NAMES.get(last, last)


def metadata(config: Any, quantization: W4A16Config) -> dict[str, str]:
    """What the header of a published file says about its tensors."""
    entries = config.to_dict()
    entries.pop("quantization_config", None)
    return {
        "format": "pt",
        "model_class": MODEL_CLASS,
        "config": json.dumps(entries),
        "quantization_config": json.dumps(quantization.to_dict()),
    }


def read_config(files: TensorFiles, where: str) -> tuple[Any, W4A16Config]:
    """The config of the encoder in a published file, and how its modules are stored.

    Args:
        files: the file.
        where: its name, for messages.

    Raises:
        CheckpointError: it holds something else.
    """
    infos = {to_module_name(name): files.info(name) for name in files}
    if len(infos) != len(files):
        raise CheckpointError(f"{where} holds both names of a tensor (scales and wscales, or scaled_zeros and wzeros)")
    for name, info in infos.items():
        if name.endswith(".qweight") and (info.dtype != torch.int16 or len(info.shape) != 2):
            raise CheckpointError(f"{where}: {shown(name)} must be an int16 matrix, found {info}")
    quantization = _quantization(infos, files.metadata.get("quantization_config"), where)
    text = files.metadata.get("config")
    given = None if text is None else parse_json(text, f"{where}: metadata `config`")
    return make_config(original_shapes(infos, quantization.layers), given, where), quantization


def state_dict(files: TensorFiles) -> dict[str, torch.Tensor]:
    """The tensors of a published file by the names that modules have; mapped, not read. The embeddings once."""
    tensors = {to_module_name(name): files.get(name) for name in files}
    if all(name in tensors for name in EMBEDDINGS):
        del tensors[EMBEDDINGS[1]]
    return tensors


def _quantization(infos: Mapping[str, TensorInfo], text: str | None, where: str) -> W4A16Config:
    """How the modules are stored: published files leave it to their tensors, ours say it, too.

    What ours say is only a claim: the shapes of all tensors are compared with it before anything is allocated.
    """
    modules = {name.removesuffix(".qweight") for name in infos if name.endswith(".qweight")}
    if not modules:
        raise CheckpointError(f"{where} holds no 4-bit layers (tensors named ....qweight); quantise it first")
    if text is not None:
        said = f"{where}: metadata `quantization_config`"
        config = parse_quantization(parse_json(text, said), said)
        if {name for name in config.layers if f"{name}.weight" not in EMBEDDINGS} != modules:
            raise CheckpointError(f"{said} names other modules than those that have a qweight")
        return config
    layers = {module: LayerForm(group_size=_group_size(infos, module, where)) for module in sorted(modules)}
    usual = Counter(form.group_size for form in layers.values()).most_common(1)[0][0]
    return W4A16Config(usual, layers)


def _group_size(infos: Mapping[str, TensorInfo], module: str, where: str) -> int:
    """From the padded number of groups, which is twice as large for 64 as for 128."""
    qweight, wscales = infos[f"{module}.qweight"], infos.get(f"{module}.wscales")
    if wscales is None or len(wscales.shape) != 2:
        raise CheckpointError(f"{where}: {shown(module)} has a qweight, but no matrix of scales")
    inputs = qweight.shape[1]
    for size in GROUP_SIZES:
        if inputs and inputs % size == 0 and wscales.shape[0] == padded_groups(inputs // size, size):
            return size
    raise CheckpointError(
        f"{where}: {shown(module)} has {inputs} inputs and {wscales.shape[0]} rows of scales, which fits neither "
        "groups of 128 nor of 64"
    )


def original_shapes(infos: Mapping[str, TensorInfo], layers: Mapping[str, LayerForm]) -> dict[str, tuple[int, ...]]:
    """The shapes that the tensors of a model had before it was quantised; names are those that modules have."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, info in infos.items():
        module, _, last = name.rpartition(".")
        if module in layers and last == "qweight" and len(info.shape) == 2:
            shapes[f"{module}.weight"] = (info.shape[0] * 4, info.shape[1] * 4 // layers[module].bits)
        elif module not in layers or last in ("weight", "bias"):
            shapes[name] = info.shape
    return shapes
