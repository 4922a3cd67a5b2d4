"""Ids on the hub: only what is needed is asked for, and it is enough. The hub is a folder here."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.utils import filter_repo_objects

from nunchaku_t5 import NunchakuT5EncoderModel
from nunchaku_t5.sources import find

INPUTS = {"input_ids": torch.arange(1, 9)[None], "attention_mask": torch.ones(1, 8)}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """`folder` of the repository "org/repo", and the names of the files that were `fetched` from it."""
    remote, cache = tmp_path / "remote", tmp_path / "cache"
    remote.mkdir()
    fetched: set[str] = set()

    def fetch(names: Any) -> None:
        for name in names:
            fetched.add(name)
            (cache / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(remote / name, cache / name)

    def snapshot_download(
        repo: str, *, allow_patterns: list[str], ignore_patterns: list[str] | None = None, **_: Any
    ) -> str:
        assert repo == "org/repo"
        names = [str(path.relative_to(remote)) for path in remote.rglob("*") if path.is_file()]
        fetch(filter_repo_objects(names, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns))
        cache.mkdir(exist_ok=True)
        return str(cache)

    def hf_hub_download(repo: str, name: str, **_: Any) -> str:
        assert repo == "org/repo"
        fetch([name])
        return str(cache / name)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    return SimpleNamespace(folder=remote, fetched=fetched)


def pipeline_into(folder: Path, encoder: Path) -> None:
    shutil.copytree(encoder, folder / "text_encoder_2")
    (folder / "transformer").mkdir()
    (folder / "transformer" / "model.safetensors").write_bytes(b"large")
    (folder / "picture.png").write_bytes(b"large")
    (folder / "model_index.json").write_text('{"text_encoder_2": ["transformers", "T5EncoderModel"]}')


def test_quantise_from_there_and_load_from_there(
    hub: SimpleNamespace, tiny: SimpleNamespace, tmp_path: Path, cli: Any
) -> None:
    tiny.make_encoder().save_pretrained(tmp_path / "t5")
    pipeline_into(hub.folder, tmp_path / "t5")
    code, _, err = cli("quantize", "org/repo", "-o", tmp_path / "four")
    assert code == 0, err
    needed = {"model_index.json", "text_encoder_2/config.json", "text_encoder_2/model.safetensors"}
    assert hub.fetched == needed

    code, _, err = cli("quantize", tmp_path / "t5", "-o", hub.folder / "four.safetensors")
    assert code == 0, err
    shutil.rmtree(hub.folder / "text_encoder_2")
    shutil.copytree(tmp_path / "four", hub.folder / "text_encoder_2")
    wanted = tiny.encode(NunchakuT5EncoderModel.from_pretrained(tmp_path / "four"), INPUTS)
    for where, options in (
        ("org/repo", {"subfolder": "text_encoder_2"}),
        ("org/repo", {}),
        ("org/repo/four.safetensors", {}),
    ):
        hub.fetched.clear()
        loaded = NunchakuT5EncoderModel.from_pretrained(where, **options)
        assert torch.equal(tiny.encode(loaded, INPUTS), wanted)
        assert not any("transformer/" in name or "png" in name for name in hub.fetched), hub.fetched


def test_an_encoder_alone(hub: SimpleNamespace, tiny: SimpleNamespace, tmp_path: Path, cli: Any) -> None:
    tiny.make_encoder("umt5").save_pretrained(hub.folder)
    (hub.folder / "onnx").mkdir()
    (hub.folder / "onnx" / "model.safetensors").write_bytes(b"large")
    assert find("org/repo").is_dir() and hub.fetched == {"config.json", "model.safetensors"}
    code, _, err = cli("quantize", "org/repo", "-o", tmp_path / "four")
    assert code == 0, err


@pytest.mark.parametrize(
    "wrong",
    [
        "org",
        "org/repo/folder",
        "./org/repo",
        "org/repo.safetensors",
        "/org/repo",
        "/org/repo/x.safetensors",
        "./a/b.sft",
    ],
)
def test_what_is_no_id(wrong: str, hub: SimpleNamespace) -> None:
    with pytest.raises(FileNotFoundError, match="hub id"):
        NunchakuT5EncoderModel.from_pretrained(wrong)
    with pytest.raises(FileNotFoundError, match="hub id"):
        find(wrong)
    assert not hub.fetched
