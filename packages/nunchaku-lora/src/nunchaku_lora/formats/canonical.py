"""Any LoRA file as one thing: a pair of factors for each linear of the diffusers model."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from peft.utils.other import get_pattern_key

from nunchaku_lora.formats.names import Place, find_place, flux_place, format_name, parse_key
from nunchaku_lora.formats.products import LowRankProduct, hadamard_product, kronecker_product, whole_matrix

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
MAX_RANK = 128
"""Ranks that an adapter which is no product of two matrices gets at most, unless told otherwise."""


class LinearShape(NamedTuple):
    """What has to be known of a model's linear.

    Attributes:
        in_features, out_features: of the original linear.
        grows: whether its inputs may become more (a 16-bit `x_embedder` for control LoRAs).
    """

    in_features: int
    out_features: int
    grows: bool = False


@dataclass(frozen=True)
class ModuleLora:
    """The adapter of one linear: `alpha / rank * (up @ down)`.

    Attributes:
        down: (r, in_features) float32, float16 or bfloat16.
        up: (out_features, r).
        alpha: the file's, or r.
        bias: (out_features), added as it is, or None.
        dora: (out_features), the length that DoRA gives each row of the adapted weight, or None.
        gain: (out_features), `alpha / rank * gain` is what DoRA's factor of a row exceeds 1 by, where that is known
            already; `up` is multiplied by the factor then.
    """

    down: torch.Tensor
    up: torch.Tensor
    alpha: float
    bias: torch.Tensor | None = None
    dora: torch.Tensor | None = None
    gain: torch.Tensor | None = None

    @property
    def rank(self) -> int:
        """r."""
        return self.down.shape[0]


@dataclass
class Lora:
    """A LoRA file, converted.

    Attributes:
        format: what people call the format it came in.
        modules: module path in the diffusers model -> adapter.
        vectors: parameter name in the diffusers model -> tensor that replaces it (norms of control LoRAs).
        text_encoder: the file's module name in the CLIP text encoder -> adapter.
        sources: keys of `modules`, and of `text_encoder` behind "text_encoder.", -> the file's keys behind them.
        applied: keys of the file that went into those.
        skipped: keys that did not, and why.
        notes: what a user should know about a conversion that is not exact.
    """

    format: str
    modules: dict[str, ModuleLora] = field(default_factory=dict)
    vectors: dict[str, torch.Tensor] = field(default_factory=dict)
    text_encoder: dict[str, ModuleLora] = field(default_factory=dict)
    sources: dict[str, list[str]] = field(default_factory=dict)
    applied: list[str] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def drop(self, source: str, reason: str) -> None:
        """Count the keys behind an entry of `sources` as skipped, and remove the adapter."""
        for key in self.sources.pop(source):
            if key in self.applied:
                self.applied.remove(key)
                self.skipped.append((key, reason))
        self.modules.pop(source, None)
        self.text_encoder.pop(source.removeprefix("text_encoder."), None)


class NothingFitsError(ValueError):
    """No key of a LoRA means anything for the model."""


class _Unusable(Exception):
    """A group of keys that is sound but cannot be applied; the message is the reason given for them."""


def convert(
    tensors: Mapping[str, torch.Tensor],
    *,
    linears: Mapping[str, LinearShape] | None = None,
    configuration: Mapping[str, Any] | None = None,
    max_rank: int = MAX_RANK,
) -> Lora:
    """Recognise the keys of a LoRA and convert them.

    Args:
        tensors: by the file's keys.
        linears: the linears of the model that it is for, by path; None converts by names and shapes alone.
        configuration: PEFT configuration that came with the file: gives `alpha` where no key does.
        max_rank: see `MAX_RANK`.

    Raises:
        ValueError: the file is damaged (half a pair, rank 0, shapes that do not fit each other or the model, NaN, alpha
            without weights), or (`NothingFitsError`) none of its keys means anything; the message names a key.
    """
    lora = Lora(format_name(tensors))
    groups: dict[tuple[str, str], dict[str, tuple[str, torch.Tensor]]] = {}
    for key in sorted(tensors, key=lambda key: (not key.startswith("transformer."), key)):
        parsed = parse_key(key)
        if parsed.part == "other text encoder":
            lora.skipped.append((key, "pipelines have no adapters for this text encoder"))
        elif not parsed.kind:
            lora.skipped.append((key, "not a key of a LoRA"))
        elif parsed.kind in groups.setdefault(parsed[:2], {}):
            lora.skipped.append(
                (key, f"the file has this tensor twice, also as {groups[parsed[:2]][parsed.kind][0]!r}")
            )
        else:
            groups[parsed[:2]][parsed.kind] = (key, checked(key, tensors[key]))
    names = {path.replace(".", "_"): path for path in linears or ()}
    for (part, module), group in groups.items():
        keys = [key for key, _ in group.values()]
        try:
            if part == "text_encoder":
                of_encoder = _configuration_of("text_encoder", configuration)
                lora.text_encoder[module] = _factors(lora, module, group, of_encoder, max_rank)
                lora.sources[f"text_encoder.{module}"] = keys
            elif "vector" in group:
                lora.vectors[_vector_name(module)] = group["vector"][1]
            else:
                of_transformer = _configuration_of("transformer", configuration)
                _place_group(lora, module, group, linears, names, of_transformer, max_rank)
        except _Unusable as reason:
            lora.skipped += [(key, str(reason)) for key in keys]
        else:
            lora.applied += keys
    if not lora.applied:
        examples = ", ".join(f"{key!r} ({reason})" for key, reason in lora.skipped[:3])
        raise ValueError(
            f"none of the {len(tensors)} keys fits: this LoRA is for another model; for instance {examples}"
        )
    return lora


def checked(key: str, tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of a file as float32, float16 or bfloat16: 8-bit floats are widened.

    Raises:
        ValueError: it is empty, of another dtype, or not finite.
    """
    if tensor.dtype.is_floating_point and tensor.dtype.itemsize == 1:
        tensor = tensor.to(torch.bfloat16)  # exact
    elif tensor.dtype == torch.float64 or (key.endswith(".alpha") and not tensor.dtype.is_floating_point):
        tensor = tensor.to(torch.float32)
    if tensor.dtype not in FLOATS:
        raise ValueError(f"{key}: expected a floating-point tensor, got {tensor.dtype}")
    if tensor.numel() == 0:
        raise ValueError(f"{key}: has no elements, shape {tuple(tensor.shape)}: an adapter of rank 0?")
    if not torch.stack(torch.aminmax(tensor.detach())).isfinite().all():
        raise ValueError(f"{key}: has NaN or infinite values")
    return tensor.detach()


