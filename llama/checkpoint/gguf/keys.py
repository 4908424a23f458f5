"""What GGUF calls things: keys to ModelArgs and back, and the table of tensor names.

Every key llama.* is known, may say only what changes nothing, or is an error: one that is dropped
could mean running another model. Knows no tensor but rope_freqs. The surprising thing: the rotary
scaling of Llama 3.1 lies in no key but in that tensor, a factor for each pair; where these are the
factors that four constants give, as in the released models, the constants are what is kept.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from llama.args import ModelArgs, RopeScaling
from llama.checkpoint.gguf.header import FLOAT32, UINT32, Array, GGUFFile
from llama.model import rope_frequencies

_NAMES = {
    "token_embd": "tok_embeddings",
    "output_norm": "norm",
    "output": "output",
    "attn_q": "attention.wq",
    "attn_k": "attention.wk",
    "attn_v": "attention.wv",
    "attn_output": "attention.wo",
    "ffn_gate": "feed_forward.w1",
    "ffn_up": "feed_forward.w3",
    "ffn_down": "feed_forward.w2",
    "attn_norm": "attention_norm",
    "ffn_norm": "ffn_norm",
}
_GLOBAL = ("token_embd", "output_norm", "output")
_GGUF_NAMES = {ours: theirs for theirs, ours in _NAMES.items()}

ROPE_FREQS = "rope_freqs.weight"

# Keys llama.*, besides those that model_args reads: what they may say.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "expert_count": (0,),
    "expert_used_count": (0,),
    "attention.causal": (True,),
    "use_parallel_residual": (True,),  # written by early converters, read by none
    "rope.scaling.finetuned": (True, False),  # a remark
    "rope.scale_linear": (1.0,),
    "logit_scale": (1.0,),
}
_READ = ("block_count", "embedding_length", "feed_forward_length", "context_length", "vocab_size",
         "attention.head_count", "attention.head_count_kv", "attention.key_length",
         "attention.value_length", "attention.layer_norm_rms_epsilon", "rope.dimension_count",
         "rope.freq_base", "rope.scaling.type", "rope.scaling.factor",
         "rope.scaling.original_context_length", "rope.scaling.attn_factor")  # fmt: skip
_REMARKS = ("tensor_data_layout",)  # how the converter's input lay, which its output does not
_LARGEST = 2**31  # of any number: more is a mistake, and nothing may be counted up to it


def canonical_name(theirs: str) -> str | None:
    """The canonical name of a tensor; "" for one that is derived from others, None for unknown."""
    match = re.fullmatch(r"(?:blk\.(0|[1-9]\d{0,4})\.)?([a-z_]+)\.weight", theirs)
    if theirs == ROPE_FREQS or match is None:
        return theirs if theirs == ROPE_FREQS else None
    layer, name = match.groups()
    if name == "attn_rot_embd":  # from rope_theta, in files of the first months
        return ""
    if (layer is None) != (name in _GLOBAL) or name not in _NAMES:
        return None
    return f"{_NAMES[name]}.weight" if layer is None else f"layers.{layer}.{_NAMES[name]}.weight"


def gguf_name(name: str) -> str:
    """The name of a canonical tensor in GGUF."""
    if not name.startswith("layers."):
        return f"{_GGUF_NAMES[name.removesuffix('.weight')]}.weight"
    _, layer, module = name.removesuffix(".weight").split(".", 2)
    return f"blk.{layer}.{_GGUF_NAMES[module]}.weight"


def model_args(
    head: GGUFFile,
    found: Mapping[str, tuple[int, ...]],
    factors: Tensor | None,
    overrides: Mapping[str, Any],
) -> ModelArgs:
    """ModelArgs of what the keys say about tensors of the shapes `found`, by canonical name.

    `factors` is the tensor rope_freqs, if there is one. `overrides` hold whatever the keys say.
    """
    architecture = head.get("general.architecture", str)
    if architecture != "llama":
        raise ValueError(f"{head.path}: is of the architecture {architecture!r:.40}, not llama")
    _check_keys(head)
    layers = {name.split(".")[1] for name in found if name.startswith("layers.")}
    n_layers = _whole(head, "block_count")
    if len(layers) != n_layers:  # first of all: the number may be absurd
        raise ValueError(
            f"{head.path}: holds {len(layers)} layers, and llama.block_count is {n_layers}"
        )
    if "tok_embeddings.weight" not in found:
        raise ValueError(f"{head.path}: lacks token_embd.weight")
    vocab_size = found["tok_embeddings.weight"][0]
    if _whole(head, "vocab_size", vocab_size) != vocab_size:
        raise ValueError(
            f"{head.path}: llama.vocab_size is {head.metadata['llama.vocab_size']}, and "
            f"token_embd.weight has {vocab_size} rows"
        )
    n_heads = _whole(head, "attention.head_count")
    head_dim = _whole(head, "attention.key_length", _whole(head, "embedding_length") // n_heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if _whole(head, key, head_dim) != head_dim:
            raise ValueError(
                f"{head.path}: llama.{key} is {head.metadata[f'llama.{key}']}, and heads have "
                f"{head_dim} numbers; other sizes are not read"
            )
    params: dict[str, Any] = {
        "dim": _whole(head, "embedding_length"),
        "n_layers": n_layers,
        "n_heads": n_heads,
        "n_kv_heads": _whole(head, "attention.head_count_kv", n_heads),
        "vocab_size": vocab_size,
        "hidden_dim": _whole(head, "feed_forward_length"),
        "head_dim": head_dim,
        "norm_eps": _positive(head, "attention.layer_norm_rms_epsilon"),
        "rope_theta": _positive(head, "rope.freq_base", 10000.0),
        "context_length": _whole(head, "context_length"),
        "tied": "output.weight" not in found,
    }
    try:
        args = ModelArgs(**params)
        scaling = _scaling(head, args, factors)
        params |= {"use_scaled_rope": scaling is not None, "rope_scaling": scaling}
        return ModelArgs(**(params | dict(overrides)))
    except ValueError as error:
        raise ValueError(f"{head.path}: {str(error).removeprefix(f'{head.path}: ')}") from error


def _check_keys(head: GGUFFile) -> None:
    """Raise ValueError for an unknown key llama.*: if dropped, it could mean another model."""
    for key, value in head.metadata.items():
        if not key.startswith("llama."):
            continue
        name = key.removeprefix("llama.")
        if name in _NEUTRAL and (isinstance(value, Array) or value not in _NEUTRAL[name]):
            shown = "an array" if isinstance(value, Array) else f"{value!r:.40}"
            raise ValueError(f"{head.path}: {key} is {shown}, which this version does not read")
        if name not in (*_READ, *_NEUTRAL, *_REMARKS):
            raise ValueError(f"{head.path}: the key {key!r:.80} is unknown")


def _whole(head: GGUFFile, key: str, default: int | None = None) -> int:
    value = head.get(f"llama.{key}", int, default)
    if not 0 < value < _LARGEST:
        raise ValueError(f"{head.path}: llama.{key} is {value}; it needs to be above 0")
    return value


def _positive(head: GGUFFile, key: str, default: float | None = None) -> float:
    """The value of a key, a positive float32, as the decimal number that somebody wrote."""
    value = head.get(f"llama.{key}", float, default)
    if not 0 < value < _LARGEST:
        raise ValueError(f"{head.path}: llama.{key} is {value}; it needs to be above 0")
    return float(f"{value:.7g}")


# --- rotary scaling -------------------------------------------------------------------------------


def _scaling(head: GGUFFile, args: ModelArgs, factors: Tensor | None) -> RopeScaling | None:
    scaling_type = head.get("llama.rope.scaling.type", str, "none")
    factor = head.get("llama.rope.scaling.factor", float, 1.0)
    if scaling_type not in ("none", "linear") and factor != 1:
        raise ValueError(
            f"{head.path}: rotary scaling of the kind {scaling_type!r:.40} is not read"
        )
    pairs = args.head_dim // 2
    attention = _positive(head, "rope.scaling.attn_factor", 1.0)
    if factors is None:
        if (scaling_type == "none" or factor in (0, 1)) and attention == 1:
            return None
        every = 1.0 if scaling_type == "none" or factor == 0 else factor
        return RopeScaling(factors=(every,) * pairs, attention_factor=attention)
    if factors.shape != (pairs,):
        raise ValueError(
            f"{head.path}: {ROPE_FREQS} is {tuple(factors.shape)}, and there are {pairs} pairs"
        )
    if not bool((factors.isfinite() & (factors > 0)).all()):
        raise ValueError(f"{head.path}: {ROPE_FREQS} has factors that are no positive numbers")
    if bool((factors == 1).all()) and attention == 1:
        return None
    original = head.get("llama.rope.scaling.original_context_length", int, 8192)
    released = _released(args, factors, original) if attention == 1 else None
    stated = RopeScaling(factors=tuple(factors.tolist()), attention_factor=attention)
    return released or stated


def _released(args: ModelArgs, factors: Tensor, original: int) -> RopeScaling | None:
    """The scaling of Llama 3.1 that gives these factors, where one does."""
    factor = float(factors.max())
    if factor < 1 or not 0 < original < _LARGEST:
        return None
    scaling = RopeScaling(factor=factor, original_context=original)
    same = torch.allclose(rope_factors(args, scaling), factors, rtol=1e-5, atol=0)
    return scaling if same else None


def rope_factors(args: ModelArgs, scaling: RopeScaling) -> Tensor:
    """The divisor of each rotary pair's frequency, float32 (E/2,)."""
    plain = rope_frequencies(ModelArgs(head_dim=args.head_dim, rope_theta=args.rope_theta))
    scaled = rope_frequencies(
        ModelArgs(head_dim=args.head_dim, rope_theta=args.rope_theta, rope_scaling=scaling)
    )
    return plain / scaled


