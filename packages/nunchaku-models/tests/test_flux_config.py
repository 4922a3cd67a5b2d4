"""Inference and validation of FLUX.1 configurations, family and form detection, and published metadata."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from hypothesis import given, settings
from hypothesis import strategies as st

from nunchaku_models.checkpoints import (
    CheckpointError,
    FileMetadata,
    QuantizationMetadata,
    TensorInfo,
    build_metadata,
    comfy_config,
    detect_family,
    detect_form,
    detect_precision,
    flux_config,
    infer_flux_config,
    parse_metadata,
    parse_quantization,
    quantization_of,
    require_family,
    validate_flux_config,
)
from nunchaku_models.checkpoints.flux_config import parameter_count
from nunchaku_models.checkpoints.flux_keys import bfl_targets

MANIFESTS = Path(__file__).resolve().parents[4] / "shared" / "spec" / "manifests"
needs_manifests = pytest.mark.skipif(not MANIFESTS.is_dir(), reason=f"the published key lists are not at {MANIFESTS}")


class Names:
    """A TensorSource with names and shapes but no data."""

    where = "x.safetensors"

    def __init__(self, infos: dict[str, TensorInfo], metadata: dict[str, str] | None = None) -> None:
        self.infos = infos
        self.metadata = metadata or {}

    def keys(self) -> list[str]:
        return list(self.infos)

    def __contains__(self, name: object) -> bool:
        return name in self.infos

    def __iter__(self) -> Iterator[str]:
        return iter(self.infos)

    def __len__(self) -> int:
        return len(self.infos)

    def info(self, name: str) -> TensorInfo:
        return self.infos[name]

    def tensor(self, name: str) -> torch.Tensor:
        raise AssertionError("data was read")

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        raise AssertionError("data was read")

    def release(self, name: str) -> None: ...


def source(shapes: dict[str, tuple[int, ...]], metadata: dict[str, str] | None = None) -> Names:
    return Names({name: TensorInfo(name, torch.bfloat16, shape) for name, shape in shapes.items()}, metadata)


def manifest(name: str) -> Names:
    infos = {}
    for line in (MANIFESTS / f"{name}.txt").read_text().splitlines():
        if match := re.fullmatch(r"(\S+) (\S+) (\[.*\]) x(\d+)", line):
            pattern, dtype, shape, count = match.groups()
            for index in range(int(count)):
                key = pattern.replace("{}", str(index))
                infos[key] = TensorInfo(key, getattr(torch, dtype), tuple(json.loads(shape)))
    return Names(infos)


configs = st.builds(
    lambda axes, out, **rest: (
        rest
        | {
            "patch_size": 1,
            "attention_head_dim": sum(axes),
            "axes_dims_rope": axes,
            "out_channels": None if out == rest["in_channels"] else out,
        }
    ),
    axes=st.sampled_from([[2, 2, 2], [4, 2, 2], [4, 6, 6], [4, 14, 14], [16, 56, 56]]),
    out=st.sampled_from([4, 64]),
    in_channels=st.sampled_from([4, 64, 128, 384]),
    num_layers=st.integers(1, 3),
    num_single_layers=st.integers(1, 3),
    num_attention_heads=st.integers(1, 4),
    joint_attention_dim=st.integers(1, 40),
    pooled_projection_dim=st.integers(1, 40),
    guidance_embeds=st.booleans(),
)


def shapes_of(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        model = FluxTransformer2DModel(**config)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def to_bfl(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """BFL names and shapes of a diffusers model: the rows of what comes from one tensor added up."""
    result: dict[str, tuple[int, ...]] = {}
    candidates = ["img_in", "txt_in", "final_layer.linear", "final_layer.adaLN_modulation.1"]
    candidates += [f"{x}_in.{y}_layer" for x in ("time", "vector", "guidance") for y in ("in", "out")]
    for i in range(3):
        candidates += [
            f"double_blocks.{i}.{x}_{y}" for x in ("img", "txt") for y in ("mod.lin", "attn.qkv", "attn.proj")
        ]
        candidates += [f"double_blocks.{i}.{x}_mlp.{y}" for x in ("img", "txt") for y in (0, 2)]
        candidates += [f"single_blocks.{i}.{x}" for x in ("modulation.lin", "linear1", "linear2")]
        norms = [f"double_blocks.{i}.{x}_attn.norm" for x in ("img", "txt")] + [f"single_blocks.{i}.norm"]
        candidates += [f"{norm}.{x}_norm" for norm in norms for x in ("query", "key")]
    for name in (f"{module}.{leaf}" for module in candidates for leaf in ("weight", "bias", "scale")):
        made = [shapes[target] for target, _ in bfl_targets(name) if target in shapes]
        if made and not name.endswith("_norm.weight"):
            result[name] = (sum(shape[0] for shape in made), *made[0][1:])
    return result


@settings(deadline=None, max_examples=25)
@given(config=configs, bfl=st.booleans())
def test_configurations_are_inferred_from_shapes(config: dict[str, Any], bfl: bool) -> None:
    shapes = shapes_of(config)
    file = source(to_bfl(shapes) if bfl else shapes)
    assert detect_form(file) == ("bfl" if bfl else "diffusers")
    inferred = infer_flux_config(file)
    assert sum(inferred["axes_dims_rope"]) == config["attention_head_dim"]
    assert {**inferred, "axes_dims_rope": 0} == {**config, "axes_dims_rope": 0}
    assert parameter_count(config) == sum(torch.Size(shape).numel() for shape in shapes.values())
    if config["attention_head_dim"] == 128:
        assert inferred["axes_dims_rope"] == [16, 56, 56]
    FluxTransformer2DModel(**{**inferred, "num_layers": 1, "num_single_layers": 1})  # even axes, or it fails to run
    assert validate_flux_config(config, file) == config
    written = {**config, "_class_name": "FluxTransformer2DModel", "_diffusers_version": "0.42.1"}
    assert flux_config(source(shapes, {"config": json.dumps(written)})) == config


TINY: dict[str, Any] = {
    "in_channels": 8,
    "num_layers": 2,
    "num_single_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 12,
    "pooled_projection_dim": 10,
    "axes_dims_rope": [4, 4, 8],
}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_layers", 10**9),
        ("num_layers", 2.0),
        ("num_layers", True),
        ("num_single_layers", "1"),
        ("attention_head_dim", 128),
        ("num_attention_heads", -2),
        ("joint_attention_dim", 10**12),
        ("guidance_embeds", 0),
        ("guidance_embeds", True),
        ("patch_size", 0),
        ("patch_size", 3),
        ("patch_size", 2**40),
        ("out_channels", 16),
        ("out_channels", False),
        ("in_channels", None),
        ("axes_dims_rope", [16, 56, 56]),
        ("axes_dims_rope", [16, 0, 0]),
        ("axes_dims_rope", [5, 5, 6]),
        ("axes_dims_rope", [4, 4, 4, 4]),
        ("axes_dims_rope", [4.0, 4, 8]),
        ("axes_dims_rope", "4,4,8"),
        ("_class_name", "SanaTransformer2DModel"),
    ],
)
def test_a_configuration_cannot_claim_what_the_tensors_do_not_show(key: str, value: object) -> None:
    file = source(shapes_of(TINY), {"config": json.dumps({**TINY, key: value})})
    with pytest.raises(CheckpointError, match=r"x\.safetensors") as caught:
        flux_config(file)
    assert key in str(caught.value) or "class" in str(caught.value)


def test_harmless_differences_of_a_configuration(caplog: pytest.LogCaptureFixture) -> None:
    file = source(shapes_of(TINY))
    for given_, out in (({}, None), ({"out_channels": 8}, None), ({"patch_size": 2, "out_channels": 2}, 2)):
        assert validate_flux_config({**TINY, **given_}, file)["out_channels"] == out
    assert validate_flux_config({}, file)["num_layers"] == 2
    assert not caplog.records
    assert "new_key" not in validate_flux_config({**TINY, "new_key": 1}, file)
    assert "new_key" in caplog.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x_embedder.weight": None}, "not a FLUX.1 transformer"),
        ({"proj_out.weight": None}, "missing"),
        ({"transformer_blocks.1.attn.norm_q.weight": (24,)}, "one even head dimension"),
        ({"transformer_blocks.7.attn.norm_q.weight": (16,)}, "without number 2"),
        ({"x_embedder.weight": (2**31, 0)}, "matrix there"),
        ({"x_embedder.weight": (2**31, 1)}, "damaged|divides"),
        ({"time_text_embed.timestep_embedder.linear_2.weight": (32, 33)}, "damaged"),
        ({f"transformer_blocks.{i}.attn.norm_q.weight": (16,) for i in range(900)}, "tensors are missing"),
        ({f"transformer_blocks.{i}.attn.norm_q.weight": (16,) for i in range(2000)}, "2000 'transformer_blocks'"),
    ],
)
def test_shapes_that_contradict_each_other(change: dict[str, Any], message: str) -> None:
    shapes = {**shapes_of(TINY), **change}
    with pytest.raises(CheckpointError, match=message):
        infer_flux_config(source({name: shape for name, shape in shapes.items() if shape is not None}))


@needs_manifests
@pytest.mark.parametrize("name", ["flux_v1_int4", "flux_v1_nvfp4", "flux_v2_int4", "flux_v2_nvfp4"])
def test_published_flux_files(name: str) -> None:
    file = manifest(name)
    precision = name.rsplit("_", 1)[1]
    assert detect_family(file.keys()) == "flux"
    assert detect_form(file) == f"nunchaku-{name.split('_')[1]}"
    assert detect_precision(file) == precision
    assert quantization_of(file) == QuantizationMetadata(precision, 32)
    config = infer_flux_config(file)
    assert config == {
        "patch_size": 1,
        "in_channels": 64,
        "out_channels": None,
        "num_layers": 19,
        "num_single_layers": 38,
        "attention_head_dim": 128,
        "num_attention_heads": 24,
        "joint_attention_dim": 4096,
        "pooled_projection_dim": 768,
        "guidance_embeds": True,
        "axes_dims_rope": [16, 56, 56],
    }
    assert parameter_count(config) == 11_901_408_320
    assert comfy_config(config) == {
        "model_class": "Flux",
        "model_config": {
            "axes_dim": [16, 56, 56],
            "context_in_dim": 4096,
            "depth": 19,
            "depth_single_blocks": 38,
            "disable_unet_model_creation": True,
            "guidance_embed": True,
            "hidden_size": 3072,
            "image_model": "flux",
            "in_channels": 16,
            "mlp_ratio": 4.0,
            "num_heads": 24,
            "out_channels": 16,
            "patch_size": 2,
            "qkv_bias": True,
            "theta": 10000,
            "vec_in_dim": 768,
        },
    }
    control = comfy_config({**config, "in_channels": 128, "out_channels": 64, "guidance_embeds": False})
    assert (control["model_class"], control["model_config"]["in_channels"]) == ("FluxSchnell", 32)
    assert control["model_config"]["out_channels"] == 16
    # Metadata decides, and may not contradict the scales.
    other = "int4" if precision == "nvfp4" else "nvfp4"
    for stated in ("int4", "nvfp4"):
        file.metadata = build_metadata(FileMetadata(quantization=QuantizationMetadata(stated)))
        if stated == other:
            with pytest.raises(CheckpointError, match=f"says it is {other}"):
                detect_precision(file)
        else:
            assert detect_precision(file) == precision


@needs_manifests
@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("qwen_v2_int4", "Qwen-Image"),
        ("zimage_v2_int4", "Z-Image"),
        ("sdxl_v2_nvfp4", "UNet"),
        ("t5xxl_awq", "text encoder"),
    ],
)
def test_other_families_are_named(name: str, what: str) -> None:
    names = manifest(name).keys()
    assert detect_family(names) is None
    with pytest.raises(CheckpointError, match=what) as caught:
        require_family(names, "x.safetensors")
    assert len(str(caught.value)) < 600


def test_names_of_other_files() -> None:
    flux = list(shapes_of(TINY))
    for extra, what in (
        (["controlnet_blocks.0.weight", "controlnet_x_embedder.weight"], "ControlNet"),
        (["distilled_guidance_layer.in_proj.weight"], "Chroma"),
    ):
        with pytest.raises(CheckpointError, match=what):
            require_family([*flux, *extra], "x")
    with pytest.raises(CheckpointError, match="no tensors"):
        require_family([], "x")
    lite = [*flux, "single_transformer_blocks.0.attn.to_q.qweight", "transformer_blocks.0.attn.to_out.0.qweight"]
    assert detect_form(lite) == detect_form(lite[::-1]) == "nunchaku-lite"
    with pytest.raises(CheckpointError, match="no 4-bit layers"):
        detect_precision(source({"a": (1,)}))


json_values = st.recursive(st.none() | st.booleans() | st.integers() | st.text(), st.lists, max_leaves=5)


@given(
    precision=st.sampled_from(["int4", "nvfp4"]),
    rank=st.integers(0, 1024),
    skip=st.booleans(),
    extra=st.dictionaries(st.sampled_from(["calibration", "tool"]), json_values),
    other=st.dictionaries(st.sampled_from(["format", "title"]), st.text()),
    model_class=st.none() | st.text(),
)
def test_metadata_survives_a_round_trip(
    precision: Any, rank: int, skip: bool, extra: dict[str, Any], other: dict[str, str], model_class: str | None
) -> None:
    values = FileMetadata(
        config={"num_layers": 1},
        quantization=QuantizationMetadata(precision, rank, skip, extra),
        comfy_config={"a": None},
        model_class=model_class,
        other=other,
    )
    written = build_metadata(values)
    assert all(isinstance(value, str) for value in written.values())
    assert parse_metadata(written, "x") == values
    assert values.quantization is not None
    assert values.quantization.group_size == {"int4": 64, "nvfp4": 16}[precision]


def test_published_quantization_configs() -> None:
    int4 = QuantizationMetadata("int4", 32).to_dict()
    assert int4 == {
        "method": "svdquant",
        "weight": {"dtype": "int4", "scale_dtype": None, "group_size": 64},
        "activation": {"dtype": "int4", "scale_dtype": None, "group_size": 64},
        "rank": 32,
    }
    fp4 = QuantizationMetadata("nvfp4", 128).to_dict()
    assert fp4["weight"] == {"dtype": "fp4_e2m1_all", "scale_dtype": [None, "fp8_e4m3_nan"], "group_size": 16}
    assert fp4["activation"] == {"dtype": "fp4_e2m1_all", "scale_dtype": "fp8_e4m3_nan", "group_size": 16}
    assert parse_quantization({}, "x") == QuantizationMetadata(None, 32)
    assert parse_quantization({"quantization_config": "{}"}, "x") == QuantizationMetadata(None, 32)
    assert QuantizationMetadata(None).group_size is None
    with pytest.raises(ValueError, match="without a precision"):
        QuantizationMetadata(None).to_dict()
    lite = {"quant_method": "nunchaku_lite", "svdq_w4a4": {"precision": "nvfp4", "group_size": 16, "rank": 8}}
    parsed = parse_quantization({"quantization_config": json.dumps(lite)}, "x")
    assert (parsed.precision, parsed.rank, parsed.extra) == ("nvfp4", 8, lite)
    folder = {"quant_method": "svdquant", "precision": "nvfp4", "rank": 4, "group_size": 16}
    assert parse_quantization({"quantization_config": json.dumps(folder)}, "x") == QuantizationMetadata("nvfp4", 4)


@pytest.mark.parametrize(
    "document",
    [
        [],
        {"weight": {"dtype": "int8"}},
        {"weight": {"dtype": 4}},
        {"weight": "int4"},
        {"weight": {"dtype": "int4", "group_size": 128}},
        {"weight": {"dtype": "int4", "group_size": "64"}},
        {"weight": {"dtype": "int4"}, "activation": {"dtype": "fp4_e2m1_all"}},
        {"rank": -1},
        {"rank": True},
        {"rank": "32"},
        {"rank": 10**9},
        {"skip_refiners": 1},
        {"method": "awq"},
        {"quant_method": "bitsandbytes_4bit"},
        {"precision": "int8"},
        {"precision": "int4", "group_size": 16},
        {"precision": "int4", "weight": {"dtype": "fp4_e2m1_all"}},
        {"method": ["svdquant"]},
        {"quant_method": "nunchaku_lite", "svdq_w4a4": 3},
        {"quant_method": "nunchaku_lite", "svdq_w4a4": {"precision": "int8"}},
        {"quant_method": "nunchaku_lite", "svdq_w4a4": {"precision": "int4", "group_size": 16}},
    ],
)
def test_nonsense_in_a_quantization_config(document: object) -> None:
    with pytest.raises(CheckpointError, match=r"x\.safetensors"):
        parse_metadata({"quantization_config": json.dumps(document)}, "x.safetensors")
