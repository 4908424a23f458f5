"""params.json, Meta's description of a model's shape: read to the letter, and written.

Every key is known, refused by name, or ignored for a stated reason; an unknown one is an error:
dropping it could mean running another model. Knows ModelArgs and no tensor. The surprising thing:
norm_eps and rope_theta are required, though ModelArgs has defaults: absent, they differ by family.
Only Llama 1 and 2 may leave out rope_theta and the vocabulary, as their files do (`complete`).
"""

import re
from collections.abc import Collection
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from llama.args import ModelArgs, RopeScaling
from llama.checkpoint.families import SENTENCEPIECE
from llama.files.strict_json import read_json

_INTS = ("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of",
         "hidden_dim", "head_dim", "context_length")  # fmt: skip
_FLOATS = ("ffn_dim_multiplier", "norm_eps", "rope_theta")
_BOOLS = ("use_scaled_rope", "tied")
_KNOWN = (*_INTS, *_FLOATS, *_BOOLS, "rope_scaling")
_NEEDED = ("dim", "n_layers", "n_heads", "norm_eps")
_OPTIONAL = ("n_kv_heads", "ffn_dim_multiplier", "rope_scaling")  # null says the same as absent
_IGNORED = {
    "max_batch_size": "a limit of a run, given to build",
    "max_seq_len": "a limit of a run, given to build",
}
_REFUSED = {
    r"quantization_args": "quantized weights",
    r"lora_args": "weights with adapters",
    r"vision_\w+": "a vision model",
    r"moe_args": "a mixture of experts",
}
_LARGEST = 2**31  # of any number: more is a mistake, and nothing may be counted up to it


def read_params(file: Path) -> dict[str, Any]:
    """Read params.json; ValueError where a key is unknown or a value not of its type."""
    params = read_json(file)
    for key in params:
        for pattern, what in _REFUSED.items():
            if re.fullmatch(pattern, key):
                raise ValueError(f"{file}: {key} marks {what}, which this version does not read")
    params = {key: value for key, value in params.items() if key not in _IGNORED}
    unknown = ", ".join(sorted(set(params) - set(_KNOWN)))
    if unknown:
        raise ValueError(f"{file}: unknown keys {unknown:.200}; known are {', '.join(_KNOWN)}")
    params = {k: v for k, v in params.items() if not (v is None and k in _OPTIONAL)}
    old = params.get("vocab_size", -1) in (-1, *SENTENCEPIECE)
    missing = [key for key in (*_NEEDED, *["rope_theta"] * (not old)) if key not in params]
    if missing:
        raise ValueError(f"{file}: lacks {', '.join(missing)}")
    for key, value in params.items():
        wanted = None if (key, value) == ("vocab_size", -1) else _wanted(key, value)
        if wanted is not None:
            raise ValueError(f"{file}: {key} needs to be {wanted}, is {value!r:.40}")
    return params


def _wanted(key: str, value: object) -> str | None:
    """What the value of a known key needs to be; None where it is that."""
    if key in _BOOLS:
        return None if isinstance(value, bool) else "true or false"
    if key == "rope_scaling":
        names = [field.name for field in fields(RopeScaling)]
        if isinstance(value, dict) and set(value) <= set(names):
            factors = value.get("factors", [])
            if not isinstance(factors, list):
                return "an object whose factors are a list"
            numbers = [value[name] for name in value if name != "factors"] + factors
            wrong = [number for number in numbers if _wanted("rope_theta", number)]
            return "made of positive numbers" if wrong else None
        return f"an object of {', '.join(names)}"
    types, wanted = ((int,), "a whole number") if key in _INTS else ((int, float), "a number")
    if type(value) not in types or not isinstance(value, (int, float)):
        return wanted
    return None if 0 < value < _LARGEST else f"{wanted} above 0 and below {_LARGEST}"


