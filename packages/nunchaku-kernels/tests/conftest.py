"""Fixtures of the kernel tests: golden tensors of the published packers and kernels."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors import safe_open

from nunchaku_kernels.formats import SVDQWeights
from nunchaku_kernels.ops import _native

GOLDEN_VARIABLE = "NUNCHAKU_GOLDEN"
REPOSITORY = Path(__file__).resolve().parents[3]


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tests of CUDA kernels are skipped, saying why, where there are none."""
    if item.get_closest_marker("cuda"):
        missing = _native.missing_cuda_kernels(0) if torch.cuda.is_available() else "no CUDA device"
        if missing:
            pytest.skip(missing)


class Golden(NamedTuple):
    """One golden file: its tensors, its `params` and its `errors` metadata."""

    tensors: dict[str, torch.Tensor]
    params: dict[str, Any]
    errors: dict[str, Any]


@pytest.fixture(scope="session")
def golden() -> Callable[[str], Golden]:
    """Loads a golden file by name without suffix; skips where the files are absent."""
    folder = Path(os.environ.get(GOLDEN_VARIABLE, REPOSITORY.parent / "shared" / "golden"))

    def load(name: str) -> Golden:
        path = folder / f"{name}.safetensors"
        if not path.is_file():
            pytest.skip(f"golden file {path.name} not found in {folder}; set {GOLDEN_VARIABLE} to its folder")
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
        return Golden(tensors, json.loads(metadata["params"]), json.loads(metadata.get("errors", "{}")))

    return load


@pytest.fixture(scope="session", autouse=True)
def one_torch_thread() -> None:
    """Small products only: on a busy machine torch's own threads wait longer for each other than they compute."""
    torch.set_num_threads(1)


RandomWeights = Callable[..., SVDQWeights]


@pytest.fixture(scope="session")
def random_weights() -> RandomWeights:
    """Makes a 4-bit linear of random codes: N, K multiples of the group size; `used_inputs` and on are padding."""

    def make(
        n: int,
        k: int,
        *,
        precision: str = "int4",
        rank: int = 16,
        dtype: torch.dtype = torch.bfloat16,
        factors: bool = False,
        used_inputs: int | None = None,
        seed: int = 0,
    ) -> SVDQWeights:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator)

        used = k if used_inputs is None else used_inputs
        if precision == "int4":
            codes = torch.randint(-8, 8, (n, k), generator=generator, dtype=torch.int8)
            scales = normal(n, k // 64).exp().mul(0.01).to(dtype)
        else:
            codes = torch.randint(0, 16, (n, k), generator=generator, dtype=torch.int8)
            scales = normal(n, k // 16).exp().mul(0.1).to(torch.float8_e4m3fn)
        codes[:, used:] = 0
        smooth, down = normal(k).mul(0.5).exp(), normal(rank, k).mul(0.1)
        smooth[used:], down[:, used:] = 1, 0
        return SVDQWeights(
            precision=precision,
            codes=codes,
            scales=scales,
            smooth=smooth.to(dtype),
            smooth_orig=smooth.to(dtype),
            proj_down=down.to(dtype),
            proj_up=normal(n, rank).mul(0.1).to(dtype),
            bias=normal(n).to(dtype),
            wtscale=torch.tensor([0.37]).to(dtype) if factors else None,
            wcscales=normal(n).abs().add(0.1).to(dtype) if factors else None,
        )

    return make
