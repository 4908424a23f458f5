"""The tokenizer inside a GGUF file: read from its keys, and written as them.

Two kinds: byte-level BPE as Llama 3 has it becomes a `Tokenizer`; SentencePiece's BPE, of which a
file holds pieces and scores but not the model, becomes a `PieceTokenizer`. Knows no tensor. The
surprising thing: a file spells the tokens of the first kind in letters, one for each byte, and has
a list of merges besides; ids alone say the same, for tokens are numbered in the order of learning.
"""

import logging
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from llama.checkpoint.gguf.header import Array, GGUFFile
from llama.text.byte_level import BYTE_OF, CHAR_OF, check_merges, merges_of
from llama.text.metaspace import MetaspaceTokenizer
from llama.text.piece_tokenizer import PieceTokenizer
from llama.text.pieces import CONTROL, NORMAL, UNUSED, USER_DEFINED
from llama.tokenizer import Tokenizer
from llama.tokenizer.added import AddedToken
from llama.tokenizer.protocols import TextTokenizer

logger = logging.getLogger(__name__)

# What llama.cpp calls the way of Llama 3 to cut text before merging, also in older files.
_LLAMA3 = ("llama-bpe", "llama3", "llama-v3")
_BEGIN = "<|begin_of_text|>"
# Words that end an answer in llama.cpp wherever they are in the vocabulary, eos or not.
_STOPS = (
    "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>",
    "<|endoftext|>", "<EOT>", "_<EOT>", "<｜end▁of▁sentence｜>",
)  # fmt: skip
_STOP_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")
_NAMES = {  # and what templates call them
    "bos_token_id": "bos_token",
    "eos_token_id": "eos_token",
    "unknown_token_id": "unk_token",
    "seperator_token_id": "sep_token",  # spelled so in the files
    "padding_token_id": "pad_token",
    "cls_token_id": "cls_token",
    "mask_token_id": "mask_token",
}
_WORDS = (CONTROL, USER_DEFINED)


class Vocabulary(NamedTuple):
    """The values of the keys tokenizer.ggml.* that are written."""

    model: str  # "gpt2" for byte-level BPE, "llama" for SentencePiece's
    tokens: list[str]  # by id, as are types and scores
    token_types: list[int]
    scores: list[float] | None  # of SentencePiece's
    merges: list[str] | None  # of byte-level BPE
    ids: dict[str, int]  # by key, such as bos_token_id
    add_space_prefix: bool | None  # of SentencePiece's


# --- reading --------------------------------------------------------------------------------------


def read_tokenizer(file: GGUFFile) -> TextTokenizer:
    """The tokenizer that a file describes.

    Raises ValueError, naming the file, for another kind than the two above, and where what the file
    says does not make a tokenizer.
    """
    try:
        model = file.get("tokenizer.ggml.model", str)
        if model not in ("gpt2", "llama"):
            raise ValueError(
                f"its tokenizer is of the kind {model!r:.40}; gpt2 (byte-level BPE) and llama "
                "(SentencePiece) are read: give tokenizer_path"
            )
        tokens = _strings(file, "tokens")
        token_types = _numbers(file, "token_type", len(tokens)) or [NORMAL] * len(tokens)
        times = Counter(tokens)
        while (
            tokens
            and token_types[len(tokens) - 1] == UNUSED
            and (tokens[-1].startswith("[PAD") or times[tokens[-1]] > 1)
        ):
            times[tokens.pop()] -= 1  # fills the rows of a matrix that no token needs
        twice = Counter(tokens).most_common(1)
        if twice and twice[0][1] > 1:
            raise ValueError(f"the token {twice[0][0]!r:.60} comes twice in its vocabulary")
        make = _byte_level if model == "gpt2" else _pieces
        tokenizer: TextTokenizer = make(file, tokens, token_types)
    except ValueError as error:
        raise ValueError(f"{file.path}: {str(error).removeprefix(f'{file.path}: ')}") from error
    tokenizer.stated = True
    return tokenizer


def _strings(file: GGUFFile, key: str) -> list[str]:
    values = file.get(f"tokenizer.ggml.{key}", Array).values()
    if not values or not isinstance(values[0], str):
        raise ValueError(f"tokenizer.ggml.{key} is no list of texts")
    return [str(value) for value in values]


def _numbers(file: GGUFFile, key: str, count: int) -> list[int]:
    """The list of a key, `count` whole numbers, or an empty one where the key is absent."""
    if f"tokenizer.ggml.{key}" not in file.metadata:
        return []
    values = file.get(f"tokenizer.ggml.{key}", Array).values()
    if len(values) != count or not all(type(value) is int for value in values):
        raise ValueError(f"tokenizer.ggml.{key} is no list of {count} whole numbers")
    return [int(value) for value in values]


