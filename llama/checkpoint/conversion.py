"""A checkpoint into another format: which writer, and what goes with the weights.

Knows the formats that are written, by name; each says itself what it cannot express. The surprising
thing: nothing is converted by hand here. Every format is read as the same tensors, and written from
them.
"""

import logging
from collections.abc import Callable
from pathlib import Path

import torch

from llama.checkpoint.hf_write import write_hf
from llama.checkpoint.resharding import reshard
from llama.checkpoint.source import Checkpoint
from llama.templates import choose_format
from llama.tokenizer import ChatFormat
from llama.tokenizer_json import open_tokenizer

logger = logging.getLogger(__name__)


def convert(
    checkpoint: Checkpoint,
    dst: str | Path,
    kind: str,
    *,
    shards: int = 1,
    dtype: torch.dtype | None = None,
    show_progress: bool = False,
) -> None:
    """Write `checkpoint`, in `dtype` (None: its own), and its tokenizer to `dst`.

    `kind` is "meta", in `shards` files, or "hf". Raises ValueError or OSError where that cannot be
    done, before anything is written where that can be known.
    """
    if kind not in _WRITERS:
        raise ValueError(f"format {kind!r}: use one of {', '.join(_WRITERS)}")
    if shards != 1 and kind != "meta":
        raise ValueError(f"shards={shards}: only Meta's format is cut into shards")
    if checkpoint.tokenizer_path is None:
        logger.warning("%s has no tokenizer, so none is written", checkpoint.path)
    _WRITERS[kind](checkpoint, Path(dst), shards, dtype, show_progress)


def _to_meta(
    checkpoint: Checkpoint, dst: Path, shards: int, dtype: torch.dtype | None, show_progress: bool
) -> None:
    path = checkpoint.tokenizer_path
    if path is not None:
        tokenizer = open_tokenizer(path, checkpoint.version)
        if not isinstance(choose_format(tokenizer, checkpoint.chat_template), ChatFormat):
            logger.warning("Meta's files hold no chat template, so it is not written")
        if set(checkpoint.stop_token_ids) - tokenizer.stop_tokens:
            logger.warning("Meta's files hold no stop tokens, so they are not written")
    reshard(checkpoint, dst, shards=shards, dtype=dtype, show_progress=show_progress)


def _to_hf(
    checkpoint: Checkpoint, dst: Path, shards: int, dtype: torch.dtype | None, show_progress: bool
) -> None:
    path = checkpoint.tokenizer_path
    tokenizer = None if path is None else open_tokenizer(path, checkpoint.version)
    write_hf(checkpoint, dst, dtype=dtype, tokenizer=tokenizer, show_progress=show_progress)


_Writer = Callable[[Checkpoint, Path, int, torch.dtype | None, bool], None]
_WRITERS: dict[str, _Writer] = {"meta": _to_meta, "hf": _to_hf}
