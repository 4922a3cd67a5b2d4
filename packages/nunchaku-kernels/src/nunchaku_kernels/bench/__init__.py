"""Benchmarks: what they report, and how they time. Ratios are measured in one process, rivals at their best."""

from nunchaku_kernels.bench.report import Row, commit, machine, report, table
from nunchaku_kernels.bench.timing import interleaved_medians

__all__ = ["Row", "commit", "interleaved_medians", "machine", "report", "table"]
