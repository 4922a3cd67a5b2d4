"""The doctor describes a machine, healthy or not, and never fails."""

import json
from types import ModuleType
from typing import NoReturn

import pytest
import torch

from nunchaku_kernels import __version__, doctor
from nunchaku_kernels.ops import ARITHMETICS, _native, default_arithmetic


@pytest.fixture(autouse=True)
def no_forced_isa(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(_native.ISA_VARIABLE, raising=False)
    monkeypatch.delenv(_native.CUDA_ISA_VARIABLE, raising=False)


def test_report_is_plain_data() -> None:
    report = doctor.examine()
    data = json.loads(json.dumps(report.to_dict()))
    assert data["version"] == __version__
    assert data["torch"] == torch.__version__
    assert data["threads"] == torch.get_num_threads()
    cpu = data["devices"][0]
    assert cpu["device"] == "cpu"
    assert cpu["name"]
    assert cpu["arithmetic"].keys() == ARITHMETICS.keys()
    for device in data["devices"]:
        assert all(picked in ARITHMETICS[precision] for precision, picked in device["arithmetic"].items())


def test_healthy_machines_have_no_problems() -> None:
    if _native.extension() is None:
        pytest.skip("the extension was not built")
    report = doctor.examine()
    assert report.extension
    assert report.isas[0] == "portable"
    assert report.problems == []


def test_unknown_instruction_set_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    if _native.extension() is None:
        pytest.skip("the extension was not built")
    monkeypatch.setenv(_native.ISA_VARIABLE, "bogus")
    (problem,) = doctor.examine().problems
    assert "NUNCHAKU_CPU_ISA='bogus'" in problem
    assert "portable" in problem


def test_forced_instruction_set_is_mentioned(monkeypatch: pytest.MonkeyPatch) -> None:
    module = _native.extension()
    if module is None:
        pytest.skip("the extension was not built")
    monkeypatch.setenv(_native.ISA_VARIABLE, module.isas()[0])
    problems = doctor.examine().problems
    held_back = len(module.isas()) > 1
    assert [problem for problem in problems if "NUNCHAKU_CPU_ISA=portable" in problem] == problems
    assert len(problems) == held_back
    monkeypatch.setenv(_native.ISA_VARIABLE, module.isas()[-1])
    assert doctor.examine().problems == []


@pytest.mark.parametrize("forced", [None, "bogus"])
def test_missing_extension_is_a_problem(monkeypatch: pytest.MonkeyPatch, forced: str | None) -> None:
    monkeypatch.setattr(_native, "extension", lambda: None)
    if forced:
        monkeypatch.setenv(_native.ISA_VARIABLE, forced)
    report = doctor.examine()
    assert not report.extension
    assert report.isas == []
    assert any("extension" in problem for problem in report.problems)
    assert any("plain-torch" in note for note in report.devices[0].notes)
    json.dumps(report.to_dict())


def test_broken_gpus_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(index: int) -> str:
        raise RuntimeError("driver too old")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", fail)
    problems = doctor.examine().problems
    assert [p for p in problems if "driver too old" in p] == ["cuda:0: driver too old", "cuda:1: driver too old"]


def no_driver(index: int) -> NoReturn:
    raise RuntimeError("device: no CUDA-capable device is detected")


def extension(**functions: object) -> ModuleType:
    """A stand-in for the compiled extension, with `isas` of its CUDA kernels unless none were built."""
    module = ModuleType("nunchaku_kernels._C")
    module.isas = lambda: ["portable"]  # type: ignore[attr-defined]
    if functions:
        module.cuda = ModuleType("nunchaku_kernels._C.cuda")
        vars(module.cuda).update(functions)
    return module


@pytest.fixture
def one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    monkeypatch.setattr(torch.version, "cuda", "13.0")


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (extension(), "this build has no CUDA kernels"),
        (extension(isas=lambda index: []), "need sm_80 or later, this is sm_75"),
        (extension(isas=no_driver), "no CUDA-capable device"),
    ],
)
def test_gpus_without_kernels_fall_back(
    monkeypatch: pytest.MonkeyPatch, one_gpu: None, build: ModuleType, reason: str
) -> None:
    monkeypatch.setattr(_native, "extension", lambda: build)
    report = doctor.examine()
    gpu = report.devices[1]
    assert (gpu.device, gpu.name) == ("cuda:0", "GPU (sm_75)")
    assert gpu.arithmetic == {"int4": "w4a16", "nvfp4": "w4a16"}
    assert reason in gpu.notes[0]
    assert report.problems == []


@pytest.mark.parametrize(
    ("forced", "problem"),
    [
        ("", None),
        ("sm90", None),
        ("sm80", "NUNCHAKU_CUDA_ISA=sm80 holds cuda:0 back, which runs sm90"),
        ("bogus", "NUNCHAKU_CUDA_ISA='bogus': cuda:0 runs sm80, sm90"),
    ],
)
def test_gpus_with_kernels(monkeypatch: pytest.MonkeyPatch, one_gpu: None, forced: str, problem: str | None) -> None:
    build = extension(isas=lambda index: ["sm80", "sm90"])
    monkeypatch.setattr(_native, "extension", lambda: build)
    monkeypatch.setenv(_native.CUDA_ISA_VARIABLE, forced)
    report = doctor.examine()
    assert report.devices[1].arithmetic == {"int4": "w4a8", "nvfp4": "w4a16"}
    assert report.devices[1].notes[0] == "kernels: sm80, sm90"
    assert report.problems == ([problem] if problem else [])


def test_this_build_without_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a driver")
    if not hasattr(_native.extension(), "cuda"):
        pytest.skip("the extension was built without CUDA kernels")
    for index in (0, 99):
        assert _native.missing_cuda_kernels(index)
    for device in ("cuda", "cuda:1"):
        assert default_arithmetic("int4", torch.device(device)) == "w4a16"
    assert "cuda:0" not in {device.device for device in doctor.examine().devices}
