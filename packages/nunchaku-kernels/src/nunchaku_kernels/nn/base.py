"""What every quantised layer shares: origin, the `weight` that loaders ask for, the arithmetic."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from nunchaku_kernels.nn._derived import DerivedTensors


@dataclass(frozen=True)
class Origin:
    """One original linear, as seen from the layer that now computes it.

    Attributes:
        name: module path of the original linear, relative to the model, e.g. "transformer_blocks.3.attn.to_k".
        rows: range of the owner's output rows that are this linear's.
        columns: range of the original linear's input columns that the owner holds.
    """

    name: str
    rows: tuple[int, int]
    columns: tuple[int, int]


class QuantizedLinear(nn.Module):
    """Base of the 4-bit layers: a linear map with published tensors instead of a weight matrix.

    Not an `nn.Linear`: diffusers' layerwise casting rewrites the weights of its subclasses.

    Args:
        in_features: K of the original linear, before padding.
        out_features: N of the original linear (of all fused ones together), before padding.
        name: module path, for error messages.
        origin: the original linears this layer computes; default: one, called `name`.
    """

    def __init__(self, in_features: int, out_features: int, *, name: str = "", origin: tuple[Origin, ...] = ()) -> None:
        super().__init__()
        for label, value in (("in_features", in_features), ("out_features", out_features)):
            if not isinstance(value, int) or value <= 0:
                raise ValueError(f"{name or type(self).__name__}: `{label}` must be a positive integer, got {value!r}")
        self.in_features = in_features
        self.out_features = out_features
        self.name = name
        self.origin = origin or (Origin(name, (0, out_features), (0, in_features)),)
        self._derived = DerivedTensors()

    @property
    def compute_dtype(self) -> torch.dtype:
        """Dtype of the layer's 16-bit tensors."""
        raise NotImplementedError

    @property
    def weight(self) -> torch.Tensor:
        """Zeros (out_features, in_features) in one element of storage, for code that asks for shape, dtype or device.

        A property, not a parameter: offloaders and `.to()` would materialise it.
        """
        device = next(self.parameters()).device
        return torch.zeros((), dtype=self.compute_dtype, device=device).expand(self.out_features, self.in_features)

    def natural_bias(self) -> torch.Tensor | None:
        """The bias (out_features,) in natural order, or None."""
        raise NotImplementedError

    def load_packed(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take over published tensors (no copy). Names, shapes and dtypes must be those of the layer.

        Raises:
            ValueError: a tensor is missing, unknown, or of another shape or dtype.
        """
        own = {key: value for key, value in self._parameters.items() if value is not None}
        missing, unknown = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
        if missing or unknown:
            raise ValueError(f"{self.label()}: missing tensors {missing}, unknown tensors {unknown}")
        for key, value in own.items():
            given = tensors[key]
            if given.shape != value.shape or (given.dtype != value.dtype and not value.dtype.is_floating_point):
                raise ValueError(
                    f"{self.label()}: `{key}` must be {value.dtype} {tuple(value.shape)}, "
                    f"got {given.dtype} {tuple(given.shape)}"
                )
            self._parameters[key] = nn.Parameter(given, requires_grad=False)

    def label(self) -> str:
        """How error messages call this layer."""
        return self.name or type(self).__name__

    def _rows_of_input(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., in_features) as a matrix (M, in_features), checked."""
        if not x.is_floating_point():
            raise TypeError(f"{self.label()}: `x` must be floating point, got {x.dtype}")
        if x.dim() == 0 or x.shape[-1] != self.in_features:
            raise ValueError(f"{self.label()}: `x` must have {self.in_features} channels, got shape {tuple(x.shape)}")
        return x.reshape(-1, self.in_features)

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        # Moving a layer frees what was derived from its old tensors.
        self._derived.clear()
        # `.to(dtype)` converts every floating tensor; an fp8 scale is a storage format and must stay what it is.
        guarded = {key: p for key, p in self._parameters.items() if p is not None and p.dtype == torch.float8_e4m3fn}
        for key, parameter in guarded.items():
            self._parameters[key] = nn.Parameter(parameter.view(torch.uint8), requires_grad=False)
        try:
            return super()._apply(fn, recurse)
        finally:
            for key in guarded:
                moved = self._parameters[key]
                assert moved is not None
                self._parameters[key] = nn.Parameter(moved.view(torch.float8_e4m3fn), requires_grad=False)

    def _save_to_state_dict(self, destination: dict[str, torch.Tensor], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight"] = self.weight  # diffusers' LoRA loaders look shapes up there

    def _load_from_state_dict(self, state_dict: dict[str, torch.Tensor], prefix: str, *args: object) -> None:
        drop_placeholder_weight(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)


def drop_placeholder_weight(state_dict: dict[str, torch.Tensor], prefix: str) -> None:
    """Take a layer's own stride-0 `weight` out of a state dict; a real weight stays, and is reported as unexpected."""
    weight = state_dict.get(prefix + "weight")
    if weight is not None and not any(weight.stride()):
        del state_dict[prefix + "weight"]


def parameter(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str | None) -> nn.Parameter:
    """An uninitialised, frozen parameter: quantised tensors are loaded or made, never initialised."""
    return nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=False)
