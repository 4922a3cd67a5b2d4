"""Weight-only 4-bit layers: `W4A16Linear` (text encoders) and `ModulationLinear` (adaptive layer norms)."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.nn.functional import linear

from nunchaku_kernels._checks import require_multiple
from nunchaku_kernels.formats import (
    W4A16Weights,
    from_channel_major,
    pack_w4a16,
    padded_groups,
    unfold_unit_scale,
    unpack_awq,
    unpack_awq_scales,
)
from nunchaku_kernels.nn._derived import DerivedTensors
from nunchaku_kernels.nn._gradient import straight_through
from nunchaku_kernels.nn.adapters import (
    Group,
    PlacedTerm,
    check_terms,
    group_terms,
    ingredients,
    needs_gradient,
    stacked_down,
    stacked_up,
    strength_pattern,
    strength_vector,
    summed,
    tensors_of,
    total_rank,
)
from nunchaku_kernels.nn.base import Origin, QuantizedLinear, parameter, require_dtype
from nunchaku_kernels.ops.w4a16 import GROUP_SIZES
from nunchaku_kernels.reference import w4a16 as reference


class _Branch(NamedTuple):
    """What adapters add: `scale * up (down x)` with R ranks, `bias`, and `gain` times W x."""

    down: torch.Tensor  # (R, in_features)
    up: torch.Tensor  # (out_features, R)
    scale: torch.Tensor  # (R) float32
    bias: torch.Tensor | None  # (out_features) float32
    gain: torch.Tensor | None  # (out_features) float32


class W4A16Linear(QuantizedLinear):
    """y = W x + proj_up (proj_down x) + bias with 4-bit weights and 16-bit activations, in the published AWQ order
    (`formats/awq.py`).

    Registered tensors: `qweight` (N/4, K/2) int32 or (N/4, K) int16, the same bytes; `wscales` and `wzeros` (Gpad, N)
    T; `bias` (N) T; all in natural row order. w = code * wscale + wzero. With a low-rank branch, which published files
    do not have, also `proj_down` (R, K) T and `proj_up` (N, R) T, row-major. With 8 bits `qweight`, `wscales` and
    `wzeros` are those of 2 K channels: the weight's two nibble planes, which meet the same x (`formats/w4a16.py`).

    Args:
        in_features: K, a multiple of 64 and of the group size.
        out_features: N, a multiple of 4.
        bias: whether there is a bias.
        group_size: channels per scale: 64 (modulation) or 128 (T5).
        bits: 4, or 8 for a layer that 4 bits hurt; twice the bytes and twice the work.
        rank: R, width of the low-rank branch; 0 for none.
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
        bits: int = 4,
        rank: int = 0,
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
        if bits not in (4, 8):
            raise ValueError(f"{self.label()}: `bits` must be 4 or 8, got {bits!r}")
        if not isinstance(rank, int) or rank < 0:
            raise ValueError(f"{self.label()}: `rank` must be a non-negative integer, got {rank!r}")
        self.group_size = group_size
        self.bits = bits
        planes = in_features * bits // 4
        groups = padded_groups(planes // group_size, group_size)
        width = planes * 2 // container.itemsize
        self.qweight = parameter((out_features // 4, width), container, device)
        self.wscales = parameter((groups, out_features), dtype, device)
        self.wzeros = parameter((groups, out_features), dtype, device)
        self.proj_down = parameter((rank, in_features), dtype, device) if rank else None
        self.proj_up = parameter((out_features, rank), dtype, device) if rank else None
        self.bias = parameter((out_features,), dtype, device) if bias else None
        self._branches = DerivedTensors()

    @staticmethod
    def from_weights(
        weights: W4A16Weights,
        bias: torch.Tensor | None = None,
        *,
        container: torch.dtype = torch.int32,
        name: str = "",
        origin: tuple[Origin, ...] = (),
    ) -> "W4A16Linear":
        """A layer that holds `weights` (canonical order, e.g. from `quantize.fit_w4a16`)."""
        n, k = weights.codes.shape
        layer = W4A16Linear(
            k,
            n,
            bias=bias is not None,
            group_size=weights.group_size,
            bits=weights.bits,
            rank=weights.rank,
            container=container,
            dtype=weights.scales.dtype,
            device="meta",
            name=name,
            origin=origin,
        )
        layer.load_packed(pack_w4a16(weights, container) | ({} if bias is None else {"bias": bias}))
        return layer

    @property
    def rank(self) -> int:
        """R, the width of the stored low-rank branch."""
        return 0 if self.proj_up is None else self.proj_up.shape[1]

    @property
    def compute_dtype(self) -> torch.dtype:
        return self.wscales.dtype

    def natural_bias(self) -> torch.Tensor | None:
        return self.bias

    def dequantize(self) -> torch.Tensor:
        weight = reference.dequantize(*self._planes()).float().unflatten(1, (-1, self.in_features)).sum(dim=1)
        if self.proj_up is None or self.proj_down is None:
            return weight
        return weight.addmm_(self.proj_up.float(), self.proj_down.float())

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
        y = self._with_adapters(tokens, self._product(tokens), self.bias)
        return y[:, start:stop].reshape(*x.shape[:-1], stop - start)

    def _product(self, x: torch.Tensor) -> torch.Tensor:
        """x (M, in_features) -> (M, out_features) in the stored order, without adapters."""
        return straight_through(lambda: self._run(x), self._surrogate, x, self.bias, self.proj_down, self.proj_up)

    def _with_adapters(self, x: torch.Tensor, y: torch.Tensor, own_bias: torch.Tensor | None) -> torch.Tensor:
        """y (M, out_features), in the order of the original linear, plus what adapters add to it.

        Args:
            x: (M, in_features).
            y: W x + `own_bias`.
        """
        placed = self._adapters.placed()
        if not placed:
            return y
        branch = self._branch(placed)
        hidden = linear(x, branch.down.to(x.dtype)).float() * branch.scale
        added = linear(hidden.to(x.dtype), branch.up.to(x.dtype)).float()
        if branch.bias is not None:
            added = added + branch.bias
        if branch.gain is not None:
            added = added + branch.gain * (y.float() if own_bias is None else y.float() - own_bias.float())
        return (y.float() + added).to(y.dtype)

    def _branch(self, placed: Sequence[PlacedTerm]) -> _Branch:
        """What all terms together add."""
        if torch.compiler.is_compiling() or needs_gradient(placed):
            check_terms(self.label(), placed)
            groups = group_terms(placed, share=False)
            return self._with_strengths(placed, groups, *self._stacked(groups))
        key, tensors = ingredients(placed)

        def make() -> _Branch:
            layout = (tuple(item.place for item in placed), strength_pattern(placed))
            with torch.inference_mode(False), torch.no_grad():  # what is kept must be usable outside of either
                firsts, down, up = self._factors.get(tensors_of(placed, "down", "up"), make_factors, layout)
                return self._with_strengths(placed, [Group(placed[i], []) for i in firsts], down, up)

        def make_factors() -> tuple[tuple[int, ...], torch.Tensor, torch.Tensor]:
            check_terms(self.label(), placed)
            groups = group_terms(placed, share=True)
            firsts = tuple(next(i for i, item in enumerate(placed) if item is group.first) for group in groups)
            return firsts, *self._stacked(groups)

        branch: _Branch = self._branches.get(tensors, make, key)
        return branch

    def _stacked(self, groups: Sequence[Group]) -> tuple[torch.Tensor, torch.Tensor]:
        ranks, like = total_rank(groups), self.wscales
        return (
            stacked_down(groups, ranks, self.in_features, like),
            stacked_up(groups, self.out_features, ranks, like),
        )

    def _with_strengths(
        self, placed: Sequence[PlacedTerm], groups: Sequence[Group], down: torch.Tensor, up: torch.Tensor
    ) -> _Branch:
        device = down.device
        bias, gain = (summed(placed, field, self.out_features, device) for field in ("bias", "gain"))
        return _Branch(down, up, strength_vector(groups, down.shape[0], device), bias, gain)

    def _run(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = torch.ops.nunchaku_kernels.w4a16_linear(
            self._once_per_plane(x), self.qweight, self.wscales, self.wzeros, self.bias, self.group_size
        )
        return _with_low_rank(y, x, self.proj_down, self.proj_up)

    def _surrogate(
        self,
        x: torch.Tensor,
        bias: torch.Tensor | None,
        proj_down: torch.Tensor | None,
        proj_up: torch.Tensor | None,
    ) -> torch.Tensor:
        y = reference.linear(self._once_per_plane(x), *self._planes(), bias)
        return _with_low_rank(y, x, proj_down, proj_up)

    def _once_per_plane(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.bits == 4 else torch.cat((x, x), dim=1)

    def _planes(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Codes (N, K), scales and zeros (N, G) of the stored 4-bit planes, side by side if there are two."""
        codes = unpack_awq(self.qweight)
        scales, zeros = (
            unpack_awq_scales(tensor, codes.shape[1], self.group_size) for tensor in (self.wscales, self.wzeros)
        )
        return codes, scales, zeros

    def forget(self) -> None:
        super().forget()
        self._branches.clear()

    def extra_repr(self) -> str:
        words = f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, group_size={self.group_size}"
        return f"{words}, bits={self.bits}, rank={self.rank}"


def _with_low_rank(
    y: torch.Tensor, x: torch.Tensor, proj_down: torch.Tensor | None, proj_up: torch.Tensor | None
) -> torch.Tensor:
    """y (M, N) + proj_up (proj_down x), rounded to the dtype of x once."""
    if proj_down is None or proj_up is None:
        return y
    hidden = linear(x, proj_down.to(x.dtype))
    return torch.addmm(y, hidden, proj_up.to(x.dtype).t())


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

    def dequantize(self) -> torch.Tensor:
        return super().dequantize().unflatten(0, (-1, self.num_chunks)).transpose(0, 1).flatten(0, 1)

    def chunks(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """x (B, in_features) -> `num_chunks` tensors (B, D): use `x * scale + shift`, the 1 is in the scale."""
        tokens = self._rows_of_input(x)
        y = self._product(tokens).unflatten(-1, (-1, self.num_chunks))
        if self._adapters:
            bias = None if self.bias is None else from_channel_major(self.bias, self.num_chunks)
            natural = self._with_adapters(tokens, y.transpose(1, 2).flatten(1), bias)
            y = natural.unflatten(-1, (self.num_chunks, -1)).transpose(1, 2)
        return y.reshape(*x.shape[:-1], -1, self.num_chunks).unbind(-1)

    def forward(self, x: torch.Tensor, *, rows: tuple[int, int] | None = None) -> torch.Tensor:
        """x (..., in_features) -> (..., out_features), chunk-major, scale chunks without the folded 1."""
        start, stop = self._row_range(rows)
        chunks = list(self.chunks(x))
        for scale in {1, self.num_chunks - 2}:
            chunks[scale] = chunks[scale] - 1
        return torch.cat(chunks, dim=-1)[..., start:stop]
