"""Pieces of text from tokens as they come: whole characters, and no part of a stop string.

It knows neither model nor engine: it is told tokens, and says which text is certain. The surprising
thing: a piece is held back, token and all, while its text could still turn out to begin a stop
string; so tokens that only spelled a stop string are never seen by anybody.
"""

import codecs
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from llama.tokenizer.protocols import TextTokenizer


class IncrementalDecoder:
    """Ids to text one at a time, without breaking a character.

    The pieces of `push` and the last `flush`, joined, are `tokenizer.decode` of all ids. With
    begins=False they continue a text: they are what decode of both adds to decode of the former.
    """

    def __init__(self, tokenizer: TextTokenizer, *, begins: bool = True) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._begins = self._at_start = begins

    def push(self, token: int) -> str:
        """Return the text that `token` completes; bytes of an unfinished character are held back.

        A token without text ends a character, as SentencePiece does it; an id that no token has
        is passed over.
        """
        data = self._tokenizer.token_bytes(token)
        if token >= self._tokenizer.n_words:
            return ""
        if self._at_start and data:
            data, self._at_start = self._tokenizer.first_bytes(token), False
        return self._utf8.decode(data, final=not data)

    def flush(self) -> str:
        """Return what is held back, as U+FFFD. The decoder is then as new."""
        self._at_start = self._begins
        return self._utf8.decode(b"", final=True)


@dataclass(frozen=True)
class Piece:
    """One event of a stream: the prompt it belongs to, and what that prompt got.

    A prompt that was refused has one piece, its answer, without a token.
    """

    index: int  # of the prompt
    text: str  # may be empty, as of half a character, and may hold more than its token's text
    token: int | None = None  # None for a last piece that only ends the prompt
    logprob: float | None = None  # None unless asked for, as are top_logprobs
    finish_reason: str | None = None  # of the last piece only: "stop" or "length"
    top_logprobs: list[tuple[int, float]] | None = None  # (id, logprob) of the most probable tokens


class AnswerText:
    """The text of one answer as its tokens come: whole characters, and no part of a stop string.

    A piece is held back while its text could still turn out to begin a stop string. `begins` is
    False where the answer continues the text of its prompt, see `IncrementalDecoder`.
    """

    def __init__(
        self, tokenizer: TextTokenizer, stop: tuple[str, ...], *, begins: bool = True
    ) -> None:
        self.stopped = False
        self._decoder = IncrementalDecoder(tokenizer, begins=begins)
        self._stop = stop
        self._held: list[Piece] = []

    def push(
        self,
        index: int,
        token: int | None,
        logprob: float | None,
        top: list[tuple[int, float]] | None = None,
    ) -> list[Piece]:
        """The pieces that are now certain; `stopped` is set where a stop string is complete."""
        if token is not None:
            text = self._decoder.push(token)
            self._held.append(Piece(index, text, token, logprob, top_logprobs=top))
        return self._release()

    def close(self, index: int, pieces: list[Piece], reason: str | None) -> list[Piece]:
        """Add what was still held back, and the reason to the last piece."""
        if not self.stopped:
            rest = self._decoder.flush()
            if rest:
                self._held.append(Piece(index, rest))
                pieces = pieces + self._release()
                reason = "stop" if self.stopped else reason
            pieces = pieces + self._held
        last = pieces[-1] if pieces else Piece(index, "")
        return [*pieces[:-1], replace(last, finish_reason=reason)]

    def _release(self) -> list[Piece]:
        """Take the pieces whose text is certain; a stop string that is complete cuts the last."""
        text = "".join(piece.text for piece in self._held)
        found = [at for at in (text.find(s) for s in self._stop) if at >= 0]
        self.stopped = bool(found)
        if found:
            sure = min(found)
        else:
            sure = len(text) - max((_overlap(text, s) for s in self._stop), default=0)
        out, at = [], 0
        while self._held:
            piece = self._held[0]
            if at >= sure if found else at + len(piece.text) > sure:
                break
            out.append(replace(piece, text=piece.text[: sure - at]))
            at += len(piece.text)
            del self._held[0]
        while self._stop and out and not out[-1].text:  # of a character yet to come: it may stop
            self._held.insert(0, out.pop())
        return out


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that is a beginning of `stop`, but not all of it."""
    sizes = range(min(len(text), len(stop) - 1), 0, -1)
    return next((n for n in sizes if text.endswith(stop[:n])), 0)


def stop_strings(stop: str | Sequence[str] | None) -> tuple[str, ...]:
    """The strings of an option `stop`, one or several; ValueError where one is empty or no
    string."""
    several = () if stop is None else (stop,) if isinstance(stop, str) else stop
    strings = tuple(several) if isinstance(several, Iterable) else ("",)
    if not all(isinstance(s, str) and s for s in strings):
        raise ValueError(f"stop is {stop!r}; it must be a string or several, none of them empty")
    return strings


def join_pieces(
    pieces: Iterator[Piece], count: int
) -> list[tuple[str, str, list[str], list[float]]]:
    """Text, finish_reason, token texts and logprobs of each of `count` prompts."""
    whole = [""] * count
    texts: list[list[str]] = [[] for _ in range(count)]
    scores: list[list[float]] = [[] for _ in range(count)]
    reasons = [""] * count
    for piece in pieces:
        whole[piece.index] += piece.text
        if piece.token is not None:
            texts[piece.index].append(piece.text)
        elif piece.text and texts[piece.index]:  # the end of a character that never became whole
            texts[piece.index][-1] += piece.text
        if piece.logprob is not None:
            scores[piece.index].append(piece.logprob)
        reasons[piece.index] = piece.finish_reason or reasons[piece.index]
    return list(zip(whole, reasons, texts, scores, strict=True))
