"""params.json, Meta's description of a model's shape: read to the letter, and written.

Every key is known, refused by name, or ignored for a stated reason; an unknown one is an error:
dropping it could mean running another model. Knows ModelArgs and no tensor. The surprising thing:
norm_eps and rope_theta are required, though ModelArgs has defaults: absent, they differ by family.
"""

import json
import re
from collections import Counter
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from llama.checkpoint.files import check_file
from llama.model import ModelArgs, RopeScaling

_INTS = ("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of",
         "hidden_dim", "head_dim", "context_length")  # fmt: skip
_FLOATS = ("ffn_dim_multiplier", "norm_eps", "rope_theta")
_BOOLS = ("use_scaled_rope", "tied")
_KNOWN = (*_INTS, *_FLOATS, *_BOOLS, "rope_scaling")
_NEEDED = ("dim", "n_layers", "n_heads", "vocab_size", "norm_eps", "rope_theta")
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
    """What params.json says, every key known and every value of its type, else ValueError."""
    params = _read_object(file)
    for key in params:
        for pattern, what in _REFUSED.items():
            if re.fullmatch(pattern, key):
                raise ValueError(f"{file}: {key} marks {what}, which this version does not read")
    params = {key: value for key, value in params.items() if key not in _IGNORED}
    unknown = ", ".join(sorted(set(params) - set(_KNOWN)))
    if unknown:
        raise ValueError(f"{file}: unknown keys {unknown:.200}; known are {', '.join(_KNOWN)}")
    params = {k: v for k, v in params.items() if not (v is None and k in _OPTIONAL)}
    missing = [key for key in _NEEDED if key not in params]
    if missing:
        raise ValueError(f"{file}: lacks {', '.join(missing)}")
    if params["vocab_size"] == -1:
        raise ValueError(
            f"{file}: vocab_size -1 marks Llama 1 or 2, which this version does not read yet"
        )
    for key, value in params.items():
        wanted = _wanted(key, value)
        if wanted is not None:
            raise ValueError(f"{file}: {key} needs to be {wanted}, is {value!r:.40}")
    return params


def _read_object(file: Path) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = Counter(key for key, _ in pairs).most_common(1)
        if keys and keys[0][1] > 1:
            raise ValueError(f"the key {keys[0][0]!r:.40} comes twice")
        return dict(pairs)

    check_file(file, largest=2**20)
    try:
        params = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=once)
    except OSError as error:
        raise ValueError(f"{file}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: is not the JSON it should be: {error}") from error
    if not isinstance(params, dict):
        raise ValueError(f"{file}: needs to be an object of keys and values, is {params!r:.40}")
    return params


def _wanted(key: str, value: object) -> str | None:
    """What the value of a known key needs to be, where it is not that."""
    if key in _BOOLS:
        return None if isinstance(value, bool) else "true or false"
    if key == "rope_scaling":
        names = [field.name for field in fields(RopeScaling)]
        if isinstance(value, dict) and set(value) <= set(names):
            wrong = [number for number in value.values() if _wanted("rope_theta", number)]
            return "made of positive numbers" if wrong else None
        return f"an object of {', '.join(names)}"
    kinds, wanted = ((int,), "a whole number") if key in _INTS else ((int, float), "a number")
    if type(value) not in kinds or not isinstance(value, (int, float)):
        return wanted
    return None if 0 < value < _LARGEST else f"{wanted} above 0 and below {_LARGEST}"


def make_args(params: dict[str, Any], file: Path) -> ModelArgs:
    """ModelArgs of what `file` says, its errors naming the file."""
    try:
        if isinstance(params.get("rope_scaling"), dict):
            params = params | {"rope_scaling": RopeScaling(**params["rope_scaling"])}
        return ModelArgs(**params)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def params_of(args: ModelArgs) -> dict[str, Any]:
    """params.json for `args`: Meta's keys, and ours only where they cannot be derived."""
    keys = ("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of",
            "ffn_dim_multiplier", "norm_eps", "rope_theta")  # fmt: skip
    params: dict[str, Any] = {key: getattr(args, key) for key in keys}
    if args.ffn_dim_multiplier is None:
        del params["ffn_dim_multiplier"]
    if args.use_scaled_rope:
        params["use_scaled_rope"] = True
    derived = ModelArgs(**params)
    for key in ("hidden_dim", "head_dim", "context_length"):
        if getattr(derived, key) != getattr(args, key):
            params[key] = getattr(args, key)
    if args.rope_scaling is not None and derived.rope_scaling != args.rope_scaling:
        params["rope_scaling"] = asdict(args.rope_scaling)
    return params
