"""Hugging Face folders, written: what transformers and everything that reads its files can load.

Holds a few tensors at a time. Knows no device. Of the files, which get their names when all are
whole, config.json comes last: a folder without it is no model to anybody.
"""

from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch

from llama.checkpoint.hf.config import config_of
from llama.checkpoint.hf.read import INDEX, SINGLE, Reordered, hf_name, rotary_heads
from llama.checkpoint.safetensors import write_file
from llama.checkpoint.source import Checkpoint, LazyTensor
from llama.checkpoint.tokenizers import Texts, as_bytes, files_of
from llama.files.checklist import CHECKLIST, checklist
from llama.files.new_folder import new_files
from llama.terminal.progress import progress
from llama.text.templates import LLAMA3_TEMPLATE
from llama.tokenizer.protocols import TextTokenizer

# Files of a model, in any format, beside which another is not written.
_OTHERS = ("model*.safetensors*", "config.json", "consolidated.*.pth", "params.json", CHECKLIST)
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def write_hf(
    checkpoint: Checkpoint,
    out_dir: str | Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5 * 10**9,
    tokenizer: TextTokenizer | None = None,
    tokenizer_files: Texts | None = None,
    with_checklist: bool = False,
    show_progress: bool = False,
) -> None:
    """Write a checkpoint, in `dtype` (None: its own), and its tokenizer as a Hugging Face folder.

    More than `max_shard_bytes` are cut into several files between tensors. Without `tokenizer` the
    folder has none; SentencePiece's is written as tokenizer.model. `tokenizer_files` are written
    as they are in place of files for it. `with_checklist` adds
    checklist.chk, by which `verify` knows the files. Raises FileExistsError where the
    folder holds weights already, and ValueError for a dtype that is not one of weights, or a
    tokenizer that has no file here.
    """
    wanted = checkpoint.dtype if dtype is None else dtype
    if wanted not in _DTYPES:
        raise ValueError(f"dtype={dtype!r}: use one of {', '.join(map(str, _DTYPES))}")
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes={max_shard_bytes}: must be positive")
    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    there = [file for name in _OTHERS for file in out.glob(name)
             if not file.name.endswith(".part")]  # fmt: skip
    if there:
        raise FileExistsError(f"{there[0]} is there already; write to an empty folder")
    tensors = _hf_tensors(checkpoint)
    files = _shards(tensors, wanted.itemsize, max_shard_bytes)
    texts = _texts(checkpoint, wanted, tokenizer, tokenizer_files or {})
    if len(files) > 1:
        texts = {INDEX: _index(files, tensors, wanted.itemsize), **texts}
    total = sum(prod(tensor.shape) for tensor in tensors.values()) * wanted.itemsize
    with progress("writing weights", total, unit="B", enabled=show_progress) as advance:
        _write_all(out, files, texts, wanted, advance, with_checklist)


def _hf_tensors(checkpoint: Checkpoint) -> dict[str, LazyTensor]:
    """The tensors by Hugging Face's names, q and k with their rows in its order."""
    tensors: dict[str, LazyTensor] = {}
    for name, source in checkpoint.tensors.items():
        heads = rotary_heads(name, checkpoint.args)
        if heads and isinstance(source, Reordered) and source.to_pairs:
            source = source.source  # as it was
        elif heads:
            source = Reordered(source, heads, to_pairs=False)
        tensors[hf_name(name)] = source
    return tensors


def _shards(
    tensors: Mapping[str, LazyTensor], itemsize: int, limit: int
) -> dict[str, dict[str, LazyTensor]]:
    """The tensors of each file by its name; a tensor larger than the limit has its own."""
    shards: list[dict[str, LazyTensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        more = prod(tensor.shape) * itemsize
        if shards[-1] and size + more > limit:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += more
    if len(shards) == 1:
        return {SINGLE: shards[0]}
    count = len(shards)
    return {f"model-{i:05}-of-{count:05}.safetensors": s for i, s in enumerate(shards, start=1)}


def _index(
    files: Mapping[str, Mapping[str, LazyTensor]], tensors: Mapping[str, LazyTensor], itemsize: int
) -> dict[str, Any]:
    total = sum(prod(tensor.shape) for tensor in tensors.values()) * itemsize
    file_of = {name: file for file, held in files.items() for name in held}
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(file_of.items()))}


def _texts(
    checkpoint: Checkpoint, dtype: torch.dtype, tokenizer: TextTokenizer | None, copied: Texts
) -> Texts:
    """The small files, in the order in which they are to appear."""
    args = checkpoint.args
    ids: dict[str, Any] = {}
    texts: Texts = dict(copied)
    stops = set(checkpoint.stop_token_ids)
    if tokenizer is not None:
        known = {word.content: word.id for word in tokenizer.added}
        for key in ("bos_token", "pad_token"):
            token = known.get(tokenizer.names.get(key, ""))
            if token is not None and token < args.vocab_size:
                ids[f"{key}_id"] = token
        stops |= {token for token in tokenizer.stop_tokens if token < args.vocab_size}
        template = checkpoint.chat_template
        unstated = template is None and not tokenizer.stated  # Meta's files never say one
        if unstated and "<|start_header_id|>" in tokenizer.special_tokens:
            template = LLAMA3_TEMPLATE
        texts = texts or files_of(tokenizer, template, args.context_length)
    if stops:
        as_stated = copied and checkpoint.stop_token_ids
        ids["eos_token_id"] = list(checkpoint.stop_token_ids) if as_stated else sorted(stops)
    texts["generation_config.json"] = ids
    dtype_name = str(dtype).removeprefix("torch.")
    texts["config.json"] = config_of(args, dtype_name, ids)
    return texts


def _write_all(
    out: Path,
    files: Mapping[str, Mapping[str, LazyTensor]],
    texts: Texts,
    dtype: torch.dtype,
    advance: Callable[[int], object],
    with_checklist: bool,
) -> None:
    """Write every file; all get their names together, config.json last, or none is left."""
    with new_files(out) as part:
        sums = part(CHECKLIST) if with_checklist else None
        for name, held in files.items():
            write_file(part(name), held, dtype, advance)
        for name, text in texts.items():
            part(name).write_bytes(as_bytes(name, text))
        if sums is not None:
            listed = {name: part(name) for name in sorted((*files, *texts))}
            sums.write_text(checklist(listed), encoding="ascii")
