"""`SVDQLinear`: every arithmetic gives its reference's result, nothing derived goes stale, wrong calls are refused."""

import copy
import io
import itertools
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import pad

from nunchaku_kernels import reference
from nunchaku_kernels.formats import SVDQWeights, pack_svdq
from nunchaku_kernels.nn import GELU_SHIFT, SVDQLinear
from nunchaku_kernels.quantize import quantize_svdq

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ROUNDING = {torch.float32: 2**-18, torch.float16: 2**-10, torch.bfloat16: 2**-7}
ARITHMETICS = {"int4": ("w4a8", "w4a4", "w4a16"), "nvfp4": ("nvfp4", "w4a16")}
examples = settings(max_examples=15, deadline=None)
seeds = st.integers(0, 2**31)
RandomWeights = Callable[..., SVDQWeights]


def make_layer(weights: SVDQWeights, in_features: int | None = None, **kwargs: Any) -> SVDQLinear:
    layer = SVDQLinear(
        in_features or weights.in_features,
        weights.out_features,
        rank=-(-weights.rank // 16) * 16,
        precision=weights.precision,
        dtype=weights.smooth.dtype,
        wtscale=weights.wtscale is not None,
        wcscales=weights.wcscales is not None,
        device="meta",
        name="block.linear",
        **kwargs,
    )
    layer.load_packed(pack_svdq(weights))
    return layer


def small(random_weights: RandomWeights, n: int = 200, k: int = 192, **kwargs: Any) -> SVDQLinear:
    return make_layer(random_weights(n, k, **kwargs))


def randn(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def expected_output(layer: SVDQLinear, weights: SVDQWeights, x: torch.Tensor, **tail: Any) -> torch.Tensor:
    """The reference on canonical weights; the shifted padding is zero."""
    padded = pad(x, (0, weights.in_features - x.shape[1]), value=-layer.shift)
    match layer.arithmetic:
        case "w4a8":
            return reference.w4a8.linear(padded, weights, shift=layer.shift, **tail)
        case "w4a4":
            return reference.w4a4.linear(padded, weights, shift=layer.shift, unsigned=layer.shift > 0, **tail)
        case "nvfp4":
            return reference.nvfp4.linear(padded, weights, **tail)
    t = ((padded + layer.shift).float() / weights.smooth.float()).to(x.dtype).float()
    factors = reference.weights._output_factors(weights)
    residual = (reference.weights.dequantize(weights) / factors[:, None]).to(x.dtype).float()
    return reference.epilogue.epilogue(
        t @ residual.t() * factors,
        bias=weights.bias,
        lora_act=reference.epilogue.lowrank_down(padded, weights.proj_down),
        proj_up=weights.proj_up,
        out_dtype=x.dtype,
        **tail,
    )


def assert_close(given: torch.Tensor, expected: torch.Tensor, rounding: torch.dtype | None = None) -> None:
    assert given.dtype == expected.dtype
    assert given.shape == expected.shape
    tolerance = ROUNDING[rounding or expected.dtype]
    atol = tolerance * float(expected.float().abs().amax()) if expected.numel() else 0.0
    torch.testing.assert_close(given, expected, rtol=tolerance, atol=atol)


@given(data=st.data())
@settings(max_examples=35, deadline=None)
def test_forward_is_the_reference(random_weights: RandomWeights, data: st.DataObject) -> None:
    def pick(*values: Any) -> Any:
        return data.draw(st.sampled_from(values))

    precision = pick("int4", "nvfp4")
    dtype, k, n, rank, seed = pick(*DTYPES), 64 * pick(1, 2, 3, 5), pick(4, 100, 128, 300), pick(0, 16, 32, 48), 1
    used = k - pick(0, 0, 1, 17)
    tokens, batches = pick((0, 1), (1, 1), (3, 1), (6, 2), (7, 7))
    weights = random_weights(
        n, k, precision=precision, rank=rank, factors=pick(False, True), used_inputs=used, dtype=pick(*DTYPES[1:]),
        seed=seed,
    )  # fmt: skip
    if precision == "int4" and weights.wtscale is not None:
        one = weights.wtscale  # the reference of int4 knows no tensor factor: it is a common channel factor
        weights = SVDQWeights(**(vars(weights) | {"wtscale": None, "wcscales": weights.wcscales.float() * one.float()}))
    layer = make_layer(weights, used, shift=pick(0.0, GELU_SHIFT) if precision == "int4" else 0.0)
    layer.set_arithmetic(pick(*ARITHMETICS[precision]))
    x = randn(tokens, used, dtype=dtype)
    if layer.shift:
        x = x.abs() - layer.shift  # what a GELU puts out: W4A4 codes are unsigned then
    tail = {
        "activation": pick("none", "gelu", "silu"),
        "gate": pick(None, randn(batches, n, seed=3)),
        "residual": pick(None, randn(tokens, n, dtype=pick(*DTYPES), seed=4)),
    }
    layer.rank_scale = pick(None, torch.linspace(-1, 2, rank))
    expected = expected_output(layer, weights, x, rank_scale=layer.rank_scale, **tail)
    result = layer(x, **tail)
    rounding = dtype
    if layer.arithmetic == "w4a16" and dtype != torch.float32:  # the 16-bit product is rounded before its tail
        rounding = torch.bfloat16
    assert result.is_contiguous()
    assert_close(result, expected, rounding)


@given(
    seed=seeds,
    dtype=st.sampled_from(DTYPES),
    used=st.integers(129, 256),
    tokens=st.integers(0, 5),
    shifted=st.booleans(),
)
@examples
def test_quantize_is_bit_exact(
    random_weights: RandomWeights, seed: int, dtype: torch.dtype, used: int, tokens: int, shifted: bool
) -> None:
    weights = random_weights(128, 256, used_inputs=used, seed=seed, dtype=torch.float16)
    layer = make_layer(weights, used, shift=GELU_SHIFT if shifted else 0.0)
    x = randn(tokens, used, dtype=dtype, seed=seed)
    codes, ascales, lora_act = layer.quantize(x)
    expected = reference.w4a8.quantize_tokens(x, weights.smooth[:used], layer.shift)
    assert torch.equal(codes[:, :used], expected[0])
    assert not codes[:, used:].any()
    assert torch.equal(ascales, expected[1])
    torch.testing.assert_close(lora_act, reference.epilogue.lowrank_down(x, weights.proj_down[:, :used].contiguous()))
    layer.set_arithmetic("w4a4")
    codes, ascales, _ = layer.quantize(x)
    shifted_x = pad(x, (0, 256 - used), value=-layer.shift)
    expected = reference.w4a4.quantize_tokens(shifted_x, weights.smooth, layer.shift, unsigned=shifted)
    assert torch.equal(codes, expected[0])
    assert torch.equal(ascales, expected[1])


@pytest.mark.parametrize("arithmetic", ["w4a8", "w4a4", "w4a16"])
def test_padding_stays_out_of_a_shift_that_16_bits_cannot_hold(random_weights: RandomWeights, arithmetic: str) -> None:
    layer = make_layer(random_weights(128, 128, used_inputs=70), 70, shift=0.1)
    layer.set_arithmetic(arithmetic)
    if arithmetic != "w4a16":
        codes = layer.quantize(torch.full((2, 70), -0.1, dtype=torch.bfloat16)).codes
        assert not codes[:, 70:].any()
    assert layer(randn(2, 70)).isfinite().all()


@given(data=st.data())
@settings(max_examples=20, deadline=None)
def test_ranges_of_rows_are_parts_of_the_whole(random_weights: RandomWeights, data: st.DataObject) -> None:
    precision = data.draw(st.sampled_from(["int4", "nvfp4"]))
    n = data.draw(st.integers(1, 520))
    start = data.draw(st.integers(0, n - 1) | st.sampled_from([i for i in (0, 128, 256) if i < n]))
    stop = data.draw(st.integers(start + 1, n))
    layer = small(random_weights, n, 128, precision=precision, factors=True)
    layer.set_arithmetic(data.draw(st.sampled_from(ARITHMETICS[precision])))
    x = randn(2, 3, 128, dtype=torch.float32)
    gate, residual = randn(2, n), randn(2, 3, n)
    whole = layer(x, gate=gate, residual=residual, activation="silu")[..., start:stop]
    part = layer(x, rows=(start, stop), gate=gate[:, start:stop], residual=residual[..., start:stop], activation="silu")
    if layer.arithmetic == "w4a8":
        assert torch.equal(part, whole)
    else:
        assert_close(part, whole)  # a matrix product of torch may sum in another order for another width


@pytest.mark.parametrize("shape", [(192,), (1, 192), (0, 192), (2, 0, 192), (2, 3, 192), (1, 2, 3, 192)])
def test_leading_dimensions(random_weights: RandomWeights, shape: tuple[int, ...]) -> None:
    layer = small(random_weights)
    x = randn(*shape)
    assert layer(x).shape == (*shape[:-1], 200)
    assert torch.equal(layer(x).reshape(-1, 200), layer(x.reshape(-1, 192)))


@pytest.mark.parametrize("arithmetic", ["w4a8", "w4a4", "w4a16"])
def test_any_memory_layout_of_x(random_weights: RandomWeights, arithmetic: str) -> None:
    layer = small(random_weights, rank=32)
    layer.set_arithmetic(arithmetic)
    base = randn(9, 192 * 4)
    views = {
        "transposed": randn(192, 5).t(),
        "offset": base.flatten()[7 : 7 + 192 * 5].view(5, 192),
        "wide rows": base[:, 3 : 3 + 192],
        "every other": base[::2, ::2][:, :192],
        "one row": base[:1, :192].expand(5, 192),
        "one value": base[:1, :1].expand(5, 192),
        "one column": base[:5, :1].expand(5, 192),
        "overlapping": base.flatten().unfold(0, 192, 1)[:6],
        "3d permuted": randn(192, 2, 3).permute(1, 2, 0),
        "negative bit": torch.view_as_complex(randn(5, 192, 2, dtype=torch.float32)).conj().imag,
    }

    def same(actual: torch.Tensor, expected: torch.Tensor) -> bool:
        if (
            arithmetic == "w4a16"
        ):  # torch's own product, which picks another kernel for other strides where there is AMX
            return torch.allclose(actual.float(), expected.float(), rtol=2**-7, atol=2**-7)
        return torch.equal(actual, expected)

    for name, x in views.items():
        expected = layer(x.clone(memory_format=torch.contiguous_format))
        assert same(layer(x), expected), name
    gate, residual = randn(200, 1).t(), randn(200, 5).t()
    x = views["transposed"]
    expected = layer(x.contiguous(), gate=gate.contiguous(), residual=residual.contiguous())
    assert same(layer(x, gate=gate, residual=residual), expected)
    assert same(layer(x, gate=gate[:, :1].expand(5, 200)), layer(x, gate=gate[:, :1].expand(5, 200).clone()))


@given(dtype=st.sampled_from(DTYPES), value=st.sampled_from([float("inf"), float("-inf"), float("nan")]))
@examples
def test_a_non_finite_token_spoils_only_itself(random_weights: RandomWeights, dtype: torch.dtype, value: float) -> None:
    layer = small(random_weights)
    x = randn(3, 192, dtype=dtype)
    clean = layer(x)
    x[1, 5] = value
    spoiled = layer(x)
    assert not spoiled[1].isfinite().any()
    assert torch.equal(spoiled[::2], clean[::2])


def test_two_halves_are_the_whole(random_weights: RandomWeights) -> None:
    for precision, arithmetics in ARITHMETICS.items():
        layer = small(random_weights, precision=precision)
        x, gate, residual = randn(4, 192), randn(2, 200), randn(4, 200)
        for arithmetic in arithmetics:
            layer.set_arithmetic(arithmetic)
            tail = {"activation": "gelu", "gate": gate, "residual": residual}
            if arithmetic == "w4a16":
                with pytest.raises(ValueError, match=r"block\.linear.*w4a16"):
                    layer.quantize(x)
                continue
            q = layer.quantize(x)
            assert torch.equal(layer.forward_quantized(q, x.dtype, **tail), layer(x, **tail))
            layer.set_arithmetic("w4a16")
            with pytest.raises(ValueError, match=r"block\.linear.*w4a16"):
                layer.forward_quantized(q, x.dtype)


@pytest.mark.parametrize("arithmetic", ["w4a8", "w4a4", "w4a16"])
@given(
    samples=st.integers(1, 3),
    tokens=st.integers(1, 5),
    first=st.integers(0, 2),
    normed=st.booleans(),
    rotated=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
@settings(max_examples=15, deadline=None)
def test_heads_are_those_of_the_whole(
    random_weights: RandomWeights,
    arithmetic: Any,
    samples: int,
    tokens: int,
    first: int,
    normed: bool,
    rotated: bool,
    dtype: torch.dtype,
) -> None:
    layer = small(random_weights, n=768)
    layer.set_arithmetic(arithmetic)
    x = randn(samples, tokens, 192, dtype=dtype)
    norms: dict[str, Any] = {}
    if normed:
        norms = {"norm_q": randn(128, seed=1), "norm_k": randn(128, seed=2), "eps": 1e-5}
    rotary = randn(tokens, 64, 2, seed=3).float() if rotated else None
    out = torch.full((3, samples, 2, first + tokens + 1, 128), 7.0, dtype=dtype)
    with torch.no_grad():
        layer.forward_heads(x, out, first, rotary=rotary, **norms)
        y = layer(x).flatten(0, 1)
    expected = reference.heads.split_heads(y, samples, rotary=rotary, **norms)
    torch.testing.assert_close(out[:, :, :, first : first + tokens], expected, rtol=1e-5, atol=1e-6)
    assert (out[:, :, :, :first] == 7).all()
    assert (out[:, :, :, first + tokens :] == 7).all()
    with pytest.raises(ValueError, match=r"block\.linear.*forward_heads"):
        layer.forward_heads(x[0], out)
    assert not layer.fuses_heads(x)  # on a CPU it spares nothing


def test_from_weights_of_a_quantised_linear_is_close_to_it() -> None:
    weight, bias, x = randn(96, 128).float() * 0.05, randn(96).float(), randn(5, 128)
    exact = x.float() @ weight.t() + bias
    for precision, arithmetics in ARITHMETICS.items():
        layer = SVDQLinear.from_weights(quantize_svdq(weight, bias, precision=precision, rank=16), name="l")
        for arithmetic in arithmetics:
            layer.set_arithmetic(arithmetic)
            assert (layer(x).float() - exact).norm() < 0.25 * exact.norm()


# ---- state


def test_state_dict_round_trip_and_the_placeholder(random_weights: RandomWeights) -> None:
    source, target = small(random_weights, seed=1), small(random_weights, seed=2)
    state = source.state_dict()
    assert state["weight"].shape == (200, 192)
    assert not any(state["weight"].stride())
    assert state["weight"].untyped_storage().nbytes() <= 4
    assert "weight" not in dict(source.named_parameters())
    target.load_state_dict(state, strict=True)
    x = randn(3, 192)
    assert torch.equal(source(x), target(x))
    buffer = io.BytesIO()
    torch.save(state, buffer)
    assert buffer.tell() < 3 * source.qweight.nbytes + 60_000
    buffer.seek(0)
    small(random_weights, seed=3).load_state_dict(torch.load(buffer), strict=True)
    state["weight"] = torch.zeros(200, 192)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*weight"):
        target.load_state_dict(state, strict=True)
    assert target.load_state_dict(state, strict=False).unexpected_keys == ["weight"]
    torch.nn.Sequential(target).load_state_dict(torch.nn.Sequential(source).state_dict(), strict=True)


def every_storage(module: torch.nn.Module) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in itertools.chain(module.parameters(), module.buffers()))


def test_nothing_materialises_the_placeholder(random_weights: RandomWeights) -> None:
    layer = small(random_weights)
    size = every_storage(layer)
    assert every_storage(copy.deepcopy(layer)) == size
    assert every_storage(layer.to(torch.float16)) == size
    assert layer.weight.dtype == torch.float16
    assert len(pickle.dumps(layer)) < size + 30_000
    assert layer.to("meta").weight.device.type == "meta"
    with pytest.raises(ValueError, match=r"block\.linear.*`x` must be on meta"):
        layer(randn(1, 192))
    with pytest.raises(ValueError, match=r"block\.linear.*`x` must be on cpu"):
        small(random_weights)(randn(1, 192).to("meta"))


def pairs(layer: SVDQLinear, other: SVDQLinear) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return list(zip(layer.parameters(), other.parameters(), strict=True))


def double_scales(layer: SVDQLinear, other: SVDQLinear) -> None:
    layer.wscales.mul_(2)
    other.load_packed(dict(layer.named_parameters()))


def through_meta(layer: SVDQLinear, other: SVDQLinear) -> None:
    layer.to("meta").to_empty(device="cpu").load_state_dict(other.state_dict())


CHANGES: dict[str, Callable[[SVDQLinear, SVDQLinear], Any]] = {
    "copy_": lambda layer, other: [p.copy_(q) for p, q in pairs(layer, other)],
    "data swap": lambda layer, other: [setattr(p, "data", q.data) for p, q in pairs(layer, other)],
    "data copy": lambda layer, other: [p.data.copy_(q.data) for p, q in pairs(layer, other)],
    "load": lambda layer, other: layer.load_state_dict(other.state_dict()),
    "assign": lambda layer, other: layer.load_state_dict(other.state_dict(), assign=True),
    "load_packed": lambda layer, other: layer.load_packed(dict(other.named_parameters())),
    "double scales": double_scales,
    "through meta": through_meta,
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_derived_tensors_are_never_stale(random_weights: RandomWeights, change: str, mode: Callable[[], Any]) -> None:
    x = randn(2, 192)
    with mode():
        layer, other = small(random_weights, seed=1), small(random_weights, seed=2)
        layer(x)
        CHANGES[change](layer, other)
        fresh = copy.deepcopy(other)
        fresh._derived.clear()
        assert torch.equal(layer(x), fresh(x))


def test_derived_tensors_are_made_once_and_die_with_their_sources(
    random_weights: RandomWeights, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = small(random_weights)
    folds = []
    fold = layer._fold
    monkeypatch.setattr(layer, "_fold", lambda: folds.append(1) or fold())
    for _ in range(3):
        layer(randn(1, 192))
        layer(randn(2, 192), rows=(0, 100))
    assert len(folds) == 1
    for replace in (
        lambda: layer.to(torch.float16),
        lambda: setattr(layer.qweight, "data", layer.qweight.data.clone()),
        lambda: layer._parameters.update(qweight=torch.nn.Parameter(layer.qweight.data.clone(), requires_grad=False)),
        lambda: layer._parameters.update(wscales=torch.nn.Parameter(layer.wscales.to("meta"), requires_grad=False)),
    ):
        layer(randn(1, 192))
        assert layer._derived._entries
        replace()
        assert not layer._derived._entries


def test_copies_compute_on_their_own(random_weights: RandomWeights) -> None:
    layer, x = small(random_weights), randn(2, 192)
    y = layer(x)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    copies = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(buffer, weights_only=False)]
    layer.wscales.data = layer.wscales.data * 2
    for other in copies:
        assert torch.equal(other(x), y)
        assert other.origin == layer.origin
    assert not torch.equal(layer(x), y)


@pytest.mark.parametrize(
    "convert",
    [
        lambda m: m.to(torch.float16), lambda m: m.half(), lambda m: m.bfloat16(), lambda m: m.float(),
        lambda m: m.to("cpu", torch.float16, non_blocking=True), lambda m: m.to("cpu"), lambda m: m.share_memory(),
        lambda m: torch.nn.Sequential(m).half()[0],
    ],
)  # fmt: skip
def test_fp8_scales_stay_what_they_are(random_weights: RandomWeights, convert: Any) -> None:
    layer = small(random_weights, precision="nvfp4", factors=True)
    before, parameter = layer.wscales.detach().view(torch.uint8).clone(), layer.wscales
    x = randn(2, 192, dtype=torch.float32)
    expected = layer(x)
    convert(layer)
    assert layer.wscales is parameter
    assert layer.wscales.dtype == torch.float8_e4m3fn
    assert torch.equal(layer.wscales.view(torch.uint8), before)
    assert layer.weight.dtype == layer.smooth_factor.dtype
    assert_close(layer(x), expected, torch.bfloat16)


def test_rank_scale_stays_in_32_bits(random_weights: RandomWeights) -> None:
    layer = small(random_weights)
    layer.rank_scale = torch.full((16,), 0.3)
    layer.half()
    assert layer.rank_scale.dtype == torch.float32
    assert (layer.rank_scale == torch.tensor(0.3)).all()
    assert "rank_scale" not in layer.state_dict()
    layer(randn(1, 192))


def test_a_failing_conversion_leaves_the_layer_whole(random_weights: RandomWeights) -> None:
    layer, x = small(random_weights, precision="nvfp4"), randn(2, 192)
    expected = layer(x)

    def fail(tensor: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        layer._apply(fail)
    assert layer.wscales.dtype == torch.float8_e4m3fn
    assert torch.equal(layer(x), expected)


def test_load_packed_is_all_or_nothing(random_weights: RandomWeights) -> None:
    int4, nvfp4 = small(random_weights), small(random_weights, k=256, precision="nvfp4")
    before = dict(int4.named_parameters())
    wrong: dict[str, Any] = {
        "qweight": before["qweight"].view(torch.uint8),
        "wscales": before["wscales"].to(torch.float8_e4m3fn),
        "bias": before["bias"][:-1],
        "proj_up": before["proj_up"].to("meta"),
        "smooth_factor": before["smooth_factor"].double(),
    }
    for key, tensor in wrong.items():
        with pytest.raises(ValueError, match=rf"block\.linear: `{key}` must be"):
            int4.load_packed({**before, key: tensor})
    fp8 = dict(nvfp4.named_parameters())
    with pytest.raises(ValueError, match="`wscales` must be"):
        nvfp4.load_packed({**fp8, "wscales": fp8["wscales"].to(torch.bfloat16)})
    with pytest.raises(ValueError, match=r"missing tensors \['bias'\], unknown tensors \['b'\]"):
        int4.load_packed({("b" if key == "bias" else key): value for key, value in before.items()})
    assert all(int4._parameters[key] is value for key, value in before.items())


def test_threads_share_a_layer(random_weights: RandomWeights) -> None:
    x = [randn(3, 192, seed=i) for i in range(8)]
    layer = small(random_weights)
    expected = [copy.deepcopy(layer)(value) for value in x]
    for _ in range(5):
        layer._derived.clear()
        results: list[torch.Tensor | None] = [None] * len(x)
        start = threading.Barrier(len(x))

        def work(index: int, results: Any = results, start: Any = start) -> None:
            start.wait()
            results[index] = layer(x[index])

        threads = [threading.Thread(target=work, args=(index,)) for index in range(len(x))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(torch.equal(y, e) for y, e in zip(results, expected, strict=True))  # type: ignore[arg-type]


# ---- gradients ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arithmetic", ["w4a8", "w4a4", "nvfp4", "w4a16"])
@pytest.mark.parametrize("activation", ["none", "gelu", "silu"])
def test_gradients_are_those_of_the_dequantised_weight(
    random_weights: RandomWeights, arithmetic: str, activation: str
) -> None:
    precision = "nvfp4" if arithmetic == "nvfp4" else "int4"
    weights = random_weights(150, 128, precision=precision, factors=precision == "nvfp4")
    layer = make_layer(weights, shift=GELU_SHIFT if precision == "int4" else 0.0)
    layer.set_arithmetic(arithmetic)
    layer.rank_scale = torch.linspace(0.5, 2, 16)
    layer.bias.requires_grad_()
    rows = (20, 140)
    x, gate, residual = (
        tensor.requires_grad_()
        for tensor in (randn(2, 2, 128, dtype=torch.float32), randn(2, 120), randn(2, 2, 120, dtype=torch.float32))
    )
    y = layer(x, rows=rows, activation=activation, gate=gate, residual=residual)
    with torch.no_grad():
        assert torch.equal(y, layer(x, rows=rows, activation=activation, gate=gate, residual=residual))
    assert y.requires_grad
    seed = randn(*y.shape, dtype=torch.float32, seed=9)
    given = torch.autograd.grad(y, [x, gate, residual, layer.bias], seed)

    start, stop = rows
    up = weights.proj_up.float() * layer.rank_scale
    effective = reference.weights.dequantize(weights) / weights.smooth.float() + up @ weights.proj_down.float()
    constant = (reference.weights.dequantize(weights) / weights.smooth.float()).sum(dim=1) * layer.shift
    z = (x @ effective.t() + constant + weights.bias.float())[..., start:stop]
    z = {"none": lambda v: v, "gelu": lambda v: torch.nn.functional.gelu(v, approximate="tanh"),
         "silu": torch.nn.functional.silu}[activation](z)  # fmt: skip
    exact = residual + gate[:, None] * z
    expected = torch.autograd.grad(exact, [x, gate, residual], seed)
    for one, other in zip(given[:3], expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3 * float(other.abs().max()))
    assert given[3].shape == layer.bias.shape
    assert given[3].any()


def test_no_gradient_where_none_is_asked_for(random_weights: RandomWeights) -> None:
    layer = small(random_weights)
    x = randn(2, 192)
    assert not layer(x).requires_grad
    with pytest.raises(ValueError, match=r"w4a8_quantize: `x` requires grad"):
        layer.quantize(x.clone().requires_grad_())
    with torch.no_grad():
        assert not layer(x.clone().requires_grad_()).requires_grad
    layer.smooth_factor.requires_grad_()
    with pytest.raises(ValueError, match=r"w4a8_quantize: `smooth` requires grad"):
        layer(x)


# ---- wrong calls ----------------------------------------------------------------------------------------------------

X = torch.zeros(4, 192)
WRONG_CALLS: list[tuple[tuple[Any, ...], dict[str, Any], type[Exception], str]] = [
    ((torch.zeros(4, 191),), {}, ValueError, "`x`.*192"),
    ((torch.zeros(4, 193),), {}, ValueError, "`x`.*192"),
    ((torch.zeros(()),), {}, ValueError, "`x`"),
    ((X.long(),), {}, TypeError, "`x`.*int64"),
    ((X.double(),), {}, TypeError, "`x`.*float64"),
    ((X.to(torch.complex64),), {}, TypeError, "`x`"),
    ((X.to(torch.float8_e4m3fn),), {}, TypeError, "`x`"),
    ((None,), {}, TypeError, "`x`.*NoneType"),
    (([[0.0]],), {}, TypeError, "`x`.*list"),
    ((X.to_sparse(),), {}, TypeError, "`x`.*sparse"),
    ((X,), {"rows": (0, 201)}, ValueError, "`rows`.*200"),
    ((X,), {"rows": (5, 5)}, ValueError, "`rows`"),
    ((X,), {"rows": (-1, 5)}, ValueError, "`rows`"),
    ((X,), {"rows": (0, 1.5)}, TypeError, "`rows`"),
    ((X,), {"rows": (0, 1, 2)}, TypeError, "`rows`"),
    ((X,), {"activation": "relu"}, ValueError, "`activation`.*relu"),
    ((X,), {"activation": None}, ValueError, "`activation`"),
    ((X,), {"gate": torch.zeros(3, 200)}, ValueError, "`gate`.*3.*4"),
    ((X,), {"gate": torch.zeros(0, 200)}, ValueError, "`gate`"),
    ((X,), {"gate": torch.zeros(200)}, ValueError, "`gate`"),
    ((X,), {"gate": torch.zeros(2, 199)}, ValueError, "`gate`"),
    ((X,), {"gate": torch.zeros(2, 200).int()}, TypeError, "`gate`.*int32"),
    ((X,), {"gate": torch.zeros(2, 200, device="meta")}, ValueError, "`gate`.*meta"),
    ((X,), {"gate": 2.0}, TypeError, "`gate`.*float"),
    ((X,), {"residual": torch.zeros(4, 199)}, ValueError, "`residual`"),
    ((X,), {"residual": torch.zeros(2, 2, 200)}, ValueError, "`residual`"),
    ((X,), {"residual": torch.zeros(200, 4)}, ValueError, "`residual`"),
    ((X,), {"residual": torch.zeros(4, 200).bool()}, TypeError, "`residual`.*bool"),
    ((X,), {"residual": "y"}, TypeError, "`residual`.*str"),
    ((X,), {"residual": torch.zeros(4, 72), "rows": (128, 199)}, ValueError, "`residual`"),
]


@pytest.mark.parametrize("arithmetic", ["w4a8", "w4a4", "w4a16"])
def test_wrong_calls_name_the_argument(random_weights: RandomWeights, arithmetic: str) -> None:
    layer = small(random_weights)
    layer.set_arithmetic(arithmetic)
    for arguments, keywords, error, message in WRONG_CALLS:
        with pytest.raises(error, match=rf"(block\.linear|_linear|_quantize).*{message}"):
            layer(*arguments, **keywords)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"in_features": 0}, ValueError, "`in_features`"), ({"in_features": 1.0}, ValueError, "`in_features`"),
        ({"out_features": -1}, ValueError, "`out_features`"), ({"rank": -16}, ValueError, "`rank`.*-16"),
        ({"rank": 8}, ValueError, "`rank`.*8"), ({"rank": 16.0}, ValueError, "`rank`"),
        ({"precision": "int8"}, ValueError, "`precision`.*int8"), ({"dtype": torch.int8}, TypeError, "`dtype`.*int8"),
        ({"dtype": torch.float64}, TypeError, "`dtype`"), ({"shift": float("nan")}, ValueError, "`shift`"),
        ({"shift": 0.1, "precision": "nvfp4"}, ValueError, "`shift`.*nvfp4"),
    ],
)  # fmt: skip
def test_wrong_layers_are_refused(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=rf"mlp\.fc1: {message}"):
        SVDQLinear(**({"in_features": 128, "out_features": 128, "name": "mlp.fc1", "device": "meta"} | arguments))


def test_arithmetics_that_do_not_fit_are_refused(random_weights: RandomWeights) -> None:
    for precision, wrong in (("int4", "nvfp4"), ("nvfp4", "w4a8"), ("int4", "w8a8")):
        layer = small(random_weights, precision=precision)
        before = layer.arithmetic
        with pytest.raises(ValueError, match=rf"block\.linear.*{precision}.*'{wrong}'.*possible: w4a16|possible: "):
            layer.set_arithmetic(wrong)  # type: ignore[arg-type]
        assert layer.arithmetic == before
    layer.set_arithmetic(None)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_scales_name_the_layer(random_weights: RandomWeights, value: float) -> None:
    layer = small(random_weights)
    layer.wscales[0, 3] = value
    with pytest.raises(ValueError, match=r"block\.linear: .*wscales.*finite"):
        layer(randn(1, 192))


def test_looks_like_a_linear_to_peft(random_weights: RandomWeights) -> None:
    layer = small(random_weights)
    assert (layer.in_features, layer.out_features) == (192, 200)
    assert layer.weight.shape == (200, 192)
    assert (layer.weight.dtype, layer.weight.device) == (torch.bfloat16, torch.device("cpu"))
    assert not layer.weight.any()
    assert torch.equal(layer(randn(1, 192), *()), layer(randn(1, 192)))
    assert "192, 200, rank=16" in repr(layer)
