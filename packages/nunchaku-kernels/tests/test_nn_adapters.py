"""Adapters on layers: what they add is `strength * up (down x)`, on every path once, and nothing stored changes."""

import copy
import gc
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from nunchaku_kernels.formats import (
    SVDQWeights,
    W4A16Weights,
    join_lowrank,
    pack_lowrank_down,
    pack_lowrank_up,
    unpack_lowrank_down,
    unpack_lowrank_up,
)
from nunchaku_kernels.nn import (
    GELU_SHIFT,
    AdapterTerm,
    LinearSlice,
    LowRankAdapter,
    ModulationLinear,
    QuantizedLinear,
    SlicePart,
    SVDQLinear,
    W4A16Linear,
    is_fused,
)
from nunchaku_kernels.nn.adapters import AdapterSet
from nunchaku_kernels.quantize import quantize_affine
from nunchaku_kernels.quantize.modulation import quantize_modulation

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
ARITHMETICS = {"int4": ("w4a8", "w4a4", "w4a16"), "nvfp4": ("nvfp4", "w4a16")}
RandomWeights = Callable[..., SVDQWeights]
seeds = st.integers(0, 2**31)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def adapter(out_features: int, in_features: int, rank: int, seed: int = 0, **fields: Any) -> LowRankAdapter:
    down = fields.pop("down", None)
    if down is None:
        down = randn(rank, in_features, seed=seed) / in_features**0.5
    return LowRankAdapter(down, randn(out_features, rank, seed=seed + 1), **fields)


def delta(item: LowRankAdapter) -> torch.Tensor:
    return float(item.strength) * item.up.double() @ item.down.double()


