"""What this machine can run, and why not more."""

import platform
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from nunchaku_kernels import __version__
from nunchaku_kernels.ops import ARITHMETICS, default_arithmetic
from nunchaku_kernels.ops._native import ISA_VARIABLE, cpu_isa, extension


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
    native = extension()
    isas = [] if native is None else list(native.isas())
    if native is None:
        problems.append(
            "the compiled extension is missing: reinstall nunchaku-kernels with a C++ compiler on the machine"
        )
    try:
        forced = cpu_isa()
    except ValueError as error:
        problems.append(str(error))
    else:
        if forced:
            problems.append(f"{ISA_VARIABLE}={forced} holds the CPU kernels back")
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


def _device(device: str, name: str, notes: list[str]) -> Device:
    picked = {precision: default_arithmetic(precision, torch.device(device)) for precision in ARITHMETICS}
    return Device(device, name, {precision: str(arithmetic) for precision, arithmetic in picked.items()}, notes)


def _cpu(isas: list[str]) -> Device:
    notes = ["nvfp4 weights are dequantised: no CPU multiplies e2m1"]
    if not isas:
        notes.insert(0, "plain-torch kernels only")
    elif isas == ["portable"]:
        notes.insert(0, "no AVX2: the portable kernels are slow")
    return _device("cpu", platform.processor() or platform.machine(), notes)


def _cuda(problems: list[str]) -> list[Device]:
    if not torch.cuda.is_available():
        return []
    devices = []
    for index in range(torch.cuda.device_count()):
        try:
            name = torch.cuda.get_device_name(index)
            major, minor = torch.cuda.get_device_capability(index)
        except RuntimeError as error:
            problems.append(f"cuda:{index}: {error}")
            continue
        note = (
            f"no 4-bit kernels for sm_{major}{minor} in this release: weights are dequantised, products run in 16 bits"
        )
        devices.append(_device(f"cuda:{index}", name, [note]))
    return devices
