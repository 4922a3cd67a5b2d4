"""From a 16-bit checkpoint to a 4-bit one, one layer at a time from the mapped file to the output.

Without data here; what calibration does first is in `calibration/`.
"""

import contextlib
import os
import secrets
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from tqdm import tqdm

from nunchaku_kernels.formats import pack_svdq
from nunchaku_kernels.formats.svdq import Precision
from nunchaku_kernels.nn import GELU_SHIFT, ModulationLinear, SVDQLinear
from nunchaku_kernels.ops import Arithmetic, check_arithmetic
from nunchaku_kernels.quantize import quantize_svdq, smoothing_from_weights
from nunchaku_kernels.quantize.modulation import quantize_modulation
from nunchaku_models.calibration.run import CalibratedLayers, Calibration, fingerprint, work_path
from nunchaku_models.calibration.run import calibrate as run_calibration
from nunchaku_models.calibration.work import WorkFolder
from nunchaku_models.checkpoints import (
    Checkpoint,
    CheckpointError,
    DiffusersView,
    ShardedReader,
    StreamingWriter,
    TensorInfo,
    atomic_folder,
    check_writable,
    flux_config,
    is_finite,
    open_checkpoint,
    v2_to_v1,
)
from nunchaku_models.checkpoints.errors import shown
from nunchaku_models.checkpoints.sources import WEIGHT_SUFFIXES
from nunchaku_models.dtypes import parse_dtype
from nunchaku_models.families import FAMILIES, Family, LowRankLinear, Modulation
from nunchaku_models.layer_weights import layer_bias, layer_columns, layer_segments, layer_weight
from nunchaku_models.layers import PlannedLayer, empty_model, plan_layers
from nunchaku_models.prompts import calibration_prompts
from nunchaku_models.published import WEIGHTS_NAME, file_metadata, folder_config

Recipe = Literal["rtn", "data-free", "svdquant", "refined"]
RECIPES: tuple[str, ...] = get_args(Recipe)
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
        modulation: layers to quantise whose codes are 32-bit integers: they come first in the file, where nothing of
            odd size before them can put them out of alignment.
        low_rank: the other layers to quantise.
        kept: linears that could be 4-bit and are too narrow.
        copied: diffusers names of the tensors that are only converted.
        precision, rank, dtype: of the layers.
        recipe: how they are quantised.
    """

    family: Family
    config: dict[str, Any]
    modulation: tuple[PlannedLayer, ...]
    low_rank: tuple[PlannedLayer, ...]
    kept: tuple[str, ...]
    copied: tuple[TensorInfo, ...]
    precision: Precision
    rank: int
    dtype: torch.dtype
    recipe: Recipe = "data-free"

    @property
    def layers(self) -> tuple[PlannedLayer, ...]:
        """All layers to quantise."""
        return self.modulation + self.low_rank

    def blank(self, layer: PlannedLayer, shapes: Mapping[str, tuple[int, ...]]) -> SVDQLinear | ModulationLinear:
        """The layer without memory: its parameters say what a file must hold."""
        rows = sum(shapes[f"{source}.weight"][0] for source in layer.sources)
        width = shapes[f"{layer.sources[0]}.weight"][1]
        if isinstance(layer.spec, Modulation):
            return ModulationLinear(
                width, rows, num_chunks=layer.spec.num_chunks, dtype=self.dtype, device="meta", name=layer.path
            )
        start, stop = layer_columns(layer, width, rows)
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

    def tensors(self, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[TensorInfo]:
        """v2 name, dtype and shape of everything to be written, in that order."""
        for layer in self.modulation:
            yield from self.stored(layer, shapes)
        for info in self.copied:
            yield TensorInfo(info.name, self.dtype, info.shape)
        for layer in self.low_rank:
            yield from self.stored(layer, shapes)

    def stored(self, layer: PlannedLayer, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[TensorInfo]:
        """The tensors of one layer."""
        for key, value in self.blank(layer, shapes).named_parameters():
            yield TensorInfo(f"{layer.path}.{key}", value.dtype, tuple(value.shape))


def plan(
    family: Family,
    config: dict[str, Any],
    tensors: Mapping[str, TensorInfo],
    *,
    precision: Precision = "int4",
    rank: int = 32,
    dtype: torch.dtype = torch.bfloat16,
    recipe: Recipe = "data-free",
) -> Job:
    """Decide which layers become 4-bit.

    Args:
        family: the model's page.
        config: its configuration.
        tensors: diffusers name -> header entry of the 16-bit model.
        precision, rank, dtype, recipe: see `quantize_checkpoint`.

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
    layers = [layer for layer in candidates if not set(layer.sources) & set(narrow)]
    replaced = {f"{source}.{leaf}" for layer in layers for source in layer.sources for leaf in ("weight", "bias")}
    return Job(
        family=family,
        config=config,
        modulation=tuple(layer for layer in layers if isinstance(layer.spec, Modulation)),
        low_rank=tuple(layer for layer in layers if isinstance(layer.spec, LowRankLinear)),
        kept=tuple(dict.fromkeys(narrow)),
        copied=tuple(info for name, info in tensors.items() if name not in replaced),
        precision=precision,
        rank=rank,
        dtype=dtype,
        recipe=recipe,
    )


