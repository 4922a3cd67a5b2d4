"""From a row of the table to its transformer. Rivals get the same linears; see the table for modulation layers."""

import copy
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nunchaku_kernels.formats import unpack_vector
from nunchaku_kernels.nn import ModulationLinear, SVDQLinear
from nunchaku_kernels.quantize import quantize_modulation
from nunchaku_models import demo
from nunchaku_models.evaluation.variants import Recipe, Variant
from nunchaku_models.evaluation.w8a8 import W8A8Linear
from nunchaku_models.families import FLUX, LowRankLinear, Modulation
from nunchaku_models.flux import NunchakuFluxTransformer2DModel
from nunchaku_models.layers import PlannedLayer, plan_layers, quantized_layers, set_module, source_columns
from nunchaku_models.quantizer import quantize_checkpoint

SEED = 0
"""Of the quantiser."""


class NotHere(Exception):
    """A rival that this installation or this machine does not have; the message is the reason."""


class Workshop:
    """Makes the demo's transformers, and keeps the 4-bit files.

    Args:
        transformer: the 16-bit transformer on its device; it is not changed.
        folder: where 4-bit files are kept; one that is there already is used.
        calibrate: number of calibration prompts of the recipes that take them.
        progress: show the quantiser's bar.
    """

    def __init__(self, transformer: Any, folder: Path, *, calibrate: int, progress: bool = True) -> None:
        self.transformer = transformer
        self.folder = folder
        self.calibrate = calibrate
        self.progress = progress
        with (demo.PIPELINE / "transformer" / "diffusion_pytorch_model.safetensors").open("rb") as file:
            self.digest = hashlib.file_digest(file, "sha256").hexdigest()[:12]

    def make(self, variant: Variant) -> Any:
        """The row's transformer, on the device and in the dtype of the 16-bit one.

        Raises:
            NotHere: a rival's package is missing or does not run here.
            ValueError, CheckpointError: from the quantiser and the loader.
        """
        if variant.method == "svdq":
            assert variant.recipe is not None
            model = self._load(variant.recipe)
            model.set_arithmetic(variant.arithmetic)
            return model
        model = copy.deepcopy(self.transformer)
        if variant.modulation:
            model = with_w4a16_modulation(model)
        match variant.method:
            case "w8a8":
                smooth = {} if variant.recipe is None else smoothing_of(self._load(variant.recipe))
                return with_w8a8(model, smooth)
            case "nf4":
                return _on_this_machine(with_nf4, model)
            case "torchao-fp8":
                return _on_this_machine(with_torchao_fp8, model)
            case "torchao-int8":
                return _on_this_machine(with_torchao_int8, model)
            case "modulation":
                return model

    def file(self, recipe: Recipe) -> Path:
        """The 4-bit file of a recipe; made if it is not there."""
        file = self.folder / recipe.file_name(self.calibrate, SEED, self.digest)
        if not file.exists():
            arguments = recipe.arguments(self.calibrate)
            quantize_checkpoint(demo.PIPELINE, file, seed=SEED, progress=self.progress, **arguments)
        return file

    def _load(self, recipe: Recipe) -> Any:
        like = next(self.transformer.parameters())
        return NunchakuFluxTransformer2DModel.from_pretrained(self.file(recipe), dtype=like.dtype, device=like.device)


def owners(model: Any) -> dict[str, list[PlannedLayer]]:
    """Path of a diffusers linear -> the low-rank layers that compute it in a 4-bit model, in the order of columns."""
    found: dict[str, list[PlannedLayer]] = {}
    for layer in plan_layers(FLUX, model.config):
        if isinstance(layer.spec, LowRankLinear):
            for source in layer.sources:
                found.setdefault(source, []).append(layer)
    return found


def smoothing_of(model: Any) -> dict[str, torch.Tensor]:
    """Path of a low-rank 4-bit layer -> its smoothing vector (K,) in natural order."""
    return {
        path: unpack_vector(layer.smooth_factor)[: layer.in_features]
        for path, layer in quantized_layers(model).items()
        if isinstance(layer, SVDQLinear)
    }


def with_w4a16_modulation(model: Any) -> Any:
    """`model` with its modulation linears replaced by ours, in place."""
    for layer in plan_layers(FLUX, model.config):
        if not isinstance(layer.spec, Modulation):
            continue
        linear = model.get_submodule(layer.path)
        weight, bias, chunks = linear.weight.detach(), linear.bias.detach(), layer.spec.num_chunks
        owner = ModulationLinear(
            linear.in_features, linear.out_features, num_chunks=chunks, dtype=weight.dtype, device="meta"
        )
        owner.load_packed(quantize_modulation(weight.cpu(), bias.cpu(), chunks, dtype=weight.dtype))
        set_module(model, layer.path, owner.to(weight.device))
    return model


def with_w8a8(model: Any, smooth: dict[str, torch.Tensor]) -> Any:
    """`model` with W8A8 linears, in place.

    Args:
        model: 16-bit.
        smooth: path of the low-rank layer -> smoothing vector; empty for none.
    """
    for path, linear, layers in _linears(model):
        edges = [_columns(layer, linear) for layer in layers]
        vectors = [smooth[layer.path] for layer in layers] if smooth else []
        bias = None if linear.bias is None else linear.bias.detach()
        owner = W8A8Linear(
            linear.weight.detach(),
            bias,
            smooth=torch.cat(vectors) if vectors else None,
            widths=[stop - start for start, stop in edges],
        )
        set_module(model, path, owner)
    return model


def with_nf4(model: Any) -> Any:
    """`model` with bitsandbytes' NF4 linears (blocks of 64, 16-bit activations), in place."""
    import bitsandbytes

    for path, linear, _ in _linears(model):
        owner = bitsandbytes.nn.Linear4bit(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            compute_dtype=linear.weight.dtype,
            compress_statistics=False,
            quant_type="nf4",
        )
        owner.load_state_dict(linear.state_dict())
        set_module(model, path, owner.to(linear.weight.device))  # quantised on its way there
    return model


def with_torchao_fp8(model: Any) -> Any:
    """`model` with torchao's float8 linears (dynamic activations, one scale per row), in place."""
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow

    return _with_torchao(model, Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()))


def with_torchao_int8(model: Any) -> Any:
    """`model` with torchao's int8 linears (dynamic activations), in place."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig

    return _with_torchao(model, Int8DynamicActivationInt8WeightConfig())


def _with_torchao(model: Any, config: Any) -> Any:
    from torchao.quantization import quantize_

    paths = {path for path, _, _ in _linears(model)}
    quantize_(model, config, filter_fn=lambda module, path: path in paths)
    return model


def _on_this_machine(change: Callable[[Any], Any], model: Any) -> Any:
    """`change(model)`, one of its layers tried."""
    path, linear, _ = next(_linears(model))
    x = torch.randn(32, linear.in_features).to(linear.weight)
    try:
        changed = change(model)
        with torch.no_grad():
            changed.get_submodule(path)(x)
        return changed
    except ImportError as error:
        raise NotHere(f"{error}; install nunchaku-models[evaluate]") from error
    except Exception as error:
        # their packages raise whatever they like where a machine does not suit them, assertions included
        raise NotHere(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}") from error


def _linears(model: Any) -> Iterator[tuple[str, nn.Linear, list[PlannedLayer]]]:
    for path, layers in owners(model).items():
        yield path, model.get_submodule(path), layers


def _columns(layer: PlannedLayer, linear: nn.Linear) -> tuple[int, int]:
    assert isinstance(layer.spec, LowRankLinear)
    return source_columns(layer.spec, linear.in_features, linear.out_features)
