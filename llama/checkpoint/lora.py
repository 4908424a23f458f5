"""LoRA adapters in PEFT's files, added to the weights as they are read.

W + scale * B A (Hu et al. 2021, arXiv 2106.09685), in float32 and a tile at a time. Knows which
settings of an adapter come to that, and refuses all others by name. The surprising thing: products
are always of the same tiles of a matrix, whatever part of it is read, so that the sum does not
depend on how many ranks share it.

Letters: O rows and I columns of a weight, R rank.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from llama.checkpoint.hf import hf_name, reorder, rotary_heads
from llama.checkpoint.names import shapes
from llama.checkpoint.safetensors import open_file, stored
from llama.checkpoint.source import Checkpoint, LazyTensor, Part
from llama.model import ModelArgs
from llama.strict_json import read_json

_TILE = 1024
_BLOCK = 2**24  # numbers that are added at a time
_PREFIX = "base_model.model."
_TARGETS = frozenset(
    ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head")
)
_READ = {"peft_type", "r", "lora_alpha", "use_rslora", "target_modules"}
# Settings that say where an adapter comes from, or matter in training only
_IGNORED = re.compile(
    r"auto_mapping|base_model_name_or_path|revision|inference_mode|task_type|lora_dropout"
    r"|init_lora_weights|exclude_modules|layers_(to_transform|pattern)|peft_version|runtime_config"
    r"|qalora_group_size|eva_config|corda_config|loftq_config|megatron_core|ensure_weight_tying"
)
_INITS = (True, False, None, "gaussian", "orthogonal", "eva")  # others change the base's weights
_FALSE: tuple[object, ...] = (None, False, [], {}, "none", "")
_WHAT = {
    "use_dora": "DoRA, which scales the sum",
    "modules_to_save": "whole modules besides the adapter",
    "fan_in_fan_out": "transposed weights",
    "bias": "biases, which Llama does not have",
    "lora_bias": "biases, which Llama does not have",
    "rank_pattern": "ranks by module",
    "alpha_pattern": "scales by module",
    "layer_replication": "layers that are there several times",
    "alora_invocation_tokens": "weights that depend on the text",
}


class Merged(LazyTensor):
    """`base` and `scale` times the product of `b` (O, R) and `a` (R, I), in float32."""

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
        """`piece` of the base, which begins at (row, column), with what belongs to it added."""
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


def merge_adapter(checkpoint: Checkpoint, folder: str | Path) -> Checkpoint:
    """`checkpoint` with the adapter in `folder` added, as its tensors are read.

    Raises FileNotFoundError or ValueError, naming file and cause, for an adapter that is not of
    this model's shape or is not LoRA as in the formula above.
    """
    path = Path(folder)
    config = path / "adapter_config.json"
    if not config.is_file():
        raise FileNotFoundError(f"{config} is missing: {path} holds no PEFT adapter")
    rank, scale = _read_config(config)
    file = path / "adapter_model.safetensors"
    if not file.exists():
        pickled = (path / "adapter_model.bin").exists()
        other = "; adapter_model.bin is a pickle and is not read" if pickled else ""
        raise FileNotFoundError(f"{file} is missing{other}")
    pairs = _read_pairs(file, checkpoint.args, rank)
    if "output.weight" in pairs and checkpoint.args.tied:
        raise ValueError(f"{file}: changes lm_head, which this model shares with its embeddings")
    merged = {name: Merged(checkpoint.tensors[name], b, a, scale) for name, (a, b) in pairs.items()}
    return replace(checkpoint, tensors={**checkpoint.tensors, **merged})


def _read_config(file: Path) -> tuple[int, float]:
    """Rank and scale; ValueError for a setting that the formula has no place for."""
    config = read_json(file)
    try:
        if config.get("peft_type") != "LORA":
            raise ValueError(f"is of peft_type {config.get('peft_type')!r:.40}; LORA is read")
        if config.get("task_type") not in (None, "CAUSAL_LM"):
            raise ValueError(f"is for the task {config['task_type']!r:.40}; CAUSAL_LM is read")
        for key, value in config.items():
            if not (key in _READ or _IGNORED.fullmatch(key) or value in _FALSE):
                what = f": {_WHAT[key]}" if key in _WHAT else ""
                raise ValueError(f"has {key} {value!r:.60}{what}; it cannot be merged")
        if config.get("init_lora_weights") not in _INITS:
            raise ValueError(
                f"has init_lora_weights {config['init_lora_weights']!r:.40}, which changes the "
                "base's weights; convert it to plain LoRA with PEFT"
            )
        targets = config.get("target_modules")
        names = targets if isinstance(targets, list) else []
        unknown = [name for name in names if str(name).rsplit(".")[-1] not in _TARGETS]
        if unknown:
            raise ValueError(
                f"changes {unknown[0]!r:.60}; these can be merged: {', '.join(sorted(_TARGETS))}"
            )
        rank, alpha = config.get("r"), config.get("lora_alpha", 8)
        if type(rank) is not int or not 0 < rank < 2**16:
            raise ValueError(f"r needs to be a whole number above 0, is {rank!r:.40}")
        if type(alpha) not in (int, float) or not math.isfinite(alpha):
            raise ValueError(f"lora_alpha needs to be a number, is {alpha!r:.40}")
        if not isinstance(config.get("use_rslora", False), bool):
            raise ValueError(f"use_rslora is {config['use_rslora']!r:.40}")
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _read_pairs(file: Path, args: ModelArgs, rank: int) -> dict[str, tuple[Tensor, Tensor]]:
    """A (R, I) and B (O, R) in float32 by canonical names, rows in the canonical order."""
    data, entries = open_file(file)
    sizes = {name: shape for name, shape in shapes(args).items() if len(shape) == 2}
    del sizes["tok_embeddings.weight"]
    canonical = {f"{_PREFIX}{hf_name(name).removesuffix('.weight')}": name for name in sizes}
    found: dict[str, dict[str, Tensor]] = {}
    for name, entry in entries.items():
        match = re.fullmatch(r"(.+)\.lora_([AB])\.weight", name)
        target = canonical.get(match[1]) if match else None
        if match is None or target is None:
            raise ValueError(f"{file}: {name:.120} is nothing that can be merged into this model")
        rows, columns = sizes[target]
        wanted = (rank, columns) if match[2] == "A" else (rows, rank)
        if entry.shape != wanted:
            raise ValueError(
                f"{file}: {name:.120} is {entry.shape}, and for this model and r {rank} it should "
                f"be {wanted}"
            )
        found.setdefault(target, {})[match[2]] = stored(name, data, entry, file).read().float()
    if not found:
        raise ValueError(f"{file}: holds no tensors")
    for target, pair in found.items():
        if len(pair) < 2:
            raise ValueError(f"{file}: has only lora_{next(iter(pair))} for {hf_name(target)}")
        if rotary_heads(target, args):
            pair["B"] = reorder(pair["B"], args.head_dim, to_pairs=True)
    return {target: (pair["A"], pair["B"]) for target, pair in found.items()}
