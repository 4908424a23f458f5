"""tokenizer.json, Hugging Face's description of a tokenizer: read to the letter, and written.

Reads one kind, byte-level BPE as Llama 3 has it, and refuses every other by name: ids must be the
same as those of the file's own library, or there is no tokenizer. Knows no tensor. The surprising
thing: merges are read only to be checked. A byte-level BPE whose tokens are numbered in the order
in which they were learnt merges the pair of lowest rank first, and then the ranks are all there is.
"""

import base64
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from llama.strict_json import read_json
from llama.tokenizer import Tokenizer, Version, llama3_special_tokens

logger = logging.getLogger(__name__)

_LARGEST_FILE = 2**26  # bytes; Llama 3's has 17 MB in its longest spelling

# The pattern as the released files write it, which is Tokenizer.pat_str in other words.
_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PATTERNS = (_PATTERN, Tokenizer.pat_str)


def _alphabet() -> dict[str, int]:
    """The character by which a byte-level vocabulary writes each byte: its own where it is seen."""
    seen = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in seen]
    return {chr(b): b for b in seen} | {chr(256 + n): b for n, b in enumerate(rest)}


BYTE_OF = _alphabet()
CHAR_OF = {byte: char for char, byte in BYTE_OF.items()}


def read_tokenizer_json(file: Path) -> Tokenizer:
    """The tokenizer in tokenizer.json; the names of bos and eos from tokenizer_config.json beside.

    Every added token becomes a special token: it comes out of text only where the caller allows it.
    Raises ValueError, naming the file and what is other than in Llama 3's, for any other kind.
    """
    spec = read_json(file, _LARGEST_FILE)
    try:
        special = _added_tokens(spec.get("added_tokens"))
        _check_kind(spec)
        ranks = _ranks(spec["model"], special)
        names = _names(file.with_name("tokenizer_config.json"), special)
        tokenizer = Tokenizer.from_ranks(ranks, special, name=file.name, **names)
    except (ValueError, OSError) as error:
        message = str(error).removeprefix(f"{file.name}: ")
        raise ValueError(f"{file}: {message}") from error
    return tokenizer


def _check_kind(spec: Mapping[str, Any]) -> None:
    """ValueError where this is not byte-level BPE with Llama 3's pattern."""
    model = spec.get("model")
    if not isinstance(model, dict):
        raise ValueError("has no model")
    kind = model.get("type", "BPE")
    if model.get("byte_fallback"):
        raise ValueError(
            "is the SentencePiece kind of Llama 1 and 2 (byte_fallback), of which the "
            "tokenizer.model is read: put it into the same folder"
        )
    if kind != "BPE":
        raise ValueError(f"is of the kind {kind!r:.40}; byte-level BPE as in Llama 3 is read")
    for key in ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise ValueError(f"has {key} {model[key]!r:.40}, which Llama 3's tokenizer has not")
    normalizer = spec.get("normalizer")
    if normalizer is not None:
        raise ValueError(
            f"has a normalizer ({_type(normalizer)}), which Llama 3's tokenizer has not"
        )
    pattern = _split_pattern(spec.get("pre_tokenizer"))
    if pattern not in _PATTERNS:
        raise ValueError(f"splits text by another pattern than Llama 3's: {pattern!r:.80}")


def _type(part: object) -> str:
    return f"{part.get('type')!r:.40}" if isinstance(part, dict) else f"{part!r:.40}"


def _split_pattern(pre: object) -> str:
    """The pattern of a Split that a ByteLevel follows; ValueError for anything else."""
    steps = pre.get("pretokenizers") if isinstance(pre, dict) else None
    if not isinstance(steps, list) or [_type(s) for s in steps] != ["'Split'", "'ByteLevel'"]:
        raise ValueError(f"its pre_tokenizer is {_type(pre)}, not Llama 3's Split and ByteLevel")
    split, level = steps
    if split.get("behavior") != "Isolated" or split.get("invert"):
        raise ValueError("its Split is not the isolated, not inverted one of Llama 3")
    if level.get("add_prefix_space") or level.get("use_regex", True):
        raise ValueError("its ByteLevel adds a space or splits once more, as Llama 3's does not")
    pattern = split.get("pattern")
    return str(pattern.get("Regex")) if isinstance(pattern, dict) else ""


def _added_tokens(added: object) -> dict[str, int]:
    special: dict[str, int] = {}
    if not isinstance(added, list):
        raise ValueError("has no list added_tokens")
    for token in added:
        content = token.get("content") if isinstance(token, dict) else None
        number = token.get("id") if isinstance(token, dict) else None
        if not isinstance(content, str) or not content or type(number) is not int:
            raise ValueError(f"an added token is {token!r:.80}, without content or id")
        if special.setdefault(content, number) != number:
            raise ValueError(f"the added token {content!r:.60} comes twice")
    flags = ("lstrip", "rstrip", "single_word")
    odd = [token["content"] for token in added if any(token.get(flag) for flag in flags)]
    if odd:
        logger.warning("added token %.60r: lstrip, rstrip and single_word are not heeded", odd[0])
    return special


