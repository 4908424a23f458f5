"""A Hugging Face folder's tokenizer: all the files that say something of it, read together.

tokenizer.json or tokenizer.model holds the vocabulary; tokenizer_config.json, added_tokens.json and
special_tokens_map.json add words and names, in the order in which transformers adds them, so that
every id is the one that transformers gives. Knows no tensor. The surprising thing: ids that the
files state for added words count for nothing there. A word has the id that the vocabulary gives it,
or else the next that is free.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from llama.files.ranks import is_sentencepiece, parse_ranks, read_bytes
from llama.files.strict_json import read_json
from llama.text.added import AddedToken
from llama.text.byte_level import CHAR_OF, check_kind, is_byte_level, ranks_of
from llama.text.metaspace import Merges, MetaspaceTokenizer, Spaces, merges_of_pieces
from llama.text.pieces import CONTROL, NORMAL, USER_DEFINED, pieces_of
from llama.tokenizer import TextTokenizer, Tokenizer, Version, llama3_special_tokens

logger = logging.getLogger(__name__)

_LARGEST_FILE = 2**26  # bytes of a tokenizer.json; Llama 3's has 17 MB in its longest spelling
BESIDE = ("tokenizer_config.json", "added_tokens.json", "special_tokens_map.json")
_NAMED = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
_LLAMA = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
_INFILL = {  # what transformers' CodeLlamaTokenizer adds where nothing is said of it
    "prefix_token": "▁<PRE>",
    "middle_token": "▁<MID>",
    "suffix_token": "▁<SUF>",
    "eot_token": "▁<EOT>",
    "fill_token": "<FILL_ME>",
}
_FLAGS = ("special", "normalized", "lstrip", "rstrip", "single_word")


def read_folder(file: Path, version: Version = "3") -> TextTokenizer:
    """The tokenizer in tokenizer.json or tokenizer.model, with what the files beside it say.

    Raises ValueError, naming the file and what is other than in Llama's, for what is not read.
    """
    said = _Said(file.parent)
    try:
        tokenizer = _read(file, said, version)
    except (ValueError, OSError) as error:
        message = str(error).removeprefix(f"{file.name}: ").removeprefix(f"{file}: ")
        raise ValueError(f"{file}: {message}") from error
    tokenizer.stated = True
    return tokenizer


def _read(file: Path, said: "_Said", version: Version) -> TextTokenizer:
    if file.suffix == ".json":
        return _of_json(file, said)
    data = read_bytes(str(file))
    if is_sentencepiece(data):
        return _of_pieces(data, said)
    return _of_ranks(parse_ranks(data, str(file)), said, file.name, version)


class _Said:
    """What lies beside the vocabulary: settings, and words to add in this order."""

    def __init__(self, folder: Path) -> None:
        every = {name: folder / name for name in (*BESIDE, "config.json")}
        files = {name: read_json(file, 2**24) if file.is_file() else {} for name, file in
                 every.items()}  # fmt: skip
        self.config = dict(files["tokenizer_config.json"])
        self.there = every["tokenizer_config.json"].is_file()
        self.folder = folder
        self._map, self._words = files["special_tokens_map.json"], files["added_tokens.json"]
        kind = self.config.get("tokenizer_class") or files["config.json"].get("tokenizer_class")
        self.kind = str(kind or "").removesuffix("Fast")
        self.of_code = self.kind == "CodeLlamaTokenizer"
        self.rebuilt = self.of_code or self.kind == "LlamaTokenizer"  # whatever the files say of it
        self.defaults = {**_LLAMA, **(_INFILL if self.of_code else {})} if self.rebuilt else {}

    def tokens(
        self, own: Sequence[AddedToken], defaults: Mapping[str, str], rebuilt: bool = False
    ) -> tuple[list[AddedToken], dict[str, str]]:
        """The words to add after the vocabulary's own, and what names call tokens.

        `own` are those of tokenizer.json, with the ids stated there; `rebuilt`: they are not added
        yet. `defaults` are names that hold where nothing is said.
        """
        config = _with_map({**defaults, **self.config}, {})
        decoder: dict[int, AddedToken] = {}
        stated = config.get("added_tokens_decoder")
        if isinstance(stated, dict):
            decoder = {_number(key): _word(value) for key, value in stated.items()}
        else:
            config = _with_map(config, self._map)
            named_texts = {_content(config.get(key)) for key in _NAMED} | {
                _content(value) for value in _listed(config)
            }
            for text, number in self._words.items():
                known = text in named_texts
                decoder[_number(number)] = AddedToken(text, -1, known, not known)
            decoder |= {word.id: word for word in own}
        told = {word.content: word for word in decoder.values()}
        named: dict[str, AddedToken] = {}
        for key, value in config.items():
            if key.endswith("_token") and isinstance(value, (str, dict)) and _content(value):
                named[key] = told.get(_content(value)) or _word(value, special=True)
        further = config.get("extra_special_tokens")
        if isinstance(further, dict):
            named |= {str(key): _word(value, special=True) for key, value in further.items()}
        named = {key: named[key] for key in (*_NAMED, *named) if key in named}
        words = [decoder[number] for number in sorted(decoder)]
        seen = {word.content for word in (*words, *([] if rebuilt else own))}
        for word in (*named.values(), *(_word(value) for value in _listed(config))):
            if word.content not in seen:
                seen.add(word.content)
                words.append(word)
        contents = {word.content for word in named.values()}
        words = [w._replace(special=True) if w.content in contents else w for w in words]
        return words, {key: word.content for key, word in named.items()}

    def around(self, bos_id: int | None, eos_id: int | None) -> tuple[list[int], list[int]]:
        """What stands before and after a text where no file but the settings says so."""
        before = bos_id if self.config.get("add_bos_token", self.of_code) is True else None
        after = eos_id if self.config.get("add_eos_token") is True else None
        return [before] * (before is not None), [after] * (after is not None)  # type: ignore[list-item]


def _with_map(config: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with those of special_tokens_map.json, the special tokens without a name of their
    own under one key, whichever of its two names it has."""
    out = {**config, **more}
    old, new = "additional_special_tokens", "extra_special_tokens"
    if isinstance(more.get(new), list) and isinstance(config.get(new), list):
        out[new] = [*config[new], *(each for each in more[new] if each not in config[new])]
    if old in out and (new not in out or (not more and not out[new])):
        out[new] = out.pop(old)
    return out


