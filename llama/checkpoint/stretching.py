"""rope_scaling as a caller gives it: what a model's rotary scaling and context become.

Knows ModelArgs and no file. The surprising thing: not every scaling can be taken away. Where a
model learnt with positions that are stretched from the first token on, as linear scaling and yarn
do, its weights are nothing without it.
"""

import dataclasses
import logging
import math

from llama.args import ModelArgs, RopeScaling

logger = logging.getLogger(__name__)


def check_rope_scaling(rope_scaling: object) -> None:
    """ValueError for what is neither a factor of at least 1, nor a RopeScaling, nor None."""
    if rope_scaling is None or isinstance(rope_scaling, RopeScaling):
        return
    number = isinstance(rope_scaling, (int, float)) and not isinstance(rope_scaling, bool)
    if not number or not 1 <= rope_scaling < math.inf:  # type: ignore[operator]
        raise ValueError(f"rope_scaling={rope_scaling!r}: a factor of at least 1 (1: no scaling)")


def stretched(args: ModelArgs, rope_scaling: float | RopeScaling) -> ModelArgs:
    """`args` with Llama 3.1's scaling by a factor, 1 for none, or with the constants given.

    The original context is the one that the model's own scaling names, else the model's context;
    the new one is as much longer as the factor says. A model whose own scaling begins at the first
    token keeps it with 1, as without it the weights are another model's, and ValueError says so for
    another factor.
    """
    own = args.rope_scaling
    if isinstance(rope_scaling, RopeScaling):
        if rope_scaling.factors is not None:
            return args
        return dataclasses.replace(args, context_length=_context(args, rope_scaling))
    if own is not None and (own.attention_factor != 1 or (own.factors or (1.0,))[0] != 1):
        if rope_scaling == 1:
            logger.warning(
                "rope_scaling=1 changes nothing: the scaling that this model's files state "
                "(linear, yarn or so) holds from the first token on, and the weights need it"
            )
            return args
        raise ValueError(
            f"rope_scaling={rope_scaling!r}: the scaling that this model's files state (linear, "
            "yarn or a like one) holds from the first token on, and Llama 3.1's cannot take its "
            f"place; leave rope_scaling out: {args.context_length} tokens are its context"
        )
    original = args.context_length
    if own is not None:
        original = own.original_context
    if rope_scaling == 1:
        shorter = min(args.context_length, original)
        return dataclasses.replace(
            args, use_scaled_rope=False, rope_scaling=None, context_length=shorter
        )
    scaling = RopeScaling(factor=float(rope_scaling), original_context=original)
    return dataclasses.replace(
        args, use_scaled_rope=True, rope_scaling=scaling, context_length=_context(args, scaling)
    )


def _context(args: ModelArgs, scaling: RopeScaling) -> int:
    """The context of stretched positions; Llama 3.1 itself goes twice as far with a factor of 8."""
    released = scaling.original_context == 8192 and scaling.factor >= 8
    longer = int(scaling.original_context * scaling.factor)
    return max(args.context_length, longer, 131072 if released else 0)
