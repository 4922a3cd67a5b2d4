"""Weight-only 4-bit layers: `W4A16Linear` (text encoders) and `ModulationLinear` (adaptive layer norms)."""

import torch

from nunchaku_kernels._checks import require_multiple
from nunchaku_kernels.formats import (
    from_channel_major,
    padded_groups,
    unfold_unit_scale,
    unpack_awq,
    unpack_awq_scales,
)
from nunchaku_kernels.nn._gradient import straight_through
from nunchaku_kernels.nn.base import Origin, QuantizedLinear, parameter, require_dtype
from nunchaku_kernels.ops.w4a16 import GROUP_SIZES
from nunchaku_kernels.reference import w4a16 as reference


class W4A16Linear(QuantizedLinear):
    """y = W x + bias with 4-bit weights and 16-bit activations, in the published AWQ order (`formats/awq.py`).

    Registered tensors: `qweight` (N/4, K/2) int32 or (N/4, K) int16, the same bytes; `wscales` and `wzeros` (Gpad, N)
    T; `bias` (N) T; all in natural row order. w = code * wscale + wzero.

    Args:
        in_features: K, a multiple of 64 and of the group size.
        out_features: N, a multiple of 4.
        bias: whether there is a bias.
        group_size: channels per scale: 64 (modulation) or 128 (T5).
        container: torch.int32 or torch.int16, the integer type that files declare for `qweight`.
        dtype: T, the dtype of the 16-bit tensors.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        group_size: int = 64,
        container: torch.dtype = torch.int32,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
        name: str = "",
        origin: tuple[Origin, ...] = (),
    ) -> None:
        super().__init__(in_features, out_features, name=name, origin=origin)
        if group_size not in GROUP_SIZES:
            raise ValueError(f"{self.label()}: `group_size` must be 64 or 128, got {group_size}")
        require_dtype(self.label(), dtype)
        require_multiple(self.label(), "`in_features`", in_features, group_size)
        require_multiple(self.label(), "`out_features`", out_features, 4)
        if container not in (torch.int32, torch.int16):
            raise TypeError(f"{self.label()}: `container` must be torch.int32 or torch.int16, got {container}")
        self.group_size = group_size
        groups = padded_groups(in_features // group_size, group_size)
        width = in_features * 2 // container.itemsize
        self.qweight = parameter((out_features // 4, width), container, device)
        self.wscales = parameter((groups, out_features), dtype, device)
        self.wzeros = parameter((groups, out_features), dtype, device)
        self.bias = parameter((out_features,), dtype, device) if bias else None

    @property
    def compute_dtype(self) -> torch.dtype:
        return self.wscales.dtype

    def natural_bias(self) -> torch.Tensor | None:
        return self.bias

    def forward(self, x: torch.Tensor, *, rows: tuple[int, int] | None = None) -> torch.Tensor:
        """x (..., in_features) -> (..., out_features) in the stored order, in the dtype of x.

        Args:
            x: float32, float16 or bfloat16. With x (or the bias) requiring grad, the gradient is that of the
                dequantised weight.
            rows: return only this range of output rows.

        Raises:
            ValueError, TypeError: an argument does not fit; the message names the layer and the argument.
        """
        tokens = self._rows_of_input(x)
        start, stop = self._row_range(rows)
        y = straight_through(lambda: self._run(tokens), self._surrogate, tokens, self.bias)
        return y[:, start:stop].reshape(*x.shape[:-1], stop - start)

    def _run(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = torch.ops.nunchaku_kernels.w4a16_linear(
            x, self.qweight, self.wscales, self.wzeros, self.bias, self.group_size
        )
        return y

    def _surrogate(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        scales, zeros = (
            unpack_awq_scales(tensor, self.in_features, self.group_size) for tensor in (self.wscales, self.wzeros)
        )
        return reference.linear(x, unpack_awq(self.qweight), scales, zeros, bias)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, group_size={self.group_size}"


class ModulationLinear(W4A16Linear):
    """The linear of an adaptive layer norm, stored channel-major with the 1 of `1 + scale` folded into the bias.

    `forward` gives what the original linear gave: chunk after chunk, scales without the 1, so that diffusers' norms
    work on it unchanged. `chunks` gives what is stored, for code that fuses `x * scale + shift`.

    Args:
        num_chunks: vectors per channel: 6 (shift, scale, gate of attention, then of the MLP) or 3 (shift, scale, gate).
    """

    def __init__(
        self, in_features: int, out_features: int, *, num_chunks: int, name: str = "", **kwargs: object
    ) -> None:
        super().__init__(in_features, out_features, name=name, **kwargs)  # type: ignore[arg-type]
        if num_chunks not in (3, 6):
            raise ValueError(f"{self.label()}: `num_chunks` must be 3 or 6, got {num_chunks}")
        require_multiple(self.label(), "`out_features`", out_features, num_chunks)
        self.num_chunks = num_chunks

    def natural_bias(self) -> torch.Tensor | None:
        if self.bias is None:
            return None
        return unfold_unit_scale(from_channel_major(self.bias, self.num_chunks), self.num_chunks)

    def chunks(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """x (B, in_features) -> `num_chunks` tensors (B, D): use `x * scale + shift`, the 1 is in the scale."""
        y = super().forward(x)
        return y.unflatten(-1, (-1, self.num_chunks)).unbind(-1)

    def forward(self, x: torch.Tensor, *, rows: tuple[int, int] | None = None) -> torch.Tensor:
        """x (..., in_features) -> (..., out_features), chunk-major, scale chunks without the folded 1."""
        start, stop = self._row_range(rows)
        chunks = list(self.chunks(x))
        for scale in {1, self.num_chunks - 2}:
            chunks[scale] = chunks[scale] - 1
        return torch.cat(chunks, dim=-1)[..., start:stop]
