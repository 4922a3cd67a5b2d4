"""T5 and UMT5 encoders as their tensors describe them."""

import math
import re
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn
from transformers import T5Config, T5EncoderModel, UMT5Config, UMT5EncoderModel

from nunchaku_t5.errors import CheckpointError, shown

MODELS = {"t5": (T5Config, T5EncoderModel), "umt5": (UMT5Config, UMT5EncoderModel)}
"""`model_type` -> the classes of transformers."""

EMBEDDINGS = ("shared.weight", "encoder.embed_tokens.weight")
"""Two names of one tensor; files have either, or both."""

_BLOCK = re.compile(r"encoder\.block\.(\d{1,4})\.layer\.0\.layer_norm\.weight")
_BIAS = "encoder.block.{}.layer.0.SelfAttention.relative_attention_bias.weight"

# What tensors do not say; that of T5 v1.1 and UMT5, the versions used as text encoders.
_UNSEEN = {
    "feed_forward_proj": "gated-gelu",
    "dropout_rate": 0.1,
    "layer_norm_epsilon": 1e-6,
    "relative_attention_max_distance": 128,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "use_cache": False,
    "is_encoder_decoder": False,
}

_NOT_OF_FILES = ("quantization_config", "attn_implementation", "experts_implementation")

Shapes = Mapping[str, tuple[int, ...]]


def describe(shapes: Shapes, where: str) -> dict[str, Any]:
    """The entries of a config that shapes decide, `model_type` included.

    Args:
        shapes: tensor name -> shape, of original (not quantised) tensors, e.g. by `original_shapes`.
        where: for the message.

    Raises:
        CheckpointError: these are not the tensors of such an encoder.
    """
    blocks = sorted(int(match[1]) for match in map(_BLOCK.fullmatch, shapes) if match)
    if not blocks or blocks != list(range(len(blocks))):
        raise CheckpointError(f"{where} holds no T5 encoder: no tensors named encoder.block.0..., or gaps between them")
    vocabulary, width = _matrix(shapes, next((name for name in EMBEDDINGS if name in shapes), EMBEDDINGS[0]), where)
    for name in EMBEDDINGS:
        if shapes.get(name, (vocabulary, width)) != (vocabulary, width):
            raise CheckpointError(f"{where}: {name} must be {EMBEDDINGS[0]}, found shape {list(shapes[name])}")
    buckets, heads = _matrix(shapes, _BIAS.format(0), where)
    inner, _ = _matrix(shapes, "encoder.block.0.layer.0.SelfAttention.q.weight", where)
    gated = "encoder.block.0.layer.1.DenseReluDense.wi_0.weight" in shapes
    inputs, hidden = _matrix(shapes, "encoder.block.0.layer.1.DenseReluDense.wo.weight", where)
    if heads == 0 or inner % heads or inputs != width:
        raise CheckpointError(f"{where}: {inner} channels do not fit {heads} heads, or {inputs} not {width}")
    per_layer_bias = len(blocks) > 1 and _BIAS.format(1) in shapes
    return {
        "model_type": "umt5" if per_layer_bias else "t5",
        "num_layers": len(blocks),
        "vocab_size": vocabulary,
        "d_model": width,
        "d_kv": inner // heads,
        "d_ff": hidden,
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
        "is_gated_act": gated,
    }


def make_config(shapes: Shapes, given: Mapping[str, Any] | None, where: str) -> Any:
    """The config of an encoder, checked against its tensors: a config alone could ask for any amount of memory.

    Args:
        shapes: see `describe`.
        given: the entries of a config file, or None: then what the tensors do not say is that of T5 v1.1.
        where: for the message.

    Raises:
        CheckpointError: they do not fit each other, or the config is none of T5 or UMT5.
    """
    seen = describe(shapes, where)
    gated = seen.pop("is_gated_act")
    entries = dict(_UNSEEN if given is None else given)
    # a file of weights does not choose whose code runs: some implementations are downloaded
    entries = {name: value for name, value in entries.items() if not name.endswith(_NOT_OF_FILES)}
    if given is None:
        entries.update(seen)
        if not gated:
            entries["feed_forward_proj"] = "relu"
    kind = entries.pop("model_type", seen["model_type"])
    if kind not in tuple(MODELS):  # not a look-up: files may say anything, a list for one
        raise CheckpointError(f"{where}: `model_type` must be t5 or umt5, got {shown(kind)}")
    if len(shapes) and seen["num_layers"] > 1 and kind != seen["model_type"]:
        raise CheckpointError(f"{where}: the config says {kind}, the tensors are those of {seen['model_type']}")
    try:
        config = MODELS[kind][0](**entries)
    except Exception as error:  # transformers' classes validate with errors of many kinds
        raise CheckpointError(f"{where}: the config is not valid: {error}") from error
    for name, value in seen.items():
        if name != "model_type" and getattr(config, name) != value:
            raise CheckpointError(
                f"{where}: the config says `{name}` {shown(getattr(config, name))}, the tensors say {value}"
            )
    if config.is_gated_act != gated:
        raise CheckpointError(
            f"{where}: `feed_forward_proj` {shown(config.feed_forward_proj)} does not fit the tensors"
        )
    _check_numbers(config, where)
    return config


def _check_numbers(config: Any, where: str) -> None:
    """What no tensor shows, and a model fails at, or is silently wrong, when it runs."""
    if not 0 <= config.layer_norm_epsilon < math.inf:
        raise CheckpointError(
            f"{where}: `layer_norm_epsilon` must not be negative, and finite, got {shown(config.layer_norm_epsilon)}"
        )
    # half of the buckets are for tokens to the left; half of those for distances of their own, the rest for ranges
    exact = config.relative_attention_num_buckets // 4
    if exact == 0 or config.relative_attention_max_distance <= exact:
        raise CheckpointError(
            f"{where}: `relative_attention_max_distance` must exceed a quarter of at least 4 buckets, got "
            f"{shown(config.relative_attention_max_distance)} and {config.relative_attention_num_buckets} buckets"
        )


def skeleton(config: Any, where: str) -> Any:
    """The model of a config on the meta device.

    Raises:
        CheckpointError: transformers cannot build it.
    """
    try:
        with torch.device("meta"):
            return MODELS[config.model_type][1](config)
    except Exception as error:  # e.g. KeyError for an unknown activation
        raise CheckpointError(f"{where}: the config is not valid: {type(error).__name__}: {error}") from error


def tensor_names(model: nn.Module) -> Collection[str]:
    """Names of a model's tensors, tied ones once."""
    names = dict.fromkeys(model.state_dict())
    names.pop(EMBEDDINGS[1], None)
    return names


def _matrix(shapes: Shapes, name: str, where: str) -> tuple[int, int]:
    shape = shapes.get(name)
    if shape is None:
        raise CheckpointError(f"{where} holds no whole T5 encoder: it lacks the tensor {name}")
    if len(shape) != 2 or 0 in shape:
        raise CheckpointError(f"{where}: {name} must be a matrix, found shape {list(shape)}")
    return shape[0], shape[1]
