"""A checkpoint into another format: which writer, and what goes with the weights.

Knows the formats that are written, by name; each says itself what it cannot express. The surprising
thing: nothing is converted by hand here. Every format is read as the same tensors, and written from
them.
"""

import logging
from pathlib import Path

import torch

from llama.checkpoint.gguf_write import write_gguf
from llama.checkpoint.hf_write import write_hf
from llama.checkpoint.resharding import reshard
from llama.checkpoint.source import Checkpoint
from llama.templates import TemplateFormat, choose_format
from llama.tokenizer import TextTokenizer

TYPES = ("q8_0", "q4_0")

logger = logging.getLogger(__name__)


def convert(
    checkpoint: Checkpoint,
    dst: str | Path,
    kind: str,
    *,
    shards: int = 1,
    dtype: torch.dtype | None = None,
    type: str | None = None,
    show_progress: bool = False,
) -> None:
    """Write `checkpoint`, in `dtype` (None: its own), and its tokenizer to `dst`.

    `kind` is "meta", in `shards` files, "hf", or "gguf", quantized where `type` says so. Raises
    ValueError or OSError where that cannot be done, before anything is written where that can be
    known.
    """
    if kind not in ("meta", "hf", "gguf"):
        raise ValueError(f"format {kind!r}: use one of meta, hf, gguf")
    if shards != 1 and kind != "meta":
        raise ValueError(f"shards={shards}: only Meta's format is cut into shards")
    if type is not None and kind != "gguf":
        raise ValueError(f"type={type!r}: only gguf has types")
    if type is not None and type not in TYPES:
        raise ValueError(f"type={type!r}: use one of {', '.join(TYPES)}")
    tokenizer = checkpoint.open_tokenizer()
    if tokenizer is None:
        logger.warning("%s has no tokenizer, so none is written", checkpoint.path)
    if kind == "meta":
        _say_what_is_left_out(checkpoint, tokenizer)
        reshard(checkpoint, dst, shards=shards, dtype=dtype, show_progress=show_progress)
    elif kind == "gguf":
        write_gguf(
            checkpoint,
            dst,
            dtype=dtype,
            type=type,  # type: ignore[arg-type]
            tokenizer=tokenizer,
            show_progress=show_progress,
        )
    else:
        write_hf(
            checkpoint,
            dst,
            dtype=dtype,
            tokenizer=tokenizer,
            with_checklist=True,
            show_progress=show_progress,
        )


def _say_what_is_left_out(checkpoint: Checkpoint, tokenizer: TextTokenizer | None) -> None:
    if tokenizer is None:
        return
    if isinstance(choose_format(tokenizer, checkpoint.chat_template), TemplateFormat):
        logger.warning("Meta's files hold no chat template, so it is not written")
    if set(checkpoint.stop_token_ids) - tokenizer.stop_tokens:
        logger.warning("Meta's files hold no stop tokens, so they are not written")
