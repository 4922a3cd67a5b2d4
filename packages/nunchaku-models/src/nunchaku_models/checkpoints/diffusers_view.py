"""A 16-, 32- or 8-bit FLUX.1 file of any naming, seen under diffusers' names."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from nunchaku_models.checkpoints.detect import detect_form, is_quantised, require_family, split_prefix
from nunchaku_models.checkpoints.errors import CheckpointError, shown
from nunchaku_models.checkpoints.flux_keys import Rows, bfl_rows
from nunchaku_models.checkpoints.safetensors_file import TensorSource, check_rows, missing_tensor
from nunchaku_models.checkpoints.safetensors_header import TensorInfo

_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# Factor by which a stored 8-bit weight is multiplied: ComfyUI's older and newer spelling (the newer is diffusers' too).
_SCALES = (".scale_weight", ".weight_scale")
# Describes activations or the arithmetic ComfyUI should use; no part of the weights.
_IGNORED = (".scale_input", ".input_scale", ".comfy_quant")
_FOREIGN_QUANTISATION = (
    (".absmax", "bitsandbytes"),
    (".quant_map", "bitsandbytes"),
    (".weight_scale_2", "NVFP4 (ComfyUI or ModelOpt)"),
    (".weight_scale_inv", "block-wise FP8"),
    (".SCB", "bitsandbytes"),
)


class DiffusersView:
    """Lazy mapping from diffusers name to tensor.

    Fused BFL tensors are cut into their rows without copying, `norm_out.linear` gets its halves exchanged, float8
    tensors are decoded and multiplied by their scale where the file has one ("scaled fp8").

    Args:
        source: an open file in diffusers or BFL naming, with or without prefix.
        dtype: what tensors are converted to. None keeps 16-, 32- and 64-bit tensors as stored and decodes float8 to
            float32 where it is scaled and to bfloat16, which holds it exactly, where it is not.

    Raises:
        CheckpointError: another family, an already quantised file, tensors that FLUX.1 does not have, dtypes or scales
            that cannot be decoded.
    """

    def __init__(self, source: TensorSource, dtype: torch.dtype | None = None) -> None:
        self.source = source
        self._dtype = dtype
        require_family(list(source), source.where)
        self.form = detect_form(source)
        if is_quantised(self.form):
            raise CheckpointError(f"{source.where} is already quantised to 4 bits; start from the 16-bit model")
        prefix, stored = split_prefix(source, source.where)
        present = set(stored)
        self._scales: dict[str, str] = {}
        named: dict[str, TensorInfo] = {}
        for name in stored:
            for foreign, method in _FOREIGN_QUANTISATION:
                if name.endswith(foreign):
                    raise CheckpointError(
                        f"{source.where} is quantised with {method} ({shown(name)}); start from a 16-bit or FP8 model"
                    )
            if name.removeprefix(prefix) == "scaled_fp8" or name.endswith(_IGNORED):
                continue
            suffix = next((suffix for suffix in _SCALES if name.endswith(suffix)), None)
            if suffix is None:
                named[name.removeprefix(prefix)] = source.info(name)
                continue
            weight = name.removesuffix(suffix) + ".weight"
            if weight not in present or weight in self._scales:
                raise CheckpointError(f"{source.where} holds the scale {shown(name)} without a weight of its own")
            self._scales[weight] = name
        self._rows = (
            bfl_rows(named, source.where)
            if self.form == "bfl"
            else {name: Rows(info.name, 0, info.shape[0] if info.shape else 0) for name, info in named.items()}
        )
        self._infos: dict[str, TensorInfo] = {}
        for name, rows in self._rows.items():
            stored_info = source.info(rows.source)
            self._check(stored_info)
            shape = (rows.stop - rows.start, *stored_info.shape[1:]) if stored_info.shape else ()
            self._infos[name] = TensorInfo(name, self._result_dtype(stored_info), shape)

    @property
    def where(self) -> str:
        return self.source.where

    @property
    def metadata(self) -> dict[str, str]:
        return self.source.metadata

    def keys(self) -> list[str]:
        """diffusers names, in the order of the file."""
        return list(self._infos)

    def __contains__(self, name: object) -> bool:
        return name in self._infos

    def __iter__(self) -> Iterator[str]:
        return iter(self._infos)

    def __len__(self) -> int:
        return len(self._infos)

    def info(self, name: str) -> TensorInfo:
        """dtype and shape as `tensor` will return them."""
        try:
            return self._infos[name]
        except KeyError:
            raise missing_tensor(self.where, name, self.keys()) from None

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor under its diffusers name."""
        info = self.info(name)
        rows = self._rows[name]
        if not info.shape:
            return self._decoded(rows.source, self.source.tensor(rows.source), 0, 0)
        if not rows.swap_halves:
            return self._decoded(
                rows.source, self.source.rows(rows.source, rows.start, rows.stop), rows.start, rows.stop
            )
        half = rows.stop // 2
        first = self._decoded(rows.source, self.source.rows(rows.source, 0, half), 0, half)
        second = self._decoded(rows.source, self.source.rows(rows.source, half, rows.stop), half, rows.stop)
        return torch.cat([second, first])

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows start..stop of `tensor(name)`."""
        check_rows(self.info(name), start, stop, self.where)
        rows = self._rows[name]
        if rows.swap_halves:
            return self.tensor(name)[start:stop]
        start, stop = rows.start + start, rows.start + stop
        return self._decoded(rows.source, self.source.rows(rows.source, start, stop), start, stop)

    def release(self, name: str) -> None:
        """Let go of the pages of the stored tensor, which may hold further diffusers tensors."""
        self.info(name)
        self.source.release(self._rows[name].source)

    def _result_dtype(self, stored: TensorInfo) -> torch.dtype:
        if self._dtype is not None:
            return self._dtype
        if stored.dtype in _FLOAT8:
            return torch.float32 if stored.name in self._scales else torch.bfloat16
        return stored.dtype

    def _check(self, stored: TensorInfo) -> None:
        if stored.dtype not in (*_FLOATS, *_FLOAT8):
            raise CheckpointError(
                f"tensor {shown(stored.name)} in {self.where} has dtype {stored.dtype}; weights must be 16- or 32-bit "
                "floats or float8 (e4m3fn, e5m2)"
            )
        name = self._scales.get(stored.name)
        if name is None:
            return
        scale = self.source.info(name)
        per_row = stored.shape[:1] == scale.shape[:1] != () and set(scale.shape[1:]) <= {1}
        if scale.dtype not in _FLOATS or not (scale.nbytes == scale.dtype.itemsize or per_row):
            raise CheckpointError(
                f"the scale {shown(name)} in {self.where} is {scale.dtype} {list(scale.shape)}; one float, or one per "
                f"row of its weight {list(stored.shape)}, is supported"
            )
        if stored.dtype not in _FLOAT8 and bool((self.source.tensor(name).float() != 1).any()):
            raise CheckpointError(
                f"{self.where} scales the {stored.dtype} tensor {shown(stored.name)} by {shown(name)}; scales are "
                "understood for float8 weights only"
            )

    def _decoded(self, source: str, value: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """`value`, rows start..stop of the stored tensor `source`, in the result dtype."""
        result = self._result_dtype(self.source.info(source))
        scale_name = self._scales.get(source)
        if scale_name is None or value.dtype not in _FLOAT8:
            return value.to(result)
        scale = self.source.tensor(scale_name).to(torch.float32)
        scale = scale.reshape(()) if scale.numel() == 1 else scale.reshape(-1)[start:stop]
        return (value.to(torch.float32) * scale.reshape(-1, *(1,) * (value.ndim - 1))).to(result)
