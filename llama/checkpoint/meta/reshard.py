"""A checkpoint into another number of files: any format in, Meta's format out.

Ties reading and writing together, with the tokenizer and checksums beside the weights; knows no
tensor.
"""

from pathlib import Path

import torch

from llama.checkpoint.meta.write import check_shards, write_meta
from llama.checkpoint.source import Checkpoint
from llama.checkpoint.tokenizers import meta_file
from llama.files.checklist import write_checklist
from llama.files.new_folder import new_folder
from llama.terminal.progress import progress


def reshard(
    checkpoint: Checkpoint,
    dst: str | Path,
    *,
    shards: int,
    dtype: torch.dtype | None = None,
    show_progress: bool = False,
) -> Path:
    """Write `checkpoint`, which must come from a folder, in `shards` files to a new folder `dst`.

    The folder gets tokenizer.model, where there is one, and checklist.chk. Raises ValueError or
    OSError where that cannot be done, before anything is written where that can be known.
    """
    check_shards(checkpoint.args, shards)
    ranks = meta_file(checkpoint)
    wanted = dtype or checkpoint.dtype
    size = checkpoint.parameters * wanted.itemsize
    with new_folder(dst, size) as part:
        with progress("writing", size, unit="B", enabled=show_progress) as advance:
            write_meta(checkpoint, part, shards=shards, dtype=wanted, advance=advance)
        if ranks is not None:
            (part / "tokenizer.model").write_bytes(ranks)
        with progress("checksums", size, unit="B", enabled=show_progress) as advance:
            write_checklist(part, advance)
    return Path(dst)
