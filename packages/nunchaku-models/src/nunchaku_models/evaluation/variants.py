"""The rows of the demo's evaluation, as data: which transformers are compared, and which with which."""

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from nunchaku_kernels.formats.svdq import Precision
from nunchaku_kernels.ops import Arithmetic

Method = Literal["svdq", "w8a8", "nf4", "torchao-fp8", "torchao-int8", "modulation"]
Quantiser = Literal["rtn", "data-free", "svdquant", "refined"]


@dataclass(frozen=True)
class Recipe:
    """How one 4-bit file is made: arguments of `quantize_checkpoint`.

    Attributes:
        recipe, precision, rank, gptq: see there.
    """

    recipe: Quantiser
    precision: Precision = "int4"
    rank: int = 32
    gptq: bool = False

    @property
    def calibrated(self) -> bool:
        """Whether making it takes calibration prompts."""
        return self.recipe in ("svdquant", "refined")

    def arguments(self, calibrate: int) -> dict[str, Any]:
        """Keyword arguments of `quantize_checkpoint`, with this number of calibration prompts."""
        arguments: dict[str, Any] = {"precision": self.precision, "rank": self.rank}
        if self.recipe != "data-free":
            arguments["recipe"] = self.recipe
        if self.calibrated:
            arguments["calibrate"] = calibrate
        if self.gptq:
            arguments["gptq"] = True
        return arguments

    def file_name(self, calibrate: int, seed: int, digest: str) -> str:
        """A name that differs wherever the file would.

        Args:
            calibrate: number of calibration prompts.
            seed: of the quantiser.
            digest: of the 16-bit transformer.
        """
        parts = [self.recipe, *(["gptq"] if self.gptq else []), self.precision, f"r{self.rank}"]
        parts += [f"c{calibrate}"] if self.calibrated else []
        return "-".join([*parts, f"s{seed}", digest]) + ".safetensors"


@dataclass(frozen=True)
class Variant:
    """One row.

    Attributes:
        name: what is stored and how it is multiplied, e.g. "svdq-int4-w4a4".
        label: how the stored values were found, e.g. "calibrated".
        method: who makes the transformer: "svdq", our quantiser and layers; "modulation", nothing but our modulation
            layers; else a rival.
        recipe: the 4-bit file; for w8a8 the one whose smoothing vectors are taken; None where there is none.
        arithmetic: how 4-bit layers are multiplied.
        modulation: whether modulation layers are W4A16; else they stay as they were.
    """

    name: str
    label: str
    method: Method = "svdq"
    recipe: Recipe | None = None
    arithmetic: Arithmetic | None = None
    modulation: bool = True

    @property
    def row(self) -> str:
        """The row's name in reports."""
        return f"{self.name}/{self.label}"


NAIVE = Recipe("rtn", rank=0)
_SVDQ: tuple[tuple[str, Precision, Arithmetic], ...] = (
    ("svdq-int4-w4a4", "int4", "w4a4"),
    ("svdq-int4-w4a8", "int4", "w4a8"),
    ("svdq-nvfp4", "nvfp4", "nvfp4"),
)
_LABELS: tuple[tuple[str, Quantiser, bool], ...] = (
    ("data-free", "data-free", False),
    ("calibrated", "svdquant", False),
    ("calibrated-gptq", "svdquant", True),
    ("refined", "refined", False),
)

VARIANTS: tuple[Variant, ...] = (
    Variant("rtn-int4-w4a4", "data-free", recipe=NAIVE, arithmetic="w4a4"),
    Variant("rtn-int4-w4a8", "data-free", recipe=NAIVE, arithmetic="w4a8"),
    *(
        Variant(name, label, recipe=Recipe(recipe, precision, gptq=gptq), arithmetic=arithmetic)
        for name, precision, arithmetic in _SVDQ
        for label, recipe, gptq in _LABELS
    ),
    Variant("w8a8", "data-free", method="w8a8"),
    Variant("w8a8", "calibrated", method="w8a8", recipe=Recipe("svdquant")),
    Variant("w8a8-modulation16", "data-free", method="w8a8", modulation=False),
    Variant("nf4-w4a16", "data-free", method="nf4"),
    Variant("torchao-fp8", "data-free", method="torchao-fp8"),
    Variant("torchao-int8", "data-free", method="torchao-int8"),
    Variant("modulation-w4a16", "data-free", method="modulation"),
)
"""All rows. Every one has the same linears in 4 or 8 bits, and W4A16 modulation layers, but for two that tell these
errors apart: `modulation-w4a16` has nothing else, so the others hardly come nearer; `w8a8-modulation16` is W8A8 as
usually meant."""

GAINS: tuple[tuple[str, str], ...] = (
    ("svdq-int4-w4a4/data-free", "rtn-int4-w4a4/data-free"),
    ("svdq-int4-w4a4/calibrated", "rtn-int4-w4a4/data-free"),
    ("svdq-int4-w4a8/data-free", "rtn-int4-w4a8/data-free"),
    ("svdq-int4-w4a8/calibrated", "rtn-int4-w4a8/data-free"),
    *(
        (f"{name}/{better}", f"{name}/{worse}")
        for name, _, _ in _SVDQ
        for better, worse in (
            ("calibrated", "data-free"),
            ("calibrated-gptq", "calibrated"),
            ("refined", "calibrated"),
            ("refined", "calibrated-gptq"),
        )
    ),
    *((f"svdq-int4-w4a8/{label}", f"svdq-int4-w4a4/{label}") for label, _, _ in _LABELS),
    *((f"svdq-nvfp4/{label}", f"svdq-int4-w4a4/{label}") for label, _, _ in _LABELS),
    ("svdq-int4-w4a8/data-free", "nf4-w4a16/data-free"),
    ("svdq-int4-w4a8/refined", "nf4-w4a16/data-free"),
    ("svdq-int4-w4a8/refined", "w8a8/calibrated"),
    ("w8a8/calibrated", "w8a8/data-free"),
    ("w8a8-modulation16/data-free", "w8a8/data-free"),
    ("modulation-w4a16/data-free", "svdq-int4-w4a8/refined"),
)
"""Pairs of rows, picture by picture: how much better the first is than the second."""


def select(patterns: Sequence[str]) -> list[Variant]:
    """The rows whose names match one of the shell patterns, in the table's order; all for no pattern.

    Raises:
        ValueError: a pattern that matches no row.
    """
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(variant.row, pattern) for variant in VARIANTS):
            rows = ", ".join(variant.row for variant in VARIANTS)
            raise ValueError(f"no row matches {pattern!r}; there are {rows}")
    wanted = patterns or ["*"]
    return [v for v in VARIANTS if any(fnmatch.fnmatchcase(v.row, pattern) for pattern in wanted)]
