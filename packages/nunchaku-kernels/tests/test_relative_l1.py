"""The distance of residuals: the compiled kernel against plain torch, and what a cache relies on."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nunchaku_kernels import _C
from nunchaku_kernels.ops import _native
from nunchaku_kernels.reference.relative_l1 import relative_l1 as reference

relative_l1 = torch.ops.nunchaku_kernels.relative_l1
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
isas = pytest.mark.parametrize("isa", _C.isas())


@st.composite
def streams(draw: st.DrawFn) -> dict[str, Any]:
    """Random arguments: one or two streams of different lengths, views among them."""
    dtype, batch = draw(st.sampled_from(DTYPES)), draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    sizes = [(draw(st.integers(1, 9)), draw(st.integers(1, 70))) for _ in range(draw(st.integers(1, 2)))]

    def stream(tokens: int, channels: int) -> torch.Tensor:
        # a part of a longer sequence with wider rows, or channels that do not lie side by side
        if draw(st.booleans()):
            return torch.randn(batch, tokens + 2, channels + 3, generator=generator).to(dtype)[:, 1:-1, :channels]
        return torch.randn(batch, channels, tokens, generator=generator).to(dtype).transpose(1, 2)

    arguments: dict[str, Any] = {name: [stream(*size) for size in sizes] for name in ("current", "previous")}
    arguments["origin"] = draw(st.sampled_from([None, [stream(*size) for size in sizes]]))
    counts = st.lists(st.integers(0, sizes[0][0] + 1), min_size=batch, max_size=batch)
    arguments["tokens"] = draw(st.none() | counts.map(torch.tensor))
    return arguments


def formula(current: Any, previous: Any, origin: Any, tokens: Any) -> list[float]:
    """Element by element, in Python's numbers; the difference is torch's own."""
    results = []
    for sample in range(len(current[0])):
        change = size = 0.0
        for i, new in enumerate(current):
            residual = new[sample] if origin is None else new[sample] - origin[i][sample]
            counted = len(residual) if tokens is None else int(tokens[sample])
            for token, old_token in zip(residual[:counted].tolist(), previous[i][sample].tolist(), strict=False):
                change += sum(abs(a - b) for a, b in zip(token, old_token, strict=True))
                size += sum(map(abs, old_token))
        results.append(change / size if size else float("nan"))
    return results


@isas
@given(arguments=streams())
@settings(max_examples=60, deadline=None)
def test_distance(isa: str, arguments: dict[str, Any]) -> None:
    expected = torch.tensor(formula(**arguments))
    torch.testing.assert_close(reference(**arguments), expected, rtol=1e-5, atol=0, equal_nan=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(_native.ISA_VARIABLE, isa)
        torch.testing.assert_close(relative_l1(**arguments), expected, rtol=1e-5, atol=0, equal_nan=True)


@isas
@given(arguments=streams(), threads=st.integers(1, 3))
@settings(max_examples=20, deadline=None)
def test_a_sample_has_the_same_bits_alone(isa: str, arguments: dict[str, Any], threads: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(_native.ISA_VARIABLE, isa)
        patch.setattr(_native, "threads", lambda products: threads)
        batch = relative_l1(**arguments)
        for i in range(len(batch)):
            one = {
                name: None if value is None else [stream[i : i + 1] for stream in value]
                for name, value in arguments.items()
                if name != "tokens"
            }
            tokens = arguments["tokens"]
            alone = relative_l1(**one, tokens=None if tokens is None else tokens[i : i + 1])
            torch.testing.assert_close(alone, batch[i : i + 1], rtol=0, atol=0, equal_nan=True)


def on_gpu(value: Any) -> Any:
    """The same tensors there, with the strides that they have here."""
    if isinstance(value, list):
        return [on_gpu(item) for item in value]
    if value is None:
        return None
    storage = torch.as_strided(value, (value.untyped_storage().nbytes() // value.element_size(),), (1,), 0)
    return storage.cuda().as_strided(value.shape, value.stride(), value.storage_offset())


@pytest.mark.cuda
@given(arguments=streams(), extra=st.sampled_from([0, 16, 100]))
@settings(max_examples=60, deadline=None)
def test_distance_on_a_gpu(arguments: dict[str, Any], extra: int) -> None:
    for name in ("current", "previous", "origin"):  # more tokens, so that there are several blocks
        if arguments[name] is not None:
            arguments[name] = [torch.cat([x] + [x.flip(1)] * extra, 1) for x in arguments[name]]
    moved = {name: on_gpu(value) for name, value in arguments.items()}
    distance = relative_l1(**moved)
    torch.testing.assert_close(distance.cpu(), reference(**arguments), rtol=1e-5, atol=0, equal_nan=True)
    for i in range(len(distance)):
        one = {
            name: None if value is None else value[i : i + 1] if name == "tokens" else [x[i : i + 1] for x in value]
            for name, value in moved.items()
        }
        torch.testing.assert_close(relative_l1(**one), distance[i : i + 1], rtol=0, atol=0, equal_nan=True)


@pytest.mark.cuda
def test_vectors_on_a_gpu_change_no_bit() -> None:
    current, previous, origin = (torch.randn(2, 4096, 3072, device="cuda").bfloat16() for _ in range(3))
    distance = relative_l1([current], [previous], [origin])
    torch.testing.assert_close(distance, reference([current], [previous], [origin]), rtol=1e-6, atol=0)
    shifted = (
        current.new_empty(current.numel() + 1)[1:].view_as(current).copy_(current)
    )  # not at a multiple of 16 bytes
    assert torch.equal(relative_l1([shifted], [previous], [origin]), distance)


def test_threads_and_instruction_sets_give_the_same_bits() -> None:
    current, previous, origin = (torch.randn(2, 300, 1024).bfloat16() for _ in range(3))
    results = []
    for isa in _C.isas():
        for threads in (1, 2, 3):
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv(_native.ISA_VARIABLE, isa)
                patch.setattr(_native, "threads", lambda products, threads=threads: threads)
                results.append(relative_l1([current], [previous], [origin]))
    assert all(torch.equal(result, results[0]) for result in results)
    torch.testing.assert_close(results[0], reference([current], [previous], [origin]), rtol=1e-6, atol=0)


@pytest.mark.parametrize("native", [True, False])
def test_what_is_not_finite_is_no_small_distance(monkeypatch: pytest.MonkeyPatch, native: bool) -> None:
    if not native:
        monkeypatch.setattr(_native, "extension", lambda: None)
    x = torch.ones(3, 2, 9)
    broken = x.clone()
    broken[0, 1, 8], broken[1, 0, 0] = float("nan"), float("inf")
    distance = relative_l1([broken], [x])
    assert distance[0].isnan() and distance[1] == float("inf") and distance[2] == 0
    assert relative_l1([x], [torch.zeros_like(x)]).isinf().all()
    assert relative_l1([torch.zeros_like(x)], [torch.zeros_like(x)]).isnan().all()


def test_wrong_arguments_are_named() -> None:
    x = torch.ones(2, 3, 4)
    with pytest.raises(ValueError, match=r"`previous` must hold 1 tensors"):
        relative_l1([x], [])
    with pytest.raises(ValueError, match=r"`origin\[0\]`.*\[2, 3, 4\].*\[2, 3, 5\]"):
        relative_l1([x], [x], [torch.ones(2, 3, 5)])
    with pytest.raises(TypeError, match=r"`previous\[0\]`.*float32.*bfloat16"):
        relative_l1([x], [x.bfloat16()])
    with pytest.raises(ValueError, match=r"`tokens`.*\[2\].*\[3\]"):
        relative_l1([x], [x], None, torch.ones(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="`current` must hold"):
        relative_l1([], [])
