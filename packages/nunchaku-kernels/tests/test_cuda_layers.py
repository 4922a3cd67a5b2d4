"""Layers on CUDA are those of the CPU, on any stream and device; wrong calls are harmless; calibration is as good."""

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nunchaku_kernels import _C
from nunchaku_kernels.bench.quantizer import Recipes, synthetic_layer
from nunchaku_kernels.formats import SVDQWeights, pack_awq, pack_awq_scales
from nunchaku_kernels.nn import SVDQLinear, W4A16Linear
from nunchaku_kernels.nn.base import QuantizedLinear
from nunchaku_kernels.ops import _native
from nunchaku_kernels.quantize import quantize_svdq, quantize_w4a16
from nunchaku_kernels.reference.heads import split_heads

pytestmark = pytest.mark.cuda

OPS = torch.ops.nunchaku_kernels
GPU = torch.device("cuda", 0)
SHIFT = 0.171875
SPIN = 50_000_000
"""Clock cycles that a stream is kept busy for: some 30 ms, longer than anything here takes to launch."""
RandomWeights = Callable[..., SVDQWeights]


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def close(given: torch.Tensor, expected: torch.Tensor, relative: float = 2**-7) -> None:
    """Equal up to one rounding to bf16 at the size of the largest."""
    assert given.dtype == expected.dtype
    atol = relative * float(expected.abs().amax())
    torch.testing.assert_close(given.to(expected.device), expected, rtol=relative, atol=atol)


def awq_layer(n: int = 200, k: int = 256, group_size: int = 64) -> W4A16Linear:
    codes, scales, zeros = quantize_w4a16(randn(n, k).float(), group_size, symmetric=False, dtype=torch.bfloat16)
    layer = W4A16Linear(k, n, group_size=group_size, device="meta", name="norm.linear")
    layer.load_packed(
        {
            "qweight": pack_awq(codes),
            "wscales": pack_awq_scales(scales, group_size),
            "wzeros": pack_awq_scales(zeros, group_size),
            "bias": randn(n, seed=1),
        }
    )
    return layer


@pytest.fixture(params=["svdq", "awq"])
def layer(request: pytest.FixtureRequest, random_weights: RandomWeights) -> QuantizedLinear:
    """A layer of 256 inputs on the CPU."""
    if request.param == "awq":
        return awq_layer()
    return SVDQLinear.from_weights(random_weights(256, 256, rank=32, factors=True), name="block.linear")


# ---- the same as on the CPU ------------------------------------------------------------------------------------------


@given(data=st.data())
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_svdq_layers_are_those_of_the_cpu(random_weights: RandomWeights, data: st.DataObject) -> None:
    n, k = data.draw(st.sampled_from([128, 320, 384])), 128 * data.draw(st.integers(1, 3))
    dtype = data.draw(st.sampled_from([torch.bfloat16, torch.float16]))
    weights = random_weights(
        n, k, rank=data.draw(st.sampled_from([0, 16, 32, 48])), dtype=dtype, factors=data.draw(st.booleans())
    )
    on_cpu = SVDQLinear.from_weights(weights, shift=data.draw(st.sampled_from([0.0, SHIFT])))
    on_gpu = copy.deepcopy(on_cpu).to(GPU)
    assert on_gpu.arithmetic == on_cpu.arithmetic == "w4a8"
    start = data.draw(st.integers(0, n - 1))
    rows = data.draw(st.none() | st.just((start, data.draw(st.integers(start + 1, n)))))
    width = n if rows is None else rows[1] - rows[0]
    m = 2 * data.draw(st.integers(1, 90))
    tail: dict[str, Any] = {"activation": data.draw(st.sampled_from(["none", "gelu", "silu"]))}
    if data.draw(st.booleans()):
        tail["gate"] = randn(2, width, seed=2, dtype=dtype)
    if data.draw(st.booleans()):
        tail["residual"] = randn(m, width, seed=3, dtype=dtype)
    x_dtype = data.draw(st.sampled_from([dtype, dtype, torch.float32]))
    x = randn(m, k, seed=4, dtype=x_dtype)
    with torch.no_grad():
        expected = on_cpu(x, rows=rows, **tail)
        tail_on_gpu = {key: value.to(GPU) if isinstance(value, torch.Tensor) else value for key, value in tail.items()}
        close(on_gpu(x.to(GPU), rows=rows, **tail_on_gpu), expected)
        if rows is None:
            halves = on_gpu.forward_quantized(on_gpu.quantize(x.to(GPU)), x_dtype, **tail_on_gpu)
            assert torch.equal(halves, on_gpu(x.to(GPU), **tail_on_gpu))


