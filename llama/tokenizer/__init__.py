"""Text to token ids and back for Llama 3 and later, and the chat format around them.

Knows ranks files, special tokens and the messages of a dialog; refuses to know models, tensors and
sampling, and other families' tokenizers, which llama/text has. What is common to them all lies
beside this page: dialogs, added words, and what every tokenizer does with them.

The surprising thing: a special token never comes out of text unless the caller allows it by name.
`<|eot_id|>` in a user's message is encoded as the ten characters it is: no text can forge the end
of a message, or another one.
"""

import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from itertools import count
from typing import Literal

import tiktoken

from llama.files.ranks import parse_ranks, read_bytes
from llama.tokenizer.added import AddedToken, Allows
from llama.tokenizer.dialog import ROLES as ROLES
from llama.tokenizer.dialog import Dialog as Dialog
from llama.tokenizer.dialog import Message as Message
from llama.tokenizer.dialog import Role as Role
from llama.tokenizer.dialog import check_dialog, check_message, has_more
from llama.tokenizer.protocols import DialogFormat, TextTokenizer, check_id, control_words

Version = Literal["3", "3.1"]

# Offsets after the last rank. The others of the 256 are reserved tokens, counted from 0.
_NAMED_SPECIAL_TOKENS: dict[Version, dict[int, str]] = {
    "3": {
        0: "<|begin_of_text|>",
        1: "<|end_of_text|>",
        6: "<|start_header_id|>",
        7: "<|end_header_id|>",
        9: "<|eot_id|>",
    },
    "3.1": {
        0: "<|begin_of_text|>",
        1: "<|end_of_text|>",
        4: "<|finetune_right_pad_id|>",
        6: "<|start_header_id|>",
        7: "<|end_header_id|>",
        8: "<|eom_id|>",
        9: "<|eot_id|>",
        10: "<|python_tag|>",
    },
}
_STOP_NAMES = ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")

# The BPE of one piece is superlinear in its length, and the pattern backtracks over runs of spaces.
# The cuts are part of the encoding (ids differ without them): they are those of Meta's code.
_MAX_CHARS = 400_000
_MAX_RUN = 25_000

# Text is split by this before pairs are merged.
_PATTERN = "|".join(
    (
        r"(?i:'(?:[sdmt]|ll|ve|re))",  # contractions, in either case
        r"[^\r\n\p{L}\p{N}]?\p{L}+",  # letters, with one space or sign before them
        r"\p{N}{1,3}",  # digits, by up to three
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",  # punctuation, with a space before and line ends after
        r"\s*[\r\n]+",  # line ends, with the white space before them
        r"\s+(?!\S)",  # white space, but for its last character where a word follows
        r"\s+",
    )
)


