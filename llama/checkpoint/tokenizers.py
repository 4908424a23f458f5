"""A tokenizer in other files: what is copied, what is written anew, and what no longer is the same.

Knows the small files of each format and no tensor. Where a folder's own files go on to a folder of
the same kind they are copied as they are, so that they say to every library what they said before;
anything else is written anew, and whatever the new files cannot say is refused or named.
"""

import json
import struct
from collections.abc import Collection, Iterator
from typing import Any

from llama.checkpoint.source import Checkpoint
from llama.files.ranks import is_sentencepiece
from llama.files.strict_json import parse_object, read_json
from llama.text.choose import choose_format, tokenizer_files
from llama.text.metaspace import MetaspaceTokenizer
from llama.text.piece_tokenizer import PieceTokenizer
from llama.text.pieces import CONTROL, UNKNOWN, pieces_of
from llama.text.sentencepiece import SentencePieceTokenizer
from llama.text.templates import TemplateFormat
from llama.text.tokenizer_json import ranks_file, tokenizer_json
from llama.tokenizer import Tokenizer
from llama.tokenizer.added import AddedToken
from llama.tokenizer.protocols import TextTokenizer

Texts = dict[str, dict[str, Any] | bytes]  # by name of file: JSON, or bytes as they are

_TEMPLATE = "chat_template.jinja"
_PROBES = ("Hello world, it's 12345!", " two  spaces\n\n\tand Zürich, 東京 🙂", "x")


def copies(checkpoint: Checkpoint, tokenizer: TextTokenizer) -> Texts:
    """The files of a Hugging Face folder's tokenizer, and its template; empty for another."""
    path = checkpoint.tokenizer_path
    if path is None or not tokenizer.stated:
        return {}
    beside = [path.with_name(name) for name in ("tokenizer.model", _TEMPLATE)]
    every = {*tokenizer_files(path), *(file for file in beside if file.is_file())}
    texts: Texts = {file.name: file.read_bytes() for file in sorted(every)}
    settings = texts.get("tokenizer_config.json", b"{}")
    assert isinstance(settings, bytes)
    said = parse_object(settings.decode()).get("chat_template")
    if checkpoint.chat_template is not None and not said:
        texts.setdefault(_TEMPLATE, checkpoint.chat_template.encode())
    return texts


def files_of(tokenizer: TextTokenizer, template: str | None, context: int) -> Texts:
    """A Hugging Face folder's files for a tokenizer that came from elsewhere."""
    settings: dict[str, Any] = {
        "tokenizer_class": "LlamaTokenizer",
        **tokenizer.names,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": context,
    }
    if template is not None:
        settings["chat_template"] = template
    texts: Texts = {}
    if isinstance(tokenizer, Tokenizer):
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        texts["tokenizer.json"] = tokenizer_json(tokenizer)
    else:
        check_around(tokenizer, "a folder with SentencePiece's tokenizer.model")
        settings |= {
            "add_bos_token": bool(tokenizer.prefix),
            "add_eos_token": bool(tokenizer.suffix),
        }
        texts["tokenizer.model"] = sentencepiece_model(tokenizer)
    texts["tokenizer_config.json"] = settings
    return texts


def as_bytes(name: str, text: dict[str, Any] | bytes) -> bytes:
    """A file of `Texts` as it is written."""
    if isinstance(text, bytes):
        return text
    indent = None if name == "tokenizer.json" else 2
    return (json.dumps(text, ensure_ascii=False, indent=indent) + "\n").encode()


