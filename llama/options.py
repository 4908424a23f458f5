"""The options that the methods of `Llama` share, in one list: what is new gets its line here.

`SamplingParams` says what each of them means and validates it. Refuses to know prompts, text and
the engine. The surprising thing: a method takes them as `**sampling: Unpack[Sampling]`, and its
signature still lists each of them by name, for `help()` and for whoever asks inspect.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from difflib import get_close_matches
from functools import wraps
from inspect import Parameter, signature
from typing import Any, ParamSpec, TypedDict, TypeVar, get_type_hints

from llama.sampling_params import SamplingParams, plain_number

Seed = int | Sequence[int] | None
P = ParamSpec("P")
R = TypeVar("R")
_ELSEWHERE = dict.fromkeys(("max_tokens", "max_new_tokens"), "max_gen_len")  # as others call it


class Sampling(TypedDict, total=False):
    """Fields of `SamplingParams` that every method takes by name, with the same defaults.

    Of `seed` there may be several, one for each prompt.
    """

    seed: Seed
    top_k: int
    min_p: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float] | None


def lists_options(method: Callable[P, R]) -> Callable[P, R]:
    """A method that ends in `**sampling: Unpack[Sampling]`, with these in its signature by name.

    Any other name is a TypeError, which says the nearest one that there is.
    """
    plain = signature(method)
    defaults = {each.name: each.default for each in fields(SamplingParams)}
    options = [
        Parameter(name, Parameter.KEYWORD_ONLY, default=defaults[name], annotation=hint)
        for name, hint in get_type_hints(Sampling).items()
    ]
    listed = plain.replace(parameters=[*list(plain.parameters.values())[:-1], *options])

    @wraps(method)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        unknown = [name for name in kwargs if name not in listed.parameters]
        if unknown:
            like = get_close_matches(unknown[0], list(listed.parameters)[2:], 1, 0.5)
            like = [_ELSEWHERE[unknown[0]]] if unknown[0] in _ELSEWHERE else like
            meant = f": did you mean {like[0]}?" if like else ""
            raise TypeError(f"{method.__qualname__}() has no argument {unknown[0]}{meant}")
        return method(*args, **kwargs)

    call.__signature__ = listed  # type: ignore[attr-defined]
    return call


def params_of(
    sampling: Sampling, temperature: float, top_p: float, max_gen_len: int | None
) -> tuple[SamplingParams, Seed]:
    """What the prompts of a call share, and the seed that theirs are made of."""
    options: dict[str, Any] = dict(sampling)
    seed = options.pop("seed", None)
    try:
        params = SamplingParams(
            temperature=temperature, top_p=top_p, max_tokens=max_gen_len, **options
        )
    except ValueError as error:
        raise ValueError(str(error).replace("max_tokens", "max_gen_len")) from None
    return params, seed


def seeds_of(seed: Seed, count: int) -> Sequence[int | None]:
    """A seed for each of `count` prompts: as given, or seed, seed + 1, ... for a single one.

    Raises ValueError where there are more or fewer than prompts, or where it is no seed.
    """
    seed = plain_number(seed)
    if seed is None:
        return [None] * count
    if not isinstance(seed, Iterable):
        first = SamplingParams(seed=seed).seed or 0  # a number of numpy is an int there
        return range(first, first + count)
    if len(seeds := list(seed)) != count:
        raise ValueError(f"seed has {len(seeds)} values for {count} prompts")
    return seeds
