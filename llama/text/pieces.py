"""Text in pieces, as SentencePiece writes them: what all tokenizers of that kind have in common.

Pairs of neighbours become one piece, the best first. Also reads the pieces out of a SentencePiece
model without its package. Knows no file. A space is written before a text and taken away again by
decode, so the first token of a text stands for other bytes than the same token later on.

The algorithm: Sennrich et al. 2016 (arXiv 1508.07909), as in SentencePiece (arXiv 1808.06226).
"""

import heapq
import struct
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from llama.text.streaming import IncrementalDecoder
from llama.tokenizer.protocols import TextTokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

SPACE = "▁"


class PieceText(TextTokenizer):
    """A tokenizer of pieces as SentencePiece has it, whoever cuts plain text into pieces.

    Also what follows a special token begins with SentencePiece's space, as a text does.
    """

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`, without the space before it; see `TextTokenizer.decode`."""
        decoder = IncrementalDecoder(self)
        return "".join([*map(decoder.push, ids), decoder.flush()])


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
    """A piece of a SentencePiece model; its id is its position in the model."""

    text: str
    score: float
    type: int  # NORMAL, UNKNOWN, CONTROL, ...


def pieces_of(data: bytes) -> list[Piece]:
    """Read the pieces of a serialized model: its fields 1, which are protobuf messages themselves.

    Raises ValueError where the data is cut short or no such model.
    """
    try:
        return [_piece(value) for field, value in fields(data) if field == 1]
    except (IndexError, struct.error, UnicodeDecodeError, TypeError) as error:
        raise ValueError("this SentencePiece model is cut short or broken") from error


def _piece(data: bytes | int) -> Piece:
    text, score, piece_type = "", 0.0, NORMAL
    for field, value in fields(data):  # type: ignore[arg-type]
        if field == 1:
            text = value.decode()  # type: ignore[union-attr]
        elif field == 2:
            score = struct.unpack("<f", value)[0]  # type: ignore[arg-type]
        elif field == 3:
            piece_type = int(value)
    return Piece(text, score, piece_type)


def fields(data: bytes) -> Iterator[tuple[int, bytes | int]]:
    """Yield number and value of each field of a protobuf message."""
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
