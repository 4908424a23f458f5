"""Meta's files, read and written: params.json and consolidated.NN.pth.

Reading maps the files and looks at names, shapes and dtypes only; no weight is touched. Knows
neither devices nor ranks, and executes nothing that a file says (weights_only). The surprising
thing: tied matrices carry no mark in these files; that output.weight shares its storage with
tok_embeddings.weight is how Meta's 1B and 3B say it.
"""

import functools
import json
import logging
import math
import pickle
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama.checkpoint.names import ignored, shapes, shard_dim
from llama.checkpoint.params import complete, make_args, params_of, read_params
from llama.checkpoint.pth import Entry, write_pth
from llama.checkpoint.source import Checkpoint, LazyTensor, Part
from llama.model import ModelArgs

logger = logging.getLogger(__name__)

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class _Shards(LazyTensor):
    """The pieces of one tensor, one from each shard, to be joined along `dim`."""

    def __init__(self, pieces: list[Tensor], dim: int) -> None:
        self.pieces, self.dim = pieces, dim
        total = sum(piece.shape[dim] for piece in pieces)
        first = pieces[0]
        self.shape = (*first.shape[:dim], total, *first.shape[dim + 1 :])
        self.dtype = first.dtype

    def parts(self, dim: int = 0, start: int = 0, stop: int | None = None) -> Iterator[Part]:
        stop = start + self.range_shape(dim, start, stop)[dim]
        begin = 0
        for piece in self.pieces:
            end = begin + piece.shape[self.dim]
            if dim != self.dim:
                yield Part(self.dim, begin, piece.narrow(dim, start, stop - start))
            elif max(start, begin) < min(stop, end):
                low, high = max(start, begin), min(stop, end)
                yield Part(dim, low - start, piece.narrow(dim, low - begin, high - low))
            begin = end

    def mapped(self, dim: int = 0, start: int = 0, stop: int | None = None) -> Tensor | None:
        shape = self.range_shape(dim, start, stop)
        parts = list(self.parts(dim, start, stop))
        whole = len(parts) == 1 and any(parts[0].tensor.shape == p.shape for p in self.pieces)
        return parts[0].tensor if whole and parts[0].tensor.shape == shape else None


def open_meta(path: Path, overrides: Mapping[str, Any]) -> Checkpoint:
    """The checkpoint in a folder that holds params.json and consolidated.NN.pth.

    `overrides` are fields of ModelArgs that hold whatever params.json says. Raises
    FileNotFoundError or ValueError, naming the file, where anything is missing, unknown, or does
    not fit together.
    """
    files = find_shards(path)
    stated = read_params(path / "params.json") | dict(overrides)
    shards = [_map_shard(file) for file in files]
    params = complete(stated, path / "params.json", _vocabulary(shards), shards[0])
    args = make_args(params, path / "params.json")
    _check_names(args, shards, files)
    shared = all(_same_storage(shard) for shard in shards)
    if args.tied and not shared and "output.weight" in shards[0]:
        raise ValueError(
            f"{path}: params.json says tied, but output.weight is a tensor of its own; remove one"
        )
    if shared:
        args = make_args(params | {"tied": True}, path / "params.json")
    skipped = {name: reason for name in shards[0] if (reason := ignored(name)) is not None}
    if args.tied and "output.weight" in shards[0]:
        skipped["output.weight"] = "shares the storage of tok_embeddings.weight"
    tensors = {
        name: _join(name, shape, [shard[name] for shard in shards], path)
        for name, shape in shapes(args).items()
        if name in shards[0] and name not in skipped
    }
    if any(not torch.equal(shards[0]["norm.weight"], s["norm.weight"]) for s in shards[1:]):
        logger.warning("%s: the shards differ in norm.weight; are all of one model?", path)
    counted = params["vocab_size"] != stated.get("vocab_size")  # Llama 1 or 2, which Meta packed so
    tokenizers = (folder / "tokenizer.model" for folder in (path, *[path.parent] * counted))
    return Checkpoint(
        args=args,
        tensors=tensors,
        dtype=tensors["layers.0.attention.wq.weight"].dtype,
        path=path,
        shards=len(shards),
        skipped=skipped,
        tokenizer_path=next((file for file in tokenizers if file.is_file()), None),
    )


