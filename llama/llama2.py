"""What is particular to Llama 1 and 2: the SentencePiece tokenizer and the [INST] chat format.

Also the one place that looks at a tokenizer file and says which kind it is. Refuses to know models,
tensors and sampling, and needs the package sentencepiece only once such a file is opened.

The surprising thing: SentencePiece writes a space before a text, and decode takes it away again. So
the first token of a text stands for other bytes than the same token later on (`first_bytes`), and
whoever decodes the continuation of a text must say so, or loses the space between the two.
"""

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any, Literal

from llama.ranks import is_sentencepiece, read_bytes
from llama.tokenizer import (
    ChatFormat,
    Dialog,
    DialogFormat,
    IncrementalDecoder,
    TextTokenizer,
    Tokenizer,
    Version,
    check_dialog,
    check_encode,
    check_id,
)
from llama.tokenizer_json import read_tokenizer_json

# Text that has one of these could forge a turn, for the format writes them as plain text.
TAGS = ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>")
REFUSAL = "Error: special tags are not allowed as part of the prompt."


class RefusedDialog(ValueError):
    """A dialog that is not run; the message is its answer."""


def open_tokenizer(path: str | os.PathLike[str], *, version: Version = "3") -> TextTokenizer:
    """The tokenizer in a file of any kind; `version` is for Llama 3's ranks, see `Tokenizer`.

    Raises FileNotFoundError, or ValueError naming the file, where it is of no kind that is read.
    """
    if os.fspath(path).endswith(".json"):
        return read_tokenizer_json(Path(path))
    data = read_bytes(os.fspath(path))
    if is_sentencepiece(data):
        return SentencePieceTokenizer(path, data=data)
    return Tokenizer(path, version=version)


def chat_format(tokenizer: TextTokenizer) -> DialogFormat:
    """The chat format of the models that have this tokenizer."""
    if isinstance(tokenizer, Tokenizer):
        return ChatFormat(tokenizer)
    return Llama2ChatFormat(tokenizer)


class PieceText(ABC):
    """Text to ids and back as SentencePiece has it, whoever cuts plain text into pieces."""

    n_words: int
    bos_id: int
    eos_id: int
    pad_id: int = -1
    stop_tokens: set[int]
    special_tokens: dict[str, int]

    def encode(
        self,
        s: str,
        *,
        bos: bool,
        eos: bool,
        allowed_special: Literal["all"] | AbstractSet[str] = frozenset(),
        disallowed_special: Literal["all"] | Collection[str] = (),
    ) -> list[int]:
        """Ids of `s`, with bos_id before and eos_id after it where asked for.

        Names of special tokens as in `Tokenizer.encode`. What follows a special token begins with
        SentencePiece's space, as a text does.
        """
        allowed = check_encode(s, self.special_tokens, allowed_special, disallowed_special)
        every = set(self.special_tokens) - allowed if disallowed_special == "all" else ()
        for name in every or set(disallowed_special) - {"all"}:
            if name in s:
                raise ValueError(f"the text has the special token {name!r}, which is disallowed")
        ids = [self.bos_id] if bos else []
        names = one_of(allowed)
        for part in re.split(f"({names.pattern})", s) if names else [s]:
            if part in allowed:
                ids.append(self.special_tokens[part])
            elif part:  # halves of a pair of surrogates become one character, lone ones U+FFFD
                whole = part.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
                ids += self._text(whole)
        if eos:
            ids.append(self.eos_id)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`, without the space before it; invalid UTF-8 as U+FFFD.

        Raises ValueError for an id outside 0 .. n_words - 1, pad_id among them.
        """
        decoder = IncrementalDecoder(self)
        return "".join([*map(decoder.push, ids), decoder.flush()])

    @abstractmethod
    def token_bytes(self, token: int) -> bytes:
        """The bytes that one id stands for inside a text."""

    @abstractmethod
    def first_bytes(self, token: int) -> bytes:
        """The bytes of an id that begins a text: without the space that a piece may begin with."""

    @abstractmethod
    def _text(self, text: str) -> list[int]:
        """Ids of text without special tokens."""


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
        self.n_words = self.model.vocab_size()
        self.bos_id = self.model.bos_id()
        self.eos_id = self.model.eos_id()
        if self.bos_id < 0 or self.eos_id < 0:
            raise ValueError(f"{path}: this model has no token for the begin or the end of a text")
        self.stop_tokens = {self.eos_id}
        self.special_tokens = {
            self.model.id_to_piece(token): token
            for token in range(self.n_words)
            if self.model.is_control(token)
        }

    def _text(self, text: str) -> list[int]:
        ids: list[int] = self.model.encode(text)
        return ids

    def token_bytes(self, token: int) -> bytes:
        token = check_id(token, self.n_words)
        piece: str = self.model.id_to_piece(token)
        if self.model.is_control(token):
            return b""
        if self.model.is_byte(token):  # "<0xF0>"
            return bytes.fromhex(piece[3:5])
        if self.model.is_unknown(token):
            return self._alone(token)
        return piece.replace("▁", " ").encode()

    def first_bytes(self, token: int) -> bytes:
        token = check_id(token, self.n_words)
        return self.token_bytes(token) if self.model.is_byte(token) else self._alone(token)

    def _alone(self, token: int) -> bytes:
        text: str = self.model.decode([token])
        return text.encode()


class Llama2ChatFormat:
    """Dialogs to ids, as Llama 2 Chat was trained on them.

    An optional system message comes first and is folded into the user's first one; user and
    assistant alternate; the user has the last word.
    """

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self.tokenizer = tokenizer

    def encode_dialog_prompt(self, dialog: Dialog) -> list[int]:
        """Ids of the whole dialog, up to where the assistant's answer begins.

        Raises ValueError naming the index of the message that is wrong, and RefusedDialog where a
        message has one of the tags.
        """
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
        ids = []
        for asked, answered in zip(turns[::2], turns[1::2], strict=False):
            text = f"[INST] {asked} [/INST] {answered} "
            ids += self.tokenizer.encode(text, bos=True, eos=True)
        return ids + self.tokenizer.encode(f"[INST] {turns[-1]} [/INST]", bos=True, eos=False)


def one_of(names: Collection[str]) -> re.Pattern[str] | None:
    """A pattern of these texts, the longest first; None for none."""
    words = [re.escape(name) for name in sorted(names, key=len, reverse=True)]
    return re.compile("|".join(words)) if words else None


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
