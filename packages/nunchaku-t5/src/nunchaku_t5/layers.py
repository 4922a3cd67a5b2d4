"""The modules of a quantised encoder, and how they get into a model."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn.functional import embedding
from transformers.activations import NewGELUActivation

from nunchaku_kernels.formats import padded_groups
from nunchaku_kernels.nn import QuantizedLinear, W4A16Linear
from nunchaku_t5._compat import add_ties, drop_ties, tied_weights
from nunchaku_t5.config import LayerForm
from nunchaku_t5.errors import shown


class EncoderLinear(W4A16Linear):
    """A linear of an encoder in 4 bits, or 8.

    Args:
        wide: with float16 inputs, compute and return float32. For a feed-forward part whose activations exceed what
            float16 can hold; `weight` then has dtype float32, to which T5 casts the input of `wo`.
    """

    integers: ClassVar = {"qweight": torch.int16}
    """Tensors that no cast may touch."""

    def __init__(
        self, in_features: int, out_features: int, *, group_size: int, wide: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(in_features, out_features, group_size=group_size, container=torch.int16, **kwargs)
        self.wide = wide

    @property
    def weight(self) -> torch.Tensor:
        """Zeros (out_features, in_features) without storage, see `QuantizedLinear.weight`."""
        dtype = torch.float32 if self.wide and self.compute_dtype == torch.float16 else self.compute_dtype
        # not by super(): torch.compile does not follow properties there
        zeros = torch.zeros((), dtype=dtype, device=self.qweight.device).expand(self.out_features, self.in_features)
        # transformers initialises weights that it does not take for loaded: attention modules those of their children
        zeros._is_hf_initialized = True  # type: ignore[attr-defined]
        return zeros

    def forward(self, x: torch.Tensor, *, rows: tuple[int, int] | None = None) -> torch.Tensor:
        """x (..., in_features) -> (..., out_features), in the dtype of x, or float32 for float16 if `wide`."""
        if self.wide and x.dtype == torch.float16:
            x = x.float()
        return super().forward(x, rows=rows)

    def _save_to_state_dict(self, destination: dict[str, torch.Tensor], prefix: str, keep_vars: bool) -> None:
        # Without the placeholder `weight`: transformers takes each entry for a tensor that has to be in the file.
        super(QuantizedLinear, self)._save_to_state_dict(destination, prefix, keep_vars)


class Int8Embedding(nn.Module):
    """An embedding of int8 rows with one scale each: row = weight * wscale.

    Registered tensors: `weight` (num_embeddings, embedding_dim) int8, `wscales` (num_embeddings) T. The first name is
    that of the original, so that transformers ties it to other modules as it would tie the original.
    """

    integers: ClassVar = {"weight": torch.int8}
    """Tensors that no cast may touch."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        weight = torch.empty(num_embeddings, embedding_dim, dtype=torch.int8, device=device)
        self.weight = nn.Parameter(weight, requires_grad=False)
        wscales = torch.empty(num_embeddings, dtype=dtype, device=device)
        self.wscales = nn.Parameter(wscales, requires_grad=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Integer ids (...) -> (..., embedding_dim) in the dtype of the scales."""
        rows, wscales = embedding(ids, self.weight), embedding(ids, self.wscales.unsqueeze(-1))
        return rows.to(wscales.dtype) * wscales

    def dequantize(self) -> torch.Tensor:
        """The stored rows (num_embeddings, embedding_dim), float32."""
        return self.weight.float() * self.wscales.float().unsqueeze(-1)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}"


def fits(module: nn.Module, form: LayerForm) -> bool:
    """Whether a module can be stored in a form."""
    if type(module) is nn.Embedding:
        return form.bits == 8 and form.rank == 0
    if type(module) is nn.Linear:  # a subclass means more than a product
        return module.in_features % form.group_size == 0 and module.out_features % 4 == 0
    return False


def has_hooks(module: nn.Module) -> bool:
    """Whether calling a module does more than its class says: what takes its place would not."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or "forward" in vars(module)


def stored_tensors(module: nn.Module, form: LayerForm) -> dict[str, tuple[tuple[int, ...], torch.dtype | None]]:
    """Names, shapes and dtypes (None: the model's) of the tensors that store a module (see `fits`) in a form."""
    if isinstance(module, nn.Embedding):
        rows, width = module.num_embeddings, module.embedding_dim
        return {"weight": ((rows, width), torch.int8), "wscales": ((rows,), None)}
    assert isinstance(module, nn.Linear)
    inputs, outputs = module.in_features, module.out_features
    columns = inputs * form.bits // 4  # 8 bits are two planes of 4
    groups = padded_groups(columns // form.group_size, form.group_size)
    tensors: dict[str, tuple[tuple[int, ...], torch.dtype | None]] = {
        "qweight": ((outputs // 4, columns), torch.int16),
        "wscales": ((groups, outputs), None),
        "wzeros": ((groups, outputs), None),
    }
    if form.rank:
        tensors |= {"proj_down": ((form.rank, inputs), None), "proj_up": ((outputs, form.rank), None)}
    if module.bias is not None:
        tensors["bias"] = ((outputs,), None)
    return tensors


def stored_bytes(module: nn.Module, form: LayerForm) -> int:
    """Of those tensors, where the model's dtype has 16 bits."""
    shapes = stored_tensors(module, form).values()
    return sum(torch.Size(shape).numel() * (dtype or torch.bfloat16).itemsize for shape, dtype in shapes)


def swap_layers(model: Any, layers: Mapping[str, LayerForm]) -> None:
    """Put modules for quantised tensors, on the meta device, in the places of the original ones; and one pass for GELU.

    Args:
        model: a model of transformers.
        layers: module path -> form.

    Raises:
        ValueError: the model has no such module, or it cannot be stored in that form.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    homes = places(model)
    wide = set(wide_parents(model))
    for name, form in layers.items():
        original = modules.get(name)
        if original is None:
            raise ValueError(f"{type(model).__name__} has no module {shown(name)}")
        if not fits(original, form):
            raise ValueError(f"{name}: {original} cannot be stored as {form}")
        parent = name.rpartition(".")[0]
        if isinstance(original, nn.Embedding):
            rows, width = original.num_embeddings, original.embedding_dim
            new: nn.Module = Int8Embedding(rows, width, dtype=original.weight.dtype, device="meta")
        else:
            new = EncoderLinear(
                original.in_features,
                original.out_features,
                bias=original.bias is not None,
                group_size=form.group_size,
                bits=form.bits,
                rank=form.rank,
                dtype=original.weight.dtype,
                device="meta",
                name=name,
                wide=parent in wide,
            )
        new.train(original.training)
        for home, child in homes[original]:
            setattr(home, child, new)
    _tie_scales(model, [name for name, form in layers.items() if isinstance(modules[name], nn.Embedding)])
    for module in modules.values():
        if type(module) is NewGELUActivation and not has_hooks(module):
            # T5 v1.1's, in eight passes over the widest tensor of a block; the same function in one, rounded once
            for home, child in homes[module]:
                setattr(home, child, nn.GELU(approximate="tanh"))


def places(model: nn.Module) -> dict[nn.Module, list[tuple[nn.Module, str]]]:
    """Module -> the parents it has, and its name in each: a module may be in several places."""
    found: dict[nn.Module, list[tuple[nn.Module, str]]] = {}
    for parent in model.modules():
        for child, module in parent._modules.items():
            if module is not None:
                found.setdefault(module, []).append((parent, child))
    return found


def _tie_scales(model: Any, embeddings: Iterable[str]) -> None:
    """Put an int8 embedding into the places that transformers ties to it, and tie its scales as it ties `weight`."""
    tied, added = tied_weights(model), {}
    for name in embeddings:
        for other in (other.removesuffix(".weight") for other, source in tied.items() if source == f"{name}.weight"):
            if isinstance(model.get_submodule(other), nn.Embedding | Int8Embedding):
                parent, _, child = other.rpartition(".")
                setattr(model.get_submodule(parent), child, model.get_submodule(name))
                added[f"{other}.wscales"] = f"{name}.wscales"
    if added:
        add_ties(model, added)


def untie_scales(model: Any) -> None:
    """Take back what `swap_layers` said about the scales of int8 embeddings: the model has none any more."""
    drop_ties(model, ".wscales")


def wide_parents(model: Any) -> Iterator[str]:
    """Paths of modules with a linear that transformers keeps in float32 in a float16 model: T5's feed-forward parts."""
    kept = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    for name, module in model.named_modules():
        if any(child in kept and isinstance(part, nn.Linear) for child, part in module.named_children()):
            yield name


def tied_names(model: Any) -> dict[str, set[str]]:
    """Path of a module -> those of other modules that share its `weight`; of modules that share it."""
    names: dict[str, set[str]] = {}
    for target, source in tied_weights(model).items():
        one, other = target.removesuffix(".weight"), source.removesuffix(".weight")
        names.setdefault(one, set()).add(other)
        names.setdefault(other, set()).add(one)
    return names