@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("tokens", [5, 333])
@pytest.mark.parametrize("rank", [0, 48])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_heads_of_a_layer(
    random_weights: RandomWeights, samples: int, tokens: int, rank: int, dtype: torch.dtype
) -> None:
    layer = SVDQLinear.from_weights(random_weights(768, 256, rank=rank, dtype=dtype)).to(GPU)
    x = randn(samples, tokens, 256, dtype=dtype).to(GPU)
    norms = [randn(128, seed=seed, dtype=dtype).to(GPU) for seed in (1, 2)]
    rotary = randn(tokens, 64, 2, seed=3, dtype=torch.float32).to(GPU)
    out = torch.zeros(3, samples, 2, tokens + 3, 128, dtype=dtype, device=GPU)
    assert not layer.fuses_heads(x)
    with torch.no_grad():
        assert layer.fuses_heads(x)
        layer.forward_heads(x, out, 2, norm_q=norms[0], norm_k=norms[1], rotary=rotary)
        expected = split_heads(layer(x).flatten(0, 1), samples, norm_q=norms[0], norm_k=norms[1], rotary=rotary)
    close(out[:, :, :, 2:-1], expected)
    assert not out[:, :, :, :2].any() and not out[:, :, :, -1].any()


@pytest.mark.parametrize("rows", [None, (0, 128), (5, 77), (100, 200)])
@pytest.mark.parametrize("m", [1, 3, 40])
def test_w4a16_layers_are_those_of_the_cpu(rows: tuple[int, int] | None, m: int) -> None:
    on_cpu = awq_layer()
    x = randn(m, 256, seed=4)
    close(copy.deepcopy(on_cpu).to(GPU)(x.to(GPU), rows=rows), on_cpu(x, rows=rows))


@pytest.mark.parametrize("precision", ["int4", "nvfp4"])
@pytest.mark.parametrize("arithmetic", ["w4a4", "w4a8", "w4a16", "nvfp4"])
def test_every_arithmetic_on_the_gpu(random_weights: RandomWeights, precision: str, arithmetic: Any) -> None:
    on_cpu = SVDQLinear.from_weights(random_weights(256, 256, precision=precision, rank=32))
    try:
        on_cpu.set_arithmetic(arithmetic)
    except ValueError:
        pytest.skip("not an arithmetic of this precision")
    x = randn(33, 256, seed=5)
    with torch.no_grad():
        expected, y = on_cpu(x), copy.deepcopy(on_cpu).to(GPU)(x.to(GPU)).cpu()
    # A 4-bit code that is rounded the other way makes more than a rounding of the output.
    assert (y.float() - expected.float()).norm() < 5e-3 * expected.float().norm()


def test_gradients_are_those_of_the_cpu(layer: QuantizedLinear) -> None:
    gradients = []
    for device in ("cpu", GPU):
        placed = copy.deepcopy(layer).to(device)
        leaves = [randn(24, 256, seed=6).to(device).requires_grad_()]
        if isinstance(placed, SVDQLinear):
            leaves += [placed.proj_up.requires_grad_(), placed.proj_down.requires_grad_()]
        y = placed(leaves[0])
        y.backward(randn(*y.shape, seed=7).to(device))
        gradients.append([y.detach(), *(leaf.grad for leaf in leaves)])
    for expected, actual in zip(*gradients, strict=True):
        assert (actual.cpu().float() - expected.float()).norm() < 1e-2 * expected.float().norm()


def test_quantised_weights_move_with_the_layer() -> None:
    """What is derived from the weights is remade when a layer comes to the GPU, changes there, and goes back."""
    weight = randn(256, 256).float()
    layer = SVDQLinear.from_weights(quantize_svdq(weight, rank=16))
    x = randn(9, 256, seed=1)
    with torch.no_grad():
        before = layer(x)
        layer.to(GPU)
        close(layer(x.to(GPU)), before)
        layer.wscales.mul_(2)
        layer.proj_up.mul_(2)
        close(layer(x.to(GPU)), 2 * before)
        close(layer.cpu()(x), 2 * before)


# ---- streams, graphs, devices ----------------------------------------------------------------------------------------


def test_kernels_run_on_the_current_stream(layer: QuantizedLinear) -> None:
    """The input arrives late on a side stream: a kernel on any other stream would read the zeros before it."""
    layer = layer.to(GPU)
    source = randn(40, 256, seed=8).to(GPU)
    with torch.no_grad():
        expected = layer(source)
        x = torch.zeros_like(source)
        stream = torch.cuda.Stream(GPU)
        stream.wait_stream(torch.cuda.current_stream(GPU))
        with torch.cuda.stream(stream):
            torch.cuda._sleep(SPIN)
            x.copy_(source)
            y = layer(x)
        assert not stream.query()  # nothing waited for the GPU
        stream.synchronize()
    assert torch.equal(y, expected)


def test_cuda_graphs_replay_with_new_inputs(layer: QuantizedLinear) -> None:
    layer = layer.to(GPU)
    for m in (1, 130):
        x = torch.zeros(m, 256, dtype=torch.bfloat16, device=GPU)
        with torch.no_grad():
            layer(x)  # scales are folded here
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                y = layer(x)
            for seed in range(3):
                x.copy_(randn(m, 256, seed=seed))
                graph.replay()
                assert torch.equal(y, layer(x))


