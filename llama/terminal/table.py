"""Several commands under one name, listed by what they are for; each is imported when it is chosen.

Knows the names of modules and what is said of a command in one line. Refuses to import any of them
for a list: torch takes seconds, and a word of help, or a sentence about a wrong word, should not.
"""

import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import wraps

from llama.terminal.lines import ctrl_c_ends
from llama.terminal.signature import Command

_WIDTH = 10  # of a command's name in the list


@dataclass(frozen=True)
class Entry:
    """A command that has not been imported: `home` is "module:function".

    `says` is the first line of its docstring. `old` has earlier names of options, which stay
    accepted, by what they are called now. Where several processes of one run have no use, it runs
    `alone`: in the first of them.
    """

    purpose: str
    home: str
    says: str
    old: Mapping[str, str] = field(default_factory=dict)
    alone: bool = False


class Table(Mapping[str, Command]):
    """Commands by name.

    `is_first` says whether this is the first process of a run. `options` describes what several
    commands share, for all their help pages, and `defaults` says in words what a value stands for
    that would say little, such as a path. `ending` closes the list.
    """

    def __init__(
        self,
        entries: Mapping[str, Entry],
        *,
        is_first: Callable[[], bool],
        version: str,
        options: Mapping[str, str],
        defaults: Mapping[object, str],
        ending: str,
    ) -> None:
        self.entries, self.is_first, self.version = entries, is_first, version
        self.options, self.defaults, self.ending = options, defaults, ending

    def __getitem__(self, name: str) -> Command:
        entry = self.entries[name]
        module, _, function = entry.home.partition(":")
        with ctrl_c_ends():
            command: Command = getattr(importlib.import_module(module), function)
        return self._alone(command) if entry.alone else command

    def _alone(self, command: Command) -> Command:
        @wraps(command)
        def run(*args: object, **kwargs: object) -> None:
            if self.is_first():
                command(*args, **kwargs)

        return run

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __contains__(self, name: object) -> bool:
        return name in self.entries

    def __len__(self) -> int:
        return len(self.entries)

    def listing(self, program: str) -> str:
        """What `program` shows by itself: every command under its purpose, a line each."""
        lines = [f"{program} COMMAND ..."]
        purpose = None
        for name, entry in self.entries.items():
            if entry.purpose != purpose:
                purpose = entry.purpose
                lines += ["", f"{purpose}:"]
            lines.append(row(name, entry.says))
        return "\n".join([*lines, "", self.ending, ""])


def row(name: str, says: str) -> str:
    """The line of a command in a list."""
    return f"  {name:{_WIDTH}}  {says}".rstrip()
