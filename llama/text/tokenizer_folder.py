"""A Hugging Face folder's tokenizer: all the files that say something of it, read together.

tokenizer.json or tokenizer.model holds the vocabulary; what the files beside it add and name is
read in folder_words.py, in the order in which transformers adds it, so that every id is the one
that transformers gives. Knows no tensor. The surprising thing: a class named in the settings can
decide how spaces are written, whatever tokenizer.json says of them.
"""

import logging
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from llama.files.ranks import is_sentencepiece, parse_ranks, read_bytes
from llama.files.strict_json import read_json
from llama.text.byte_level import CHAR_OF, check_byte_level, is_byte_level, ranks_of
from llama.text.folder_words import (
    Settings,
    Vocabulary,
    added_token,
    content_of,
    id_of,
    text_ends,
)
from llama.text.metaspace import Merges, MetaspaceTokenizer, Spaces, merges_of_pieces
from llama.text.pieces import CONTROL, NORMAL, USER_DEFINED, pieces_of
from llama.tokenizer import Tokenizer, Version, llama3_special_tokens
from llama.tokenizer.added import AddedToken
from llama.tokenizer.protocols import TextTokenizer

logger = logging.getLogger(__name__)

_LARGEST_FILE = 2**26  # bytes of a tokenizer.json; Llama 3's has 17 MB in its longest spelling


def read_folder(file: Path, version: Version = "3") -> TextTokenizer:
    """The tokenizer in tokenizer.json or tokenizer.model, with what the files beside it say.

    Raises ValueError, naming the file and what is other than in Llama's, for what is not read.
    """
    said = Settings(file.parent)
    try:
        tokenizer = _read(file, said, version)
    except (ValueError, OSError) as error:
        message = str(error).removeprefix(f"{file.name}: ").removeprefix(f"{file}: ")
        raise ValueError(f"{file}: {message}") from error
    tokenizer.stated = True
    return tokenizer


def _read(file: Path, said: "Settings", version: Version) -> TextTokenizer:
    if file.suffix == ".json":
        return _of_json(file, said)
    data = read_bytes(str(file))
    if is_sentencepiece(data):
        return _of_pieces(data, said)
    return _of_ranks(parse_ranks(data, str(file)), said, file.name, version)


# --- tokenizer.json -------------------------------------------------------------------------------


def _of_json(file: Path, said: Settings) -> TextTokenizer:
    spec = read_json(file, _LARGEST_FILE)
    own = _own(spec.get("added_tokens"))
    model = spec.get("model")
    if not isinstance(model, dict):
        raise ValueError("has no model")
    byte_level = is_byte_level(spec)
    if byte_level:
        check_byte_level(spec)
    if not isinstance(model.get("vocab"), dict):
        raise ValueError("its model has no vocab or no merges")
    rebuilt = not byte_level and said.rebuilt
    defaults = said.defaults if rebuilt else {}
    vocabulary = Vocabulary(model["vocab"])
    vocabulary.add([] if rebuilt else own)
    moved = [w for w in own if not rebuilt and vocabulary.words[w.content].id != w.id]
    if moved:
        logger.warning(
            "%s: states the id %d for the added token %.60r, which has the id %d in transformers "
            "and here",
            file, moved[0].id, moved[0].content, vocabulary.words[moved[0].content].id,
        )  # fmt: skip
    words, names = said.words(own, defaults, rebuilt)
    vocabulary.add(words)
    bos, eos = text_ends(vocabulary.words, names)
    vocabulary.special((bos, eos))
    added = [*vocabulary.words.values()]
    prefix, suffix = _around(spec.get("post_processor"))
    if byte_level:
        ranks = ranks_of(model, vocabulary.words)
        _check_ranks(file.with_name("tokenizer.model"), ranks)
        return Tokenizer.from_ranks(
            ranks,
            {word.content: word.id for word in added if word.special},
            name=file.name,
            bos=bos,
            eos=eos,
            stop_tokens=None,
            words=added,
            names=names if said.there else None,
            prefix=prefix,
            suffix=suffix,
        )
    if rebuilt and said.of_code:
        prefix, suffix = [vocabulary.words[bos or eos].id], []
    return MetaspaceTokenizer(
        _merges(model),
        added,
        _rebuilt_spaces(said) if rebuilt else _spaces(spec),
        names=names,
        bos=bos,
        eos=eos,
        prefix=prefix,
        suffix=suffix,
        unknown=model.get("unk_token") or names.get("unk_token"),
    )


def _own(added: object) -> list[AddedToken]:
    """The added tokens of a tokenizer.json, with the ids that are stated there."""
    if not isinstance(added, list):
        raise ValueError("has no list added_tokens")
    own: dict[str, AddedToken] = {}
    for token in added:
        number = token.get("id") if isinstance(token, dict) else None
        if not content_of(token) or type(number) is not int:
            raise ValueError(f"an added token is {token!r:.80}, without content or id")
        word = added_token(token)._replace(id=number)
        if own.setdefault(word.content, word).id != number:
            raise ValueError(f"the added token {word.content!r:.60} comes twice")
        own[word.content] = word
    return [*own.values()]


