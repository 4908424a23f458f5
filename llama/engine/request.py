"""A request, what a step brought it, and what its owner is told.

Plain Python, no tensor. The surprising thing: a request changes by single appends and assignments,
each of which is one operation of the interpreter. So another thread may cancel it and a Ctrl-C may
fall between any two lines, and what is there is always a request that can go on. Events are not
kept: they are read off the request, as often as somebody asks.
"""

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from operator import index
from typing import Any, NamedTuple

from llama.sampling_params import SamplingParams, plain_number

Alternatives = list[tuple[int, float]]  # (id, logprob), the most probable first


class Choice(NamedTuple):
    """A token that was chosen, with what the model thought of it."""

    token: int
    logprob: float  # the model's own, before temperature and filters
    top: Alternatives
    finite: bool = True  # whether the logits were numbers


class Outcome(NamedTuple):
    """What a step brought one request: no token, one, or several."""

    request: "Request"
    cached: int  # how many of its tokens have their keys in the slot now
    choices: Sequence[Choice] = ()
    logprobs: Sequence[float] | None = None  # of the prompt tokens that follow, where it is scored
    top_logprobs: Sequence[Alternatives] = ()  # at the same tokens
    finite: bool = True  # whether the states of a scored prompt were numbers


class Event(NamedTuple):
    """What became of a request: a token, its end, or both."""

    request: "Request"
    token: int | None  # at finish_reason "stop" the token that stopped it, which is no output
    logprob: float | None = None  # of the token, by the model itself
    top_logprobs: Alternatives | None = None  # as many as params.logprobs asks for
    finish_reason: str | None = None  # "stop", "length", "error", or what cancel was given


@dataclass(eq=False)
class Request:
    """One prompt and what has become of it. Read it; only the engine writes.

    It waits while `slot` is -1. `error` is set where finish_reason is "error".
    """

    prompt: list[int]
    params: SamplingParams
    limit: int  # tokens it may generate
    stops: Set[int] = frozenset()  # ids that end it, the engine's among them
    seed: int = 0  # drawn when it is queued, where params has none
    number: int = -1  # in the order of arrival; -1: not all ranks know of it yet
    choices: list[Choice] = field(default_factory=list)  # one for each token of the answer
    prompt_logprobs: list[float] = field(default_factory=list)  # the first token's is 0.0
    prompt_top_logprobs: list[Alternatives] = field(default_factory=list)  # the first has none
    slot: int = -1
    cached: int = 0  # how many of prompt + tokens have their keys in the slot
    sound: int = 0  # how many of these are known to be finite numbers
    reused: int = 0  # how many there were when it came, of an earlier request
    share: int | None = None  # most tokens of its prompt in a step, once memory ran out
    stop: Choice | None = None  # the stop token that ended it
    error: Exception | None = None
    ends: list[str] = field(default_factory=list)  # what ended it; the first counts

    @property
    def tokens(self) -> list[int]:
        """The answer so far, without a stop token."""
        return [choice.token for choice in self.choices]

    @property
    def finish_reason(self) -> str | None:
        """ "stop", "length", "error", what cancel was given, or None while it goes on."""
        if self.ends:
            return self.ends[0]
        full = len(self.choices) >= self.limit and (self.limit or not self.pending)
        return "length" if full else None

    @property
    def pending(self) -> int:
        """Tokens whose keys are not in the slot yet: one while decoding, more in the prompt."""
        return len(self.prompt) + len(self.choices) - self.cached

    @property
    def decoding(self) -> bool:
        """Whether all it needs from a step is the token that follows its last one."""
        if self.pending != 1 or not self.limit:
            return False
        return bool(self.choices) or self.params.prompt_logprobs is None

    @property
    def scoring(self) -> bool:
        """Whether its next token is one of a prompt that is to be scored."""
        return self.params.prompt_logprobs is not None and self.cached < len(self.prompt)

    def following(self, count: int) -> list[int]:
        """The first `count` of the pending tokens."""
        if self.choices and self.pending == 1:
            return [self.choices[-1].token]
        return (self.prompt + self.tokens)[self.cached : self.cached + count]

    def news(self, seen: int) -> list[Event]:
        """Its events after the first `seen` tokens, the end among them once there is one."""
        if self.slot < 0 and not self.ends:
            return []  # it waits, as many may
        reason = self.finish_reason  # asked first: what has ended brings no more tokens
        asked = self.params.logprobs
        events = [
            Event(self, token, logprob, None if asked is None else top[:asked])
            for token, logprob, top, _ in self.choices[seen:]
        ]
        if reason == "length" and events:
            events[-1] = events[-1]._replace(finish_reason=reason)
        elif reason == "stop" and self.stop is not None:
            token, logprob, top, _ = self.stop
            events.append(
                Event(self, token, logprob, None if asked is None else top[:asked], reason)
            )
        elif reason is not None:
            events.append(Event(self, None, finish_reason=reason))
        return events


Share = list[tuple[Request, int]]  # which requests run how many of their tokens in a step


def token_ids(prompt: Any) -> list[int]:  # noqa: ANN401 (whatever somebody passes)
    """A prompt as a list of ints: of ints, of integers of numpy or torch, or an array of them.

    Raises ValueError, naming it, for anything else; nothing is rounded.
    """
    if isinstance(prompt, str | bytes | Mapping | Set) or not isinstance(prompt, Iterable):
        raise ValueError(f"the prompt is {prompt!r:.80}; it must be a list of token ids")
    ids = prompt.tolist() if hasattr(prompt, "tolist") else list(prompt)
    if not isinstance(ids, list):
        raise ValueError(f"the prompt is {prompt!r:.80}; it must be a list of token ids")
    if set(map(type, ids)) <= {int}:
        return ids
    out = []
    for token in ids:
        try:
            plain = plain_number(token)
            if isinstance(plain, bool):
                raise TypeError
            out.append(index(plain))
        except TypeError:
            raise ValueError(
                f"the prompt has {token!r:.80} in it; token ids are whole numbers (int)"
            ) from None
    return out
