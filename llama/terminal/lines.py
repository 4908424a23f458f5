"""What a person types and sees: lines in, answers out, and Ctrl-C as a question that can be asked.

Knows the standard streams and nothing of models. Answers go to stdout and everything else to
stderr, so that a pipe gets answers only. The surprising thing: torchrun keeps its processes out of
the terminal's session, so that Ctrl-C would end all of them; while an answer runs there, it is read
as a key.
"""

import contextlib
import importlib
import io
import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from types import FrameType

try:
    import termios
except ImportError:  # not a Unix: Ctrl-C is then never a key
    termios = None  # type: ignore[assignment]

FENCE = '"""'
_CTRL_C = b"\x03"
# A model's text must not move the cursor, or worse: all control characters but tab and line end.
_CONTROLS = dict.fromkeys((*range(32), *range(127, 160)), "\N{REPLACEMENT CHARACTER}")
_CONTROLS |= {9: "\t", 10: "\n"}


class Unseen(Exception):
    """Nothing more can be shown: nobody reads on, or the disk is full; the OSError is its cause."""


class Terminal:
    """The standard streams. `interactive`: a person sits at both ends. `closed`: nothing comes in.

    `words` are completed by Tab where prompt_toolkit is installed.
    """

    def __init__(self, words: Sequence[str] = ()) -> None:
        self.closed = sys.stdin is None
        for stream in (sys.stdin, sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="replace")
        self.interactive = _is_terminal(sys.stdin) and _is_terminal(sys.stdout)
        self._line = _editor(words) if self.interactive else _plain_line
        self._filter = _CONTROLS if _is_terminal(sys.stdout) else {}
        self._write_note = _note_writer()
        self._keys = self.interactive and termios is not None and not _gets_signals()

    def read(self) -> tuple[str, bool]:
        """What is typed next, and whether it stood between two fences of three quotes.

        A line, or the several lines of a fence. Raises EOFError at the end of input, and
        KeyboardInterrupt at Ctrl-C.
        """
        line = self._line("> ")
        if not line.lstrip().startswith(FENCE):
            return line, False
        lines = [line.lstrip()[len(FENCE) :]]
        with contextlib.suppress(EOFError):  # the end of input ends the text as well
            while not lines[-1].rstrip().endswith(FENCE):
                lines.append(self._line(". "))
            lines[-1] = lines[-1].rstrip()[: -len(FENCE)]
        return "\n".join(lines), True

    def show(self, text: str) -> None:
        """A part of an answer; Unseen where it cannot be written."""
        try:
            sys.stdout.write(text.translate(self._filter))
            sys.stdout.flush()
        except OSError as error:
            raise Unseen from error

    def note(self, text: str) -> None:
        """Anything that is no answer, on lines of its own; lost where stderr cannot be written."""
        with contextlib.suppress(OSError):
            self._write_note(text)

    @contextlib.contextmanager
    def ctrl_c(self) -> Iterator[Callable[[], bool]]:
        """Within this, Ctrl-C does not interrupt: the value, a function, says if it was pressed.

        A second one raises KeyboardInterrupt("twice"). What else is typed meanwhile is lost where
        Ctrl-C is a key, and waits for the next `read` elsewhere.
        """
        pressed = False

        def press(number: int, frame: FrameType | None) -> None:
            nonlocal pressed
            if pressed:
                raise KeyboardInterrupt("twice")
            pressed = True

        before = signal.signal(signal.SIGINT, press)
        try:
            with _ctrl_c_key() if self._keys else contextlib.nullcontext(lambda: False) as key:
                yield lambda: key() or pressed
        finally:
            signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def ctrl_c_ends(program: bool = True) -> Iterator[None]:
    """Within this, Ctrl-C ends the process at once and without words.

    For what takes seconds before there is anything to lose, such as imports of large packages,
    which may take a KeyboardInterrupt for an error of their own. Does nothing where this is not the
    `program` but a part of one, outside of the main thread, or where Ctrl-C does something else.
    """
    before = signal.getsignal(signal.SIGINT)
    if (
        not program
        or before is not signal.default_int_handler
        or threading.current_thread() is not threading.main_thread()
    ):
        yield
        return
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _is_terminal(stream: object) -> bool:
    return isinstance(stream, io.TextIOWrapper) and not stream.closed and stream.isatty()


def _gets_signals() -> bool:
    """Whether the keyboard's Ctrl-C comes here as a signal: whether this is our own terminal."""
    try:
        os.tcgetpgrp(sys.stdin.fileno())
    except OSError:
        return False
    return True


def _plain_line(prompt: str) -> str:
    if sys.stdin is None:
        raise EOFError
    if _is_terminal(sys.stdin):
        sys.stderr.write(prompt)
        sys.stderr.flush()
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.removesuffix("\n")


def _editor(words: Sequence[str]) -> Callable[[str], str]:
    """A function that asks for a line, with editing and the lines before."""
    try:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.completion import WordCompleter
    except ImportError:
        with contextlib.suppress(ImportError):
            importlib.import_module("readline")  # from now on input() has both
        return input
    completer = WordCompleter(list(words), sentence=True)
    session = PromptSession(completer=completer, complete_while_typing=False)
    return session.prompt  # type: ignore[no-any-return]


def _note_writer() -> Callable[[str], None]:
    """A function that writes a line to stderr, dim where a person sees it."""

    def plain(text: str) -> None:
        sys.stderr.write(f"\x1b[2m{text}\x1b[0m\n" if _is_terminal(sys.stderr) else f"{text}\n")
        sys.stderr.flush()

    try:
        from rich.console import Console
        from rich.text import Text
    except ImportError:
        return plain
    if not _is_terminal(sys.stderr):
        return plain
    console = Console(stderr=True, highlight=False)  # knows terminals that have no dim
    return lambda text: console.print(Text(text, style="dim"), soft_wrap=True)


@contextlib.contextmanager
def _ctrl_c_key() -> Iterator[Callable[[], bool]]:
    """Take keys one by one, and Ctrl-C as one of them: the value says if it was pressed."""
    keyboard, pressed = sys.stdin.fileno(), False
    before = termios.tcgetattr(keyboard)
    changed = termios.tcgetattr(keyboard)
    changed[3] &= ~(termios.ICANON | termios.ECHO | termios.ISIG)

    def key() -> bool:
        nonlocal pressed
        while select.select([keyboard], [], [], 0)[0]:
            typed = os.read(keyboard, 1024)
            pressed = pressed or _CTRL_C in typed
            if not typed:
                break
        return pressed

    termios.tcsetattr(keyboard, termios.TCSADRAIN, changed)
    try:
        yield key
    finally:
        termios.tcsetattr(keyboard, termios.TCSADRAIN, before)