def _vocabulary(shards: list[dict[str, Tensor]]) -> int:
    """How many tokens the output matrix has a row for, 0 where it is not a matrix in each shard."""
    rows = [shard.get("output.weight") for shard in shards]
    return sum(len(row) for row in rows if row is not None and row.ndim == 2)


def find_shards(path: Path) -> list[Path]:
    """The files consolidated.NN.pth of a folder, in order, none missing and none double."""
    found: dict[int, Path] = {}
    for file in sorted(path.glob("consolidated.*.pth")):
        match = re.fullmatch(r"consolidated\.(\d{1,4})\.pth", file.name)
        if match is None:
            raise ValueError(
                f"{file}: shards are named consolidated.00.pth, consolidated.01.pth, ..."
            )
        if int(match[1]) in found:
            raise ValueError(
                f"{file} and {found[int(match[1])].name} are both shard {int(match[1])}"
            )
        if not file.is_file():
            raise ValueError(f"{file} is not a file")
        found[int(match[1])] = file
    missing = sorted(set(range(max(found, default=0) + 1)) - set(found))
    if missing:
        raise FileNotFoundError(
            f"{path / f'consolidated.{missing[0]:02}.pth'} is missing, of {max(found) + 1} shards"
        )
    return [found[number] for number in sorted(found)]


# --- shards ---------------------------------------------------------------------------------------


def _map_shard(file: Path) -> dict[str, Tensor]:
    """The tensors of one file, as views of its mapping."""
    try:
        with file.open("rb") as stream:
            head = stream.read(512)
    except OSError as error:
        raise ValueError(f"{file}: cannot be read: {error.strerror}") from error
    if not head:
        raise ValueError(f"{file}: is empty; download it again")
    if head.lstrip().startswith(b"<"):
        raise ValueError(f"{file}: is a web page or XML, no weights; download it again")
    if not head.startswith(b"PK\x03\x04"):
        raise ValueError(f"{file}: is no file that torch.save writes (a zip archive)")
    try:
        with zipfile.ZipFile(file) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise ValueError("it is compressed, which cannot be mapped")
        shard = torch.load(file, mmap=True, weights_only=True, map_location="cpu")
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{file}: holds something other than plain tensors, or is broken; nothing in it was run"
        ) from error
    except (zipfile.BadZipFile, RuntimeError, ValueError, LookupError, TypeError, AttributeError,
            EOFError, AssertionError, OSError, OverflowError, MemoryError) as error:  # fmt: skip
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{file}: is cut short or broken ({why:.120})") from error
    if not isinstance(shard, dict) or not all(isinstance(name, str) for name in shard):
        raise ValueError(f"{file}: holds no tensors by name")
    for name, tensor in shard.items():
        _check_tensor(name, tensor, file)
    return shard


def _check_tensor(name: str, tensor: object, file: Path) -> None:
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{file}: {name} is no tensor but {type(tensor).__name__}")
    if tensor.device.type != "cpu" or tensor.layout != torch.strided or not tensor.is_contiguous():
        raise ValueError(f"{file}: {name} is not stored as a plain, contiguous tensor")
    if tensor.dtype not in _DTYPES:
        raise ValueError(
            f"{file}: {name} is {tensor.dtype}; these are read: {', '.join(map(str, _DTYPES))}"
        )


def _check_names(args: ModelArgs, shards: list[dict[str, Tensor]], files: list[Path]) -> None:
    """Every shard holds every tensor and no other; the number of layers first: it may be absurd."""
    layers = {name.split(".")[1] for name in shards[0] if name.startswith("layers.")}
    if len(layers) != args.n_layers:
        raise ValueError(
            f"{files[0]}: holds {len(layers)} layers, and params.json says n_layers {args.n_layers}"
        )
    wanted = set(shapes(args)) - ({"output.weight"} if args.tied else set())
    for file, shard in zip(files, shards, strict=True):
        missing = sorted(wanted - set(shard))
        held = {name for name in shard if ignored(name) is None}
        unknown = sorted(held - wanted - {"output.weight"})
        if missing:
            raise ValueError(f"{file}: lacks {_some(missing)}")
        if unknown:
            raise ValueError(
                f"{file}: holds tensors that this model does not have: {_some(unknown)}"
            )
        if set(shard) != set(shards[0]):
            odd = sorted(set(shard) ^ set(shards[0]))
            raise ValueError(f"{file} and {files[0].name} differ in whether they hold {_some(odd)}")


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _same_storage(shard: dict[str, Tensor]) -> bool:
    if "output.weight" not in shard:
        return False
    output, embeddings = shard["output.weight"], shard["tok_embeddings.weight"]
    return output.data_ptr() == embeddings.data_ptr() and output.shape == embeddings.shape


