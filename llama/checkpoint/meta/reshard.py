"""A checkpoint into another number of files: any format in, Meta's format out.

Ties reading and writing together, with the tokenizer and checksums beside the weights; knows no
tensor. The surprising thing: everything is made in a folder DST.part, which gets its name when all
is whole, so a run that was interrupted can never be taken for one that was not.
"""

import contextlib
import hashlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch

from llama.checkpoint.meta.read import check_shards, write_meta
from llama.checkpoint.source import Checkpoint
from llama.checkpoint.tokenizers import meta_file
from llama.terminal.progress import progress

_BLOCK = 2**22


def reshard(
    checkpoint: Checkpoint,
    dst: str | Path,
    *,
    shards: int,
    dtype: torch.dtype | None = None,
    show_progress: bool = False,
) -> Path:
    """Write `checkpoint`, which must come from a folder, in `shards` files to a new folder `dst`.

    With tokenizer.model, where there is one, and checklist.chk. Raises ValueError or OSError where
    that cannot be done, before anything is written where that can be known.
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


@contextlib.contextmanager
def new_folder(dst: str | Path, size: int) -> Iterator[Path]:
    """A folder DST.part to write `size` bytes to; DST when the block ends well, gone otherwise.

    Raises FileExistsError where one of the two is in use, and ValueError where the disk is too
    full.
    """
    dst = Path(dst)
    part = _beside(dst)
    existing = next(folder for folder in dst.absolute().parents if folder.exists())
    try:
        free = shutil.disk_usage(existing).free
    except (OSError, AttributeError):  # what does not say is full when it is full
        free = size
    if free < size:
        raise ValueError(
            f"{dst} needs {size / 1e9:.1f} GB, and its disk has {free / 1e9:.1f} GB free"
        )
    part.mkdir(parents=True)
    try:
        yield part
        if dst.is_dir():
            dst.rmdir()  # empty; Windows renames onto no folder
        part.rename(dst)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def _beside(dst: Path) -> Path:
    """The folder DST.part; FileExistsError where one of the two is in use."""
    if dst.exists() and not dst.is_dir():
        raise FileExistsError(f"{dst} is a file; give a new or empty folder")
    if dst.is_dir() and any(dst.iterdir()):
        raise FileExistsError(f"{dst} is not empty; give a new or empty folder")
    named = dst if dst.name else dst.absolute()  # "." is not
    part = named.with_name(named.name + ".part")
    if part.exists():
        raise FileExistsError(f"{part} is left of a run that was interrupted; remove it first")
    return part


def write_checklist(folder: Path, advance: Callable[[int], object]) -> None:
    """checklist.chk of the files of a folder."""
    text = checklist({file.name: file for file in sorted(folder.iterdir())}, advance)
    (folder / "checklist.chk").write_text(text, encoding="ascii")


def checklist(files: Mapping[str, Path], advance: Callable[[int], object]) -> str:
    """Files by their names in the format of md5sum, as Meta's downloads have it."""
    lines = []
    for name, file in files.items():
        digest = hashlib.md5(usedforsecurity=False)
        with file.open("rb") as stream:
            while block := stream.read(_BLOCK):
                digest.update(block)
                advance(len(block))
        lines.append(f"{digest.hexdigest()}  {name}\n")
    return "".join(lines)