def complete(
    params: dict[str, Any], file: Path, vocabulary: int, names: Collection[str] = ()
) -> dict[str, Any]:
    """`params` with what the files of Llama 1 and 2 leave to their code.

    vocab_size -1 or absent is the number of rows of the output matrix, `vocabulary`. Where it was
    -1, or is one of SENTENCEPIECE, rope_theta is 10000 unless stated, and the context is 16384
    with a rope_theta of 1000000 (Code Llama), 2048 for Llama 1, and 4096 else. `names` of tensors
    help to tell Llama 1 from 2. Raises ValueError where something is still missing.
    """
    params = dict(params)
    counted = params.get("vocab_size", -1) == -1
    old = params.get("vocab_size") == -1
    if counted:
        params["vocab_size"] = vocabulary
    lacks = [] if params["vocab_size"] else ["vocab_size, and output.weight to count it by"]
    if old or params["vocab_size"] in SENTENCEPIECE:
        params.setdefault("rope_theta", 10000.0)
        if not params.get("use_scaled_rope") and not params.get("rope_scaling"):
            params.setdefault("context_length", _context(params, names))
    lacks += [] if "rope_theta" in params else ["rope_theta"]
    if lacks:
        raise ValueError(f"{file}: lacks {', '.join(lacks)}")
    return params


def _context(params: dict[str, Any], names: Collection[str]) -> int:
    """The context of a model with a SentencePiece tokenizer: no file states it.

    Llama 1 and 2 share the shapes of 7B and 13B. Llama 1 was trained with a norm_eps of 1e-6 there,
    but the first files of Llama 2 7B Chat also say so; only Llama 1 7B has a table of rotary
    frequencies in every layer, where Llama 2 has one.
    """
    shape = (params["dim"], params["n_layers"])
    whole = params.get("n_kv_heads", params["n_heads"]) == params["n_heads"]
    if params["rope_theta"] == 1000000:
        return 16384
    if any(name.startswith("layers.") and name.endswith("rope.freqs") for name in names):
        return 2048
    if shape == (6656, 60) or (shape == (8192, 80) and whole):  # 33B, 65B
        return 2048
    first_chat = shape == (4096, 32) and "rope.freqs" in names
    return 2048 if params["norm_eps"] < 5e-6 and not first_chat else 4096


def make_args(params: dict[str, Any], file: Path) -> ModelArgs:
    """ModelArgs of what `file` says; their errors name the file."""
    try:
        if isinstance(params.get("rope_scaling"), dict):
            said = params["rope_scaling"]
            factors = {"factors": tuple(said["factors"])} if "factors" in said else {}
            params = params | {"rope_scaling": RopeScaling(**(said | factors))}
        return ModelArgs(**params)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def params_of(args: ModelArgs, *, say_tied: bool = False) -> dict[str, Any]:
    """params.json for `args`: Meta's keys, and ours only where they cannot be derived.

    `say_tied` where the file of weights cannot say it by a storage that two names share.
    """
    keys = ("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of",
            "ffn_dim_multiplier", "norm_eps", "rope_theta")  # fmt: skip
    params: dict[str, Any] = {key: getattr(args, key) for key in keys}
    if args.ffn_dim_multiplier is None:
        del params["ffn_dim_multiplier"]
    if args.tied and say_tied:
        params["tied"] = True
    if args.use_scaled_rope:
        params["use_scaled_rope"] = True
    derived = ModelArgs(**complete(params, Path("params.json"), args.vocab_size))
    for key in ("hidden_dim", "head_dim", "context_length"):
        if getattr(derived, key) != getattr(args, key):
            params[key] = getattr(args, key)
    if args.rope_scaling is not None and derived.rope_scaling != args.rope_scaling:
        said = asdict(args.rope_scaling)
        neutral = {"factors": None, "attention_factor": 1.0}
        params["rope_scaling"] = {k: said[k] for k in said if neutral.get(k, 0) != said[k]}
    return params
