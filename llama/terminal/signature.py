"""The words of a command line to the parameters of a function.

Knows signatures, and nothing of what a function does. The surprising thing: fire,
which reads values and makes the call, would read every word as a Python literal, call a function
before it complains about a flag that the function does not have, and take the next word, or True,
for the value of an option that has none. So the words are sorted here first: what fire gets is
`--word=text`, each parameter once.
"""

import functools
import inspect
import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from difflib import get_close_matches
from os.path import exists
from typing import get_args, get_type_hints

from fire.decorators import SetParseFns
from fire.parser import DefaultParseValue

Command = Callable[..., None]
SEVERAL = tuple[str, ...]
_EITHER = ["ckpt_dir", "text"]  # by position, where a text alone is enough

_FLAG = re.compile(r"(--?[A-Za-z][\w-]*)(?:=(.*))?", re.S)
_PLAIN = {int: "a whole number", float: "a number", bool: "True or False", type(None): "None"}
_PATHS = {"dir", "path", "file", "src", "dst", "adapter", "against", "plot"}  # how they end
# What other programs call things.
_ELSEWHERE = {"max_tokens": "max_gen_len", "max_new_tokens": "max_gen_len", "prompt": "text",
              "input": "ckpt_dir", "output": "dst", "model": "ckpt_dir", "ctx": "max_seq_len",
              "context": "max_seq_len", "batch_size": "max_batch_size"}  # fmt: skip
_YES = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


class UsageError(Exception):
    """A command line that does not fit its command, in one sentence."""


class Signature:
    """What a command takes: its parameters by name, and which of them may be given by position.

    `called` is how its sentences name it. Parameters that are keyword-only in Python are options
    only; the others may also stand in the order of the signature. `old` has earlier names of
    parameters, which stay accepted.
    """

    def __init__(self, command: Command, called: str, old: Mapping[str, str] | None = None) -> None:
        self.command, self.called, self.old = command, called, old or {}
        self.parameters = inspect.signature(command).parameters
        hints = get_type_hints(command)
        self.several = {word for word in self.parameters if hints.get(word) == SEVERAL}
        self.kinds = {w: get_args(hints[w]) or (hints[w],) for w in self.parameters if w in hints}
        self.positional = [
            word for word, one in self.parameters.items() if one.kind is not one.KEYWORD_ONLY
        ]

    def usage(self) -> str:
        """What follows the name of the command: words by position, and that there are options."""
        words = [
            word.upper() if word in self._needed() else f"[{word.upper()}]"
            for word in self._by_position()
        ]
        return " ".join([*words, "[--OPTION VALUE ...]"])

    def arranged(self, words: Sequence[str]) -> list[str]:
        """The words of a command line in the form that fire reads.

        `--word text`, `--word=text`, `-w text` where no other option begins with w, `--yes` and
        `--noyes` for switches; what follows `--` is no option. UsageError for anything else.
        """
        given: dict[str, list[str]] = {}
        free = [word for word in self.positional if word not in self.several]
        loose: list[str] = []
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
                put(
                    word, self._value(word, rest, [] if loose else free) if value is None else value
                )
            elif self.positional[:2] == _EITHER:
                loose.append(argument)
            elif free:
                put(free[0], argument)
            else:
                raise self._one_too_many(argument)
        for word, text in self._folder_and_text(loose, free, given):
            put(word, text)
        missing = [f"--{word}" for word in self._needed() if word not in given]
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

    # ---- the parts of it

    def _needed(self) -> list[str]:
        return [w for w, one in self.parameters.items() if one.default is inspect.Parameter.empty]

    def _by_position(self) -> list[str]:
        """What people give by position: where everything may be, only what must be given."""
        some = len(self.positional) < len(self.parameters)
        return self.positional if some else self._needed() or self.positional[:1]

    def _folder_and_text(
        self, words: list[str], free: Sequence[str], given: Collection[str]
    ) -> list[tuple[str, str]]:
        """Which of `[CKPT_DIR] [TEXT]` the words by position are: a single one is the text.

        It is the folder where the text comes from elsewhere. `TEXT CKPT_DIR`, as it was before, is
        taken where only its second word is a path that exists.
        """
        if len(words) > len(free):
            raise self._one_too_many(words[len(free)])
        there = [exists(word) for word in words]  # no error for what cannot be a name
        if len(words) == 2 and not any(there):
            raise UsageError(
                f"neither {words[0]!r:.80} nor {words[1]!r:.80} is a folder or a file, and "
                f"{self.called} takes [CKPT_DIR] [TEXT]: put words that belong together in quotes"
            )
        if len(words) == 2:
            return list(zip(_EITHER if there[0] else _EITHER[::-1], words, strict=True))
        if words and "text" in free and not (there[0] and {"file", "decode"} & set(given)):
            return [("text", words[0])]
        if words and not there[0]:
            raise self._one_too_many(words[0])
        return [("ckpt_dir", word) for word in words]

    def _one_too_many(self, word: str) -> UsageError:
        takes = " ".join(word.upper() for word in self._by_position())
        return UsageError(
            f"{word!r:.80} is one word more than {self.called} takes ({takes}): put words that "
            "belong together in quotes, and name options by their --name"
        )

    def _option(self, flag: str, value: str | None) -> tuple[str, str | None]:
        """The parameter that a flag stands for, and its value where the flag itself has it."""
        word = flag.lstrip("-").replace("-", "_")
        if word in self.old:
            return self.old[word], value
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