def _check_ranks(file: Path, ranks: Mapping[bytes, int]) -> None:
    """ValueError where a file of Meta's ranks beside tokenizer.json is another model's."""
    data = read_bytes(str(file)) if file.is_file() else b""
    lines = 0 if is_sentencepiece(data) else sum(1 for line in data.split(b"\n") if line.strip())
    if lines and lines != len(ranks):
        raise ValueError(
            f"the tokenizer has {lines + 256} tokens by {file.name} beside it, which holds {lines} "
            f"ranks, and {len(ranks)} ranks here: they belong to different models, remove one"
        )


def _around(post: object) -> tuple[list[int], list[int]]:
    """The ids before and after a text that a post_processor puts there."""
    if post is None:
        return [], []
    if not isinstance(post, dict):
        raise ValueError("its post_processor is not understood")
    processor = post.get("type")
    try:
        if processor == "ByteLevel":
            return [], []
        if processor == "Sequence":
            before: list[int] = []
            after: list[int] = []
            for each in post["processors"]:
                first, last = _around(each)
                before, after = first + before, after + last
            return before, after
        if processor in ("RobertaProcessing", "BertProcessing"):
            return [int(post["cls"][1])], [int(post["sep"][1])]
        if processor == "TemplateProcessing":
            names = [step.get("SpecialToken", {}).get("id") for step in post["single"]]
            at = next(i for i, step in enumerate(post["single"]) if "Sequence" in step)
            ids = [[] if name is None else post["special_tokens"][name]["ids"] for name in names]
            return [*chain.from_iterable(ids[:at])], [*chain.from_iterable(ids[at:])]
    except (KeyError, IndexError, TypeError, StopIteration, AttributeError, ValueError):
        raise ValueError("its post_processor is not understood") from None
    raise ValueError(f"has a post_processor of the kind {processor!r:.40}, which is not read")


def _merges(model: Mapping[str, Any]) -> Merges:
    """Read pieces and merges of a BPE whose bytes are pieces; ValueError for another model."""
    if model.get("type", "BPE") != "BPE" or not model.get("byte_fallback"):
        raise ValueError(
            f"is of the kind {model.get('type')!r:.40}; BPE of bytes, as in Llama 3, and with "
            "byte_fallback, as in Llama 1 and 2, is read"
        )
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise ValueError(f"has {key} {model[key]!r:.40}, which Llama's tokenizers have not")
    vocab, merges = model["vocab"], model.get("merges")
    if not isinstance(merges, list) or not all(type(i) is int and i >= 0 for i in vocab.values()):
        raise ValueError("its model has no merges, or a token without an id")
    ranks: dict[tuple[str, str], int] = {}
    for rank, pair in enumerate(merges):
        halves = tuple(pair.split(" ") if isinstance(pair, str) else pair)
        if len(halves) != 2 or "".join(halves) not in vocab:
            raise ValueError(f"the merge {pair!r:.60} is no pair of tokens that make another")
        ranks[halves] = rank
    return Merges(vocab, ranks, whole=bool(model.get("ignore_merges")))


def _rebuilt_spaces(said: Settings) -> Spaces:
    """How transformers' LlamaTokenizer writes spaces, whatever tokenizer.json says of them."""
    if said.config.get("add_prefix_space") is False:
        return Spaces("never", stripped=said.of_code)
    legacy = said.config.get("legacy") is True and not said.of_code
    return Spaces("always" if legacy else "first")


def _spaces(spec: Mapping[str, Any]) -> Spaces:
    """Read how a tokenizer.json writes spaces; ValueError for other ways than SentencePiece's."""
    normalizers, pre = (
        _steps(spec, "normalizer", "normalizers"),
        _steps(spec, "pre_tokenizer", "pretokenizers"),
    )
    decoders = _steps(spec, "decoder", "decoders")
    stripped = any(each.get("type") == "Strip" and each.get("start") for each in decoders) or any(
        each.get("type") == "Metaspace" and each.get("prepend_scheme", "always") != "never"
        for each in decoders
    )
    prepended = {"type": "Prepend", "prepend": "▁"}
    replaced = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    if normalizers in ([prepended, replaced], [replaced]) and not pre:
        before = "always" if prepended in normalizers else "never"
        return Spaces(before, doubled=True, normalized=True, stripped=stripped)  # type: ignore[arg-type]
    if normalizers in ([], [replaced]) and [each.get("type") for each in pre] == ["Metaspace"]:
        scheme = pre[0].get("prepend_scheme")
        if scheme is None:
            scheme = "always" if pre[0].get("add_prefix_space", True) else "never"
        if scheme in ("always", "first", "never") and pre[0].get("replacement", "▁") == "▁":
            words = bool(pre[0].get("split", True))
            return Spaces(scheme, words=words, stripped=stripped)  # type: ignore[arg-type]
    names = [str(each.get("type")) for each in (*normalizers, *pre)]
    raise ValueError(f"normalizes and splits text by {', '.join(names):.80}, which is not read")


