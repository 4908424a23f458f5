"""Writes the file that torch.save would, a tensor at a time: torch.save wants them all in memory.

Knows the layout of that file (a zip archive of stored entries, a pickle that refers to them) and
nothing of models. Every tensor's bytes begin at a multiple of 64 in the file, by a filler in the
entry's header, so that a mapped tensor is an aligned one.
"""

import io
import pickle
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._utils import _rebuild_tensor_v2

from llama.checkpoint.source import cast

_ALIGNMENT = 64
_HEADER = 30  # bytes of a local header without name and extra fields
_ZIP64 = 20  # bytes of the extra field with 64-bit sizes, which every tensor gets
_BLOCK = 2**24  # numbers that are cast at a time
_STORAGES = {
    torch.bfloat16: torch.BFloat16Storage,
    torch.float16: torch.HalfStorage,
    torch.float32: torch.FloatStorage,
}


@dataclass(frozen=True)
class Entry:
    """A tensor to be written, in `dtype`: `read` is called just before, and may give another
    one."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]


@dataclass(frozen=True)
class _Storage:
    """Stands for the bytes in the archive's entry data/KEY."""

    key: str
    dtype: torch.dtype
    numel: int


@dataclass(frozen=True)
class _Reference:
    """Pickled as the call that makes a tensor of a storage."""

    storage: _Storage
    shape: tuple[int, ...]

    def __reduce__(self) -> tuple[Any, ...]:
        strides = torch.empty(self.shape, device="meta").stride()
        return _rebuild_tensor_v2, (self.storage, 0, self.shape, strides, False, OrderedDict())


class _Pickler(pickle.Pickler):
    def persistent_id(self, obj: object) -> tuple[Any, ...] | None:
        if isinstance(obj, _Storage):
            return "storage", _STORAGES[obj.dtype], obj.key, "cpu", obj.numel
        return None


def write_pth(
    file: Path,
    entries: Mapping[str, Entry],
    same: Mapping[str, str],
    advance: Callable[[int], object],
) -> None:
    """Write tensors by name; `same` maps further names to those whose storage they share."""
    storages = {
        name: _Storage(str(key), entry.dtype, torch.Size(entry.shape).numel())
        for key, (name, entry) in enumerate(entries.items())
    }
    references = {
        name: _Reference(storages[of], entries[of].shape)
        for name, of in [*((name, name) for name in entries), *same.items()]
    }
    pickled = io.BytesIO()
    _Pickler(pickled, protocol=2).dump(references)
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", pickled.getvalue())
        archive.writestr("archive/byteorder", sys.byteorder)
        for name, entry in entries.items():
            tensor = entry.read()
            assert tensor.shape == entry.shape, (name, tensor.shape, entry.shape)
            path = f"archive/data/{storages[name].key}"
            _write(archive, path, name, tensor, entry.dtype, advance)
        archive.writestr("archive/version", "3\n")


def _write(
    archive: zipfile.ZipFile,
    path: str,
    name: str,
    tensor: Tensor,
    dtype: torch.dtype,
    advance: Callable[[int], object],
) -> None:
    info = zipfile.ZipInfo(path)
    assert archive.fp is not None
    before = archive.fp.tell() + _HEADER + len(path) + _ZIP64 + 4  # 4: the filler's own header
    filler = -before % _ALIGNMENT
    info.extra = b"FB" + filler.to_bytes(2, "little") + bytes(filler)
    rows = max(1, _BLOCK // (tensor[:1].numel() or 1))
    with archive.open(info, "w", force_zip64=True) as stream:
        for block in torch.split(tensor, rows):
            numbers = cast(name, block, dtype)
            stream.write(numbers.numpy().data)
            advance(numbers.nbytes)