def _fits(layer: PlannedLayer, shapes: list[tuple[int, ...]]) -> bool:
    rows, width = sum(shape[0] for shape in shapes), shapes[0][1]
    if isinstance(layer.spec, Modulation):
        return width % 64 == 0 and rows % (4 * layer.spec.num_chunks) == 0
    start, stop = layer_columns(layer, width, rows)
    return stop - start >= MIN_IN_FEATURES


def predicted_bytes(job: Job, tensors: Mapping[str, TensorInfo]) -> int:
    """Bytes of the tensors that quantising will write: the formula of the file size, without the header."""
    shapes = {name: info.shape for name, info in tensors.items()}
    return sum(info.nbytes for info in job.tensors(shapes))


def quantize_checkpoint(
    model: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    precision: str = "int4",
    rank: int = 32,
    dtype: str | torch.dtype = "bfloat16",
    seed: int = 0,
    progress: bool = True,
    recipe: str | None = None,
    calibrate: int | Sequence[str] | None = None,
    gptq: bool = False,
    base: str | os.PathLike[str] | None = None,
    arithmetic: str | None = None,
    device: str | None = None,
    offload: bool = False,
    steps: int | None = None,
    size: tuple[int, int] | None = None,
    guidance: float | None = None,
    **hub: Any,
) -> QuantizeReport:
    """Quantise a diffusion transformer.

    Args:
        model: diffusers folder, single file (diffusers, BFL or ComfyUI names; fp8, fp16, bf16, fp32) or hub id.
        output: a name ending in `.safetensors` becomes one published file; any other a diffusers folder, of the whole
            pipeline if `model` is a local pipeline folder.
        precision: "int4" or "nvfp4"; modulation layers are int4 either way.
        rank: rank of the low-rank branch, a multiple of 16; 0 for none.
        dtype: "bfloat16" or "float16", of the 16-bit tensors.
        seed: of everything random; the same seed gives the same file.
        progress: show bars with the remaining time.
        recipe: "rtn", round to nearest with neither smoothing nor branch (rank 0); "data-free", from the weights alone,
            the default without `calibrate`; "svdquant", as published; "refined", fitted to the inputs of every layer,
            the default with `calibrate`.
        calibrate: prompts for the last two: a number of the pipeline's own or of general ones, or the prompts.
        gptq: round the residual of "svdquant" with GPTQ; "refined" includes it.
        base: with `calibrate`, the pipeline that has what `model`, a transformer, lacks.
        arithmetic: with `calibrate`, how the layers will be multiplied; default: with 4-bit activations.
        device, offload, steps, size, guidance: of the calibration, see `calibration.Calibration`.
        hub: `subfolder`, `revision`, `cache_dir`, `token`, `local_files_only`, ...

    Raises:
        ValueError: an unknown or unfitting argument.
        CheckpointError: the model cannot be read, or the output cannot be written. Nothing was written then, but an
            unfinished calibration stays beside the output and is taken up by the next call with the same arguments.
    """
    started = time.monotonic()
    if precision not in ("int4", "nvfp4"):
        raise ValueError(f"precision must be 'int4' or 'nvfp4', got {precision!r}")
    exact: Precision = "nvfp4" if precision == "nvfp4" else "int4"
    if type(rank) is not int or not 0 <= rank <= 1024 or rank % 16:
        raise ValueError(f"rank must be a multiple of 16 from 0 to 1024, got {rank}")
    if type(seed) is not int or not 0 <= seed < 2**63:
        raise ValueError(f"seed must be an integer from 0 to 2**63 - 1, got {seed}")
    chosen = _recipe(recipe, calibrate, gptq, rank)
    half = parse_dtype(dtype, allowed=(torch.bfloat16, torch.float16))
    options: Calibration | None = None
    if calibrate is not None:
        _check_drawing(steps, size)
        options = Calibration(
            recipe="svdquant" if chosen == "svdquant" else "refined",
            prompts=_prompts(calibrate, base if base is not None else model),
            gptq=gptq,
            base=base,
            arithmetic=_arithmetic(arithmetic, exact),
            device=device,
            offload=offload,
            steps=steps,
            size=size,
            guidance=guidance,
        )
    elif any(value is not None for value in (base, arithmetic, device, steps, size, guidance)) or offload:
        raise ValueError("base, arithmetic, device, offload, steps, size and guidance belong to a calibration")
    target = Path(output).expanduser()
    single_file = target.suffix in WEIGHT_SUFFIXES
    if target.suffix in (".bin", ".ckpt", ".gguf", ".pt", ".pth"):
        raise ValueError(f"{target}: {target.suffix} files are not written; name a .safetensors file or a folder")
    with open_checkpoint(model, **hub) as source:
        _check_not_source(target, source)
        view = DiffusersView(source)
        config = flux_config(source)
        tensors = {name: view.info(name) for name in view}
        family = FAMILIES["flux"]
        _check_complete(family, config, tensors, source.where)
        job = plan(family, config, tensors, precision=exact, rank=rank, dtype=half, recipe=chosen)
        if not job.layers:
            raise CheckpointError(f"{source.where}: no layer is wide enough to be quantised")
        with contextlib.ExitStack() as stack:
            if single_file:
                file = target
                check_writable(file)
            else:
                folder = stack.enter_context(_output_folder(target, Path(model).expanduser()))
                file = folder / WEIGHTS_NAME
                text = folder_config(job.family.transformer_class, config, exact, rank)
                (folder / "config.json").write_text(text)
            work: WorkFolder | None = None
            layers: CalibratedLayers | None = None
            if options is not None:
                settings = fingerprint(view, options, precision=exact, rank=rank, dtype=half, seed=seed)
                work = WorkFolder(work_path(target), settings)
                try:
                    layers = run_calibration(
                        view, family, config, job.layers, model, options,
                        precision=exact, rank=rank, dtype=half, seed=seed, work=work, progress=progress,
                    )  # fmt: skip
                except BaseException:
                    work.remove_if_unused()
                    raise
            nbytes = _write(view, job, file, layers, published=single_file, seed=seed, progress=progress)
        if work is not None:
            work.remove()
    return QuantizeReport(
        output=target,
        quantized=len(job.layers),
        kept=job.kept,
        bytes_before=sum(_numel(info) * 2 for info in tensors.values()),
        bytes_after=nbytes,
        seconds=time.monotonic() - started,
    )


