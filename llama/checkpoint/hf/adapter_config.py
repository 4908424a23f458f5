"""adapter_config.json, PEFT's description of an adapter: read to the letter.

Knows which settings come to LoRA as adapter.py adds it, and refuses all others by name; knows no
tensor. The surprising thing: rank and scale may differ by module, and which is meant is said by
patterns, which are a stranger's regular expressions; only such are run as end soon.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llama.files.strict_json import read_json

_TARGETS = frozenset(
    ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head",
     "embed_tokens")
)  # fmt: skip
_READ = {"peft_type", "r", "lora_alpha", "use_rslora", "target_modules", "rank_pattern",
         "alpha_pattern", "modules_to_save", "ensure_weight_tying"}  # fmt: skip
# Settings that say where an adapter comes from, or matter in training only
_IGNORED = re.compile(
    r"auto_mapping|base_model_name_or_path|revision|inference_mode|task_type|lora_dropout"
    r"|init_lora_weights|exclude_modules|layers_(to_transform|pattern)|peft_version|runtime_config"
    r"|qalora_group_size|eva_config|corda_config|loftq_config|megatron_core"
)
_INITS = (True, False, None, "gaussian", "orthogonal", "eva")  # others change the base's weights
_FALSE: tuple[object, ...] = (None, False, [], {}, "none", "")
_WHAT = {
    "use_dora": "DoRA, which scales the sum",
    "fan_in_fan_out": "transposed weights",
    "bias": "biases, which Llama does not have",
    "lora_bias": "biases, which Llama does not have",
    "layer_replication": "layers that are there several times",
    "alora_invocation_tokens": "weights that depend on the text",
    "trainable_token_indices": "rows of the embeddings besides the adapter",
    "target_parameters": "parameters that are no modules",
}
# Without braces, and nothing repeated that is a group: such patterns cannot take exponential time
_PATTERN = re.compile(r"(?!.*\)[*+?])(?:[\w.|()\[\]\-^$]|\\[.wd]|[*+](?!.*[*+].*[*+]))+")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of an adapter, as adapter.py uses them."""

    rank: int
    alpha: float
    stabilized: bool = False  # scale = alpha / sqrt(rank), rsLoRA (arXiv 2312.03732)
    ranks: Mapping[str, int] = field(default_factory=dict)  # by pattern of a module's name
    alphas: Mapping[str, float] = field(default_factory=dict)
    saved: tuple[str, ...] = ()  # modules that are the adapter's own, whole
    keeps_ties: bool = False

    def of(self, module: str) -> tuple[int, float]:
        """Rank and scale of a module, by its name in Hugging Face's files."""
        rank = self.ranks.get(_matching(self.ranks, module), self.rank)
        alpha = self.alphas.get(_matching(self.alphas, module), self.alpha)
        return rank, alpha / (math.sqrt(rank) if self.stabilized else rank)


def _matching(patterns: Mapping[str, object], module: str) -> str:
    """The first pattern that stands for the end of the name, as PEFT looks for it."""
    return next((p for p in patterns if re.match(rf"(.*\.)?({p})$", module)), "")


def read_settings(file: Path) -> Settings:
    """Read adapter_config.json. Raises ValueError, naming the file, for a setting that means more
    than adding a scaled product."""
    config = read_json(file)
    try:
        _check_settings(config)
        rank, alpha = config.get("r"), config.get("lora_alpha", 8)
        if not isinstance(config.get("use_rslora", False), bool):
            raise ValueError(f"use_rslora is {config['use_rslora']!r:.40}")
        saved = config.get("modules_to_save") or []
        if not isinstance(saved, list) or not all(isinstance(name, str) for name in saved):
            raise ValueError(f"modules_to_save is {saved!r:.60}, no list of names")
        return Settings(
            rank=_rank("r", rank),
            alpha=_alpha("lora_alpha", alpha),
            stabilized=config.get("use_rslora", False),
            ranks={k: _rank(f"rank_pattern {k}", v) for k, v in _pattern(config, "rank").items()},
            alphas={
                k: _alpha(f"alpha_pattern {k}", v) for k, v in _pattern(config, "alpha").items()
            },
            saved=tuple(saved),
            keeps_ties=config.get("ensure_weight_tying") not in _FALSE,
        )
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def _check_settings(config: Mapping[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise ValueError(f"is of peft_type {config.get('peft_type')!r:.40}; LORA is read")
    if config.get("task_type") not in (None, "CAUSAL_LM"):
        raise ValueError(f"is for the task {config['task_type']!r:.40}; CAUSAL_LM is read")
    for key, value in config.items():
        if not (key in _READ or _IGNORED.fullmatch(key) or value in _FALSE):
            what = f": {_WHAT[key]}" if key in _WHAT else ""
            raise ValueError(f"has {key} {value!r:.60}{what}; it cannot be merged")
    if config.get("init_lora_weights") not in _INITS:
        raise ValueError(
            f"has init_lora_weights {config['init_lora_weights']!r:.40}, which changes the "
            "base's weights; convert it to plain LoRA with PEFT"
        )
    targets = config.get("target_modules")
    names = targets if isinstance(targets, list) else []
    unknown = [name for name in names if str(name).rsplit(".")[-1] not in _TARGETS]
    if unknown:
        raise ValueError(
            f"changes {unknown[0]!r:.60}; these can be merged: {', '.join(sorted(_TARGETS))}"
        )


def _rank(key: str, rank: object) -> int:
    if type(rank) is not int or not 0 < rank < 2**16:
        raise ValueError(f"{key:.80} needs to be a whole number above 0, is {rank!r:.40}")
    return rank


def _alpha(key: str, alpha: object) -> float:
    if not isinstance(alpha, (int, float)) or type(alpha) is bool or not math.isfinite(alpha):
        raise ValueError(f"{key:.80} needs to be a number, is {alpha!r:.40}")
    return alpha


def _pattern(config: Mapping[str, Any], what: str) -> Mapping[str, object]:
    """Values by patterns of module names; ValueError for a pattern that could take for ever."""
    said = config.get(f"{what}_pattern") or {}
    if not isinstance(said, dict):
        raise ValueError(f"{what}_pattern is {said!r:.60}, no object of patterns")
    for pattern in said:
        try:
            if len(pattern) > 500 or not _PATTERN.fullmatch(pattern):
                raise re.error("it is not plain")
            re.compile(pattern)
        except re.error as error:
            raise ValueError(
                f"{what}_pattern has the pattern {pattern!r:.80}, which is not read: {error}"
            ) from None
    return said
