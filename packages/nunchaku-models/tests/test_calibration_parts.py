"""Parts of calibration: the recorded calls, the blocks they reach, the folder of unfinished work, the prompts."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline

from nunchaku_models.calibration.blocks import BlockStream
from nunchaku_models.calibration.records import Call, on_device, record_calls
from nunchaku_models.calibration.work import WorkFolder
from nunchaku_models.checkpoints import CheckpointError, DiffusersView, open_checkpoint
from nunchaku_models.demo import PIPELINE
from nunchaku_models.demo.prompts import LONG_LIST, SHORT_LIST
from nunchaku_models.families import FLUX
from nunchaku_models.prompts import CALIBRATION_NAME, calibration_prompts, read_prompts

Record = Callable[..., list[Call]]
PROMPTS = ("a cat", "two dogs", "red", "blue 7")
TOKENS = 4
"""Of a picture of 32 x 32 pixels."""


def same(one: Any, other: Any) -> bool:
    """Whether two arguments of a call are equal bit for bit."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, tuple | list):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    return bool(one == other)


def same_calls(one: list[Call], other: list[Call]) -> bool:
    """Whether all arguments of two lists of calls are equal bit for bit."""
    return len(one) == len(other) and all(
        a.held_out == b.held_out
        and a.arguments.keys() == b.arguments.keys()
        and all(same(value, b.arguments[name]) for name, value in a.arguments.items())
        for a, b in zip(one, other, strict=True)
    )


