"""LoRA adapters in PEFT's files, added to the weights as they are read.

W + scale * B A (Hu et al. 2021, arXiv 2106.09685), in float32 and a tile at a time, where W may be
a whole matrix of the adapter's own. What its settings come to is read in adapter_config.py. The
surprising thing: products are always of the same tiles of a matrix, whatever part of it is read, so
that the sum does not depend on how many ranks share it.

Letters: O rows and I columns of a weight, R rank.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from llama.args import ModelArgs
from llama.checkpoint.hf.adapter_config import Settings, read_settings
from llama.checkpoint.hf.read import Reordered, hf_name, reorder, rotary_heads
from llama.checkpoint.safetensors import open_file, stored
from llama.checkpoint.source import Checkpoint, LazyTensor, Part
from llama.names import shapes

_TILE = 1024
_BLOCK = 2**24  # numbers that are added at a time
_PREFIX = "base_model.model."


class Merged(LazyTensor):
    """The sum of `base` and `scale` times the product of `b` (O, R) and `a` (R, I), in float32."""

    dtype = torch.float32

    def __init__(self, base: LazyTensor, b: Tensor, a: Tensor, scale: float) -> None:
        self.base, self.b, self.a, self.scale = base, b, a, scale
        self.shape, self.device = base.shape, base.device

    def parts(self, dim: int = 0, start: int = 0, stop: int | None = None) -> Iterator[Part]:
        shape = self.range_shape(dim, start, stop)
        for part in self.base.parts(dim, start, stop):
            length = part.tensor.shape[part.dim]
            other = math.prod(part.tensor.shape) // (length or 1)
            step = max(1, _BLOCK // (other or 1))
            for low in range(0, length, step):
                piece = part.tensor.narrow(part.dim, low, min(step, length - low))
                at = [0, 0]
                at[dim] += start
                at[part.dim] += part.offset + low
                assert piece.shape[1 - part.dim] == shape[1 - part.dim], (piece.shape, shape)
                yield Part(part.dim, part.offset + low, self._add(piece, at[0], at[1]))

    def _add(self, piece: Tensor, row: int, column: int) -> Tensor:
        """Add to `piece` of the base, which begins at (row, column), its part of the product."""
        out = piece.to(torch.float32, copy=True)
        rows, columns = row + out.shape[0], column + out.shape[1]
        for top in range(row // _TILE * _TILE, rows, _TILE):
            b = self.b[top : top + _TILE].to(piece.device)
            for left in range(column // _TILE * _TILE, columns, _TILE):
                tile = (b @ self.a[:, left : left + _TILE].to(piece.device)).mul_(self.scale)
                y, x = max(top, row), max(left, column)
                tile = tile[y - top : rows - top, x - left : columns - left]
                there = out[y - row :, x - column :]
                there[: tile.shape[0], : tile.shape[1]] += tile
        return out


class _Pair(NamedTuple):
    """The two matrices that an adapter adds to one weight."""

    a: Tensor  # (R, I)
    b: Tensor  # (O, R)
    scale: float  # of their product


def merge_adapter(checkpoint: Checkpoint, folder: str | Path) -> Checkpoint:
    """Add the adapter in `folder` to `checkpoint`, as its tensors are read.

    Where embeddings and output are one matrix and the adapter changes only one of them, they are
    two in the result. Raises FileNotFoundError or ValueError, naming file and cause, for an adapter
    that is not of this model's shape or is not LoRA as in the formula above.
    """
    path = Path(folder)
    config = path / "adapter_config.json"
    if not config.is_file():
        raise FileNotFoundError(f"{config} is missing: {path} holds no PEFT adapter")
    settings = read_settings(config)
    file = path / "adapter_model.safetensors"
    if not file.exists():
        pickled = (path / "adapter_model.bin").exists()
        other = "; adapter_model.bin is a pickle and is not read" if pickled else ""
        raise FileNotFoundError(f"{file} is missing{other}")
    pairs, whole = _read(file, checkpoint.args, settings)
    tensors, tied = _untied(checkpoint, pairs, whole, settings, config)
    for name, pair in pairs.items():
        tensors[name] = Merged(tensors[name], pair.b, pair.a, pair.scale)
    args = replace(checkpoint.args, tied=tied)
    return replace(checkpoint, args=args, tensors=tensors)


def _untied(
    checkpoint: Checkpoint,
    pairs: Mapping[str, _Pair],
    whole: Mapping[str, LazyTensor],
    settings: Settings,
    config: Path,
) -> tuple[dict[str, LazyTensor], bool]:
    """The matrices to which pairs are added, and whether output and embeddings are still one.

    A matrix in modules_to_save is a copy of its own. Any other whole matrix takes the place of
    what is there, for both of the two where they are one, as in PEFT.
    """
    tensors = {**checkpoint.tensors, **whole}
    ends = ("tok_embeddings.weight", "output.weight")
    if not checkpoint.args.tied:
        return tensors, False
    own = {name for name in ends if name in whole and hf_module(name) in settings.saved}
    shared = next((whole[name] for name in ends if name in whole and name not in own), None)
    base = shared or checkpoint.tensors[ends[0]]
    tensors |= {name: whole[name] if name in own else base for name in ends}
    if not own and not set(ends) & pairs.keys():
        del tensors[ends[1]]
        return tensors, True
    if settings.keeps_ties:
        raise ValueError(
            f"{config}: has ensure_weight_tying True and changes embeddings that this model shares "
            "with its output; merge it with PEFT"
        )
    return tensors, False


def hf_module(name: str) -> str:
    """The last part of a module's name in Hugging Face's files, which the settings use."""
    return hf_name(name).removesuffix(".weight").rsplit(".")[-1]


def _read(
    file: Path, args: ModelArgs, settings: Settings
) -> tuple[dict[str, _Pair], dict[str, LazyTensor]]:
    """Read pairs in float32, and whole tensors, by canonical names, rows in the canonical order."""
    data, entries = open_file(file)
    sizes = shapes(args)
    canonical = {f"{_PREFIX}{hf_name(name).removesuffix('.weight')}": name for name in sizes}
    found: dict[str, dict[str, Tensor]] = {}
    whole: dict[str, LazyTensor] = {}
    for name, entry in entries.items():
        match = _NAME.fullmatch(name)
        target = canonical.get(match["module"]) if match else None
        if match is None or target is None or (match["table"] and "tok_emb" not in target):
            raise ValueError(f"{file}: {name:.120} is nothing that can be merged into this model")
        half = match["half"]
        if half is None:
            wanted = sizes[target]
        else:
            rows, columns = sizes[target][:: -1 if match["table"] else 1]
            rank, _ = settings.of(hf_name(target).removesuffix(".weight"))
            wanted = (rank, columns) if half == "A" else (rows, rank)
        if entry.shape != wanted:
            with_rank = f" and r {rank}" if half else ""
            raise ValueError(
                f"{file}: {name:.120} is {entry.shape}, and for this model{with_rank} it should be "
                f"{wanted}"
            )
        tensor = stored(name, data, entry, file)
        heads = rotary_heads(target, args)
        if half is None:
            whole[target] = Reordered(tensor, heads, to_pairs=True) if heads else tensor
            continue
        if match["table"]:  # a table's product is the other way round: (B A)' = A' B'
            half = "B" if half == "A" else "A"
        matrix = tensor.read().float()
        found.setdefault(target, {})[half] = matrix.T.contiguous() if match["table"] else matrix
    if not found and not whole:
        raise ValueError(f"{file}: holds no tensors")
    _check_saved(file, settings, whole)
    for target, pair in found.items():
        if len(pair) < 2:
            raise ValueError(f"{file}: has only lora_{next(iter(pair))} for {hf_name(target)}")
        if rotary_heads(target, args):
            pair["B"] = reorder(pair["B"], args.head_dim, to_pairs=True)
    scales = {name: settings.of(hf_name(name).removesuffix(".weight"))[1] for name in found}
    return {n: _Pair(pair["A"], pair["B"], scales[n]) for n, pair in found.items()}, whole


_NAME = re.compile(
    r"(?P<module>.+?)(\.lora_(?P<table>embedding_)?(?P<half>[AB]))?((?(half)|\.base_layer))?"
    r"(?(table)|\.weight)"
)


def _check_saved(file: Path, settings: Settings, whole: Mapping[str, LazyTensor]) -> None:
    held = {hf_module(name) for name in whole}
    lacking = [name for name in settings.saved if name.rsplit(".")[-1] not in held]
    if lacking:
        raise ValueError(
            f"{file.with_name('adapter_config.json')}: has modules_to_save {lacking[0]!r:.60}, "
            f"whole modules besides the adapter, and {file.name} holds none of that name that this "
            "model has"
        )
