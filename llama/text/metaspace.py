"""SentencePiece's BPE as Hugging Face's tokenizers run it, with their added words.

A vocabulary and ranked merges make the ids; spaces are written as in pieces.py. Knows no file. The
surprising thing: it differs from SentencePiece itself. Between added words only the first piece of
a text may begin with the space before texts, and a text that begins with a space gets no second
one; which of this holds is said by the folder that the vocabulary came from.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Literal

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
)
from llama.tokenizer.added import AddedToken
from llama.tokenizer.protocols import check_id


@dataclass(frozen=True)
class Spaces:
    """How spaces are written."""

    # a space is put before each stretch between added words, before the first one only, or nowhere
    before: Literal["always", "first", "never"]
    doubled: bool = False  # also where the text begins with a space itself
    normalized: bool = False  # spaces are written before normalized words are looked for
    words: bool = False  # no piece reaches over the beginning of a word
    stripped: bool = True  # decode takes the first space away


@dataclass(frozen=True)
class Merges:
    """A vocabulary of pieces, and pairs of them that become one."""

    vocab: Mapping[str, int]  # ids
    ranks: Mapping[tuple[str, str], int]  # the lowest is merged first
    whole: bool = False  # a text that is a piece is not made from others
    scores: Mapping[str, float] | None = None  # SentencePiece's, where they are known


class MetaspaceTokenizer(PieceText):
    """Pieces and merges; control words have no text and come out of text only where allowed."""

    def __init__(
        self,
        merges: Merges,
        added: Collection[AddedToken],
        spaces: Spaces,
        *,
        names: Mapping[str, str],
        bos: str | None,
        eos: str,
        prefix: Iterable[int],
        suffix: Iterable[int] = (),
        unknown: str | None = None,
    ) -> None:
        """Raises ValueError where a byte has no piece, or two tokens have the same id."""
        self.merges, self.spaces = merges, spaces
        vocab = merges.vocab
        self.tokens = {token: piece for piece, token in vocab.items()}
        if len(self.tokens) < len(vocab):
            raise ValueError("two of its pieces have the same id")
        names_of_bytes = [f"<0x{byte:02X}>" for byte in range(256)]
        lacking = next((name for name in names_of_bytes if name not in vocab), None)
        if lacking is not None:
            raise ValueError(f"its vocabulary has not the 256 bytes as pieces, such as {lacking}")
        self._bytes = {vocab[name]: byte for byte, name in enumerate(names_of_bytes)}
        self._names_of_bytes = names_of_bytes
        own = {word.id: word.content for word in added}
        if len(own) < len(added) or any(self.tokens.get(i, own[i]) != own[i] for i in own):
            raise ValueError("two of its tokens have the same id")
        self._words_of = {word.id: word for word in added}
        self._learn(added, names, 1 + max(*self.tokens, *own))
        self.unknown = None if unknown is None else vocab.get(unknown)
        self.eos_id = self.special_tokens[eos]
        self.bos_id = self.eos_id if bos is None else self.special_tokens[bos]
        self.stop_tokens = {self.eos_id}
        self.prefix, self.suffix = tuple(prefix), tuple(suffix)

    # ---- as GGUF knows it

    @property
    def pieces(self) -> list[str]:
        """The text of every token, as a file spells it; an id without a token is `[PADn]`."""
        texts = self.tokens | {word.id: word.content for word in self.added}
        return [texts.get(token, f"[PAD{token}]") for token in range(self.n_words)]

    @property
    def add_space_prefix(self) -> bool:
        return self.spaces.before != "never"

    @property
    def token_types(self) -> list[int]:
        token_types = dict.fromkeys(self.tokens, NORMAL) | dict.fromkeys(self._bytes, BYTE)
        for word in self.added:
            token_types[word.id] = CONTROL if word.special else USER_DEFINED
        if self.unknown is not None:
            token_types[self.unknown] = UNKNOWN
        return [token_types.get(token, UNUSED) for token in range(self.n_words)]

    @property
    def scores(self) -> list[float]:
        """SentencePiece's scores, or what gives the same order: the first merge of each piece."""
        scores = dict(self.merges.scores or {})
        if not scores:
            for (left, right), rank in self.merges.ranks.items():
                scores[left + right] = max(scores.get(left + right, -1e9), -float(rank))
        return [scores.get(piece, 0.0) for piece in self.pieces]

    # ---- ids to text

    def token_bytes(self, token: int) -> bytes:
        token = check_id(token, max(self.n_words, self.rows))
        word = self._words_of.get(token)
        if word is not None:
            whole = self._normalized(word.content) if word.normalized else word.content
            return b"" if word.special else whole.replace(SPACE, " ").encode()
        if token in self._bytes:
            return bytes([self._bytes[token]])
        return self.tokens.get(token, "").replace(SPACE, " ").encode()

    def first_bytes(self, token: int) -> bytes:
        data = self.token_bytes(token)
        return data.removeprefix(b" ") if self.spaces.stripped else data

    # ---- text to ids

    def _normalized(self, text: str) -> str:
        return self._spaced(text, begins=True) if self.spaces.normalized and text else text

    def _spaced(self, text: str, *, begins: bool) -> str:
        text = text.replace(" ", SPACE)
        wanted = self.spaces.before == "always" or (self.spaces.before == "first" and begins)
        doubled = self.spaces.doubled or not text.startswith(SPACE)
        return SPACE + text if wanted and doubled else text

    def _encode_part(self, text: str, *, begins: bool, hidden: AbstractSet[str]) -> list[int]:
        if not self.spaces.normalized:
            text = self._spaced(text, begins=begins)
        stretches = re.findall(f"{SPACE}?[^{SPACE}]*", text) if self.spaces.words else [text]
        ids: list[int] = []
        for stretch in filter(None, stretches):
            ids += self._merged(stretch, hidden)
        return ids

    def _merged(self, text: str, hidden: AbstractSet[str]) -> list[int]:
        vocab, ranks = self.merges.vocab, self.merges.ranks
        if self.merges.whole and text in vocab and text not in hidden:
            return [vocab[text]]
        symbols: list[str] = []
        fixed: list[bool] = []
        for letter in text:
            if letter in vocab:
                symbols.append(letter)
                fixed.append(False)
            else:
                symbols += (self._names_of_bytes[byte] for byte in letter.encode())
                fixed += [True] * len(letter.encode())
        halves: dict[str, tuple[str, str]] = {}
        ids: list[int] = []
        waiting = merge(symbols, fixed, lambda left, right: ranks.get((left, right)), halves)[::-1]
        while waiting:
            symbol = waiting.pop()
            if symbol not in hidden:
                ids.append(vocab[symbol])
            elif symbol in halves:
                waiting += reversed(halves[symbol])
            else:
                ids += (vocab[self._names_of_bytes[byte]] for byte in symbol.encode())
        return ids


def merges_of_pieces(
    vocab: Mapping[str, int], order: Mapping[str, float] | None = None
) -> dict[tuple[str, str], int]:
    """The merges that pieces without any imply, ranked as transformers ranks them: every split of a
    piece into two others, by id, or by `order` where that is given for the pieces that merge."""
    ranked: list[tuple[float, int, int, str, str]] = []
    among = vocab if order is None else order
    for piece, token in vocab.items():
        if piece not in among:
            continue
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in among and right in among:
                if order is None:
                    ranked.append((token, len(left), len(right), left, right))
                else:
                    ranked.append((order[piece], token, 0, left, right))
    return {pair[3:]: rank for rank, pair in enumerate(sorted(ranked))}
