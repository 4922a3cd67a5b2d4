"""StreamingWriter and the atomic helpers: the library reads the same tensors, and a failure changes nothing."""

import errno
import os
import shutil
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nunchaku_models.checkpoints import (
    CheckpointError,
    SafetensorsReader,
    StreamingWriter,
    TensorInfo,
    atomic_folder,
    by_alignment,
)
from nunchaku_models.checkpoints.safetensors_header import DTYPES

relaxed = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
names = st.text(min_size=1, max_size=12).filter(lambda name: name != "__metadata__" and name.isprintable())
infos = st.lists(
    st.builds(
        TensorInfo,
        names,
        st.sampled_from(list(DTYPES.values())),
        st.lists(st.integers(0, 5), max_size=3).map(tuple),
    ),
    min_size=1,
    max_size=6,
    unique_by=lambda info: info.name,
)


def filled(info: TensorInfo, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    top = 2 if info.dtype == torch.bool else 256
    raw = torch.randint(0, top, (info.nbytes,), dtype=torch.uint8, generator=generator)
    return raw.view(info.dtype).reshape(info.shape) if info.nbytes else torch.empty(info.shape, dtype=info.dtype)


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    same = a.dtype == b.dtype and a.shape == b.shape
    return same and (
        not a.numel() or torch.equal(a.reshape(-1).view(torch.uint8), b.contiguous().reshape(-1).view(torch.uint8))
    )


@relaxed
@given(infos=infos, metadata=st.dictionaries(st.text(max_size=8), st.text(max_size=8), max_size=3), data=st.data())
def test_the_library_reads_what_was_written(tmp_path: Path, infos: list, metadata: dict, data: st.DataObject) -> None:
    path = tmp_path / "a.safetensors"
    tensors = {info.name: filled(info, seed) for seed, info in enumerate(infos)}
    with StreamingWriter(path, infos, metadata) as writer:
        for name, tensor in tensors.items():
            transposed = tensor.ndim == 2 and tensor.element_size() < 8 and data.draw(st.booleans())
            writer.write(name, tensor.t().contiguous().t() if transposed else tensor)
    assert path.stat().st_size == writer.nbytes
    assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0
    with safetensors.safe_open(path, "pt") as expected, SafetensorsReader(path) as reader:
        assert set(expected.keys()) == set(tensors) and reader.keys() == list(tensors)
        assert reader.metadata == metadata == (expected.metadata() or {})
        for name, tensor in tensors.items():
            assert same_bytes(expected.get_tensor(name), tensor)
            assert same_bytes(reader.tensor(name), tensor)
    assert os.listdir(tmp_path) == ["a.safetensors"]


@relaxed
@given(infos=infos)
def test_in_the_order_of_the_library_the_data_is_aligned(tmp_path: Path, infos: list) -> None:
    path = tmp_path / "a.safetensors"
    ordered = by_alignment(infos)
    with StreamingWriter(path, ordered) as writer:
        for info in ordered:
            writer.write(info.name, filled(info))
    with SafetensorsReader(path) as reader:
        for info in infos:
            tensor = reader.tensor(info.name)
            assert not tensor.numel() or tensor.data_ptr() % info.dtype.itemsize == 0
            # A view and not a copy: the same place every time.
            assert not tensor.numel() or tensor.data_ptr() == reader.tensor(info.name).data_ptr()


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, SystemExit])
def test_an_interrupted_writer_leaves_the_earlier_file(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "a.safetensors"
    safetensors.torch.save_file({"old": torch.ones(2)}, path)
    content = path.read_bytes()
    info = TensorInfo("new", torch.float32, (1000,))
    with pytest.raises(error), StreamingWriter(path, [info, TensorInfo("b", torch.bool, (1,))]) as writer:
        writer.write("new", torch.ones(1000))
        assert len(os.listdir(tmp_path)) == 2
        raise error
    assert path.read_bytes() == content
    assert os.listdir(tmp_path) == ["a.safetensors"]


def test_a_writer_with_tensors_left_writes_nothing(tmp_path: Path) -> None:
    info = TensorInfo("a", torch.float32, (3,))
    message = "1 of 1 declared tensors are missing, the first is 'a'"
    with pytest.raises(CheckpointError, match=message), StreamingWriter(tmp_path / "x.safetensors", [info]):
        pass
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("b", torch.ones(3), "'a' was declared next"),
        ("a", torch.ones(4), r"\[3\] and given as torch.float32 \[4\]"),
        ("a", torch.ones(3, dtype=torch.float16), "given as torch.float16"),
        ("a", torch.ones(3, device="meta"), "no dense data"),
        ("a", torch.ones(3).to_sparse(), "no dense data"),
    ],
)
def test_what_was_not_declared_is_refused(tmp_path: Path, name: str, tensor: torch.Tensor, message: str) -> None:
    info = TensorInfo("a", torch.float32, (3,))
    with StreamingWriter(tmp_path / "x.safetensors", [info]) as writer:
        with pytest.raises(ValueError, match=message):
            writer.write(name, tensor)
        writer.write("a", torch.ones(3))
        with pytest.raises(ValueError, match="was not declared"):
            writer.write("a", torch.ones(3))
    with pytest.raises(ValueError, match="not open"):
        writer.write("a", torch.ones(3))
    with pytest.raises(ValueError, match="already used"):
        writer.__enter__()


