"""`download.sh` and `python -m llama download`: Llama weights through the URL of Meta's e-mail.

Knows what is asked, said and chosen, and the order of a model's files; refuses to know HTTP. It
runs before anything is installed: on Python 3.9, with its standard library alone.
"""

from __future__ import annotations

import os
import sys

if __name__ == "__main__":  # a file that is run finds its own folder first, and not the package
    _HERE = os.path.dirname(os.path.realpath(__file__))
    sys.path[:] = [path for path in sys.path if os.path.realpath(path) != _HERE]
    sys.path.insert(0, os.path.dirname(os.path.dirname(_HERE)))

import contextlib
import re
import select
import shutil
import signal
import threading
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import NamedTuple, NoReturn, TextIO

from llama.download.job import Job, on_disk
from llama.download.models import Model, listing, matching, models
from llama.download.server import Failed, Server
from llama.download.url import ASK_FOR_URL, SignedUrl, clean_url, read_url
from llama.terminal.progress import amount_of

_NAME = "download.sh" if __name__ == "__main__" else "download"  # what its sentences begin with
_RANGES = {"jobs": (1, 32), "timeout": (1, 3600), "retries": (0, 1000)}
_VALUES = {"target": " DIR", "jobs": " N", "timeout": " S", "retries": " N"}
_USAGE = f"""Usage: download.sh [options] [model ...]

Downloads Llama weights through the signed URL that Meta sends by e-mail
({ASK_FOR_URL}). The URL is read from PRESIGNED_URL, or asked for.
Without a model the list is shown and the choice asked for.

A model is a name of --list in upper or lower case (8B-instruct, llama-3.1-70b, Meta-Llama-3-8B),
a family (llama-3.2) or all; several are separated by commas or spaces.

{{}}
  --help            this text

Exit status: 0 everything is there and whole, 1 something is not, 2 wrong usage, 130 interrupted.
"""
_INTERRUPTED = "interrupted: files that are whole stay, .part files are resumed by the same command"


def download(
    models: str = "",
    *,
    list: bool = False,
    dry_run: bool = False,
    target: str = ".",
    jobs: int = 1,
    timeout: int = 30,
    retries: int = 5,
    no_space_check: bool = False,
) -> None:
    """Download Llama weights through the signed URL that Meta sends by e-mail.

    The URL is read from the variable PRESIGNED_URL, or asked for. What is there is not asked for
    again, and what was interrupted goes on. Ends with status 0 where all is whole, 1 where it is
    not, 2 for wrong usage and 130 when interrupted.

    Args:
        models: names of --list (8B-instruct, llama-3.1-70b), a family (llama-3.2) or all, with
            commas between them; without any, the list is shown and the choice asked for.
        list: show the models: names, size on disk, shards, folder
        dry_run: say what would be downloaded, and do nothing
        target: where the models' folders go (default: here)
        jobs: download N files at a time
        timeout: give up on a connection after S silent seconds, then try again
        retries: tries without any progress before a file is given up
        no_space_check: do not compare the size of the models with the free space first
    """
    with _problems_end():
        if list:
            _write(sys.stdout, listing())
            return
        _download(models, Options(target, jobs, timeout, retries), dry_run, not no_space_check)


class Options(NamedTuple):
    """What is the same for all models; a Problem where it cannot be."""

    target: str
    jobs: int
    timeout: int
    retries: int

    def check(self) -> None:
        if not self.target:
            raise Problem("--target needs the name of a folder, not ''", 2)
        for name, (low, high) in _RANGES.items():
            value = getattr(self, name)
            if not (isinstance(value, int) and low <= value <= high):
                raise Problem(
                    f"--{name} must be a whole number from {low} to {high}, not '{value}'", 2
                )


class Problem(Exception):
    """What ends the program in a sentence, with the status to leave with."""

    def __init__(self, sentence: str, status: int = 1) -> None:
        super().__init__(sentence)
        self.status = status


def main(arguments: Sequence[str]) -> None:
    """The command line of download.sh; SystemExit with its status where that is not 0."""
    with _problems_end():
        models, given = _read(list(arguments))
        if given.pop("help", False):
            _write(sys.stdout, _usage())
            return
    download(models, **given)  # type: ignore[arg-type]


