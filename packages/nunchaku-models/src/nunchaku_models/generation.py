"""What `nunchaku generate` does, as functions: load a pipeline, draw, report."""

import inspect
import json
import logging
import os
import re
import resource
import secrets
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, get_args

import torch
from PIL import Image

from nunchaku_kernels.ops import Arithmetic
from nunchaku_models import demo
from nunchaku_models.checkpoints import CheckpointError
from nunchaku_models.dtypes import parse_dtype

logger = logging.getLogger(__name__)

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
MAX_SIDE = 4096
"""Pixels; four times what the models were trained for, and a size whose picture still fits into memory."""
MAX_STEPS = 1000


@dataclass(frozen=True)
class LoadedPipeline:
    """A pipeline with what is worth reporting about it.

    Attributes:
        pipeline: a diffusers pipeline on its device.
        model: where it came from.
        device: torch device string.
        arithmetic: how the transformer is multiplied, in words.
        defaults: call arguments recommended by the pipeline's folder.
        load_seconds: time to load it, imports included.
        loras: LoRA file -> strength.
    """

    pipeline: Any
    model: str
    device: str
    arithmetic: str
    defaults: dict[str, Any]
    load_seconds: float
    loras: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class GenerationReport:
    """What a picture took."""

    output: str
    model: str
    width: int
    height: int
    steps: int
    seed: int
    device: str
    arithmetic: str
    dtype: str
    load_seconds: float
    draw_seconds: float
    peak_memory_bytes: int
    peak_memory_of: str
    loras: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"wrote {self.output}: {self.width}x{self.height}, {self.steps} steps, seed {self.seed}\n"
            f"  {self.load_seconds:.1f} s to load, {self.draw_seconds:.1f} s to draw, peak memory "
            f"{self.peak_memory_bytes / 2**30:.2f} GiB ({self.peak_memory_of})\n"
            f"  transformer: {self.arithmetic}, {self.dtype}, on {self.device}"
            + "".join(f"\n  LoRA: {file}, strength {strength:g}" for file, strength in self.loras.items())
        )


def parse_size(text: str) -> tuple[int, int]:
    """ "1024x768" or "1024" -> (width, height) in pixels, multiples of 16.

    Raises:
        ValueError: anything else.
    """
    match = re.fullmatch(r"(\d{1,5})(?:[xX](\d{1,5}))?", text.strip())
    sides = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not all(16 <= side <= MAX_SIDE and side % 16 == 0 for side in sides):
        raise ValueError(f"size must be WIDTHxHEIGHT in multiples of 16 up to {MAX_SIDE}, e.g. 1024x768; got {text!r}")
    return sides


def parse_lora(text: str) -> tuple[str, float]:
    """ "style.safetensors:0.8" -> (file, strength); the strength is 1 without a number behind a colon."""
    match = re.fullmatch(r"(.+):([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)", text)
    if match:
        return match[1], float(match[2])
    file, _, strength = text.rpartition(":")
    if Path(file).is_file() and not Path(text).exists():
        raise ValueError(f"--lora: the strength of {file} must be a number, got {strength!r}")
    return text, 1.0


def check_steps(steps: int) -> int:
    """The number of denoising steps, if it is one.

    Raises:
        ValueError: below 1 or above 1000.
    """
    if not 1 <= steps <= MAX_STEPS:
        raise ValueError(f"steps must be from 1 to {MAX_STEPS}, got {steps}")
    return steps


def check_seed(seed: int) -> int:
    """The seed, if a generator takes it.

    Raises:
        ValueError: negative, or of more than 63 bits.
    """
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed must be from 0 to 2**63 - 1, got {seed}")
    return seed


def check_picture_path(path: Path) -> Path:
    """The path, if a picture can be written there.

    Raises:
        ValueError: an ending that is no picture format, or a folder that is missing or read-only.
    """
    if path.suffix.lower() not in PICTURE_SUFFIXES:
        raise ValueError(f"{path}: a picture's name must end in {', '.join(PICTURE_SUFFIXES)}")
    folder = path.resolve().parent
    if not folder.is_dir():
        raise ValueError(f"{path}: the folder {folder} does not exist")
    if path.is_dir() or not os.access(folder, os.W_OK) or (path.exists() and not os.access(path, os.W_OK)):
        raise ValueError(f"{path}: cannot be written")
    return path


