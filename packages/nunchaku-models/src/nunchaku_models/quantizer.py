"""From a 16-bit checkpoint to a 4-bit one, without data: one layer at a time from the mapped file to the output."""

import contextlib
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm import tqdm

from nunchaku_kernels.formats import pack_svdq
from nunchaku_kernels.nn import GELU_SHIFT, ModulationLinear, SVDQLinear
from nunchaku_kernels.quantize import quantize_svdq, smoothing_from_weights
from nunchaku_kernels.quantize.modulation import quantize_modulation
from nunchaku_models.checkpoints import (
    CheckpointError,
    DiffusersView,
    StreamingWriter,
    TensorInfo,
    atomic_folder,
    flux_config,
    open_checkpoint,
    v2_to_v1,
)
from nunchaku_models.families import FAMILIES, Family, LowRankLinear, Modulation
from nunchaku_models.layers import PlannedLayer, plan_layers, source_columns
from nunchaku_models.published import WEIGHTS_NAME, file_metadata, folder_config

Precision = Literal["int4", "nvfp4"]
DTYPES = {"bfloat16": torch.bfloat16, "bf16": torch.bfloat16, "float16": torch.float16, "fp16": torch.float16}
MIN_IN_FEATURES = 64
"""A linear with fewer input channels than one scale group stays 16-bit."""


@dataclass(frozen=True)
class QuantizeReport:
    """What `quantize_checkpoint` did.

    Attributes:
        output: file or folder written.
        quantized: number of 4-bit layers.
        kept: linears of the family's blocks that stayed 16-bit, because they are too narrow.
        bytes_before: size of the transformer's tensors in 16 bits.
        bytes_after: size of the written tensors and header.
        seconds: wall time.
    """

    output: Path
    quantized: int
    kept: tuple[str, ...]
    bytes_before: int
    bytes_after: int
    seconds: float


@dataclass(frozen=True)
class Job:
    """What will be written, known before any weight is read.

    Attributes:
        family: the model's page.
        config: its configuration.
        layers: the layers to quantise.
        kept: linears that could be 4-bit and are too narrow.
        copied: diffusers names of the tensors that are only converted.
        precision, rank, dtype: of the layers.
    """

    family: Family
    config: dict[str, Any]
    layers: tuple[PlannedLayer, ...]
    kept: tuple[str, ...]
    copied: tuple[TensorInfo, ...]
    precision: Precision
    rank: int
    dtype: torch.dtype

    def blank(self, layer: PlannedLayer, shapes: Mapping[str, tuple[int, ...]]) -> SVDQLinear | ModulationLinear:
        """The layer without memory: its parameters say what a file must hold."""
        rows = sum(shapes[f"{source}.weight"][0] for source in layer.sources)
        width = shapes[f"{layer.sources[0]}.weight"][1]
        if isinstance(layer.spec, Modulation):
            return ModulationLinear(
                width, rows, num_chunks=layer.spec.num_chunks, dtype=self.dtype, device="meta", name=layer.path
            )
        start, stop = _columns(layer, width, rows)
        fused = len(layer.sources) > 1
        return SVDQLinear(
            stop - start,
            rows,
            rank=self.rank,
            precision=self.precision,
            wtscale=self.precision == "nvfp4" and not fused,
            wcscales=self.precision == "nvfp4" and fused,
            dtype=self.dtype,
            device="meta",
            name=layer.path,
        )

    def tensors(self, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, TensorInfo]]:
        """(path of the layer, or "" for a copied tensor; v2 name, dtype and shape) of everything to be written."""
        for info in self.copied:
            yield "", TensorInfo(info.name, self.dtype, info.shape)
        for layer in self.layers:
            for key, value in self.blank(layer, shapes).named_parameters():
                yield layer.path, TensorInfo(f"{layer.path}.{key}", value.dtype, tuple(value.shape))


