"""Which tokenizer a file is, and which chat format a model has.

The one place that looks at a tokenizer's file and at a chat template to decide what reads them.
Knows every tokenizer and every format by name, and refuses to know models. Our own formats are used
wherever a template says the same; another template is rendered.
"""

import os
from collections.abc import Collection
from pathlib import Path

from llama.files.ranks import is_sentencepiece, read_bytes
from llama.text.folder_words import BESIDE
from llama.text.llama2 import Llama2ChatFormat
from llama.text.sentencepiece import SentencePieceTokenizer
from llama.text.templates import PROBES, TemplateFormat
from llama.text.tokenizer_folder import read_folder
from llama.tokenizer import ChatFormat, Tokenizer, Version
from llama.tokenizer.dialog import Dialog
from llama.tokenizer.protocols import DialogFormat, TextTokenizer, control_words


def open_tokenizer(path: str | os.PathLike[str], *, version: Version = "3") -> TextTokenizer:
    """The tokenizer in a file of any kind; `version` is for Llama 3's ranks, see `Tokenizer`.

    In a Hugging Face folder, what the files beside it add holds as well. Raises FileNotFoundError,
    or ValueError naming the file, where it is of no kind that is read.
    """
    name = os.fspath(path)
    if name.endswith(".json") or "://" not in name:
        files = tokenizer_files(Path(name))
        if len(files) > 1 or files[0].suffix == ".json":
            return read_folder(files[0], version)
    data = read_bytes(name)
    if is_sentencepiece(data):
        return SentencePieceTokenizer(path, data=data)
    return Tokenizer(path, version=version)


def tokenizer_files(path: Path) -> list[Path]:
    """The files that say what a tokenizer does: the one at `path`, and in a Hugging Face folder
    those beside it. The first holds the vocabulary: tokenizer.json where there is one, for it is
    what transformers reads.
    """
    folder = path.parent
    if not path.is_file() or any(folder.glob("consolidated.*.pth")):
        return [path]
    whole = folder / "tokenizer.json"
    beside = [file for file in map(folder.joinpath, BESIDE) if file.is_file()]
    return [whole if path.name == "tokenizer.model" and whole.is_file() else path, *beside]


# ---- chat formats


def chat_format(tokenizer: TextTokenizer, template: DialogFormat | None = None) -> DialogFormat:
    """The chat format of the models that have this tokenizer; `template` is for messages with more
    than text, where the model has one that otherwise says the same."""
    if isinstance(tokenizer, Tokenizer):
        return ChatFormat(tokenizer, template)
    return Llama2ChatFormat(tokenizer, template)


def choose_format(
    tokenizer: TextTokenizer, template: str | None, stop_token_ids: Collection[int] = ()
) -> DialogFormat:
    """The family's own format where there is no template, or one that says the same; else the
    template.

    `stop_token_ids` end an answer, besides the tokenizer's own. Raises ValueError where the
    template is no template.
    """
    around = {"<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"}
    known = not isinstance(tokenizer, Tokenizer) or around <= {*tokenizer.special_tokens}
    if template is None:
        return chat_format(tokenizer) if known else NoFormat(tokenizer)
    theirs = TemplateFormat(tokenizer, template, stop_token_ids)
    if not known:
        return theirs
    ours = chat_format(tokenizer, theirs)
    same = all(_same(ours, theirs, probe) for probe in PROBES)
    return ours if same and theirs.control <= {*tokenizer.special_tokens} else theirs


def _same(ours: DialogFormat, theirs: DialogFormat, dialog: Dialog) -> bool:
    try:
        return ours.encode_dialog_prompt(dialog) == theirs.encode_dialog_prompt(dialog)
    except ValueError:
        return False


class NoFormat:
    """The format of a model without a chat template, whose tokenizer lacks Llama 3's tokens for
    messages: it refuses every dialog."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self.tokenizer = tokenizer

    def encode_dialog_prompt(self, dialog: Dialog) -> list[int]:
        raise ValueError("this model has no chat template; use text_completion")

    def encode_content(self, text: str) -> list[int]:
        """Ids of the text of a message."""
        return self.tokenizer.encode_plain(text, control_words(self.tokenizer))
