"""Functions as command lines, by fire: what the examples and `python -m llama` share.

Knows neither models nor files. The surprising thing: fire reads every argument as a Python literal,
so that a folder named `1,2` arrives as a tuple, and it calls a function before it complains about a
flag that the function does not have. Here text stays as typed, and nothing runs until all fits.
"""

import functools
import inspect
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import get_args, get_type_hints

import fire

Command = Callable[..., None]
SEVERAL = tuple[str, ...]


def run(commands: Command | Mapping[str, Command], name: str | None = None) -> None:
    """Call a function, or the one of several that is named first, with the arguments of the shell.

    Parameters annotated `str` or `str | None` get their argument as it was typed, and those
    annotated `tuple[str, ...]` all that were given under their name. ValueError and OSError, which
    is how this library says that something given does not work, and ImportError, which names an
    extra that is not installed, end the process with their sentence on stderr and status 1, or with
    their traceback where `--debug` is among the arguments; an option that the function does not
    have, with those that it has and status 2; another command line that does not fit, with fire's
    usage and status 2; Ctrl-C and a reader who leaves a
    pipe, with no words. `name` is what the usage calls this program; None: the file's name.
    """
    debug = "--debug" in sys.argv[1:]
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    chosen: list[Callable[[], None]] = []

    def choosing(command: Command) -> Command:
        kinds = {word: get_args(hint) or (hint,) for word, hint in get_type_hints(command).items()}

        @functools.wraps(command)
        def choose(*args: object, **kwargs: object) -> None:
            given = inspect.signature(command).bind(*args, **kwargs).arguments
            for word, value in given.items():
                _check(word, value, kinds.get(word, ()))
            chosen.append(functools.partial(command, *args, **kwargs))

        several = _several(command)
        texts = {w: _as_tuple if w in several else str for w, kind in kinds.items() if str in kind}
        return fire.decorators.SetParseFns(**texts)(choose)  # type: ignore[no-any-return]

    try:
        if isinstance(commands, Mapping):
            first = commands.get(arguments[0]) if arguments else None
            if first is not None:
                _know(arguments[1:], first, arguments[0])
            arguments = _gathered(arguments, _several(first) if first else [])
            every = {word: choosing(each) for word, each in commands.items()}
            fire.Fire(every, command=arguments, name=name)
        else:
            _know(arguments, commands, "it")
            arguments = _gathered(arguments, _several(commands))
            fire.Fire(choosing(commands), command=arguments, name=name)
        for call in chosen:
            call()
            sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at the end
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError, ImportError) as error:
        if debug:
            raise
        sys.exit(sentence(error))


def sentence(error: Exception) -> str:
    """What an error says, in one line: names in a file that is not ours may hold anything."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        text = f"{error.filename}: {error.strerror}"
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def read_text(file: str | None) -> str:
    """The text of a file, or of standard input, as it is; ValueError where it is not UTF-8."""
    if file is None and sys.stdin.isatty():
        sys.stderr.write("reading from the keyboard; Ctrl-D ends it\n")
    data = sys.stdin.buffer.read() if file is None else Path(file).read_bytes()
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        where = "standard input" if file is None else file
        raise ValueError(
            f"{where} is not UTF-8 text: byte {error.start} is 0x{data[error.start]:02x}"
        ) from None


def _know(arguments: Sequence[str], command: Command, called: str) -> None:
    """End the process where an option is none of the command's."""
    words = [*inspect.signature(command).parameters]
    for argument in arguments:
        if argument in ("-", "--"):  # what follows is fire's own
            return
        flag = argument.partition("=")[0]
        word = flag[2:].replace("-", "_")
        known = word in (*words, "help") or word.removeprefix("no") in words
        if flag.startswith("--") and not known:
            like = get_close_matches(word, words, 1)
            meant = f"did you mean --{like[0]}? " if like else ""
            takes = ", ".join(f"--{each}" for each in [*words, "debug"])
            sys.stderr.write(f"there is no option {flag}: {meant}{called} takes {takes}\n")
            sys.exit(2)


def _several(command: Command) -> list[str]:
    return [word for word, hint in get_type_hints(command).items() if hint == SEVERAL]


def _as_tuple(text: str) -> tuple[str, ...]:
    return tuple(json.loads(text))


def _gathered(arguments: Sequence[str], words: Sequence[str]) -> list[str]:
    """The arguments with all `--word text` of each word as one, in the form `_as_tuple` reads."""
    found: dict[str, list[str]] = {}
    rest, following = [], iter(arguments)
    for argument in following:
        flag, equals, text = argument.partition("=")
        word = flag.removeprefix("--").replace("-", "_")
        if not flag.startswith("--") or word not in words:
            rest.append(argument)
            continue
        value = text if equals else next(following, None)
        if value is None:
            raise ValueError(f"{flag} needs a text after it")
        found.setdefault(word, []).append(value)
    return rest + [f"--{word}={json.dumps(texts)}" for word, texts in found.items()]


def _check(word: str, value: object, kinds: tuple[type, ...]) -> None:
    """ValueError where a value is not of the plain kinds that its parameter is annotated with."""
    plain = {int: "a whole number", float: "a number", bool: "True or False", type(None): "None"}
    fits = type(value) in kinds or (float in kinds and type(value) is int)
    if not fits and kinds and set(kinds) <= set(plain):
        works = " or ".join(plain[kind] for kind in kinds)
        raise ValueError(f"--{word} is {value!r}; it must be {works}")