def _join(name: str, shape: tuple[int, ...], pieces: list[Tensor], path: Path) -> LazyTensor:
    """The pieces as one tensor of `shape`. tok_embeddings may be cut along either dimension."""
    if len({piece.dtype for piece in pieces}) > 1:
        dtypes = ", ".join(str(piece.dtype) for piece in pieces)
        raise ValueError(f"{path}: {name} has another dtype in some shards: {dtypes}")
    cut = shard_dim(name)
    if cut is None and all(piece.shape == shape for piece in pieces):
        return _Shards(pieces[:1], 0)
    for dim in (0, 1) if name == "tok_embeddings.weight" else () if cut is None else (cut,):
        wanted = (*shape[:dim], shape[dim] // len(pieces), *shape[dim + 1 :])
        if shape[dim] % len(pieces) == 0 and all(piece.shape == wanted for piece in pieces):
            return _Shards(pieces, dim)
    raise ValueError(
        f"{path}: {name} should be {shape} in {len(pieces)} equal parts by params.json, and is "
        f"{_some([str(tuple(piece.shape)) for piece in pieces])} in the shards"
    )


# --- writing --------------------------------------------------------------------------------------


def write_meta(
    checkpoint: Checkpoint,
    out_dir: str | Path,
    *,
    shards: int = 1,
    dtype: torch.dtype | None = None,
    advance: Callable[[int], object] = lambda size: None,
) -> None:
    """Write a checkpoint as Meta's files, one tensor of one shard at a time in memory.

    Everything is written under temporary names and renamed when it is whole, params.json last.
    `advance` is told the bytes of weights as they are written. Raises ValueError where `shards`
    does not divide every dimension that is cut, and FileExistsError where the folder holds weights
    already.
    """
    check_shards(checkpoint.args, shards)
    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    there = [*out.glob("consolidated.*.pth"), *out.glob("params.json")]
    if there:
        raise FileExistsError(f"{there[0]} is there already; write to an empty folder")
    same = {"output.weight": "tok_embeddings.weight"} if checkpoint.args.tied else {}
    parts: dict[Path, Path] = {}
    try:
        for number in range(shards):
            final = out / f"consolidated.{number:02}.pth"
            parts[final] = final.with_name(final.name + ".part")
            write_pth(parts[final], _shard(checkpoint, number, shards, dtype), same, advance)
        final = out / "params.json"
        parts[final] = final.with_name(final.name + ".part")
        parts[final].write_text(json.dumps(params_of(checkpoint.args)) + "\n", encoding="utf-8")
        for final, part in parts.items():
            part.replace(final)
    finally:
        for part in parts.values():
            part.unlink(missing_ok=True)


def check_shards(args: ModelArgs, shards: int) -> None:
    """ValueError where a model cannot be written in so many files."""
    sizes = shapes(args).items()
    cuts = [shape[dim] for name, shape in sizes if (dim := shard_dim(name)) is not None]
    common = math.gcd(*cuts)
    if shards < 1 or common % shards:
        works = [n for n in range(1, min(common, 128) + 1) if common % n == 0]
        raise ValueError(f"shards={shards}: does not divide this model; these do: {works}")


def _shard(
    checkpoint: Checkpoint, number: int, shards: int, dtype: torch.dtype | None
) -> dict[str, Entry]:
    """The tensors of one shard, each read when it is written."""
    entries = {}
    for name, source in checkpoint.tensors.items():
        dim, parts = (0, 1) if (cut := shard_dim(name)) is None else (cut, shards)
        size = source.shape[dim] // parts
        shape = (*source.shape[:dim], size, *source.shape[dim + 1 :])
        first = number * size if parts > 1 else 0
        read = functools.partial(source.read, dim, first, first + size)
        entries[name] = Entry(shape, dtype or checkpoint.dtype, read)
    return entries
