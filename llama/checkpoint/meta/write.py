"""Meta's files, written: params.json and consolidated.NN.pth, in any number of shards.

Knows how Meta cuts a model and holds one tensor of one shard at a time; refuses to know devices and
ranks.
"""

import functools
import json
import math
from collections.abc import Callable
from pathlib import Path

import torch

from llama.args import ModelArgs
from llama.checkpoint.meta.params import params_of
from llama.checkpoint.meta.pth_write import Entry, write_pth
from llama.checkpoint.source import Checkpoint
from llama.files.new_folder import new_files
from llama.names import shapes, shard_dim


def write_meta(
    checkpoint: Checkpoint,
    out_dir: str | Path,
    *,
    shards: int = 1,
    dtype: torch.dtype | None = None,
    advance: Callable[[int], object] = lambda size: None,
) -> None:
    """Write a checkpoint as Meta's files, one tensor of one shard at a time in memory.

    The files get their names when all are whole, params.json last.
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
    with new_files(out) as part:
        for number in range(shards):
            file = part(f"consolidated.{number:02}.pth")
            write_pth(file, _shard(checkpoint, number, shards, dtype), same, advance)
        params = json.dumps(params_of(checkpoint.args))
        part("params.json").write_text(params + "\n", encoding="utf-8")


def check_shards(args: ModelArgs, shards: int) -> None:
    """Raise ValueError where a model cannot be written in so many files."""
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
