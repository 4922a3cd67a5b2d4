"""The doctor describes a machine, healthy or not, and never fails."""

import json

import pytest
import torch

from nunchaku_kernels import __version__, doctor
from nunchaku_kernels.ops import ARITHMETICS, _native


@pytest.fixture(autouse=True)
def no_forced_isa(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(_native.ISA_VARIABLE, raising=False)


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


def test_gpus_without_kernels_fall_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    gpu = doctor.examine().devices[1]
    assert (gpu.device, gpu.name) == ("cuda:0", "GPU")
    assert gpu.arithmetic == {"int4": "w4a16", "nvfp4": "w4a16"}
    assert "sm_75" in gpu.notes[0]
