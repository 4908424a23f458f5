"""config.json, Hugging Face's description of a model, to ModelArgs and back.

Knows the keys that LlamaForCausalLM heeds; each is read, must have the value that this model
computes with, or is ignored because it has no part in the computation. The surprising thing: absent
keys have that class's defaults, which are those of Llama 1.
"""

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llama.args import ModelArgs
from llama.checkpoint.hf.rope import Shape, positive, read_scaling, say_scaling, theta_of
from llama.checkpoint.meta.params import make_args
from llama.files.strict_json import read_json

logger = logging.getLogger(__name__)

_LARGEST = 2**31  # of any number, as in params.py
_INTS = {
    "hidden_size": "dim",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_heads",
    "vocab_size": "vocab_size",
    "intermediate_size": "hidden_dim",
    "head_dim": "head_dim",
    "max_position_embeddings": "context_length",
}
_MAY_LACK = ("num_key_value_heads", "head_dim")
_DEFAULTS = {"rms_norm_eps": 1e-6, "max_position_embeddings": 2048, "tie_word_embeddings": False}
# What this model computes, and what other values would mean
_FIXED = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "partial_rotary_factor": (1, 1.0),
}
_IGNORED = re.compile(
    r"_.*|architectures|model_type|torch_dtype|dtype|transformers_version|use_cache|pretraining_tp"
    r"|(bos|eos|pad|unk|sep|decoder_start)_token_id|initializer_range|\w*dropout|max_sequence_length"
    r"|original_max_position_embeddings|output_(attentions|hidden_states|scores)|return_dict\w*"
    r"|chunk_size_feed_forward|is_(encoder_)?decoder|id2label|label2id|num_labels|problem_type"
    r"|task_specific_params|tokenizer_class|unsloth_\w+|torchscript|tie_encoder_decoder|use_bfloat16"
    r"|rope_(theta|scaling|parameters)|auto_map|pad_token|rope_interleaved"
)
# (multiple_of, ffn_dim_multiplier) of the released models
_MULTIPLES = ((256, None), (256, 1.5), (1024, 1.3), (4096, 1.3), (4096, 1.2))
_QUANTIZED = {
    "fp8": "FP8",
    "fbgemm_fp8": "FP8",
    "compressed-tensors": "compressed-tensors",
    "awq": "AWQ",
    "gptq": "GPTQ",
    "bitsandbytes": "bitsandbytes",
}


def read_config(file: Path, overrides: Mapping[str, Any]) -> tuple[ModelArgs, dict[str, Any]]:
    """Read config.json: ModelArgs, with `overrides` for some fields, and everything that it says.

    Raises ValueError, naming the file and the key, for another architecture, quantized weights, or
    a computation that this model does not do.
    """
    config = read_json(file)
    try:
        _check_plain(config)
        params = _numbers(config) | {"rope_theta": theta_of(config)}
        if "rope_scaling" not in overrides:
            head_dim = params.get("head_dim", params["dim"] // params["n_heads"])
            shape = Shape(head_dim, params["rope_theta"], params["context_length"])
            params |= read_scaling(config, shape, file)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    known = {*_INTS, *_DEFAULTS, *_FIXED}
    odd = sorted(key for key in config if key not in known and not _IGNORED.fullmatch(key))
    if odd:
        logger.warning("%s: not heeded, as by LlamaForCausalLM: %.200s", file, ", ".join(odd))
    params |= _ffn_terms(params["dim"], params["hidden_dim"])
    return make_args(params | dict(overrides), file), config


def _check_plain(config: Mapping[str, Any]) -> None:
    """ValueError where these are not plain weights of a LlamaForCausalLM."""
    model_type, classes = config.get("model_type"), config.get("architectures")
    named = classes if isinstance(classes, list) and classes else ["LlamaForCausalLM"]
    if model_type != "llama" or named not in (["LlamaForCausalLM"], ["LlamaModel"]):
        raise ValueError(
            f"is of model_type {model_type!r:.40}, architectures {classes!r:.80}; 'llama' and "
            "LlamaForCausalLM are read"
        )
    quantization = config.get("quantization_config")
    if quantization is not None:
        said = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        name = _QUANTIZED.get(str(said), f"{said!r:.40}")
        raise ValueError(
            f"quantization_config says {name}, which is not read: use the model's unquantized "
            "version (bfloat16), or a GGUF file of it"
        )
    for key, works in _FIXED.items():
        if config.get(key) is not None and config[key] not in works:
            raise ValueError(f"{key} is {config[key]!r:.40}; {works[0]!r} is computed")


def _numbers(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of ModelArgs but for the rotary ones."""
    config = _DEFAULTS | {key: value for key, value in config.items() if value is not None}
    values: dict[str, Any] = {}
    for key, field in _INTS.items():
        if key not in config and key in _MAY_LACK:
            continue
        if key not in config:
            raise ValueError(f"lacks {key}")
        if type(config[key]) is not int or not 0 < config[key] < _LARGEST:
            raise ValueError(f"{key} needs to be a whole number above 0, is {config[key]!r:.40}")
        values[field] = config[key]
    if not isinstance(config["tie_word_embeddings"], bool):
        raise ValueError(f"tie_word_embeddings is {config['tie_word_embeddings']!r:.40}")
    eps = positive("rms_norm_eps", config["rms_norm_eps"])
    return values | {"norm_eps": eps, "tied": config["tie_word_embeddings"]}


def _ffn_terms(dim: int, hidden: int) -> dict[str, Any]:
    """Find multiple_of and ffn_dim_multiplier from which Meta's code derives this hidden size."""
    base = int(2 * 4 * dim / 3)
    for multiple, factor in _MULTIPLES:
        if -(-int((factor or 1) * base) // multiple) * multiple == hidden:
            return {"multiple_of": multiple, "ffn_dim_multiplier": factor}
    return {}


# --- writing --------------------------------------------------------------------------------------


def config_of(args: ModelArgs, dtype: str, ids: Mapping[str, Any]) -> dict[str, Any]:
    """config.json for `args`, in the spelling that old and new readers know; `ids` of bos, eos."""
    values = {"dim": args.dim, "n_layers": args.n_layers, "n_heads": args.n_heads}
    values |= {field: getattr(args, field) for field in _INTS.values()}
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **{key: values[field] for key, field in _INTS.items()},
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "rms_norm_eps": args.norm_eps,
        "rope_theta": args.rope_theta,
        "tie_word_embeddings": args.tied,
        "pretraining_tp": 1,
        "use_cache": True,
        "torch_dtype": dtype,
        **ids,
    }
    return config | say_scaling(args)
