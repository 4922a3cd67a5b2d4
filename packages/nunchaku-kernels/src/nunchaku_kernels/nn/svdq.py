"""`SVDQLinear`: a linear layer with a 4-bit residual weight and a 16-bit low-rank branch (SVDQuant)."""

import functools
import math
from typing import Any, Literal, NamedTuple

import torch
from torch.nn.functional import pad

from nunchaku_kernels._checks import ceil_to
from nunchaku_kernels.formats import SVDQWeights, pack_svdq, unpack_lowrank_down, unpack_lowrank_up, unpack_vector
from nunchaku_kernels.nn._gradient import straight_through
from nunchaku_kernels.nn._rank_axis import AtZero, LowRank, RankAxis
from nunchaku_kernels.nn.base import Origin, QuantizedLinear, parameter, require_dtype
from nunchaku_kernels.ops import svdq_w4a16
from nunchaku_kernels.ops._checks import ACTIVATIONS
from nunchaku_kernels.ops._unpack import lowrank_activation, reference_epilogue
from nunchaku_kernels.ops.arithmetic import Arithmetic, check_arithmetic, default_arithmetic
from nunchaku_kernels.reference.heads import split_heads

ROW_BLOCK = 128
GELU_SHIFT = 0.171875
"""Lower bound of GELU, negated: added to the input of an int4 linear behind a GELU so that its codes are unsigned."""


