"""What a Hugging Face folder says of its tokenizer beside the vocabulary: added words and names.

Reads tokenizer_config.json, added_tokens.json and special_tokens_map.json, and gives the words that
they add the ids that transformers gives them. Knows no vocabulary of its own and no way to encode.
The surprising thing: ids that the files state for added words count for nothing there. A word has
the id that the vocabulary gives it, or else the next that is free.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llama.files.strict_json import read_json
from llama.tokenizer.added import AddedToken

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


class Settings:
    """What the files beside the vocabulary say."""

    def __init__(self, folder: Path) -> None:
        every = {name: folder / name for name in (*BESIDE, "config.json")}
        files = {name: read_json(file, 2**24) if file.is_file() else {} for name, file in
                 every.items()}  # fmt: skip
        self.config = dict(files["tokenizer_config.json"])
        self.there = every["tokenizer_config.json"].is_file()
        self.folder = folder
        self._map, self._words = files["special_tokens_map.json"], files["added_tokens.json"]
        named = self.config.get("tokenizer_class") or files["config.json"].get("tokenizer_class")
        tokenizer_class = str(named or "").removesuffix("Fast")
        self.of_code = tokenizer_class == "CodeLlamaTokenizer"
        # transformers builds these two classes anew, whatever tokenizer.json says of them
        self.rebuilt = self.of_code or tokenizer_class == "LlamaTokenizer"
        self.defaults = {**_LLAMA, **(_INFILL if self.of_code else {})} if self.rebuilt else {}

    def words(
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
            decoder = {id_of(key): added_token(value) for key, value in stated.items()}
        else:
            config = _with_map(config, self._map)
            named_texts = {content_of(config.get(key)) for key in _NAMED} | {
                content_of(value) for value in _listed(config)
            }
            for text, number in self._words.items():
                known = text in named_texts
                decoder[id_of(number)] = AddedToken(text, -1, known, not known)
            decoder |= {word.id: word for word in own}
        told = {word.content: word for word in decoder.values()}
        named: dict[str, AddedToken] = {}
        for key, value in config.items():
            if key.endswith("_token") and isinstance(value, (str, dict)) and content_of(value):
                named[key] = told.get(content_of(value)) or added_token(value, special=True)
        further = config.get("extra_special_tokens")
        if isinstance(further, dict):
            named |= {str(key): added_token(value, special=True) for key, value in further.items()}
        named = {key: named[key] for key in (*_NAMED, *named) if key in named}
        words = [decoder[number] for number in sorted(decoder)]
        seen = {word.content for word in (*words, *([] if rebuilt else own))}
        for word in (*named.values(), *(added_token(value) for value in _listed(config))):
            if word.content not in seen:
                seen.add(word.content)
                words.append(word)
        contents = {word.content for word in named.values()}
        words = [w._replace(special=True) if w.content in contents else w for w in words]
        return words, {key: word.content for key, word in named.items()}

    def around(self, bos_id: int | None, eos_id: int | None) -> tuple[list[int], list[int]]:
        """The ids before and after a text where no file but the settings says so."""
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


def content_of(value: object) -> str:
    """The text of an added token, given as a text or as an object; "" for anything else."""
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else ""


def id_of(key: object) -> int:
    """An id that a JSON file states, perhaps as a key, which is a text."""
    if isinstance(key, str) and key.isdigit():
        return int(key)
    if type(key) is int:
        return key
    raise ValueError(f"an added token has the id {key!r:.40}")


def added_token(value: object, *, special: bool = False) -> AddedToken:
    """An added token from a text, which then is special, or from an object of the JSON files."""
    text = content_of(value)
    if not text:
        raise ValueError(f"an added token is {value!r:.80}, without content")
    if not isinstance(value, dict):
        return AddedToken(text, -1, special=True)
    flags = {key: bool(value[key]) for key in _FLAGS if key in value}
    flags["special"] = special or flags.get("special", False)
    return AddedToken(text, -1, **{"normalized": not flags["special"], **flags})


class Vocabulary:
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
        """Make those words special that begin or end a text."""
        for name in names:
            if name is not None and name in self.words:
                self.words[name] = self.words[name]._replace(special=True)


def text_ends(words: Mapping[str, AddedToken], names: Mapping[str, str]) -> tuple[str | None, str]:
    """The words that begin and end a text: as named, or else Llama 3's, where they are among
    `words`. Raises ValueError where there is no end."""
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