# --- writing --------------------------------------------------------------------------------------


def keys_of(args: ModelArgs) -> dict[str, tuple[int, int | float]]:
    """The keys llama.* of a model, each with its type, as llama.cpp needs them."""
    numbers = {
        "vocab_size": args.vocab_size,
        "context_length": args.context_length,
        "embedding_length": args.dim,
        "block_count": args.n_layers,
        "feed_forward_length": args.hidden_dim,
        "rope.dimension_count": args.head_dim,
        "attention.head_count": args.n_heads,
        "attention.head_count_kv": args.n_kv_heads,
        "attention.key_length": args.head_dim,
        "attention.value_length": args.head_dim,
    }
    keys: dict[str, tuple[int, int | float]] = {
        f"llama.{name}": (UINT32, number) for name, number in numbers.items()
    }
    keys["llama.attention.layer_norm_rms_epsilon"] = FLOAT32, args.norm_eps
    keys["llama.rope.freq_base"] = FLOAT32, args.rope_theta
    scaling = args.rope_scaling
    if scaling is not None and scaling.factors is None and scaling.original_context != 8192:
        key = "llama.rope.scaling.original_context_length"
        keys[key] = UINT32, scaling.original_context
    if scaling is not None and scaling.attention_factor != 1:
        keys["llama.rope.scaling.attn_factor"] = FLOAT32, scaling.attention_factor
    return keys
