"""tokenizer.json, Hugging Face's description of a tokenizer: read, and written for Llama 3's kind.

Knows no tensor. The surprising thing: reading it takes more than the one file, for the files beside
it name and add tokens, see tokenizer_folder.py.
"""

import base64
from pathlib import Path
from typing import Any, get_args

from llama.byte_level import BYTE_OF, CHAR_OF, PATTERN, check_merges, merges_of
from llama.tokenizer import TextTokenizer, Tokenizer, Version, llama3_special_tokens
from llama.tokenizer_folder import read_folder

__all__ = [
    "BYTE_OF",
    "CHAR_OF",
    "check_merges",
    "merges_of",
    "ranks_file",
    "read_tokenizer_json",
    "tokenizer_json",
]


def read_tokenizer_json(file: Path) -> TextTokenizer:
    """The tokenizer in tokenizer.json, with what the files beside it say, as `read_folder`."""
    return read_folder(file)


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
        "pattern": {"Regex": PATTERN},
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
