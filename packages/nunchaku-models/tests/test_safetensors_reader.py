"""SafetensorsReader: the same tensors as the safetensors library, and nothing but CheckpointError from bad files."""

import copy
import json
import os
import resource
import struct
import time
import tracemalloc
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nunchaku_models.checkpoints import CheckpointError, SafetensorsReader
from nunchaku_models.checkpoints.safetensors_header import DTYPES

# tmp_path is shared by the examples of a test; every example writes its own file anew.
relaxed = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)
names = st.text(min_size=1, max_size=12).filter(lambda name: name != "__metadata__" and name.isprintable())


def random_tensor(dtype: torch.dtype, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    count = torch.Size(shape).numel() * dtype.itemsize
    raw = torch.randint(0, 2 if dtype == torch.bool else 256, (count,), dtype=torch.uint8, generator=generator)
    return raw.view(dtype).reshape(shape) if count else torch.empty(shape, dtype=dtype)


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal dtype, shape and bits (NaNs of any kind included)."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if not a.numel():
        return True
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


tensors = st.dictionaries(
    names, st.tuples(st.sampled_from(sorted(DTYPES)), shapes, st.integers(0, 2**30)), max_size=6
).map(lambda found: {name: random_tensor(DTYPES[dtype], shape, seed) for name, (dtype, shape, seed) in found.items()})


def raw_file(path: Path, header: bytes | str | dict[str, object], data: bytes = b"", length: int | None = None) -> Path:
    text = json.dumps(header).encode() if isinstance(header, dict) else header
    text = text.encode() if isinstance(text, str) else text
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


@relaxed
@given(tensors=tensors, metadata=st.none() | st.dictionaries(st.text(max_size=8), st.text(max_size=8), max_size=3))
def test_reads_what_the_library_writes(tmp_path: Path, tensors: dict, metadata: dict | None) -> None:
    path = tmp_path / "a.safetensors"
    # Without tensors but with metadata, safetensors 0.8 writes a header that it cannot read itself.
    metadata = metadata if tensors else None
    safetensors.torch.save_file(tensors, path, metadata=metadata)
    with SafetensorsReader(path) as reader:
        assert set(reader.keys()) == set(tensors) and len(reader) == len(tensors)
        assert reader.metadata == (metadata or {})
        for name, tensor in tensors.items():
            info = reader.info(name)
            assert (info.dtype, info.shape) == (tensor.dtype, tuple(tensor.shape))
            assert info.nbytes == tensor.numel() * tensor.element_size()
            assert same_bytes(reader.tensor(name), tensor)
            if tensor.ndim:
                stop = tensor.shape[0]
                start = stop // 2
                assert same_bytes(reader.rows(name, start, stop), tensor[start:stop])


@relaxed
@given(data=st.data())
def test_damaged_files_give_an_error_or_what_the_library_reads(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "a.safetensors"
    original = {"a.b": torch.arange(6).reshape(2, 3), "é": torch.ones(3, dtype=torch.float8_e4m3fn)}
    safetensors.torch.save_file(original, path, metadata={"config": '{"x": [1]}'})
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        where = data.draw(st.integers(0, len(content) - 1))
        match data.draw(st.sampled_from(["flip", "set", "cut", "insert", "delete", "copy"])):
            case "flip":
                content[where] ^= 1 << data.draw(st.integers(0, 7))
            case "set":
                content[where] = data.draw(st.sampled_from(list(b'{}[]":,0123456789-.eE\\ \x00\xff')))
            case "cut" if where:
                del content[where:]
            case "insert":
                content[where:where] = data.draw(st.binary(min_size=1, max_size=9))
            case "delete" if len(content) > 1:
                del content[where]
            case "copy":
                stop = data.draw(st.integers(where, min(len(content), where + 60)))
                content[where:where] = content[where:stop]
    path.write_bytes(content)
    check_against_library(path)


def check_against_library(path: Path) -> None:
    try:
        reader = SafetensorsReader(path)
    except CheckpointError as error:
        assert str(path) in str(error) and "\n" not in str(error)
        return
    with reader, safetensors.safe_open(path, "pt") as expected:
        assert set(reader.keys()) == set(expected.keys())
        assert reader.metadata == (expected.metadata() or {})
        for name in reader:
            assert same_bytes(reader.tensor(name), expected.get_tensor(name))


numbers = st.integers(-2, 12) | st.sampled_from([2**31, 2**62, 2**63, 2**64, 10**30]) | st.floats() | st.booleans()
offsets = st.tuples(st.integers(0, 12), st.integers(0, 12)).map(sorted) | st.lists(numbers, max_size=3)
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["U8", "F32", "BF16", "F4", "Q8"]),
        "shape": st.lists(st.integers(0, 4), max_size=3) | st.lists(numbers, max_size=3),
        "data_offsets": offsets,
    },
    optional={"extra": st.none(), "data": st.lists(st.integers())},
)
documents = st.dictionaries(
    st.sampled_from(["a", "b", "c", "__metadata__"]),
    entries | st.dictionaries(st.text(max_size=3), st.text(max_size=3)),
) | st.recursive(numbers | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=10)