class QuantizedActivation(NamedTuple):
    """What the first half of an `SVDQLinear` hands to the second: opaque codes and scales, and the low-rank hidden
    state (M, R), float32 or on CUDA the dtype of the factors."""

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
        shift: added to x on the quantised path only; `GELU_SHIFT` for the int4 linear behind a GELU. If positive, x is
            expected to be at least -shift: W4A4 then uses unsigned codes.
        smooth_orig: whether `smooth_factor_orig` is stored; nothing computes with it.
        wtscale: whether a per-tensor factor is stored; a dtype if it is stored in another one than T (files have it in
            16 or 32 bits, and `.to(dtype)` leaves it alone).
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
        wtscale: bool | torch.dtype = False,
        wcscales: bool = False,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
        name: str = "",
        origin: tuple[Origin, ...] = (),
    ) -> None:
        super().__init__(in_features, out_features, name=name, origin=origin)
        if precision not in ("int4", "nvfp4"):
            raise ValueError(f"{self.label()}: `precision` must be 'int4' or 'nvfp4', got {precision!r}")
        if not isinstance(rank, int) or rank < 0 or rank % 16:
            raise ValueError(f"{self.label()}: `rank` must be a non-negative multiple of 16, got {rank}")
        if not math.isfinite(shift) or (shift and precision != "int4"):
            raise ValueError(f"{self.label()}: `shift` must be finite, and 0 for {precision} weights, got {shift}")
        require_dtype(self.label(), dtype)
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
        kept = wtscale if isinstance(wtscale, torch.dtype) else dtype
        self.wtscale = parameter((1,), kept, device) if wtscale else None
        self.wcscales = parameter((n,), dtype, device) if wcscales else None
        self.rank_scale: torch.Tensor | None
        self.register_buffer("rank_scale", None, persistent=False)
        self._rank_axis = RankAxis(self._factors)

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
        """R, the width of the stored low-rank branch."""
        return self.proj_down.shape[1]

    @property
    def compute_dtype(self) -> torch.dtype:
        return self.smooth_factor.dtype

    @property
    def arithmetic(self) -> Arithmetic:
        """How the product is computed on this layer's device: the one that was set, else the device's best."""
        return self.arithmetic_on(self.qweight.device)

    def arithmetic_on(self, device: torch.device) -> Arithmetic:
        """How the product is computed when the layer's tensors are on `device`."""
        return self._arithmetic or default_arithmetic(self.precision, device)

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

    def dequantize(self) -> torch.Tensor:
        weight = svdq_w4a16.dequantize(self.qweight, self.wscales, self.wtscale, self.wcscales, torch.float32)
        weight = weight / unpack_vector(self.smooth_factor).float()
        if self.rank:
            up = unpack_lowrank_up(self.proj_up).float()
            if self.rank_scale is not None:
                up = up * self.rank_scale
            weight = torch.addmm(weight, up, unpack_lowrank_down(self.proj_down).float())
        return weight[: self.out_features, : self.in_features]

    def quantize(self, x: torch.Tensor) -> QuantizedActivation:
        """Quantise activations for this layer's arithmetic, and project them down, in one pass over x. No gradient.

        Args:
            x: (..., in_features) float32, float16 or bfloat16; M is the product of the leading dimensions.

        Raises:
            ValueError: the arithmetic is "w4a16", which does not quantise activations, or x does not fit.
            TypeError: x is of another dtype.
        """
        return self._quantize(self._rows_of_input(x), self.arithmetic, self._low_rank())

    def forward(
        self,
        x: torch.Tensor,
        *,
        rows: tuple[int, int] | None = None,
        activation: str = "none",
        gate: torch.Tensor | None = None,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """x (..., in_features) -> (..., N'), in the dtype of x; N' is out_features, or the number of `rows`.

        A gradient towards x, gate, residual, bias and the low-rank factors is that of the dequantised weight: rounding
        counts as the identity.

        Args:
            x: float32, float16 or bfloat16.
            rows: compute only this range of output rows (one of several fused linears).
            activation: "none", "gelu" (tanh form) or "silu", applied before gate and residual.
            gate: (B, N'); the B equal shares of the tokens are scaled by one row each.
            residual: (..., N'), added last.

        Raises:
            ValueError, TypeError: an argument does not fit; the message names the layer and the argument.
        """
        tokens = self._rows_of_input(x)
        start, stop = self._row_range(rows)
        shape = (*x.shape[:-1], stop - start)
        self._check_tail(activation, gate, residual)
        if residual is not None:
            if residual.shape != shape:
                raise ValueError(f"{self.label()}: `residual` must be {shape}, got {tuple(residual.shape)}")
            residual = residual.reshape(-1, stop - start)
        # Published tensors come in blocks of 128 rows: compute from the start of a block and cut the surplus off.
        first = start // ROW_BLOCK * ROW_BLOCK
        if first != start:
            gate, residual = _widened(gate, start - first), _widened(residual, start - first)
        tail = _Tail(first, stop, activation, gate, residual, x.dtype)
        low_rank = self._low_rank()

        if torch.is_grad_enabled():
            run = functools.partial(self._compute, tokens, tail, low_rank)
            surrogate = functools.partial(self._surrogate, tail)
            y = straight_through(run, surrogate, tokens, gate, residual, *low_rank)
        else:
            y = self._compute(tokens, tail, low_rank)
        if first != start:
            y = y[:, start - first :]
        return y if x.dim() == 2 else y.reshape(shape)

    def forward_quantized(
        self,
        x: QuantizedActivation,
        out_dtype: torch.dtype,
        *,
        activation: str = "none",
        gate: torch.Tensor | None = None,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The second half: what `quantize` gave -> (M, out_features) `out_dtype`. No gradient.

        Keywords as in `forward`; the residual is (M, out_features).
        """
        arithmetic = self.arithmetic
        if arithmetic == "w4a16":
            raise ValueError(f"{self.label()}: arithmetic 'w4a16' takes 16-bit activations, got quantised ones")
        self._check_tail(activation, gate, residual)
        tail = _Tail(0, self.out_features, activation, gate, residual, out_dtype)
        return self._multiply(arithmetic, x, None, tail, self._low_rank())

    def fuses_heads(self, x: torch.Tensor) -> bool:
        """Whether `forward_heads` of x spares memory traffic: on CUDA, in 16 bits, without gradients."""
        half = x.dtype in (torch.float16, torch.bfloat16)
        return x.is_cuda and half and not torch.is_grad_enabled() and self.arithmetic_on(x.device) == "w4a8"

    def forward_heads(
        self,
        x: torch.Tensor,
        out: torch.Tensor,
        first_token: int = 0,
        *,
        norm_q: torch.Tensor | None = None,
        norm_k: torch.Tensor | None = None,
        eps: float = 1e-6,
        rotary: torch.Tensor | None = None,
    ) -> None:
        """Attention heads of 128 channels out of a fused q, k and v: `reference.heads.split_heads` of `forward`.

        No gradient. Any arithmetic and device; where `fuses_heads` says so, without q, k and v in between.

        Args:
            x: (B, T, in_features).
            out: (3, B, H, T', 128), contiguous, of the dtype of x: q, k and v of heads, filled from `first_token` on.
            first_token: where in `out` the T tokens of x go; the others stay as they are.
            norm_q, norm_k, eps, rotary: see `split_heads`; rotary has T rows.

        Raises:
            ValueError, TypeError: an argument does not fit; the message names it.
        """
        tokens = self._rows_of_input(x)
        if x.dim() != 3 or out.dtype != x.dtype:
            raise ValueError(
                f"{self.label()}: `forward_heads` takes x (B, T, {self.in_features}) and `out` of its dtype, got "
                f"{tuple(x.shape)} {x.dtype} and {out.dtype}"
            )
        if self.arithmetic != "w4a8" or self.out_features % ROW_BLOCK:
            heads = split_heads(self(x).flatten(0, 1), x.shape[0], norm_q=norm_q, norm_k=norm_k, eps=eps, rotary=rotary)
            out[:, :, :, first_token : first_token + x.shape[1]] = heads
            return
        low_rank = self._low_rank()
        q = self._quantize(tokens, "w4a8", low_rank)
        factors = self._channel_factors(low_rank.wcscales, 0, self.out_features)
        torch.ops.nunchaku_kernels.w4a8_linear_heads(
            *q, self.qweight, *self._folded_scales(), self._branch(low_rank.proj_up), low_rank.rank_scale, factors,
            low_rank.bias, norm_q, norm_k, eps, rotary, out, first_token,
        )  # fmt: skip

    def _low_rank(self) -> LowRank:
        """The tail's tensors, those of adapters included."""
        own: dict[str, Any] = self._parameters  # attributes of a module take ten times as long to find
        rank_scale = self._buffers["rank_scale"]
        stored = LowRank(own["proj_down"], own["proj_up"], rank_scale, own.get("bias"), own.get("wcscales"))
        placed = self._adapters.placed()
        if not placed:
            return stored
        main = own["qweight"], own["wscales"], own["smooth_factor"]
        at_zero = AtZero(self._shifted_zero, main) if self.shift else None
        return self._rank_axis.extend(self.label(), stored, placed, at_zero)

    def _shifted_zero(self) -> torch.Tensor:
        """The main product for x = 0: the dequantised weight times the shift, (N) float32 in natural order."""
        zero = torch.zeros(1, self.in_features, device=self.qweight.device)
        product = svdq_w4a16.product(
            zero, self.smooth_factor, self.shift, self.qweight, self.wscales, self.wtscale, self.wcscales
        )
        return product[0]

    def _quantize(self, x: torch.Tensor, arithmetic: Arithmetic, low_rank: LowRank) -> QuantizedActivation:
        smooth, down = self.smooth_factor, self._branch(low_rank.proj_down)
        operators = torch.ops.nunchaku_kernels
        match arithmetic:
            case "w4a8":
                parts = operators.w4a8_quantize(x, smooth, self.shift, down)
            case "w4a4":
                parts = operators.w4a4_quantize(x, smooth, self.shift, down, self.shift > 0)
            case "nvfp4":
                parts = operators.nvfp4_quantize(x, smooth, self.shift, down)
            case _:
                raise ValueError(
                    f"{self.label()}: arithmetic {arithmetic!r} takes 16-bit activations, nothing to quantise"
                )
        return QuantizedActivation(*parts)

    def _compute(self, x: torch.Tensor, tail: "_Tail", low_rank: LowRank) -> torch.Tensor:
        """`forward` of a matrix (M, in_features), by operators."""
        arithmetic = self.arithmetic
        q = None if arithmetic == "w4a16" else self._quantize(x, arithmetic, low_rank)
        return self._multiply(arithmetic, q, x, tail, low_rank)

    def _multiply(
        self,
        arithmetic: Arithmetic,
        q: QuantizedActivation | None,
        x: torch.Tensor | None,
        tail: "_Tail",
        low_rank: LowRank,
    ) -> torch.Tensor:
        first, last = tail.first, ceil_to(tail.stop, ROW_BLOCK)
        up, bias = self._rows(self._branch(low_rank.proj_up), first, last), self._rows(low_rank.bias, first, last)
        tensors = (up, low_rank.rank_scale, self._channel_factors(low_rank.wcscales, first, last), bias)
        keywords = tail.keywords()
        operators = torch.ops.nunchaku_kernels
        qweight = self._rows(self.qweight, first, last)
        if arithmetic == "w4a8":
            row_scales, multipliers = self._folded_scales()
            folded = self._rows(row_scales, first, last), self._rows(multipliers, first, last)
            y = operators.w4a8_linear(*q, qweight, *folded, *tensors, **keywords)  # type: ignore[misc]
        elif arithmetic == "w4a4":
            wscales = self._group_scales(first, last)
            y = operators.w4a4_linear(*q, qweight, wscales, *tensors, **keywords)  # type: ignore[misc]
        elif arithmetic == "nvfp4":
            wscales = self._group_scales(first, last)
            y = operators.nvfp4_linear(*q, qweight, wscales, self.wtscale, *tensors, **keywords)  # type: ignore[misc]
        else:
            smooth, down, wscales = (
                self.smooth_factor,
                self._branch(low_rank.proj_down),
                self._group_scales(first, last),
            )
            wtscale = self.wtscale if self.precision == "nvfp4" else None
            y = operators.svdq_w4a16_linear(
                x, smooth, self.shift, down, qweight, wscales, wtscale, *tensors, **keywords
            )
        return y

    def _surrogate(
        self,
        tail: "_Tail",
        x: torch.Tensor,
        gate: torch.Tensor | None,
        residual: torch.Tensor | None,
        proj_down: torch.Tensor,
        proj_up: torch.Tensor,
        rank_scale: torch.Tensor | None,
        bias: torch.Tensor | None,
        wcscales: torch.Tensor | None,
    ) -> torch.Tensor:
        """`forward` as differentiable torch, on the dequantised weight."""
        first, last = tail.first, ceil_to(tail.stop, ROW_BLOCK)
        product = svdq_w4a16.product(
            x,
            self.smooth_factor,
            self.shift,
            self.qweight[first:last],
            self._group_scales(first, last),
            self.wtscale,
            self._rows(wcscales, first, last),
        )
        return reference_epilogue(
            product,
            lowrank_activation(x, self._branch(proj_down)),
            self._rows(self._branch(proj_up), first, last),
            rank_scale,
            None,  # wcscales is in the product
            self._rows(bias, first, last),
            **(tail.keywords() | {"gate": gate, "residual": residual}),
        )

    def _check_tail(self, activation: str, gate: torch.Tensor | None, residual: torch.Tensor | None) -> None:
        """What the operators cannot say: torch would compute nothing, silently, if one tensor were on "meta"."""
        if activation not in ACTIVATIONS:
            raise ValueError(f"{self.label()}: `activation` must be one of {ACTIVATIONS}, got {activation!r}")
        if gate is None and residual is None:
            return
        for name, tensor in (("gate", gate), ("residual", residual)):
            if tensor is None:
                continue
            if not isinstance(tensor, torch.Tensor):
                raise TypeError(f"{self.label()}: `{name}` must be a tensor, got {type(tensor).__name__}")
            if tensor.device != self.qweight.device:
                raise ValueError(f"{self.label()}: `{name}` must be on {self.qweight.device}, got {tensor.device}")

    def _rows(self, tensor: torch.Tensor | None, first: int, last: int) -> torch.Tensor | None:
        """Rows first..last, both multiples of 128, of a tensor whose first dimension is N: a view."""
        return tensor if tensor is None or last - first == tensor.shape[0] else tensor[first:last]

    def _group_scales(self, first: int, last: int) -> torch.Tensor:
        """`wscales` of rows first..last, both multiples of 128: a view, since they come in blocks of 128 rows."""
        groups, n = self.wscales.shape
        if last - first == n:
            return self.wscales
        blocks = self.wscales.reshape(n // ROW_BLOCK, groups * ROW_BLOCK)
        return blocks[first // ROW_BLOCK : last // ROW_BLOCK].reshape(groups, last - first)

    def _channel_factors(self, wcscales: torch.Tensor | None, first: int, last: int) -> torch.Tensor | None:
        """`wcscales` of rows first..last; with int4, whose products know no per-tensor factor, times `wtscale`."""
        factors = self._rows(wcscales, first, last)
        if self.wtscale is None or self.precision == "nvfp4":
            return factors
        whole = self.wtscale.float()
        return whole.expand(last - first) if factors is None else whole * factors.float()

    def _folded_scales(self) -> tuple[torch.Tensor, torch.Tensor]:
        if torch.compiler.is_compiling():
            return self._fold()  # a traced graph cannot ask whether a storage changed: it recomputes, and stays right
        folded: tuple[torch.Tensor, torch.Tensor] = self._derived.get((self.qweight, self.wscales), self._fold)
        return folded

    def _fold(self) -> tuple[torch.Tensor, torch.Tensor]:
        try:
            folded: tuple[torch.Tensor, torch.Tensor] = torch.ops.nunchaku_kernels.w4a8_fold_scales(
                self.qweight, self.wscales
            )
        except ValueError as error:
            raise ValueError(f"{self.label()}: {error}") from error
        return folded

    def forget(self) -> None:
        super().forget()
        self._rank_axis.clear()

    def _branch(self, factor: torch.Tensor) -> torch.Tensor | None:
        return factor if factor.shape[1] else None

    def _keeps_dtype(self, tensor: torch.Tensor) -> bool:
        # The operators take strengths of the low-rank branch in fp32 only; rounding the factor of a whole weight would
        # scale the whole layer wrongly.
        return tensor is self.rank_scale or tensor is self.wtscale or super()._keeps_dtype(tensor)

    def extra_repr(self) -> str:
        return (
            f"{self.in_features}, {self.out_features}, rank={self.rank}, bias={self.bias is not None}, "
            f"{self.precision}, {self.arithmetic}"
        )


class _Tail(NamedTuple):
    """Output rows first..stop and what is done with them."""

    first: int
    stop: int
    activation: str
    gate: torch.Tensor | None
    residual: torch.Tensor | None
    out_dtype: torch.dtype

    def keywords(self) -> dict[str, Any]:
        """The keyword arguments of the linear operators."""
        return {
            "out_features": self.stop - self.first,
            "activation": self.activation,
            "gate": self.gate,
            "residual": self.residual,
            "out_dtype": self.out_dtype,
        }


def _widened(tensor: torch.Tensor | None, columns: int) -> torch.Tensor | None:
    return None if tensor is None else pad(tensor, (columns, 0))
