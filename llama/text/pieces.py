"""Text in pieces, as SentencePiece writes them: what all tokenizers of that kind have in common.

Pairs of neighbours become one piece, the best first. Also reads the pieces out of a SentencePiece
model without its package. Knows no file. The surprising thing: a space is written before a text and
taken away again by decode, so the first token of a text stands for other bytes than the same token
later on.

The algorithm: Sennrich et al. 2016 (arXiv 1508.07909), as in SentencePiece (arXiv 1808.06226).
"""

import heapq
import struct
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator
from collections.abc import Set as AbstractSet
from typing import Literal, NamedTuple

from llama.text.added import Allows, HasAddedWords, check_disallowed
from llama.tokenizer import IncrementalDecoder, check_encode

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

SPACE = "▁"


class PieceText(HasAddedWords, ABC):
    """Text to ids and back as SentencePiece has it, whoever cuts plain text into pieces."""

    bos_id: int
    eos_id: int
    pad_id: int = -1

    def encode(
        self,
        s: str,
        *,
        bos: bool,
        eos: bool,
        allowed_special: Literal["all"] | AbstractSet[str] = frozenset(),
        disallowed_special: Literal["all"] | Collection[str] = (),
    ) -> list[int]:
        """Ids of `s`, as `Tokenizer.encode` has them.

        What follows a special token begins with SentencePiece's space, as a text does.
        """
        allowed = check_encode(s, self.special_tokens, allowed_special, disallowed_special)
        check_disallowed(s, self.special_tokens, allowed, disallowed_special)
        ids = [*self.prefix] if bos else []
        ids += self._mixed(s, allowed, frozenset())
        if eos:
            ids += self.suffix or (self.eos_id,)
        return self._check_rows(ids)

    def encode_plain(self, s: str, barred: AbstractSet[str]) -> list[int]:
        """Ids of `s` alone, in which neither special tokens nor the `barred` words are found."""
        return self._check_rows(self._mixed(s, frozenset(), barred))

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`, without the space before it; invalid UTF-8 as U+FFFD.

        Ids without a token have no text. Raises ValueError for an id outside the vocabulary and the
        rows of the model, pad_id among them.
        """
        decoder = IncrementalDecoder(self)
        return "".join([*map(decoder.push, ids), decoder.flush()])

    @abstractmethod
    def token_bytes(self, token: int) -> bytes:
        """The bytes that one id stands for inside a text."""

    @abstractmethod
    def first_bytes(self, token: int) -> bytes:
        """The bytes of an id that begins a text: without the space that a piece may begin with."""

    def _mixed(
        self,
        s: str,
        allowed: AbstractSet[str],
        barred: AbstractSet[str],
        allows: Allows | None = None,
    ) -> list[int]:
        """Ids of a text with added words among the rest of it."""
        hidden = (barred | self.special_tokens.keys()) - allowed
        if allows is not None:
            hidden |= barred
        ids: list[int] = []
        for part in self._words(allowed, barred).split(s, allows):
            if part.word is not None:
                ids.append(part.word.id)
            else:  # halves of a pair of surrogates become one character, lone ones U+FFFD
                whole = part.text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
                ids += self._text(whole, begins=part.start == 0, barred=hidden)
        return ids

    @abstractmethod
    def _text(self, text: str, *, begins: bool, barred: AbstractSet[str]) -> list[int]:
        """Ids of text without added words; whether it begins the whole text."""


# How good it is to join two neighbours, the lowest first; None: they are not joined.
Rank = Callable[[str, str], float | None]


def merge(
    symbols: list[str], fixed: list[bool], rank: Rank, halves: dict[str, tuple[str, str]]
) -> list[str]:
    """Join neighbours into pieces, those of the lowest rank first, of equal ones the leftmost.

    `fixed` symbols stay as they are. `halves` learns of what each piece was made last.
    """
    before = list(range(-1, len(symbols) - 1))
    after = [*range(1, len(symbols)), -1]
    heap: list[tuple[float, int, int, str]] = []

    def offer(left: int, right: int) -> None:
        if left >= 0 and right >= 0 and not (fixed[left] or fixed[right]):
            found = rank(symbols[left], symbols[right])
            if found is not None:
                joined = symbols[left] + symbols[right]
                heapq.heappush(heap, (found, left, right, joined))
                halves[joined] = symbols[left], symbols[right]

    for left in range(len(symbols) - 1):
        offer(left, left + 1)
    while heap:
        _, left, right, joined = heapq.heappop(heap)
        if not symbols[left] or after[left] != right or symbols[left] + symbols[right] != joined:
            continue  # one of the two is part of something else by now
        symbols[left], symbols[right] = joined, ""
        after[left] = after[right]
        if after[right] >= 0:
            before[after[right]] = left
        offer(before[left], left)
        offer(left, after[left])
    return [symbol for symbol in symbols if symbol]


# --- a serialized SentencePiece model -------------------------------------------------------------


class Piece(NamedTuple):
    """A piece of a SentencePiece model; its id is its place."""

    text: str
    score: float
    kind: int


def pieces_of(data: bytes) -> list[Piece]:
    """The pieces of a serialized model: its fields 1, which are protobuf messages of their own.

    Raises ValueError where the data is cut short or no such model.
    """
    try:
        return [_piece(value) for field, value in fields(data) if field == 1]
    except (IndexError, struct.error, UnicodeDecodeError, TypeError) as error:
        raise ValueError("this SentencePiece model is cut short or broken") from error


def _piece(data: bytes | int) -> Piece:
    text, score, kind = "", 0.0, NORMAL
    for field, value in fields(data):  # type: ignore[arg-type]
        if field == 1:
            text = value.decode()  # type: ignore[union-attr]
        elif field == 2:
            score = struct.unpack("<f", value)[0]  # type: ignore[arg-type]
        elif field == 3:
            kind = int(value)
    return Piece(text, score, kind)


def fields(data: bytes) -> Iterator[tuple[int, bytes | int]]:
    """Numbers and values of the fields of a protobuf message."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while at < len(data):
        key = varint()
        if key & 7 == 0:
            yield key >> 3, varint()
            continue
        size = {1: 8, 5: 4}.get(key & 7) or varint()
        yield key >> 3, data[at : at + size]
        at += size
