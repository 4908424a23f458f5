"""The page that `--help` shows of a command: from its signature and its docstring.

Refuses to know what a command does. The surprising thing: what several commands share is described
once, by whoever runs them, and a docstring has only what is the command's own.
"""

import inspect
import re
from collections.abc import Mapping
from textwrap import fill

from llama.terminal.signature import Signature

_COLUMNS = 100
_DEBUG = "show where an error comes from"


def page(
    signature: Signature,
    program: str,
    options: Mapping[str, str] | None = None,
    defaults: Mapping[object, str] | None = None,
) -> str:
    """How `program` is called, what it does, and a row for each option.

    A parameter is described by the command's docstring, else by `options`. `defaults` says in words
    what a default stands for.
    """
    said, _, about = (inspect.getdoc(signature.command) or "").partition("Args:\n")
    own = dict(re.findall(r"^    (\w+): (.*(?:\n {8,}.*)*)", about, re.M))
    words = {**(options or {}), **own}
    lines = [f"{program} {signature.usage()}".rstrip(), "", said.strip(), ""]
    for word, one in signature.parameters.items():
        text = words.get(word, "")
        if "default" not in text:
            text += _default(one.default, defaults or {})
        lines.append(_row(word, text))
    lines.append(_row("debug", _DEBUG))
    earlier = [f"--{old} for --{new}" for old, new in signature.old.items() if len(old) > 1]
    if earlier:
        lines += ["", f"Accepted as well: {', '.join(earlier)}."]
    return "\n".join([*lines, ""])


def _row(word: str, text: str) -> str:
    first, after = f"  --{word:20} ", " " * 25
    text = re.sub(r"\s+", " ", text)
    return fill(text, _COLUMNS, initial_indent=first, subsequent_indent=after)


def _default(value: object, defaults: Mapping[object, str]) -> str:
    """A default in words: numbers always, anything else where it has a name."""
    if type(value) in (int, float):
        return f" [{value}]"
    known = isinstance(value, str) and value in defaults
    return f" [{defaults[value]}]" if known else ""
