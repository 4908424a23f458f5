"""A checkpoint into another format: which writer, and what goes with the weights.

Knows the formats that are written, by name; each says itself what it cannot express. The surprising
thing: what was written is read again, and what it makes of the tokenizer compared: whatever became
other is named.
"""

import logging
from pathlib import Path

import torch

from llama.checkpoint.gguf.read import open_gguf
from llama.checkpoint.gguf.write import write_gguf
from llama.checkpoint.hf.read import open_hf
from llama.checkpoint.hf.write import write_hf
from llama.checkpoint.meta.read import open_meta
from llama.checkpoint.meta.reshard import reshard
from llama.checkpoint.source import Checkpoint
from llama.checkpoint.tokenizers import changes, copies
from llama.files.new_folder import new_folder

TYPES = ("q8_0", "q4_0")

logger = logging.getLogger(__name__)


def convert(
    checkpoint: Checkpoint,
    dst: str | Path,
    format: str,
    *,
    shards: int = 1,
    dtype: torch.dtype | None = None,
    type: str | None = None,
    show_progress: bool = False,
) -> None:
    """Write `checkpoint`, in `dtype` (None: its own), and its tokenizer to `dst`.

    `format` is "meta", in `shards` files, "hf", or "gguf", quantized where `type` says so. Raises
    ValueError or OSError where that cannot be done, before anything is written where that can be
    known.
    """
    if format not in ("meta", "hf", "gguf"):
        raise ValueError(f"format {format!r}: use one of meta, hf, gguf")
    if shards != 1 and format != "meta":
        raise ValueError(f"shards={shards}: only Meta's format is cut into shards")
    if type is not None and format != "gguf":
        raise ValueError(f"type={type!r}: only gguf has types")
    if type is not None and type not in TYPES:
        raise ValueError(f"type={type!r}: use one of {', '.join(TYPES)}")
    tokenizer = checkpoint.open_tokenizer()
    if tokenizer is None:
        logger.warning("%s has no tokenizer, so none is written", checkpoint.path)
    if format == "meta":
        reshard(checkpoint, dst, shards=shards, dtype=dtype, show_progress=show_progress)
    elif format == "gguf":
        write_gguf(
            checkpoint,
            dst,
            dtype=dtype,
            type=type,  # type: ignore[arg-type]
            tokenizer=tokenizer,
            show_progress=show_progress,
        )
    else:
        size = checkpoint.parameters * (dtype or checkpoint.dtype).itemsize
        with new_folder(dst, size) as part:
            write_hf(
                checkpoint,
                part,
                dtype=dtype,
                tokenizer=tokenizer,
                tokenizer_files=None if tokenizer is None else copies(checkpoint, tokenizer),
                with_checklist=True,
                show_progress=show_progress,
            )
    if tokenizer is not None and tokenizer.stated:
        for change in changes(checkpoint, _reopened(Path(dst), format), tokenizer):
            logger.warning("%s: in this format, %s", dst, change)


def _reopened(path: Path, format: str) -> Checkpoint:
    """Open what was written with the reader of its format."""
    readers = {"meta": open_meta, "gguf": open_gguf, "hf": open_hf}
    return readers[format](path, {})