def _recipe(recipe: str | None, calibrate: object, gptq: bool, rank: int) -> Recipe:
    """The recipe that was asked for, if the other arguments go with it."""
    name = recipe or ("data-free" if calibrate is None else "refined")
    if name not in RECIPES:
        raise ValueError(f"recipe must be one of {', '.join(RECIPES)}, got {name!r}")
    if (name in ("svdquant", "refined")) != (calibrate is not None):
        needs = "takes no calibration prompts" if calibrate is not None else "needs calibration prompts (`calibrate`)"
        raise ValueError(f"recipe {name!r} {needs}")
    if gptq and calibrate is None:
        raise ValueError("GPTQ needs calibration prompts (`calibrate`)")
    if name == "rtn" and rank:
        raise ValueError(f"recipe 'rtn' has no low-rank branch: rank must be 0, got {rank}")
    return name  # type: ignore[return-value]  # it is one of RECIPES


def _prompts(calibrate: int | Sequence[str], pipeline: str | os.PathLike[str]) -> tuple[str, ...]:
    if type(calibrate) is int:
        return tuple(calibration_prompts(calibrate, pipeline))
    if (
        isinstance(calibrate, str)
        or not isinstance(calibrate, Sequence)
        or not all(isinstance(prompt, str) for prompt in calibrate)
    ):
        raise ValueError(f"calibrate must be a number or a sequence of prompts, got {calibrate!r}")
    if not calibrate:
        raise ValueError("calibrate: expected at least one prompt, got none")
    return tuple(calibrate)