def _listed(config: Mapping[str, Any]) -> list[Any]:
    """Special tokens that have no name of their own."""
    listed = config.get("extra_special_tokens")
    if isinstance(listed, dict):
        listed = config.get("additional_special_tokens")
    return list(listed) if isinstance(listed, list) else []


def _content(value: object) -> str:
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else ""


def _number(key: object) -> int:
    if isinstance(key, str) and key.isdigit():
        return int(key)
    if type(key) is int:
        return key
    raise ValueError(f"an added token has the id {key!r:.40}")


def _word(value: object, *, special: bool = False) -> AddedToken:
    """An added token from a text, which then is special, or from an object of the JSON files."""
    text = _content(value)
    if not text:
        raise ValueError(f"an added token is {value!r:.80}, without content")
    if not isinstance(value, dict):
        return AddedToken(text, -1, special=True)
    flags = {key: bool(value[key]) for key in _FLAGS if key in value}
    flags["special"] = special or flags.get("special", False)
    return AddedToken(text, -1, **{"normalized": not flags["special"], **flags})


class _Vocabulary:
    """Gives ids to added words, as Hugging Face's tokenizers do."""

    def __init__(self, vocab: Mapping[str, int]) -> None:
        self._vocab = vocab
        self.words: dict[str, AddedToken] = {}

    def add(self, words: Iterable[AddedToken]) -> None:
        for word in words:
            known = self.words.get(word.content)
            token = known.id if known else self._vocab.get(word.content)
            if token is None:
                top = max((each.id for each in self.words.values()), default=-1)
                token = max(top + 1, len(self._vocab))
            special = word.special or (known is not None and known.special)
            self.words[word.content] = word._replace(id=token, special=special)

    def special(self, names: Iterable[str | None]) -> None:
        """Make words special that name the begin or the end of a text."""
        for name in names:
            if name is not None and name in self.words:
                self.words[name] = self.words[name]._replace(special=True)


def _ends(words: Mapping[str, AddedToken], names: Mapping[str, str]) -> tuple[str | None, str]:
    """The words that begin and end a text: as named, or else Llama 3's, where they are."""
    bos, eos = names.get("bos_token"), names.get("eos_token")
    if bos is None and eos is None and "<|begin_of_text|>" in words:
        bos = "<|begin_of_text|>"
    if eos is None and "<|end_of_text|>" in words:
        eos = "<|end_of_text|>"
    if eos is None:
        key = "bos" if bos is None else "eos"
        raise ValueError(f"tokenizer_config.json names no {key}_token among the added tokens")
    for name in (bos, eos):
        if name is not None and name not in words:
            raise ValueError(f"{name!r:.60} is none of its added tokens")
    return bos, eos


# --- tokenizer.json -------------------------------------------------------------------------------


