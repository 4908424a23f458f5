"""What a request asks of the choice of its tokens: `SamplingParams`, validated once.

Plain Python: refuses to know tensors and how a token is chosen, which is llama/sampling.py's.
`max_tokens`, `stop_token_ids`, `logprobs` and `prompt_logprobs` are obeyed by the engine.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

LARGEST_SHIFT = 1e6  # of a logit by a bias or a penalty: beyond every logit, and sums stay finite
LARGEST_FLOAT = (2 - 2.0**-23) * 2.0**127  # of float32


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """What a request asks of the choice of its tokens. Every field is validated here, once.

    Order: penalties and biases shift the logits, then temperature, top_k, top_p, min_p, each on
    what the one before left. Where tokens tie at a filter's edge all of them stay, and the most
    probable token always does. Numbers of numpy and torch are taken wherever a number is, and kept
    as Python's own.

    temperature        0 takes the most probable token, the lowest id among equals
    top_p              the fewest tokens whose probabilities sum to top_p; 1 filters nothing
    top_k              the k most probable tokens; 0 filters nothing
    min_p              tokens at least min_p times as probable as the most probable; 0: all
    presence_penalty   subtracted from the logits of tokens generated so far (not the prompt's)
    frequency_penalty  subtracted from them once for each time that they were generated
    logit_bias         added to the logits of these ids; -inf bans a token
    seed               any int, taken modulo 2**64; None: whoever runs the request draws one
    max_tokens         how many tokens to generate at most; None: as many as there is room for
    stop_token_ids     ids that end the request, beside the model's own
    logprobs           None: none; k: the chosen token's and those of the k most probable
    prompt_logprobs    None: the prompt is not scored; k: its tokens' and those of the k most
                       probable at each of its positions. True stands for 0, False for None
    """

    temperature: float = 0.6
    top_p: float = 0.9
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = field(default=None, hash=False)
    seed: int | None = None
    max_tokens: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    def __post_init__(self) -> None:
        for name in _NUMBERS:
            object.__setattr__(self, name, plain_number(getattr(self, name)))
        if isinstance(self.prompt_logprobs, bool):
            object.__setattr__(self, "prompt_logprobs", 0 if self.prompt_logprobs else None)
        _require(_number(self.temperature) >= 0, "temperature", self, _TEMPERATURE)
        _require(0 < _number(self.top_p) <= 1, "top_p", self, "a number > 0 and <= 1")
        _require(_whole(self.top_k), "top_k", self, "an int >= 0 (0 filters nothing)")
        _require(0 <= _number(self.min_p) <= 1, "min_p", self, "a number >= 0 and <= 1")
        for name in ("presence_penalty", "frequency_penalty"):
            shift = _number(getattr(self, name))
            works = f"a number from {-LARGEST_SHIFT:.0f} to {LARGEST_SHIFT:.0f}"
            _require(abs(shift) <= LARGEST_SHIFT, name, self, works)
        _require(self.seed is None or _integral(self.seed), "seed", self, "an int or None")
        _require(self.max_tokens is None or _whole(self.max_tokens), "max_tokens", self, _WHOLE)
        _require(self.logprobs is None or _whole(self.logprobs), "logprobs", self, _WHOLE)
        scored = self.prompt_logprobs
        _require(scored is None or _whole(scored), "prompt_logprobs", self, _WHOLE)
        stops = _plain_list(self.stop_token_ids)
        stops_ok = stops is not None and all(map(_whole, stops))
        _require(stops_ok, "stop_token_ids", self, "a tuple of token ids, each an int >= 0")
        object.__setattr__(self, "stop_token_ids", tuple(stops or ()))
        if self.logit_bias is not None:
            _require(isinstance(self.logit_bias, Mapping), "logit_bias", self, _BIAS)
            biases = {plain_number(i): plain_number(s) for i, s in self.logit_bias.items()}
            for token, shift in biases.items():
                banned = isinstance(shift, float) and shift == -math.inf
                if not _whole(token) or not (banned or abs(_number(shift)) <= LARGEST_SHIFT):
                    raise ValueError(f"logit_bias has {token!r}: {shift!r}; it must be {_BIAS}")
            object.__setattr__(self, "logit_bias", biases)

    def check_vocabulary(self, vocab_size: int, words: int | None = None) -> None:
        """ValueError where an id or a number of alternatives exceeds the vocabulary, or where all
        that may be chosen is banned: the first `words` ids, None for every one."""
        biased = self.logit_bias or {}
        for name, ids in (("logit_bias", biased), ("stop_token_ids", self.stop_token_ids)):
            outside = [i for i in ids if i >= vocab_size]
            if outside:
                raise ValueError(f"{name} has id {outside[0]}; ids go from 0 to {vocab_size - 1}")
        for name in ("logprobs", "prompt_logprobs"):
            if (getattr(self, name) or 0) > vocab_size:
                raise ValueError(
                    f"{name} is {getattr(self, name)}; it must be at most {vocab_size}"
                )
        words = vocab_size if words is None else min(words, vocab_size)
        banned = sum(shift == -math.inf for token, shift in biased.items() if token < words)
        if banned >= words:
            raise ValueError(f"logit_bias bans all {words} tokens; it must leave at least one")


_NUMBERS = ("temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty",
            "seed", "max_tokens", "logprobs", "prompt_logprobs")  # fmt: skip


_TEMPERATURE = f"a number >= 0 and <= {LARGEST_FLOAT:.2g}"
_WHOLE = "an int >= 0 or None"
_BIAS = (
    "a mapping of token ids (int >= 0) to -inf, which bans the token, "
    f"or a number from {-LARGEST_SHIFT:.0f} to {LARGEST_SHIFT:.0f}"
)


def _require(holds: bool, name: str, params: SamplingParams, works: str) -> None:
    if not holds:
        raise ValueError(f"{name} is {getattr(params, name)!r}; it must be {works}")


def plain_number(value: Any) -> Any:  # noqa: ANN401
    """A scalar of numpy or torch as Python's own number; anything else as it is."""
    return value.item() if getattr(value, "shape", None) == () else value


def _plain_list(values: Any) -> list[Any] | None:  # noqa: ANN401
    """A collection, or an array of one dimension, as a list of Python's own numbers; None for
    anything else."""
    if isinstance(values, tuple | list | set | frozenset):
        return [plain_number(value) for value in values]
    return values.tolist() if len(getattr(values, "shape", ())) == 1 else None


def _number(value: object) -> float:
    """The number, if it is one that float32 holds, else NaN, which fails every comparison."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return value if abs(value) <= LARGEST_FLOAT else math.nan
    return math.nan


def _integral(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
