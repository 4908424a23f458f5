"""Files of safetensors: a strict reader, which maps, and a writer, which streams.

The format is 8 bytes of length, a JSON header, and the tensors' bytes without a gap. Knows no names
of a model. What the format forbids (overlaps, gaps, offsets outside the file, a key twice) is
refused before a tensor is looked at.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llama.checkpoint.source import LazyTensor, Part, cast, rows_of
from llama.files.plain import check_file
from llama.files.strict_json import parse_object

_LARGEST_HEADER = 2**23  # bytes; the 405B has 200 kB
_BLOCK = 2**26  # bytes that are copied at a time where they cannot be mapped
_MOST_DIMENSIONS = 8

_SIZES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8,
    "U32": 4, "U16": 2, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "C64": 8,
}  # fmt: skip
_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
_PACKED = {"I8": torch.int8, "U8": torch.uint8, "F8_E4M3": torch.float8_e4m3fn}
_NAMES = {dtype: name for name, dtype in (_DTYPES | _PACKED).items()}


class Entry(NamedTuple):
    """A tensor of a file, as its header describes it."""

    dtype: str  # by the format's name
    shape: tuple[int, ...]
    start: int  # of its bytes, from the beginning of the file
    stop: int


class Stored(LazyTensor):
    """A tensor of one of the dtypes that are read, in a mapped file."""

    def __init__(self, data: Tensor, entry: Entry) -> None:
        self._bytes = data[entry.start : entry.stop]
        self.shape, self.dtype = entry.shape, _DTYPES[entry.dtype]
        self._aligned = self._bytes.data_ptr() % self.dtype.itemsize == 0

    def parts(self, dim: int = 0, start: int = 0, stop: int | None = None) -> Iterator[Part]:
        stop = start + self.range_shape(dim, start, stop)[dim]
        if self._aligned:
            yield Part(dim, 0, self._view(self._bytes).narrow(dim, start, stop - start))
            return
        row = prod(self.shape[1:]) * self.dtype.itemsize
        first, last = (start, stop) if dim == 0 else (0, self.shape[0])
        rows = max(1, _BLOCK // (row or 1))
        for low in range(first, last, rows):
            high = min(low + rows, last)
            block = self._view(self._bytes[low * row : high * row].clone())
            whole = dim == 0 or (start, stop) == (0, self.shape[dim])
            yield Part(0, low - first, block if whole else block.narrow(dim, start, stop - start))

    def mapped(self, dim: int = 0, start: int = 0, stop: int | None = None) -> Tensor | None:
        whole = self.range_shape(dim, start, stop) == self.shape
        return self._view(self._bytes) if whole and self._aligned else None

    def _view(self, data: Tensor) -> Tensor:
        return data.view(self.dtype).view(-1, *self.shape[1:])


def open_file(file: Path) -> tuple[Tensor, dict[str, Entry]]:
    """Map a file and read its header; ValueError, naming the file, where it is broken."""
    entries = read_header(file)
    try:
        size = file.stat().st_size
        data = torch.from_file(str(file), shared=False, size=size, dtype=torch.uint8)
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{file}: cannot be mapped: {str(error).splitlines()[0]:.120}") from error
    return data, entries


def read_header(file: Path) -> dict[str, Entry]:
    """Read which tensors a file has, in its order; every rule of the format is checked."""
    return _read_header(file)[0]


def read_metadata(file: Path) -> dict[str, Any]:
    """Read what a file says beside its tensors: texts by name, which are not looked at."""
    said = _read_header(file)[1]
    return said if isinstance(said, dict) else {}


def _read_header(file: Path) -> tuple[dict[str, Entry], object]:
    check_file(file)
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            head = stream.read(8)
            _check_head(head, size, file)
            length = int.from_bytes(head, "little")
            text = stream.read(length)
    except OSError as error:
        raise ValueError(f"{file}: cannot be read: {error.strerror}") from error
    try:
        if not text.startswith(b"{"):
            raise ValueError("it does not begin with {")
        header = parse_object(text.decode())
        metadata = header.pop("__metadata__", None)
        entries = {name: _entry(name, said, 8 + length) for name, said in header.items()}
        return _in_order(entries, 8 + length, size), metadata
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: its header is broken: {error}") from error


def _check_head(head: bytes, size: int, file: Path) -> None:
    if head.lstrip().startswith(b"<"):
        raise ValueError(f"{file}: is a web page or XML, no weights; download it again")
    if head == b"version ":
        raise ValueError(f"{file}: is a git-lfs pointer, no weights; fetch them with git lfs pull")
    if len(head) < 8:
        raise ValueError(f"{file}: is cut short: {size} bytes are no safetensors file")
    length = int.from_bytes(head, "little")
    if length > size - 8:
        raise ValueError(
            f"{file}: is cut short or no safetensors file: its header should have {length} bytes, "
            f"and the file has {size}"
        )
    if length > _LARGEST_HEADER:
        raise ValueError(
            f"{file}: its header has {length} bytes; more than {_LARGEST_HEADER} are not read"
        )


def _entry(name: str, said: object, offset: int) -> Entry:
    shown = f"{name:.80}"
    if not isinstance(said, dict) or set(said) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{shown} is not given as dtype, shape and data_offsets")
    dtype, shape, offsets = said["dtype"], said["shape"], said["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _SIZES:
        raise ValueError(f"{shown} has the unknown dtype {dtype!r:.40}")
    if not _counts(shape) or len(shape) > _MOST_DIMENSIONS:
        raise ValueError(f"{shown} has the shape {shape!r:.60}")
    if not _counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"{shown} has the offsets {offsets!r:.60}")
    if offsets[1] - offsets[0] != prod(shape) * _SIZES[dtype]:
        raise ValueError(
            f"{shown} has {offsets[1] - offsets[0]} bytes, and {dtype} {shape!r:.60} needs "
            f"{prod(shape) * _SIZES[dtype]}"
        )
    return Entry(dtype, tuple(shape), offset + offsets[0], offset + offsets[1])


def _counts(numbers: object) -> bool:
    return isinstance(numbers, list) and all(type(n) is int and 0 <= n < 2**48 for n in numbers)


def _in_order(entries: Mapping[str, Entry], start: int, size: int) -> dict[str, Entry]:
    """Sort the entries by their bytes, which must fill the file from `start` to its end once."""
    ordered = dict(sorted(entries.items(), key=lambda item: item[1][2:]))
    at, before = start, "the header"
    for name, entry in ordered.items():
        if entry.start != at:
            how = "overlaps" if entry.start < at else "leaves a gap after"
            raise ValueError(f"{name:.80} {how} {before:.80}")
        at, before = entry.stop, name
    if at != size:
        raise ValueError(f"its tensors end at byte {at}, and the file has {size}")
    return ordered


def stored(name: str, data: Tensor, entry: Entry, file: Path) -> Stored:
    """One tensor of a file; ValueError where its dtype is not one that is read."""
    if entry.dtype not in _DTYPES:
        hint = "; load the model's unquantized version" if _SIZES[entry.dtype] == 1 else ""
        raise ValueError(
            f"{file}: {name} is {entry.dtype}; these are read: {', '.join(_DTYPES)}{hint}"
        )
    return Stored(data, entry)


def viewed(name: str, data: Tensor, entry: Entry, file: Path) -> Tensor:
    """One tensor of a file, also of packed weights, as a view, or as a copy where unaligned."""
    dtype = (_DTYPES | _PACKED).get(entry.dtype)
    if dtype is None:
        known = ", ".join(_DTYPES | _PACKED)
        raise ValueError(f"{file}: {name:.80} is {entry.dtype}; these are read: {known}")
    piece = data[entry.start : entry.stop]
    if piece.data_ptr() % dtype.itemsize:
        piece = piece.clone()
    return piece.view(dtype).view(entry.shape)


# --- writing --------------------------------------------------------------------------------------


def write_file(
    file: Path,
    tensors: Mapping[str, LazyTensor],
    dtype: torch.dtype,
    advance: Callable[[int], object] = lambda n: None,
) -> None:
    """Write tensors, cast to `dtype`, one at a time in memory."""
    laid = {name: (source.shape, dtype) for name, source in tensors.items()}
    text = header_of(laid, {"format": "pt"})
    with file.open("wb") as stream:
        stream.write(text)
        for name, source in tensors.items():
            for block in rows_of(source):
                raw = cast(name, block, dtype)
                stream.write(raw.numpy().data)
                advance(raw.nbytes)


def header_of(
    tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]], metadata: Mapping[str, str]
) -> bytes:
    """The first bytes of a file of tensors, given as shape and dtype, in this order."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    at = 0
    for name, (shape, dtype) in tensors.items():
        size = prod(shape) * dtype.itemsize
        header[name] = {
            "dtype": _NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [at, at + size],
        }
        at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