@relaxed
@given(document=documents, size=st.integers(0, 24))
def test_any_json_as_header_gives_an_error_or_what_the_library_reads(
    tmp_path: Path, document: object, size: int
) -> None:
    check_against_library(raw_file(tmp_path / "a.safetensors", json.dumps(document), bytes(size)))


def entry(start: int = 0, stop: int = 4, dtype: str = "F32", shape: object = (1,)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


@pytest.mark.parametrize(
    ("header", "size", "message"),
    [
        ({"a": entry(0, 4), "b": entry(2, 6)}, 6, "overlaps"),
        ({"a": entry(0, 4), "b": entry(8, 12)}, 12, "gap"),
        ({"a": entry(4, 8)}, 8, "gap"),
        ({"a": entry(0, 4)}, 8, "4 bytes after its last tensor"),
        ({"a": entry(0, 4)}, 3, "truncated"),
        ({"a": entry(0, 8)}, 8, "damaged"),
        ({"a": entry(4, 0)}, 4, "start <= stop"),
        ({"a": entry(0, 4, shape=[-1])}, 4, "non-negative integer"),
        ({"a": entry(0, 4, shape=[True])}, 4, "non-negative integer"),
        ({"a": entry(0, 4, shape=[1.0])}, 4, "non-negative integer"),
        ({"a": entry(0, 4, shape=["1"])}, 4, "non-negative integer"),
        ({"a": entry(0, 4, shape=[2**40, 2**40])}, 4, "overflows"),
        ({"a": entry(0, 0, shape=[2**40, 2**40, 0])}, 0, "overflows"),
        ({"a": entry(0, 4, shape=[10**25])}, 4, "non-negative integer"),
        ({"a": entry(0, 4, shape=[1] * 65)}, 4, "at most 64"),
        ({"a": entry(0, 4, dtype="F33")}, 4, "'F33'"),
        ({"a": {**entry(), "more": 1}}, 4, "expected"),
        ({"a": {"dtype": "F32", "shape": [1]}}, 4, "','"),
        ({"a": {**entry(), "data_offsets": [0]}}, 4, "data_offsets"),
        ({"a": {**entry(), "data_offsets": [0, 4, 4]}}, 4, "at most 2"),
        ({"__metadata__": {"a": 1}}, 0, "a string expected"),
        ({"__metadata__": {"a": None}}, 0, "a string expected"),
        ({"a": "x" * 1000}, 0, "'{' expected"),
        (
            '{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}',
            0,
            "twice",
        ),
        ('{"a":{"dtype":"U8","dtype":"U8","data_offsets":[0,0]}}', 0, "repeated"),
        ('{"__metadata__":{},"__metadata__":{}}', 0, "twice"),
        ('{"__metadata__":{"a":"b","a":"c"}}', 0, "twice"),
        ('{"\\ud800":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}', 0, "surrogates"),
        ("{} x", 0, "end of the header"),
        ('{"a', 0, "a string expected"),
        (b'{"\xff":{}}', 0, "UTF-8"),
        ('{"a":{"dtype":"U8","shape":[00],"data_offsets":[0,0]}}', 0, "non-negative integer"),
    ],
)
def test_what_is_wrong_with_a_header_is_said(tmp_path: Path, header: object, size: int, message: str) -> None:
    path = raw_file(tmp_path / "a.safetensors", header, bytes(size))  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match=message) as caught:
        SafetensorsReader(path)
    assert str(path) in str(caught.value) and len(str(caught.value)) < 600


@pytest.mark.parametrize(
    ("start", "message"),
    [
        (b"", "empty"),
        (b"abc", "only 3 bytes"),
        (struct.pack("<Q", 0), "only 8 bytes"),
        (b"PK\x03\x04" + bytes(60), "zip archive"),
        (b"\x80\x02}q\x00" + bytes(60), "pickle"),
        (b"GGUF\x03\x00\x00\x00" + bytes(60), "GGUF"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "git lfs pull"),
        (b"\n<!DOCTYPE html><html><head></head></html>", "web page"),
        (b'{"error": "Entry not found"}' + bytes(40), "JSON text"),
        (b"\x1f\x8b\x08" + bytes(60), "gzip"),
        (struct.pack("<Q", 2**63) + b"{" + bytes(60), "claims a header"),
        (struct.pack("<Q", 100_000_001) + b"{" + bytes(60), "claims a header"),
        (struct.pack("<Q", 99_999_999) + b"{" + bytes(60), "truncated"),
        (struct.pack("<Q", 60) + bytes(60), "does not start with"),
        (os.urandom(7) + b"\xff" + bytes(60), "does not start with"),
    ],
)
def test_other_files_are_recognised(tmp_path: Path, start: bytes, message: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(start)
    with pytest.raises(CheckpointError, match=message):
        SafetensorsReader(path)


def test_paths_that_are_no_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "absent", tmp_path / "pipe", Path("/dev/zero"), "a\0b"):
        with pytest.raises(CheckpointError):
            SafetensorsReader(path)


