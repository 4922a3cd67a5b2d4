"""A small FLUX whose linears are 4-bit layers and slices, made without nunchaku-models."""

import copy
import os
from collections.abc import Callable, Iterator
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported: no test may need a network

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from torch import nn

import nunchaku_lora
from nunchaku_kernels.nn import GELU_SHIFT, LinearSlice, ModulationLinear, Origin, SlicePart, SVDQLinear
from nunchaku_kernels.quantize import quantize_svdq
from nunchaku_kernels.quantize.modulation import quantize_modulation

torch.set_num_threads(1)  # the tensors are tiny, and a second thread waits for its core on a busy machine

TINY = {
    "patch_size": 1,
    "in_channels": 64,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 64,
    "num_attention_heads": 2,
    "joint_attention_dim": 128,
    "pooled_projection_dim": 128,
    "guidance_embeds": True,
    "axes_dims_rope": (8, 28, 28),
}


def low_rank(linears: list[nn.Linear], paths: list[str], columns: tuple[int, int] | None = None, **kwargs: Any) -> Any:
    """One 4-bit layer that computes the rows of several linears, or some columns of one."""
    weight = torch.cat([linear.weight.data for linear in linears])
    bias = torch.cat([linear.bias.data for linear in linears])
    columns = columns or (0, weight.shape[1])
    edges = [0]
    for linear in linears:
        edges.append(edges[-1] + linear.out_features)
    origin = tuple(
        Origin(path, (top, bottom), columns) for path, top, bottom in zip(paths, edges, edges[1:], strict=False)
    )
    weights = quantize_svdq(weight[:, slice(*columns)], bias, rank=16, scale_search=False, num_iters=1, **kwargs)
    return SVDQLinear.from_weights(weights, origin=origin, name=paths[0], **kwargs)


def modulation(linear: nn.Linear, path: str, num_chunks: int) -> ModulationLinear:
    """The 4-bit layer of an adaptive norm."""
    layer = ModulationLinear(linear.in_features, linear.out_features, num_chunks=num_chunks, name=path)
    layer.load_packed(quantize_modulation(linear.weight.data, linear.bias.data, num_chunks))
    return layer


def fuse(attn: nn.Module, path: str, owner: str, names: tuple[str, ...]) -> None:
    """Put one layer in the place of several linears, and slices under their names."""
    layer = low_rank([getattr(attn, name) for name in names], [f"{path}.{name}" for name in names])
    setattr(attn, owner, layer)
    for name, origin in zip(names, layer.origin, strict=True):
        setattr(attn, name, LinearSlice([SlicePart(layer, origin.rows, origin.columns)]))


def quantize(model: Any) -> Any:
    """Replace the linears of a FLUX transformer's blocks, in place."""
    for i, block in enumerate(model.transformer_blocks):
        at = f"transformer_blocks.{i}"
        fuse(block.attn, f"{at}.attn", "to_qkv", ("to_q", "to_k", "to_v"))
        fuse(block.attn, f"{at}.attn", "add_qkv_proj", ("add_q_proj", "add_k_proj", "add_v_proj"))
        block.attn.to_out[0] = low_rank([block.attn.to_out[0]], [f"{at}.attn.to_out.0"])
        block.attn.to_add_out = low_rank([block.attn.to_add_out], [f"{at}.attn.to_add_out"])
        for name in ("ff", "ff_context"):
            net = getattr(block, name).net
            net[0].proj = low_rank([net[0].proj], [f"{at}.{name}.net.0.proj"])
            net[2] = low_rank([net[2]], [f"{at}.{name}.net.2"], shift=GELU_SHIFT)
        block.norm1.linear = modulation(block.norm1.linear, f"{at}.norm1.linear", 6)
        block.norm1_context.linear = modulation(block.norm1_context.linear, f"{at}.norm1_context.linear", 6)
    for i, block in enumerate(model.single_transformer_blocks):
        at = f"single_transformer_blocks.{i}"
        fuse(block.attn, f"{at}.attn", "to_qkv", ("to_q", "to_k", "to_v"))
        block.proj_mlp = low_rank([block.proj_mlp], [f"{at}.proj_mlp"])
        linear, d = block.proj_out, block.proj_out.out_features
        tail = low_rank([linear], [f"{at}.proj_out"], (d, linear.in_features), shift=GELU_SHIFT)
        linear.bias.data.zero_()  # the bias of a split linear is on its last part
        head = low_rank([linear], [f"{at}.proj_out"], (0, d))
        block.attn.to_out, block.mlp_fc2 = head, tail
        parts = [SlicePart(head, (0, d), (0, d)), SlicePart(tail, (0, d), (d, linear.in_features))]
        block.proj_out = LinearSlice(parts)
        block.norm.linear = modulation(block.norm.linear, f"{at}.norm.linear", 3)
    return model