def test_bad_declarations_are_refused_before_a_file_exists(tmp_path: Path) -> None:
    a = TensorInfo("a", torch.float32, (3,))
    path = tmp_path / "x.safetensors"
    with pytest.raises(ValueError, match="given twice"):
        StreamingWriter(path, [a, a])
    with pytest.raises(ValueError, match="reserved"):
        StreamingWriter(path, [TensorInfo("__metadata__", torch.float32, (3,))])
    with pytest.raises(ValueError, match="cannot hold"):
        StreamingWriter(path, [TensorInfo("a", torch.complex128, (3,))])
    with pytest.raises(TypeError, match="str to str"):
        StreamingWriter(path, [a], {"rank": 3})  # type: ignore[dict-item]
    for bad, message in ((tmp_path, "is a folder"), (tmp_path / "no" / "x", "create it first")):
        with pytest.raises(CheckpointError, match=message):
            StreamingWriter(bad, [a])
    with pytest.raises(CheckpointError, match=r"needs 4000\d+.\d+ GB and its disk has"):
        StreamingWriter(path, [TensorInfo("a", torch.float32, (10**15,))])
    assert not os.listdir(tmp_path)


def test_what_is_no_file_is_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "x.safetensors").symlink_to("pipe")
    for path in ("pipe", "x.safetensors"):
        with pytest.raises(CheckpointError, match="regular file"):
            StreamingWriter(tmp_path / path, [TensorInfo("a", torch.float32, (3,))])
    assert (tmp_path / "pipe").is_fifo()


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = StreamingWriter(tmp_path / "x.safetensors", [TensorInfo("a", torch.float32, (3,))])

    with pytest.raises(CheckpointError, match="No space left"), writer:
        assert writer._atomic is not None
        monkeypatch.setattr(writer._atomic, "file", Failing(writer._atomic.file))
        writer.write("a", torch.ones(3))
    assert not os.listdir(tmp_path)


class Failing:
    """A file whose disk is full."""

    closed = False

    def __init__(self, file: object) -> None:
        self.close = file.close  # type: ignore[attr-defined]

    def write(self, data: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_read_only_folder_is_noticed_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)  # tests may run as root, who may write anywhere
    with pytest.raises(CheckpointError, match="no permission"):
        StreamingWriter(tmp_path / "x.safetensors", [])


def test_files_follow_umask_and_symbolic_links(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    link = tmp_path / "link.safetensors"
    link.symlink_to(tmp_path / "real" / "x.safetensors")
    previous = os.umask(0o027)
    try:
        with StreamingWriter(link, []):
            pass
    finally:
        os.umask(previous)
    assert link.is_symlink()
    assert (tmp_path / "real" / "x.safetensors").stat().st_mode & 0o777 == 0o640


def test_a_folder_appears_whole_and_replaces_only_its_own_files(tmp_path: Path) -> None:
    path = tmp_path / "model"
    for text in ("one", "two"):
        with atomic_folder(path, ["config.json"]) as folder:
            (folder / "config.json").write_text(text)
        assert (path / "config.json").read_text() == text
    with pytest.raises(KeyboardInterrupt), atomic_folder(path, ["config.json"]) as folder:
        (folder / "config.json").write_text("three")
        raise KeyboardInterrupt
    with pytest.raises(CheckpointError, match="differ in"), atomic_folder(path, ["config.json"]) as folder:
        (folder / "other.json").write_text("three")
    assert (path / "config.json").read_text() == "two"
    (path / "mine.txt").write_text("precious")
    with pytest.raises(CheckpointError, match=r"mine\.txt"), atomic_folder(path, ["config.json"]):
        raise AssertionError("not reached")
    assert (path / "mine.txt").read_text() == "precious"
    with pytest.raises(CheckpointError, match="is a file"), atomic_folder(path / "mine.txt", []):
        pass
    with pytest.raises(CheckpointError, match="cannot be created"), atomic_folder(tmp_path / "a" / "b", []):
        pass
    assert sorted(os.listdir(tmp_path)) == ["model"]


def test_a_file_that_appears_meanwhile_is_not_deleted(tmp_path: Path) -> None:
    path = tmp_path / "model"
    with pytest.raises(CheckpointError, match=r"mine\.txt"), atomic_folder(path, ["a"]) as folder:
        (folder / "a").write_text("")
        path.mkdir()
        (path / "mine.txt").write_text("precious")
    assert os.listdir(path) == ["mine.txt"]
    shutil.rmtree(path)
    assert not os.listdir(tmp_path)
