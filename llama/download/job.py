"""A model on its way into its folder: what is there, what is to come, several files at one time.

Knows a model's files and their order; refuses to know HTTP and what the user typed.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Protocol, TypeVar

from llama.download.folder import Folder, entries_of, is_page, size_of
from llama.download.models import File, Model
from llama.download.server import Failed, Server
from llama.terminal.progress import Advance, amount_of, progress

T = TypeVar("T")


class Say(Protocol):
    """Shows a line: on standard output, or on standard error where it is a problem."""

    def __call__(self, text: str, *, problem: bool = False) -> None: ...


def on_disk(folder: str) -> int:
    """Bytes of the weights that are there, whole or not."""
    return sum(size_of(path) for path in Path(folder).glob("consolidated.*"))


class Job:
    """A model on its way into its folder, by several threads that take file after file."""

    def __init__(
        self, model: Model, folder: str, server: Server, jobs: int, retries: int, say: Say
    ) -> None:
        self.model, self.jobs = model, jobs
        self.there: dict[str, str] = {}  # the files that are right: the checksum that they match
        self._lock, self._write = threading.Lock(), say
        self._advance: Advance = lambda n: None
        self.folder = Folder(folder, server, retries, self._say, self._count)

    def run(self) -> bool:
        """Whether the model is whole now; Failed where the rest of it is not worth a try."""
        folder = self.folder
        checklist = folder.path("checklist.chk")
        if not entries_of(checklist):
            checklist.unlink(missing_ok=True)
        self._look()
        if checklist.is_file() and all(
            file.name in self.there and (self.there[file.name] or ".pth" not in file.name)
            for file in self.model.files(".")
            if file.needed
        ):
            self._say("  everything is there and matches checklist.chk")
            return True
        (path,) = _beside(self._probe)
        listed = folder.listed()  # it may be new, and say something else than what was there
        for name, digest in [*self.there.items()]:
            if digest != (listed[name].digest if name in listed else ""):
                del self.there[name]
        return self._get_all(
            [file for file in self.model.files(path) if file.name not in self.there]
        )

    def _look(self) -> None:
        """Note which files are there already and match the checklist that is there."""
        listed = self.folder.listed()
        paths = [self.folder.path(file.name) for file in self.model.files(".")]
        paths = [path for path in paths if path.is_file()]
        size = sum(size_of(path) for path in paths if path.name in listed)
        with progress(
            f"verifying {self.model.folder}", size, unit="B", enabled=size > 0
        ) as advance:
            for path in paths:
                if path.name in listed:
                    entry = listed[path.name]
                    if self.folder.digest(path, entry.algorithm, advance) == entry.digest:
                        self.there[path.name] = entry.digest
                # the server knows at least how long a shard is
                elif path.suffix != ".pth" and size_of(path) and not is_page(path):
                    self.there[path.name] = ""

    def _probe(self) -> str:
        """Where on the server the model lies: the first path with its checklist or params.json."""
        for part in Path(self.folder.name).glob("*.chk.part"):
            part.unlink()
        first: Failed | None = None
        for path in self.model.paths:
            try:
                for file in self.model.checklists(path):
                    self.folder.get(file)
                return path
            except Failed as problem:
                if problem.kind not in ("refused", "absent"):
                    raise
                first = Failed(str(first or problem), problem.kind)  # the first path is to be named
            if not self.model.has_checklist:
                with contextlib.suppress(Failed):
                    self.folder.get(self.model.files(path)[0])
                    self.there["params.json"] = ""
                    return path
        assert first is not None, self.model
        raise first

    def _get_all(self, files: Sequence[File]) -> bool:
        """Fetch files; whether all of the needed ones came."""
        todo = deque(files)

        def work() -> bool:
            whole = True
            while True:
                try:
                    file = todo.popleft()
                except IndexError:  # nothing is left
                    return whole
                whole &= self._get(file)

        size, there = self.model.size, on_disk(self.folder.name)
        with progress(self.model.folder, size, unit="B", done=there) as self._advance:
            try:
                return all(_beside(work, self.jobs, lambda: self._count("consolidated.", 0)))
            finally:  # who still waits for the network is left alone, and touches nothing more
                with self._lock:
                    self.folder.stop.set()

    def _get(self, file: File) -> bool:
        """Whether a file came, or is not needed."""
        folder, name = self.folder, file.name
        path, part = folder.path(name), folder.path(f"{name}.part")
        if path.is_file():  # it does not match: perhaps its beginning does
            if part.is_file() or not size_of(path) or is_page(path):
                folder.remove(path)
            else:
                path.replace(part)
        try:
            folder.get(file)
        except Failed as problem:
            if not file.needed and problem.kind != "unwritten":
                folder.remove(part)
                terms = "not to be had at this URL; the terms are at https://www.llama.com"
                self._say(f"  {name}: {terms}")
                return True
            if problem.kind != "file":
                raise
            self._say(str(problem), problem=True)
            return False
        note = "no checksum is known for it" if file.needed else "as the server has it"
        note = "matches its checksum" if name in folder.listed() else note
        self._say(f"  {name}: {amount_of(size_of(path))}, {note}")
        return True

    def _say(self, text: str, *, problem: bool = False) -> None:
        with self._lock:
            self._write(text, problem=problem)

    def _count(self, name: str, n: int) -> None:
        with self._lock:
            if name.startswith("consolidated.") and not self.folder.stop.is_set():
                self._advance(n)


def _beside(
    work: Callable[[], T], times: int = 1, tick: Callable[[], None] = lambda: None
) -> list[T]:
    """What a function gives in threads of its own, or its first error at once.

    So a signal ends the program at once, whatever the network or a name server is doing. `tick` is
    called each second.
    """
    results: SimpleQueue[tuple[BaseException | None, list[T]]] = SimpleQueue()

    def run() -> None:
        try:
            results.put((None, [work()]))
        except BaseException as error:
            results.put((error, []))

    for _ in range(times):
        threading.Thread(target=run, daemon=True).start()
    found: list[T] = []
    while len(found) < times:
        try:
            error, values = results.get(timeout=1)
        except Empty:
            tick()
            continue
        if error is not None:
            raise error
        found += values
    return found