@pytest.fixture(autouse=True)
def enabled() -> Iterator[None]:
    """Every test runs enabled, with the same random numbers, and leaves nothing behind."""
    torch.manual_seed(0)
    nunchaku_lora.enable()
    yield
    nunchaku_lora.disable()


@pytest.fixture(scope="session")
def _models() -> dict[str, Any]:
    torch.manual_seed(0)
    dense = FluxTransformer2DModel(**TINY).bfloat16().eval()
    with torch.no_grad():
        for parameter in dense.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape).to(parameter.dtype) / 20)
    return {"dense": dense, "quantized": quantize(copy.deepcopy(dense))}


@pytest.fixture
def make_model(_models: dict[str, Any]) -> Callable[..., Any]:
    """A fresh quantised FLUX; `dtype` of its 16-bit tensors, `exact` for products that do not round activations."""

    def make(dtype: torch.dtype = torch.float32, exact: bool = True) -> Any:
        model = copy.deepcopy(_models["quantized"]).to(dtype)
        for module in model.modules():
            if exact and isinstance(module, SVDQLinear):
                module.set_arithmetic("w4a16")
        return model

    return make


@pytest.fixture
def make_pipe(make_model: Callable[..., Any]) -> Callable[..., Any]:
    """A FLUX pipeline of the transformer alone, enough for everything about adapters."""

    def make(**kwargs: Any) -> Any:
        return FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(),
            vae=None,
            text_encoder=None,
            tokenizer=None,
            text_encoder_2=None,
            tokenizer_2=None,
            transformer=make_model(**kwargs),
        )

    return make


def draw(model: Any, seed: int = 0) -> torch.Tensor:
    """The output of a FLUX transformer on fixed noise, (1, 6, 64)."""
    generator = torch.Generator().manual_seed(seed)
    dtype = model.x_embedder.weight.dtype

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    ids = torch.zeros(6, 3)
    ids[:, 1], ids[:, 2] = torch.arange(6) // 3, torch.arange(6) % 3
    with torch.no_grad():
        output: torch.Tensor = model(
            hidden_states=noise(1, 6, 64),
            encoder_hidden_states=noise(1, 4, 128),
            pooled_projections=noise(1, 128),
            timestep=torch.full((1,), 0.7, dtype=dtype),
            img_ids=ids,
            txt_ids=torch.zeros(4, 3),
            guidance=torch.full((1,), 3.5, dtype=dtype),
            return_dict=False,
        )[0]
    return output


@pytest.fixture(scope="session")
def run() -> Callable[..., torch.Tensor]:
    """`draw`, for tests."""
    return draw


def effective_weight(module: nn.Module, in_features: int) -> torch.Tensor:
    """The float64 weight of a linear with everything that acts on it, seen from outside."""
    with torch.no_grad():
        zero = module(torch.zeros(1, in_features)).double()
        return (module(torch.eye(in_features)).double() - zero).t()


@pytest.fixture(scope="session")
def weight_of() -> Callable[[nn.Module, int], torch.Tensor]:
    """`effective_weight`, for tests."""
    return effective_weight