def _of_json(file: Path, said: _Said) -> TextTokenizer:
    spec = read_json(file, _LARGEST_FILE)
    own = _own(spec.get("added_tokens"))
    model = spec.get("model")
    if not isinstance(model, dict):
        raise ValueError("has no model")
    byte_level = is_byte_level(spec)
    if byte_level:
        check_kind(spec)
    if not isinstance(model.get("vocab"), dict):
        raise ValueError("its model has no vocab or no merges")
    rebuilt = not byte_level and said.rebuilt
    defaults = said.defaults if rebuilt else {}
    vocabulary = _Vocabulary(model["vocab"])
    vocabulary.add([] if rebuilt else own)
    moved = [w for w in own if not rebuilt and vocabulary.words[w.content].id != w.id]
    if moved:
        logger.warning(
            "%s: states the id %d for the added token %.60r, which has the id %d in transformers "
            "and here",
            file, moved[0].id, moved[0].content, vocabulary.words[moved[0].content].id,
        )  # fmt: skip
    words, names = said.tokens(own, defaults, rebuilt)
    vocabulary.add(words)
    bos, eos = _ends(vocabulary.words, names)
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
        if not _content(token) or type(number) is not int:
            raise ValueError(f"an added token is {token!r:.80}, without content or id")
        word = _word(token)._replace(id=number)
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
    kind = post.get("type")
    try:
        if kind == "ByteLevel":
            return [], []
        if kind == "Sequence":
            before: list[int] = []
            after: list[int] = []
            for each in post["processors"]:
                first, last = _around(each)
                before, after = first + before, after + last
            return before, after
        if kind in ("RobertaProcessing", "BertProcessing"):
            return [int(post["cls"][1])], [int(post["sep"][1])]
        if kind == "TemplateProcessing":
            places = [step.get("SpecialToken", {}).get("id") for step in post["single"]]
            at = next(i for i, step in enumerate(post["single"]) if "Sequence" in step)
            ids = [[] if name is None else post["special_tokens"][name]["ids"] for name in places]
            return [*chain.from_iterable(ids[:at])], [*chain.from_iterable(ids[at:])]
    except (KeyError, IndexError, TypeError, StopIteration, AttributeError, ValueError):
        raise ValueError("its post_processor is not understood") from None
    raise ValueError(f"has a post_processor of the kind {kind!r:.40}, which is not read")


def _merges(model: Mapping[str, Any]) -> Merges:
    """Pieces and merges of a BPE whose bytes are pieces; ValueError for another kind."""
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


def _rebuilt_spaces(said: _Said) -> Spaces:
    """As transformers' LlamaTokenizer writes spaces, whatever tokenizer.json says of them."""
    if said.config.get("add_prefix_space") is False:
        return Spaces("never", stripped=said.of_code)
    legacy = said.config.get("legacy") is True and not said.of_code
    return Spaces("always" if legacy else "first")


def _spaces(spec: Mapping[str, Any]) -> Spaces:
    """How a tokenizer.json writes spaces; ValueError for other ways than SentencePiece's."""
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


def _of_pieces(data: bytes, said: _Said) -> MetaspaceTokenizer:
    """SentencePiece's pieces as transformers runs them: LlamaTokenizer, or its general class."""
    pieces = pieces_of(data)
    vocab = {piece.text: token for token, piece in enumerate(pieces)}
    if len(vocab) < len(pieces):
        raise ValueError("two of its pieces have the same text")
    known = said.rebuilt
    scores = {piece.text: piece.score for piece in pieces}
    if known:
        ranks, spaces = merges_of_pieces(vocab), _rebuilt_spaces(said)
    else:
        order = {piece.text: -piece.score for piece in pieces if piece.kind == NORMAL}
        ranks = merges_of_pieces(vocab, order)
        legacy = said.config.get("legacy", True) is not False
        spaces = Spaces("always" if legacy else "first", doubled=legacy)
    own = [
        AddedToken(piece.text, token, special=piece.kind == CONTROL)
        for token, piece in enumerate(pieces)
        if piece.kind in (CONTROL, USER_DEFINED)
    ]
    control = [word.content for word in own if word.special]
    names = dict(zip(("bos_token", "eos_token"), ("<s>", "</s>"), strict=True))
    if not {*names.values()} <= {*control}:
        names = dict(zip(names, control, strict=False))
    vocabulary = _Vocabulary(vocab)
    words, names = said.tokens([], {**said.defaults, "unk_token": "<unk>", **names})
    vocabulary.add(words if known else (word._replace(normalized=False) for word in words))
    vocabulary.add(word for word in own if word.content not in vocabulary.words)
    bos, eos = _ends(vocabulary.words, names)
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


def _of_ranks(ranks: Mapping[bytes, int], said: _Said, name: str, version: Version) -> Tokenizer:
    """Llama 3's ranks, whose special tokens only the files beside them name."""
    vocab = {"".join(CHAR_OF[byte] for byte in token): rank for token, rank in ranks.items()}
    words, names = said.tokens([], {})
    stated = said.config.get("added_tokens_decoder")
    numbers = [_number(key) for key in stated] if isinstance(stated, dict) else []
    vocabulary = _Vocabulary(vocab)
    if max(numbers, default=0) >= len(ranks):
        texts = {_number(key): _content(value) for key, value in stated.items()}  # type: ignore[union-attr]
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
    bos, eos = _ends(vocabulary.words, names)
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
