"""What every tokenizer and every chat format can do, whatever file they come from.

Knows text, ids and added words; refuses to know files, vocabularies and how plain text is encoded,
which each tokenizer does in its own way.
"""

import operator
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping
from collections.abc import Set as AbstractSet
from typing import Literal, Protocol

from llama.tokenizer.added import AddedToken, AddedWords, Allows
from llama.tokenizer.dialog import Dialog


class TextTokenizer(ABC):
    """Text to ids and back. Subclasses encode and decode what stands between added words."""

    added: tuple[AddedToken, ...]  # special ones and others, by id
    special_tokens: dict[str, int]  # the special ones
    names: dict[str, str]  # bos_token, eos_token, pad_token, ...: what templates call tokens
    prefix: tuple[int, ...]  # ids before a text
    suffix: tuple[int, ...]  # ids after a text; the end of a text may be asked for where it is none
    n_words: int  # one more than the highest id
    rows: int  # of the model's embedding, where that is known: ids below it may be decoded
    stated: bool = False  # whether the files say which added word has which id
    bos_id: int
    eos_id: int
    pad_id: int = -1
    stop_tokens: set[int]
    _cached: dict[tuple[frozenset[str], frozenset[str]], AddedWords]

    def _learn(self, added: Iterable[AddedToken], names: Mapping[str, str], n_words: int) -> None:
        self.added = tuple(sorted(added, key=lambda word: word.id))
        self.special_tokens = {word.content: word.id for word in self.added if word.special}
        self.names = dict(names)
        self.n_words = self.rows = n_words
        self._cached = {}

    def limit(self, rows: int) -> None:
        """Tell how many rows the model's embedding has.

        Rows without a token have no text. A token without a row cannot be used: a text that has it
        is refused.
        """
        self.rows = rows
        self.stop_tokens = {token for token in self.stop_tokens if token < rows}

    # ---- text to ids

    def encode(
        self,
        s: str,
        *,
        bos: bool,
        eos: bool,
        allowed_special: Literal["all"] | AbstractSet[str] = frozenset(),
        disallowed_special: Literal["all"] | Collection[str] = (),
    ) -> list[int]:
        """Ids of `s`; where asked for, with what the tokenizer puts before it (bos_id, or nothing
        where its files say so), and with eos_id after it.

        Names in `allowed_special` ("all" for all) become special tokens where `s` has them; names
        in `disallowed_special` raise ValueError where `s` has them; any other is plain text. Added
        words that are not special are their own tokens wherever `s` has them.
        """
        allowed = _allowed(s, self.special_tokens, allowed_special)
        _check_disallowed(s, self.special_tokens, allowed, disallowed_special)
        ids = [*self.prefix] if bos else []
        ids += self._encode(s, allowed, frozenset())
        if eos:
            ids += self.suffix or (self.eos_id,)
        return self._check_rows(ids)

    def encode_plain(self, s: str, barred: AbstractSet[str]) -> list[int]:
        """Ids of `s` alone, in which neither special tokens nor the `barred` words are found."""
        _check_text(s)
        return self._check_rows(self._encode(s, frozenset(), barred))

    def encode_rendered(self, s: str, control: AbstractSet[str], allows: Allows) -> list[int]:
        """Ids of what a template wrote: of the `control` words those that `allows` takes are found,
        and every other added word that is not special."""
        return self._check_rows(self._encode(s, control, control, allows))

    def _encode(
        self,
        s: str,
        allowed: AbstractSet[str],
        barred: AbstractSet[str],
        allows: Allows | None = None,
    ) -> list[int]:
        """Ids of a text with added words among the rest of it."""
        hidden = barred | (self.special_tokens.keys() - allowed)
        ids: list[int] = []
        for part in self._words(allowed, barred).split(s, allows):
            if part.word is not None:
                ids.append(part.word.id)
            else:  # halves of a pair of surrogates become one character, lone ones U+FFFD
                whole = part.text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
                ids += self._encode_part(whole, begins=part.start == 0, hidden=hidden)
        return ids

    @abstractmethod
    def _encode_part(self, text: str, *, begins: bool, hidden: AbstractSet[str]) -> list[int]:
        """Ids of text between added words, of which no `hidden` word is one; `begins` says whether
        it begins the whole text."""

    def _words(
        self, allowed: AbstractSet[str], barred: AbstractSet[str] = frozenset()
    ) -> AddedWords:
        """The words that are looked for in a text: allowed ones, and those that are neither special
        nor barred."""
        key = frozenset(allowed), frozenset(barred)
        if key not in self._cached:
            if len(self._cached) > 8:
                self._cached.clear()
            self._cached[key] = AddedWords(
                (
                    word
                    for word in self.added
                    if word.content in allowed or not (word.special or word.content in barred)
                ),
                self._normalized,
            )
        return self._cached[key]

    def _normalized(self, text: str) -> str:
        """What is done to a text before normalized words are looked for."""
        return text

    def _check_rows(self, ids: list[int]) -> list[int]:
        """`ids`; ValueError where the model has no row for one of them."""
        if self.rows < self.n_words:
            over = next((token for token in ids if token >= self.rows), None)
            if over is not None:
                name = next((word.content for word in self.added if word.id == over), "")
                raise ValueError(
                    f"the text has the token {name!r:.60}, whose id is {over}, and the model has "
                    f"{self.rows} rows only: it cannot be used"
                )
        return ids

    # ---- ids to text

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`, invalid UTF-8 as U+FFFD.

        Ids without a token have no text, such as rows of the model that are padding. Raises
        ValueError for an id outside the vocabulary and the rows of the model, pad_id among them.
        """

    @abstractmethod
    def token_bytes(self, token: int) -> bytes:
        """The bytes that one id stands for inside a text; a character may need those of several
        ids, and a row of the model that no token has, see `spare_rows`, has none."""

    def first_bytes(self, token: int) -> bytes:
        """The bytes of an id that begins a text."""
        return self.token_bytes(token)


class DialogFormat(Protocol):
    """Dialogs to ids, as a model was trained on them."""

    @property
    def tokenizer(self) -> TextTokenizer: ...

    def encode_dialog_prompt(self, dialog: Dialog) -> list[int]: ...

    def encode_content(self, text: str) -> list[int]: ...


def control_words(tokenizer: TextTokenizer) -> frozenset[str]:
    """Added words that end a text or a message or have a name, special or not."""
    named = {*tokenizer.names.values()}
    ends = {*tokenizer.stop_tokens, tokenizer.eos_id, tokenizer.bos_id}
    return frozenset(w.content for w in tokenizer.added if w.id in ends or w.content in named)


def spare_rows(n_words: int) -> int:
    """How many rows a model may have beyond its tokenizer's tokens: 1024, or a 64th.

    They are padding, up to a multiple that a device likes or that many GPUs can share, or were kept
    for tokens to come. Nothing ever chooses them.
    """
    return max(1024, n_words // 64)


def check_id(token: int, n_words: int) -> int:
    """`token` as an int; ValueError where it is an id neither of a vocabulary of `n_words` nor of
    the rows that a model may have beyond it."""
    try:
        index = operator.index(token)
    except TypeError:
        raise ValueError(
            f"a token id is an integer, got {token!r} of type {type(token).__name__}"
        ) from None
    if not 0 <= index < n_words + spare_rows(n_words):
        pad = " (-1 is padding and has no text)" if index == -1 else ""
        raise ValueError(f"token id {index} is outside the vocabulary, 0 to {n_words - 1}{pad}")
    return index


# ---- arguments of encode


def _check_text(s: object) -> None:
    if not isinstance(s, str):
        raise ValueError(f"encode takes one str, got {type(s).__name__}")


def _allowed(
    s: object, special_tokens: Mapping[str, int], allowed: Literal["all"] | AbstractSet[str]
) -> AbstractSet[str]:
    """The names of special tokens that are allowed in `s`; ValueError for what does not work."""
    _check_text(s)
    if allowed == "all":
        return set(special_tokens)
    if isinstance(allowed, str):
        raise ValueError(f"allowed_special is 'all' or a set of names, got {allowed!r}")
    unknown = sorted(set(allowed) - special_tokens.keys())
    if unknown:
        raise ValueError(
            f"allowed_special names {unknown}, which this tokenizer does not have: "
            "the names that work are the keys of special_tokens"
        )
    return set(allowed)


def _check_disallowed(
    s: str,
    special_tokens: Collection[str],
    allowed: AbstractSet[str],
    disallowed: Literal["all"] | Collection[str],
) -> None:
    """ValueError where a text has a special token that is disallowed in it."""
    if isinstance(disallowed, str) and disallowed != "all":
        raise ValueError(
            f"disallowed_special is 'all' or a collection of names, got {disallowed!r}"
        )
    names = set(special_tokens) - allowed if disallowed == "all" else set(disallowed)
    for name in names:
        if name in s:
            raise ValueError(f"the text has the special token {name!r}, which is disallowed")
