"""SentencePiece's models by SentencePiece's own package: the tokenizer of Llama 1 and 2.

Refuses to know models, tensors and sampling, and needs the package sentencepiece only once such a
file is opened.

The surprising thing: SentencePiece writes a space before a text, and decode takes it away again. So
the first token of a text stands for other bytes than the same token later on (`first_bytes`), and
whoever decodes the continuation of a text must say so, or loses the space between the two.
"""

import os
from collections.abc import Set as AbstractSet
from typing import Any

from llama.files.ranks import is_sentencepiece, read_bytes
from llama.text.pieces import PieceText
from llama.tokenizer.added import AddedToken
from llama.tokenizer.protocols import check_id


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

    def _encode_part(self, text: str, *, begins: bool, hidden: AbstractSet[str]) -> list[int]:
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


def _load(data: bytes, path: str) -> Any:
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
