"""What the compiled module refuses, how it behaves under threads, and that its stub tells the truth."""

import ast
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import nunchaku_kernels
from nunchaku_kernels import _C

BUFFER = torch.zeros(1 << 16)
A = BUFFER.data_ptr()

FOLD: dict[str, Any] = {
    "qweight": A, "wscales": A, "wscales_dtype": 0, "Np": 128, "Kp": 64, "row_scales": A, "multipliers": A,
    "threads": 1, "isa": "",
}  # fmt: skip
QUANTIZE: dict[str, Any] = {
    "x": A, "x_dtype": 0, "M": 1, "K": 64, "x_stride": 64, "Kp": 64, "smooth": 0, "smooth_dtype": 0, "shift": 0.0,
    "proj_down": 0, "proj_down_dtype": 0, "R": 0, "codes": A, "ascales": A, "lora_act": 0, "threads": 1, "isa": "",
}  # fmt: skip
ACCUMULATE: dict[str, Any] = {
    "codes": A, "qweight": A, "multipliers": A, "M": 1, "Np": 128, "Kp": 64, "out": A, "threads": 1, "isa": ""
}  # fmt: skip
LINEAR: dict[str, Any] = {
    "codes": A, "ascales": A, "lora_act": 0, "R": 0, "qweight": A, "row_scales": A, "multipliers": A, "proj_up": 0,
    "proj_up_dtype": 0, "rank_scale": 0, "wcscales": 0, "wcscales_dtype": 0, "bias": 0, "bias_dtype": 0, "M": 1,
    "Np": 128, "Kp": 64, "out_features": 128, "activation": 0, "gate": 0, "gate_dtype": 0, "gate_rows": 0,
    "residual": 0, "residual_dtype": 0, "out": A, "out_dtype": 0, "threads": 1, "isa": "",
}  # fmt: skip
W4A16: dict[str, Any] = {
    "x": A, "x_dtype": 0, "M": 1, "K": 64, "x_stride": 64, "qweight": A, "wscales": A, "wzeros": A, "scales_dtype": 0,
    "bias": 0, "bias_dtype": 0, "N": 4, "group_size": 64, "out": A, "out_dtype": 0, "threads": 1, "isa": "",
}  # fmt: skip
L1_CHANGE: dict[str, Any] = {
    "current": A, "current_sample_stride": 8, "current_token_stride": 8, "origin": 0, "origin_sample_stride": 0,
    "origin_token_stride": 0, "previous": A, "previous_sample_stride": 8, "previous_token_stride": 8, "dtype": 0,
    "B": 1, "T": 1, "C": 8, "counted": 0, "block_tokens": 1, "blocks": A, "sums": A, "threads": 1, "isa": "",
}  # fmt: skip
CALLS: dict[Callable[..., None], dict[str, Any]] = {
    _C.w4a8_fold_scales: FOLD,
    _C.w4a8_quantize: QUANTIZE,
    _C.w4a8_accumulate: ACCUMULATE,
    _C.w4a8_linear: LINEAR,
    _C.w4a16_linear: W4A16,
    _C.l1_change: L1_CHANGE,
}
REFUSED: dict[str, list[Any]] = {
    "Np": [0, -128, 64], "Kp": [0, -64, 32, 133056], "M": [-1], "K": [0, -1, 65], "R": [-16], "threads": [0],
    "N": [0, 6, -4], "group_size": [0, 32, -64], "out_features": [0, 129], "activation": [3, -1],
    "isa": ["sse9"], "qweight": [0], "x": [0], "codes": [0], "out": [0], "ascales": [0], "multipliers": [0],
    "row_scales": [0], "wscales": [0], "wzeros": [0],
    "dtype": [3, -1], "B": [-1], "T": [-1], "C": [-1], "current": [0], "previous": [0],
    "block_tokens": [0], "blocks": [0], "sums": [0],
}  # fmt: skip
ALL_CALLS = pytest.mark.parametrize("function", CALLS, ids=lambda function: function.__name__)


@ALL_CALLS
def test_accepts_the_smallest_call(function: Callable[..., None]) -> None:
    function(**CALLS[function])


@ALL_CALLS
def test_refuses_what_it_cannot_serve(function: Callable[..., None]) -> None:
    arguments = CALLS[function]
    wrong = {name: values for name, values in REFUSED.items() if name in arguments}
    wrong |= {name: [3, -1] for name in arguments if name.endswith("_dtype")}
    for name, values in wrong.items():
        for value in values:
            if name == "Kp" and value == 133056 and function in (_C.w4a8_fold_scales, _C.w4a8_quantize):
                continue  # only a sum over Kp can overflow
            with pytest.raises(ValueError, match=name):
                function(**(arguments | {name: value}))


def test_refuses_ranks_that_are_not_whole_tiles() -> None:
    with pytest.raises(ValueError, match="R"):
        _C.w4a8_quantize(**(QUANTIZE | {"R": 8, "proj_down": A, "lora_act": A}))
    with pytest.raises(ValueError, match="R"):
        _C.w4a8_linear(**(LINEAR | {"R": 8, "proj_up": A, "lora_act": A}))


