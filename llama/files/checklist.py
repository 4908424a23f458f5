"""Whether the files of a model are what its checklist says: MD5 or SHA-256, files side by side.

Knows checklists in md5sum's format, as they come with Meta's weights; refuses to know what a
checkpoint is: nothing here opens a tensor or imports torch. The surprising thing: a weight file
that no checklist lists is a problem too, as the loader would read it; a LICENSE is not.
"""

import hashlib
import os
import re
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from threading import Event, Lock

from llama.terminal.progress import Advance, progress

_BLOCK = 2**23  # bytes read at a time: large enough for any disk, small enough to stop soon
_LINE = re.compile(r"(?P<digest>[0-9a-fA-F]+)[ \t]+\*?(?P<name>\S.*?)\s*")
_ALGORITHMS = {32: "md5", 64: "sha256"}  # by hexadecimal digits


@dataclass(frozen=True)
class _Listed:
    """A line of a checklist."""

    name: str
    digest: str
    algorithm: str
    checklist: str


def verify(ckpt_dir: str | Path) -> list[str]:
    """Compare the files of a folder (or of its `original/`) with checklist.chk.

    The value has a sentence for each file that is missing, different, unreadable, unfinished
    (.part) or a shard that no checklist lists, and is empty where all is well. Raises
    FileNotFoundError where there is no folder or no checklist, and ValueError where a checklist
    itself is wrong: not in md5sum's format, contradictory, or naming a file outside the folder.
    """
    folder = _find_folder(Path(ckpt_dir))
    listed: dict[str, _Listed] = {}
    for path in sorted(folder.glob("*checklist.chk")):  # Llama 2 has one for the tokenizer too
        for entry in _read_checklist(path):
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
        if (folder / "checklist.chk").is_file():
            return folder
    raise FileNotFoundError(
        f"{path / 'checklist.chk'} is missing, and without it there is nothing to compare with; "
        "Meta's downloads (download.sh) have one, and so do folders that convert, reshard and "
        "quantize write"
    )


def _read_checklist(path: Path) -> list[_Listed]:
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
        name = PurePosixPath(match["name"])
        if name.is_absolute() or ".." in name.parts or "\\" in match["name"] or not name.parts:
            raise ValueError(
                f"{path}, line {number}, names {match['name']!r}, which is not in its folder; a "
                "checklist lists files beside it only"
            )
        entries.append(_Listed(str(name), match["digest"].lower(), algorithm, path.name))
    if not entries:
        raise ValueError(f"{path} is empty; download the checklist again")
    return entries


def _compare(folder: Path, listed: list[_Listed]) -> dict[str, str]:
    """A sentence for each listed file that is not as it should be, by its name."""
    problems: dict[str, str] = {}
    sizes: dict[_Listed, int] = {}
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

        def check(entry: _Listed) -> str | None:
            return _check_file(folder / entry.name, entry, count, stop)

        with ThreadPoolExecutor(max_workers=workers) as pool:
            try:
                found = zip(largest_first, pool.map(check, largest_first), strict=True)
                problems |= {entry.name: problem for entry, problem in found if problem}
            finally:
                stop.set()  # on Ctrl-C the others end at their next block
    return problems


def _check_file(path: Path, entry: _Listed, count: Advance, stop: Event) -> str | None:
    # hashing releases the interpreter; what a file needs next is read ahead meanwhile
    digest = hashlib.new(entry.algorithm, usedforsecurity=False)
    block = memoryview(bytearray(_BLOCK))
    try:
        with path.open("rb", buffering=0) as file:
            while not stop.is_set() and (n := file.readinto(block)):
                digest.update(block[:n])
                count(n)
    except OSError as error:
        return f"{path} cannot be read: {error.strerror}"
    if digest.hexdigest() == entry.digest:
        return None
    return (
        f"{path} does not match: its {entry.algorithm.upper()} is {digest.hexdigest()}, "
        f"{entry.checklist} says {entry.digest}; download it again"
    )
