"""The words of a command line to the parameters of a function, and the page that `--help` shows.

Knows signatures and docstrings, and nothing of what a function does. The surprising thing: fire,
which reads values and makes the call, would read every word as a Python literal, call a function
before it complains about a flag that the function does not have, and take the next word, or True,
for the value of an option that has none. So the words are sorted here first: what fire gets is
`--word=text`, each parameter once.
"""

import functools
import inspect
import json
import re
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from pathlib import Path
from textwrap import fill
from typing import get_args, get_type_hints

from fire.decorators import SetParseFns
from fire.parser import DefaultParseValue

Command = Callable[..., None]
SEVERAL = tuple[str, ...]

_FLAG = re.compile(r"(--?[A-Za-z][\w-]*)(?:=(.*))?", re.S)
_PLAIN = {int: "a whole number", float: "a number", bool: "True or False", type(None): "None"}
_PATHS = {"dir", "path", "file", "src", "dst", "adapter", "against", "plot"}  # how they end
# What other programs call things.
_ELSEWHERE = {"max_tokens": "max_gen_len", "max_new_tokens": "max_gen_len", "prompt": "text",
              "input": "src", "output": "dst", "model": "ckpt_dir", "ctx": "max_seq_len",
              "context": "max_seq_len", "batch_size": "max_batch_size"}  # fmt: skip
_YES = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


class UsageError(Exception):
    """A command line that does not fit its command, in one sentence."""


