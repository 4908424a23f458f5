"""One GGUF file's header, read strictly: keys with their values, tensors with their offsets.

    +--------------------+  magic "GGUF", version, number of tensors, number of keys
    | header             |
    +--------------------+  each: name, value type, value; an array's value is the type of its
    | key-value pairs    |        items, their number and the items; a text is its length and bytes
    +--------------------+  each: name, number of dimensions, sizes (the fastest first), type,
    | tensor infos       |        offset from the beginning of the data
    +--------------------+
    | padding            |  up to a multiple of general.alignment (32 where no key says otherwise)
    +--------------------+
    | data               |  the tensors, each at a multiple of the alignment
    +--------------------+

All numbers are little-endian; lengths, numbers of things, sizes and offsets have 8 bytes. Nothing
in the header is believed before it is checked against the length of the file, so a broken or
hostile one ends in one sentence at once. Knows no key and no tensor of any model. The surprising
thing: the gguf package has a reader too, but it trusts what it reads; this one allocates nothing
that the file merely claims, and walks over long arrays without making them.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import mmap
import struct
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch

from llama.checkpoint.gguf.blocks import GGML_TYPES, GGMLType
from llama.files.plain import check_file

MAGIC = b"GGUF"
VERSION = 3
ALIGNMENT = 32  # where general.alignment does not say otherwise

UINT8, INT8, UINT16, INT16, UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY, UINT64, INT64, FLOAT64 = (
    range(13)
)
STRUCT_CODES = {  # of struct's, by value type
    UINT8: "B", INT8: "b", UINT16: "H", INT16: "h", UINT32: "I", INT32: "i", FLOAT32: "f",
    BOOL: "B", UINT64: "Q", INT64: "q", FLOAT64: "d",
}  # fmt: skip

_LONGEST_HEADER = 2**27  # bytes; a vocabulary of 128256 with its merges takes 8 MB
_MOST = 2**16  # keys, or tensors; the 405B has 1138
_LARGEST_SIZE = 2**31  # of one dimension

T = TypeVar("T")


class Array(NamedTuple):
    """An array in the header, checked and not yet read."""

    data: bytes  # the items, without their type and number
    value_type: int  # of the items: UINT8 and so on
    length: int  # how many items

    def values(self) -> list[int] | list[float] | list[str]:
        """The items as a list. Raises ValueError where a string is no UTF-8."""
        if self.value_type != STRING:
            return list(struct.unpack(f"<{self.length}{STRUCT_CODES[self.value_type]}", self.data))
        out, at = [], 0
        for _ in range(self.length):
            size = int.from_bytes(self.data[at : at + 8], "little")
            out.append(self.data[at + 8 : at + 8 + size].decode("utf-8"))
            at += 8 + size
        return out


Value = int | float | bool | str | Array


class Stored(NamedTuple):
    """A tensor in a file, not yet read."""

    file: Path
    shape: tuple[int, ...]  # the slowest dimension first
    tensor_type: GGMLType
    offset: int  # from the beginning of the file
    nbytes: int


@dataclass(frozen=True)
class GGUFFile:
    """What the header of one file says."""

    path: Path
    metadata: dict[str, Value]
    tensors: dict[str, Stored]

    def get(self, key: str, wanted: type[T], default: T | None = None) -> T:
        """The value of a key; ValueError where it is absent, without a default, or not `wanted`.

        A whole number is a float too, True is no number.
        """
        value = self.metadata.get(key, default)
        if value is None:
            raise ValueError(f"{self.path}: lacks the key {key}")
        if wanted is float and type(value) is int:
            value = float(value)
        if type(value) is not wanted:
            names = {int: "a whole number", float: "a number", bool: "true or false",
                     str: "a text", Array: "an array"}  # fmt: skip
            shown = "an array" if isinstance(value, Array) else f"{value!r:.40}"
            raise ValueError(f"{self.path}: {key} needs to be {names[wanted]}, is {shown}")
        return value

    def storage(self) -> torch.UntypedStorage:
        """Map the whole file: nothing is read until it is touched."""
        size = self.path.stat().st_size
        storage = torch.UntypedStorage.from_file(str(self.path), False, size)
        assert isinstance(storage, torch.UntypedStorage)
        return storage


def read_header(path: Path) -> GGUFFile:
    """Read the header of one file. Raises ValueError naming file and cause where it is not
    sound."""
    check_file(path)
    try:
        with path.open("rb") as stream:
            _check_magic(stream.read(64), path)
            with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Parser(data, path).file()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error


def _check_magic(head: bytes, path: Path) -> None:
    if not head:
        raise ValueError(f"{path}: is empty; download it again")
    if head.lstrip().startswith(b"<"):
        raise ValueError(f"{path}: is a web page or XML, no weights; download it again")
    if head.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path}: is a git-lfs pointer; fetch the file it stands for")
    if not head.startswith(MAGIC):
        raise ValueError(f"{path}: is no GGUF file: it begins with {head[:4]!r}, not {MAGIC!r}")


class _Parser:
    """Reads the mapped header from front to back; every step is checked before it is taken."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self.data, self.path = data, path
        self.at = len(MAGIC)
        self.end = min(len(data), _LONGEST_HEADER)

    def fail(self, message: str) -> ValueError:
        return ValueError(f"{self.path}: {message}")

    def file(self) -> GGUFFile:
        """The whole header, once its version, keys and tensors are checked."""
        version = self.number("I", "the version")
        if version & 0xFFFF == 0:
            raise self.fail("is a big-endian GGUF file; little-endian ones are read")
        if version not in (2, VERSION):
            raise self.fail(f"is GGUF version {version}; versions 2 and {VERSION} are read")
        n_tensors = self.count("tensors", 8 + 4 + 8 + 4 + 8)
        n_keys = self.count("keys", 8 + 4 + 1)
        metadata: dict[str, Value] = {}
        for _ in range(n_keys):
            key = self.text("a key")
            if key in metadata:
                raise self.fail(f"the key {key!r:.80} comes twice")
            metadata[key] = self.value(self.number("I", f"the type of {key:.80}"), key[:80])
        alignment = metadata.get("general.alignment", ALIGNMENT)
        if type(alignment) is not int or alignment not in [2**n for n in range(3, 21)]:
            shown = "an array" if isinstance(alignment, Array) else repr(alignment)
            raise self.fail(
                f"general.alignment is {shown:.40}; it needs to be a power of two from 8 to 2**20"
            )
        entries: dict[str, tuple[tuple[int, ...], GGMLType, int]] = {}
        for _ in range(n_tensors):
            name = self.text("a tensor's name")
            if name in entries:
                raise self.fail(f"the tensor {name!r:.80} comes twice")
            entries[name] = self.tensor(name[:80], alignment)
        return GGUFFile(self.path, metadata, self.located(entries, alignment))

    def skip(self, size: int, what: str) -> int:
        """The position of the next `size` bytes, after which reading goes on."""
        start = self.at
        if size > self.end - start:
            if self.end < len(self.data) and size <= len(self.data) - start:
                raise self.fail(f"the header is longer than {_LONGEST_HEADER} bytes, at {what}")
            raise self.fail(
                f"is cut short or broken: {what} of {size} bytes at byte {start} runs past the "
                f"file's {len(self.data)} bytes"
            )
        self.at += size
        return start

    def number(self, format: str, what: str) -> int:
        start = self.skip(struct.calcsize(format), what)
        value: int = struct.unpack_from(f"<{format}", self.data, start)[0]
        return value

    def count(self, what: str, least: int) -> int:
        """Read how many `what` follow, each of at least `least` bytes."""
        count = self.number("Q", f"the number of {what}")
        if count * least > len(self.data) - self.at:
            raise self.fail(f"claims {count} {what}, which is more than its bytes could hold")
        if count > _MOST:
            raise self.fail(f"claims {count} {what}; at most {_MOST} are read")
        return count

    def text(self, what: str) -> str:
        size = self.number("Q", f"the length of {what}")
        start = self.skip(size, what)
        try:
            return self.data[start : start + size].decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.fail(f"{what} at byte {start} is no UTF-8 text") from error

    def value(self, value_type: int, key: str) -> Value:
        if value_type == STRING:
            return self.text(f"the text of {key!r}")
        if value_type == ARRAY:
            return self.array(key)
        if value_type not in STRUCT_CODES:
            raise self.fail(f"the key {key!r} is of type {value_type}, which GGUF does not have")
        size = struct.calcsize(STRUCT_CODES[value_type])
        start = self.skip(size, f"the value of {key!r}")
        value: int | float = struct.unpack_from(f"<{STRUCT_CODES[value_type]}", self.data, start)[0]
        if value_type == BOOL and value not in (0, 1):
            raise self.fail(f"the key {key!r} is {value}, and needs to be true (1) or false (0)")
        return bool(value) if value_type == BOOL else value

    def array(self, key: str) -> Array:
        value_type = self.number("I", f"the type of the array {key!r}")
        count = self.number("Q", f"the length of the array {key!r}")
        if value_type == ARRAY:
            raise self.fail(f"the key {key!r} is an array of arrays, which is not read")
        if value_type != STRING and value_type not in STRUCT_CODES:
            raise self.fail(
                f"the key {key!r} is an array of type {value_type}, which GGUF does not have"
            )
        size = 8 if value_type == STRING else struct.calcsize(STRUCT_CODES[value_type])
        what = f"the array {key!r}"
        start = self.skip(count * size, what)
        if value_type == STRING:
            self.at = start
            self.skip(self.length_of_texts(start, count), what)
        return Array(self.data[start : self.at], value_type, count)

    def length_of_texts(self, start: int, count: int) -> int:
        """How many bytes `count` texts from `start` on take; more than there are where they run
        over."""
        length, data, at = struct.Struct("<Q").unpack_from, self.data, start
        for _ in range(count):
            if at + 8 > self.end:
                return at + 8 - start
            at += 8 + length(data, at)[0]
        return at - start

    def tensor(self, name: str, alignment: int) -> tuple[tuple[int, ...], GGMLType, int]:
        """Read shape, type and offset of one tensor, each checked by itself."""
        n_dims = self.number("I", f"the number of dimensions of {name!r}")
        if not 1 <= n_dims <= 4:
            raise self.fail(f"the tensor {name!r} has {n_dims} dimensions; 1 to 4 are possible")
        shape = tuple(self.number("Q", f"the shape of {name!r}") for _ in range(n_dims))[::-1]
        if not all(0 < size < _LARGEST_SIZE for size in shape):
            raise self.fail(f"the tensor {name!r} has the shape {shape}, with an impossible size")
        number = self.number("I", f"the type of {name!r}")
        if number not in GGML_TYPES:
            names = ", ".join(tensor_type.name for tensor_type in GGML_TYPES.values())
            raise self.fail(f"the tensor {name!r} is of type {number}; these are read: {names}")
        tensor_type = GGML_TYPES[number]
        if shape[-1] % tensor_type.block:
            raise self.fail(
                f"the tensor {name!r} has rows of {shape[-1]} numbers, and {tensor_type.name} "
                f"comes in blocks of {tensor_type.block}"
            )
        offset = self.number("Q", f"the offset of {name!r}")
        if offset % alignment:
            raise self.fail(f"the tensor {name!r} lies at {offset}, no multiple of {alignment}")
        return shape, tensor_type, offset

    def located(
        self, entries: dict[str, tuple[tuple[int, ...], GGMLType, int]], alignment: int
    ) -> dict[str, Stored]:
        """Every tensor with its bytes, which lie inside the file and in no other tensor."""
        begin = -(-self.at // alignment) * alignment
        tensors = {}
        for name, (shape, tensor_type, offset) in entries.items():
            nbytes = prod(shape) // tensor_type.block * tensor_type.size
            tensors[name] = Stored(self.path, shape, tensor_type, begin + offset, nbytes)
            if begin + offset + nbytes > len(self.data):
                raise self.fail(
                    f"is cut short or broken: the tensor {name!r:.80} of {nbytes} bytes at byte "
                    f"{begin + offset} runs past the file's {len(self.data)} bytes"
                )
        ordered = sorted(tensors, key=lambda name: tensors[name].offset)
        for name, after in pairwise(ordered):
            if tensors[name].offset + tensors[name].nbytes > tensors[after].offset:
                raise self.fail(f"the tensors {name!r:.80} and {after!r:.80} overlap")
        return tensors