def _ranks(model: Mapping[str, Any], special: Mapping[str, int]) -> dict[bytes, int]:
    """Ranks by bytes, added tokens left out; checks that merging by rank is what merges do."""
    vocab, merges = model.get("vocab"), model.get("merges")
    if not isinstance(vocab, dict) or not isinstance(merges, list):
        raise ValueError("its model has no vocab or no merges")
    ranks: dict[bytes, int] = {}
    for token, rank in vocab.items():
        if special.get(token) == rank and type(rank) is int:
            continue
        try:
            spelled = bytes([BYTE_OF[char] for char in token])
        except KeyError:
            raise ValueError(f"the token {token!r:.60} is not written byte by byte") from None
        if type(rank) is not int or not spelled:
            raise ValueError(f"the token {token!r:.60} has the id {rank!r:.40}")
        ranks[spelled] = rank
    made = check_merges(merges, vocab)
    unmade = len(vocab.keys() - made - special.keys() - BYTE_OF.keys())
    if unmade and not model.get("ignore_merges"):
        raise ValueError(f"has {unmade} tokens that none of its merges makes")
    return ranks


def check_merges(merges: Sequence[object], vocab: Mapping[str, int]) -> set[str]:
    """The tokens that merges make, which must come in the order of their ids."""
    made: set[str] = set()
    last = -1
    for merge in merges:
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(pair, list) or len(pair) != 2 or not all(type(p) is str for p in pair):
            raise ValueError(f"the merge {merge!r:.60} is no pair")
        token = pair[0] + pair[1]
        rank = vocab.get(token)
        if rank is None or pair[0] not in vocab or pair[1] not in vocab:
            raise ValueError(f"the merge {merge!r:.60} is of tokens that are not in the vocabulary")
        if rank < last:
            raise ValueError(
                f"the merge {merge!r:.60} is not in the order of the ids, as Llama 3's"
            )
        made.add(token)
        last = rank
    return made


def _names(config: Path, special: Mapping[str, int]) -> dict[str, Any]:
    """What from_ranks needs to know besides: names of bos and eos, where they are not Llama 3's."""
    if {"<|begin_of_text|>", "<|end_of_text|>"} <= special.keys():
        return {}
    said = read_json(config)
    names = {}
    for key in ("bos", "eos"):
        name = said.get(f"{key}_token")
        name = name.get("content") if isinstance(name, dict) else name
        if not isinstance(name, str) or name not in special:
            raise ValueError(f"{config.name} names no {key}_token among the added tokens")
        names[key] = name
    return names | {"stop_tokens": [special[names["eos"]]]}


# --- writing --------------------------------------------------------------------------------------


def tokenizer_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """What tokenizer.json says for `tokenizer`: the same ids in Hugging Face's libraries.

    There, special tokens are found in every text, and a begin-of-text token is put before it.
    """
    spelled = {"".join(map(CHAR_OF.__getitem__, t)): r for t, r in tokenizer.ranks.items()}
    bos = next(n for n, i in tokenizer.special_tokens.items() if i == tokenizer.bos_id)
    begin, text = (
        {"SpecialToken": {"id": bos, "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
    )
    second = {"Sequence": {"id": "B", "type_id": 1}}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    split = {
        "type": "Split",
        "pattern": {"Regex": _PATTERN},
        "behavior": "Isolated",
        "invert": False,
    }
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    ids = sorted(tokenizer.special_tokens.items(), key=lambda item: item[1])
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": name, **flags, "special": True} for name, i in ids],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [split, level | {"use_regex": False}],
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [begin, text],
            "pair": [begin, text, {"SpecialToken": {"id": bos, "type_id": 1}}, second],
            "special_tokens": {bos: {"id": bos, "ids": [tokenizer.bos_id], "tokens": [bos]}},
        },
        "decoder": level | {"use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,
            "vocab": dict(sorted(spelled.items(), key=lambda item: item[1])),
            "merges": merges_of(spelled),
        },
    }


def merges_of(ranks: Mapping[str, int]) -> list[str]:
    """Every split of every token into two others, in the order of the ranks."""
    merges = []
    for token in sorted(ranks, key=ranks.__getitem__):
        halves = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
        pairs = [(a, b) for a, b in halves if a in ranks and b in ranks]
        pairs.sort(key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
        merges += [f"{a} {b}" for a, b in pairs]
    return merges


def ranks_file(tokenizer: Tokenizer) -> bytes:
    """Meta's tokenizer.model with the same ids; ValueError where Meta's format cannot say them."""
    count = len(tokenizer.ranks)
    if tokenizer.special_tokens not in [llama3_special_tokens(count, v) for v in get_args(Version)]:
        raise ValueError(
            "Meta's tokenizer.model cannot say the special tokens of this model, which are not the "
            "256 of Llama 3: use another format"
        )
    lines = sorted(tokenizer.ranks.items(), key=lambda item: item[1])
    return b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in lines)