def plan(
    family: Family,
    config: dict[str, Any],
    tensors: Mapping[str, TensorInfo],
    *,
    precision: Precision = "int4",
    rank: int = 32,
    dtype: torch.dtype = torch.bfloat16,
) -> Job:
    """Decide which layers become 4-bit.

    Args:
        family: the model's page.
        config: its configuration.
        tensors: diffusers name -> header entry of the 16-bit model.
        precision, rank, dtype: see `quantize_checkpoint`.

    Raises:
        CheckpointError: a tensor that the configuration asks for is missing, or not a matrix.
    """
    candidates: list[PlannedLayer] = []
    narrow: list[str] = []
    for layer in plan_layers(family, config):
        shapes: list[tuple[int, ...]] = []
        for source in layer.sources:
            info = tensors.get(f"{source}.weight")
            if info is None or len(info.shape) != 2:
                raise CheckpointError(
                    f"tensor '{source}.weight' is missing or not a matrix; the checkpoint is incomplete"
                )
            shapes.append(info.shape)
        if len({shape[1] for shape in shapes}) != 1:
            raise CheckpointError(f"{', '.join(layer.sources)}: linears to be fused differ in width: {shapes}")
        if _fits(layer, shapes):
            candidates.append(layer)
        else:
            narrow.extend(layer.sources)
    # a linear that is split by columns becomes 4-bit as a whole or not at all
    layers = tuple(layer for layer in candidates if not set(layer.sources) & set(narrow))
    replaced = {f"{source}.{leaf}" for layer in layers for source in layer.sources for leaf in ("weight", "bias")}
    copied = tuple(info for name, info in tensors.items() if name not in replaced)
    return Job(family, config, layers, tuple(dict.fromkeys(narrow)), copied, precision, rank, dtype)


def _fits(layer: PlannedLayer, shapes: list[tuple[int, ...]]) -> bool:
    rows, width = sum(shape[0] for shape in shapes), shapes[0][1]
    if isinstance(layer.spec, Modulation):
        return width % 64 == 0 and rows % (4 * layer.spec.num_chunks) == 0
    start, stop = _columns(layer, width, rows)
    return stop - start >= MIN_IN_FEATURES


def predicted_bytes(job: Job, tensors: Mapping[str, TensorInfo]) -> int:
    """Bytes of the tensors that quantising will write: the formula of the file size, without the header."""
    shapes = {name: info.shape for name, info in tensors.items()}
    return sum(info.nbytes for _, info in job.tensors(shapes))


def quantize_checkpoint(
    model: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    precision: str = "int4",
    rank: int = 32,
    dtype: str | torch.dtype = "bfloat16",
    seed: int = 0,
    progress: bool = True,
    **hub: Any,
) -> QuantizeReport:
    """Quantise a diffusion transformer without calibration data.

    Args:
        model: diffusers folder, single file (diffusers, BFL or ComfyUI names; fp8, fp16, bf16, fp32) or hub id.
        output: a name ending in `.safetensors` becomes one published file; any other a diffusers folder, of the whole
            pipeline if `model` is a local pipeline folder.
        precision: "int4" or "nvfp4"; modulation layers are int4 either way.
        rank: rank of the low-rank branch, a multiple of 16; 0 for none.
        dtype: "bfloat16" or "float16", of the 16-bit tensors.
        seed: of the randomised SVD; the same seed gives the same file.
        progress: show a bar with the remaining time.
        hub: `subfolder`, `revision`, `cache_dir`, `token`, `local_files_only`, ...

    Raises:
        ValueError: an unknown precision, rank or dtype.
        CheckpointError: the model cannot be read, or the output cannot be written. Nothing was written then.
    """
    started = time.monotonic()
    if precision not in ("int4", "nvfp4"):
        raise ValueError(f"precision must be 'int4' or 'nvfp4', got {precision!r}")
    exact: Precision = "nvfp4" if precision == "nvfp4" else "int4"
    if isinstance(rank, bool) or not 0 <= rank <= 1024 or rank % 16:
        raise ValueError(f"rank must be a multiple of 16 from 0 to 1024, got {rank}")
    half = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if half not in (torch.bfloat16, torch.float16):
        raise ValueError(f"dtype must be bfloat16 or float16, got {dtype}")
    target = Path(output)
    with open_checkpoint(model, **hub) as source:
        view = DiffusersView(source)
        config = flux_config(source)
        tensors = {name: view.info(name) for name in view}
        job = plan(FAMILIES["flux"], config, tensors, precision=exact, rank=rank, dtype=half)
        if not job.layers:
            raise CheckpointError(f"{source.where}: no layer is wide enough to be quantised")
        single_file = target.suffix in (".safetensors", ".sft")
        with contextlib.ExitStack() as stack:
            if single_file:
                file = target
            else:
                folder = stack.enter_context(_output_folder(target, Path(model)))
                file = folder / WEIGHTS_NAME
                text = folder_config(job.family.transformer_class, config, precision, rank)
                (folder / "config.json").write_text(text)
            nbytes = _write(view, job, file, published=single_file, seed=seed, progress=progress)
    return QuantizeReport(
        output=target,
        quantized=len(job.layers),
        kept=job.kept,
        bytes_before=sum(_numel(info) * 2 for info in tensors.values()),
        bytes_after=nbytes,
        seconds=time.monotonic() - started,
    )


