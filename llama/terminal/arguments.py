"""Functions as command lines, by fire: what the examples and `python -m llama` share.

Knows neither models nor files. The surprising thing: a reader who leaves, a full disk and Ctrl-C
may come at any line, and standard streams may not be there at all; each ends a program with a
status that is not 0, in one sentence or without words, never with a traceback.
"""

import contextlib
import errno
import io
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import NoReturn, TextIO

import fire

from llama.terminal.page import page
from llama.terminal.signature import SEVERAL, Command, Signature, UsageError, split
from llama.terminal.table import Table, row

__all__ = ["SEVERAL", "Command", "as_json", "as_typed", "read_text", "run", "sentence"]


def run(commands: Command | Mapping[str, Command], name: str | None = None) -> None:
    """Call a function, or the one of several that is named first, with the arguments of the shell.

    Parameters annotated `str` or `str | None` get their argument as it was typed, and those
    annotated `tuple[str, ...]` all that were given under their name. ValueError and OSError, which
    is how this library says that something given does not work, and ImportError, which names an
    extra that is not installed, end the process with their sentence on stderr and status 1, or with
    their traceback where `--debug` is among the arguments; a command line that does not fit, with a
    sentence and status 2; Ctrl-C and a reader who leaves a pipe, with no words. `name` is what
    `--help` calls this program; None: the file's name. Of a `Table`, only the command that is
    chosen is imported.
    """
    words, found = split(sys.argv[1:], ("--debug", "--help", "-h"))
    try:
        with _streams():
            _run(commands, name or Path(sys.argv[0]).name, words, not found <= {"--debug"})
            sys.stdout.flush()
    except UsageError as error:
        _end(str(error), 2)
    except BrokenPipeError:
        _end("", 1)
    except KeyboardInterrupt:
        _end("", 130)
    except (ValueError, OSError, ImportError) as error:
        if "--debug" in found:
            raise
        _end(sentence(error), 1)


def _run(
    commands: Command | Mapping[str, Command], name: str, words: list[str], wants_help: bool
) -> None:
    """Call what the words say, or show help; the call comes last, when all of them fit."""
    table = commands if isinstance(commands, Table) else None
    if not isinstance(commands, Mapping):
        signature, program = Signature(commands, "it"), name
    elif not words:
        sys.stdout.write(table.listing(name) if table else _listing(commands, name))
        return
    elif table and words == ["--version"]:
        sys.stdout.write(f"{table.version}\n")
        return
    else:
        word = words.pop(0)
        if word not in commands:
            raise UsageError(_no_command(word, list(commands)))
        old = table.entries[word].old if table else None
        signature, program = Signature(commands[word], word, old), f"{name} {word}"
    if wants_help:
        shared = (table.options, table.defaults) if table else ()
        sys.stdout.write(page(signature, program, *shared))
        return
    chosen: list[Callable[[], None]] = []
    fire.Fire(signature.call(chosen.append), command=signature.arranged(words), name=program)
    for call in chosen:
        call()


def _no_command(word: str, names: list[str]) -> str:
    """A sentence about a word that is no command, with those that may have been meant."""
    like = [name for name in names if name.startswith(word)] or get_close_matches(word, names, 1)
    meant = f"did you mean {' or '.join(like)}? " if like else ""
    return f"there is no command {word}: {meant}it is one of {', '.join(names)}"


def _listing(commands: Mapping[str, Command], name: str) -> str:
    lines = [f"{name} COMMAND ...   (COMMAND --help says more; --debug shows tracebacks)"]
    for word, command in commands.items():
        lines.append(row(word, (command.__doc__ or "").partition("\n")[0]))
    return "\n".join([*lines, ""])


@contextlib.contextmanager
def _streams() -> Iterator[None]:
    """Within this, stdout and stderr are there, and nothing that is shown can fail to be encoded.

    What is written to a standard output that was closed fails by name. No file that is opened gets
    the number of a stream that was closed, where somebody else's output could land in it.
    """
    before = sys.stdout, sys.stderr
    if None in (sys.stdin, *before):
        while os.open(os.devnull, os.O_RDWR) < 2:
            pass
    named = None
    if sys.stdout is None:
        sys.stdout = _Closed()
    elif type(sys.stdout) is io.TextIOWrapper:
        sys.stdout = named = _Output(
            sys.stdout.buffer,
            sys.stdout.encoding,
            line_buffering=sys.stdout.line_buffering,
            write_through=sys.stdout.write_through,
        )
    if sys.stderr is None:
        sys.stderr = io.TextIOWrapper(io.BytesIO())
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        if named is not None:
            _let_go(named)
            named.detach()
        sys.stdout, sys.stderr = before


class _Output(io.TextIOWrapper):
    """Standard output, with its name in its errors."""

    def write(self, text: str) -> int:
        with self._named():
            return super().write(text)

    def flush(self) -> None:
        with self._named():
            super().flush()

    @staticmethod
    @contextlib.contextmanager
    def _named() -> Iterator[None]:
        try:
            yield
        except OSError as error:
            error.filename = "standard output"
            raise


class _Closed(io.TextIOBase):
    """Stands for a standard output that was closed when the program started."""

    def write(self, text: str) -> int:
        raise OSError(errno.EBADF, "it is closed", "standard output")


def _end(words: str, status: int) -> NoReturn:
    """End the process, whatever has become of the standard streams."""
    with contextlib.suppress(OSError):
        if words and sys.stderr is not None:
            sys.stderr.write(_printable(words) + "\n")
    _let_go(sys.stdout)
    _let_go(sys.stderr)
    sys.exit(status)


def _let_go(stream: TextIO | None) -> None:
    """Forget what a stream cannot write, which Python would try again, and complain, at its end."""
    try:
        if stream is not None:
            stream.flush()
    except OSError:
        with contextlib.suppress(OSError):  # a stream without a number
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # type: ignore[union-attr]


def sentence(error: Exception) -> str:
    """What an error says, in one line: names in a file that is not ours may hold anything."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        text = error.strerror
        if error.filename is not None:
            text = f"{error.filename}: {text}"
    return _printable(text)


def read_text(file: str | None) -> str:
    """The text of a file, or of standard input, as it is; ValueError where it is not UTF-8.

    Standard input is None, or `-` as shells have it.
    """
    if file == "-":
        file = None
    if file is None and sys.stdin is None:
        raise ValueError("standard input is closed: give a text or a file")
    if file is None and sys.stdin.isatty():
        sys.stderr.write("reading from the keyboard; Ctrl-D ends it\n")
        sys.stderr.flush()
    data = sys.stdin.buffer.read() if file is None else Path(file).read_bytes()
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        where = "standard input" if file is None else file
        raise ValueError(
            f"{where} is not UTF-8 text: byte {error.start} is 0x{data[error.start]:02x}"
        ) from None


def as_typed(text: str, what: str) -> str:
    """The text; ValueError where the shell had bytes that are none."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        byte = ord(text[error.start]) & 0xFF
        raise ValueError(f"{what} is not UTF-8 text: its byte 0x{byte:02x} is none") from None
    return text


def as_json(value: object) -> str:
    """JSON with the characters that standard output can show, and escapes for others."""
    plain = (getattr(sys.stdout, "encoding", None) or "utf-8").lower() in ("utf-8", "utf8")
    return json.dumps(value, ensure_ascii=not plain)


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
