"""SentencePiece's BPE from pieces and their scores alone, without its package or its model file.

The ids are those of SentencePiece: pairs of neighbours become one piece, best score first; what is
no piece becomes its bytes. Knows no file and no tensor. The surprising thing: as in llama2.py, a
space is written before a text and taken away again by decode, so the first token of a text stands
for other bytes than the same token later on.

The algorithm: Sennrich et al. 2016 (arXiv 1508.07909), as in SentencePiece (arXiv 1808.06226).
"""

import heapq
import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from llama.llama2 import PieceText, one_of
from llama.tokenizer import check_id

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

_SPACE = "▁"
_UNKNOWN_TEXT = " ⁇ "  # what SentencePiece writes for it


class PieceTokenizer(PieceText):
    """Pieces with scores and kinds, by id.

    Control pieces, such as "<s>", come out of text only where the caller allows them by name, and
    have no text.
    """

    def __init__(
        self,
        pieces: Sequence[str],
        scores: Sequence[float],
        kinds: Sequence[int],
        *,
        bos_id: int,
        eos_id: int,
        stop_tokens: Collection[int] = (),
        add_space_prefix: bool = True,
    ) -> None:
        """Raises ValueError where bos or eos is no token, or a byte has no piece."""
        self.pieces, self.scores, self.kinds = pieces, scores, kinds
        self.add_space_prefix = add_space_prefix
        self.n_words = len(pieces)
        self.bos_id, self.eos_id = bos_id, eos_id
        for name, token in (("begin", bos_id), ("end", eos_id)):
            if not 0 <= token < self.n_words:
                raise ValueError(f"the token of a text's {name}, {token}, is not in the vocabulary")
        if any(math.isnan(score) for score in scores):
            raise ValueError("a score of the vocabulary is no number")
        self.stop_tokens = {eos_id, *stop_tokens}
        self.special_tokens = {
            piece: token for token, piece in enumerate(pieces) if kinds[token] == CONTROL
        }
        self._mergeable = {
            piece: token
            for token, piece in enumerate(pieces)
            if kinds[token] in (NORMAL, USER_DEFINED, UNUSED) and piece
        }
        self._score_of = {piece: scores[token] for piece, token in self._mergeable.items()}
        spelled = {pieces[token]: token for token in range(self.n_words) if kinds[token] == BYTE}
        names = [f"<0x{byte:02X}>" for byte in range(256)]
        lacking = next((name for name in names if name not in spelled), None)
        if lacking is not None or len(spelled) > 256:
            raise ValueError(f"its vocabulary has not the 256 bytes as pieces, such as {lacking}")
        self._byte_ids = [spelled[name] for name in names]
        whole = [p for p in self._mergeable if kinds[self._mergeable[p]] == USER_DEFINED]
        self._whole = one_of(whole)

    @classmethod
    def of_sentencepiece(cls, tokenizer: Any) -> "PieceTokenizer":  # noqa: ANN401
        """The same tokenizer as one whose `model` is a SentencePieceProcessor."""
        model = getattr(tokenizer, "model", None)
        if model is None or not hasattr(model, "serialized_model_proto"):
            raise ValueError(f"{type(tokenizer).__name__} is no kind of tokenizer that GGUF knows")
        kinds = list(_proto_kinds(model.serialized_model_proto()))
        size = model.vocab_size()
        assert len(kinds) == size, (len(kinds), size)
        return cls(
            [model.id_to_piece(token) for token in range(size)],
            [model.get_score(token) for token in range(size)],
            kinds,
            bos_id=tokenizer.bos_id,
            eos_id=tokenizer.eos_id,
            stop_tokens=tokenizer.stop_tokens,
            add_space_prefix=model.encode_as_pieces("x")[0].startswith(_SPACE),
        )

    def token_bytes(self, token: int) -> bytes:
        token = check_id(token, self.n_words)
        if token >= self.n_words:
            return b""
        kind, piece = self.kinds[token], self.pieces[token]
        if kind == CONTROL:
            return b""
        if kind == BYTE:
            return bytes.fromhex(piece[3:5])
        return (_UNKNOWN_TEXT if kind == UNKNOWN else piece.replace(_SPACE, " ")).encode()

    def first_bytes(self, token: int) -> bytes:
        data = self.token_bytes(token)
        written = data and self.add_space_prefix and self.pieces[token].startswith(_SPACE)
        return data[1:] if written else data

    def _text(self, text: str) -> list[int]:
        text = (" " * self.add_space_prefix + text).replace(" ", _SPACE)
        symbols, fixed = [], []
        for part in re.split(f"({self._whole.pattern})", text) if self._whole else [text]:
            if self._whole is not None and self._whole.fullmatch(part):
                symbols.append(part)
                fixed.append(True)
            else:
                symbols += part
                fixed += [False] * len(part)
        ids: list[int] = []
        halves: dict[str, tuple[str, str]] = {}
        for symbol in _merge(symbols, fixed, self._score_of, halves):
            self._emit(symbol, halves, ids)
        return ids

    def _emit(self, symbol: str, halves: Mapping[str, tuple[str, str]], ids: list[int]) -> None:
        """The ids of a piece that came out: its own, those of its halves, or its bytes'."""
        token = self._mergeable.get(symbol)
        if token is not None and self.kinds[token] != UNUSED:
            ids.append(token)
        elif symbol in halves:
            for half in halves[symbol]:
                self._emit(half, halves, ids)
        else:
            ids += (self._byte_ids[byte] for byte in symbol.encode())


def _proto_kinds(data: bytes) -> Iterator[int]:
    """The kind of each piece of a serialized model: field 3 of each field 1, NORMAL where absent.

    The processor tells all kinds but USER_DEFINED; this reads as much of protobuf as that takes.
    """
    for field, value in _fields(data):
        if field == 1:
            assert isinstance(value, bytes)
            yield [NORMAL, *(int(kind) for inner, kind in _fields(value) if inner == 3)][-1]


def _fields(data: bytes) -> Iterator[tuple[int, bytes | int]]:
    """Numbers and values of the fields of a protobuf message that is known to be whole."""
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


def _merge(
    symbols: list[str],
    fixed: list[bool],
    score_of: Mapping[str, float],
    halves: dict[str, tuple[str, str]],
) -> list[str]:
    """Join neighbours into pieces, the best score first, of equal ones the leftmost.

    `fixed` symbols stay as they are. `halves` learns of what each piece was made last.
    """
    before = list(range(-1, len(symbols) - 1))
    after = [*range(1, len(symbols)), -1]
    heap: list[tuple[float, int, int, str]] = []

    def offer(left: int, right: int) -> None:
        if left >= 0 and right >= 0 and not (fixed[left] or fixed[right]):
            joined = symbols[left] + symbols[right]
            score = score_of.get(joined)
            if score is not None:
                heapq.heappush(heap, (-score, left, right, joined))
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