class Signature:
    """What a command takes: its parameters by name, and which of them may be given by position.

    `called` is how its sentences name it. Parameters that are keyword-only in Python are options
    only; the others may also stand in the order of the signature.
    """

    def __init__(self, command: Command, called: str) -> None:
        self.command, self.called = command, called
        self.parameters = inspect.signature(command).parameters
        hints = get_type_hints(command)
        self.several = {word for word in self.parameters if hints.get(word) == SEVERAL}
        self.kinds = {w: get_args(hints[w]) or (hints[w],) for w in self.parameters if w in hints}
        self.positional = [
            word for word, one in self.parameters.items() if one.kind is not one.KEYWORD_ONLY
        ]

    def arranged(self, words: Sequence[str]) -> list[str]:
        """The words of a command line in the form that fire reads.

        `--word text`, `--word=text`, `-w text` where no other option begins with w, `--yes` and
        `--noyes` for switches; what follows `--` is no option. UsageError for anything else.
        """
        given: dict[str, list[str]] = {}
        free = [word for word in self.positional if word not in self.several]
        rest, plain = list(words), False

        def put(word: str, text: str) -> None:
            if word in given and word not in self.several:
                raise UsageError(
                    f"--{word} is given twice: {given[word][0]!r:.80} and {text!r:.80}"
                )
            given.setdefault(word, []).append(text)
            if word in free:
                free.remove(word)

        while rest:
            argument = rest.pop(0)
            flag = None if plain else _FLAG.fullmatch(argument)
            if argument == "--" and not plain:
                plain = True
            elif flag is not None and not _is_number(argument):
                word, value = self._option(flag[1], flag[2])
                put(word, self._value(word, rest, free) if value is None else value)
            elif free:
                put(free[0], argument)
            elif "ckpt_dir" in self.parameters and Path(argument).exists():
                put("ckpt_dir", argument)  # `complete TEXT DIR`, as it was before
            else:
                takes = " ".join(word.upper() for word in self.positional[: self._leading()])
                raise UsageError(
                    f"{argument!r:.80} is one word more than {self.called} takes ({takes}): put "
                    "words that belong together in quotes, and name options by their --name"
                )
        missing = [
            f"--{word}" for word, one in self.parameters.items()
            if one.default is one.empty and word not in given
        ]  # fmt: skip
        if missing:
            raise UsageError(
                f"{self.called} needs {' and '.join(missing)}; --help says what may be given"
            )
        texts = {w: json.dumps(t) if w in self.several else t[0] for w, t in given.items()}
        return [f"--{word}={text}" for word, text in texts.items()]

    def call(self, chosen: Callable[[Callable[[], None]], None]) -> Command:
        """A function for fire that hands the command and its arguments, as read, to `chosen`."""

        @functools.wraps(self.command)
        def choose(*args: object, **kwargs: object) -> None:
            chosen(functools.partial(self.command, *args, **kwargs))

        readers = {word: functools.partial(self.read, word) for word in self.parameters}
        return SetParseFns(**readers)(choose)  # type: ignore[no-any-return]

    def read(self, word: str, text: str) -> object:
        """The value of a parameter; ValueError where the text is not of its kind.

        Text stays as it was typed; everything else is read as fire does.
        """
        kinds = self.kinds.get(word, ())
        if word in self.several:
            return tuple(json.loads(text))
        if str in kinds:
            if not text and word.split("_")[-1] in _PATHS:
                raise ValueError(f"--{word} is empty; it must be the name of a file or folder")
            return text
        value = _literal(text)
        if not kinds or not set(kinds) <= set(_PLAIN):
            return value
        if bool in kinds and isinstance(value, str):
            value = _YES.get(value.lower(), value)
        if type(None) in kinds and isinstance(value, str) and value.lower() == "none":
            value = None
        if int in kinds and isinstance(value, float) and value.is_integer():
            value = int(value)  # 1e3
        if type(value) in kinds or (float in kinds and type(value) is int):
            return value
        works = " or ".join(_PLAIN[kind] for kind in kinds)
        raise ValueError(f"--{word} is {value!r:.80}; it must be {works}")

    def page(self, program: str) -> str:
        """What `--help` shows."""
        said, _, about = (inspect.getdoc(self.command) or "").partition("Args:\n")
        words = "".join(
            f" {word.upper()}" if self.parameters[word].default is inspect.Parameter.empty
            else f" [{word.upper()}]"
            for word in self.positional[: self._leading()]
        )  # fmt: skip
        lines = [f"{program}{words} [--OPTION VALUE ...]", "", said.strip(), ""]
        return "\n".join([*lines, *self._rows(about), ""])

    # ---- the parts of it

    def _leading(self) -> int:
        """How many parameters people give by position: those that are needed, or else the first."""
        needed = [
            self.parameters[word].default is inspect.Parameter.empty for word in self.positional
        ]
        return max(sum(needed), 1)

    def _option(self, flag: str, value: str | None) -> tuple[str, str | None]:
        """The parameter that a flag stands for, and its value where the flag itself has it."""
        word = flag.lstrip("-").replace("-", "_")
        if flag.startswith("--") and word in self.parameters:
            return word, value
        switch = word.removeprefix("no").removeprefix("_")
        if flag.startswith("--no") and bool in self.kinds.get(switch, ()):
            if value is not None:
                raise UsageError(f"{flag} takes no value: it is {flag} or --{switch}")
            return switch, "False"
        begin = [each for each in self.parameters if each.startswith(word)]
        if not flag.startswith("--") and len(word) == 1 and len(begin) == 1:
            return begin[0], value
        *some, last = [f"--{each}" for each in self._like(word)] or [""]
        meant = f"did you mean {', '.join(some)}{' or ' if some else ''}{last}? " if last else ""
        takes = ", ".join(f"--{each}" for each in [*self.parameters, "debug"])
        raise UsageError(f"there is no option {flag}: {meant}{self.called} takes {takes}")

    def _like(self, word: str) -> list[str]:
        """Which parameters somebody may have meant, the nearest first."""
        names = list(self.parameters)
        if _ELSEWHERE.get(word) in names:
            return [_ELSEWHERE[word]]
        begin = [each for each in names if each.startswith(word) or word.startswith(each)]
        parts = set(word.split("_")) - {"max", "no"}
        share = [each for each in names if len(word) > 2 and parts & set(each.split("_"))]
        return begin or get_close_matches(word, names, 1) or share

    def _value(self, word: str, rest: list[str], free: Sequence[str]) -> str:
        """The value of an option whose flag has none: the next word, or for a switch often none."""
        kinds = self.kinds.get(word, ())
        following = rest[0] if rest else None
        ends = following is None or following == "--" or _is_flag(following)
        if bool in kinds:
            literal = None if following is None else _literal(following)
            is_text = bool(free) and str in self.kinds.get(free[0], (str,))
            if ends or (isinstance(literal, str) and literal.lower() not in ("true", "false")):
                return "True"
            if not isinstance(literal, bool | str) and is_text:
                return "True"  # a text that looks like a number
            return rest.pop(0)
        if ends:
            wanted = "a text" if str in kinds or word in self.several else "a value"
            if kinds and set(kinds) <= set(_PLAIN):
                wanted = " or ".join(_PLAIN[kind] for kind in kinds)
            form = f" (or --{word}={following})" if following is not None else ""
            raise UsageError(f"--{word} needs {wanted} after it{form}")
        return rest.pop(0)

    def _rows(self, about: str) -> list[str]:
        """A row for each parameter, with what the docstring says of it, and numbers by default."""
        told = re.findall(r"^    (\w+): (.*(?:\n {8,}.*)*)", about, re.M)
        words = dict(told) | {"debug": "show where an error comes from"}
        rows = []
        for word in [*self.parameters, "debug"]:
            text = re.sub(r"\s+", " ", words.get(word, ""))
            default = self.parameters[word].default if word in self.parameters else None
            if type(default) in (int, float):
                text += f" [{default}]"
            first, after = f"  --{word:20} ", " " * 25
            rows.append(fill(text, 100, initial_indent=first, subsequent_indent=after))
        return rows


def split(words: Sequence[str], known: Sequence[str]) -> tuple[list[str], set[str]]:
    """The words without those of `known` that stand before `--`, and which of these were there."""
    end = words.index("--") if "--" in words else len(words)
    found = {word for word in words[:end] if word in known}
    return [word for word in words[:end] if word not in known] + list(words[end:]), found


def _literal(text: str) -> object:
    """What fire reads, which for a very long text would take Python's parser beyond its depth."""
    return DefaultParseValue(text) if len(text) < 100 else text


def _is_flag(word: str) -> bool:
    return _FLAG.fullmatch(word) is not None and not _is_number(word)


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True  # -inf
