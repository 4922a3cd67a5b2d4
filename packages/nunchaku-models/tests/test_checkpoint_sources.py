"""open_checkpoint: files, folders of several layouts, hostile indexes, hub ids."""

import json
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import save_file

from nunchaku_models.checkpoints import CheckpointError, SafetensorsReader, open_checkpoint


def shards(folder: Path, stem: str = "diffusion_pytorch_model") -> dict[str, str]:
    """Two shards with tensors a, b and c; returns the weight map."""
    folder.mkdir(parents=True, exist_ok=True)
    first, second = (f"{stem}-0000{i}-of-00002.safetensors" for i in (1, 2))
    save_file({"a": torch.full((2,), 1.0), "b": torch.full((2,), 2.0)}, folder / first, metadata={"format": "pt"})
    save_file({"c": torch.full((2,), 3.0)}, folder / second, metadata={"format": "pt"})
    return {"a": first, "b": first, "c": second}


def write_index(folder: Path, document: object) -> None:
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(document))


def test_a_file(tmp_path: Path) -> None:
    for name in ("x.safetensors", "x.sft"):
        save_file({"a": torch.ones(2)}, tmp_path / name)
        with open_checkpoint(tmp_path / name) as reader:
            assert isinstance(reader, SafetensorsReader)
            assert reader.tensor("a").sum() == 2


def test_sharded_transformer_and_pipeline_folders(tmp_path: Path) -> None:
    folder = tmp_path / "pipe" / "transformer"
    weight_map = shards(folder)
    write_index(folder, {"metadata": {"total_size": 24}, "weight_map": weight_map})
    (folder / "config.json").write_text('{"num_layers": 1, "quantization_config": {"quant_method": "svdquant"}}')
    (tmp_path / "pipe" / "model_index.json").write_text("{}")
    for path, options in ((folder, {}), (tmp_path / "pipe", {}), (tmp_path / "pipe", {"subfolder": "transformer"})):
        with open_checkpoint(path, **options) as reader:
            assert sorted(reader) == ["a", "b", "c"] and len(reader) == 3 and "c" in reader
            assert [float(reader.tensor(name)[0]) for name in "abc"] == [1, 2, 3]
            assert reader.rows("c", 1, 2).shape == (1,) and reader.info("c").nbytes == 8
            assert json.loads(reader.metadata["config"])["num_layers"] == 1
            assert json.loads(reader.metadata["quantization_config"]) == {"quant_method": "svdquant"}
            reader.release("c")
            with pytest.raises(CheckpointError, match="no tensor 'd'"):
                reader.tensor("d")


def test_one_shard_is_not_a_model(tmp_path: Path) -> None:
    weight_map = shards(tmp_path)
    with pytest.raises(CheckpointError, match="one of 2 shards"):
        open_checkpoint(tmp_path / weight_map["a"])


def test_choice_among_the_files_of_a_folder(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "other.safetensors")
    assert open_checkpoint(tmp_path).tensor("a") == 1  # the only candidate
    save_file({"a": torch.ones(1) * 2}, tmp_path / "diffusion_pytorch_model.safetensors")
    save_file({"a": torch.ones(1) * 3}, tmp_path / "diffusion_pytorch_model.fp16.safetensors")
    assert open_checkpoint(tmp_path).tensor("a") == 2
    assert open_checkpoint(tmp_path, variant="fp16").tensor("a") == 3
    with pytest.raises(CheckpointError, match=r"no diffusion_pytorch_model.bf16.safetensors"):
        open_checkpoint(tmp_path, variant="bf16")
    with pytest.raises(CheckpointError, match="variant"):
        open_checkpoint(tmp_path, variant="../x")
    (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="name the file"):
        open_checkpoint(tmp_path)