def affine(module: Callable[[torch.Tensor], torch.Tensor], in_features: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The weight and the bias (float64) of a module that computes exactly enough."""
    zero = module(torch.zeros(1, in_features)).double()
    return (module(torch.eye(in_features)).double() - zero).t(), zero


def relative(given: torch.Tensor, wanted: torch.Tensor) -> float:
    given, wanted = given.detach().double(), wanted.detach()
    return float((given - wanted).norm() / wanted.norm())


def svdq(
    weights: SVDQWeights, arithmetic: str | None = "w4a16", dtype: torch.dtype = torch.float32, **kwargs: Any
) -> Any:
    layer = SVDQLinear.from_weights(weights, name="block.linear", **kwargs)
    layer.set_arithmetic(arithmetic)
    return layer.to(dtype)


@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_a_layer_with_adapters_is_its_weight_plus_theirs(random_weights: RandomWeights, data: st.DataObject) -> None:
    def pick(*values: Any) -> Any:
        return data.draw(st.sampled_from(values))

    n, k, dtype = pick(100, 128, 300), pick(64, 192), pick(*DTYPES)
    precision = pick("int4", "nvfp4")
    weights = random_weights(n, k, precision=precision, rank=pick(0, 16, 48), factors=precision == "nvfp4")
    layer = svdq(weights, shift=GELU_SHIFT if precision == "int4" and pick(True, False) else 0.0)
    weight, bias = affine(layer, k)
    count, gains = pick(1, 2, 3), pick(False, True)
    for i in range(count):
        first = pick(0, 7, n // 2)
        rows = (first, pick(n - 1, n))
        height = rows[1] - rows[0]
        item = adapter(height, k, pick(1, 4, 16, 33), seed=10 * i, strength=pick(-1.0, 0.0, 0.3, 2.0))
        if pick(True, False):
            item.bias = randn(height, seed=i)
            bias[:, slice(*rows)] += item.strength * item.bias.double()
        if gains and pick(True, False):
            item.gain = randn(height, seed=i + 5) / 4
        layer.attach(item, rows)
    expected = weight.clone()
    for attachment in layer._adapters._attachments:
        item, rows = attachment.adapter(), attachment.place.rows
        expected[slice(*rows)] += delta(item)
        if item.gain is not None:
            expected[slice(*rows)] += item.strength * item.gain.double().unsqueeze(1) * weight[slice(*rows)]
    layer.to(dtype)
    x = randn(5, k, seed=3, dtype=dtype)
    assert relative(layer(x), x.double() @ expected.t() + bias) < TOLERANCE[dtype]
    first, last = pick((0, n), (1, n), (n // 3, n // 2), (60, 61))
    part = layer(x, rows=(first, last))
    assert relative(part, (x.double() @ expected.t() + bias)[:, first:last]) < 3 * TOLERANCE[dtype]


@pytest.mark.parametrize("precision", ["int4", "nvfp4"])
def test_every_arithmetic_adds_the_same(random_weights: RandomWeights, precision: str) -> None:
    for arithmetic in ARITHMETICS[precision]:
        layer = svdq(random_weights(256, 192, precision=precision), arithmetic, torch.bfloat16)
        x = randn(8, 192, dtype=torch.bfloat16)
        with torch.no_grad():
            before = layer(x).double()
            item = adapter(256, 192, 16, strength=0.7)
            item.up *= 20
            layer.attach(item)
            added = layer(x).double() - before
            assert relative(added, x.double() @ delta(item).t()) < 2e-2
            if arithmetic != "w4a16":
                halves = layer.forward_quantized(layer.quantize(x), torch.bfloat16)
                assert torch.equal(halves, layer(x))


@given(
    down=st.booleans(), channels=st.sampled_from([16, 48, 128]), ranks=st.tuples(*[st.sampled_from([0, 16, 48])] * 2)
)
@settings(max_examples=20, deadline=None)
def test_published_factors_join_by_rank(down: bool, channels: int, ranks: tuple[int, int]) -> None:
    pack, unpack = (pack_lowrank_down, unpack_lowrank_down) if down else (pack_lowrank_up, unpack_lowrank_up)
    first, second = (
        randn(rank, channels, seed=i) if down else randn(channels, rank, seed=i) for i, rank in enumerate(ranks)
    )
    joined = unpack(join_lowrank(pack(first), pack(second)))
    assert torch.equal(joined, torch.cat([first, second], dim=0 if down else 1))


@pytest.mark.parametrize(("shared", "ranks"), [(True, 16), (False, 48)])
def test_fused_linears_with_one_down_factor_pay_its_ranks_once(
    random_weights: RandomWeights, shared: bool, ranks: int
) -> None:
    layer = svdq(random_weights(300, 192, rank=32))
    weight, bias = affine(layer, 192)
    down = randn(12, 192, seed=9)
    items = [adapter(100, 192, 12, seed=i, down=down.clone() if shared else None) for i in range(3)]
    for i, item in enumerate(items):
        layer.attach(item, (100 * i, 100 * i + 100))
        weight[100 * i : 100 * i + 100] += delta(item)
    x = randn(4, 192)
    with torch.no_grad():
        assert relative(layer(x), x.double() @ weight.t() + bias) < 1e-5
        assert layer._low_rank().proj_down.shape[1] == 32 + ranks
        items[1].strength = 0.25  # strengths that differ part the ranks, and nothing is kept from before
        weight[100:200] -= 0.75 * items[1].up.double() @ items[1].down.double()
        assert relative(layer(x), x.double() @ weight.t() + bias) < 1e-5


class Split(nn.Module):
    """q, k, v in one owner and a linear split by input columns, as in a single block of FLUX."""

    def __init__(self, random_weights: RandomWeights) -> None:
        super().__init__()
        self.to_qkv = svdq(random_weights(300, 192))
        self.to_q, self.to_k, self.to_v = (
            LinearSlice([SlicePart(self.to_qkv, (i, i + 100), (0, 192))]) for i in (0, 100, 200)
        )
        self.head = svdq(random_weights(100, 128, seed=1))
        self.tail = svdq(random_weights(100, 192, seed=2), shift=GELU_SHIFT)
        parts = [SlicePart(self.head, (0, 100), (0, 128)), SlicePart(self.tail, (0, 100), (128, 320))]
        self.proj = LinearSlice(parts)


@pytest.mark.parametrize("gain", [False, True])
def test_slices_place_adapters(random_weights: RandomWeights, gain: bool) -> None:
    block = Split(random_weights)
    for name in ("to_k", "proj"):
        part = block.get_submodule(name)
        weight, bias = affine(part, part.in_features)
        item = adapter(100, part.in_features, 5, strength=-0.5, bias=randn(100))
        expected = weight + delta(item)
        if gain:
            item.gain = randn(100, seed=4)
            expected = expected - 0.5 * item.gain.double().unsqueeze(1) * weight
        part.attach(item)
        part.attach(item)
        x = randn(3, part.in_features)
        assert relative(part(x), x.double() @ expected.t() + bias - 0.5 * item.bias.double()) < 1e-5
        part.detach(item)
        assert relative(part(x), x.double() @ weight.t() + bias) < 1e-5
    assert not block.to_qkv._adapters
    assert not block.head._adapters


@given(chunks=st.sampled_from([3, 6]), dtype=st.sampled_from(DTYPES), rank=st.sampled_from([1, 8, 20]), seed=seeds)
@settings(max_examples=12, deadline=None)
def test_modulation_layers(chunks: int, dtype: torch.dtype, rank: int, seed: int) -> None:
    n, k = chunks * 32, 128
    layer = quantized_modulation(n, k, chunks)
    weight, bias = affine(layer, k)
    item = adapter(n, k, rank, seed=seed, strength=0.5, bias=randn(n, seed=seed), gain=randn(n, seed=seed + 9) / 4)
    layer.attach(item)
    expected = weight + delta(item) + 0.5 * item.gain.double().unsqueeze(1) * weight
    bias = bias + 0.5 * item.bias.double()
    layer.to(dtype)
    x = randn(2, k, seed=seed, dtype=dtype)
    wanted = x.double() @ expected.t() + bias
    assert relative(layer(x), wanted) < TOLERANCE[dtype]
    stacked = torch.stack(layer.chunks(x), dim=1).double()
    stacked[:, [1, chunks - 2]] -= 1
    assert relative(stacked.flatten(1), wanted) < 2 * TOLERANCE[dtype]
    assert relative(layer(x, rows=(5, 40)), wanted[:, 5:40]) < 3 * TOLERANCE[dtype]


def quantized_modulation(n: int, k: int, chunks: int) -> ModulationLinear:
    layer = ModulationLinear(k, n, num_chunks=chunks, dtype=torch.bfloat16, name="norm.linear")
    layer.load_packed(quantize_modulation(randn(n, k).bfloat16(), randn(n, seed=1).bfloat16(), chunks))
    return layer.float()


def quantized_with_branch(n: int, k: int) -> W4A16Linear:
    codes = quantize_affine(randn(n, k), 64, bits=8, dtype=torch.bfloat16)
    branch = randn(12, k, seed=2, dtype=torch.bfloat16), randn(n, 12, seed=3, dtype=torch.bfloat16)
    weights = W4A16Weights(codes.codes, codes.scales, codes.zeros, codes.bits, *branch)
    return W4A16Linear.from_weights(weights, randn(n, seed=1, dtype=torch.bfloat16), name="block.wo").float()


def layers(random_weights: RandomWeights) -> Sequence[Any]:
    return svdq(random_weights(256, 128)), quantized_modulation(192, 128, 6), quantized_with_branch(192, 128)


def test_stored_tensors_and_state_dict_never_change(random_weights: RandomWeights) -> None:
    for layer in layers(random_weights):
        before = {key: (value, value.clone()) for key, value in layer.state_dict().items()}
        item = adapter(layer.out_features, 128, 8)
        layer.attach(item)
        changed = layer(randn(2, 128))
        after = layer.state_dict()
        assert after.keys() == before.keys()
        for key, (value, content) in before.items():
            assert torch.equal(after[key], content)
            assert after[key].data_ptr() == value.data_ptr() or key == "weight"
        layer.detach(item)
        assert not torch.equal(layer(randn(2, 128)), changed)


def test_everything_about_an_adapter_may_change_at_any_time(random_weights: RandomWeights) -> None:
    for layer in layers(random_weights):
        x, n = randn(3, 128), layer.out_features
        weight, bias = affine(layer, 128)
        item, other = adapter(n, 128, 8), adapter(n, 128, 5, seed=7)

        def check(*items: LowRankAdapter) -> None:
            expected = weight + sum(delta(each) for each in items)  # noqa: B023
            assert relative(layer(x), x.double() @ expected.t() + bias) < 1e-5  # noqa: B023

        layer.attach(item)
        with torch.no_grad():
            check(item)
            item.strength = 0.5
            check(item)
            item.strength = torch.tensor(-1.0)
            check(item)
            item.strength.fill_(2.0)
            check(item)
            item.up.mul_(2)
            check(item)
            item.down = item.down[:3]
            item.up = item.up[:, :3]
            check(item)
            layer.attach(other)
            check(item, other)
            layer.detach(item)
            check(other)
        with torch.inference_mode():
            check(other)
        layer.half().float()  # the stored tensors were rounded: measure anew
        layer.detach(other)
        weight, bias = affine(layer, 128)
        layer.attach(other)
        check(other)


class Wrapper(nn.Module):
    """The least that a module around a linear has to be."""

    def __init__(self, base_layer: QuantizedLinear | LinearSlice) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.acts_on_owner = True
        self.down, self.up = nn.Linear(128, 4, bias=False), nn.Linear(4, base_layer.out_features, bias=False)
        base_layer.attach(self, keep=False)

    def terms(self) -> tuple[AdapterTerm, ...]:
        return (AdapterTerm(self.down.weight, self.up.weight, 1.5),)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.base_layer(x)
        return y


def test_wrappers_train_leave_and_are_copied(random_weights: RandomWeights) -> None:
    for layer in layers(random_weights):
        unwrapped = copy.deepcopy(layer)
        model = nn.Sequential(Wrapper(layer))
        x = randn(3, 128)
        plain = affine(unwrapped, 128)
        wrapper = model[0]
        weight = plain[0] + 1.5 * (wrapper.up.weight @ wrapper.down.weight).double()
        y = model(x)
        assert relative(y, x.double() @ weight.t() + plain[1]) < 1e-5
        assert torch.equal(layer(x), y)  # whoever calls the layer gets the adapter
        y.square().sum().backward()
        reference = (x @ weight.float().t() + plain[1].float()).detach().requires_grad_()
        reference.square().sum().backward()
        wanted = 1.5 * reference.grad.t() @ (x @ wrapper.down.weight.t())
        assert relative(wrapper.up.weight.grad, wanted.double()) < 1e-5
        assert wrapper.down.weight.grad.abs().sum() > 0
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            with torch.no_grad():
                assert torch.equal(other(x), model(x))
                other[0].up.weight.zero_()
                assert relative(other(x), x.double() @ plain[0].t() + plain[1]) < 1e-5
                assert relative(model(x), x.double() @ weight.t() + plain[1]) < 1e-5
        del wrapper
        model[0] = layer
        gc.collect()
        assert relative(model(x), x.double() @ plain[0].t() + plain[1]) < 1e-5


def test_which_modules_their_owner_stands_for(random_weights: RandomWeights) -> None:
    layer = svdq(random_weights(256, 128))
    part = LinearSlice([SlicePart(layer, (0, 128), (0, 128))])
    wrapper = Wrapper(part)
    assert is_fused(layer)
    assert is_fused(part)
    assert is_fused(wrapper)
    assert not is_fused(nn.Linear(2, 2))
    wrapper.acts_on_owner = False
    assert not is_fused(wrapper)
    wrapper.acts_on_owner = True
    handle = part.register_forward_hook(lambda *_: None)
    assert not is_fused(part)
    assert not is_fused(wrapper)
    handle.remove()
    wrapper.forward = part.forward
    assert not is_fused(wrapper)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_layers_follow_factors_and_strengths(random_weights: RandomWeights, backend: str) -> None:
    for layer in layers(random_weights):
        torch.compiler.reset()
        item = adapter(layer.out_features, 128, 16, strength=torch.tensor(1.0))
        layer.attach(item)
        x = randn(3, 128)
        compiled = torch.compile(layer, fullgraph=True, backend=backend)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), layer(x), rtol=1e-5, atol=1e-5)
            with torch.compiler.set_stance("fail_on_recompile"):
                item.strength.fill_(-0.5)
                item.up.mul_(0.3)
                torch.testing.assert_close(compiled(x), layer(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"down": torch.zeros(4, 127)}, r"block.linear: an adapter's `down` must be \(rank, 128\), got \(4, 127\)"),
        ({"down": torch.zeros(4, 129)}, r"`down` must be \(rank, 128\)"),
        ({"down": torch.zeros(0, 128)}, r"`down` must be"),
        ({"down": torch.zeros(128)}, r"`down` must be"),
        ({"down": torch.zeros(5, 128)}, r"`up` must be \(256, 5\), got \(256, 4\)"),
        ({"up": torch.zeros(128, 4)}, r"`up` must be \(256, 4\)"),
        ({"bias": torch.zeros(1)}, r"`bias` must be \(256,\), got \(1,\)"),
        ({"gain": torch.zeros(2)}, r"`gain` must be \(256,\)"),
    ],
)
def test_terms_that_do_not_fit_name_the_layer(random_weights: RandomWeights, fields: Any, message: str) -> None:
    layer = svdq(random_weights(256, 128))
    item = adapter(256, 128, 4)
    for name, value in fields.items():
        setattr(item, name, value)
    layer.attach(item)
    with pytest.raises(ValueError, match=message):
        layer(randn(2, 128))


def test_places_that_do_not_fit(random_weights: RandomWeights) -> None:
    layer = svdq(random_weights(256, 128))
    with pytest.raises(ValueError, match="`rows` must be a range within"):
        layer.attach(adapter(2, 128, 4), (255, 257))
    with pytest.raises(ValueError, match=r"block.linear: `columns` must be 128 columns"):
        layer.attach(adapter(256, 128, 4), columns=(0, 64))


@pytest.mark.parametrize("precision", ["int4", "nvfp4"])
def test_dequantised_weights_are_what_layers_multiply_with(random_weights: RandomWeights, precision: str) -> None:
    weights = random_weights(300, 192, precision=precision, factors=precision == "nvfp4", rank=16)
    layer = svdq(weights, shift=GELU_SHIFT if precision == "int4" else 0.0)
    part = LinearSlice([SlicePart(layer, (100, 200), (0, 192))])
    for module in (layer, quantized_modulation(192, 128, 6), quantized_modulation(96, 128, 3), part):
        weight, _ = affine(module, module.in_features)
        assert relative(module.dequantize(), weight) < 1e-5
        item = adapter(module.out_features, module.in_features, 4)
        module.attach(item)
        assert relative(module.dequantize(), weight) < 1e-5
        module.detach(item)


def test_a_strength_that_is_no_number_spoils_the_result_and_nothing_else(random_weights: RandomWeights) -> None:
    layer = SVDQLinear.from_weights(random_weights(128, 128, rank=16))
    x = randn(2, 128, dtype=torch.bfloat16)
    item = adapter(128, 128, 4, strength=float("nan"))
    with torch.no_grad():
        before = layer(x)
        layer.attach(item)
        assert layer(x).isnan().all()
        item.strength = 0.0
        assert torch.equal(layer(x), before)


def test_sets_of_adapters_stay_joined_as_far_as_there_is_room(random_weights: RandomWeights) -> None:
    for layer in layers(random_weights):
        n, x = layer.out_features, randn(3, 128)
        sets = [adapter(n, 128, rank, seed=rank) for rank in (16, 4, 32)]

        def use(item: LowRankAdapter) -> int:
            """Where the factors are that the layer reads, with `item` alone on it."""
            layer._adapters = AdapterSet()  # noqa: B023
            layer.attach(item)  # noqa: B023
            layer(x)  # noqa: B023
            value = layer._factors._entries[0].value  # noqa: B023
            return next(part.data_ptr() for part in value if isinstance(part, torch.Tensor))

        with torch.no_grad():
            layer.keep_joined(10**6)
            places = [use(item) for item in sets]
            results = [layer(x) for _ in map(use, sets)]
            assert [use(item) for item in sets] == places
            assert len(layer._factors._entries) == 3
            sets[1].up.mul_(2)  # what was joined before is of no use any more, and goes
            use(sets[1])
            assert len(layer._factors._entries) == 3
            sets[1].up.div_(2)
            layer.keep_joined(0)
            for item, expected in zip(sets, results, strict=True):
                use(item)
                assert torch.equal(layer(x), expected)
                assert len(layer._factors._entries) == 1
            layer.keep_joined(layer._factors._entries[0].nbytes)
            use(sets[0])
            assert len(layer._factors._entries) == 2
            layer.detach_all()
            assert not layer._factors._entries
        with pytest.raises(ValueError, match="`spare_bytes` must be a non-negative integer, got -1"):
            layer.keep_joined(-1)


def test_joined_factors_go_with_their_adapter(random_weights: RandomWeights) -> None:
    for layer in layers(random_weights):
        first, second = (adapter(layer.out_features, 128, 16, seed=seed) for seed in (1, 2))
        layer.keep_joined(10**6)
        with torch.no_grad():
            for item in (first, second):
                layer._adapters = AdapterSet()
                layer.attach(item)
                layer(randn(1, 128))
            assert len(layer._factors._entries) == 2
            del first
            gc.collect()
            assert len(layer._factors._entries) == 1


def test_gains_follow_the_base_weight_behind_a_shift(random_weights: RandomWeights) -> None:
    """A row's gain must not scale W times the shift, for whatever W is now."""
    layer, x = svdq(random_weights(128, 128), shift=GELU_SHIFT), randn(3, 128)
    item = adapter(128, 128, 4, gain=randn(128, seed=3))
    with torch.no_grad():
        layer.attach(item)
        for tensor in (layer.wscales, layer.smooth_factor, layer.qweight, layer.bias):
            layer(x)
            tensor.copy_(tensor.flip(0))
            layer(x)
            bare = copy.deepcopy(layer)
            bare.detach_all()
            weight, bias = affine(bare, 128)
            expected = weight + delta(item) + item.gain.double().unsqueeze(1) * weight
            assert relative(layer(x), x.double() @ expected.t() + bias) < 1e-5
