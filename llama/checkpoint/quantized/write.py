"""Quantized weights written once: a folder that `build` and all commands take like any other.

Streams: a block of one matrix is in memory at a time. What the folder holds is read by read.py. The
surprising thing: the file is not written from front to back. The scales of a matrix are known when
its rows are, but lie elsewhere, ordered by the size of a number, so that every tensor can be mapped
as it lies.
"""

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from math import prod
from pathlib import Path

import torch

from llama.checkpoint.meta.params import params_of
from llama.checkpoint.quantized.packing import pack_rows
from llama.checkpoint.quantized.read import FILE, KEY, VERSION
from llama.checkpoint.safetensors import header_of
from llama.checkpoint.source import Checkpoint, cast, rows_of
from llama.checkpoint.tokenizers import as_bytes, copies, files_of
from llama.files.checklist import write_checklist
from llama.files.new_folder import new_folder
from llama.quantization.packed import Format
from llama.quantization.recipe import Recipe, described, formats_of
from llama.terminal.progress import progress

logger = logging.getLogger(__name__)

_Layout = dict[str, tuple[tuple[int, ...], torch.dtype]]


def write_quantized(
    checkpoint: Checkpoint,
    dst: str | Path,
    recipe: Recipe,
    *,
    device: torch.device | str = "cpu",
    show_progress: bool = False,
) -> Path:
    """Quantize `checkpoint` by `recipe`, on `device`, to a new folder `dst`, with its tokenizer.

    Raises ValueError or OSError where that cannot be done, before anything is written where that
    can be known. An interrupted run leaves nothing under the name `dst`.
    """
    formats = formats_of(recipe, checkpoint.args)
    tokenizer = _tokenizer_files(checkpoint)
    layout = _layout(checkpoint, formats)
    size = sum(prod(shape) * dtype.itemsize for shape, dtype in layout.values())
    said = {
        "version": VERSION,
        "recipe": described(recipe),
        "dtype": str(checkpoint.dtype).removeprefix("torch."),
        "stop_token_ids": _stop_token_ids(checkpoint),
        "chat_template": checkpoint.chat_template,
    }
    header = header_of(layout, {"format": "pt", KEY: json.dumps(said)})
    with new_folder(dst, size) as part:
        with progress("quantizing", size, unit="B", enabled=show_progress) as advance:
            _write(part / FILE, header, layout, checkpoint, formats, torch.device(device), advance)
        text = json.dumps(params_of(checkpoint.args, say_tied=True)) + "\n"
        (part / "params.json").write_text(text, encoding="utf-8")
        for name, data in tokenizer.items():
            (part / name).write_bytes(data)
        with progress("checksums", size, unit="B", enabled=show_progress) as advance:
            write_checklist(part, advance)
    return Path(dst)


def _tokenizer_files(checkpoint: Checkpoint) -> dict[str, bytes]:
    """The tokenizer's files by name, also of one that came inside another file."""
    tokenizer, path = checkpoint.open_tokenizer(), checkpoint.tokenizer_path
    if tokenizer is None:
        logger.warning("%s has no tokenizer, so none is written", checkpoint.path)
        return {}
    if path is not None and not tokenizer.stated:
        return {"tokenizer.model": path.read_bytes()}
    template, context = checkpoint.chat_template, checkpoint.args.context_length
    texts = copies(checkpoint, tokenizer) or files_of(tokenizer, template, context)
    return {name: as_bytes(name, text) for name, text in texts.items()}


def _stop_token_ids(checkpoint: Checkpoint) -> list[int]:
    """The stop tokens that the folder states: those of the files beside the tokenizer, and its own
    where it came inside a file, as its new files do not say them all."""
    ids = list(checkpoint.stop_token_ids)
    tokenizer = checkpoint.open_tokenizer() if checkpoint.tokenizer_path is None else None
    own = () if tokenizer is None else tokenizer.stop_tokens
    return ids + sorted(t for t in own if t not in ids and t < checkpoint.args.vocab_size)


def _layout(checkpoint: Checkpoint, formats: Mapping[str, Format]) -> _Layout:
    """Shape and dtype of every tensor of the file, in its order: the widest numbers first."""
    tensors: _Layout = {}
    for name, source in checkpoint.tensors.items():
        format = formats.get(name)
        if format is None:
            tensors[name] = (source.shape, checkpoint.dtype)
            continue
        rows, columns = source.shape
        for piece, laid in format.layout(rows, columns).items():
            tensors[_piece(name, piece)] = laid
    return dict(sorted(tensors.items(), key=lambda item: -item[1][1].itemsize))


def _piece(name: str, piece: str) -> str:
    return name if piece == "weight" else f"{name}.{piece}"


def _write(
    file: Path,
    header: bytes,
    layout: _Layout,
    checkpoint: Checkpoint,
    formats: Mapping[str, Format],
    device: torch.device,
    advance: Callable[[int], object],
) -> None:
    offsets, at = {}, len(header)
    for name, (shape, dtype) in layout.items():
        offsets[name] = at
        at += prod(shape) * dtype.itemsize
    with file.open("wb") as stream:
        stream.write(header)
        stream.truncate(at)
        for name in checkpoint.tensors:
            for piece, raw in _blocks(checkpoint, name, formats.get(name), device):
                stream.seek(offsets[piece])
                stream.write(raw.numpy().data)
                offsets[piece] += raw.nbytes
                advance(raw.nbytes)


def _blocks(
    checkpoint: Checkpoint, name: str, format: Format | None, device: torch.device
) -> Iterator[tuple[str, torch.Tensor]]:
    """The bytes of a tensor, block by block, each with the name of the piece that it continues."""
    source = checkpoint.tensors[name]
    if format is None:
        for rows in rows_of(source):
            yield name, cast(name, rows, checkpoint.dtype)
        return
    for packed in pack_rows(source, format, 0, source.shape[0], device=device, name=name):
        for piece, tensor in packed._asdict().items():
            if tensor is not None:
                yield _piece(name, piece), tensor.cpu().contiguous().view(torch.uint8)