def _check_drawing(steps: int | None, size: tuple[int, int] | None) -> None:
    from nunchaku_models.generation import check_steps, parse_size

    if steps is not None:
        check_steps(steps)
    if size is not None:
        parse_size("x".join(map(str, size)))


def _arithmetic(arithmetic: str | None, precision: Precision) -> Arithmetic | None:
    if arithmetic is not None:
        check_arithmetic("calibration", precision, arithmetic)
    return arithmetic  # type: ignore[return-value]  # checked


def _check_complete(family: Family, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo], where: str) -> None:
    """Raise unless `tensors` are exactly those of the model: hours later is too late to find one missing."""
    import diffusers  # takes seconds

    model = empty_model(getattr(diffusers, family.transformer_class), config)
    wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    missing, unknown = sorted(wanted.keys() - tensors.keys()), sorted(tensors.keys() - wanted.keys())
    if missing:
        raise CheckpointError(
            f"{where} is incomplete: {len(missing)} tensors are missing, such as {', '.join(missing[:3])}"
        )
    if unknown:
        names = ", ".join(shown(name) for name in unknown[:3])
        raise CheckpointError(f"{where} holds {len(unknown)} tensors that {family.name} does not have, such as {names}")
    for name, shape in wanted.items():
        if tensors[name].shape != shape:
            raise CheckpointError(
                f"tensor '{name}' in {where} has shape {list(tensors[name].shape)}, {list(shape)} is expected; the "
                "file is damaged or of another model"
            )


def _check_not_source(target: Path, source: Checkpoint) -> None:
    readers = source.readers if isinstance(source, ShardedReader) else [source]
    for file in (Path(reader.where) for reader in readers):
        if target.exists() and (target.samefile(file) or target.samefile(file.parent)):
            raise CheckpointError(f"{target} is the model to be quantised itself; choose another output")


def _numel(info: TensorInfo) -> int:
    return info.nbytes // info.dtype.itemsize


