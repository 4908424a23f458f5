"""tokenizer.json, Hugging Face's description of a tokenizer, and Meta's ranks file, written.

Knows Llama 3's tokenizers and no tensor. tokenizer.json is read in tokenizer_folder.py, for the
files beside it name and add tokens.
"""

import base64
from typing import Any, get_args

from llama.text.byte_level import CHAR_OF, PATTERN, merges_of
from llama.tokenizer import Tokenizer, Version, llama3_special_tokens


def tokenizer_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """A tokenizer.json's content: what gives `tokenizer`'s ids in Hugging Face's libraries.

    There, special tokens are found in every text, and what stands before a text is put there.
    """
    spelled = {"".join(map(CHAR_OF.__getitem__, t)): r for t, r in tokenizer.ranks.items()}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    split = {
        "type": "Split",
        "pattern": {"Regex": PATTERN},
        "behavior": "Isolated",
        "invert": False,
    }
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": word.id, "content": word.content, **{key: getattr(word, key) for key in flags}}
            for word in tokenizer.added
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [split, level | {"use_regex": False}],
        },
        "post_processor": _around(tokenizer),
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


def _around(tokenizer: Tokenizer) -> dict[str, Any]:
    """The post_processor that puts before and after a text what the tokenizer puts there."""
    if not (tokenizer.prefix or tokenizer.suffix):
        return {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False,
                "use_regex": True}  # fmt: skip
    names = {word.id: word.content for word in tokenizer.added}
    every = {names[token]: token for token in (*tokenizer.prefix, *tokenizer.suffix)}

    def around(text: str, number: int) -> list[dict[str, Any]]:
        before, after = (
            [{"SpecialToken": {"id": names[token], "type_id": number}} for token in ids]
            for ids in (tokenizer.prefix, tokenizer.suffix)
        )
        return [*before, {"Sequence": {"id": text, "type_id": number}}, *after]

    return {
        "type": "TemplateProcessing",
        "single": around("A", 0),
        "pair": [*around("A", 0), *around("B", 1)],
        "special_tokens": {
            name: {"id": name, "ids": [token], "tokens": [name]} for name, token in every.items()
        },
    }


def ranks_file(tokenizer: Tokenizer) -> bytes:
    """The content of Meta's tokenizer.model with the same ids; ValueError where it cannot say
    them."""
    count = len(tokenizer.ranks)
    known = [llama3_special_tokens(count, version) for version in get_args(Version)]
    if tokenizer.special_tokens not in known or len(tokenizer.added) > len(known[0]):
        every = {item for names in known for item in names.items()}
        odd = (w for w in tokenizer.added if not w.special or (w.content, w.id) not in every)
        word = next(odd, None)
        such = "" if word is None else f" ({word.content!r:.60} is the token {word.id})"
        raise ValueError(
            "Meta's tokenizer.model cannot say the special tokens of this model, which are not the "
            f"256 of Llama 3{such}: use another format"
        )
    lines = sorted(tokenizer.ranks.items(), key=lambda item: item[1])
    return b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in lines)
