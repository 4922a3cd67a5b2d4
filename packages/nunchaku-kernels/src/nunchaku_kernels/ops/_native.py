"""The bridge to the compiled extension: tensors become pointers here, and nowhere else.

The extension links no libtorch, so that one binary serves every torch release; an operator checks its tensors once
and hands over addresses, sizes and dtype codes.
"""

import functools
import importlib
import logging
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any, overload

import torch

logger = logging.getLogger(__name__)

ISA_VARIABLE = "NUNCHAKU_CPU_ISA"
"""Environment variable that forces a CPU instruction set ("portable", "avx2", ...), for tests and bug reports."""

CUDA_ISA_VARIABLE = "NUNCHAKU_CUDA_ISA"
"""Environment variable that forces a set of CUDA kernels ("sm80", "sm90"), for tests and bug reports."""

DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
ACTIVATION_CODES = {"none": 0, "gelu": 1, "silu": 2}

_PRODUCTS_PER_THREAD = 1 << 20
"""Starting a thread costs about as much as this many multiply-adds."""


@functools.cache
def extension() -> ModuleType | None:
    """The compiled module, or None (with one log line) where it was not built: the plain-torch path then serves."""
    try:
        return importlib.import_module("nunchaku_kernels._C")
    except ImportError as error:
        logger.warning("nunchaku_kernels runs without its compiled CPU kernels, slowly: %s", error)
        return None


def kernels(device: torch.device) -> Any:
    """The compiled kernels for tensors on `device`, a module; None where plain torch has to do."""
    module = extension()
    if module is None or device.type == "cpu":
        return module
    return _cuda_kernels(module, _index(device)) if device.type == "cuda" else None


@functools.cache
def _cuda_kernels(module: ModuleType, index: int) -> Any:
    missing = missing_cuda_kernels(index)
    if missing:
        logger.warning("cuda:%d runs without 4-bit kernels, slowly: %s", index, missing)
        return None
    return module.cuda


def missing_cuda_kernels(index: int) -> str:
    """Why CUDA device `index` has no kernels, or cannot be asked; empty if it has. Never raises."""
    module = extension()
    if module is None:
        return "the compiled extension is missing"
    if torch.version.cuda is None:
        return "torch was built for another kind of GPU, or for none"
    if not hasattr(module, "cuda"):
        return "this build has no CUDA kernels (no CUDA compiler was found when it was made)"
    try:
        if module.cuda.isas(index):
            return ""
        major, minor = torch.cuda.get_device_capability(index)
    except RuntimeError as error:  # no driver, an old driver, no such device
        return str(error)
    return f"they need sm_80 or later, this is sm_{major}{minor}"


def _index(device: torch.device) -> int:
    if device.index is not None:
        return device.index
    # torch cannot name its current device where there is none: what is wrong with device 0 is then the answer
    return torch.cuda.current_device() if torch.cuda.is_available() else 0


def place(device: torch.device, products: int) -> tuple[Any, ...]:
    """The last arguments of a kernel, which say where it runs: for the CPU threads for so many multiply-adds and an
    instruction set; for CUDA the device, torch's current stream there, and a kernel set."""
    if device.type == "cpu":
        return threads(products), cpu_isa()
    index = _index(device)
    return index, _current_stream(index), cuda_isa(index)


def _stream_handle(index: int) -> int:
    handle: int = torch.cuda.current_stream(index).cuda_stream
    return handle


# Without an object around it, in a tenth of the time; torch's own compiler calls it, too.
_current_stream: Callable[[int], int] = getattr(torch._C, "_cuda_getCurrentRawStream", _stream_handle)


def cpu_isa() -> str:
    """The instruction set asked for through `NUNCHAKU_CPU_ISA`; empty for the best one.

    Raises:
        ValueError: the variable names an instruction set that this machine or build does not have.
    """
    wanted = os.environ.get(ISA_VARIABLE, "")
    module = extension()
    if wanted and module is not None and wanted not in module.isas():
        raise ValueError(f"{ISA_VARIABLE}={wanted!r}: this machine runs {', '.join(module.isas())}")
    return wanted


def cuda_isa(index: int) -> str:
    """The kernel set asked for through `NUNCHAKU_CUDA_ISA`; empty for the best one of CUDA device `index`.

    Raises:
        ValueError: the variable names a kernel set that the device or build does not have.
    """
    wanted = os.environ.get(CUDA_ISA_VARIABLE, "")
    module = extension()
    if wanted and module is not None and wanted not in module.cuda.isas(index):
        raise ValueError(f"{CUDA_ISA_VARIABLE}={wanted!r}: cuda:{index} runs {', '.join(module.cuda.isas(index))}")
    return wanted


def pointer(tensor: torch.Tensor | None) -> int:
    """Address of the first element; 0 for an absent tensor."""
    return 0 if tensor is None else tensor.data_ptr()


def dtype_code(tensor: torch.Tensor | None) -> int:
    """Code of the tensor's dtype in the extension; 0 for an absent tensor."""
    return 0 if tensor is None else DTYPE_CODES[tensor.dtype]


@overload
def dense(tensor: torch.Tensor) -> torch.Tensor: ...
@overload
def dense(tensor: torch.Tensor | None) -> torch.Tensor | None: ...
def dense(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """The tensor with its elements in row-major order, as the extension reads them; on CUDA from a multiple of 16 bytes
    on, which vector loads need."""
    if tensor is None:
        return None
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.is_cuda and tensor.data_ptr() % 16 else tensor


def dense_rows(x: torch.Tensor) -> torch.Tensor:
    """x (M, K) with unit-stride rows that repeat (stride 0) or do not overlap, as the extension reads activations."""
    row_stride, column_stride = x.stride()
    return x if column_stride == 1 and (row_stride >= x.shape[1] or row_stride == 0) else x.contiguous()


def threads(products: int) -> int:
    """How many threads are worth starting for so many multiply-adds, at most torch's own number."""
    return min(torch.get_num_threads(), 1 + products // _PRODUCTS_PER_THREAD)
