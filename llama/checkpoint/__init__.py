"""Any format of weights on disk to tensors by their canonical names, unread, and back.

Ties the formats together; knows no rank, no kernel and nothing of how a model runs. The surprising
thing: opening a checkpoint reads no weights, however large it is.
"""

import dataclasses
import os
from pathlib import Path
from typing import Any

from llama.args import RopeScaling
from llama.checkpoint.convert import convert
from llama.checkpoint.gguf.read import find_gguf, is_gguf, open_gguf
from llama.checkpoint.gguf.write import write_gguf
from llama.checkpoint.hf.adapter import merge_adapter
from llama.checkpoint.hf.read import open_hf
from llama.checkpoint.hf.write import write_hf
from llama.checkpoint.meta.read import open_meta
from llama.checkpoint.meta.reshard import reshard
from llama.checkpoint.meta.write import write_meta
from llama.checkpoint.quantized.read import FILE as QUANTIZED
from llama.checkpoint.quantized.read import open_quantized
from llama.checkpoint.quantized.write import write_quantized
from llama.checkpoint.random import random_checkpoint
from llama.checkpoint.source import Checkpoint, LazyTensor, Part
from llama.checkpoint.stretching import check_rope_scaling, stretched
from llama.files.plain import check_file

__all__ = [
    "Checkpoint",
    "LazyTensor",
    "Part",
    "convert",
    "merge_adapter",
    "open_checkpoint",
    "random_checkpoint",
    "reshard",
    "write_gguf",
    "write_hf",
    "write_meta",
    "write_quantized",
]


def open_checkpoint(
    ckpt_dir: str | Path, *, rope_scaling: float | RopeScaling | None = None
) -> Checkpoint:
    """Look at the weights in a folder (or in its `original/`), or in a GGUF file, unread.

    rope_scaling replaces what is said there: a factor, 1 for none, or all four constants; see
    `stretched`. Raises FileNotFoundError or ValueError in one sentence where the folder is not what
    it should be.
    """
    check_rope_scaling(rope_scaling)
    overrides: dict[str, Any] = {}
    if isinstance(rope_scaling, RopeScaling):  # what the files say need not even be understood
        overrides = {"use_scaled_rope": True, "rope_scaling": rope_scaling}
    checkpoint = _open(Path(ckpt_dir), overrides)
    if rope_scaling is None:
        return checkpoint
    return dataclasses.replace(checkpoint, args=stretched(checkpoint.args, rope_scaling))


def _open(path: Path, overrides: dict[str, Any]) -> Checkpoint:
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no such folder")
    if path.is_dir():
        os.listdir(path)  # raises where it may not be read, which looks like an empty one below
    else:
        check_file(path)
        if is_gguf(path):
            return open_gguf(path, overrides)
        raise ValueError(
            f"{path} is a file; needed is a .gguf file, or the folder that holds params.json and "
            "consolidated.NN.pth (by how it begins, it is no GGUF file of another name)"
        )
    if os.path.lexists(path / QUANTIZED):
        return open_quantized(path, overrides)
    meta = _find_meta(path)
    if meta is not None:
        return open_meta(meta, overrides)
    gguf = None if (path / "config.json").exists() else find_gguf(path)
    if gguf is not None:
        return open_gguf(gguf, overrides)
    return open_hf(_check_hf(path), overrides)


def _find_meta(path: Path) -> Path | None:
    """The folder that holds params.json and shards; None where there is neither."""
    for folder in (path, path / "original"):
        has_params = os.path.lexists(folder / "params.json")
        has_shards = any(folder.glob("consolidated.*.pth"))
        if has_params and has_shards:
            return folder
        if (has_params or has_shards) and not (path / "config.json").exists():
            lacks = "consolidated.00.pth" if has_params else "params.json"
            raise FileNotFoundError(f"{folder / lacks} is missing; it belongs beside the others")
    return None


def _check_hf(path: Path) -> Path:
    """A folder that holds config.json, or an error that says what is there instead."""
    if (path / "config.json").exists():
        return path
    if (path / "adapter_config.json").exists():
        raise ValueError(f"{path}: is an adapter; give it as adapter= to the model that it is for")
    if any(path.glob("*.safetensors")):
        raise FileNotFoundError(f"{path / 'config.json'} is missing; it belongs beside the weights")
    raise FileNotFoundError(
        f"{path}: neither params.json nor consolidated.00.pth is in this folder, nor config.json"
    )