def _read(rest: list[str]) -> tuple[str, dict[str, object]]:
    """The models and the options of a command line."""
    options = download.__kwdefaults__ or {}
    words, given = [], dict[str, object]()
    while rest:
        word = rest.pop(0)
        flag, equals, value = word.partition("=")
        name = flag[2:].replace("-", "_") if flag.startswith("--") else ""
        if word in ("-h", "--help", "--list"):
            return "", {"list" if word == "--list" else "help": True}
        if name in _VALUES:
            if not equals and not rest:
                raise Problem(f"{flag} needs a value", 2)
            value = value if equals else rest.pop(0)
            is_number = name in _RANGES and re.fullmatch("[0-9]{1,4}", value)
            given[name] = int(value) if is_number else value
        elif name in options and not equals:
            given[name] = True
        elif word.startswith("-"):
            raise Problem(f"there is no option '{word}'; --help shows those there are", 2)
        else:
            words.append(word)
    return " ".join(words), given


def _usage() -> str:
    rows = []
    for word, default in (download.__kwdefaults__ or {}).items():
        found = re.search(rf"^ *{word}: (.*)$", download.__doc__ or "", re.M)
        said = "" if found is None else found[1]
        said += f" (default {default})" if word in _RANGES else ""
        option = f"--{word.replace('_', '-')}{_VALUES.get(word, '')}"
        rows.append(f"  {option:17} {said}")
    return _USAGE.format("\n".join(rows))


@contextlib.contextmanager
def _problems_end() -> Iterator[None]:
    """Within this, what does not work ends the program with its sentence and its status."""
    try:
        yield
    except (Problem, Failed) as problem:
        _complain(problem)
        sys.exit(getattr(problem, "status", 1))
    except BrokenPipeError:
        raise
    except OSError as error:  # of a file that is none, or may not be read
        _complain(f"{error.filename}: {error.strerror}")
        sys.exit(1)


def _download(words: str, options: Options, dry_run: bool, space_check: bool) -> None:
    options.check()
    chosen = _choose(words)  # a wrong name is said before anything is asked
    lines, answer, url = Lines(), None, None
    given = os.environ.get("PRESIGNED_URL", "")
    if given or not dry_run:
        if not given:
            given, answer = _ask_url(lines)
        url = _take_url(given)
    chosen = chosen or _ask_models(lines, answer)
    if dry_run or url is None:
        for model in chosen:
            _say(f"{model.folder} ({model.name}, about {amount_of(model.size)})")
            for file in model.checklists(model.paths[0]) + model.files(model.paths[0]):
                _say(f"  {file.path} -> {options.target}/{model.folder}/{file.name}")
        return
    with _signals_interrupt():
        try:
            os.makedirs(options.target, exist_ok=True)
        except OSError as error:
            raise Problem(
                f"cannot make the folder {options.target}: --target DIR names another place"
            ) from error
        if space_check:
            _check_space(chosen, options.target)
        _get_models(chosen, Server(url, options.timeout), options)


@contextlib.contextmanager
def _signals_interrupt() -> Iterator[None]:
    """Within this, the signals that end a program end it with a Problem, if they are not ignored.

    nohup, for one, has the program ignore that its terminal is gone.
    """

    def interrupt(number: int, frame: FrameType | None) -> NoReturn:
        raise KeyboardInterrupt(128 + number)

    numbers = [getattr(signal, name, None) for name in ("SIGINT", "SIGTERM", "SIGHUP")]
    before = {n: signal.getsignal(n) for n in numbers if n is not None}
    if threading.current_thread() is not threading.main_thread():
        before = {}  # nobody else gets them
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, interrupt)
    try:
        yield
    except KeyboardInterrupt as error:
        for number in before:
            signal.signal(number, signal.SIG_IGN)
        raise Problem(_INTERRUPTED, error.args[0] if error.args else 130) from error
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ---- what is said, asked and chosen


def _write(stream: TextIO | None, text: str) -> None:
    """Write to a standard stream, if it is there, at once."""
    if stream is not None:
        encoding = stream.encoding or "utf-8"
        stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        stream.flush()


def _say(text: str, *, problem: bool = False) -> None:
    """A line on standard output, or error, in place of the progress that stands there."""
    both = (sys.stdout, sys.stderr)
    clear = "\r\033[K" if all(each is not None and each.isatty() for each in both) else ""
    _write(both[problem], f"{clear}{_NAME}: {text}\n" if problem else f"{clear}{text}\n")


def _complain(sentence: object) -> None:
    _say(str(sentence), problem=True)


class Lines:
    """The lines of standard input, for which one may wait a while only."""

    def __init__(self) -> None:
        self._rest, self._ended = b"", sys.stdin is None

    def next(self, seconds: float | None = None) -> str | None:
        """The next line without its end; None at the end, or where none comes in time."""
        while b"\n" not in self._rest and not self._ended:
            if seconds is not None and not select.select([sys.stdin], [], [], seconds)[0]:
                return None
            block = os.read(sys.stdin.fileno(), 65536)
            self._rest, self._ended = self._rest + block, not block
        line, end, self._rest = self._rest.partition(b"\n")
        return line.decode(errors="replace") if line or end else None


