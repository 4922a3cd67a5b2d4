"""The swapped model behaves like the one it came from: names, hooks, processors, residuals, offloading, copies."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from torch import nn

from nunchaku_kernels.nn import LinearSlice, ModulationLinear, QuantizedLinear, SVDQLinear
from nunchaku_models import NunchakuFluxTransformer2DModel, arithmetics, quantize_checkpoint, set_arithmetic
from nunchaku_models.checkpoints import is_finite
from nunchaku_models.families.flux_attention import NunchakuFluxAttnProcessor
from nunchaku_models.layers import quantized_layers

Forward = Callable[..., torch.Tensor]
Error = Callable[[torch.Tensor, torch.Tensor], float]


@pytest.fixture
def model(int4_file: Path) -> Any:
    return NunchakuFluxTransformer2DModel.from_pretrained(int4_file)


@pytest.fixture(scope="module")
def wanted(int4_file: Path, forward: Forward) -> torch.Tensor:
    """What the untouched model computes."""
    return forward(NunchakuFluxTransformer2DModel.from_pretrained(int4_file))


class Adapter(nn.Module):
    """A module that took a linear's place and adds to it, as PEFT's layers do."""

    def __init__(self, base: nn.Module, factor: float) -> None:
        super().__init__()
        self.base = base
        self.factor = factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) * self.factor


# ----------------------------------------------------------------- names and weights


@pytest.mark.parametrize("precision", ["int4", "nvfp4"])
@pytest.mark.parametrize("heads", [2, 3])
def test_every_original_linear_is_there_and_right(
    precision: str, heads: int, make_transformer: Any, error: Error, tmp_path: Path
) -> None:
    """Fed with the identity, every linear gives its original weight: no row, column or chunk is out of place."""
    original = make_transformer(num_attention_heads=heads)
    original.save_pretrained(tmp_path / "source")
    quantize_checkpoint(tmp_path / "source", tmp_path / "out.safetensors", precision=precision, progress=False)
    model = NunchakuFluxTransformer2DModel.from_pretrained(
        tmp_path / "out.safetensors", torch_dtype=torch.float32, arithmetic="w4a16"
    )
    state = model.state_dict()
    for name, linear in original.named_modules():
        if not isinstance(linear, nn.Linear):
            continue
        ours = model.get_submodule(name)
        assert (ours.in_features, ours.out_features) == (linear.in_features, linear.out_features), name
        assert ours.weight.shape == state[f"{name}.weight"].shape == linear.weight.shape, name
        assert ours.weight.device == linear.weight.device and ours.weight.dtype == torch.float32, name
        with torch.no_grad():  # w4a16: nothing is lost on the way
            bias = ours(torch.zeros(1, linear.in_features))
            weight = (ours(torch.eye(linear.in_features)) - bias).t()
        assert error(weight, linear.weight) < 0.13, name
        assert error(bias, linear.bias) < 0.05, name
        if isinstance(ours, LinearSlice | QuantizedLinear):
            stored = ours.bias if isinstance(ours, LinearSlice) else ours.natural_bias()
            if not any(part in name for part in ("net.2", "proj_out")):  # their stored bias makes up for the shift
                assert error(stored, linear.bias) < 0.05, name  # modulation: the 1 was added in 16 bits


def test_kinds_of_layers(model: Any) -> None:
    layers = quantized_layers(model)
    assert sum(isinstance(layer, ModulationLinear) for layer in layers.values()) == 2 + 2
    assert sum(isinstance(layer, SVDQLinear) for layer in layers.values()) == 8 + 2 * 4
    joint, single = model.transformer_blocks[0], model.single_transformer_blocks[0]
    for module in (joint.attn.to_q, joint.attn.add_v_proj, single.attn.to_k, single.proj_mlp, single.proj_out):
        assert isinstance(module, LinearSlice)
    assert [origin.name for origin in joint.attn.add_qkv_proj.origin] == [
        f"transformer_blocks.0.attn.add_{which}_proj" for which in "qkv"
    ]
    assert joint.ff.net[2].shift == 0.171875 and single.mlp_fc2.shift == 0.171875 and joint.ff.net[0].proj.shift == 0
    assert not any(isinstance(module, nn.Linear) for module in layers.values())


def test_state_dict_round_trip(model: Any, int4_file: Path, forward: Forward, wanted: torch.Tensor) -> None:
    other = NunchakuFluxTransformer2DModel.from_pretrained(int4_file)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert not torch.equal(forward(other), wanted)
    other.load_state_dict(model.state_dict())
    assert torch.equal(forward(other), wanted)


# ----------------------------------------------------------------- processors and hooks


def test_stock_processor_gives_the_same(model: Any, forward: Forward, wanted: torch.Tensor) -> None:
    for block in (*model.transformer_blocks, *model.single_transformer_blocks):
        assert type(block.attn.processor) is NunchakuFluxAttnProcessor
    model.set_attn_processor(FluxAttnProcessor())
    assert torch.equal(forward(model), wanted)
    model.set_attn_processor(NunchakuFluxAttnProcessor())
    assert torch.equal(forward(model), wanted)


@pytest.mark.parametrize("path", ["transformer_blocks.0.attn.to_v", "transformer_blocks.0.attn.add_v_proj"])
def test_hooks_and_wrappers_of_a_slice_act_once(
    path: str, model: Any, forward: Forward, error: Error, wanted: torch.Tensor
) -> None:
    slice_ = model.get_submodule(path)
    calls: list[torch.Tensor] = []
    handle = slice_.register_forward_hook(lambda module, args, output: calls.append(output))
    assert torch.equal(forward(model), wanted)
    assert len(calls) == 1
    handle.remove()

    handle = slice_.register_forward_hook(lambda module, args, output: output * 2)
    hooked = forward(model)
    handle.remove()
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, Adapter(slice_, 2))
    wrapped = forward(model)
    model.set_attn_processor(FluxAttnProcessor())
    wrapped_stock = forward(model)
    setattr(model.get_submodule(parent), name, slice_)
    model.set_attn_processor(NunchakuFluxAttnProcessor())
    plain = slice_.forward
    slice_.forward = lambda x: plain(x) * 2  # as accelerate's hooks do
    replaced = forward(model)
    del slice_.forward
    assert not torch.equal(hooked, wanted)
    for result in (wrapped, wrapped_stock, replaced):
        assert torch.equal(result, hooked)
    assert torch.equal(forward(model), wanted)


@pytest.mark.parametrize("stock", [False, True])
def test_fusing_projections_that_are_fused_changes_nothing(
    stock: bool, model: Any, forward: Forward, wanted: torch.Tensor, tmp_path: Path
) -> None:
    """diffusers would concatenate the placeholder weights of the slices into a linear of zeros."""
    if stock:
        model.save_pretrained(tmp_path / "folder")
        model = FluxTransformer2DModel.from_pretrained(tmp_path / "folder", torch_dtype=torch.bfloat16)
    model.fuse_qkv_projections()
    assert torch.equal(forward(model), wanted)
    model.unfuse_qkv_projections()
    assert torch.equal(forward(model), wanted)


def test_hooks_of_an_owner_run(model: Any, forward: Forward, wanted: torch.Tensor) -> None:
    calls: list[int] = []
    model.transformer_blocks[0].attn.to_qkv.register_forward_pre_hook(lambda module, args: calls.append(1))
    model.single_transformer_blocks[1].mlp_fc2.register_forward_hook(lambda module, args, output: calls.append(2))
    assert torch.equal(forward(model), wanted)
    assert calls == [1, 2]


def test_split_linear_can_be_wrapped(model: Any, forward: Forward, transformer16: Any, error: Error) -> None:
    other = copy.deepcopy(transformer16)
    for each in (model, other):
        block = each.single_transformer_blocks[0]
        block.proj_out = Adapter(block.proj_out, 3)
    assert error(forward(model), forward(other)) < 0.15


@pytest.mark.parametrize("batch", [1, 2])
def test_heads_that_layers_finish_themselves(
    make_transformer: Any,
    forward: Forward,
    error: Error,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    batch: int,
) -> None:
    """On CUDA fused layers norm, rotate and arrange heads; here they are made to, by torch operations."""
    original = make_transformer(attention_head_dim=128, num_attention_heads=2, axes_dims_rope=(16, 56, 56))
    original.save_pretrained(tmp_path / "source")
    quantize_checkpoint(tmp_path / "source", tmp_path / "out.safetensors", progress=False)
    model = NunchakuFluxTransformer2DModel.from_pretrained(tmp_path / "out.safetensors")
    calls = []
    finish = SVDQLinear.forward_heads

    def counted(layer: SVDQLinear, *args: Any, **kwargs: Any) -> None:
        calls.append(layer.name)
        finish(layer, *args, **kwargs)

    monkeypatch.setattr(SVDQLinear, "forward_heads", counted)
    expected = forward(model, batch)
    assert not calls
    monkeypatch.setattr(SVDQLinear, "fuses_heads", lambda layer, x: not torch.is_grad_enabled())
    with torch.no_grad():
        assert error(forward(model, batch), expected) < 0.02  # the norm's result is not rounded in between
    fused = 2 * len(model.transformer_blocks) + len(model.single_transformer_blocks)
    assert len(calls) == fused

    hooked = []
    norm = model.transformer_blocks[0].attn.norm_added_q
    norm.register_forward_hook(lambda module, args, output: hooked.append(module))
    calls.clear()
    forward(model, batch)
    assert hooked == [norm]  # nothing that is attached to a norm is left out
    assert len(calls) == fused - 2


# ----------------------------------------------------------------- ways of being used


@pytest.mark.parametrize(("batch", "text", "image"), [(2, 7, 12), (1, 1, 1), (3, 5, 9), (1, 130, 12)])
def test_batches_and_token_counts(
    batch: int, text: int, image: int, model: Any, transformer16: Any, forward: Forward, error: Error
) -> None:
    assert error(forward(model, batch, text, image), forward(transformer16, batch, text, image)) < 0.15


def test_batch_elements_do_not_mix(model: Any, forward: Forward, error: Error) -> None:
    both = forward(model, 2)
    seen: dict[str, torch.Tensor] = {}

    def keep_second(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        per_sample = ("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep")
        seen.update(kwargs)
        return args, {key: value[1:] if key in per_sample else value for key, value in kwargs.items()}

    model.register_forward_pre_hook(keep_second, with_kwargs=True)
    assert error(forward(model, 2), both[1:]) < 0.02


def test_controlnet_residuals(model: Any, transformer16: Any, forward: Forward, error: Error, wanted: Any) -> None:
    extra = {
        "controlnet_block_samples": [torch.randn(1, 12, 128).bfloat16() * 9],
        "controlnet_single_block_samples": [torch.randn(1, 12, 128).bfloat16() * 9],
    }
    ours, theirs = forward(model, **extra), forward(transformer16, **extra)
    assert error(ours, wanted) > 0.05
    assert error(ours, theirs) < 0.15


def test_cpu_offload(model: Any, forward: Forward, wanted: torch.Tensor) -> None:
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert {p.device.type for p in quantized_layers(model)["transformer_blocks.0.attn.to_qkv"].parameters()} == {"meta"}
    for _ in range(2):
        assert torch.equal(forward(model), wanted)


def test_layerwise_casting_leaves_4_bit_layers_alone(model: Any, forward: Forward, error: Error, wanted: Any) -> None:
    before = {name: p.clone() for name, p in model.named_parameters() if "_blocks." in name and "norm_" not in name}
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    assert model.x_embedder.weight.dtype == torch.float8_e4m3fn
    for name, value in before.items():
        assert torch.equal(model.get_parameter(name), value), name
    assert error(forward(model), wanted) < 0.2


def test_deepcopy(model: Any, forward: Forward, wanted: torch.Tensor) -> None:
    forward(model)  # derived tensors are made
    twin = copy.deepcopy(model)
    assert torch.equal(forward(twin), wanted)
    owners = {id(module) for module in quantized_layers(twin).values()}
    for module in twin.modules():
        if isinstance(module, LinearSlice):
            assert all(id(part.owner) in owners for part in module.parts)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(forward(model), wanted)
    assert not torch.equal(forward(twin), wanted)


def test_weights_written_behind_a_layers_back(model: Any, forward: Forward, wanted: torch.Tensor) -> None:
    """Row scales derived from `wscales` are remade when an offloader or a loader wrote into it."""
    forward(model)
    layer = quantized_layers(model)["transformer_blocks.0.ff.net.0.proj"]
    with torch.no_grad():
        layer.wscales.mul_(2)
        assert not torch.equal(forward(model), wanted)
        layer.wscales.mul_(0.5)
    assert torch.equal(forward(model), wanted)


def test_compiled_blocks(model: Any, forward: Forward, error: Error, wanted: torch.Tensor) -> None:
    model.single_transformer_blocks[0].compile(backend="eager", fullgraph=True)
    try:
        assert error(forward(model), wanted) < 0.02
    finally:
        torch.compiler.reset()


@pytest.mark.parametrize(
    "cast", [lambda m: m.to(torch.float16), lambda m: m.half(), lambda m: m.to("cpu", torch.float16)]
)
@pytest.mark.parametrize("which", ["int4_file", "nvfp4_file"])
def test_casting_after_loading(which: str, cast: Any, request: pytest.FixtureRequest, forward: Forward) -> None:
    """As loading with that dtype; what is stored in 4 and 8 bits stays as it is."""
    file = request.getfixturevalue(which)
    model = cast(NunchakuFluxTransformer2DModel.from_pretrained(file))
    loaded = NunchakuFluxTransformer2DModel.from_pretrained(file, torch_dtype=torch.float16)
    assert model.dtype == torch.float16
    assert torch.equal(forward(model, dtype=torch.float16), forward(loaded, dtype=torch.float16))


# ----------------------------------------------------------------- arithmetic


def test_set_arithmetic(model: Any, forward: Forward, wanted: torch.Tensor) -> None:
    assert arithmetics(model) == {"w4a8": 16, "w4a16 (modulation)": 4}
    model.set_arithmetic("w4a4")
    assert arithmetics(model)["w4a4"] == 16
    assert not torch.equal(forward(model), wanted)
    for wrong in ("nvfp4", "w2a2", "W4A8", ""):
        with pytest.raises(ValueError, match="possible: w4a8"):
            model.set_arithmetic(wrong)
        assert arithmetics(model)["w4a4"] == 16
    model.set_arithmetic(None)
    assert torch.equal(forward(model), wanted)


def test_set_arithmetic_is_all_or_nothing(model: Any, nvfp4_file: Path, transformer16: Any) -> None:
    mixed = nn.ModuleList([model, NunchakuFluxTransformer2DModel.from_pretrained(nvfp4_file)])
    before = arithmetics(mixed)
    with pytest.raises(ValueError, match="nvfp4"):
        set_arithmetic(mixed, "w4a8")
    assert arithmetics(mixed) == before
    set_arithmetic(mixed, "w4a16")
    assert arithmetics(mixed)["w4a16"] == 32
    with pytest.raises(ValueError, match="no 4-bit layers"):
        set_arithmetic(transformer16, "w4a8")


# ----------------------------------------------------------------- finite


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
)
def test_is_finite(dtype: torch.dtype) -> None:
    value = torch.tensor([0.0, -448.0, 448.0]).to(dtype)
    assert is_finite(value) and is_finite(value[:0])
    assert not is_finite(torch.tensor([1.0, torch.nan]).to(dtype))
    if dtype != torch.float8_e4m3fn:
        assert not is_finite(torch.tensor([1.0, -torch.inf]).to(dtype))
    assert is_finite(torch.tensor([-1, 127], dtype=torch.int8))
