"""Hugging Face folders: config.json and model*.safetensors, read.

Maps the files and gives their tensors the canonical names; no weight is touched. The surprising
thing: q_proj and k_proj hold the same numbers as Meta's wq and wk in another order of rows. Their
rotary pairs are (i, i + E/2) of a head, Meta's (2i, 2i + 1); rows are put back as they are read.

Letters: H heads, E head size, D columns.
"""

import logging
import os
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llama.args import ModelArgs
from llama.checkpoint.hf.config import read_config
from llama.checkpoint.safetensors import Entry, open_file, stored
from llama.checkpoint.source import Checkpoint, LazyTensor, Part
from llama.files.plain import check_file
from llama.files.strict_json import read_json
from llama.names import shapes

logger = logging.getLogger(__name__)

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_BLOCK = 2**26  # bytes that are reordered at a time
_LARGEST_INDEX = 2**23  # bytes; the 405B has 100 kB

_MODEL = {
    "tok_embeddings": "model.embed_tokens",
    "norm": "model.norm",
    "output": "lm_head",
}
_LAYER = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w3": "mlp.up_proj",
    "feed_forward.w2": "mlp.down_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_ROTATED = (".wq.weight", ".wk.weight")
_SKIPPED = {r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq": "derived from rope_theta"}


def hf_name(name: str) -> str:
    """The name in Hugging Face's files of a tensor that Meta's files call `name`."""
    stem = name.removesuffix(".weight")
    if stem in _MODEL:
        return f"{_MODEL[stem]}.weight"
    _, layer, module = stem.split(".", 2)
    return f"model.layers.{layer}.{_LAYER[module]}.weight"


def rotary_heads(name: str, args: ModelArgs) -> int:
    """How many heads a tensor has whose rows stand in another order in these files; 0 for none."""
    if not name.endswith(_ROTATED):
        return 0
    return args.n_heads if name.endswith(_ROTATED[0]) else args.n_kv_heads


class Reordered(LazyTensor):
    """A tensor whose rows of each head go from halves to interleaved pairs (`to_pairs`), or
    back."""

    def __init__(self, source: LazyTensor, heads: int, *, to_pairs: bool) -> None:
        self.source, self.to_pairs = source, to_pairs
        self.head_size = source.shape[0] // heads
        self.shape, self.dtype, self.device = source.shape, source.dtype, source.device

    def parts(self, dim: int = 0, start: int = 0, stop: int | None = None) -> Iterator[Part]:
        stop = start + self.range_shape(dim, start, stop)[dim]
        size = self.head_size
        first, last = (start, stop) if dim == 0 else (0, self.shape[0])
        row = prod(self.shape[1:]) * self.dtype.itemsize
        step = max(1, _BLOCK // (row * size or 1)) * size
        for low in range(first // size * size, last, step):
            high = min(low + step, -(-last // size) * size)
            block = reorder(self.source.read(0, low, high), size, to_pairs=self.to_pairs)
            begin, end = max(low, first), min(high, last)
            block = block[begin - low : end - low]
            yield Part(
                0, begin - first, block if dim == 0 else block.narrow(dim, start, stop - start)
            )


def reorder(rows: Tensor, head_size: int, *, to_pairs: bool) -> Tensor:
    """Copy rows (H E, D) of whole heads from halves to interleaved pairs, or back."""
    split = (2, head_size // 2) if to_pairs else (head_size // 2, 2)
    heads = rows.reshape(-1, *split, *rows.shape[1:])
    return heads.transpose(1, 2).clone(memory_format=torch.contiguous_format).view(rows.shape)


# --- the folder -----------------------------------------------------------------------------------


class _Located(NamedTuple):
    """A tensor in one of the files."""

    file: Path
    data: Tensor  # all bytes of the file, mapped
    entry: Entry  # which of them are the tensor's


def open_hf(path: Path, overrides: Mapping[str, Any]) -> Checkpoint:
    """The checkpoint in a folder that holds config.json and model.safetensors or its shards.

    `overrides` are fields of ModelArgs that hold whatever config.json says. Raises
    FileNotFoundError or ValueError, naming the file, where anything is missing, unknown, or does
    not fit together.
    """
    config_file = path / "config.json"
    args, config = read_config(config_file, overrides)
    files, stored_there = _open_files(path, ["lm_head.weight"] if args.tied else [])
    whole = files[0] if len(files) == 1 else path / INDEX
    located = _by_hf_name(stored_there, whole)
    if args.tied and not _is_tied(located, whole):
        args = replace(args, tied=False)
    skipped = _account(args, located, whole)
    tensors = {
        name: _tensor(name, shape, args, located[hf_name(name)], config_file)
        for name, shape in shapes(args).items()
        if hf_name(name) in located and hf_name(name) not in skipped
    }
    dtype = tensors["layers.0.attention.wq.weight"].dtype
    said = str(config.get("dtype") or config.get("torch_dtype") or dtype).removeprefix("torch.")
    if said != str(dtype).removeprefix("torch."):
        logger.warning("%s says %.40s, and the weights are %s", config_file, said, dtype)
    tokenizers = [path / name for name in ("tokenizer.json", "tokenizer.model")]
    return Checkpoint(
        args=args,
        tensors=tensors,
        dtype=dtype,
        path=path,
        shards=len(files),
        skipped=skipped,
        tokenizer_path=next((file for file in tokenizers if file.is_file()), None),
        stop_token_ids=_stop_token_ids(path, config, args.vocab_size),
        chat_template=_chat_template(path),
    )


def _open_files(
    path: Path, needless: Collection[str] = ()
) -> tuple[list[Path], dict[str, _Located]]:
    """Open all files of weights, and locate every tensor by its name in them.

    Files may be links to anywhere, as in the hub's cache: only names are kept to the folder. What
    is `needless` an index may name although no file holds it.
    """
    if (path / SINGLE).exists() or not (path / INDEX).exists():
        files, weight_map = [path / SINGLE], None
    else:
        weight_map = _read_index(path / INDEX)
        files = [path / name for name in sorted(set(weight_map.values()))]
    missing = [file for file in files if not os.path.lexists(file)]
    if missing:
        other = "; weights in pickles (*.bin) are not read" if any(path.glob("*.bin")) else ""
        raise FileNotFoundError(f"{missing[0]} is missing{other}")
    located: dict[str, _Located] = {}
    for file in files:
        data, entries = open_file(file)
        if weight_map is not None:
            said = {name for name, holder in weight_map.items() if holder == file.name}
            odd = sorted(said ^ entries.keys())
            odd = [name for name in odd if name in entries or name not in needless]
            if odd:
                where = "in the index only" if odd[0] in said else "in the file only"
                raise ValueError(
                    f"{path / INDEX} and {file.name} differ in {odd[0]:.80}, which is {where}"
                )
        located |= {name: _Located(file, data, entry) for name, entry in entries.items()}
    return files, located


def _read_index(file: Path) -> dict[str, str]:
    """File names by tensor names; each is a plain name in the same folder."""
    weight_map = read_json(file, _LARGEST_INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{file}: has no weight_map")
    for name, holder in weight_map.items():
        if not isinstance(holder, str) or not re.fullmatch(r"[\w\-][\w\-.]*\.safetensors", holder):
            raise ValueError(
                f"{file}: says that {name:.80} lies in {holder!r:.80}, which is no name of a "
                "safetensors file in this folder"
            )
    return weight_map


_OURS = re.compile(r"(?:model\.){0,2}((?:layers\.\d+|embed_tokens|norm|rotary_emb)\..+)")
_HEAD = re.compile(r"(?:model\.)?(lm_head\.weight)")


def _by_hf_name(located: Mapping[str, _Located], file: Path) -> dict[str, _Located]:
    """The tensors by the names of LlamaForCausalLM, which transformers finds with one "model." more
    or less than they have; ValueError, naming it, for any other prefix of all of them."""
    named: dict[str, _Located] = {}
    ours_found = False
    for name, tensor in located.items():
        ours, head = _OURS.fullmatch(name), _HEAD.fullmatch(name)
        theirs = f"model.{ours[1]}" if ours else head[1] if head else name
        ours_found = ours_found or ours is not None
        if theirs in named:
            raise ValueError(f"{file}: holds {theirs:.80} under two names, one of them {name:.80}")
        named[theirs] = tensor
    if ours_found:
        return named
    for name in sorted(located):
        match = re.fullmatch(r"(.+?)(?:model\.)?(?:layers\.\d+|embed_tokens|norm)\..+", name)
        if match:
            raise ValueError(
                f"{file}: its tensors have {match[1]!r:.80} before the names that LlamaForCausalLM "
                f"gives them, such as {name:.120}, and transformers does not find them either; "
                "rename them, or save the inner model alone"
            )
    return named


def _account(args: ModelArgs, located: Mapping[str, _Located], file: Path) -> dict[str, str]:
    """The reasons why tensors are skipped, by name; ValueError for a tensor too many or too few."""
    layers = {name.split(".")[2] for name in located if name.startswith("model.layers.")}
    if len(layers) != args.n_layers:
        raise ValueError(
            f"{file}: holds {len(layers)} layers, and config.json says num_hidden_layers "
            f"{args.n_layers}"
        )
    wanted = {hf_name(name) for name in shapes(args)}
    head = "lm_head.weight"
    if args.tied:
        wanted -= {head}
    missing, unknown = sorted(wanted - located.keys()), []
    if missing:
        tie = ", and config.json does not say tie_word_embeddings" if missing == [head] else ""
        raise ValueError(f"{file}: lacks {', '.join(missing[:3]):.200}{tie}")
    skipped: dict[str, str] = {}
    for name in sorted(located.keys() - wanted):
        reason = next((why for key, why in _SKIPPED.items() if re.fullmatch(key, name)), None)
        if args.tied and name == head:
            reason = "equals model.embed_tokens.weight, to which it is tied"
        if reason is None:
            unknown.append(name)
        else:
            skipped[name] = reason
    if unknown:
        raise ValueError(
            f"{file}: holds tensors that this model does not have: {', '.join(unknown[:3]):.200}"
        )
    return skipped


def _is_tied(located: Mapping[str, _Located], file: Path) -> bool:
    """Whether output and embeddings, which config.json ties, are the same numbers in whatever
    bytes; where they are not, both are used, as transformers does."""
    names = ("lm_head.weight", "model.embed_tokens.weight")
    if not all(name in located for name in names):
        return True
    head, table = (located[name] for name in names)
    bits = [each.data[each.entry.start : each.entry.stop] for each in (head, table)]
    if head.entry.dtype == table.entry.dtype and torch.equal(*bits):
        return True
    here, there = (stored(name, located[name].data, located[name].entry, file) for name in names)
    rows = here.shape[0] if here.shape == there.shape else 0
    blocks = ((row, min(row + 1024, rows)) for row in range(0, rows, 1024))
    if rows and all(
        torch.equal(here.read(0, *each).float(), there.read(0, *each).float()) for each in blocks
    ):
        return True
    logger.warning(
        "%s: config.json says tie_word_embeddings, and lm_head.weight differs from "
        "model.embed_tokens.weight; both are used, as transformers does",
        file,
    )
    return False


def _tensor(
    name: str, shape: tuple[int, ...], args: ModelArgs, found: _Located, config: Path
) -> LazyTensor:
    tensor = stored(hf_name(name), found.data, found.entry, found.file)
    if tensor.shape != shape:
        raise ValueError(
            f"{found.file}: {hf_name(name)} is {tensor.shape}, and should be {shape} by "
            f"{config.name}"
        )
    heads = rotary_heads(name, args)
    return Reordered(tensor, heads, to_pairs=True) if heads else tensor


# --- what lies beside the weights -----------------------------------------------------------------


def _stop_token_ids(path: Path, config: Mapping[str, Any], vocab_size: int) -> tuple[int, ...]:
    """eos_token_id of generation_config.json, one or several, else that of config.json."""
    file = path / "generation_config.json"
    said = read_json(file).get("eos_token_id") if file.is_file() else None
    if said is None:
        file, said = path / "config.json", config.get("eos_token_id")
    ids = said if isinstance(said, list) else [] if said is None else [said]
    wrong = [i for i in ids if type(i) is not int or not 0 <= i < vocab_size]
    if wrong:
        raise ValueError(
            f"{file}: eos_token_id is {wrong[0]!r:.40}, and ids are below {vocab_size}"
        )
    return tuple(ids)


def _chat_template(path: Path) -> str | None:
    """chat_template.jinja, else what tokenizer_config.json says (of several, the default)."""
    file = path / "chat_template.jinja"
    if file.is_file():
        check_file(file, largest=2**20)
        try:
            return file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise ValueError(f"{file}: is not UTF-8") from None
    file = path / "tokenizer_config.json"
    template = read_json(file, 2**24).get("chat_template") if file.is_file() else None
    if isinstance(template, list):
        named = {each.get("name"): each.get("template") for each in template if type(each) is dict}
        template = named.get("default")
    if isinstance(template, dict):
        template = template.get("default")
    if template is not None and not isinstance(template, str):
        raise ValueError(f"{file}: chat_template is {template!r:.40}, which is no text")
    return template