def _place_group(
    lora: Lora,
    module: str,
    group: dict[str, tuple[str, torch.Tensor]],
    linears: Mapping[str, LinearShape] | None,
    names: Mapping[str, str],
    configuration: Mapping[str, Any] | None,
    max_rank: int,
) -> None:
    place = find_place(module, linears, names)
    if place is None:
        raise _Unusable("the model has no such layer")
    missing = [path for path in place.paths if linears is not None and path not in linears]
    if missing:
        raise _Unusable(f"the model has no layer {missing[0]}")
    if taken := [path for path in place.paths if path in lora.modules]:
        raise _Unusable(f"the file has two adapters for {taken[0]}")
    whole = _factors(lora, module, group, configuration, max_rank)
    for path, part in _split(place, whole, linears, module).items():
        lora.modules[path] = _fitted(path, part, linears)
        lora.sources[path] = [key for key, _ in group.values()]


def _factors(
    lora: Lora,
    module: str,
    group: dict[str, tuple[str, torch.Tensor]],
    configuration: Mapping[str, Any] | None,
    max_rank: int,
) -> ModuleLora:
    """The adapter that a group of tensors is, in the rows of the file's model."""
    found = {kind: tensor for kind, (_, tensor) in group.items()}
    alpha = _alpha(group)
    if set(found) == {"alpha"}:
        raise ValueError(f"{group['alpha'][0]}: there are no weights for this alpha")
    kinds = {kind.partition("_")[0] for kind in found}
    if "lokr" in kinds or "hada" in kinds:
        product, scale = (_lokr if "lokr" in kinds else _loha)(module, found, alpha, max_rank)
        if product.error > 1e-3:
            lora.notes.append(f"{module}: rank {product.up.shape[1]} lacks {product.error:.1%} of the adapter")
        down, up, alpha = product.down, product.up, scale * product.up.shape[1]
    elif "diff" in found and found["diff"].dim() == 2:
        product = whole_matrix(found["diff"], max_rank)
        lora.notes.append(f"{module}: rank {product.up.shape[1]} lacks {product.error:.1%} of a whole difference")
        down, up, alpha = product.down, product.up, None
    elif "down" in found or "up" in found:
        for kind, other in (("down", "up"), ("up", "down")):
            if kind not in found:
                raise ValueError(f"{group[other][0]}: there is no {kind} factor for this {other} factor")
        if "mid" in found:
            raise _Unusable("adapters of convolutions with a middle factor are not supported")
        down, up = (_as_matrix(group[kind][0], found[kind]) for kind in ("down", "up"))
        if up.shape[1] != down.shape[0]:
            raise ValueError(
                f"{group['up'][0]}: {tuple(up.shape)} and the down factor {tuple(down.shape)} differ in rank"
            )
    elif "diff_b" in found:
        # a bias alone: an adapter that adds nothing else. Its width is the model's, see `_fitted`.
        height = found["diff_b"].numel()
        down, up = torch.zeros(1, 1), torch.zeros(height, 1)
    else:
        raise _Unusable("not a kind of adapter that is known, or not on a linear")
    rank, height = down.shape[0], up.shape[0]
    if alpha is None:
        alpha = _configured_alpha(module, rank, configuration)
    vectors = {}
    for kind in ("bias", "diff_b", "dora", "gain"):
        if kind not in found:
            continue
        if kind == "dora" and found[kind].numel() != height:
            raise _Unusable("DoRA over input channels cannot be a factor per row")
        if found[kind].numel() != height:
            raise ValueError(f"{group[kind][0]}: expected {height} values, got {tuple(found[kind].shape)}")
        vectors[kind] = found[kind].reshape(height)
    # PEFT scales the bias with the product, a difference of biases is whole
    bias = vectors.pop("diff_b", None)
    if "bias" in vectors:
        scaled = vectors.pop("bias") * (alpha / rank)
        bias = scaled if bias is None else bias + scaled
    return ModuleLora(down, up, alpha, bias, **vectors)


