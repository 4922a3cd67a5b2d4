"""The benchmark measures what it says and reports it in the one shape; nothing here asserts a speed."""

import json
import os
from collections.abc import Iterable
from typing import Any

import pytest
import torch

from nunchaku_kernels.bench import Row, interleaved_medians, linear, linear_cuda, report, table
from nunchaku_kernels.bench.linear import bench_linear
from nunchaku_kernels.bench.quantizer import ABLATIONS, BASELINE, STEPS, Recipes, bench_quantizer, synthetic_layer
from nunchaku_kernels.bench.timing_cuda import interleaved_modes
from nunchaku_kernels.ops import _native
from nunchaku_kernels.ops._native import ISA_VARIABLE


@pytest.fixture
def two_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thousands of small layers would fill the caches; here nothing is measured in earnest."""
    monkeypatch.setattr(linear, "ROTATED_BYTES", 1)


def test_rows_are_named_and_complete(two_copies: None) -> None:
    rows = list(bench_linear([1, 3], [(128, 256)], seconds=0.01))
    names = {row.name for row in rows}
    assert names == {
        f"linear/{what}/K128-N256/m{m}" for what in ("torch-bf16", "torch-fp32", "w4a8", "w4a16") for m in (1, 3)
    }
    for row in rows:
        assert row.value > 0 and row.unit == "ms"
        assert (row.ratio is None) == (row.baseline is None) == ("torch-bf16" in row.name)


def test_forcing_an_instruction_set_restores_the_environment(monkeypatch: pytest.MonkeyPatch, two_copies: None) -> None:
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


# ---- linears on CUDA, without a GPU ----------------------------------------------------------------------------------


def made_up_times(names: Iterable[str]) -> dict[str, dict[str, float]]:
    """1, 2, 3 ... ms sustained, and half of that in a burst."""
    return {name: {"sustained": i * 1e-3, "burst": i * 5e-4} for i, name in enumerate(names, 1)}


def test_cuda_rivals_take_turns() -> None:
    seen: list[str] = []
    seconds = {"a": iter([3.0, 1.0, 2.0]), "b": iter([6.0, 4.0, 5.0])}

    def prepare(calls: Any) -> Any:
        def measure() -> dict[str, float]:
            name = calls[0]()
            seen.append(name)
            sustained = next(seconds[name])
            return {"sustained": sustained, "burst": sustained / 2}

        return measure

    times = interleaved_modes({"a": [lambda: "a"], "b": [lambda: "b"]}, prepare, rounds=3)
    assert seen == ["a", "b"] * 3
    assert times == {"a": {"sustained": 2.0, "burst": 1.0}, "b": {"sustained": 5.0, "burst": 2.5}}


@pytest.mark.parametrize("compiles", [True, False])
def test_cuda_rivals_do_the_same_work(monkeypatch: pytest.MonkeyPatch, compiles: bool) -> None:
    def no_triton(x: torch.Tensor) -> None:
        raise RuntimeError("no triton")

    monkeypatch.setattr(torch, "compile", lambda function, **options: function if compiles else no_triton)
    monkeypatch.setattr(linear_cuda, "ROTATED_BYTES", 1)
    cpu = torch.device("cpu")
    rivals, note = linear_cuda.w4a8_rivals(5, 256, 384, cpu, ["sm80"])
    assert note == ("compiled" if compiles else "eager")
    assert {name for name in rivals if "w4a8" in name} == {
        "linear/w4a8", "linear/w4a8-rank0", "product/w4a8", "product/w4a8-sm80"
    }  # fmt: skip
    rivals |= linear_cuda.weight_only_rivals(linear_cuda.WeightOnly(5, 256, 384, 128), cpu)
    for name, calls in rivals.items():
        assert len(calls) == 2
        if "fp8" not in name:
            for call in calls:
                y = call()
                assert isinstance(y, torch.Tensor) and y.shape == (5, 384) and y.dtype == torch.bfloat16
                assert y.isfinite().all() and y.std() > 0
    codes, scales = linear_cuda.quantize_fp8(torch.tensor([[1.0, -448.0], [0.0, 0.0]]))
    assert torch.equal(codes.float() * scales, torch.tensor([[1.0, -448.0], [0.0, 0.0]]))
    rivals = linear_cuda.quantize_rivals(5, 256, cpu)
    for calls in rivals.values():
        assert len({id(call) for call in calls}) == len(calls) == 2
        assert calls[0]() is not None
    for fused, apart in zip(rivals["quantize/w4a8-norm"], rivals["quantize/torch-norm-w4a8"], strict=True):
        (codes, scales, _), (other_codes, other_scales, _) = fused(), apart()
        assert (codes.float() - other_codes.float()).abs().max() <= 3  # torch rounds to bf16 between its operations
        torch.testing.assert_close(scales, other_scales, rtol=0.02, atol=0)
    rivals = linear_cuda.heads_rivals(5, 256, cpu)
    for fused, apart in zip(rivals[linear_cuda.HEADS], rivals[linear_cuda.HEADS_APART], strict=True):
        heads = fused()
        assert heads.shape == (3, 1, 2, 5, 128)
        torch.testing.assert_close(heads, apart())


def test_rows_of_a_cuda_layer_name_their_baselines() -> None:
    names = [
        linear_cuda.BF16, linear_cuda.FP8, linear_cuda.FP8_DYNAMIC, "linear/w4a8", "linear/w4a8-rank0", "product/w4a8",
    ]  # fmt: skip
    rows = list(linear_cuda.linear_rows("K1-N2/m3", made_up_times(names), "eager"))
    sustained = [row for row in rows if row.name.endswith("/sustained")]
    assert len(rows) == 2 * len(sustained) and all(row.name.endswith(("/sustained", "/burst")) for row in rows)
    plain = {(row.name.removesuffix("/K1-N2/m3/sustained"), row.baseline): (row.value, row.ratio) for row in sustained}
    dynamic = "torch-fp8-rowwise-dynamic (eager)"
    assert plain == {
        ("linear/torch-bf16", None): (1, None),
        ("product/torch-fp8-rowwise", "torch-bf16"): (2, pytest.approx(1 / 2)),
        ("linear/torch-fp8-rowwise-dynamic", "torch-bf16"): (3, pytest.approx(1 / 3)),
        ("linear/w4a8", "torch-bf16"): (4, pytest.approx(1 / 4)),
        ("linear/w4a8", dynamic): (4, pytest.approx(3 / 4)),
        ("linear/w4a8-rank0", "torch-bf16"): (5, pytest.approx(1 / 5)),
        ("linear/w4a8-rank0", dynamic): (5, pytest.approx(3 / 5)),
        ("product/w4a8", "torch-bf16"): (6, pytest.approx(1 / 6)),
        ("product/w4a8", "torch-fp8-rowwise"): (6, pytest.approx(2 / 6)),
        ("rank32-share/w4a8", None): (pytest.approx(-25), None),
    }


def test_rows_of_quantisation_are_bandwidths() -> None:
    times = made_up_times(["quantize/w4a8", "copy"])
    rows = {row.name: row for row in linear_cuda.quantize_rows(4608, 3072, times)}
    moved = 4608 * (3072 * 3 + 4 * 33) + 2 * 3072 * 33
    ours, copy = (rows[f"{name}/K3072/m4608/sustained"] for name in ("quantize/w4a8", "copy"))
    assert ours.unit == copy.unit == "GB/s" and (ours.baseline, copy.baseline) == ("copy", None)
    assert (ours.value, copy.value) == (pytest.approx(moved / 1e6), pytest.approx(moved / 2e6))
    assert ours.ratio == pytest.approx(2)
    assert rows["quantize/w4a8/K3072/m4608/burst"].value == pytest.approx(moved / 5e5)


def test_rows_of_heads_compare_two_ways_to_them() -> None:
    times = made_up_times([linear_cuda.HEADS, linear_cuda.HEADS_APART])
    rows = {row.name: (row.value, row.baseline, row.ratio) for row in linear_cuda.heads_rows("K1-N3/m2", times)}
    assert rows["heads/w4a8/K1-N3/m2/sustained"] == (1, "w4a8-then-torch", pytest.approx(2))
    assert rows["heads/w4a8-then-torch/K1-N3/m2/burst"] == (1, None, None)


def test_geometric_means_need_every_shape() -> None:
    rows = [
        Row(f"product/w4a8/K{k}-N{n}/m7/{mode}", 2.0**i, "ms", baseline, 4.0**i)
        for i, (k, n) in enumerate(linear_cuda.SHAPES)
        for mode in ("sustained", "burst")
        for baseline in ("torch-bf16", "torch-fp8-rowwise")
    ]
    rows.append(Row("product/w4a8/K1-N1/m7/burst", 1e9, "ms", "torch-bf16", 1e9))
    assert not list(linear_cuda.geometric_means(rows[4:], 7))
    means = list(linear_cuda.geometric_means(rows, 7))
    assert {(row.name, row.baseline) for row in means} == {
        (f"product/w4a8/flux-geomean/m7/{mode}", baseline)
        for mode in ("sustained", "burst")
        for baseline in ("torch-bf16", "torch-fp8-rowwise")
    }
    for row in means:
        assert (row.value, row.ratio) == (pytest.approx(2**2.5), pytest.approx(4**2.5))


def test_missing_cuda_devices_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="got 'cpu': it is not a CUDA device"):
        list(linear_cuda.bench_linear_cuda(device="cpu"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device: expected one with 4-bit CUDA kernels, got 'cuda:0': torch finds no"):
        list(linear_cuda.bench_linear_cuda(device="cuda:0"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(_native, "missing_cuda_kernels", lambda index: "driver too old")
    with pytest.raises(ValueError, match="driver too old"):
        list(linear_cuda.bench_linear_cuda(device="cuda:0"))


@pytest.mark.cuda
def test_linears_on_cuda_end_to_end() -> None:
    seen: list[str] = []
    weight_only = [linear_cuda.WeightOnly(1, 256, 512, 64)]
    rows = list(
        linear_cuda.bench_linear_cuda([48], [(256, 768)], weight_only=weight_only, seconds=0.002, on_step=seen.append)
    )
    assert seen == ["quantize/K256/m48", "linear/K256-N768/m48", "heads/K256-N768/m48", "linear/w4a16/K256-N512/m1"]
    assert {row.name.split("/")[1] for row in rows} >= {"w4a8", "w4a16", "torch-bf16", "torch-fp8-rowwise"}
    assert all(row.value > 0 for row in rows if not row.name.startswith("rank32-share"))
