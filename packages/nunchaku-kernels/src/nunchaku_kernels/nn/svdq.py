"""`SVDQLinear`: a linear layer with a 4-bit residual weight and a 16-bit low-rank branch (SVDQuant)."""

from typing import Any, Literal, NamedTuple

import torch

from nunchaku_kernels._checks import ceil_to
from nunchaku_kernels.formats import SVDQWeights, pack_svdq, unpack_vector
from nunchaku_kernels.nn.base import Origin, QuantizedLinear, parameter
from nunchaku_kernels.ops.arithmetic import Arithmetic, check_arithmetic, default_arithmetic

GELU_SHIFT = 0.171875
"""Lower bound of GELU, negated: added to the input of an int4 linear behind a GELU so that its codes are unsigned."""


class QuantizedActivation(NamedTuple):
    """What the first half of an `SVDQLinear` hands to the second: opaque codes and scales, and the low-rank hidden
    state (M, R) float32."""

    codes: torch.Tensor
    ascales: torch.Tensor
    lora_act: torch.Tensor


class SVDQLinear(QuantizedLinear):
    """y = act(W_4bit ((x + shift) / smooth) + up (rank_scale * down x) + bias), then residual + gate * y.

    The registered tensors carry the published names and the published order (`formats/svdq.py`), padded to multiples
    of 128: `qweight` (N, K/2) int8, `wscales` (K/64, N) T or (K/16, N) float8_e4m3fn, `smooth_factor` and
    `smooth_factor_orig` (K) T, `proj_down` (K, R) T, `proj_up` (N, R) T, `bias` (N) T, and for nvfp4 `wtscale` (1)
    and `wcscales` (N). What is stored does not depend on how it is multiplied: see `arithmetic`.

    Args:
        in_features: K of the original linear.
        out_features: N of the original linear, or of all fused ones together.
        rank: R, a multiple of 16; 0 for no low-rank branch.
        bias: whether there is a bias.
        precision: "int4" or "nvfp4", a property of the stored tensors.
        shift: added to x on the quantised path only; `GELU_SHIFT` for the int4 linear behind a GELU.
        smooth_orig: whether `smooth_factor_orig` is stored; nothing computes with it.
        wtscale: whether a per-tensor factor is stored (nvfp4).
        wcscales: whether per-channel factors are stored.
        dtype: T, the dtype of the 16-bit tensors.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        rank: int = 32,
        bias: bool = True,
        precision: Literal["int4", "nvfp4"] = "int4",
        shift: float = 0.0,
        smooth_orig: bool = True,
        wtscale: bool = False,
        wcscales: bool = False,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
        name: str = "",
        origin: tuple[Origin, ...] = (),
    ) -> None:
        super().__init__(in_features, out_features, name=name, origin=origin)
        if precision not in ("int4", "nvfp4"):
            raise ValueError(f"{self.label()}: `precision` must be 'int4' or 'nvfp4', got {precision!r}")
        if rank < 0 or rank % 16:
            raise ValueError(f"{self.label()}: `rank` must be a multiple of 16, got {rank}")
        k, n = ceil_to(in_features, 128), ceil_to(out_features, 128)
        self.precision = precision
        self.shift = shift
        self._arithmetic: Arithmetic | None = None
        self.qweight = parameter((n, k // 2), torch.int8, device)
        if precision == "int4":
            self.wscales = parameter((k // 64, n), dtype, device)
        else:
            self.wscales = parameter((k // 16, n), torch.float8_e4m3fn, device)
        self.smooth_factor = parameter((k,), dtype, device)
        self.smooth_factor_orig = parameter((k,), dtype, device) if smooth_orig else None
        self.proj_down = parameter((k, rank), dtype, device)
        self.proj_up = parameter((n, rank), dtype, device)
        self.bias = parameter((n,), dtype, device) if bias else None
        self.wtscale = parameter((1,), dtype, device) if wtscale else None
        self.wcscales = parameter((n,), dtype, device) if wcscales else None
        self.rank_scale: torch.Tensor | None
        self.register_buffer("rank_scale", None, persistent=False)

    @classmethod
    def from_weights(
        cls, weights: SVDQWeights, *, shift: float = 0.0, name: str = "", origin: tuple[Origin, ...] = ()
    ) -> "SVDQLinear":
        """A layer that holds `weights` (canonical order, e.g. from `quantize.quantize_svdq`)."""
        packed = pack_svdq(weights)
        layer = cls(
            weights.in_features,
            weights.out_features,
            rank=packed["proj_down"].shape[1],
            precision=weights.precision,
            shift=shift,
            wtscale="wtscale" in packed,
            wcscales="wcscales" in packed,
            dtype=packed["smooth_factor"].dtype,
            device="meta",
            name=name,
            origin=origin,
        )
        layer.load_packed(packed)
        return layer

    @property
    def rank(self) -> int:
        """R, the width of the low-rank branch."""
        return self.proj_down.shape[1]

    @property
    def compute_dtype(self) -> torch.dtype:
        return self.smooth_factor.dtype

    @property
    def arithmetic(self) -> Arithmetic:
        """How the product is computed on this layer's device: the one that was set, else the device's best."""
        return self._arithmetic or default_arithmetic(self.precision, self.qweight.device)

    def set_arithmetic(self, arithmetic: Arithmetic | None) -> None:
        """Choose how the product is computed; None for the device's best.

        Raises:
            ValueError: the layer's precision cannot be multiplied that way; the message says what is possible.
        """
        if arithmetic is not None:
            check_arithmetic(self.label(), self.precision, arithmetic)
        self._arithmetic = arithmetic

    def natural_bias(self) -> torch.Tensor | None:
        return None if self.bias is None else unpack_vector(self.bias)[: self.out_features]

    def quantize(self, x: torch.Tensor) -> QuantizedActivation:
        """Quantise activations for this layer's arithmetic, and project them down, in one pass over x.

        Args:
            x: (M, in_features) float32, float16 or bfloat16.

        Raises:
            ValueError: the arithmetic is "w4a16", which does not quantise activations.
        """
        smooth, down = self.smooth_factor, self._branch(self.proj_down)
        match self.arithmetic:
            case "w4a8":
                parts = torch.ops.nunchaku_kernels.w4a8_quantize(x, smooth, self.shift, down)
            case "w4a4":
                parts = torch.ops.nunchaku_kernels.w4a4_quantize(x, smooth, self.shift, down, self.shift > 0)
            case "nvfp4":
                parts = torch.ops.nunchaku_kernels.nvfp4_quantize(x, smooth, self.shift, down)
            case other:
                raise ValueError(f"{self.label()}: arithmetic {other!r} takes 16-bit activations, nothing to quantise")
        return QuantizedActivation(*parts)

    def forward(
        self,
        x: torch.Tensor,
        *,
        rows: tuple[int, int] | None = None,
        activation: str = "none",
        gate: torch.Tensor | None = None,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """x (..., in_features) -> (..., out_features), in the dtype of x.

        Args:
            x: float32, float16 or bfloat16.
            rows: compute only this range of output rows (one of several fused linears).
            activation: "none", "gelu" (tanh form) or "silu", applied before gate and residual.
            gate: (B, out_features); the B equal shares of the tokens are scaled by one row each.
            residual: (..., out_features), added last.

        Raises:
            ValueError, TypeError: an argument does not fit; the message names the layer and the argument.
        """
        tokens = self._rows_of_input(x)
        start, stop = rows or (0, self.out_features)
        if not 0 <= start < stop <= self.out_features:
            raise ValueError(f"{self.label()}: `rows` must lie in 0..{self.out_features}, got {rows}")
        tail = {
            "activation": activation,
            "gate": gate,
            "residual": None if residual is None else residual.reshape(-1, stop - start),
            "out_dtype": x.dtype,
        }
        if self.arithmetic == "w4a16":
            y = self._multiply(None, tokens, start, stop, tail)
        else:
            y = self._multiply(self.quantize(tokens), tokens, start, stop, tail)
        return y.reshape(*x.shape[:-1], stop - start)

    def forward_quantized(self, x: QuantizedActivation, out_dtype: torch.dtype, **tail: Any) -> torch.Tensor:
        """The second half: quantised activations -> (M, out_features) `out_dtype`; keywords as in `forward`."""
        return self._multiply(x, None, 0, self.out_features, {**tail, "out_dtype": out_dtype})

    def _multiply(
        self, q: QuantizedActivation | None, x: torch.Tensor | None, start: int, stop: int, tail: dict[str, Any]
    ) -> torch.Tensor:
        first, last = start // 128 * 128, ceil_to(stop, 128)
        if first != start and (tail.get("gate") is not None or tail.get("residual") is not None):
            raise ValueError(f"{self.label()}: `gate` and `residual` need `rows` that start at a multiple of 128")
        weights = self._weights(first, last)
        tail = {**tail, "out_features": stop - first}
        operators = torch.ops.nunchaku_kernels
        if q is None:
            y = operators.svdq_w4a16_linear(
                x, self.smooth_factor, self.shift, self._branch(self.proj_down), *weights, **tail
            )
        elif self.arithmetic == "w4a8":
            y = operators.w4a8_linear(*q, *weights, **tail)
        elif self.arithmetic == "w4a4":
            y = operators.w4a4_linear(*q, *weights, **tail)
        else:
            y = operators.nvfp4_linear(*q, *weights, **tail)
        return y[:, start - first :]

    def _weights(self, first: int, last: int) -> tuple[torch.Tensor | None, ...]:
        """The weight arguments of the arithmetic's operator for rows first..last, both multiples of 128.

        Published tensors are stored by blocks of 128 rows, so that an aligned range of rows is a view.
        """

        def rows(tensor: torch.Tensor | None) -> torch.Tensor | None:
            return None if tensor is None else tensor[first:last]

        def scales(tensor: torch.Tensor) -> torch.Tensor:
            groups, n = tensor.shape
            return tensor.reshape(n // 128, groups * 128)[first // 128 : last // 128].reshape(groups, last - first)

        rank_tail = (rows(self._branch(self.proj_up)), self.rank_scale, rows(self.wcscales), rows(self.bias))
        match self.arithmetic:
            case "w4a8":
                row_scales, multipliers = self._folded_scales()
                return (rows(self.qweight), rows(row_scales), rows(multipliers), *rank_tail)
            case "w4a4":
                return (rows(self.qweight), scales(self.wscales), *rank_tail)
            case _:
                return (rows(self.qweight), scales(self.wscales), self.wtscale, *rank_tail)

    def _folded_scales(self) -> tuple[torch.Tensor, torch.Tensor]:
        def fold() -> tuple[torch.Tensor, torch.Tensor]:
            folded: tuple[torch.Tensor, torch.Tensor] = torch.ops.nunchaku_kernels.w4a8_fold_scales(
                self.qweight, self.wscales
            )
            return folded

        if torch.compiler.is_compiling():
            return fold()  # a traced graph cannot ask whether a storage changed: it recomputes, and stays right
        folded: tuple[torch.Tensor, torch.Tensor] = self._derived.get((self.qweight, self.wscales), fold)
        return folded

    def _branch(self, factor: torch.Tensor) -> torch.Tensor | None:
        return factor if self.rank else None

    def extra_repr(self) -> str:
        return (
            f"{self.in_features}, {self.out_features}, rank={self.rank}, bias={self.bias is not None}, "
            f"{self.precision}, {self.arithmetic}"
        )