def test_threads_with_streams_of_their_own(layer: QuantizedLinear) -> None:
    layer = layer.to(GPU)
    inputs = [randn(50 + i, 256, seed=i).to(GPU) for i in range(4)]
    with torch.no_grad():
        expected = [layer(x) for x in inputs]
    torch.cuda.synchronize(GPU)

    def work(x: torch.Tensor) -> list[torch.Tensor]:
        stream = torch.cuda.Stream(GPU)
        with torch.cuda.stream(stream), torch.no_grad():
            results = [layer(x) for _ in range(20)]
        stream.synchronize()
        return results

    with ThreadPoolExecutor(len(inputs)) as pool:
        for one, results in zip(expected, pool.map(work, inputs), strict=True):
            assert all(torch.equal(one, result) for result in results)


def test_devices_that_are_not_current(layer: QuantizedLinear) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    second = torch.device("cuda", 1)
    x = randn(20, 256, seed=9)
    with torch.no_grad():
        expected = copy.deepcopy(layer).to(GPU)(x.to(GPU))
        y = copy.deepcopy(layer).to(second)(x.to(second))
    assert y.device == second and torch.cuda.current_device() == 0
    assert torch.equal(y.cpu(), expected.cpu())
    with torch.cuda.device(second), torch.no_grad():
        assert torch.equal(copy.deepcopy(layer).to(GPU)(x.to(GPU)), expected)
        assert _native.kernels(torch.device("cuda")) is not None


# ---- wrong calls -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"device": 99}, RuntimeError, "device"),
        ({"device": -1}, RuntimeError, "device"),
        ({"isa": "sm9000"}, ValueError, "isa: expected one of .*sm80.*sm9000"),
        ({"M": -1}, ValueError, r"\bM\b"),
        ({"Np": 100}, ValueError, "Np"),
        ({"Kp": 32}, ValueError, "Kp"),
        ({"Kp": 133_120}, ValueError, "133000"),
        ({"codes": 0}, ValueError, "codes"),
        ({"out": 0}, ValueError, "out"),
    ],
)
def test_wrong_calls_leave_the_device_usable(wrong: dict[str, Any], error: type[Exception], message: str) -> None:
    buffer = torch.zeros(1 << 16, device=GPU)
    address = buffer.data_ptr()
    call = {
        "codes": address, "qweight": address, "multipliers": address, "M": 1, "Np": 128, "Kp": 128,
        "out": address + (1 << 17), "device": 0, "stream": torch.cuda.current_stream(GPU).cuda_stream, "isa": "",
    }  # fmt: skip
    with pytest.raises(error, match=message):
        _C.cuda.w4a8_accumulate(**(call | wrong))
    _C.cuda.w4a8_accumulate(**call)
    assert torch.cuda.current_device() == 0
    assert not buffer.any()


def test_unknown_kernel_sets_and_mixed_devices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    qweight, wscales = torch.zeros(128, 64, dtype=torch.int8, device=GPU), torch.ones(2, 128, device=GPU)
    with monkeypatch.context() as patch:
        patch.setenv(_native.CUDA_ISA_VARIABLE, "bogus")
        with pytest.raises(ValueError, match=r"NUNCHAKU_CUDA_ISA='bogus': cuda:0 runs sm80"):
            OPS.w4a8_fold_scales(qweight, wscales)
    with pytest.raises(ValueError, match=r"`wscales` must be on cuda:0, got cpu"):
        OPS.w4a8_fold_scales(qweight, wscales.cpu())
    with pytest.raises(ValueError, match=r"`proj_down` must be on cuda:0, got cpu"):
        OPS.w4a8_quantize(torch.zeros(1, 128, device=GPU), None, 0.0, torch.zeros(128, 16))
    rows, _ = OPS.w4a8_fold_scales(qweight, wscales)
    assert (rows == 1).all()


# ---- calibration -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("precision", "arithmetic"), [("int4", "w4a4"), ("int4", "w4a8"), ("nvfp4", "nvfp4")])
@pytest.mark.parametrize(
    ("in_features", "out_features", "steps"),
    [(384, 512, ("svdquant-gptq", "refined")), (512, 384, ("refined",))],
)
def test_calibration_finds_weights_as_good_as_on_the_cpu(
    precision: Any, arithmetic: Any, in_features: int, out_features: int, steps: tuple[str, ...]
) -> None:
    """Sums that round differently may send a search elsewhere, but not to a worse place. (GPTQ inside a fit in turns is
    less steady: it varies by several per cent with the last bits of the weights, on any device.)"""
    errors: dict[str, dict[str, float]] = {}
    for device in ("cpu", "cuda"):
        made = synthetic_layer(in_features, out_features, 3000, seed=4, shift=precision == "int4", device=device)
        recipes = Recipes(made, precision, arithmetic)
        for step in steps:
            weights = recipes.weights(step)
            assert weights.codes.device.type == device
            errors.setdefault(step, {})[device] = recipes.error(weights, made.test)
    for step, error in errors.items():
        slack = 1.1 if step == "svdquant-gptq" else 1.02
        assert error["cuda"] < slack * error["cpu"], step