def meta_file(checkpoint: Checkpoint) -> bytes | None:
    """tokenizer.model for Meta's format; None where the checkpoint has no tokenizer.

    Raises ValueError, naming the first word, where that file cannot say what the tokenizer does.
    """
    tokenizer = checkpoint.open_tokenizer()
    path = checkpoint.tokenizer_path
    if tokenizer is None:
        return None
    if path is not None and not tokenizer.stated:
        return path.read_bytes()  # Meta's already
    if tokenizer.prefix != (tokenizer.bos_id,) or tokenizer.suffix:
        raise ValueError(
            "Meta's tokenizer.model puts the begin-of-text token before every text, and nothing "
            "after it, as this model's tokenizer does not: use another format"
        )
    if isinstance(tokenizer, Tokenizer):
        return ranks_file(tokenizer)
    beside = None if path is None else path.with_name("tokenizer.model")
    if isinstance(tokenizer, MetaspaceTokenizer):
        if beside is None or not beside.is_file() or not is_sentencepiece(beside.read_bytes()):
            raise ValueError(
                "Meta's format needs SentencePiece's tokenizer.model, and this model has only a "
                "tokenizer.json: use another format"
            )
        data = beside.read_bytes()
        _check_pieces(tokenizer, data)
        return data
    return sentencepiece_model(tokenizer)


def _check_pieces(tokenizer: MetaspaceTokenizer, data: bytes) -> None:
    """ValueError where the folder's files say more than the pieces of its tokenizer.model."""
    own = dict(enumerate(pieces_of(data)))
    for word in tokenizer.added:
        piece = own.get(word.id)
        control = piece is not None and piece.type in (CONTROL, UNKNOWN)
        if piece is None or piece.text != word.content or control != word.special:
            raise ValueError(
                f"Meta's tokenizer.model cannot say that {word.content!r:.60} is the token "
                f"{word.id}, which the files beside it add: use another format"
            )


def check_around(tokenizer: TextTokenizer, format: str) -> None:
    """Raise ValueError where `format` cannot say what stands before and after a text."""
    bos, eos = (tokenizer.bos_id,), (tokenizer.eos_id,)
    if tokenizer.prefix not in ((), bos) or tokenizer.suffix not in ((), eos):
        raise ValueError(
            f"{format} can say that a text begins with {bos[0]} and ends with {eos[0]}; this "
            f"tokenizer puts {list(tokenizer.prefix)} before it and {list(tokenizer.suffix)} after"
        )


# --- SentencePiece's file -------------------------------------------------------------------------


def sentencepiece_model(tokenizer: TextTokenizer) -> bytes:
    """A serialized SentencePiece model with the pieces of a tokenizer of that kind.

    The file is a protobuf message: pieces (1), the trainer's settings (2) and the normalizer's (3).
    """
    if isinstance(tokenizer, SentencePieceTokenizer):
        return bytes(tokenizer.model.serialized_model_proto())
    if not isinstance(tokenizer, PieceTokenizer):
        raise ValueError(f"{type(tokenizer).__name__} is no tokenizer of pieces and scores")
    data = b""
    types = tokenizer.token_types
    for text, score, token_type in zip(tokenizer.pieces, tokenizer.scores, types, strict=True):
        piece = _field(1, text.encode()) + _float(2, score) + _field(3, token_type)
        data += _field(1, piece)
    unknown = next((token for token, each in enumerate(types) if each == UNKNOWN), 0)
    trainer = {3: 2, 4: tokenizer.n_words, 35: 1, 40: unknown,  # BPE, size, byte_fallback, unk
               41: tokenizer.bos_id, 42: tokenizer.eos_id, 43: -1}  # fmt: skip
    normalizer = {3: int(tokenizer.add_space_prefix), 4: 0, 5: 1}
    data += _field(2, b"".join(_field(key, value) for key, value in trainer.items()))
    named = _field(1, b"identity") + b"".join(_field(k, v) for k, v in normalizer.items())
    return data + _field(3, named)


def _field(key: int, value: int | bytes) -> bytes:
    if isinstance(value, int):
        return _varint(key << 3) + _varint(value % 2**64)
    return _varint(key << 3 | 2) + _varint(len(value)) + value


def _float(key: int, value: float) -> bytes:
    return _varint(key << 3 | 5) + struct.pack("<f", value)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes(out) + bytes([value])


