"""Checklists of a model's files: whether the files are what one says, and writing one.

Knows checklists in md5sum's format, as they come with Meta's weights; refuses to know what a
checkpoint is: nothing here opens a tensor or imports torch. It runs on Python 3.9, for downloads
before anything is installed. The surprising thing: a weight file that no checklist lists is a
problem too, as the loader would read it; a LICENSE is not.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from threading import Event, Lock

from llama.terminal.progress import Advance, progress

CHECKLIST = "checklist.chk"
_BLOCK = 2**23  # bytes read at a time: large enough for any disk, small enough to stop soon
_LINE = re.compile(r"(?P<digest>[0-9a-fA-F]+)[ \t]+\*?(?P<name>\S.*?)\s*")
_ALGORITHMS = {32: "md5", 64: "sha256"}  # by hexadecimal digits


@dataclass(frozen=True)
class Listed:
    """A line of a checklist."""

    name: str  # of the file
    digest: str  # in hexadecimal digits
    algorithm: str  # md5 or sha256
    checklist: str  # the name of the checklist
    line: int  # of it


def verify(ckpt_dir: str | Path) -> list[str]:
    """Compare the files of a folder (or of its `original/`) with checklist.chk.

    The value has a sentence for each file that is missing, different, unreadable, unfinished
    (.part) or a shard that no checklist lists, and is empty where all is well. Raises
    FileNotFoundError where there is no folder or no checklist, and ValueError where a checklist
    itself is wrong: not in md5sum's format, contradictory, or naming a file outside the folder.
    """
    folder = _find_folder(Path(ckpt_dir))
    listed: dict[str, Listed] = {}
    for path in sorted(folder.glob(f"*{CHECKLIST}")):  # Llama 2 has one for the tokenizer too
        for entry in _within_folder(path):
            other = listed.setdefault(entry.name, entry)
            if other.digest != entry.digest:
                raise ValueError(
                    f"{path} lists {entry.name} as {entry.digest}, and {other.checklist} as "
                    f"{other.digest}; download the checklist again"
                )
    problems = _compare(folder, list(listed.values()))
    for path in folder.iterdir():
        if path.suffix == ".part":
            problems[path.name] = f"{path} is unfinished; run the same download again to go on"
        elif path.name not in listed and _is_weights(path, listed):
            problems[path.name] = f"{path} is in no checklist; remove it if it is of another model"
    return [problems[name] for name in sorted(problems)]


def _is_weights(path: Path, listed: Collection[str]) -> bool:
    """Whether the loader would read a file as weights of the model that the checklist lists."""
    ours = path.name == "quantized.safetensors" or "config.json" in listed
    return path.suffix == ".pth" or (path.suffix == ".safetensors" and ours)


def _find_folder(path: Path) -> Path:
    if path.is_file():
        raise FileNotFoundError(
            f"{path} is not a folder; a checklist lists files beside it, and one alone has none"
        )
    if not path.is_dir():
        what = "is not a folder" if path.exists() else "does not exist"
        raise FileNotFoundError(f"{path} {what}; the folder that holds checklist.chk is needed")
    for folder in (path, path / "original"):
        if (folder / CHECKLIST).is_file():
            return folder
    raise FileNotFoundError(
        f"{path / CHECKLIST} is missing, and without it there is nothing to compare with; "
        "Meta's downloads (download.sh) have one, and so do folders that convert, reshard and "
        "quantize write"
    )


def read_checklist(path: Path) -> list[Listed]:
    """The lines of a checklist; ValueError where it is empty or not in md5sum's format.

    Names are as they stand there, and may be paths.
    """
    text = path.read_bytes().decode("utf-8-sig", errors="replace")
    entries = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        match = _LINE.fullmatch(line.strip())
        algorithm = _ALGORITHMS.get(len(match["digest"])) if match else None
        if match is None or algorithm is None:
            raise ValueError(
                f"{path}, line {number}, is not 'checksum  file' with an MD5 or SHA-256: "
                f"{line.strip()[:60]!r}; download the checklist again"
            )
        entries.append(Listed(match["name"], match["digest"].lower(), algorithm, path.name, number))
    if not entries:
        raise ValueError(f"{path} is empty; download the checklist again")
    return entries


def _within_folder(path: Path) -> Iterator[Listed]:
    """The lines of a checklist; ValueError where one names a file that is not in its folder."""
    for entry in read_checklist(path):
        name = PurePosixPath(entry.name)
        if name.is_absolute() or ".." in name.parts or "\\" in entry.name or not name.parts:
            raise ValueError(
                f"{path}, line {entry.line}, names {entry.name!r}, which is not in its folder; a "
                "checklist lists files beside it only"
            )
        yield replace(entry, name=str(name))


def file_digest(path: Path, algorithm: str, count: Advance, stop: Event) -> str | None:
    """The MD5 or SHA-256 of a file in hexadecimal digits; None where `stop` was set meanwhile.

    `count` is told the bytes as they are read. Hashing releases the interpreter's lock, so several
    threads do it at one time.
    """
    digest = hashlib.new(algorithm, usedforsecurity=False)
    block = memoryview(bytearray(_BLOCK))
    with path.open("rb", buffering=0) as file:
        while n := file.readinto(block):
            if stop.is_set():
                return None
            digest.update(block[:n])
            count(n)
    return digest.hexdigest()


def _compare(folder: Path, listed: list[Listed]) -> dict[str, str]:
    """A sentence for each listed file that is not as it should be, by its name."""
    problems: dict[str, str] = {}
    sizes: dict[Listed, int] = {}
    for entry in listed:
        path = folder / entry.name
        if path.is_file():
            sizes[entry] = path.stat().st_size
        elif path.exists():
            problems[entry.name] = f"{path} is not a file; remove it and download the file again"
        else:
            problems[entry.name] = f"{path} is missing; {entry.checklist} lists it"

    lock, stop = Lock(), Event()
    workers = min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 4, 8)
    largest_first = sorted(sizes, key=lambda entry: -sizes[entry])
    with progress("verifying", sum(sizes.values()), unit="B") as advance:

        def count(n: int) -> None:
            with lock:
                advance(n)

        def check(entry: Listed) -> tuple[str, str | None]:
            return entry.name, _check_file(folder / entry.name, entry, count, stop)

        with ThreadPoolExecutor(max_workers=workers) as pool:
            try:
                for name, problem in pool.map(check, largest_first):
                    if problem is not None:
                        problems[name] = problem
            finally:
                stop.set()  # on Ctrl-C the others end at their next block
    return problems


def _check_file(path: Path, entry: Listed, count: Advance, stop: Event) -> str | None:
    try:
        digest = file_digest(path, entry.algorithm, count, stop)
    except OSError as error:
        return f"{path} cannot be read: {error.strerror}"
    if digest in (None, entry.digest):
        return None
    return (
        f"{path} does not match: its {entry.algorithm.upper()} is {digest}, "
        f"{entry.checklist} says {entry.digest}; download it again"
    )


# ---- writing


def checklist(files: Mapping[str, Path], advance: Advance = lambda n: None) -> str:
    """The text of a checklist of `files`, by name, in the format of md5sum, as Meta's downloads."""
    return "".join(
        f"{file_digest(file, 'md5', advance, Event())}  {name}\n" for name, file in files.items()
    )


def write_checklist(folder: Path, advance: Advance = lambda n: None) -> None:
    """Write checklist.chk for the files of a folder."""
    text = checklist({file.name: file for file in sorted(folder.iterdir())}, advance)
    (folder / CHECKLIST).write_text(text, encoding="ascii")
