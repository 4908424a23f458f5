"""Rotary scaling in config.json: every kind that transformers knows, to RopeScaling and back.

Each kind comes to constants of Llama 3.1 or to a factor for each rotary pair, or is refused by
name. Knows no tensor. The surprising thing: dynamic scaling is no scaling at all up to the context
that config.json states, and only beyond it another model for every length; so the context ends
there.
"""

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from llama.args import ModelArgs, RopeScaling

logger = logging.getLogger(__name__)

_LARGEST = 2**31  # of any number, as in params.py


class Shape(NamedTuple):
    """What the scaling of a model depends on besides its own keys."""

    head_dim: int
    rope_theta: float
    context: int  # max_position_embeddings


def rope_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """rope_parameters, or rope_scaling of older files; both say the same where both are there."""
    found: dict[str, Any] = {}
    for key in ("rope_scaling", "rope_parameters"):
        said = config.get(key)
        if said is None:
            continue
        if not isinstance(said, dict):
            raise ValueError(f"{key} needs to be an object, is {said!r:.40}")
        said = {"rope_type": said.get("type", "default")} | said
        other = [word for word in said if word in found and found[word] != said[word]]
        if other:
            raise ValueError(f"rope_scaling and rope_parameters differ in {other[0]:.40}")
        found |= said
    original = config.get("original_max_position_embeddings")
    if original is not None and found:  # as in transformers, it holds whatever the object says
        found["original_max_position_embeddings"] = original
    return found


def theta_of(config: Mapping[str, Any]) -> float:
    given = (config.get("rope_theta"), rope_of(config).get("rope_theta"))
    said = sorted({positive("rope_theta", value) for value in given if value is not None})
    if len(said) > 1:
        raise ValueError(f"gives rope_theta two values: {said[0]:g} and {said[1]:g}")
    return said[0] if said else 10000.0


def positive(key: str, value: object) -> float:
    if type(value) not in (int, float) or not isinstance(value, (int, float)):
        raise ValueError(f"{key} needs to be a number, is {value!r:.40}")
    if not 0 < value < _LARGEST:
        raise ValueError(f"{key} needs to be above 0 and below {_LARGEST}, is {value!r:.40}")
    return float(value)