def _ask_url(lines: Lines) -> tuple[str, str | None]:
    """The URL and, where a line comes right after it and names models, that line.

    A URL that was wrapped comes as several lines: those that follow at once and name no model.
    """
    _write(sys.stderr, "Enter the URL from email: ")
    url = lines.next() or ""
    while (line := lines.next(1)) is not None:
        if line or not sys.stdin.isatty():  # an empty line there ends a pasted paragraph
            if all(map(matching, _words(line))):
                return url, line
            url += "\n" + line
    return url, None


def _take_url(given: str) -> SignedUrl:
    try:
        url = read_url(given)
    except ValueError as error:
        raise Problem(str(error), 2) from error
    cleaned = clean_url(given)
    if cleaned != given:
        _say(
            "The URL was altered in copying (white space, quotes, &amp; or a lost *) and has been "
            "put right."
        )
    if "Key-Pair-Id=" not in cleaned:
        _complain(
            "the URL has no 'Key-Pair-Id=': it may have been cut off at its end; trying it as it is"
        )
    return url


def _words(text: str) -> list[str]:
    return text.replace(",", " ").split()


def _choose(text: str) -> list[Model]:
    """The models that the words of a user mean, each once."""
    chosen: dict[str, Model] = {}
    for word in _words(text):
        found = matching(word)
        if not found:
            _write(sys.stderr, listing())
            raise Problem(
                f"there is no model '{word}': take one of the list above, a family (llama-3.1) "
                "or all",
                2,
            )
        chosen.update((model.name, model) for model in found)
    return list(chosen.values())


def _ask_models(lines: Lines, answer: str | None) -> list[Model]:
    _write(sys.stdout, listing())
    ask = "Models, separated by commas (8B,8B-instruct), a family (llama-3.1), or Enter for all: "
    _write(sys.stderr, f"\n{ask}")
    answer = lines.next() if answer is None else answer
    if answer is None:
        raise Problem("no model was chosen: name it, as in ./download.sh 8B-instruct", 2)
    chosen = _choose(answer)
    if not chosen:
        chosen = models()
        size = amount_of(sum(model.size for model in chosen))
        _write(sys.stderr, f"All models of all families are about {size}. Type yes to go on: ")
        if (lines.next() or "").lower() != "yes":
            raise Problem(
                "nothing was downloaded: name the models, as in ./download.sh 8B-instruct", 2
            )
    return chosen


# ---- models on their way


def _check_space(chosen: Sequence[Model], target: str) -> None:
    """A Problem where the models are larger than the free space."""
    need = sum(max(model.size - on_disk(f"{target}/{model.folder}"), 0) for model in chosen)
    try:
        free = shutil.disk_usage(target).free
    except (OSError, AttributeError):  # what does not say is tried
        return
    if free < need:
        raise Problem(
            f"{target} has {amount_of(free)} free and about {amount_of(need)} are still to come: "
            "make room, or name another place with --target DIR (--no-space-check skips this)"
        )


def _get_models(chosen: Sequence[Model], server: Server, options: Options) -> None:
    """Download models; a Problem where not all of them are whole then."""
    whole: list[str] = []
    size, unchecked = 0, ""
    for model in chosen:
        folder = f"{options.target}/{model.folder}"
        with contextlib.suppress(OSError):
            os.makedirs(folder, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise Problem(f"cannot write in {folder}: --target DIR names another place")
        _say(model.folder)
        try:
            if not Job(model, folder, server, options.jobs, options.retries, _say).run():
                continue
        except Failed as problem:
            _complain(problem)
            if problem.kind == "absent":  # another model may be there
                continue
            break
        whole.append(folder)
        size += on_disk(folder)
        if not os.path.isfile(f"{folder}/checklist.chk"):
            unchecked += f" {model.folder}"
    count = f"{len(whole)} of {len(chosen)} models"
    if len(whole) < len(chosen):
        raise Problem(f"not done: {count} are whole; the same command goes on from here")
    if unchecked:
        lengths = "Done, but lengths only were checked, as the server has no checklist.chk for:"
        _say(f"{lengths}{unchecked}")
    _say(f"Done: {count} whole ({amount_of(size)}), in {' '.join(whole)}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except BrokenPipeError:  # nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(1)
    except KeyboardInterrupt:  # at a question
        sys.exit(130)
