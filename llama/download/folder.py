"""One file through a signed URL: resumed, checked and renamed when whole, or a sentence why not.

Knows HTTP by Python's standard library alone, on 3.9 as well, and no table of models. The
surprising thing: a file gets its name only when it is whole; until then it is NAME.part, and what
the server sends is appended to it only if the head of the answer says that it continues there.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from threading import Event

from llama.download.models import File
from llama.download.server import Answer, Failed, Server
from llama.download.url import ASK_FOR_URL
from llama.files.checklist import Listed, file_digest, read_checklist
from llama.terminal.progress import Advance, amount_of

_LARGEST_PAGE = 1_000_000
_PAGE = re.compile(rb"<(!doctype|html|head|\?xml|error)")  # nothing that is wanted begins so


class Stopped(Exception):
    """Somebody else has ended the work meanwhile."""


class Folder:
    """The folder of one model: what its checklists list, and getting a file that belongs there.

    `count` is told how many bytes of a file have come, by its name; negative, have gone. `stop`,
    once set, ends all that runs here at its next step.
    """

    def __init__(
        self,
        name: str,
        server: Server,
        retries: int,
        say: Callable[[str], None],
        count: Callable[[str, int], None],
    ) -> None:
        self.name, self.server, self.retries = name, server, retries
        self.say, self.count = say, count
        self.stop = Event()

    def path(self, name: str) -> Path:
        return Path(self.name, name)

    def listed(self) -> Mapping[str, Listed]:
        """What the checklists that are here say of files, by their names; nothing without any."""
        found: dict[str, Listed] = {}
        for name in ("checklist.chk", "tokenizer_checklist.chk"):
            for entry in entries_of(self.path(name)):
                found.setdefault(entry.name.rpartition("/")[2], entry)
        return found

    def digest(self, path: Path, algorithm: str, count: Advance = lambda n: None) -> str:
        """The checksum of a file; Stopped where `stop` was set meanwhile."""
        digest = file_digest(path, algorithm, count, self.stop)
        if digest is None:
            raise Stopped
        return digest

    def remove(self, path: Path) -> None:
        """Remove a file, or what is there of it."""
        self.count(path.name, -size_of(path))
        path.unlink(missing_ok=True)

    def get(self, file: File) -> None:
        """Fetch a file; Failed, with a sentence, where that ends."""
        name, part = file.name, self.path(f"{file.name}.part")
        expected = self.listed().get(name)
        best = tries = wrong = 0
        while True:
            answer = self._attempt(file, expected is not None)
            if answer is None:
                got = self._finish(name, expected)
                if got is None:
                    return
                wrong += 1
                if wrong == 2:
                    says = expected.digest if expected is not None else ""
                    raise Failed(
                        f"{name} does not match checklist.chk (it says {says}, the download has "
                        f"{got}), twice; it was removed: try again later, or from another network"
                    )
                self.say(f"  {name}: does not match checklist.chk; starting it anew")
                best = 0
                continue
            size = size_of(part)
            if size > best:
                best, tries = size, 0
            tries += 1
            if tries > self.retries:
                raise Failed(self._gave_up(name, size, tries, answer))
            self._pause(tries)

    def _attempt(self, file: File, checked: bool) -> Answer | None:
        """One request; None where the file then has its length, and else what was answered."""
        name, part = file.name, self.path(f"{file.name}.part")
        start = size_of(part)
        answer = self._transfer(file.path, part, start)
        size = size_of(part)
        host, status, total = self.server.url.host, answer.status, answer.total
        if answer.verdict == "page":
            raise Failed(self._web_page(name, status), "all")
        if status in (401, 403):
            raise Failed(self._refusal(name), "refused")
        if status in (404, 410):
            raise Failed(
                f"{host} has no {file.path} ({status}): is the URL for another family of models "
                f"than {os.path.basename(self.name)}?",
                "absent",
            )
        if answer.verdict == "anew":
            self.remove(part)
        elif status == 416:  # nothing comes after what is here: it is whole, or not this file
            if total == size or (total is None and checked):
                return None
            self.remove(part)
        elif answer.verdict == "body":
            if total == size or (total is None and answer.complete):
                return None
            if total is not None and size > total:
                self.remove(part)
        elif not (status is None or status in (408, 429) or status >= 500):
            raise Failed(
                f"{host} answered {status} for {name}, which no file download should: check the "
                "URL, or try again later"
            )
        return answer

    def _transfer(self, path: str, part: Path, start: int) -> Answer:
        """Append what the server sends to a file of `start` bytes."""

        answer = self.server.ask(path, start)
        if answer.verdict != "body":
            return answer
        try:
            with part.open("ab", buffering=0) as file:
                for block in answer.body():
                    if self.stop.is_set():
                        raise Stopped
                    rest = memoryview(block)
                    while rest:
                        rest = rest[file.write(rest) :]
                    self.count(part.name, len(block))
        except OSError as error:
            raise Failed(
                f"cannot write {part}: {error.strerror}; {amount_of(size_of(part))}{_of(answer)} "
                "are there: make room and run the same command again, it goes on from there",
                "unwritten",
            ) from error
        return answer

    def _finish(self, name: str, expected: Listed | None) -> str | None:
        """Give a file that has its length its name; its checksum instead where that is wrong."""
        part, host = self.path(f"{name}.part"), self.server.url.host
        if not size_of(part):
            self.remove(part)
            raise Failed(f"{host} sent {name} as an empty file: check the URL, or try again later")
        if size_of(part) < _LARGEST_PAGE and is_page(part):
            self.remove(part)
            raise Failed(self._web_page(name, 200), "all")
        if name.endswith(".chk") and not entries_of(part):
            self.remove(part)
            raise Failed(
                f"what {host} sent as {name} is not a list of checksums: check the URL, or try "
                "again later",
                "all",
            )
        if expected is not None:
            digest = self.digest(part, expected.algorithm)
            if digest != expected.digest:
                self.remove(part)
                return digest
        try:
            part.replace(self.path(name))
        except OSError as error:
            raise Failed(f"cannot rename {part} to {name}: {error.strerror}") from error
        return None

    def _pause(self, tries: int) -> None:
        # a connection that broke off is usually there again at once
        if self.stop.wait(min(tries, self.server.timeout) if tries > 1 else 0):
            raise Stopped

    # ---- sentences

    def _web_page(self, name: str, status: int | None) -> str:
        return (
            f"{self.server.url.host} sent a web page instead of {name} (status {status}): a login "
            "page, proxy or mail filter stands between; copy the URL itself from the e-mail, or "
            "try from another network"
        )

    def _refusal(self, name: str) -> str:
        url = self.server.url
        return (
            f"{url.host} refused {name} (403): the URL has expired (it lasts 24 hours), its "
            "download quota is used up, it was mangled in copying, or it is not for "
            f"{os.path.basename(self.name)}.{url.expiry()} Ask for a new one at {ASK_FOR_URL} "
            "and run the same command with it: what is whole stays, and .part files are resumed."
        )

    def _gave_up(self, name: str, size: int, tries: int, answer: Answer) -> str:
        said = [f"status {answer.status}"] if answer.status is not None else []
        said += [answer.trouble] if answer.trouble else []
        how = f"in {tries} tries ({', '.join(said) or 'the connection broke off'})"
        if not size:
            proxy = "" if self.server.proxy is None else f" and {self.server.proxy}"
            return (
                f"{self.server.url.host} did not deliver {name} {how}: check the network{proxy} "
                "and run the same command again"
            )
        return (
            f"{name} got no further than {amount_of(size)}{_of(answer)} {how}; it is kept: run "
            "the same command again"
        )


def size_of(path: Path) -> int:
    """Bytes of a file; 0 where there is none."""
    return path.stat().st_size if path.is_file() else 0


def is_page(path: Path) -> bool:
    """Whether HTML or XML lies where a file should be."""
    with path.open("rb") as file:
        return _PAGE.match(file.read(512).translate(None, b"\0 \t\r\n").lower()) is not None


def entries_of(path: Path) -> list[Listed]:
    """The lines of a checklist; none where there is no file, or not a list of checksums."""
    try:
        return read_checklist(path)
    except (FileNotFoundError, ValueError):
        return []


def _of(answer: Answer) -> str:
    return "" if answer.total is None else f" of {amount_of(answer.total)}"