def _split(
    place: Place, whole: ModuleLora, linears: Mapping[str, LinearShape] | None, module: str
) -> dict[str, ModuleLora]:
    """The adapters of the linears that the file's model has fused."""
    height = whole.up.shape[0]
    if linears is not None:
        heights = [linears[path].out_features for path in place.paths]
    else:
        unit, rest = divmod(height, sum(place.shares))
        heights = [share * unit for share in place.shares]
        if rest:
            raise ValueError(f"{module}: {height} rows cannot be those of {', '.join(place.paths)}")
    if sum(heights) != height:
        raise ValueError(f"{module}: the model has {sum(heights)} rows in {', '.join(place.paths)}, the file {height}")
    if place.swapped:
        whole = _by_rows(whole, torch.arange(height).roll(height // 2))
    if len(heights) == 1:
        return {place.paths[0]: whole}
    ranges, stop = [], 0
    for size in heights:
        ranges.append((stop, stop + size))
        stop += size
    count = len(heights)
    ranks = [slice(0, whole.rank)] * count
    if whole.rank % count == 0:
        # Some trainers stack one adapter for each of the fused linears: up is then block-diagonal.
        own = [slice(i * whole.rank // count, (i + 1) * whole.rank // count) for i in range(count)]
        outside = whole.up.clone()
        for (top, bottom), columns in zip(ranges, own, strict=True):
            outside[top:bottom, columns] = 0
        if not outside.any():
            ranks = own
    parts = {}
    for path, (top, bottom), columns in zip(place.paths, ranges, ranks, strict=True):
        part = _by_rows(whole, slice(top, bottom))
        down, up = part.down[columns], part.up[:, columns]
        parts[path] = replace(part, down=down, up=up, alpha=part.alpha * down.shape[0] / whole.rank)
    return parts


def _fitted(path: str, part: ModuleLora, linears: Mapping[str, LinearShape] | None) -> ModuleLora:
    """The adapter, once its shapes are those of the model's linear."""
    if linears is None:
        return part
    shape = linears[path]
    given = part.down.shape[1]
    if not part.up.any() and part.bias is not None and given == 1:
        return replace(part, down=part.down.new_zeros(1, shape.in_features))
    if shape.grows and given < shape.in_features:
        # an adapter from before the layer grew: the new inputs are none of its business
        return replace(part, down=torch.nn.functional.pad(part.down, (0, shape.in_features - given)))
    if given != shape.in_features and not (shape.grows and given > shape.in_features):
        raise ValueError(f"{path}: the model has {shape.in_features} inputs, the file's adapter {given}")
    return part


def _by_rows(part: ModuleLora, rows: slice | torch.Tensor) -> ModuleLora:
    bias, dora, gain = (None if vector is None else vector[rows] for vector in (part.bias, part.dora, part.gain))
    return replace(part, up=part.up[rows], bias=bias, dora=dora, gain=gain)


def _as_matrix(key: str, tensor: torch.Tensor) -> torch.Tensor:
    if tensor.dim() == 4 and tensor.shape[2:] == (1, 1):
        return tensor.flatten(1)
    if tensor.dim() != 2:
        raise ValueError(f"{key}: expected a matrix, got shape {tuple(tensor.shape)}")
    return tensor


def _alpha(group: Mapping[str, tuple[str, torch.Tensor]]) -> float | None:
    if "alpha" not in group:
        return None
    key, tensor = group["alpha"]
    if tensor.numel() != 1:
        raise ValueError(f"{key}: alpha must be one number, got shape {tuple(tensor.shape)}")
    # 0 stands for "the rank" in sd-scripts
    return float(tensor) or None


def _configuration_of(component: str, configuration: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """The part of a PEFT configuration that is for one model of a pipeline.

    diffusers puts the model's name in front of every key; without any such name all of it is the transformer's.
    """
    prefix = f"{component}."
    own = {key.removeprefix(prefix): value for key, value in (configuration or {}).items() if key.startswith(prefix)}
    return own or (configuration or {} if component == "transformer" else {})


def _configured_alpha(module: str, rank: int, configuration: Mapping[str, Any] | None) -> float:
    """alpha of a module by its PEFT configuration, such that alpha / rank is its scale; the rank without one."""
    if not configuration or "lora_alpha" not in configuration:
        return float(rank)
    patterns = configuration.get("alpha_pattern") or {}
    try:
        alpha = float(patterns.get(get_pattern_key(patterns.keys(), module), configuration["lora_alpha"]))
    except (TypeError, ValueError) as error:
        raise ValueError(f"the file's PEFT configuration has an alpha that is no number: {error}") from error
    if not math.isfinite(alpha):
        raise ValueError(f"the file's PEFT configuration has alpha = {alpha} for {module}")
    return alpha * math.sqrt(rank) if configuration.get("use_rslora") else alpha


def _lokr(
    module: str, found: Mapping[str, torch.Tensor], alpha: float | None, max_rank: int
) -> tuple[LowRankProduct, float]:
    if "lokr_t2" in found:
        raise _Unusable("LoKr of convolutions is not supported")
    factors, rank = [], None
    for name in ("lokr_w1", "lokr_w2"):
        if name in found:
            factors.append(_as_matrix(f"{module}.{name}", found[name]))
            continue
        pair = [found.get(f"{name}_{which}") for which in "ab"]
        if pair[0] is None or pair[1] is None:
            raise ValueError(f"{module}: LoKr needs {name} or both of {name}_a and {name}_b")
        rank = pair[1].shape[0]
        factors.append(_product(f"{module}.{name}", pair[0], pair[1]))
    # with both factors whole, alpha has nothing to be relative to
    scale = 1.0 if alpha is None or rank is None else alpha / rank
    return kronecker_product(factors[0], factors[1], max_rank), scale


def _loha(
    module: str, found: Mapping[str, torch.Tensor], alpha: float | None, max_rank: int
) -> tuple[LowRankProduct, float]:
    if "hada_t1" in found or "hada_t2" in found:
        raise _Unusable("LoHa of convolutions is not supported")
    names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    missing = [name for name in names if name not in found]
    if missing:
        raise ValueError(f"{module}: LoHa lacks {', '.join(missing)}")
    factors = [_as_matrix(f"{module}.{name}", found[name]) for name in names]
    for a, b in (factors[:2], factors[2:]):
        _product(module, a, b)
    if factors[0].shape[0] != factors[2].shape[0] or factors[1].shape[1] != factors[3].shape[1]:
        raise ValueError(f"{module}: the two products of LoHa differ in shape")
    up1, down1, up2, down2 = factors
    scale = 1.0 if alpha is None else alpha / up1.shape[1]
    return hadamard_product(up1, down1, up2, down2, max_rank), scale


def _product(name: str, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[0]:
        raise ValueError(f"{name}: {tuple(a.shape)} and {tuple(b.shape)} are no product of two matrices")
    return a.float() @ b.float()


def _vector_name(module: str) -> str:
    place = flux_place(module)
    path = place.paths[0] if place else module
    if not path.endswith(("norm_q", "norm_k", "norm_added_q", "norm_added_k")):
        raise _Unusable("only the norms of queries and keys can be replaced")
    return f"{path}.weight"
