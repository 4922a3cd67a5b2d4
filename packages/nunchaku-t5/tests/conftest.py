"""Tiny random encoders, golden tensors, the command line."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported: no test may need a network

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from safetensors import safe_open
from transformers import T5Config, T5EncoderModel, UMT5Config, UMT5EncoderModel

from nunchaku_kernels.ops import _native
from nunchaku_t5.cli import main

torch.set_num_threads(1)  # the tensors are tiny, and a second thread waits for its core on a busy machine
settings.register_profile(
    "tiny", deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
settings.load_profile("tiny")

GOLDEN_VARIABLE = "NUNCHAKU_GOLDEN"
REPOSITORY = Path(__file__).resolve().parents[3]
CLASSES = {"t5": (T5Config, T5EncoderModel), "umt5": (UMT5Config, UMT5EncoderModel)}


def make_encoder(kind: str = "t5", *, seed: int = 0, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Any:
    """A random T5 or UMT5 encoder whose linears have multiples of 64 inputs."""
    shape = {
        "d_model": 128,
        "d_kv": 32,
        "d_ff": 192,
        "num_heads": 4,
        "num_layers": 2,
        "vocab_size": 50,
        "feed_forward_proj": "gated-gelu",
        **changes,
    }
    torch.manual_seed(seed)
    config, model = CLASSES[kind]
    encoder = model(config(**shape))
    with torch.no_grad():
        for name, value in encoder.named_parameters():
            if value.dim() == 2 and "relative" not in name and "shared" not in name:
                value.normal_(std=value.shape[1] ** -0.5)  # transformers' own start is too small to show errors
    return encoder.to(dtype).eval()


@st.composite
def encoders(draw: st.DrawFn, **fixed: Any) -> Any:
    """`make_encoder` of many shapes."""
    options: dict[str, Any] = {
        "kind": draw(st.sampled_from(["t5", "umt5"])),
        "d_model": draw(st.sampled_from([64, 128, 192, 256])),
        "d_kv": draw(st.sampled_from([16, 32, 64])),
        "num_heads": draw(st.sampled_from([2, 4])),
        "d_ff": draw(st.sampled_from([64, 128, 192])),
        "num_layers": draw(st.integers(2, 3)),  # from two on T5 and UMT5 differ in tensors
        "vocab_size": draw(st.integers(5, 40)),
        "feed_forward_proj": draw(st.sampled_from(["gated-gelu", "relu"])),
        "seed": draw(st.integers(0, 1000)),
    }
    return make_encoder(**{**options, **fixed})


@st.composite
def texts(draw: st.DrawFn, vocabulary: int) -> dict[str, torch.Tensor]:
    """Ids of a batch of texts of unequal lengths, from one token on, and their attention mask."""
    lengths = draw(st.lists(st.integers(1, 11), min_size=1, max_size=3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    ids = torch.randint(0, vocabulary, (len(lengths), max(lengths)), generator=generator)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return {"input_ids": ids, "attention_mask": mask.long()}


@torch.no_grad()
def encode(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Hidden states of the tokens that are no padding, float32."""
    states = model(**inputs).last_hidden_state
    return states[inputs["attention_mask"].bool()].float()


def relative_error(given: torch.Tensor, wanted: torch.Tensor) -> float:
    """Root mean square of the difference over that of `wanted`."""
    given, wanted = given.detach().float(), wanted.detach().float()
    return float((given - wanted).norm() / wanted.norm())


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("cuda"):
        missing = _native.missing_cuda_kernels(0) if torch.cuda.is_available() else "no CUDA device"
        if missing:
            pytest.skip(missing)


@pytest.fixture(scope="session")
def tiny() -> SimpleNamespace:
    """The functions above, for tests."""
    helpers = (make_encoder, encoders, texts, encode, relative_error)
    return SimpleNamespace(**{helper.__name__: helper for helper in helpers})


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


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[..., tuple[int, str, str]]]:
    """Runs the command line in this process: arguments -> (exit code, stdout, stderr)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    yield run
