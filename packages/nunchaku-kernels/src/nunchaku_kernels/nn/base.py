"""What every quantised layer shares: origin, the `weight` that loaders ask for, the arithmetic."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from nunchaku_kernels._checks import FLOAT_DTYPES
from nunchaku_kernels.nn._derived import DerivedTensors
from nunchaku_kernels.nn.adapters import Adapter, AdapterSet


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
        self._adapters = AdapterSet()
        self._factors = DerivedTensors(spare_bytes=in_features * out_features // 8)  # of adapters, joined

    @property
    def compute_dtype(self) -> torch.dtype:
        """Dtype of the layer's 16-bit tensors."""
        raise NotImplementedError

    @property
    def weight(self) -> torch.Tensor:
        """Zeros (out_features, in_features) in one element of storage, for code that asks for shape, dtype or device.

        A property, not a parameter: offloaders and `.to()` would materialise it.
        """
        device = self._storage_parameter().device
        return torch.zeros((), dtype=self.compute_dtype, device=device).expand(self.out_features, self.in_features)

    def natural_bias(self) -> torch.Tensor | None:
        """The bias (out_features,) in natural order, or None."""
        raise NotImplementedError

    def dequantize(self) -> torch.Tensor:
        """The stored weight with the stored low-rank branch, (out_features, in_features) float32, rows in the order of
        the original linears; without adapters."""
        raise NotImplementedError

    def attach(
        self,
        adapter: Adapter,
        rows: tuple[int, int] | None = None,
        columns: tuple[int, int] | None = None,
        *,
        last: bool = True,
        keep: bool = True,
    ) -> None:
        """Let an adapter act on every path through this layer, beside the stored tensors, which stay as they are.

        What it adds is computed from the raw input, in the dtype of the layer's low-rank factors.

        Args:
            adapter: asked for its terms on every call (see `nn.adapters`); attaching it twice changes nothing.
            rows: the output rows that it adapts; default: all.
            columns: which of the input columns of its linear the layer has; default: all.
            last: whether these are its last columns.
            keep: whether the layer holds a reference to it.

        Raises:
            ValueError, TypeError: the ranges do not fit the layer.
        """
        columns = columns or (0, self.in_features)
        if columns[1] - columns[0] != self.in_features:
            raise ValueError(f"{self.label()}: `columns` must be {self.in_features} columns, got {columns}")
        self._adapters.attach(adapter, self._row_range(rows), columns, last=last, keep=keep)

    def detach(self, adapter: Adapter) -> None:
        """Take an adapter off again; nothing happens if it is not on the layer."""
        self._adapters.detach(adapter)
        if not self._adapters:
            self.forget()

    def detach_all(self) -> None:
        """Take all adapters off."""
        self._adapters = AdapterSet()
        self.forget()

    def keep_joined(self, spare_bytes: int) -> None:
        """Set how much memory joined factors may take of sets of adapters that do not act at present: going back to one
        that is kept costs nothing. The sets used last stay; default: a quarter of the 4-bit weight's size.
        """
        if not isinstance(spare_bytes, int) or spare_bytes < 0:
            raise ValueError(f"{self.label()}: `spare_bytes` must be a non-negative integer, got {spare_bytes!r}")
        self._factors.spare_bytes = spare_bytes

    def load_packed(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take over published tensors (no copy). Names and shapes must be those of the layer, and so must the dtypes,
        except that any of float32, float16 and bfloat16 may stand for another.

        Raises:
            ValueError: a tensor is missing, unknown, of another shape or dtype, or not on the device of the others. The
                layer is unchanged then.
        """
        own = {key: value for key, value in self._parameters.items() if value is not None}
        missing, unknown = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
        if missing or unknown:
            raise ValueError(f"{self.label()}: missing tensors {missing}, unknown tensors {unknown}")
        device = next(iter(tensors.values())).device
        for key, value in own.items():
            given = tensors[key]
            dtypes = FLOAT_DTYPES if value.dtype in FLOAT_DTYPES else (value.dtype,)
            if given.shape != value.shape or given.dtype not in dtypes or given.device != device:
                raise ValueError(
                    f"{self.label()}: `{key}` must be {' or '.join(map(str, dtypes))} "
                    f"{tuple(value.shape)} on {device}, got {given.dtype} {tuple(given.shape)} on {given.device}"
                )
        for key in own:
            self._parameters[key] = nn.Parameter(tensors[key].detach(), requires_grad=False)

    def label(self) -> str:
        """How error messages call this layer."""
        return self.name or type(self).__name__

    def _rows_of_input(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., in_features) as a matrix (M, in_features), checked."""
        check_input(self.label, self.in_features, x)
        device = self._storage_parameter().device
        if x.device != device:
            raise ValueError(f"{self.label()}: `x` must be on {device}, where the layer is, got {x.device}")
        return x if x.dim() == 2 else x.reshape(-1, self.in_features)

    def _row_range(self, rows: tuple[int, int] | None) -> tuple[int, int]:
        """The range of output rows asked for, checked; all for None."""
        if rows is None:
            return 0, self.out_features
        if len(rows) != 2 or not all(isinstance(edge, int) for edge in rows):
            raise TypeError(f"{self.label()}: `rows` must be two integers, got {rows!r}")
        if not 0 <= rows[0] < rows[1] <= self.out_features:
            raise ValueError(f"{self.label()}: `rows` must be a range within 0..{self.out_features}, got {rows}")
        return rows

    def _storage_parameter(self) -> torch.Tensor:
        """A parameter that every layer has, for its device."""
        qweight = self._parameters["qweight"]
        assert qweight is not None
        return qweight

    def _keeps_dtype(self, tensor: torch.Tensor) -> bool:
        """Whether `.to(dtype)` must leave a registered tensor's dtype alone: an fp8 scale is a storage format."""
        return tensor.dtype == torch.float8_e4m3fn

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        self.forget()  # moving a layer frees what was derived from its old tensors

        def keeping_dtypes(tensor: torch.Tensor) -> torch.Tensor:
            if self._keeps_dtype(tensor):
                return fn(tensor.view(torch.uint8)).view(tensor.dtype)
            return fn(tensor)

        return super()._apply(keeping_dtypes, recurse)

    def forget(self) -> None:
        """Free what was derived from registered tensors and adapters; it is made anew when it is needed.

        Only for those who write into an adapter's tensors through `.data` on a GPU, which leaves no trace.
        """
        self._derived.clear()
        self._factors.clear()

    def _save_to_state_dict(self, destination: dict[str, torch.Tensor], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight"] = self.weight  # diffusers' LoRA loaders look shapes up there

    def _load_from_state_dict(self, state_dict: dict[str, torch.Tensor], prefix: str, *args: object) -> None:
        drop_placeholder_weight(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)


def check_input(label: Callable[[], str], in_features: int, x: torch.Tensor) -> None:
    """Raise unless x is a floating-point tensor (..., in_features); `label` says how the message calls the layer.

    Raises:
        TypeError: not a tensor, or not of a floating-point dtype that layers take.
        ValueError: another number of channels.
    """
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{label()}: `x` must be a tensor, got {type(x).__name__}")
    if x.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{label()}: `x` must be float32, float16 or bfloat16, got {x.dtype}")
    if x.dim() == 0 or x.shape[-1] != in_features:
        raise ValueError(f"{label()}: `x` must have {in_features} channels, got shape {tuple(x.shape)}")


def drop_placeholder_weight(state_dict: dict[str, torch.Tensor], prefix: str) -> None:
    """Take a layer's own stride-0 `weight` out of a state dict; a real weight stays, and is reported as unexpected."""
    weight = state_dict.get(prefix + "weight")
    if weight is not None and not any(weight.stride()):
        del state_dict[prefix + "weight"]


def require_dtype(label: str, dtype: torch.dtype) -> None:
    """Raise TypeError unless `dtype` is one that a layer's 16-bit tensors can have."""
    if dtype not in FLOAT_DTYPES:
        raise TypeError(f"{label}: `dtype` must be float32, float16 or bfloat16, got {dtype}")


def parameter(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str | None) -> nn.Parameter:
    """An uninitialised, frozen parameter: quantised tensors are loaded or made, never initialised."""
    return nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=False)
