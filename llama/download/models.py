"""The models that Meta's signed URLs give: their names, sizes and files, and where these lie.

Knows a table and what people call its lines; refuses to know how anything is fetched.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from llama.terminal.progress import amount_of

# folder here | also called | path on the server | shards | MB on disk
# A path is = for the folder itself, and both where `Meta-` came to be left out of it later.
_TABLE = """
llama-2-7b                       7b            =                     1   13477
llama-2-7b-chat                  7b-chat       =                     1   13477
llama-2-13b                      13b           =                     2   26032
llama-2-13b-chat                 13b-chat      =                     2   26032
llama-2-70b                      -             =                     8  137954
llama-2-70b-chat                 70b-chat      =                     8  137954
Meta-Llama-3-8B                  8b            8b_pre_trained        1   16061
Meta-Llama-3-8B-Instruct         8b-instruct   8b_instruction_tuned  1   16061
Meta-Llama-3-70B                 70b           70b_pre_trained       8  141108
Meta-Llama-3-70B-Instruct        70b-instruct  70b_instruction_tuned 8  141108
Meta-Llama-3.1-8B                -             both                  1   16061
Meta-Llama-3.1-8B-Instruct       -             both                  1   16061
Meta-Llama-3.1-70B               -             both                  8  141108
Meta-Llama-3.1-70B-Instruct      -             both                  8  141108
Meta-Llama-3.1-405B-MP8          -             both                  8  811768
Meta-Llama-3.1-405B-MP16         -             both                 16  820293
Meta-Llama-3.1-405B-Instruct-MP8  -            both                  8  811768
Meta-Llama-3.1-405B-Instruct-MP16 -            both                 16  820293
Llama-3.2-1B                     1b            =                     1    2472
Llama-3.2-1B-Instruct            1b-instruct   =                     1    2472
Llama-3.2-3B                     3b            =                     1    6426
Llama-3.2-3B-Instruct            3b-instruct   =                     1    6426
Llama-3.3-70B-Instruct           -             =                     8  141108
llama-guard                      guard         .                     1   13477
Meta-Llama-Guard-2-8B            guard-2       llama-guard-2         1   16061
Meta-Llama-Guard-3-8B            guard-3       both                  1   16061
Llama-Guard-3-1B                 -             =                     1    2998
"""


class File(NamedTuple):
    """A file of a model, which is not whole without those that are needed."""

    needed: bool
    path: str  # on the server
    name: str


class Model(NamedTuple):
    """A line of the table."""

    name: str
    short: str
    paths: tuple[str, ...]
    folder: str
    shards: int
    size: int  # bytes on disk, about

    @property
    def family(self) -> str:
        return "-".join(self.name.split("-")[:2])

    @property
    def has_checklist(self) -> bool:
        """Whether it is sure that it has one."""
        return self.family not in ("llama-3.1", "llama-guard")

    def checklists(self, path: str) -> list[File]:
        """Its checklists, where it lies in the folder `path` of the server."""
        tokenizers = File(True, "tokenizer_checklist.chk", "tokenizer_checklist.chk")
        own = File(True, _under(path, "checklist.chk"), "checklist.chk")
        return [own, tokenizers] if self.family == "llama-2" else [own]

    def files(self, path: str) -> list[File]:
        """Its other files, the small ones first."""
        shards = [f"consolidated.{i:02d}.pth" for i in range(self.shards)]
        policy = "USE_POLICY" if self.family == "llama-3" else "USE_POLICY.md"
        at_root = "." if self.family == "llama-2" else path
        return [
            File(True, _under(path, "params.json"), "params.json"),
            File(True, _under(at_root, "tokenizer.model"), "tokenizer.model"),
            *(File(False, name, name) for name in ("LICENSE", policy)),
            *(File(True, _under(path, name), name) for name in shards),
        ]

    def is_called(self, word: str) -> bool:
        """Whether one word of a user means this model, among others perhaps."""
        word = re.sub(r"^(meta-llama/)?(meta-)?", "", word.lower())
        names = {"all", self.family, self.name, self.name[len("llama-") :], self.short}
        return word != "-" and word in names | {_plain(self.folder)}


def models() -> list[Model]:
    """All that there are."""
    found = []
    for line in _TABLE.strip().split("\n"):
        folder, short, path, shards, megabytes = line.split()
        paths = {"=": (folder,), "both": (folder, folder[len("Meta-") :])}.get(path, (path,))
        name = "llama-guard-7b" if folder == "llama-guard" else _plain(folder)
        found.append(Model(name, short, paths, folder, int(shards), int(megabytes) * 10**6))
    return found


def matching(word: str) -> list[Model]:
    """The models that one word of a user means."""
    return [model for model in models() if model.is_called(word)]


def listing() -> str:
    """The table as people see it."""
    rows = [("NAME", "OR SHORT", "SIZE", "SHARDS", "FOLDER")]
    rows += [(m.name, m.short, amount_of(m.size), str(m.shards), m.folder) for m in models()]
    return "".join(f"{a:29} {b:13} {c:>9} {d:>7}  {e}\n" for a, b, c, d, e in rows)


def _plain(folder: str) -> str:
    name = folder.lower()
    return name[len("meta-") :] if name.startswith("meta-") else name


def _under(path: str, name: str) -> str:
    return name if path == "." else f"{path}/{name}"
