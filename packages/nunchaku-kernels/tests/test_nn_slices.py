"""`LinearSlice`: the original linears' names keep working, whatever happens to the model that holds them."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import accelerate
import pytest
import torch
from torch import nn

from nunchaku_kernels.formats import SVDQWeights
from nunchaku_kernels.nn import LinearSlice, ModulationLinear, Origin, SlicePart, SVDQLinear
from nunchaku_kernels.quantize.modulation import quantize_modulation

RandomWeights = Callable[..., SVDQWeights]
K, D = 192, 100
MODES = ("w4a8", "w4a4", "w4a16")


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


class Block(nn.Module):
    """q, k, v fused into one owner whose members are not aligned to 128 rows; proj split by input columns."""

    def __init__(self, random_weights: RandomWeights) -> None:
        super().__init__()
        names, ranges = ("to_q", "to_k", "to_v"), ((0, D), (D, 2 * D), (2 * D, 3 * D))
        origin = tuple(Origin(name, rows, (0, K)) for name, rows in zip(names, ranges, strict=True))
        self.to_qkv = SVDQLinear.from_weights(random_weights(3 * D, K, seed=1), name="to_qkv", origin=origin)
        for name, rows in zip(names, ranges, strict=True):
            setattr(self, name, LinearSlice([SlicePart(self.to_qkv, rows, (0, K))]))
        self.head = SVDQLinear.from_weights(random_weights(K, 64, seed=2), name="head")
        self.tail = SVDQLinear.from_weights(random_weights(K, 128, seed=3), name="tail")
        self.proj = LinearSlice([SlicePart(self.head, (0, K), (0, 64)), SlicePart(self.tail, (0, K), (64, 192))])
        self.norm = ModulationLinear(64, 6 * 8, num_chunks=6, name="norm", device="meta")
        self.norm.load_packed(quantize_modulation(randn(48, 64, dtype=torch.float32), randn(48), 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shift = self.norm(x[..., :64]).sum(dim=-1, keepdim=True)
        q, k, v = self.to_q(x), self.to_k(x), self.to_v(x)
        return self.proj(x) + torch.cat([q * k, v[..., : K - D]], dim=-1) + shift


@pytest.fixture
def block(random_weights: RandomWeights) -> Block:
    return Block(random_weights)


def slices(block: nn.Module) -> list[LinearSlice]:
    return [module for module in block.modules() if isinstance(module, LinearSlice)]


@pytest.mark.parametrize("arithmetic", MODES)
def test_fused_slices_are_the_owner(block: Block, arithmetic: Any) -> None:
    block.to_qkv.set_arithmetic(arithmetic)
    x = randn(2, 3, K)
    parts = torch.cat([block.to_q(x), block.to_k(x), block.to_v(x)], dim=-1)
    assert torch.equal(parts, block.to_qkv(x))
    natural = torch.cat([block.to_q.bias, block.to_k.bias, block.to_v.bias])
    assert torch.equal(natural, block.to_qkv.natural_bias())


def test_split_slices_add_up(block: Block) -> None:
    x = randn(5, K)
    assert torch.equal(block.proj(x), block.head(x[:, :64]) + block.tail(x[:, 64:]))
    assert torch.equal(block.proj.bias, block.tail.natural_bias())


def test_natural_bias(random_weights: RandomWeights) -> None:
    weights = random_weights(300, 128)
    layer = SVDQLinear.from_weights(weights)
    assert torch.equal(layer.natural_bias(), weights.bias)
    assert torch.equal(LinearSlice([SlicePart(layer, (7, 290), (0, 128))]).bias, weights.bias[7:290])


def test_looks_like_the_original(block: Block) -> None:
    for module in slices(block):
        assert module.weight.shape == (module.out_features, module.in_features)
        assert (module.weight.dtype, module.weight.device) == (torch.bfloat16, torch.device("cpu"))
        assert not any(module.weight.stride())
        assert module.bias.shape == (module.out_features,)
        assert not list(module.parameters())
    assert (block.to_k.in_features, block.to_k.out_features) == (K, D)
    names = [name for name, _ in block.named_parameters(remove_duplicate=False)]
    assert len(names) == len(set(names))
    assert not [name for name in names if name.startswith(("to_q.", "to_k.", "to_v.", "proj."))]
    assert len(list(block.named_modules(remove_duplicate=False))) == len(list(block.named_modules()))
    assert "rows 100:200 x columns 0:192" in repr(block.to_k)


def test_gradients_flow_through_slices(block: Block) -> None:
    x = randn(2, K, dtype=torch.float32).requires_grad_()
    block(x).sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert x.grad.any()


def test_copies_have_their_own_owners(block: Block) -> None:
    x = randn(2, K)
    expected = block(x)
    buffer = io.BytesIO()
    torch.save(block, buffer)
    buffer.seek(0)
    copies = [copy.deepcopy(block), pickle.loads(pickle.dumps(block)), torch.load(buffer, weights_only=False)]
    for layer in (block.to_qkv, block.head, block.tail):
        layer.wscales.data = layer.wscales.data * 3
    for other in copies:
        assert other.to_q.parts[0].owner is other.to_qkv is other.to_v.parts[0].owner
        assert [part.owner for part in other.proj.parts] == [other.head, other.tail]
        assert torch.equal(other(x), expected)
    assert not torch.equal(block(x), expected)


def test_state_dicts(block: Block, random_weights: RandomWeights) -> None:
    state = block.state_dict()
    for name in ("to_q", "to_k", "to_v", "proj", "to_qkv", "head", "tail", "norm"):
        assert state[f"{name}.weight"].shape == block.get_submodule(name).weight.shape
        assert not any(state[f"{name}.weight"].stride())
    other = Block(random_weights)
    for parameter in other.parameters():
        parameter.zero_()
    other.load_state_dict(state, strict=True)
    x = randn(2, K)
    assert torch.equal(other(x), block(x))
    other.load_state_dict({key: value for key, value in state.items() if not key.endswith(".weight")}, strict=True)
    state["to_q.weight"] = torch.zeros(D, K)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*to_q\.weight"):
        other.load_state_dict(state, strict=True)


def test_conversions_reach_the_owners_once(block: Block) -> None:
    block.half()
    assert {p.dtype for p in block.parameters() if p.is_floating_point()} == {torch.float16}
    assert {module.weight.dtype for module in slices(block)} == {torch.float16}
    block.to("meta")
    assert {module.weight.device.type for module in slices(block)} == {"meta"}
    assert block.to_q.bias.device.type == "meta"


def test_sequential_offload(block: Block) -> None:
    x = randn(2, K)
    expected = block(x)
    accelerate.cpu_offload(block, execution_device="cpu")
    assert {p.device.type for p in block.parameters()} == {"meta"}
    for _ in range(2):
        assert torch.equal(block(x), expected)
        assert torch.equal(block.to_k(x), block.to_qkv(x)[..., D : 2 * D])
    assert {p.device.type for p in block.parameters()} == {"meta"}
    accelerate.hooks.remove_hook_from_submodules(block)


def test_hooks_and_replaced_forwards_on_owners_run(block: Block) -> None:
    called = []
    block.to_qkv.register_forward_hook(
        lambda module, arguments, keywords, y: called.append(keywords["rows"]), with_kwargs=True
    )
    block.to_v(randn(1, K))
    assert called == [(2 * D, 3 * D)]


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_models_give_the_same_bits(block: Block, backend: str) -> None:
    torch.compiler.reset()
    with torch.no_grad():
        for tokens in (2, 5, 9):  # the second size makes the first dimension symbolic
            x = randn(tokens, K)
            compiled = torch.compile(block, fullgraph=True, backend=backend)
            assert torch.equal(compiled(x), block(x))
        block.to_qkv.wscales.mul_(2)
        assert torch.equal(compiled(x), block(x))


def test_export(block: Block) -> None:
    x = randn(3, K)
    with torch.no_grad():
        exported = torch.export.export(block, (x,))
        assert torch.equal(exported.module()(x), block(x))


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([], "must not be empty"),
        ([((0, 10), (0, 191))], "do not fit an owner of 300 x 192"),
        ([((0, 301), (0, 192))], "do not fit"),
        ([((-1, 10), (0, 192))], "do not fit"),
        ([((10, 10), (0, 192))], "do not fit"),
        ([((0, 10), (1, 193))], "must tile"),
        ([((0, 10), (0, 192)), ((0, 10), (0, 192))], "must tile"),
        ([((0, 10), (0, 192)), ((0, 11), (192, 384))], "same number of rows"),
    ],
)
def test_parts_that_do_not_fit(block: Block, parts: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LinearSlice([SlicePart(block.to_qkv, rows, columns) for rows, columns in parts])


@pytest.mark.parametrize("name", ["to_q", "proj"])
def test_wrong_inputs_name_the_owners(block: Block, name: str) -> None:
    module, owner = block.get_submodule(name), {"to_q": "to_qkv", "proj": "head and tail"}[name]
    for x in (randn(2, K + 1), randn(2, K - 1), torch.zeros(())):
        with pytest.raises(ValueError, match=f"LinearSlice of {owner}: `x` must have {K} channels"):
            module(x)
    for wrong in (torch.zeros(2, K, dtype=torch.int32), None, [0.0]):
        with pytest.raises(TypeError, match=f"LinearSlice of {owner}: `x`"):
            module(wrong)
