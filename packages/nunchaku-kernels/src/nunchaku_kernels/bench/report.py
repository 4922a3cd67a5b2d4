"""The one shape of every benchmark's result."""

import os
import platform
import re
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from nunchaku_kernels import __version__


@dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes:
        name: what was measured, e.g. "linear/w4a8/K3072-N9216/m512".
        value: the number.
        unit: its unit, e.g. "ms".
        baseline: what it is compared with, e.g. "torch-bf16" or "limit 900 s"; None for nothing.
        ratio: above 1 is better than the baseline; None without one.
    """

    name: str
    value: float
    unit: str
    baseline: str | None = None
    ratio: float | None = None


def report(rows: Sequence[Row]) -> dict[str, Any]:
    """`{"machine", "commit", "rows"}`, ready for JSON; numbers rounded to four significant digits."""
    plain = []
    for row in rows:
        entry = asdict(row)
        for key in ("value", "ratio"):
            if entry[key] is not None:
                entry[key] = float(f"{entry[key]:.4g}")
        plain.append(entry)
    return {"machine": machine(), "commit": commit(), "rows": plain}


def table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table."""
    lines = ["| what | value | against | ratio |", "|---|---|---|---|"]
    for row in rows:
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
        lines.append(f"| {row.name} | {row.value:.4g} {row.unit} | {row.baseline or ''} | {ratio} |")
    return "\n".join(lines)


def machine() -> str:
    """Processor, GPU, threads, load and versions: enough to read the numbers by."""
    try:
        names = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    except OSError:
        names = []
    parts = [names[0] if names else platform.processor() or platform.machine()]
    if torch.cuda.is_available():
        parts.append(torch.cuda.get_device_name())
    parts.append(f"{torch.get_num_threads()} threads")
    if hasattr(os, "getloadavg"):
        parts.append(f"load {os.getloadavg()[0]:.1f}")
    return ", ".join([*parts, f"torch {torch.__version__}", f"nunchaku-kernels {__version__}"])


def commit() -> str:
    """The commit of the current folder's repository, "-dirty" where files differ; "unknown" outside of one."""
    try:
        run = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    except OSError:
        return "unknown"
    return run.stdout.strip() or "unknown"