def save_picture(picture: Image.Image, path: Path) -> None:
    """Write a picture to a temporary file, then rename it."""
    temporary = path.with_name(f".{path.stem}-{secrets.token_hex(4)}{path.suffix}")
    try:
        picture.save(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def load_pipeline(
    model: str | os.PathLike[str] | None = None,
    *,
    base: str | os.PathLike[str] | None = None,
    device: str | None = None,
    dtype: str | torch.dtype | None = None,
    arithmetic: str | None = None,
    offload: bool = False,
    loras: Sequence[tuple[str, float]] = (),
    t5: str | None = None,
) -> LoadedPipeline:
    """Load a FLUX pipeline to draw with.

    Args:
        model: pipeline folder or hub id (4-bit or 16-bit); or a transformer file, folder or hub path, with `base`;
            None for the demo.
        base: pipeline folder or hub id with everything but the transformer.
        device: torch device; default "cuda" if there is one, else "cpu".
        dtype: name or torch dtype; default float16 on GPUs before sm_80, bfloat16 on other GPUs and on the CPU.
        arithmetic: how 4-bit layers are multiplied; default the device's best.
        offload: keep on the GPU only the part that runs.
        loras: LoRA files to draw with, and their strengths.
        t5: "4bit" for the pipeline's T5 in 4 bits, or the file, folder or hub id of a 4-bit T5; None for the pipeline's
            as it is.

    Raises:
        CheckpointError, ValueError: with a sentence that says what is wrong and what to do.
    """
    started = time.monotonic()
    place = resolve_device(device)
    if offload and place.type == "cpu":
        raise ValueError("offloading moves parts between CPU and GPU; the device is the CPU")
    half = _dtype(dtype, place)
    if arithmetic is not None and arithmetic not in get_args(Arithmetic):
        raise ValueError(f"arithmetic must be one of {', '.join(get_args(Arithmetic))}, got {arithmetic!r}")
    if model is None:
        if not demo.is_complete():
            raise CheckpointError("the demo pipeline is missing from this installation; reinstall nunchaku-models")
        model, base = demo.TRANSFORMER_INT4, base or demo.PIPELINE
    path = Path(model).expanduser()
    if base is None and path.is_file():
        raise ValueError(
            f"{model} is a transformer file; add --base with the pipeline that has the text encoders and VAE"
        )
    if base is None and not path.exists() and os.fspath(model).endswith((".safetensors", ".sft")):
        raise ValueError(f"{model} does not exist here; if it is a transformer file on the hub, add --base")
    root = base if base is not None else model
    local = Path(root).expanduser()
    if local.exists() and not (local / "model_index.json").is_file():
        what = "" if base is not None else "; if it is a transformer, add --base with the pipeline that has the rest"
        raise CheckpointError(f"{root} is not a pipeline folder: it has no model_index.json{what}")
    if not local.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", os.fspath(root)) is None:
        raise CheckpointError(f"{root} is neither a folder nor a hub id such as 'org/repo'")

    import diffusers  # takes seconds; everything above fails without it

    from nunchaku_models.flux import NunchakuFluxTransformer2DModel
    from nunchaku_models.layers import arithmetics, quantized_layers, set_arithmetic

    parts = load_text_encoder(root, t5, half)
    if base is not None:
        parts["transformer"] = NunchakuFluxTransformer2DModel.from_pretrained(model, dtype=half)
    try:
        pipeline = diffusers.DiffusionPipeline.from_pretrained(
            str(local) if local.exists() else os.fspath(root), dtype=half, use_safetensors=True, **parts
        )
    except CheckpointError:
        raise
    except Exception as error:
        # diffusers, transformers, tokenizers and safetensors share no base class of errors
        raise CheckpointError(f"{root} cannot be loaded as a pipeline: {type(error).__name__}: {error}") from error
    transformer = getattr(pipeline, "transformer", None)
    if transformer is None:
        raise CheckpointError(f"{root}: {type(pipeline).__name__} has no transformer; FLUX.1 pipelines are supported")
    if quantized_layers(transformer):
        if arithmetic is not None:
            set_arithmetic(transformer, arithmetic)  # type: ignore[arg-type]  # checked above
    elif arithmetic is not None:
        raise ValueError(f"{model} is not quantised: there is no arithmetic to choose; run `nunchaku quantize` first")
    load_loras(pipeline, loras)
    if offload:
        pipeline.enable_model_cpu_offload(device=place)
    else:
        pipeline.to(place)
    if quantized_layers(transformer):
        words = ", ".join(f"{name} x {count}" for name, count in arithmetics(transformer, place).items())
    else:
        words = "16-bit"
    return LoadedPipeline(
        pipeline=pipeline,
        model=str(model),
        device=str(place),
        arithmetic=words,
        defaults=demo.defaults(local) if local.is_dir() else {},
        load_seconds=time.monotonic() - started,
        loras=dict(loras),
    )


TEXT_ENCODERS = "nunchaku.text_encoders"
"""Entry-point group of functions that load quantised text encoders; nunchaku-t5 has one."""


def load_text_encoder(pipeline: str | os.PathLike[str], source: str | None, dtype: torch.dtype) -> dict[str, Any]:
    """Make installed kinds of quantised text encoders loadable for diffusers, and load one if asked for.

    Args:
        pipeline: its folder or hub id.
        source: "4bit", or where a 4-bit T5 is; None for none.
        dtype: of the pipeline.

    Returns:
        Arguments for the pipeline's `from_pretrained`: part -> model.

    Raises:
        ValueError: `source` is no such thing, or nunchaku-t5 is not installed and needed.
    """
    # Loading an entry point imports its package, which tells transformers about its method.
    loaders = [entry.load() for entry in entry_points(group=TEXT_ENCODERS)]
    if source is None:
        _check_quantized_parts(Path(pipeline).expanduser())
        return {}
    if not loaders:
        raise ValueError("--t5 needs the package nunchaku-t5; install it")
    parts: dict[str, Any] = loaders[0](pipeline, source, dtype=dtype)
    return parts


def _check_quantized_parts(pipeline: Path) -> None:
    """Raise CheckpointError for a local pipeline with a text encoder of a method that nobody knows: transformers would
    only warn, and make weights up."""
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    for config in sorted(pipeline.glob("text_encoder*/config.json")):
        try:
            entries = json.loads(config.read_text())
            method = entries.get("quantization_config", {}).get("quant_method")
        except (OSError, ValueError, AttributeError):
            continue  # transformers says what is wrong with it
        if isinstance(method, str) and method not in AUTO_QUANTIZER_MAPPING:
            raise CheckpointError(
                f"{config.parent} is quantised by {method!r}, which no installed package knows; for nunchaku_w4a16 "
                "install nunchaku-t5"
            )


ADAPTERS = "nunchaku.adapters"
"""Entry-point group of functions that let diffusers put adapters on 4-bit layers; nunchaku-lora has one."""


def load_loras(pipeline: Any, loras: Sequence[tuple[str, float]]) -> None:
    """Load LoRA files onto a pipeline, all of them active.

    Args:
        pipeline: a diffusers pipeline with a `transformer`.
        loras: files (or what else diffusers takes) and strengths.

    Raises:
        ValueError: a file does not fit the model, or the transformer is quantised and nunchaku-lora is not installed.
    """
    if not loras:
        return
    from nunchaku_models.layers import quantized_layers

    found = entry_points(group=ADAPTERS)
    if not found and quantized_layers(pipeline.transformer):
        raise ValueError("LoRA on 4-bit layers needs the package nunchaku-lora; install it")
    for entry in found:
        entry.load()()
    names = [f"lora_{i}" for i in range(len(loras))]
    for name, (file, _) in zip(names, loras, strict=True):
        pipeline.load_lora_weights(file, adapter_name=name)
    pipeline.set_adapters(names, [strength for _, strength in loras])


def call_arguments(
    pipeline: Any,
    defaults: Mapping[str, Any],
    *,
    steps: int | None = None,
    size: tuple[int, int] | None = None,
    guidance: float | None = None,
    **more: Any,
) -> dict[str, Any]:
    """Arguments of the pipeline's call: what was asked for, over what its folder recommends.

    Args:
        pipeline: a diffusers pipeline.
        defaults: call argument -> value, from the pipeline's folder.
        steps, size, guidance: denoising steps, (width, height) in pixels, guidance scale; None for the default.
        more: others, by the pipeline's own names.

    Raises:
        ValueError: an argument that the pipeline does not take.
    """
    given = {
        "num_inference_steps": steps,
        "guidance_scale": guidance,
        "width": size[0] if size else None,
        "height": size[1] if size else None,
        **more,
    }
    arguments = {**defaults, **{key: value for key, value in given.items() if value is not None}}
    accepted = inspect.signature(type(pipeline).__call__).parameters
    unknown = sorted(key for key in arguments if key not in accepted)
    if unknown:
        raise ValueError(f"{type(pipeline).__name__} does not take {', '.join(unknown)}")
    return arguments


def generate(
    loaded: LoadedPipeline,
    prompt: str,
    output: Path,
    *,
    negative_prompt: str | None = None,
    seed: int = 0,
    steps: int | None = None,
    size: tuple[int, int] | None = None,
    guidance: float | None = None,
    true_cfg: float | None = None,
) -> GenerationReport:
    """Draw one picture and write it.

    Args:
        loaded: from `load_pipeline`.
        prompt: any text; too long a text is cut by the tokenizer, with a warning of diffusers'.
        output: see `check_picture_path`.
        negative_prompt, guidance, true_cfg: call arguments of the pipeline; default: the model's own.
        seed: of the noise, drawn on the CPU so that every device gives the same picture.
        steps: denoising steps.
        size: (width, height) in pixels.

    Raises:
        ValueError: a seed or number of steps out of range, or an argument that the pipeline does not take.
    """
    check_seed(seed)
    if steps is not None:
        check_steps(steps)
    arguments = call_arguments(
        loaded.pipeline,
        loaded.defaults,
        steps=steps,
        size=size,
        guidance=guidance,
        negative_prompt=negative_prompt,
        true_cfg_scale=true_cfg,
    )
    device = torch.device(loaded.device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    started = time.monotonic()
    generator = torch.Generator("cpu").manual_seed(seed)
    picture = loaded.pipeline(prompt, generator=generator, **arguments).images[0]
    seconds = time.monotonic() - started
    save_picture(picture, output)
    memory, what = _peak_memory(device)
    return GenerationReport(
        output=str(output),
        model=loaded.model,
        width=picture.width,
        height=picture.height,
        steps=loaded.pipeline.num_timesteps,
        seed=seed,
        device=loaded.device,
        arithmetic=loaded.arithmetic,
        dtype=str(loaded.pipeline.transformer.dtype).removeprefix("torch."),
        load_seconds=loaded.load_seconds,
        draw_seconds=seconds,
        peak_memory_bytes=memory,
        peak_memory_of=what,
        loras=loaded.loras,
    )


def resolve_device(name: str | None) -> torch.device:
    """A device that computes here; a GPU if there is one and none is named.

    Raises:
        ValueError: it cannot be used, and why.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
        if device.type == "meta":
            raise RuntimeError("it computes nothing")
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"device {name!r} cannot be used here: {reason}") from error
    return device


def _dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    if dtype is None:
        old = device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0)
        return torch.float16 if old else torch.bfloat16
    return parse_dtype(dtype)


def _peak_memory(device: torch.device) -> tuple[int, str]:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device), "GPU"
    # bytes on macOS, kibibytes elsewhere
    factor = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * factor, "whole process"