def test_refuses_gates_that_do_not_divide_the_tokens() -> None:
    with pytest.raises(ValueError, match="gate_rows"):
        _C.w4a8_linear(**(LINEAR | {"M": 3, "gate": A, "gate_rows": 2}))


def test_isa_error_lists_what_is_possible() -> None:
    assert _C.isas()[0] == "portable"
    with pytest.raises(ValueError, match=", ".join(_C.isas())):
        _C.w4a8_accumulate(**(ACCUMULATE | {"isa": "mmx"}))


@pytest.mark.parametrize("function", [f for f in CALLS if "M" in CALLS[f]], ids=lambda function: function.__name__)
def test_no_tokens_is_no_work(function: Callable[..., None]) -> None:
    addresses = ("x", "codes", "ascales", "lora_act", "out")
    function(**(CALLS[function] | {"M": 0} | {name: 0 for name in addresses if name in CALLS[function]}))


def random(low: int, high: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.randint(low, high, shape, dtype=dtype, generator=torch.Generator().manual_seed(1))


def test_thread_count_does_not_change_a_bit() -> None:
    """Sizes large enough that every function really splits its work."""
    x = random(-500, 500, (70, 1024), torch.float32) / 100
    scales = random(1, 100, (16, 1024), torch.float32) / 1000
    qweight, down = random(-128, 128, (1024, 512), torch.int8), random(-9, 9, (1024, 16), torch.float32)
    results: list[list[torch.Tensor]] = []
    for threads in (1, 3):
        rows, multipliers = torch.zeros(1024), torch.zeros(1024, 16, dtype=torch.int16)
        fold = (qweight.data_ptr(), scales.data_ptr(), 0, 1024, 1024, rows.data_ptr(), multipliers.data_ptr())
        _C.w4a8_fold_scales(*fold, threads, "")
        codes, ascales, hidden = torch.zeros(70, 1024, dtype=torch.int8), torch.zeros(70), torch.zeros(70, 16)
        _C.w4a8_quantize(
            x.data_ptr(), 0, 70, 1024, 1024, 1024, 0, 0, 0.5, down.data_ptr(), 0, 16, codes.data_ptr(),
            ascales.data_ptr(), hidden.data_ptr(), threads, "",
        )  # fmt: skip
        w4a8, w4a16 = torch.zeros(2, 70, 1024)
        _C.w4a8_linear(
            codes.data_ptr(), ascales.data_ptr(), hidden.data_ptr(), 16, qweight.data_ptr(), rows.data_ptr(),
            multipliers.data_ptr(), down.data_ptr(), 0, 0, 0, 0, 0, 0, 70, 1024, 1024, 1024, 1, 0, 0, 0, x.data_ptr(),
            0, w4a8.data_ptr(), 0, threads, "",
        )  # fmt: skip
        _C.w4a16_linear(
            x.data_ptr(), 0, 70, 1024, 1024, qweight.data_ptr(), scales.data_ptr(), scales.data_ptr(), 0, 0, 0, 1024,
            64, w4a16.data_ptr(), 0, threads, "",
        )  # fmt: skip
        results.append([rows, multipliers, codes, ascales, hidden, w4a8, w4a16])
    for one, three in zip(*results, strict=True):
        assert torch.equal(one, three)
        assert one.isfinite().all()
        assert one.any()


def test_calls_from_several_threads_do_not_disturb_each_other() -> None:
    qweight = random(-128, 128, (1024, 64), torch.int8)
    multipliers = 2 * random(0, 1000, (1024, 2), torch.int16)
    tokens = random(-127, 128, (6, 70, 128), torch.int8)

    def product(index: int, threads: int, out: torch.Tensor) -> None:
        x, w, m = tokens[index].data_ptr(), qweight.data_ptr(), multipliers.data_ptr()
        _C.w4a8_accumulate(x, w, m, 70, 1024, 128, out.data_ptr(), threads, "")

    serial, parallel = torch.zeros(2, 6, 70, 1024, dtype=torch.int32)
    for index in range(6):
        product(index, 1, serial[index])
    workers = [threading.Thread(target=product, args=(index, 3, parallel[index])) for index in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert torch.equal(serial, parallel)


def test_stub_matches_the_module() -> None:
    stub = Path(nunchaku_kernels.__file__).with_name("_C.pyi")
    declared = {
        node.name: [argument.arg for argument in node.args.args]
        for node in ast.parse(stub.read_text()).body
        if isinstance(node, ast.FunctionDef)
    }
    compiled = {name for name in dir(_C) if not name.startswith("_")}
    assert set(declared) == compiled - {"cuda"}  # there only where CUDA kernels were built, with the same functions
    for function, arguments in CALLS.items():
        assert declared[function.__name__] == list(arguments)