class Tokenizer(TextTokenizer):
    """A ranks file (tiktoken's format) and the 256 special tokens that follow its ranks.

    `version` says which names the special tokens have: "3.1" (Llama 3.1, 3.2, 3.3) adds
    finetune_right_pad_id, eom_id and python_tag and counts the reserved ones anew. Names only:
    ids, bos_id, eos_id and stop_tokens do not depend on it, for the file is the same. `encode` is
    that of every tokenizer; what is Llama 3's own is how text between added words becomes ids.
    """

    ranks: dict[bytes, int]
    version: Version
    num_reserved_special_tokens = 256
    pat_str = _PATTERN

    def __init__(self, model_path: str | os.PathLike[str], *, version: Version = "3") -> None:
        """Read `model_path`: a local path, an http(s) URL or a bucket that blobfile opens.

        Raises FileNotFoundError naming the path, and ValueError naming file, line and cause where
        the file is not a ranks file.
        """
        if version not in _NAMED_SPECIAL_TOKENS:
            known = ", ".join(repr(name) for name in _NAMED_SPECIAL_TOKENS)
            raise ValueError(f"unknown tokenizer version {version!r}: use one of {known}")
        path = os.fspath(model_path)
        ranks = parse_ranks(read_bytes(path), path)
        special = llama3_special_tokens(len(ranks), version)
        added = [AddedToken(name, token, special=True) for name, token in special.items()]
        names = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}
        bos, eos = names.values()
        self._set_up(ranks, added, os.path.basename(path), version, bos, eos, names)

    @classmethod
    def from_ranks(
        cls,
        ranks: Mapping[bytes, int],
        special_tokens: Mapping[str, int],
        *,
        name: str = "ranks",
        bos: str | None = "<|begin_of_text|>",
        eos: str = "<|end_of_text|>",
        stop_tokens: Collection[int] | None = None,
        words: Iterable[AddedToken] = (),
        names: Mapping[str, str] | None = None,
        prefix: Sequence[int] | None = None,
        suffix: Sequence[int] = (),
    ) -> "Tokenizer":
        """A tokenizer of ranks and special tokens that lie in another file than Meta's, `name`.

        `bos` and `eos` are names among `special_tokens`; `stop_tokens` None: those of Llama 3 that
        are there. `words` are added words that are not special, or have other ways than the special
        ones; `names` what templates call tokens; `prefix` and `suffix` what stands before and after
        a text, by default bos and nothing. A rank is a token's id, and an added word may be one of
        the ranks. Raises ValueError where two tokens have the same id, where a single byte has no
        rank, or a name is missing.
        """
        given = [AddedToken(text, token, special=True) for text, token in special_tokens.items()]
        added = {word.content: word for word in (*given, *words)}
        if b"" in ranks or "" in added:
            raise ValueError(f"{name}: a token is empty")
        own = {word.id: word.content for word in added.values()}
        twice = len(own) < len(added) or len({*ranks.values()}) < len(ranks)
        if twice or any(type(token) is not int or token < 0 for token in own):
            count = len({*ranks.values(), *own})
            raise ValueError(
                f"{name}: its tokens do not have the ids 0 to {count - 1} and more, each its own"
            )
        lacking = next((byte for byte in range(256) if bytes([byte]) not in ranks), None)
        if lacking is not None:
            raise ValueError(f"{name}: no token is the single byte 0x{lacking:02x}")
        for word in (bos, eos):
            if word is not None and word not in special_tokens:
                raise ValueError(f"{name}: {word!r:.60} is none of its special tokens")
        self = cls.__new__(cls)
        version: Version = "3.1" if "<|eom_id|>" in special_tokens else "3"
        said = {"bos_token": bos, "eos_token": eos} if names is None else names
        told = {key: word for key, word in said.items() if word is not None}
        self._set_up(dict(ranks), added.values(), name, version, bos, eos, told, stop_tokens)
        self.prefix = self.prefix if prefix is None else tuple(prefix)
        self.suffix = tuple(suffix)
        return self

    def _set_up(
        self,
        ranks: dict[bytes, int],
        added: Collection[AddedToken],
        name: str,
        version: Version,
        bos: str | None,
        eos: str,
        names: Mapping[str, str],
        stop_tokens: Collection[int] | None = None,
    ) -> None:
        self.version = version
        self.ranks = ranks
        ids = {*ranks.values()}
        self.model = tiktoken.Encoding(
            name=name,
            pat_str=self.pat_str,
            mergeable_ranks=ranks,
            special_tokens={word.content: word.id for word in added if word.id not in ids},
        )
        self._learn(added, names, self.model.n_vocab)
        self._gaps = {*range(self.n_words)} - ids - {word.id for word in added}  # of no token
        # tiktoken finds special tokens itself, but no other words, and none that are ranks as well
        plain = all(word == AddedToken(*word[:2], special=True) for word in added)
        self._has_words = not plain or any(word.id in ids for word in added)
        same = (word for word in added if ranks.get(word.content.encode()) == word.id)
        self._ranked = {word.content: word for word in same}  # also made from their letters
        self.eos_id: int = self.special_tokens[eos]
        self.bos_id: int = self.eos_id if bos is None else self.special_tokens[bos]
        self.prefix = () if bos is None else (self.bos_id,)
        self.suffix = ()
        self.stop_tokens: set[int] = (
            _stops(self.special_tokens) | {self.eos_id} if stop_tokens is None else {*stop_tokens}
        )

    def _encode(
        self,
        s: str,
        allowed: AbstractSet[str],
        barred: AbstractSet[str],
        allows: Allows | None = None,
    ) -> list[int]:
        if self._has_words or allows is not None:
            return super()._encode(s, allowed, barred, allows)
        ids: list[int] = []
        for piece in _pieces(s):
            ids += self.model.encode(piece, allowed_special=allowed, disallowed_special=())
        return ids

    def _encode_part(self, text: str, *, begins: bool, hidden: AbstractSet[str]) -> list[int]:
        hidden_ids = {word.id for name, word in self._ranked.items() if name in hidden}
        ids: list[int] = []
        for piece in _pieces(text):
            more = self.model.encode(piece, disallowed_special=())
            ids += more if hidden_ids.isdisjoint(more) else self._opened(more, hidden_ids)
        return ids

    def _opened(self, ids: Iterable[int], hidden: AbstractSet[int]) -> Iterator[int]:
        """Replace the tokens that must not come out of text by smaller ones of the same bytes."""
        for token in ids:
            if token not in hidden:
                yield token
                continue
            data = self.model.decode_single_token_bytes(token)
            cuts = range(len(data) - 1, 0, -1)
            pairs = ((self.ranks.get(data[:cut]), self.ranks.get(data[cut:])) for cut in cuts)
            whole = [pair for pair in pairs if None not in pair and hidden.isdisjoint(pair)]
            yield from whole[0] if whole else (self.ranks[bytes([byte])] for byte in data)  # type: ignore[misc]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`: special tokens as their names, invalid UTF-8 as U+FFFD.

        Ids without a token have no text, such as rows of the model that are padding. Raises
        ValueError for an id outside of both, pad_id among them.
        """
        every = max(self.n_words, self.rows)
        known = [i for token in ids if (i := check_id(token, every)) < self.n_words]
        if self._gaps:
            known = [i for i in known if i not in self._gaps]
        return self.model.decode(known)

    def token_bytes(self, token: int) -> bytes:
        """The bytes that one id stands for; a character may need those of several ids."""
        index = check_id(token, max(self.n_words, self.rows))
        if index >= self.n_words or index in self._gaps:
            return b""
        return self.model.decode_single_token_bytes(index)


class ChatFormat:
    """Dialogs to ids, as Llama 3 Instruct and later were trained on them.

    Roles are system, user and assistant; from 3.1 on also ipython, whose messages are what a tool
    answered, and its other name tool. The text of a message never becomes a control word: neither a
    special token nor an added word that ends a message. A message with other keys than role and
    content is for `template`, where the model has one that says the same of all others.
    """

    def __init__(self, tokenizer: Tokenizer, template: DialogFormat | None = None) -> None:
        self.tokenizer = tokenizer
        self.template = template
        self.roles = ROLES[tokenizer.version]
        self._control = control_words(tokenizer)

    def encode_content(self, text: str) -> list[int]:
        """Ids of the text of a message, or of a part of it."""
        return self.tokenizer.encode_plain(text, self._control)

    def encode_header(self, message: Message) -> list[int]:
        """Ids that say whose message follows; its content is not looked at."""
        check_message(message, self.roles, "role")
        special = self.tokenizer.special_tokens
        role = "ipython" if message["role"] == "tool" else message["role"]
        return [
            special["<|start_header_id|>"],
            *self.tokenizer.encode(role, bos=False, eos=False),
            special["<|end_header_id|>"],
            *self.tokenizer.encode("\n\n", bos=False, eos=False),
        ]

    def encode_message(self, message: Message) -> list[int]:
        """Ids of a whole message: its header, its content without the space around it, its end."""
        check_message(message, self.roles, "role", "content")
        return [
            *self.encode_header(message),
            *self.encode_content(message["content"].strip()),
            self.tokenizer.special_tokens["<|eot_id|>"],
        ]

    def encode_dialog_prompt(self, dialog: Dialog) -> list[int]:
        """Ids of the whole dialog, then the open header of the assistant's answer.

        Raises ValueError naming the index of the message that is wrong, before anything is encoded.
        """
        if self.template is not None and has_more(dialog):
            return self.template.encode_dialog_prompt(dialog)
        check_dialog(dialog, self.roles)
        ids = [*self.tokenizer.prefix]
        for message in dialog:
            ids += self.encode_message(message)
        return ids + self.encode_header({"role": "assistant", "content": ""})


def llama3_special_tokens(n_ranks: int, version: Version) -> dict[str, int]:
    """The 256 names of Meta's special tokens, each with its id after `n_ranks` ranks."""
    named, reserved = _NAMED_SPECIAL_TOKENS[version], count()
    names = [
        named.get(offset) or f"<|reserved_special_token_{next(reserved)}|>"
        for offset in range(Tokenizer.num_reserved_special_tokens)
    ]
    return {name: n_ranks + offset for offset, name in enumerate(names)}


def _stops(special_tokens: Mapping[str, int]) -> set[int]:
    """The tokens that end an answer of Llama 3 and later. 3.1's eom, which is the token before eot,
    is a reserved one in 3."""
    stops = {special_tokens[name] for name in _STOP_NAMES if name in special_tokens}
    before = special_tokens.get("<|eot_id|>", 0) - 1
    reserved = {i for name, i in special_tokens.items() if name.startswith("<|reserved_special")}
    return stops | ({before} & reserved)


def _pieces(s: str, max_chars: int = _MAX_CHARS, max_run: int = _MAX_RUN) -> Iterator[str]:
    """`s` in the parts that are encoded each on its own; joined they are `s` again.

    Parts end at every `max_chars` characters, and inside of those at every `max_run` characters of
    a run of white space, or of anything but white space.
    """
    for start in range(0, len(s), max_chars):
        block = s[start : start + max_chars]
        cut = 0
        if len(block) > max_run:
            for stretch in re.finditer(r"\s+|\S+", block):
                for end in range(stretch.start() + max_run, stretch.end(), max_run):
                    yield block[cut:end]
                    cut = end
        yield block[cut:]