def _steps(spec: Mapping[str, Any], key: str, inner: str) -> list[dict[str, Any]]:
    part = spec.get(key)
    if part is None:
        return []
    steps = part.get(inner, []) if part.get("type") == "Sequence" else [part]
    return [dict(step) for step in steps]


# --- tokenizer.model ------------------------------------------------------------------------------


def _of_pieces(data: bytes, said: Settings) -> MetaspaceTokenizer:
    """A tokenizer of SentencePiece's pieces as transformers runs them, by LlamaTokenizer or by its
    general class."""
    pieces = pieces_of(data)
    vocab = {piece.text: token for token, piece in enumerate(pieces)}
    if len(vocab) < len(pieces):
        raise ValueError("two of its pieces have the same text")
    known = said.rebuilt
    scores = {piece.text: piece.score for piece in pieces}
    if known:
        ranks, spaces = merges_of_pieces(vocab), _rebuilt_spaces(said)
    else:
        order = {piece.text: -piece.score for piece in pieces if piece.type == NORMAL}
        ranks = merges_of_pieces(vocab, order)
        legacy = said.config.get("legacy", True) is not False
        spaces = Spaces("always" if legacy else "first", doubled=legacy)
    own = [
        AddedToken(piece.text, token, special=piece.type == CONTROL)
        for token, piece in enumerate(pieces)
        if piece.type in (CONTROL, USER_DEFINED)
    ]
    control = [word.content for word in own if word.special]
    names = dict(zip(("bos_token", "eos_token"), ("<s>", "</s>"), strict=True))
    if not {*names.values()} <= {*control}:
        names = dict(zip(names, control, strict=False))
    vocabulary = Vocabulary(vocab)
    words, names = said.words([], {**said.defaults, "unk_token": "<unk>", **names})
    vocabulary.add(words if known else (word._replace(normalized=False) for word in words))
    vocabulary.add(word for word in own if word.content not in vocabulary.words)
    bos, eos = text_ends(vocabulary.words, names)
    vocabulary.special((bos, eos))
    token_of = {name: word.id for name, word in vocabulary.words.items()}
    prefix, suffix = said.around(token_of.get(bos or ""), token_of[eos])
    return MetaspaceTokenizer(
        Merges(vocab, ranks, scores=scores),
        [*vocabulary.words.values()],
        spaces,
        names=names,
        bos=bos,
        eos=eos,
        prefix=prefix,
        suffix=suffix,
        unknown=names.get("unk_token"),
    )


def _of_ranks(ranks: Mapping[bytes, int], said: Settings, name: str, version: Version) -> Tokenizer:
    """A tokenizer of Llama 3's ranks, whose special tokens only the files beside them name."""
    vocab = {"".join(CHAR_OF[byte] for byte in token): rank for token, rank in ranks.items()}
    words, names = said.words([], {})
    stated = said.config.get("added_tokens_decoder")
    numbers = [id_of(key) for key in stated] if isinstance(stated, dict) else []
    vocabulary = Vocabulary(vocab)
    if max(numbers, default=0) >= len(ranks):
        texts = {id_of(key): content_of(value) for key, value in stated.items()}  # type: ignore[union-attr]
        vocabulary.add(
            AddedToken(texts.get(token) or f"<|reserved_token_{token}|>", -1, special=True)
            for token in range(len(ranks), max(numbers) + 1)
        )
    else:  # nobody says which they are: Meta's
        special = llama3_special_tokens(len(ranks), version)
        vocabulary.add(AddedToken(text, -1, special=True) for text in special)
    own = {w.content for w in vocabulary.words.values()} - {w.content for w in words}
    vocabulary.add(words)
    plain = {w.content for w in words if not w.special} - own
    for text in plain:
        vocabulary.words[text] = vocabulary.words[text]._replace(special=False)
    bos, eos = text_ends(vocabulary.words, names)
    vocabulary.special((bos, eos))
    added = [*vocabulary.words.values()]
    token_of = {word.content: word.id for word in added}
    prefix, suffix = said.around(token_of.get(bos or ""), token_of[eos])
    return Tokenizer.from_ranks(
        ranks,
        {word.content: word.id for word in added if word.special},
        name=name,
        bos=bos,
        eos=eos,
        words=added,
        names=names,
        prefix=prefix,
        suffix=suffix,
    )