def _id(file: GGUFFile, key: str, count: int) -> int | None:
    """The id that a key names; None where the key is absent, or, as in llama.cpp, where it names no
    token and the tokenizer can do without: ValueError for the begin or the end of a text."""
    if f"tokenizer.ggml.{key}" not in file.metadata:
        return None
    token = file.get(f"tokenizer.ggml.{key}", int)
    if 0 <= token < count:
        return token
    wrong = f"tokenizer.ggml.{key} is {token}, and there are {count} tokens"
    if key in ("bos_token_id", "eos_token_id"):
        raise ValueError(wrong)
    logger.warning("%s: %s; it is not heeded", file.path, wrong)
    return None


def _byte_level(file: GGUFFile, tokens: list[str], token_types: Sequence[int]) -> Tokenizer:
    ranks: dict[bytes, int] = {}
    added: dict[int, AddedToken] = {}
    made = {merge.replace(" ", "") for merge in _merges(file)}
    for token, (text, token_type) in enumerate(zip(tokens, token_types, strict=False)):
        spelled = all(letter in BYTE_OF for letter in text)
        if token_type == NORMAL and not spelled:
            raise ValueError(f"the token {text!r:.60} is not spelled byte by byte")
        plain = token_type == NORMAL or (token_type == UNUSED and spelled)
        if plain or (spelled and text in made):
            ranks[bytes([BYTE_OF[letter] for letter in text])] = token
        if not plain:
            added[token] = AddedToken(text, token, special=token_type != USER_DEFINED)
    pre = file.get("tokenizer.ggml.pre", str, "" if _BEGIN in tokens else "default")
    if pre not in ("", *_LLAMA3):
        raise ValueError(
            f"its tokenizer cuts text by the rule {pre!r:.40}; {_LLAMA3[0]} is known: give "
            "tokenizer_path"
        )
    _check_merges(file, tokens)
    ids, names = _named(file, tokens)
    known = {text: token for token, text in enumerate(tokens)}
    bos, said = ids["bos_token_id"], ids["eos_token_id"]
    bos = known.get(_BEGIN) if bos is None else bos
    # an Instruct file calls its end of a turn the end of a text; both stop, only one ends a text
    eos = known.get(_STOPS[0], said)
    if eos is None:
        raise ValueError("says no tokenizer.ggml.eos_token_id")
    prefix, suffix = _around(file, bos, eos if said is None else said)
    stops = {ids[key] for key in _STOP_KEYS} | {known.get(name) for name in _STOPS}
    for end in (bos, eos, *stops):
        if end is not None and end in added:  # also where the file calls it a user's word
            added[end] = added[end]._replace(special=True)
    special = {word.content: word.id for word in added.values() if word.special}
    return Tokenizer.from_ranks(
        ranks,
        special,
        name=str(file.path),
        bos=None if bos is None else tokens[bos],
        eos=tokens[eos],
        stop_tokens=_stop_tokens(stops, special),
        words=added.values(),
        names=names,
        prefix=prefix,
        suffix=suffix,
    )


def _named(file: GGUFFile, tokens: Sequence[str]) -> tuple[dict[str, int | None], dict[str, str]]:
    """The ids that the file names, None where it does not, and their texts as templates call
    them."""
    ids = {key: _id(file, key, len(tokens)) for key in (*_STOP_KEYS, *_NAMES)}
    texts = {name: ids[key] for key, name in _NAMES.items()}
    return ids, {name: tokens[token] for name, token in texts.items() if token is not None}


def _around(file: GGUFFile, bos: int | None, eos: int) -> tuple[list[int], list[int]]:
    """The ids that stand before and after a text, as the file says."""
    before = file.get("tokenizer.ggml.add_bos_token", bool, True) and bos is not None
    after = file.get("tokenizer.ggml.add_eos_token", bool, False)
    return [bos] if before else [], [eos] if after else []  # type: ignore[list-item]


def _stop_tokens(stops: set[int | None], special: Mapping[str, int]) -> set[int]:
    """`stops` without None, and with the token that became Llama 3.1's eom and has no name in 3."""
    found = {token for token in stops if token is not None}
    before = special.get("<|eot_id|>", 0) - 1
    reserved = {i for name, i in special.items() if name.startswith("<|reserved_special_token")}
    return found | ({before} & reserved)


def _merges(file: GGUFFile) -> list[str]:
    if "tokenizer.ggml.merges" not in file.metadata:
        raise ValueError("lacks the key tokenizer.ggml.merges")
    if not file.get("tokenizer.ggml.merges", Array).length:
        return []
    return _strings(file, "merges")


def _check_merges(file: GGUFFile, tokens: list[str]) -> None:
    """ValueError where merging by id would not be what the file's merges do."""
    check_merges(_merges(file), {text: token for token, text in enumerate(tokens)})


