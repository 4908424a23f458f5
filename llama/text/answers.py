"""What callers get of an answer: its prediction from the pieces of a stream, and its prompt echoed.

Knows pieces and a tokenizer's decoder; refuses to know who makes pieces, and from what.
"""

from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from typing import TypedDict

from llama.text.streaming import IncrementalDecoder, Piece, join_pieces
from llama.tokenizer import Message
from llama.tokenizer.protocols import TextTokenizer


class _Others(TypedDict, total=False):
    finish_reason: str
    tokens: list[str]
    logprobs: list[float]


class CompletionPrediction(_Others, total=False):
    """`tokens` (text pieces) and `logprobs` are there where they were asked for, and as long as
    the ids."""

    generation: str


class ChatPrediction(_Others, total=False):
    """The same of an answer in a dialog."""

    generation: Message


def joined(
    pieces: Generator[Piece, None, None], count: int, logprobs: bool
) -> list[tuple[str, _Others]]:
    """The text of each of `count` prompts, and the rest of its prediction."""
    with closing(pieces):
        answers = join_pieces(pieces, count)
    out = []
    for text, reason, tokens, scores in answers:
        others = _Others(finish_reason=reason)
        if logprobs:
            others |= {"tokens": tokens, "logprobs": scores}
        out.append((text, others))
    return out


def echoed(
    tokenizer: TextTokenizer,
    index: int,
    prompt: Sequence[int],
    scores: Sequence[float],
    tops: Sequence[list[tuple[int, float]]],
) -> Iterator[Piece]:
    """A prompt as pieces, with the scores and alternatives there are of its tokens."""
    decoder = IncrementalDecoder(tokenizer)
    for at, token in enumerate(prompt):
        text = "" if token == tokenizer.bos_id else decoder.push(token)
        score = scores[at] if scores else None
        yield Piece(index, text, token, score, top_logprobs=tops[at] if tops else None)
