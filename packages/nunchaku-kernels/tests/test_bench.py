"""The benchmark measures what it says and reports it in the one shape; nothing here asserts a speed."""

import json
import os
from typing import Any

import pytest
import torch

from nunchaku_kernels.bench import Row, interleaved_medians, report, table
from nunchaku_kernels.bench.linear import bench_linear
from nunchaku_kernels.bench.quantizer import ABLATIONS, BASELINE, STEPS, Recipes, bench_quantizer, synthetic_layer
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


@pytest.mark.parametrize(("precision", "arithmetic"), [("int4", None), ("int4", "w4a8"), ("nvfp4", None)])
def test_quantizer_steps_end_to_end(precision: Any, arithmetic: Any) -> None:
    seen: list[str] = []
    shapes = [(128, 192), (192, 128)]
    rows = list(
        bench_quantizer(shapes, precision=precision, arithmetic=arithmetic, tokens=400, seed=1, on_step=seen.append)
    )
    assert seen == [f"{step}/K{k}-N{n}" for k, n in shapes for step in STEPS]
    values = {row.name: row.value for row in rows}
    assert len(values) == len(rows) == len(shapes) * (2 * len(STEPS) - len(ABLATIONS))
    for shape in ("K128-N192", "K192-N128"):
        errors = {step: values[f"quantizer/{step}/{shape}/error"] for step in STEPS}
        assert 0 < errors["refined"] < errors[BASELINE] < errors["naive"] < 100
        assert errors["svdquant-gptq"] < errors[BASELINE] < errors["svd"] < errors["smooth"]
        # A fixed prior trusts 400 tokens too much.
        assert max(errors[step] for step in ABLATIONS if step != "refined-fixed-prior") < errors["svd"]
        seconds = {step: values[f"quantizer/{step}/{shape}/seconds"] for step in STEPS if step not in ABLATIONS}
        # Searches count in every step that builds on them.
        assert all(seconds[step] > 5 * seconds["naive"] for step in seconds if step != "naive")
    for row in rows:
        if row.name.endswith("/error") and f"/{BASELINE}/" not in row.name:
            baseline = values["/".join(["quantizer", BASELINE, *row.name.split("/")[2:]])]
            assert row.unit == "%" and row.baseline == BASELINE and row.ratio == pytest.approx(baseline / row.value)
        else:
            assert row.baseline is None and row.ratio is None


@pytest.mark.parametrize("precision", ["int4", "nvfp4"])
def test_ablations_are_of_the_real_thing(precision: Any) -> None:
    layer = synthetic_layer(192, 128, 600, seed=2, shift=precision == "int4")
    recipes = Recipes(layer, precision, "w4a4" if precision == "int4" else "nvfp4")
    whole, rebuilt = recipes.weights("refined"), recipes.fitted()
    for name in ("codes", "proj_up", "proj_down", "bias"):
        assert torch.equal(getattr(whole, name), getattr(rebuilt, name))
    assert torch.equal(whole.scales.float(), rebuilt.scales.float())
    for part in ("descent", "regression", "awareness"):
        assert not torch.equal(recipes.fitted(**{part: False}).codes, whole.codes)  # type: ignore[arg-type]


def test_synthetic_layers_are_seeded() -> None:
    first, again, other = (synthetic_layer(128, 64, 40, seed=seed) for seed in (3, 3, 4))
    for name in ("weight", "fit", "held_out", "test"):
        assert torch.equal(getattr(first, name), getattr(again, name))
        assert not torch.equal(getattr(first, name), getattr(other, name))
    assert len(first.fit) == 30 and len(first.held_out) == 10
    assert first.shift > 0 and float(first.test.min()) >= -first.shift and not first.test.isnan().any()
    assert synthetic_layer(64, 128, 40).shift == 0 and synthetic_layer(64, 128, 40).test.min() < -1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shapes": [(100, 128)]}, "shape: expected K a multiple of 64"),
        ({"shapes": [(128, 8)]}, "shape: .* got 128 and 8"),
        ({"precision": "int8"}, "precision: expected"),
        ({"precision": "nvfp4", "arithmetic": "w4a4"}, "nvfp4 weights cannot be multiplied as 'w4a4'"),
        ({"tokens": 7}, "tokens: expected at least 8, got 7"),
    ],
)
def test_bad_quantizer_arguments_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list(bench_quantizer(**{"shapes": [(128, 128)], **options}))