def _pieces(file: GGUFFile, tokens: list[str], token_types: Sequence[int]) -> PieceTokenizer:
    scores = file.get("tokenizer.ggml.scores", Array).values()
    if len(scores) < len(tokens) or not all(type(score) is float for score in scores):
        raise ValueError(f"tokenizer.ggml.scores is no list of {len(tokens)} numbers")
    ids, names = _named(file, tokens)
    known = {text: token for token, text in enumerate(tokens) if token_types[token] in _WORDS}
    stops = {ids[key] for key in _STOP_KEYS} | {known.get(name) for name in _STOPS}
    bos = 1 if ids["bos_token_id"] is None else ids["bos_token_id"]
    eos = 2 if ids["eos_token_id"] is None else ids["eos_token_id"]
    prefix, suffix = _around(file, bos, eos)
    ends = {"bos_token": bos, "eos_token": eos}
    return PieceTokenizer(
        tokens,
        [float(score) for score in scores[: len(tokens)]],
        list(token_types[: len(tokens)]),
        bos_id=bos,
        eos_id=eos,
        stop_tokens={token for token in stops if token is not None},
        add_space_prefix=file.get("tokenizer.ggml.add_space_prefix", bool, True),
        names={key: tokens[token] for key, token in ends.items() if token < len(tokens)} | names,
        prefix=prefix,
        suffix=suffix,
    )


# --- writing --------------------------------------------------------------------------------------


def vocabulary(tokenizer: TextTokenizer, size: int) -> Vocabulary:
    """The keys for a tokenizer, filled up to `size` tokens, the rows of the model's embedding.

    Raises ValueError where the tokenizer is of neither kind, or has more tokens than that.
    """
    if tokenizer.n_words > size:
        raise ValueError(f"the tokenizer has {tokenizer.n_words} tokens and the model {size}")
    if isinstance(tokenizer, Tokenizer):
        out = _spelled(tokenizer)
    elif isinstance(tokenizer, (PieceTokenizer, MetaspaceTokenizer)):
        out = _scored(tokenizer)
    else:
        out = _scored(PieceTokenizer.of_sentencepiece(tokenizer))
    for token in range(len(out.tokens), size):
        out.tokens.append(f"[PAD{token}]")
        out.token_types.append(UNUSED)
        if out.scores is not None:
            out.scores.append(-10000.0)
    return out


def named_ids(
    said: Vocabulary, tokenizer: TextTokenizer, stops: Collection[int], size: int
) -> dict[str, int]:
    """The ids that a file names: what begins and ends a text, what templates call tokens, and under
    eot and eom what else ends an answer, as far as there are keys. Readers know Llama 3's by name,
    so that these leave theirs to others."""
    ids = dict(said.ids)
    if not tokenizer.prefix and "bos_token" not in tokenizer.names:
        ids.pop("bos_token_id", None)
    known = {word.content: word.id for word in tokenizer.added}
    for key, name in _NAMES.items():
        if key not in ids and tokenizer.names.get(name) in known:
            ids[key] = known[tokenizer.names[name]]
    told = {ids[key] for key in _STOP_KEYS if key in ids}
    by_name = {token for token in stops if token < size and said.tokens[token] in _STOPS}
    told |= _stop_tokens({*by_name}, tokenizer.special_tokens)
    left = [token for token in sorted(stops) if token < size and token not in told]
    keys = [key for key in ("eot_token_id", "eom_token_id") if key not in ids]
    free = [*keys, *(key for key in ("eom_token_id", "eot_token_id") if key not in keys)]
    ids |= dict(zip(free, left, strict=False))
    return {key: token for key, token in ids.items() if token < size}


def _spelled(tokenizer: Tokenizer) -> Vocabulary:
    texts = {
        rank: "".join(CHAR_OF[byte] for byte in token) for token, rank in tokenizer.ranks.items()
    }
    merges = merges_of({text: rank for rank, text in texts.items()})
    token_types = dict.fromkeys(texts, NORMAL)
    for word in tokenizer.added:
        texts[word.id], token_types[word.id] = (
            word.content,
            CONTROL if word.special else USER_DEFINED,
        )
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    for key, name in (("eot_token_id", "<|eot_id|>"), ("eom_token_id", "<|eom_id|>")):
        if name in tokenizer.special_tokens:
            ids[key] = tokenizer.special_tokens[name]
    order = range(tokenizer.n_words)
    return Vocabulary(
        "gpt2",
        [texts.get(n, f"[PAD{n}]") for n in order],
        [token_types.get(n, UNUSED) for n in order],
        None,
        merges,
        ids,
        None,
    )


def _scored(tokenizer: PieceTokenizer | MetaspaceTokenizer) -> Vocabulary:
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    return Vocabulary(
        "llama",
        list(tokenizer.pieces),
        list(tokenizer.token_types),
        list(tokenizer.scores),
        None,
        ids,
        tokenizer.add_space_prefix,
    )