def test_folders_without_weights(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no .safetensors file"):
        open_checkpoint(tmp_path)
    (tmp_path / "diffusion_pytorch_model.bin").touch()
    with pytest.raises(CheckpointError, match="which are not supported"):
        open_checkpoint(tmp_path)
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(CheckpointError, match="pipeline without"):
        open_checkpoint(tmp_path)


def test_published_legacy_folder(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(1), "both": torch.zeros(1)}, tmp_path / "unquantized_layers.safetensors")
    with pytest.raises(CheckpointError, match=r"but not transformer_blocks.safetensors"):
        open_checkpoint(tmp_path)
    save_file({"y": torch.ones(1), "both": torch.ones(1)}, tmp_path / "transformer_blocks.safetensors")
    (tmp_path / "config.json").write_text('{"num_layers": 2}')
    (tmp_path / "comfy_config.json").write_text('{"model_class": "Flux"}')
    with open_checkpoint(tmp_path) as reader:
        assert sorted(reader) == ["both", "x", "y"]
        assert reader.tensor("both") == 1
        assert json.loads(reader.metadata["comfy_config"]) == {"model_class": "Flux"}
    (tmp_path / "unquantized_layers.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"but not unquantized_layers.safetensors"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ([], "must be a JSON object"),
        ({}, "no 'weight_map'"),
        ({"weight_map": {}}, "no 'weight_map'"),
        ({"weight_map": {"a": 3}}, "instead of a file name"),
        ({"weight_map": {"a": "../x.safetensors"}}, "no plain name"),
        ({"weight_map": {"a": "/etc/x.safetensors"}}, "no plain name"),
        ({"weight_map": {"a": "sub/x.safetensors"}}, "no plain name"),
        ({"weight_map": {"a": "sub\\x.safetensors"}}, "no plain name"),
        ({"weight_map": {"a": "C:x.safetensors"}}, "no plain name"),
        ({"weight_map": {"a": ".safetensors"}}, "no plain name"),
        ({"weight_map": {"a": "x.bin"}}, "no plain name"),
        ({"weight_map": {"a": "x.safetensors\n"}}, "no plain name"),
        ({"weight_map": {"a": "absent.safetensors"}}, "are missing"),
        ({"weight_map": {"d": "diffusion_pytorch_model-00001-of-00002.safetensors"}}, "and it does not"),
        ({"weight_map": {f"{i}": f"{i}.safetensors" for i in range(5000)}}, "more than 4096"),
        ({"metadata": {"total_size": True}, "weight_map": {"a": "x.safetensors"}}, "nonsense"),
        ({"metadata": {"total_size": -1}, "weight_map": {"a": "x.safetensors"}}, "nonsense"),
        ({"metadata": {"total_size": "9"}, "weight_map": {"a": "x.safetensors"}}, "nonsense"),
        ({"metadata": 3, "weight_map": {"a": "x.safetensors"}}, "nonsense"),
        ({"weight_map": {"a": {"b": {"c": {"d": 0}}}}}, "deeper than 4"),
    ],
)
def test_hostile_indexes(tmp_path: Path, document: object, message: str) -> None:
    shards(tmp_path)
    write_index(tmp_path, document)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(tmp_path)
    assert "index.json" in str(caught.value)


@pytest.mark.parametrize(
    "text", ['{"a": 1, "a": 2}', "{", "[" * 100_000, '{"a": NaN}', "\xff", "3", '{"a":1e999' + "9" * 5000]
)
def test_hostile_configs(tmp_path: Path, text: str) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "x.safetensors")
    (tmp_path / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        open_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text(" " * 2_000_000)
    with pytest.raises(CheckpointError, match="larger than"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "path",
    [
        "",
        "a\0b",
        "absent.safetensors",
        "./absent",
        "/absent/x",
        "~/absent",
        "a/b.safetensors",
        "a/../b/c",
        "a//b",
        "a\\b/c",
        "a" * 5000,
        "~nobody-of-this-name/x",
    ],
)
def test_what_is_neither_local_nor_a_hub_id(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object, **__: object) -> str:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", never)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", never)
    with pytest.raises(CheckpointError):
        open_checkpoint(path)


def test_hub_files_and_repositories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "x.safetensors")
    folder = tmp_path / "snapshot" / "transformer"
    folder.mkdir(parents=True)
    save_file({"a": torch.ones(1) * 2}, folder / "diffusion_pytorch_model.safetensors")
    (tmp_path / "snapshot" / "model_index.json").write_text("{}")
    asked: list[tuple[object, ...]] = []

    def file(repo: str, name: str, **options: object) -> str:
        asked.append((repo, name, options["revision"]))
        return str(tmp_path / "x.safetensors")

    def snapshot(repo: str, *, allow_patterns: list[str], **options: object) -> str:
        asked.append((repo, *(pattern for pattern in allow_patterns if "[0-9]" in pattern)))
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", file)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert open_checkpoint("org/repo/sub/x.safetensors", revision="v1").tensor("a") == 1
    assert open_checkpoint("org/repo").tensor("a") == 2
    assert open_checkpoint("org/repo/transformer").tensor("a") == 2
    assert open_checkpoint("org/repo", subfolder="transformer").tensor("a") == 2
    five = "[0-9]" * 5
    assert asked[0] == ("org/repo", "sub/x.safetensors", "v1")
    assert asked[1][2] == f"transformer/diffusion_pytorch_model-{five}-of-{five}.safetensors"
    assert asked[2] == asked[3] == ("org/repo", asked[1][2])
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        open_checkpoint("org/repo/model.gguf")


def test_the_hub_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The library's own offline path: an empty cache and no permission to ask.
    for path in ("org/repo/x.safetensors", "org/repo"):
        with pytest.raises(CheckpointError, match="go online") as caught:
            open_checkpoint(path, cache_dir=tmp_path, local_files_only=True)
        assert isinstance(caught.value.__cause__, LocalEntryNotFoundError)
    with pytest.raises(CheckpointError, match="could not be fetched"):
        open_checkpoint("or--g/re..po/x.safetensors", cache_dir=tmp_path, local_files_only=True)