def read_scaling(config: Mapping[str, Any], shape: Shape, file: Path) -> dict[str, Any]:
    """rope_scaling and context_length for ModelArgs; ValueError for a kind that is not computed."""
    rope = rope_of(config)
    rope_type = rope.get("rope_type", "default")
    if rope.get("partial_rotary_factor", 1) not in (1, 1.0):
        raise ValueError(f"partial_rotary_factor is {rope['partial_rotary_factor']!r:.40}, not 1")
    if rope_type == "default":
        return {}
    if rope_type == "llama3":
        return _llama3(rope, shape)
    if rope_type == "linear":
        factor = _factor(rope)
        scaling = RopeScaling(factors=(factor,) * (shape.head_dim // 2))
        return _scaled(scaling, shape.context * factor)
    if rope_type == "dynamic":
        logger.warning(
            "%s: dynamic rotary scaling is another model for every length; up to %d tokens it is "
            "none, and there the context ends (rope_scaling= stretches it as Llama 3.1 does)",
            file,
            shape.context,
        )
        return {}
    if rope_type == "yarn":
        return _yarn(rope, shape)
    if rope_type == "longrope":
        return _longrope(rope, shape)
    raise ValueError(
        f"the rotary scaling is of type {rope_type!r:.40}; default, linear, dynamic, yarn, "
        "longrope and llama3 are known: use a version of the model with one of these"
    )


def _scaled(scaling: RopeScaling, context: float) -> dict[str, Any]:
    return {
        "use_scaled_rope": True,
        "rope_scaling": scaling,
        "context_length": min(int(context), _LARGEST - 1),
    }


def _factor(rope: Mapping[str, Any]) -> float:
    if "factor" not in rope:
        raise ValueError("the rotary scaling lacks factor")
    factor = positive("factor", rope["factor"])
    if factor < 1:
        raise ValueError(f"the rotary scaling has factor {factor:g}; it needs to be at least 1")
    return factor


def _original(rope: Mapping[str, Any], shape: Shape) -> float:
    """The context before scaling; where nothing says it, transformers takes the stated one."""
    said = rope.get("original_max_position_embeddings")
    key = "original_max_position_embeddings"
    return positive(key, shape.context if said is None else said)


def _llama3(rope: Mapping[str, Any], shape: Shape) -> dict[str, Any]:
    keys = ("factor", "low_freq_factor", "high_freq_factor")
    lacking = [key for key in keys if key not in rope]
    if lacking:
        raise ValueError(f"the rotary scaling lacks {lacking[0]}")
    values: dict[str, Any] = {key: positive(key, rope[key]) for key in keys}
    values["original_context"] = int(_original(rope, shape))
    return {"use_scaled_rope": True, "rope_scaling": RopeScaling(**values)}


def _yarn(rope: Mapping[str, Any], shape: Shape) -> dict[str, Any]:
    """YaRN (Peng et al. 2023, arXiv 2309.00071): slow pairs are stretched, fast ones stay.

    A pair is fast where it rotates more than beta_fast times within the original context, slow
    below beta_slow, and blended between the two linearly in its number, not in its rotations.
    """
    original = _original(rope, shape)
    factor = shape.context / original if rope.get("factor", 0) is None else _factor(rope)
    fast = positive("beta_fast", rope.get("beta_fast") or 32)
    slow = positive("beta_slow", rope.get("beta_slow") or 1)
    size = shape.head_dim
    if shape.rope_theta <= 1:
        raise ValueError(f"rope_theta {shape.rope_theta:g} leaves yarn no pair to stretch")

    def pair(rotations: float) -> float:
        """The number of the pair, a fraction, that rotates so often in the original context."""
        return (
            size * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(shape.rope_theta))
        )

    low, high = pair(fast), pair(slow)
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    width = high - low or 0.001
    stretched = [min(1.0, max(0.0, (n - low) / width)) for n in range(size // 2)]
    factors = tuple(1 / (share / factor + 1 - share) for share in stretched)
    attention = _yarn_attention(rope, factor)
    scaling = RopeScaling(factors=factors, attention_factor=attention)
    return _scaled(scaling, max(shape.context, original * factor))


def _yarn_attention(rope: Mapping[str, Any], factor: float) -> float:
    if rope.get("attention_factor") is not None:
        return positive("attention_factor", rope["attention_factor"])

    def scale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0

    if rope.get("mscale") and rope.get("mscale_all_dim"):
        weights = (positive(key, rope[key]) for key in ("mscale", "mscale_all_dim"))
        above, below = map(scale, weights)
        return above / below
    return scale(1.0)


def _longrope(rope: Mapping[str, Any], shape: Shape) -> dict[str, Any]:
    """LongRoPE (Ding et al. 2024, arXiv 2402.13753), where short and long texts have the same
    factors: with two sets, a text would become another one as it grows."""
    lists = [rope.get("short_factor"), rope.get("long_factor")]
    pairs = shape.head_dim // 2
    for key, said in zip(("short_factor", "long_factor"), lists, strict=True):
        if not isinstance(said, list) or len(said) != pairs:
            raise ValueError(f"{key} of the rotary scaling needs to be a list of {pairs} numbers")
    if lists[0] != lists[1]:
        raise ValueError(
            "the rotary scaling is of type 'longrope' with other factors for long texts than for "
            "short ones, so that a text changes as it grows; that is not computed: use a version "
            "of the model with one set of factors, or give rope_scaling=RopeScaling(factors=...)"
        )
    original = _original(rope, shape)
    said = rope.get("factor")
    factor = shape.context / original if said is None else positive("factor", said)
    attention = rope.get("attention_factor")
    if attention is None:
        grown = factor > 1 and original > 1
        attention = math.sqrt(1 + math.log(factor) / math.log(original)) if grown else 1.0
    factors = tuple(positive("short_factor", each) for each in lists[0] or ())
    scaling = RopeScaling(factors=factors, attention_factor=positive("attention_factor", attention))
    return _scaled(scaling, shape.context)


# --- writing --------------------------------------------------------------------------------------


def say_scaling(args: ModelArgs) -> dict[str, Any]:
    """Keys of config.json: rope_scaling, and max_position_embeddings where it depends on that.

    A factor for each pair is linear scaling where all are the same, and elsewhere longrope with the
    same factors for every length, which says any.
    """
    scaling = args.rope_scaling
    if scaling is None:
        return {"rope_scaling": None}
    if scaling.factors is None and scaling.attention_factor == 1:
        said = {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_context,
        }
        return {"rope_scaling": said}
    factors = scaling.factors
    if factors is None:
        raise ValueError(f"{scaling}: config.json cannot say an attention_factor beside these")
    same = factors[0] if len(set(factors)) == 1 and scaling.attention_factor == 1 else 0
    if same >= 1 and (args.context_length / same).is_integer():
        context = int(args.context_length / same)
        linear = {"rope_type": "linear", "factor": same}
        return {"rope_scaling": linear, "max_position_embeddings": context}
    every = {
        "rope_type": "longrope",
        "factor": 1.0,
        "short_factor": list(factors),
        "long_factor": list(factors),
        "attention_factor": scaling.attention_factor,
        "original_max_position_embeddings": args.context_length,
    }
    return {"rope_scaling": every}