@contextlib.contextmanager
def _output_folder(target: Path, model: Path) -> Iterator[Path]:
    """The folder for the transformer: inside a copy of the rest of the pipeline, if `model` is a pipeline folder."""
    target = Path(os.path.realpath(target))
    if not (model / "model_index.json").is_file():
        with atomic_folder(target, ["config.json", WEIGHTS_NAME]) as folder:
            yield folder
        return
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(f"{target} exists; a whole pipeline is only written to a new or empty folder")
    if model.resolve() in target.resolve().parents:
        raise CheckpointError(f"{target} lies inside the pipeline it is made from; choose another place")
    if not target.parent.is_dir():
        raise CheckpointError(f"{target} cannot be written: the folder {target.parent} does not exist; create it first")
    temporary = target.with_name(f"{target.name[:100]}.tmp-{secrets.token_hex(6)}")
    try:
        try:
            shutil.copytree(model, temporary, ignore=lambda at, names: _not_copied(names) if Path(at) == model else [])
            (temporary / "transformer").mkdir()
        except OSError as error:
            raise CheckpointError(f"{target} cannot be written: {error}") from error
        yield temporary / "transformer"
        temporary.replace(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _not_copied(names: list[str]) -> list[str]:
    """What a pipeline folder holds beside its parts: the 16-bit transformer, single-file releases, version control."""
    return [name for name in names if name == "transformer" or name.startswith(".") or name.endswith(WEIGHT_SUFFIXES)]


def _write(
    view: DiffusersView,
    job: Job,
    file: Path,
    calibrated: CalibratedLayers | None,
    *,
    published: bool,
    seed: int,
    progress: bool,
) -> int:
    shapes = {name: view.info(name).shape for name in view}
    rename = v2_to_v1 if published else str
    infos = [TensorInfo(rename(info.name), info.dtype, info.shape) for info in job.tensors(shapes)]
    metadata = {"format": "pt"}
    if published:
        metadata = file_metadata(job.family.transformer_class, job.config, job.precision, job.rank)
    total = sum(_numel(view.info(name)) for name in view)
    smoothing = _Smoothing(view, job)
    with (
        tqdm(
            total=total,
            unit="param",
            unit_scale=True,
            desc="quantize" if calibrated is None else "write",
            disable=not progress,
        ) as bar,
        StreamingWriter(file, infos, metadata) as writer,
    ):

        def write(layers: tuple[PlannedLayer, ...]) -> None:
            for layer in layers:
                if calibrated is not None:
                    values = calibrated.tensors(layer)
                else:
                    values = _quantize_layer(view, job, layer, smoothing, torch.Generator().manual_seed(seed))
                for info in job.stored(layer, shapes):
                    writer.write(rename(info.name), values[info.name.removeprefix(f"{layer.path}.")])
                for source in layer.sources:
                    view.release(f"{source}.weight")
                    rows, width = shapes[f"{source}.weight"]
                    start, stop = layer_columns(layer, width, rows)
                    bar.update(rows * (stop - start))

        write(job.modulation)
        for info in job.copied:
            writer.write(rename(info.name), _converted(view, info.name, job.dtype))
            view.release(info.name)
            bar.update(_numel(info))
        write(job.low_rank)
        bar.update(total - bar.n)
    return writer.nbytes


def _converted(view: DiffusersView, name: str, dtype: torch.dtype) -> torch.Tensor:
    value = view.tensor(name).to(dtype)
    if not is_finite(value):
        raise CheckpointError(f"tensor '{name}' in {view.where} holds NaN, infinity or values too large for {dtype}")
    return value


def _suspect(view: DiffusersView, names: Iterable[str]) -> str:
    """Where the values come from that a layer could not be made of: the first tensor that is not finite, if any."""
    for name in names:
        if name in view and not is_finite(view.tensor(name)):
            return f"tensor '{name}' in {view.where} holds NaN or infinity; the file is damaged, get it again"
    return ""


def _quantize_layer(
    view: DiffusersView, job: Job, layer: PlannedLayer, smoothing: "_Smoothing", generator: torch.Generator
) -> Mapping[str, torch.Tensor]:
    """Tensor name inside the layer -> published tensor."""
    try:
        values = _packed(view, job, layer, smoothing, generator)
        too_large = [key for key, value in values.items() if not is_finite(value)]
        if too_large:
            raise ValueError(f"values too large for {job.dtype} ({', '.join(too_large)})")
    except ValueError as error:
        sources = [source for member in smoothing.sharing(layer) for source in member.sources]
        suspect = _suspect(view, [f"{source}.{leaf}" for source in sources for leaf in ("weight", "bias")])
        raise CheckpointError(suspect or f"{view.where}: {' + '.join(layer.sources)}: {error}") from error
    return values


def _packed(
    view: DiffusersView, job: Job, layer: PlannedLayer, smoothing: "_Smoothing", generator: torch.Generator
) -> Mapping[str, torch.Tensor]:
    weight, bias = layer_weight(view, layer), layer_bias(view, layer)
    if isinstance(layer.spec, Modulation):
        return quantize_modulation(weight, bias, layer.spec.num_chunks, dtype=job.dtype)
    quantized = quantize_svdq(
        weight,
        bias,
        precision=job.precision,
        rank=job.rank,
        smooth=None if job.recipe == "rtn" else smoothing.of(layer),
        shift=GELU_SHIFT if layer.spec.after_gelu and job.precision == "int4" else 0.0,
        segments=layer_segments(view, layer),
        dtype=job.dtype,
        scale_search=job.recipe != "rtn",
        generator=generator,
    )
    return pack_svdq(quantized)


class _Smoothing:
    """Smoothing vectors from weights, one for all layers that share an input."""

    def __init__(self, view: DiffusersView, job: Job) -> None:
        self._view = view
        self._dtype = job.dtype
        self._groups: dict[str, list[PlannedLayer]] = {}
        for layer in job.low_rank:
            self._groups.setdefault(layer.smooth_with or layer.path, []).append(layer)
        self._vectors: dict[str, torch.Tensor] = {}

    def sharing(self, layer: PlannedLayer) -> list[PlannedLayer]:
        """The layers with the same vector, this one first."""
        return [layer, *self._groups.get(layer.smooth_with or layer.path, [])]

    def of(self, layer: PlannedLayer) -> torch.Tensor:
        """The vector (K,) of the layer's group, kept until its last member asked."""
        key = layer.smooth_with or layer.path
        if key not in self._vectors:
            weights = [self._view.tensor(f"{s}.weight") for member in self._groups[key] for s in member.sources]
            start, stop = layer_columns(layer, weights[0].shape[1], weights[0].shape[0])
            self._vectors[key] = smoothing_from_weights(
                [weight[:, start:stop] for weight in weights], dtype=self._dtype
            )
        if layer is self._groups[key][-1]:
            return self._vectors.pop(key)
        return self._vectors[key]
