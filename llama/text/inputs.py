"""Prompts, dialogs and flags as callers give them, made plain or refused in a sentence.

Takes what numpy and torch make of lists as well, and imports neither; refuses to know what a
prompt or a dialog has in it.
"""

from collections.abc import Iterable, Mapping, Set
from typing import Any


def listed(name: str, values: Iterable[Any]) -> list[Any]:
    """Several prompts or dialogs as a list: a generator, an array or a tensor of them as well."""
    if isinstance(values, str | bytes | Mapping | Set) or not isinstance(values, Iterable):
        raise ValueError(f"{name} is {values!r:.80}; it must be a list")
    out = values.tolist() if hasattr(values, "tolist") else list(values)
    if isinstance(out, list):
        return out
    raise ValueError(f"{name} is {values!r:.80}; it must be a list")


def texts(prompts: Iterable[str]) -> list[str]:
    """Several texts as a list; ValueError for a single one, and for what is no text."""
    several = [] if isinstance(prompts, str) else listed("prompts", prompts)
    if isinstance(prompts, str) or not all(isinstance(p, str) for p in several):
        shown = prompts if isinstance(prompts, str) else several
        raise ValueError(f"prompts is {shown!r:.80}; it must be a list of strings")
    return several


def flag(name: str, value: object) -> bool:
    """A yes or no; ValueError for a number, which would ask for something else."""
    if isinstance(value, bool) or type(value).__name__ in ("bool", "bool_"):  # numpy has its own
        return bool(value)
    more = ""
    if name == "logprobs":
        more = (
            "; stream(ids, SamplingParams(logprobs=5)) gives that many alternatives to each token"
        )
    raise ValueError(f"{name} is {value!r:.80}; it must be True or False{more}")
