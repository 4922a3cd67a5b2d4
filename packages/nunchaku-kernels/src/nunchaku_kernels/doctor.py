"""What this machine can run, and why not more."""

import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch

from nunchaku_kernels import __version__
from nunchaku_kernels.ops import ARITHMETICS, _native, default_arithmetic


@dataclass(frozen=True)
class Device:
    """One device: its name, and for each stored precision the arithmetic that a layer picks there.

    Attributes:
        device: torch device string.
        name: what the vendor calls it.
        arithmetic: precision -> arithmetic picked by default.
        notes: why something faster is not picked.
    """

    device: str
    name: str
    arithmetic: dict[str, str]
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Report:
    """The state of an installation."""

    version: str
    python: str
    torch: str
    extension: bool
    isas: list[str]
    threads: int
    devices: list[Device]
    problems: list[str]

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return asdict(self)


def examine() -> Report:
    """Look at this machine. Never raises: what is wrong is listed in `problems`."""
    problems: list[str] = []
    native = _native.extension()
    isas = [] if native is None else list(native.isas())
    if native is None:
        problems.append(
            "the compiled extension is missing: reinstall nunchaku-kernels with a C++ compiler on the machine"
        )
    else:
        problems += _forced(_native.ISA_VARIABLE, _native.cpu_isa, "this machine", isas)
    devices = [_cpu(isas), *_cuda(problems)]
    if torch.backends.mps.is_available():
        devices.append(_device("mps", "Apple GPU", ["no 4-bit kernels for this device: weights are dequantised"]))
    return Report(
        version=__version__,
        python=platform.python_version(),
        torch=torch.__version__,
        extension=native is not None,
        isas=isas,
        threads=torch.get_num_threads(),
        devices=devices,
        problems=problems,
    )


def _forced(variable: str, read: Callable[[], str], owner: str, isas: list[str]) -> list[str]:
    """What is wrong with a variable that forces kernels: an unknown name, or one that holds `owner` back."""
    try:
        forced = read()
    except ValueError as error:
        return [str(error)]
    return [f"{variable}={forced} holds {owner} back, which runs {isas[-1]}"] if forced not in ("", isas[-1]) else []


def _device(device: str, name: str, notes: list[str]) -> Device:
    picked = {precision: default_arithmetic(precision, torch.device(device)) for precision in ARITHMETICS}
    return Device(device, name, {precision: str(arithmetic) for precision, arithmetic in picked.items()}, notes)


def _cpu(isas: list[str]) -> Device:
    notes = ["nvfp4 weights are dequantised: no CPU multiplies e2m1"]
    if not isas:
        notes.insert(0, "plain-torch kernels only")
    elif isas == ["portable"]:
        notes.insert(0, "no AVX2: the portable kernels are slow")
    return _device("cpu", _cpu_name(), notes)


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
            names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    except OSError:
        names = []
    return next(iter(names), "") or platform.processor() or platform.machine() or "unknown"


def _cuda(problems: list[str]) -> list[Device]:
    if not torch.cuda.is_available():
        return []
    devices = []
    for index in range(torch.cuda.device_count()):
        try:
            name = torch.cuda.get_device_name(index)
            major, minor = torch.cuda.get_device_capability(index)
        except (RuntimeError, AssertionError) as error:
            problems.append(f"cuda:{index}: {error}")
            continue
        missing = _native.missing_cuda_kernels(index)
        if missing:
            notes = [f"no 4-bit kernels: {missing}; weights are dequantised, products run in 16 bits"]
        else:
            kernels = _native.kernels(torch.device("cuda", index)).isas(index)
            read = partial(_native.cuda_isa, index)
            problems += _forced(_native.CUDA_ISA_VARIABLE, read, f"cuda:{index}", kernels)
            notes = [
                f"kernels: {', '.join(kernels)}",
                "nvfp4 weights are dequantised: this release has no kernel for them",
            ]
        devices.append(_device(f"cuda:{index}", f"{name} (sm_{major}{minor})", notes))
    return devices