# --- what became of it ----------------------------------------------------------------------------


def changes(before: Checkpoint, after: Checkpoint, tokenizer: TextTokenizer) -> Iterator[str]:
    """What another format made of a tokenizer: a sentence for each thing that is not as before."""
    became = after.open_tokenizer()
    if became is None:
        yield "the tokenizer is not written"
        return
    words, found = ({word.id: word for word in each.added} for each in (tokenizer, became))
    for token, word in words.items():
        how = _how(word, found.get(token))
        unknown = word.content == tokenizer.names.get("unk_token") and "unk_token" in became.names
        if how and not (unknown or _is_reserved(word)):
            yield f"the added token {word.content!r:.60} (id {token}) {how}"
    ours, theirs = (
        {*each.stop_tokens, *checkpoint.stop_token_ids}
        for each, checkpoint in ((tokenizer, before), (became, after))
    )
    rows = before.args.vocab_size
    lost = sorted(token for token in ours - theirs if token < rows)
    if lost:
        yield f"these tokens no longer end an answer: {', '.join(map(str, lost[:8]))}"
    for what, was, now in (
        ("what stands before a text", tokenizer.prefix, became.prefix),
        ("what stands after a text", tokenizer.suffix, became.suffix),
        ("eos_token", tokenizer.names.get("eos_token", ""), became.names.get("eos_token", "")),
    ):
        if was != now:
            yield f"{what} was {_shown(was)} and is {_shown(now)}"
    for name in sorted(tokenizer.names.keys() - {"bos_token", "eos_token"}):
        if became.names.get(name) != tokenizer.names[name]:
            yield f"{name} {tokenizer.names[name]!r:.60} is not named"
    text = _other_ids(tokenizer, became)
    if text is not None:
        yield f"texts such as {text!r:.60} have other ids"
    template = before.chat_template
    if after.chat_template != template and isinstance(
        choose_format(tokenizer, template, before.stop_token_ids), TemplateFormat
    ):
        yield "the chat template is not written"
    several = _templates(before) - _templates(after)
    if several:
        yield f"these chat templates are not written: {', '.join(sorted(several)):.200}"


def _templates(checkpoint: Checkpoint) -> set[str]:
    """The names of further chat templates that a folder has."""
    if checkpoint.path is None or not checkpoint.path.is_dir():
        return set()
    file = checkpoint.path / "tokenizer_config.json"
    said = read_json(file, 2**24).get("chat_template") if file.is_file() else None
    every = said if isinstance(said, list) else []
    names = {str(each.get("name")) for each in every if isinstance(each, dict)}
    return names - {"default"}


def _is_reserved(word: AddedToken) -> bool:
    """Whether it is a reserved token: Llama 3 and 3.1 number these differently, and no text has
    them."""
    return word.content.startswith("<|reserved_special_token_")


def _how(word: AddedToken, now: AddedToken | None) -> str:
    """How a word has changed; "" where it has not. Whether it is normalized shows in ids of
    texts."""
    if now is None or now.content != word.content:
        return "is no added token"
    if now.special != word.special:
        return "is special now" if now.special else "is not special any more"
    pairs = zip(word._fields, word, now, strict=True)
    flags = [name for name, a, b in pairs if a != b and name != "normalized"]
    return f"loses what it says of {', '.join(flags)}" if flags else ""


def _other_ids(before: TextTokenizer, after: TextTokenizer) -> str | None:
    """Find a text that the two encode differently, among a few that are tried."""
    words = [word.content for word in before.added if not word.special][:16]
    for text in (*_PROBES, *(f"a {word} b{word}c" for word in words)):
        try:
            if before.encode_plain(text, frozenset()) != after.encode_plain(text, frozenset()):
                return text
        except ValueError:  # a word that the model has no row for
            continue
    return None


def _shown(said: str | Collection[int]) -> str:
    return f"{said!r:.60}" if isinstance(said, str) else ", ".join(map(str, said)) or "nothing"
