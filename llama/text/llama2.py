"""What is particular to Llama 1 and 2: the SentencePiece tokenizer and the [INST] chat format.

Also the one place that looks at a tokenizer file and says which kind it is. Refuses to know models,
tensors and sampling, and needs the package sentencepiece only once such a file is opened.

The surprising thing: SentencePiece writes a space before a text, and decode takes it away again. So
the first token of a text stands for other bytes than the same token later on (`first_bytes`), and
whoever decodes the continuation of a text must say so, or loses the space between the two.
"""

import os
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any

from llama.files.ranks import is_sentencepiece, read_bytes
from llama.text.added import AddedToken
from llama.text.dialog import Dialog, check_dialog, has_more
from llama.text.pieces import PieceText
from llama.text.tokenizer_folder import BESIDE, read_folder
from llama.tokenizer import (
    ChatFormat,
    DialogFormat,
    TextTokenizer,
    Tokenizer,
    Version,
    check_id,
    control_words,
)

# Text that has one of these could forge a turn, for the format writes them as plain text.
TAGS = ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>")
REFUSAL = "Error: special tags are not allowed as part of the prompt."


class RefusedDialog(ValueError):
    """A dialog that is not run; the message is its answer."""


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


def chat_format(tokenizer: TextTokenizer, template: DialogFormat | None = None) -> DialogFormat:
    """The chat format of the models that have this tokenizer; `template` is for messages with more
    than text, where the model has one that otherwise says the same."""
    if isinstance(tokenizer, Tokenizer):
        return ChatFormat(tokenizer, template)
    return Llama2ChatFormat(tokenizer, template)


class SentencePieceTokenizer(PieceText):
    """A SentencePiece model: the tokenizer of Llama 1, Llama 2 and Code Llama.

    As a part of text, "<s>" and "</s>" are plain characters unless the caller allows them by name.
    Control tokens have no text.
    """

    def __init__(self, model_path: str | os.PathLike[str], *, data: bytes | None = None) -> None:
        """Read `model_path`, as `Tokenizer` does; `data`: what it holds, where that is known.

        Raises FileNotFoundError naming the path, ValueError where the file is no such model, and
        ImportError where the package sentencepiece is not installed.
        """
        path = os.fspath(model_path)
        self.model = _load(read_bytes(path) if data is None else data, path)
        n_words = self.model.vocab_size()
        self.bos_id = self.model.bos_id()
        self.eos_id = self.model.eos_id()
        if self.bos_id < 0 or self.eos_id < 0:
            raise ValueError(f"{path}: this model has no token for the begin or the end of a text")
        self.stop_tokens = {self.eos_id}
        self.prefix, self.suffix = (self.bos_id,), ()
        control = filter(self.model.is_control, range(n_words))
        ends = {
            "bos_token": self.bos_id,
            "eos_token": self.eos_id,
            "unk_token": self.model.unk_id(),
        }
        self._learn(
            [AddedToken(self.model.id_to_piece(token), token, special=True) for token in control],
            {key: self.model.id_to_piece(token) for key, token in ends.items() if token >= 0},
            n_words,
        )

    def _text(self, text: str, *, begins: bool, barred: AbstractSet[str]) -> list[int]:
        ids: list[int] = self.model.encode(text)
        return ids

    def token_bytes(self, token: int) -> bytes:
        token = check_id(token, max(self.n_words, self.rows))
        if token >= self.n_words:
            return b""
        piece: str = self.model.id_to_piece(token)
        if self.model.is_control(token):
            return b""
        if self.model.is_byte(token):  # "<0xF0>"
            return bytes.fromhex(piece[3:5])
        if self.model.is_unknown(token):
            return self._alone(token)
        return piece.replace("▁", " ").encode()

    def first_bytes(self, token: int) -> bytes:
        data = self.token_bytes(token)
        return data if not data or self.model.is_byte(token) else self._alone(token)

    def _alone(self, token: int) -> bytes:
        text: str = self.model.decode([token])
        return text.encode()


class Llama2ChatFormat:
    """Dialogs to ids, as Llama 2 Chat was trained on them.

    An optional system message comes first and is folded into the user's first one; user and
    assistant alternate; the user has the last word.
    """

    def __init__(self, tokenizer: TextTokenizer, template: DialogFormat | None = None) -> None:
        self.tokenizer = tokenizer
        self.template = template
        self._control = control_words(tokenizer)

    def encode_content(self, text: str) -> list[int]:
        """Ids of the text of a message, or of a part of it."""
        return self.tokenizer.encode_plain(text, self._control)

    def encode_dialog_prompt(self, dialog: Dialog) -> list[int]:
        """Ids of the whole dialog, up to where the assistant's answer begins.

        Raises ValueError naming the index of the message that is wrong, and RefusedDialog where a
        message has one of the tags.
        """
        if self.template is not None and has_more(dialog):
            return self.template.encode_dialog_prompt(dialog)
        check_dialog(dialog, ("system", "user", "assistant"))
        system = dialog[0]["role"] == "system"
        for index, message in enumerate(dialog[system:]):
            wanted = ("user", "assistant")[index % 2]
            if message["role"] != wanted:
                raise ValueError(
                    f"message {index + system} of the dialog: {message['role']!r} where {wanted!r} "
                    "belongs: after an optional system message, user and assistant alternate"
                )
        if dialog[-1]["role"] != "user":
            raise ValueError(
                f"the dialog ends with {dialog[-1]['role']!r}: the last message is the user's"
            )
        if any(tag in message["content"] for message in dialog for tag in TAGS):
            raise RefusedDialog(REFUSAL)
        texts = [message["content"] for message in dialog[system:]]
        if system:
            texts[0] = f"<<SYS>>\n{dialog[0]['content']}\n<</SYS>>\n\n{texts[0]}"
        turns = [text.strip() for text in texts]
        begin = self.tokenizer.prefix
        ids = []
        for asked, answered in zip(turns[::2], turns[1::2], strict=False):
            text = f"[INST] {asked} [/INST] {answered} "
            ids += [*begin, *self.encode_content(text), self.tokenizer.eos_id]
        return [*ids, *begin, *self.encode_content(f"[INST] {turns[-1]} [/INST]")]


def _load(data: bytes, path: str) -> Any:  # noqa: ANN401
    try:
        import sentencepiece
    except ImportError:
        raise ImportError(
            f"{path} is a SentencePiece model, of Llama 1 or 2; reading it needs a package that is "
            "not installed: pip install -e '.[llama2]'"
        ) from None
    if not is_sentencepiece(data):
        raise ValueError(
            f"{path}: this is no SentencePiece model: open_tokenizer reads either kind"
        )
    try:
        return sentencepiece.SentencePieceProcessor(model_proto=data)
    except (RuntimeError, OSError, ValueError) as error:
        raise ValueError(f"{path}: this SentencePiece model is cut short or broken") from error