@pytest.mark.parametrize(
    "header",
    [
        "{" + '"a":{' * 2_000_000,
        '{"a":' + "[" * 10_000_000,
        '{"a":{"shape":[' + "[]," * 3_000_000 + "[]]}}",
        '{"a":{"shape":[' + "1," * 5_000_000 + "1]}}",
        '{"a":[' + "0.1," * 3_000_000 + "0]}",
        '{"a":{"dtype":"' + "x" * 10_000_000 + '"}}',
        '{"' + "\\" * 10_000_001 + '":0}',
        "{" + " " * 10_000_000,
        '{"a":{"dtype":"U8","shape":[' + "9" * 10_000_000 + "]}}",
    ],
    ids=[
        "deep objects",
        "deep arrays",
        "many arrays",
        "long shape",
        "floats",
        "long dtype",
        "backslashes",
        "spaces",
        "digits",
    ],
)
def test_hostile_headers_cost_neither_memory_nor_time(tmp_path: Path, header: str) -> None:
    path = raw_file(tmp_path / "a.safetensors", header)
    tracemalloc.start()
    begin = time.process_time()
    with pytest.raises(CheckpointError) as caught:
        SafetensorsReader(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5 * len(header) + 2**20
    assert time.process_time() - begin < 5
    assert len(str(caught.value)) < 600


def test_a_huge_file_is_opened_by_its_header_and_released(tmp_path: Path) -> None:
    path = tmp_path / "huge.safetensors"
    half = 12 * 2**30
    raw_file(
        path,
        {
            "a": {"dtype": "BF16", "shape": [half // 8192, 4096], "data_offsets": [0, half]},
            "b": {"dtype": "U8", "shape": [half], "data_offsets": [half, 2 * half]},
        },
    )
    with open(path, "ab") as file:
        file.truncate(file.tell() + 2 * half)  # sparse: takes no disk space
    before = resident()
    begin = time.perf_counter()
    with SafetensorsReader(path) as reader:
        assert reader.info("b").nbytes == half
        assert time.perf_counter() - begin < 0.5
        assert reader.rows("a", 1000, 1003).float().sum() == 0
        assert reader.tensor("b")[-1] == 0
        assert resident() - before < 16 * 2**20
        touched = reader.tensor("b")[: 48 * 2**20].view(torch.int64)
        assert touched.any() == 0
        assert resident() - before > 40 * 2**20
        reader.release("b")
        assert resident() - before < 24 * 2**20
        assert touched[::1000].any() == 0


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def test_tensors_are_private_views(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    tensors = {"a": torch.arange(4096.0), "b": torch.ones(4096), "odd": torch.tensor([True])}
    safetensors.torch.save_file(tensors, path)
    content = path.read_bytes()
    reader = SafetensorsReader(path)
    a, again = reader.tensor("a"), reader.tensor("a")
    assert a.data_ptr() == again.data_ptr()
    assert a.untyped_storage().nbytes() == 4096 * 4  # deepcopy and torch.save copy storages, not views
    assert torch.equal(copy.deepcopy(a), a)
    a += 1
    assert path.read_bytes() == content
    reader.release("a")
    reader.close()
    assert torch.equal(reader.info("b").shape and again[:1] * 0, torch.zeros(1))
    with pytest.raises(CheckpointError, match="closed"):
        reader.tensor("a")
    with pytest.raises(CheckpointError, match="similar names"):
        reader.info("bb")


def test_misaligned_tensors_are_copied(tmp_path: Path) -> None:
    values = torch.arange(5.0)
    header = {"a": entry(0, 1, "U8"), "b": entry(1, 21, "F32", [5])}
    path = raw_file(tmp_path / "a.safetensors", header, b"\x07" + values.numpy().tobytes())
    with SafetensorsReader(path) as reader:
        assert torch.equal(reader.tensor("b"), values)
        assert reader.tensor("b").data_ptr() % 4 == 0
        with pytest.raises(CheckpointError, match=r"no rows 3\.\.6"):
            reader.rows("b", 3, 6)


def test_a_file_that_shrinks_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    safetensors.torch.save_file({"a": torch.ones(4096)}, path)
    with SafetensorsReader(path) as reader:
        os.truncate(path, 5000)
        with pytest.raises(CheckpointError, match="shorter"):
            reader.tensor("a")
