"""SentencePiece's BPE from pieces and their scores alone, without its package or its model file.

The ids are those of SentencePiece: pairs of neighbours become one piece, best score first; what is
no piece becomes its bytes. Knows no file and no tensor. A space is written before a text and taken
away again by decode, as in sentencepiece.py.

The algorithm: Sennrich et al. 2016 (arXiv 1508.07909), as in SentencePiece (arXiv 1808.06226).
"""

import math
from collections.abc import Collection, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

from llama.text.pieces import (
    BYTE,
    CONTROL,
    NORMAL,
    SPACE,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    PieceText,
    merge,
    pieces_of,
)
from llama.tokenizer.added import AddedToken, AddedWords
from llama.tokenizer.protocols import check_id

_UNKNOWN_TEXT = " ⁇ "  # what SentencePiece writes for it


class PieceTokenizer(PieceText):
    """Pieces with scores and types, by id.

    Control pieces, such as "<s>", come out of text only where the caller allows them by name, and
    have no text.
    """

    def __init__(
        self,
        pieces: Sequence[str],
        scores: Sequence[float],
        token_types: Sequence[int],
        *,
        bos_id: int,
        eos_id: int,
        stop_tokens: Collection[int] = (),
        add_space_prefix: bool = True,
        names: Mapping[str, str] | None = None,
        prefix: Sequence[int] | None = None,
        suffix: Sequence[int] = (),
    ) -> None:
        """`names`, `prefix` and `suffix` as in `Tokenizer.from_ranks`.

        Raises ValueError where bos or eos is no token, or a byte has no piece.
        """
        self.pieces, self.scores, self.token_types = pieces, scores, token_types
        self.add_space_prefix = add_space_prefix
        self.bos_id, self.eos_id = bos_id, eos_id
        for name, token in (("begin", bos_id), ("end", eos_id)):
            if not 0 <= token < len(pieces):
                raise ValueError(f"the token of a text's {name}, {token}, is not in the vocabulary")
        if any(math.isnan(score) for score in scores):
            raise ValueError("a score of the vocabulary is no number")
        self.stop_tokens = {eos_id, *stop_tokens}
        self.prefix = (bos_id,) if prefix is None else tuple(prefix)
        self.suffix = tuple(suffix)
        self._learn(
            [
                AddedToken(piece, token, special=token_types[token] == CONTROL)
                for token, piece in enumerate(pieces)
                if token_types[token] in (CONTROL, USER_DEFINED) and piece
            ],
            {"bos_token": pieces[bos_id], "eos_token": pieces[eos_id]} if names is None else names,
            len(pieces),
        )
        self._mergeable = {
            piece if token_types[token] != USER_DEFINED else piece.replace(" ", SPACE): token
            for token, piece in enumerate(pieces)
            if token_types[token] in (NORMAL, USER_DEFINED, UNUSED) and piece
        }
        self._score_of = {piece: -scores[token] for piece, token in self._mergeable.items()}
        spelled = {
            pieces[token]: token for token in range(self.n_words) if token_types[token] == BYTE
        }
        names_of_bytes = [f"<0x{byte:02X}>" for byte in range(256)]
        lacking = next((name for name in names_of_bytes if name not in spelled), None)
        if lacking is not None or len(spelled) > 256:
            raise ValueError(f"its vocabulary has not the 256 bytes as pieces, such as {lacking}")
        self._byte_ids = [spelled[name] for name in names_of_bytes]
        self._whole: dict[frozenset[str], AddedWords] = {}  # by what is barred

    @classmethod
    def of_sentencepiece(cls, tokenizer: Any) -> "PieceTokenizer":
        """The same tokenizer as one whose `model` is a SentencePieceProcessor."""
        model = getattr(tokenizer, "model", None)
        if model is None or not hasattr(model, "serialized_model_proto"):
            raise ValueError(f"{type(tokenizer).__name__} is no kind of tokenizer that GGUF knows")
        token_types = [piece.type for piece in pieces_of(model.serialized_model_proto())]
        size = model.vocab_size()
        assert len(token_types) == size, (len(token_types), size)
        return cls(
            [model.id_to_piece(token) for token in range(size)],
            [model.get_score(token) for token in range(size)],
            token_types,
            bos_id=tokenizer.bos_id,
            eos_id=tokenizer.eos_id,
            stop_tokens=tokenizer.stop_tokens,
            add_space_prefix=model.encode_as_pieces("x")[0].startswith(SPACE),
        )

    def token_bytes(self, token: int) -> bytes:
        token = check_id(token, max(self.n_words, self.rows))
        if token >= self.n_words or self.token_types[token] == CONTROL:
            return b""
        token_type, piece = self.token_types[token], self.pieces[token]
        if token_type == BYTE:
            return bytes.fromhex(piece[3:5])
        return (_UNKNOWN_TEXT if token_type == UNKNOWN else piece.replace(SPACE, " ")).encode()

    def first_bytes(self, token: int) -> bytes:
        data = self.token_bytes(token)
        written = self.add_space_prefix and data and self.pieces[token].startswith(SPACE)
        return data[1:] if written else data

    def _words(
        self, allowed: AbstractSet[str], barred: AbstractSet[str] = frozenset()
    ) -> AddedWords:
        """Allowed control pieces only: user-defined ones are found where spaces are written."""
        every = {word.content for word in self.added if not word.special}
        return super()._words(allowed, every)

    def _user_defined(self, barred: AbstractSet[str]) -> AddedWords:
        key = frozenset(barred)
        if key not in self._whole:
            plain = (w for w in self.added if not w.special and w.content not in barred)
            words = (word._replace(content=word.content.replace(" ", SPACE)) for word in plain)
            self._whole[key] = AddedWords(words)
        return self._whole[key]

    def _encode_part(self, text: str, *, begins: bool, hidden: AbstractSet[str]) -> list[int]:
        text = (" " * self.add_space_prefix + text).replace(" ", SPACE)
        symbols, fixed = [], []
        for part in self._user_defined(hidden).split(text):
            if part.word is not None:
                symbols.append(part.text)
                fixed.append(True)
            else:
                symbols += part.text
                fixed += [False] * len(part.text)
        spelled = {word.replace(" ", SPACE) for word in hidden}
        ids: list[int] = []
        halves: dict[str, tuple[str, str]] = {}
        scores = self._score_of
        for symbol in merge(symbols, fixed, lambda a, b: scores.get(a + b), halves):
            self._emit(symbol, halves, ids, spelled)
        return ids

    def _emit(
        self,
        symbol: str,
        halves: Mapping[str, tuple[str, str]],
        ids: list[int],
        hidden: AbstractSet[str],
    ) -> None:
        """Append the ids of a merged piece: its own, those of its halves, or those of its bytes."""
        token = self._mergeable.get(symbol)
        if token is not None and self.token_types[token] != UNUSED and symbol not in hidden:
            ids.append(token)
        elif symbol in halves:
            for half in halves[symbol]:
                self._emit(half, halves, ids, hidden)
        else:
            ids += (self._byte_ids[byte] for byte in symbol.encode())
