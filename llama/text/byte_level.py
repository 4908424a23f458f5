"""Byte-level BPE as Hugging Face's tokenizer.json and GGUF describe it, checked to be Llama 3's.

Bytes are written as letters there. Knows no file. The surprising thing: merges are read only to be
checked. A byte-level BPE whose tokens are numbered in the order in which they were learnt merges
the pair of lowest rank first, and then the ranks are all there is.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from llama.tokenizer import Tokenizer
from llama.tokenizer.added import AddedToken

# The pattern as the released files write it, which is Tokenizer.pat_str in other words.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PATTERNS = (PATTERN, Tokenizer.pat_str)


def _alphabet() -> dict[str, int]:
    """The character by which a byte-level vocabulary writes each byte: its own where it is seen."""
    seen = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in seen]
    return {chr(b): b for b in seen} | {chr(256 + n): b for n, b in enumerate(rest)}


BYTE_OF = _alphabet()
CHAR_OF = {byte: char for char, byte in BYTE_OF.items()}


def is_byte_level(spec: Mapping[str, Any]) -> bool:
    """Whether a tokenizer.json writes bytes as letters, as Llama 3's does."""
    pre = spec.get("pre_tokenizer")
    steps = pre.get("pretokenizers") if isinstance(pre, dict) else None
    every = steps if isinstance(steps, list) else [pre]
    types = [each.get("type") for each in every if isinstance(each, dict)]
    model = spec.get("model")
    return "ByteLevel" in types or not (isinstance(model, dict) and model.get("byte_fallback"))


def check_byte_level(spec: Mapping[str, Any]) -> None:
    """Raise ValueError where this is not byte-level BPE with Llama 3's pattern."""
    model = spec.get("model")
    if not isinstance(model, dict):
        raise ValueError("has no model")
    model_type = model.get("type", "BPE")
    if model.get("byte_fallback"):
        raise ValueError(
            "is the SentencePiece kind of Llama 1 and 2 (byte_fallback), and cuts text as Llama "
            "3's: put the tokenizer.model alone into the folder"
        )
    if model_type != "BPE":
        raise ValueError(f"is of the kind {model_type!r:.40}; byte-level BPE as in Llama 3 is read")
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


def ranks_of(model: Mapping[str, Any], words: Mapping[str, AddedToken]) -> dict[bytes, int]:
    """Ranks by bytes, without added tokens that nothing is merged to; checks that merging by rank
    is what merges do."""
    vocab, merges = model.get("vocab"), model.get("merges")
    if not isinstance(vocab, dict) or not isinstance(merges, list):
        raise ValueError("its model has no vocab or no merges")
    odd = next((token for token, rank in vocab.items() if type(rank) is not int), None)
    if odd is not None:
        raise ValueError(f"the token {odd!r:.60} has the id {vocab[odd]!r:.40}")
    made = check_merges(merges, vocab)
    ranks: dict[bytes, int] = {}
    for token, rank in vocab.items():
        if token in words and token not in made and token not in BYTE_OF:
            continue
        try:
            spelled = bytes([BYTE_OF[char] for char in token])
        except KeyError:
            raise ValueError(f"the token {token!r:.60} is not written byte by byte") from None
        if rank < 0 or not spelled:
            raise ValueError(f"the token {token!r:.60} has the id {rank!r:.40}")
        ranks[spelled] = rank
    unmade = len(vocab.keys() - made - words.keys() - BYTE_OF.keys())
    if unmade and not model.get("ignore_merges"):
        raise ValueError(f"has {unmade} tokens that none of its merges makes")
    return ranks


def check_merges(merges: Sequence[object], vocab: Mapping[str, int]) -> set[str]:
    """The tokens that merges make; ValueError where these do not come in the order of their ids."""
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


def merges_of(ranks: Mapping[str, int]) -> list[str]:
    """Every split of every token into two others, in the order of the ranks."""
    merges = []
    for token in sorted(ranks, key=ranks.__getitem__):
        halves = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
        pairs = [(a, b) for a, b in halves if a in ranks and b in ranks]
        pairs.sort(key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
        merges += [f"{a} {b}" for a, b in pairs]
    return merges
