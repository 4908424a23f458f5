"""Files and folders that appear whole or not at all.

Everything is written under the name NAME.part, which becomes NAME when all is whole; so a run that
was interrupted can never be taken for one that was not. Knows nothing of what is written.
"""

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path


@contextlib.contextmanager
def new_files(folder: Path) -> Iterator[Callable[[str], Path]]:
    """Files of a folder that get their names together, in the order in which they were asked for.

    The block is given a function from the name of a file to the path to write it to. Where the
    block ends well, each file takes the place of what has its name; else none of them is left.
    """
    parts: dict[str, Path] = {}

    def part(name: str) -> Path:
        return parts.setdefault(name, folder / f"{name}.part")

    try:
        yield part
        for name, file in parts.items():
            file.replace(folder / name)
    finally:
        for file in parts.values():
            file.unlink(missing_ok=True)


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
