"""Meta's files, read: params.json and consolidated.NN.pth.

Maps the files and looks at names, shapes and dtypes; of the weights only at those few that tell
shards of one model apart. Knows neither devices nor ranks. The surprising thing: tied matrices
carry no mark in these files; that output.weight shares its storage with tok_embeddings.weight is
how Meta's 1B and 3B say it.
"""

import logging
import os
import re
from collections.abc import Collection, Iterator, Mapping
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama.args import ModelArgs
from llama.checkpoint.meta.params import complete, make_args, read_params
from llama.checkpoint.meta.pth_read import map_shard
from llama.checkpoint.source import Checkpoint, LazyTensor, Part
from llama.names import ignored, shapes, shard_dim

logger = logging.getLogger(__name__)

# In no two shards of a model the same, of the same width in all of them
_CUT = ("layers.0.attention.wq.weight", "layers.0.feed_forward.w1.weight")


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
    shards = [map_shard(file) for file in files]
    params = complete(stated, path / "params.json", _vocabulary(shards), shards[0])
    args = make_args(params, path / "params.json")
    _check_names(args, shards, files)
    shared = all(_same_storage(shard) for shard in shards)
    if args.tied and not shared and not all(map(_same_numbers, shards)):
        raise ValueError(
            f"{path}: params.json says tied, but output.weight is a tensor of its own; remove one"
        )
    if shared:
        args = make_args(params | {"tied": True}, path / "params.json")
    skipped = {name: reason for name in shards[0] if (reason := ignored(name)) is not None}
    if args.tied and "output.weight" in shards[0]:
        skipped["output.weight"] = "is tok_embeddings.weight, to which it is tied"
    _check_count(args, shards, files)
    tensors = {
        name: _join(name, shape, [shard[name] for shard in shards], path)
        for name, shape in shapes(args).items()
        if name in shards[0] and name not in skipped
    }
    _check_siblings(shards, files)
    counted = params["vocab_size"] != stated.get("vocab_size")  # Llama 1 or 2, which Meta packed so
    tokenizers = [folder / "tokenizer.model" for folder in (path, *[path.parent] * counted)]
    return Checkpoint(
        args=args,
        tensors=tensors,
        dtype=tensors["layers.0.attention.wq.weight"].dtype,
        path=path,
        shards=len(shards),
        skipped=skipped,
        tokenizer_path=next((file for file in tokenizers if os.path.lexists(file)), None),
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
        found[int(match[1])] = file
    missing = sorted(set(range(max(found, default=0) + 1)) - set(found))
    if missing:
        raise FileNotFoundError(
            f"{path / f'consolidated.{missing[0]:02}.pth'} is missing, of {max(found) + 1} shards"
        )
    return [found[number] for number in sorted(found)]


# --- shards ---------------------------------------------------------------------------------------


def _check_names(args: ModelArgs, shards: list[dict[str, Tensor]], files: list[Path]) -> None:
    """Raise where a shard lacks a tensor or holds another; the number of layers comes first, for it
    may be absurd."""
    layers = {name.split(".")[1] for name in shards[0] if name.startswith("layers.")}
    if not layers:
        _check_prefix(shards[0], files[0])
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


def _check_prefix(names: Collection[str], file: Path) -> None:
    """ValueError where all names have something before them, which wrappers of models leave."""
    for name in sorted(names):
        match = re.fullmatch(r"(.+?)(?:layers\.\d+|tok_embeddings|norm|output)\..+", name)
        if match:
            raise ValueError(
                f"{file}: its tensors have {match[1]!r:.80} before the names that Meta's files "
                f"give them, such as {name:.120}; rename them, or save the inner model alone"
            )


def _check_count(args: ModelArgs, shards: list[dict[str, Tensor]], files: list[Path]) -> None:
    """Raise where the shapes in every shard say that there are more, or fewer, shards than here."""
    full = shapes(args)
    cuts = {
        full[name][0] / shard[name].shape[0]
        for name in (*_CUT, "output.weight")
        for shard in shards
        if name in shard and shard[name].ndim == 2 and shard[name].shape[0]
    }
    parts = cuts.pop() if len(cuts) == 1 else 0.0
    if parts > len(files) and parts.is_integer():
        missing = files[0].with_name(f"consolidated.{len(files):02}.pth")
        raise FileNotFoundError(
            f"{missing} is missing: {len(files)} of {parts:.0f} shards are here"
        )
    if 1 <= parts < len(files) and parts.is_integer():
        extra = files[int(parts)]
        raise ValueError(f"{extra} is too many: the model is cut into {parts:.0f}; remove it")


def _check_siblings(shards: list[dict[str, Tensor]], files: list[Path]) -> None:
    """Raise where what all shards of a model share differs, or where what is cut is the same.

    Norms are held whole by every shard. Copies that training let drift apart by a rounding are
    mentioned; anything more is another model.
    """
    norms = [name for name in shards[0] if name.endswith("norm.weight")]
    for file, shard in zip(files[1:], shards[1:], strict=True):
        pairs = [(shards[0][name].float(), shard[name].float()) for name in norms]
        if not all(torch.allclose(*pair, rtol=0.05) for pair in pairs):
            raise ValueError(f"{file} is of another model than {files[0].name}: its norms differ")
        if not all(torch.equal(*pair) for pair in pairs):
            logger.warning("%s and %s differ in their norms; one model?", file, files[0].name)
    rows = [torch.stack([shard[name][0] for name in _CUT]) for shard in shards]
    for (file, first), (other, second) in combinations(zip(files, rows, strict=True), 2):
        if first.any() and torch.equal(first, second):
            raise ValueError(f"{other} is the same as {file.name}, under another number")


def _some(names: list[str]) -> str:
    names = [name if len(name) <= 80 else f"{name[:80]}..." for name in names]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _same_storage(shard: dict[str, Tensor]) -> bool:
    if "output.weight" not in shard:
        return False
    output, embeddings = shard["output.weight"], shard["tok_embeddings.weight"]
    return output.data_ptr() == embeddings.data_ptr() and output.shape == embeddings.shape


def _same_numbers(shard: dict[str, Tensor]) -> bool:
    """Whether the output is the embeddings once more, in whatever bytes, or not there at all."""
    output = shard.get("output.weight")
    if output is None:
        return True
    table = shard["tok_embeddings.weight"]
    pairs = zip(torch.split(output, 1024), torch.split(table, 1024), strict=False)
    return output.shape == table.shape and all(torch.equal(a.float(), b.float()) for a, b in pairs)


def _join(name: str, shape: tuple[int, ...], pieces: list[Tensor], path: Path) -> LazyTensor:
    """Join the pieces to one tensor of `shape`. tok_embeddings may be cut along either
    dimension."""
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
