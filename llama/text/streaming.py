"""Pieces of text from tokens as they come: whole characters, and no part of a stop string.

It knows neither model nor engine: it is told tokens, and says which text is certain. The surprising
thing: a piece is held back, token and all, while its text could still turn out to begin a stop
string; so tokens that only spelled a stop string are never seen by anybody.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from llama.tokenizer import IncrementalDecoder, TextTokenizer


@dataclass(frozen=True)
class Piece:
    """One event of a stream: the prompt it belongs to, and what that prompt got.

    `text` may be empty (a character is not complete yet) and may hold more than its token's text.
    The last piece of a prompt, and only that, has a finish_reason: "stop" or "length"; its token
    may be None. `logprob` is None unless asked for, and so are `top_logprobs`, the (id, logprob) of
    the most probable tokens. A prompt that was refused has one piece, its answer, without a token.
    """

    index: int
    text: str
    token: int | None = None
    logprob: float | None = None
    finish_reason: str | None = None
    top_logprobs: list[tuple[int, float]] | None = None


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
