"""The benchmark measures what it says and reports it in the one shape; nothing here asserts a speed."""

import json
import os

import pytest

from nunchaku_kernels.bench import Row, interleaved_medians, report, table
from nunchaku_kernels.bench.linear import bench_linear
from nunchaku_kernels.ops._native import ISA_VARIABLE


def test_rows_are_named_and_complete() -> None:
    rows = list(bench_linear([1, 3], [(128, 256)], seconds=0.01))
    names = {row.name for row in rows}
    assert names == {
        f"linear/{what}/K128-N256/m{m}" for what in ("torch-bf16", "torch-fp32", "w4a8", "w4a16") for m in (1, 3)
    }
    for row in rows:
        assert row.value > 0 and row.unit == "ms"
        assert (row.ratio is None) == (row.baseline is None) == ("torch-bf16" in row.name)


def test_forcing_an_instruction_set_restores_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ISA_VARIABLE, "portable")
    rows = list(bench_linear([1], [(128, 128)], isas=["portable"], seconds=0.01))
    assert "linear/w4a8@portable/K128-N128/m1" in {row.name for row in rows}
    assert os.environ[ISA_VARIABLE] == "portable"


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="multiples of 128, got 100 and 128"):
        list(bench_linear([1], [(100, 128)]))
    with pytest.raises(ValueError, match="asked for sse1"):
        list(bench_linear([1], [(128, 128)], isas=["sse1"]))


def test_report_is_json_and_rounds() -> None:
    rows = [Row("a", 1.23456, "ms", "torch-bf16", 2.00006), Row("b", 3.0, "s")]
    plain = json.loads(json.dumps(report(rows)))
    assert set(plain) == {"machine", "commit", "rows"}
    assert plain["rows"] == [
        {"name": "a", "value": 1.235, "unit": "ms", "baseline": "torch-bf16", "ratio": 2.0},
        {"name": "b", "value": 3.0, "unit": "s", "baseline": None, "ratio": None},
    ]
    assert "| b | 3 s |  |  |" in table(rows)


def test_rivals_take_turns_over_their_buffers() -> None:
    seen: list[str] = []
    medians = interleaved_medians(
        {"a": [lambda: seen.append("a0"), lambda: seen.append("a1")], "b": [lambda: seen.append("b0")]}, seconds=0
    )
    assert seen == ["a0", "b0", "a0", "b0", "a1", "b0", "a0", "b0"]
    assert set(medians) == {"a", "b"}