def _numel(info: TensorInfo) -> int:
    return info.nbytes // info.dtype.itemsize


@contextlib.contextmanager
def _output_folder(target: Path, model: Path) -> Iterator[Path]:
    """The folder for the transformer: inside a copy of the rest of the pipeline, if `model` is a pipeline folder."""
    if not (model / "model_index.json").is_file():
        with atomic_folder(target, ["config.json", WEIGHTS_NAME]) as folder:
            yield folder
        return
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(f"{target} exists; a whole pipeline is only written to a new or empty folder")
    if model.resolve() in target.resolve().parents:
        raise CheckpointError(f"{target} lies inside the pipeline it is made from; choose another place")
    temporary = target.with_name(f"{target.name}.tmp-{os.getpid()}")
    try:
        try:
            shutil.copytree(model, temporary, ignore=lambda at, _: ["transformer"] if Path(at) == model else [])
            (temporary / "transformer").mkdir()
        except OSError as error:
            raise CheckpointError(f"{target} cannot be written: {error}") from error
        yield temporary / "transformer"
        temporary.replace(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write(view: DiffusersView, job: Job, file: Path, *, published: bool, seed: int, progress: bool) -> int:
    shapes = {name: view.info(name).shape for name in view}
    rename = v2_to_v1 if published else str
    owners: dict[str, str] = {}
    infos = []
    for path, info in job.tensors(shapes):
        owners[rename(info.name)] = path
        infos.append(TensorInfo(rename(info.name), info.dtype, info.shape))
    metadata = {"format": "pt"}
    if published:
        metadata = file_metadata(job.family.transformer_class, job.config, job.precision, job.rank)
    total = sum(_numel(view.info(name)) for name in view)
    smoothing = _Smoothing(view, job)
    with (
        tqdm(total=total, unit="param", unit_scale=True, desc="quantize", disable=not progress) as bar,
        StreamingWriter(file, infos, metadata) as writer,
    ):
        for info in job.copied:
            writer.write(rename(info.name), _converted(view, info.name, job.dtype))
            view.release(info.name)
            bar.update(_numel(info))
        for layer in job.layers:
            values = _quantize_layer(view, job, layer, smoothing, torch.Generator().manual_seed(seed))
            for key, _ in job.blank(layer, shapes).named_parameters():
                writer.write(rename(f"{layer.path}.{key}"), values[key])
            for source in layer.sources:
                view.release(f"{source}.weight")
                rows, width = shapes[f"{source}.weight"]
                start, stop = _columns(layer, width, rows)
                bar.update(rows * (stop - start))
        bar.update(total - bar.n)
    return writer.nbytes


def _columns(layer: PlannedLayer, width: int, rows: int) -> tuple[int, int]:
    """The input columns of its source(s) that the layer takes."""
    return source_columns(layer.spec, width, rows) if isinstance(layer.spec, LowRankLinear) else (0, width)


def _converted(view: DiffusersView, name: str, dtype: torch.dtype) -> torch.Tensor:
    value = view.tensor(name).to(dtype)
    if not value.isfinite().all():
        raise CheckpointError(f"tensor '{name}' in {view.where} holds NaN, infinity or values too large for {dtype}")
    return value


def _weight(view: DiffusersView, layer: PlannedLayer) -> torch.Tensor:
    """The layer's weight (N, K), rows of fused sources one after another; a view of the map where possible."""
    parts = [view.tensor(f"{source}.weight") for source in layer.sources]
    start, stop = _columns(layer, parts[0].shape[1], parts[0].shape[0])
    parts = [part[:, start:stop] for part in parts]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _bias(view: DiffusersView, layer: PlannedLayer) -> torch.Tensor | None:
    """The layer's bias (N,). Of a linear split by columns, the part with the last columns carries it."""
    if isinstance(layer.spec, LowRankLinear) and layer.spec.columns == "head":
        return None
    names = [f"{source}.bias" for source in layer.sources]
    if not any(name in view for name in names):
        return None
    rows = [view.info(f"{source}.weight").shape[0] for source in layer.sources]
    parts = [view.tensor(n).float() if n in view else torch.zeros(r) for n, r in zip(names, rows, strict=True)]
    return torch.cat(parts)


def _quantize_layer(
    view: DiffusersView, job: Job, layer: PlannedLayer, smoothing: "_Smoothing", generator: torch.Generator
) -> Mapping[str, torch.Tensor]:
    """Tensor name inside the layer -> published tensor."""
    try:
        if isinstance(layer.spec, Modulation):
            return quantize_modulation(_weight(view, layer), _bias(view, layer), layer.spec.num_chunks, dtype=job.dtype)
        weight = _weight(view, layer)
        rows = [view.info(f"{source}.weight").shape[0] for source in layer.sources]
        quantized = quantize_svdq(
            weight,
            _bias(view, layer),
            precision=job.precision,
            rank=job.rank,
            smooth=smoothing.of(layer),
            shift=GELU_SHIFT if layer.spec.after_gelu and job.precision == "int4" else 0.0,
            segments=rows,
            dtype=job.dtype,
            generator=generator,
        )
        return pack_svdq(quantized)
    except ValueError as error:
        raise CheckpointError(f"{view.where}: {' + '.join(layer.sources)}: {error}") from error


class _Smoothing:
    """Smoothing vectors from weights, one for all layers that share an input."""

    def __init__(self, view: DiffusersView, job: Job) -> None:
        self._view = view
        self._dtype = job.dtype
        self._groups: dict[str, list[PlannedLayer]] = {}
        for layer in job.layers:
            if isinstance(layer.spec, LowRankLinear):
                self._groups.setdefault(layer.smooth_with or layer.path, []).append(layer)
        self._vectors: dict[str, torch.Tensor] = {}

    def of(self, layer: PlannedLayer) -> torch.Tensor:
        """The vector (K,) of the layer's group, kept until its last member asked."""
        key = layer.smooth_with or layer.path
        if key not in self._vectors:
            weights = [self._view.tensor(f"{s}.weight") for member in self._groups[key] for s in member.sources]
            start, stop = _columns(layer, weights[0].shape[1], weights[0].shape[0])
            self._vectors[key] = smoothing_from_weights(
                [weight[:, start:stop] for weight in weights], dtype=self._dtype
            )
        if layer is self._groups[key][-1]:
            return self._vectors.pop(key)
        return self._vectors[key]
