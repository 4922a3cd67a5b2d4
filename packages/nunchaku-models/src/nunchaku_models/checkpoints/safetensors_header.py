"""The header of a safetensors file: strict parsing, and building.

A file is an 8-byte little-endian length, that many bytes of JSON, then the tensor data. The JSON maps each tensor name
to `{"dtype": str, "shape": [int, ...], "data_offsets": [start, stop]}` and `__metadata__` to a map of strings; the
tensors must cover the data part exactly, without overlap or hole.

The header comes from an untrusted file, so it is read by a scanner for exactly this grammar and not by a general JSON
parser: a document of another shape fails at its first wrong token, before it could cost memory or recursion.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from nunchaku_models.checkpoints.errors import CheckpointError, shown

HEADER_LIMIT = 100_000_000
"""Longest header accepted, bytes; the limit of the safetensors library."""
TENSOR_LIMIT = 500_000
_RANK_LIMIT = 64
_ELEMENT_LIMIT = 2**62

DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F64": torch.float64,
    "C64": torch.complex64,
}
DTYPE_NAMES: dict[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Name, dtype and shape of a tensor that need not be in memory."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Header:
    """A validated header. `offsets` are relative to the data part; both dictionaries are in file order."""

    metadata: dict[str, str]
    tensors: dict[str, TensorInfo]
    offsets: dict[str, int]


_SPACE = re.compile(r"[ \t\r\n]*+")
_STRING = re.compile(r'"(?:[^"\\\x00-\x1f]++|\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4}))*+"')
_INTEGER = re.compile(r"(?:0|[1-9][0-9]{0,18})(?![0-9.eE])")


class _Scanner:
    """Reads tokens of the header from left to right."""

    def __init__(self, text: str, where: str) -> None:
        self.text = text
        self.where = where
        self.position = 0

    def fail(self, wanted: str) -> CheckpointError:
        found = self.text[self.position : self.position + 20]
        return CheckpointError(
            f"the header of {self.where} is not a safetensors header: {wanted} expected at character "
            f"{self.position}, found {found!r}; download or export the file again"
        )

    def skip(self) -> None:
        match = _SPACE.match(self.text, self.position)
        if match:
            self.position = match.end()

    def take(self, token: str) -> bool:
        self.skip()
        if self.text.startswith(token, self.position):
            self.position += len(token)
            return True
        return False

    def need(self, token: str) -> None:
        if not self.take(token):
            raise self.fail(repr(token))

    def string(self) -> str:
        self.skip()
        match = _STRING.match(self.text, self.position)
        if match is None:
            raise self.fail("a string")
        literal = match.group()
        value = literal[1:-1]
        if "\\" in value:
            value = json.loads(literal)
            if "\\u" in literal and any("\ud800" <= character <= "\udfff" for character in value):
                raise self.fail("a string without lone surrogates")
        self.position = match.end()
        return value

    def integers(self, limit: int, what: str) -> tuple[int, ...]:
        self.need("[")
        values: list[int] = []
        if self.take("]"):
            return ()
        while True:
            self.skip()
            match = _INTEGER.match(self.text, self.position)
            if match is None:
                raise self.fail(f"a non-negative integer ({what})")
            values.append(int(match.group()))
            if len(values) > limit:
                raise self.fail(f"at most {limit} integers ({what})")
            self.position = match.end()
            if self.take("]"):
                return tuple(values)
            self.need(",")

    def metadata(self) -> dict[str, str]:
        self.need("{")
        result: dict[str, str] = {}
        if self.take("}"):
            return result
        while True:
            key = self.string()
            if key in result:
                raise CheckpointError(f"the metadata of {self.where} holds the key {shown(key)} twice")
            self.need(":")
            result[key] = self.string()
            if self.take("}"):
                return result
            self.need(",")

    def tensor(self, name: str) -> tuple[TensorInfo, int, int]:
        dtype: torch.dtype | None = None
        shape: tuple[int, ...] | None = None
        span: tuple[int, ...] | None = None
        tensor = f"tensor {shown(name)} in {self.where}"
        self.need("{")
        for count in range(3):
            if count:
                self.need(",")
            field = self.string()
            self.need(":")
            if field == "dtype" and dtype is None:
                given = self.string()
                if given not in DTYPES:
                    raise CheckpointError(f"{tensor} has dtype {shown(given)}, which this reader does not know")
                dtype = DTYPES[given]
            elif field == "shape" and shape is None:
                shape = self.integers(_RANK_LIMIT, "shape")
            elif field == "data_offsets" and span is None:
                span = self.integers(2, "data_offsets")
            else:
                raise CheckpointError(f"{tensor} has a repeated or unknown header field {shown(field)}")
        self.need("}")
        assert dtype is not None and shape is not None and span is not None  # three different fields were read
        if len(span) != 2 or span[0] > span[1]:
            raise CheckpointError(f"{tensor} has data_offsets {list(span)}, not [start, stop] with start <= stop")
        # Zero-sized tensors are measured without their zeros: torch refuses shapes whose strides overflow.
        if math.prod(size for size in shape if size) > _ELEMENT_LIMIT:
            raise CheckpointError(f"{tensor} has shape {list(shape)}, whose size overflows")
        info = TensorInfo(name, dtype, shape)
        if info.nbytes != span[1] - span[0]:
            raise CheckpointError(
                f"{tensor} has dtype {DTYPE_NAMES[dtype]} and shape {list(shape)}, which take {info.nbytes:,} bytes, "
                f"but its data_offsets span {span[1] - span[0]:,}; the file is damaged"
            )
        return info, span[0], span[1]


def parse_header(header: bytes, data_size: int, where: str) -> Header:
    """Validate a header against the size of the data part.

    Args:
        header: the JSON bytes after the length field.
        data_size: bytes that follow the header in the file.
        where: path of the file, for messages.

    Raises:
        CheckpointError: anything the format does not allow (see the module docstring).
    """
    try:
        text = header.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"the header of {where} is not UTF-8 (byte {error.start}); the file is damaged") from None
    scanner = _Scanner(text, where)
    metadata: dict[str, str] | None = None
    entries: dict[str, tuple[TensorInfo, int, int]] = {}
    scanner.need("{")
    if not scanner.take("}"):
        while True:
            name = scanner.string()
            scanner.need(":")
            if name == "__metadata__":
                if metadata is not None:
                    raise CheckpointError(f"the header of {where} holds '__metadata__' twice")
                metadata = scanner.metadata()
            elif name in entries:
                raise CheckpointError(f"the header of {where} holds the tensor {shown(name)} twice")
            elif len(entries) == TENSOR_LIMIT:
                raise CheckpointError(f"{where} holds more than {TENSOR_LIMIT:,} tensors; it is damaged or hostile")
            else:
                entries[name] = scanner.tensor(name)
            if scanner.take("}"):
                break
            scanner.need(",")
    scanner.skip()
    if scanner.position != len(text):
        raise scanner.fail("the end of the header")

    tensors: dict[str, TensorInfo] = {}
    offsets: dict[str, int] = {}
    end = 0
    for name, (info, start, stop) in sorted(entries.items(), key=lambda entry: entry[1][1:]):
        if start != end:
            problem = "overlaps the tensor before it" if start < end else "leaves a gap after the tensor before it"
            raise CheckpointError(
                f"tensor {shown(name)} in {where} starts at data byte {start:,} instead of {end:,} and so {problem}; "
                "the file is damaged"
            )
        end = stop
        tensors[name] = info
        offsets[name] = start
    if end > data_size:
        raise CheckpointError(
            f"{where} is truncated: its header promises {end:,} bytes of tensors and {data_size:,} are there; "
            "download or copy it again"
        )
    if end < data_size:
        raise CheckpointError(f"{where} has {data_size - end:,} bytes after its last tensor; the file is damaged")
    return Header(metadata or {}, tensors, offsets)


def build_header(tensors: Sequence[TensorInfo], metadata: Mapping[str, str] | None = None) -> bytes:
    """The length field and the padded JSON for tensors stored one after the other in the given order.

    The header is padded with spaces to a multiple of 8 bytes, as the safetensors library does.

    Raises:
        ValueError, TypeError: a name given twice or reserved, a dtype the format lacks, metadata other than str -> str.
    """
    document: dict[str, object] = {}
    if metadata:
        for key, value in metadata.items():
            if not isinstance(key, str) or not isinstance(value, str):
                raise TypeError(f"metadata must map str to str; the entry {shown(key)} is a {type(value).__name__}")
        document["__metadata__"] = dict(metadata)
    end = 0
    for info in tensors:
        if info.name in document or info.name == "__metadata__":
            raise ValueError(f"the tensor name {shown(info.name)} is reserved or given twice")
        if info.dtype not in DTYPE_NAMES:
            raise ValueError(f"tensor {shown(info.name)} has dtype {info.dtype}, which safetensors cannot hold")
        document[info.name] = {
            "dtype": DTYPE_NAMES[info.dtype],
            "shape": list(info.shape),
            "data_offsets": [end, end + info.nbytes],
        }
        end += info.nbytes
    text = json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    if len(text) > HEADER_LIMIT:
        raise ValueError(f"the header takes {len(text):,} bytes; safetensors allows {HEADER_LIMIT:,}")
    return len(text).to_bytes(8, "little") + text
