"""What several ranks say to each other at the start of a step, so that all of them take the same.

One small message: what rank 0 was told since the last step (submissions with their seeds, cancels,
that it is over), and a checksum of everything so far, the tokens among it. Either every rank makes
the same calls, or rank 0 alone does and the others follow. No torch; with one rank nothing here
exists.

The message is JSON in UTF-8, a list of objects in the order in which they were told:

    {"submit": [ids], "params": {fields of SamplingParams that are not the default}, "seed": S}
    {"cancel": N, "reason": R}    N: the number of the request, in the order of submissions
    {"close": true}               nothing more will come
"""

import json
import zlib
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import fields
from typing import Any, NamedTuple

from llama.engine.protocol import Line
from llama.engine.request import Request
from llama.sampling_params import SamplingParams

DEFAULTS = SamplingParams()
FIELDS = [field.name for field in fields(SamplingParams)]


class Cancel(NamedTuple):
    request: Request
    reason: str


class Close(NamedTuple):
    """Whoever follows may leave."""


News = Request | Cancel | Close


class Control:
    """This rank's end of the line. `follows`: it does what rank 0 is told, and is told nothing."""

    def __init__(self, ranks: Line, numbers: Iterator[int]) -> None:
        self.ranks, self.numbers = ranks, numbers
        self.news: list[News] = []  # what this rank was told since the last message
        self.follows = self.over = False
        self.broken: str | None = None  # why the ranks can no longer step together
        self._checksum = 0

    def note(self, values: Iterable[int]) -> None:
        """Add to the checksum of what every rank must have come to."""
        self._checksum = zlib.crc32(array("q", values).tobytes(), self._checksum)

    def leaves(self, request: Request) -> bool:
        """Whether a request is to be cancelled with the next message."""
        return any(isinstance(item, Cancel) and item.request is request for item in self.news)

    def agree(self) -> tuple[list[News], list[dict[str, Any]]]:
        """Exchange a message: what this rank was told, and for one that follows what rank 0 was.

        Raises RuntimeError where the ranks were told or have come to different things.
        """
        if self.broken:
            raise RuntimeError(
                f"this model's ranks no longer step together, since one failed ({self.broken}): "
                "start all of them again"
            )
        news = list(self.news)  # other threads go on adding
        for item in news:
            if isinstance(item, Request) and item.number < 0:
                item.number = next(self.numbers)
        message = encode(news)
        told = zlib.crc32(message, self._checksum)
        values = [self._checksum, told, len(message), self.follows]
        before, after, sizes, following = zip(*self.ranks.exchange(values), strict=True)
        own = [sum_ for sum_, follows in zip(after, following, strict=True) if not follows]
        if len({*before}) > 1 or len({*own}) > 1:
            raise RuntimeError(
                f"the ranks disagree on prompts or tokens (checksums {list(after)}): every rank "
                "must make the same calls with the same arguments"
            )
        heard = b""
        if any(following) and sizes[0]:
            heard = self.ranks.spread(message, sizes[0])
        self.over = self.over or bool(following[0])  # nobody leads
        self._checksum = zlib.crc32(heard, self._checksum) if self.follows else told
        del self.news[: len(news)]
        return news, decode(heard) if self.follows else []

    def fail(self, error: BaseException) -> None:
        """This rank gave a step up, which the others cannot end without it."""
        self.broken = f"{type(error).__name__}: {error}"
        self.ranks.fail()


def encode(news: Iterable[News]) -> bytes:
    """The message of what was told; requests have their numbers. Nothing is no byte."""
    told: list[dict[str, Any]] = []
    for item in news:
        if isinstance(item, Request):
            asked = {name: getattr(item.params, name) for name in FIELDS}
            params = {name: v for name, v in asked.items() if v != getattr(DEFAULTS, name)}
            told.append({"submit": item.prompt, "params": params, "seed": item.seed})
        elif isinstance(item, Cancel):
            told.append({"cancel": item.request.number, "reason": item.reason})
        else:
            told.append({"close": True})
    return json.dumps(told, separators=(",", ":")).encode() if told else b""


def decode(message: bytes) -> list[dict[str, Any]]:
    """The objects of a message, in which "params" are SamplingParams again."""
    told: list[dict[str, Any]] = json.loads(message) if message else []
    for item in told:
        if "submit" in item:
            given = item["params"]
            if given.get("logit_bias"):  # whose ids JSON makes strings
                given["logit_bias"] = {int(i): shift for i, shift in given["logit_bias"].items()}
            item["params"] = SamplingParams(**given)
    return told