@pytest.fixture(scope="module")
def pipeline(pipeline_folder: Path) -> Any:
    """The 16-bit pipeline in memory."""
    return FluxPipeline.from_pretrained(pipeline_folder, torch_dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def record(pipeline: Any) -> Record:
    """`record_calls` on small pictures: `record(steps, tokens, batch, seed, **arguments)`."""

    def run(steps: int = 3, tokens: int = 1, batch: int = 1, seed: int = 0, **more: Any) -> list[Call]:
        arguments = {"num_inference_steps": steps, "width": 32, "height": 32, "max_sequence_length": 16, **more}
        return record_calls(pipeline, PROMPTS, arguments, batch=batch, tokens=tokens, seed=seed, progress=False)

    return run


# ------------------------------------------------------------------------------------------------------------- records


@pytest.mark.parametrize(
    ("batch", "tokens", "kept", "held_out"),
    [
        (1, 1, 4, 1),  # at least one call of each run
        (1, 2 * 4 * TOKENS, 8, 2),
        (1, 1000 * TOKENS, 12, 3),  # all there are
        (2, 2 * 4 * TOKENS, 4, 2),  # a call has twice the tokens
        (3, 1, 2, 1),  # the last run is not full
        (4, 1, 1, 0),  # one run cannot be split
    ],
)
def test_as_many_calls_of_every_run(batch: int, tokens: int, kept: int, held_out: int, record: Record) -> None:
    calls = record(batch=batch, tokens=tokens)
    assert len(calls) == kept
    assert [call.held_out for call in calls] == [False] * (kept - held_out) + [True] * held_out
    assert calls[0].arguments["hidden_states"].shape[:2] == (batch, TOKENS)


def test_whole_runs_are_held_out(record: Record) -> None:
    """A prompt is known by its pooled text embedding."""
    calls = record(tokens=2 * 4 * TOKENS)
    fitted, judged = (
        {call.arguments["pooled_projections"].float().sum().item() for call in calls if call.held_out is side}
        for side in (False, True)
    )
    assert len(fitted) == 3 and len(judged) == 1 and not fitted & judged


def test_the_calls_are_the_seed_s(record: Record) -> None:
    first = record()
    assert same_calls(first, record())
    assert not same_calls(record(steps=1), record(steps=1, seed=1))  # only the noise can differ
    steps = {seed: [float(call.arguments["timestep"]) for call in record(seed=seed)] for seed in range(3)}
    assert len({tuple(times) for times in steps.values()}) > 1  # and the sample does


def test_no_hook_stays(pipeline: Any, record: Record) -> None:
    def fail(*_: Any) -> Any:
        raise RuntimeError("stop")

    record()
    assert not pipeline.transformer._forward_pre_hooks
    with pytest.raises(RuntimeError, match="stop"):
        record(callback_on_step_end=fail)
    assert not pipeline.transformer._forward_pre_hooks


def test_a_call_of_nested_tensors_moves_whole() -> None:
    value = {"a": (torch.ones(1), [torch.ones(2), 3]), "b": None}
    moved = on_device(value, "meta")
    assert moved["a"][0].is_meta and moved["a"][1][0].is_meta
    assert isinstance(moved["a"], tuple) and moved["a"][1][1] == 3 and moved["b"] is None


# -------------------------------------------------------------------------------------------------------------- blocks


def test_the_stream_gives_each_block_what_the_whole_model_does(
    pipeline_folder: Path, transformer16: Any, record: Record
) -> None:
    calls = record(tokens=1)
    paths = ["transformer_blocks.0", "single_transformer_blocks.0", "single_transformer_blocks.1"]
    seen: dict[str, list[dict[str, Any]]] = {path: [] for path in paths}

    def keep(path: str, module: Any) -> Callable[..., None]:
        signature = inspect.signature(module.forward)
        return lambda _, args, named: seen[path].append(dict(signature.bind(*args, **named).arguments))

    modules = {path: transformer16.get_submodule(path) for path in paths}
    handles = [m.register_forward_pre_hook(keep(path, m), with_kwargs=True) for path, m in modules.items()]
    try:
        with torch.no_grad():
            for call in calls:
                transformer16(**call.arguments)
    finally:
        for handle in handles:
            handle.remove()
    with open_checkpoint(pipeline_folder) as source:
        view = DiffusersView(source)
        stream = BlockStream(
            view, FLUX, dict(transformer16.config), calls, dtype=torch.bfloat16, device=torch.device("cpu")
        )
        reached = []
        for block in stream:
            reached.append(block.path)
            wanted = [Call(a, call.held_out) for a, call in zip(seen[block.path], calls, strict=True)]
            assert same_calls(block.calls, wanted), block.path
            assert len(list(block.sweep())) == len(calls)
            assert same_calls(block.calls, wanted)  # a sweep changes nothing
            for index, _ in enumerate(block.advance()):
                assert block.current.held_out is calls[index].held_out
            assert not same_calls(block.calls, wanted)
        assert reached == paths
        assert all(value.is_meta for value in stream.model.get_submodule(paths[0]).parameters())  # given back


def test_watching(pipeline_folder: Path, transformer16: Any, record: Record) -> None:
    """A hook gets the input of its linear as rows, and only within the context."""
    rows: list[torch.Tensor] = []
    with open_checkpoint(pipeline_folder) as source:
        stream = BlockStream(
            DiffusersView(source), FLUX, dict(transformer16.config), record(batch=2), dtype=torch.bfloat16,
            device=torch.device("cpu"),
        )  # fmt: skip
        block = next(iter(stream))
        with block.watching([("attn.to_q", rows.append)]):
            list(block.sweep())
        assert [tuple(x.shape) for x in rows] == [(2 * TOKENS, 128)] * 2
        list(block.advance())
        assert len(rows) == 2


# --------------------------------------------------------------------------------------------------------- work folder


def test_calls_come_back_as_they_were_kept(record: Record, tmp_path: Path) -> None:
    calls = [Call({**call.arguments, "scalar": torch.tensor(2.5), "text": "a"}, call.held_out) for call in record()]
    work = WorkFolder(tmp_path / "work", {"seed": 0})
    assert not work.has_calls()
    work.keep_calls(calls)
    assert work.has_calls() and same_calls(work.calls(), calls)
    one = sum(v.nbytes for v in calls[0].arguments.values() if isinstance(v, torch.Tensor))
    shared = calls[0].arguments["img_ids"].nbytes + calls[0].arguments["txt_ids"].nbytes
    size = (work.path / "calls.safetensors").stat().st_size
    assert size < len(calls) * one - (len(calls) - 1) * shared + 8000  # what calls share is stored once
    with pytest.raises(CheckpointError, match="ids=list"):
        work.keep_calls([Call({"ids": [1]}, False)])


def test_equal_bytes_are_not_equal_tensors(tmp_path: Path) -> None:
    zeros = torch.zeros(2, 3)
    calls = [Call({"a": zeros, "b": zeros.int(), "c": zeros.T, "d": torch.tensor(1.0), "e": torch.tensor(1)}, True)]
    work = WorkFolder(tmp_path / "work", {})
    work.keep_calls(calls)
    assert same_calls(work.calls(), calls)


def test_blocks_come_back_as_they_were_kept(tmp_path: Path) -> None:
    work = WorkFolder(tmp_path / "work", {})
    layers = {
        "blocks.1.to_q": {"qweight": torch.arange(6, dtype=torch.int8).view(2, 3), "bias": torch.ones(3).bfloat16()},
        "blocks.1.to_qkv": {"qweight": torch.zeros(4, dtype=torch.int32)},
    }
    work.keep_block("blocks.1", layers)
    assert work.has_block("blocks.1") and not work.has_block("blocks.10") and not work.has_block("blocks")
    for path, tensors in layers.items():
        found = work.layer("blocks.1", path)
        assert found.keys() == tensors.keys()
        assert all(same(found[name], value) for name, value in tensors.items())
    work.remove()
    assert not work.path.exists()


# ------------------------------------------------------------------------------------------------------------- prompts


def test_a_folder_s_own_prompts_come_first(tmp_path: Path) -> None:
    general = calibration_prompts(2, tmp_path)
    (tmp_path / CALIBRATION_NAME).write_text("# ours\nfirst\n\nsecond\n")
    assert calibration_prompts(1, tmp_path) == ["first"]
    assert calibration_prompts(2, tmp_path) == ["first", "second"]
    assert not set(general) & {"first", "second"}
    for count in (0, -1, 3):
        with pytest.raises(ValueError, match=f"from 1 to 2, got {count}"):
            calibration_prompts(count, tmp_path)


def test_general_captions(tmp_path: Path) -> None:
    captions = calibration_prompts(1000, "no-such-org/no-such-model")
    assert len(set(captions)) == 1000
    assert captions == calibration_prompts(1000, tmp_path)
    assert captions[:10] == calibration_prompts(10, tmp_path)
    assert len({caption.split()[1] for caption in captions[:50]}) > 15  # mixed, not in order
    with pytest.raises(ValueError, match="from 1 to 3840"):
        calibration_prompts(3841, tmp_path)


def test_the_demo_is_not_calibrated_on_what_it_is_judged_on() -> None:
    prompts = read_prompts(PIPELINE / CALIBRATION_NAME, maximum=100_000)
    assert len(prompts) == len(set(prompts)) >= 256
    # "<object>, <style>"
    objects = {prompt.rpartition(",")[0].strip().lower() for prompt in prompts}
    assert not objects & {name.lower() for name in SHORT_LIST + LONG_LIST}
