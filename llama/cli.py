"""Functions as command lines, by fire: what the examples and `python -m llama` share.

Knows neither models nor files. The surprising thing: fire reads every argument as a Python literal,
so that a folder named `1,2` arrives as a tuple, and it calls a function before it complains about a
flag that the function does not have. Here text stays as typed, and nothing runs until all fits.
"""

import functools
import inspect
import sys
from collections.abc import Callable, Mapping
from typing import get_args, get_type_hints

import fire

Command = Callable[..., None]


def run(commands: Command | Mapping[str, Command], name: str | None = None) -> None:
    """Call a function, or the one of several that is named first, with the arguments of the shell.

    Parameters annotated `str` or `str | None` get their argument as it was typed. ValueError and
    OSError, which is how this library says that something given does not work, end the process
    with their sentence on stderr and status 1, or with their traceback where `--debug` is among the
    arguments; a command line that does not fit, with fire's usage and status 2. `name` is what the
    usage calls this program; None: the file's name.
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

        texts = {word: str for word, kind in kinds.items() if str in kind}
        return fire.decorators.SetParseFns(**texts)(choose)  # type: ignore[no-any-return]

    try:
        if isinstance(commands, Mapping):
            fire.Fire({word: choosing(each) for word, each in commands.items()}, arguments, name)
        else:
            fire.Fire(choosing(commands), arguments, name)
        for call in chosen:
            call()
    except (ValueError, OSError) as error:
        if debug:
            raise
        sys.exit(_sentence(error))


def _sentence(error: Exception) -> str:
    """What an error says, in one line: names in a file that is not ours may hold anything."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        text = f"{error.filename}: {error.strerror}"
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _check(word: str, value: object, kinds: tuple[type, ...]) -> None:
    """ValueError where a value is not of the plain kinds that its parameter is annotated with."""
    plain = {int: "a whole number", float: "a number", bool: "True or False", type(None): "None"}
    fits = type(value) in kinds or (float in kinds and type(value) is int)
    if not fits and kinds and set(kinds) <= set(plain):
        works = " or ".join(plain[kind] for kind in kinds)
        raise ValueError(f"--{word} is {value!r}; it must be {works}")
