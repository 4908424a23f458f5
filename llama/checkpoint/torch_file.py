"""Files as torch.save writes them, a block of rows at a time in memory.

torch.save wants all tensors of a file at once, which for Meta's files is the model. Knows no names.
The surprising thing: such a file is a zip archive of a pickle and one entry per storage, and all of
it can be written with the standard library; torch.load, mapped or not, sees no difference.
"""

import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from io import BytesIO
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from llama.checkpoint.source import cast

_ALIGNMENT = 64  # of storages in the file, so that they can be used where they are mapped
_STORAGES = {
    torch.bfloat16: torch.BFloat16Storage,
    torch.float16: torch.HalfStorage,
    torch.float32: torch.FloatStorage,
}


@dataclass(frozen=True)
class Source:
    """A tensor to be written: its shape, and its rows from first to last in any blocks."""

    shape: tuple[int, ...]
    rows: Callable[[], Iterator[Tensor]]


@dataclass(frozen=True)
class _Storage:
    key: str
    dtype: torch.dtype
    size: int


class _Stub:
    """What is pickled in place of a tensor."""

    def __init__(self, storage: _Storage, shape: tuple[int, ...]) -> None:
        self.storage, self.shape = storage, shape

    def __reduce__(self) -> tuple[Any, ...]:
        strides = tuple(prod(self.shape[dim + 1 :]) for dim in range(len(self.shape)))
        hooks: OrderedDict[Any, Any] = OrderedDict()
        arguments = (self.storage, 0, self.shape, strides, False, hooks)
        return torch._utils._rebuild_tensor_v2, arguments


class _Pickler(pickle.Pickler):
    def persistent_id(self, obj: object) -> tuple[Any, ...] | None:
        if isinstance(obj, _Storage):
            return ("storage", _STORAGES[obj.dtype], obj.key, "cpu", obj.size)
        return None


def save_tensors(
    file: Path,
    tensors: Mapping[str, Source],
    dtype: torch.dtype,
    *,
    shared: Mapping[str, str],
    advance: Callable[[int], object],
) -> None:
    """Write a dict of tensors, cast to `dtype`; names of `shared` share the storage of another."""
    stubs = {
        name: _Stub(_Storage(str(key), dtype, prod(source.shape)), source.shape)
        for key, (name, source) in enumerate(tensors.items())
    }
    names = stubs | {name: stubs[other] for name, other in shared.items()}
    pickled = BytesIO()
    _Pickler(pickled, protocol=2).dump(names)
    with file.open("wb") as stream, zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("archive/data.pkl", pickled.getvalue())
        archive.writestr("archive/byteorder", "little")
        for name, source in tensors.items():
            entry = _aligned(f"archive/data/{stubs[name].storage.key}", stream)
            with archive.open(entry, "w", force_zip64=True) as data:
                for block in source.rows():
                    raw = cast(name, block, dtype)
                    data.write(raw.numpy().data)
                    advance(raw.nbytes)
        archive.writestr("archive/version", "3\n")


def _aligned(name: str, stream: BinaryIO) -> zipfile.ZipInfo:
    """An entry whose data begin at a multiple of the alignment: padded by an extra field."""
    entry = zipfile.ZipInfo(name)
    header = 30 + len(name) + 4 + 20  # of the zip format: fixed, name, our field's head, zip64
    padding = -(stream.tell() + header) % _ALIGNMENT
    entry.extra = struct.pack("<HH", 0x4246, padding) + b"Z" * padding
    return entry
