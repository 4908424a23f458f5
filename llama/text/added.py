"""Words added to a vocabulary: which they are, and where they stand in a text.

Finds them as Hugging Face's tokenizers do: first the words as they are, then, in what is left, the
normalized ones; of several that begin at one place, the longest. Knows no vocabulary and no file.
The surprising thing: an added word is no special token. A special one never comes out of text
unless the caller allows it; any other added word is its own token wherever it stands.
"""

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from typing import Literal, NamedTuple

import regex  # type: ignore[import-untyped]


class AddedToken(NamedTuple):
    """A word of a vocabulary that is found in text before anything else is done to the text."""

    content: str
    id: int
    special: bool = False  # a control word: not found in text, unless allowed by name
    normalized: bool = False  # found after the text was normalized
    lstrip: bool = False  # takes the white space before it along
    rstrip: bool = False  # takes the white space after it along
    single_word: bool = False  # not found as a part of a longer word


class Part(NamedTuple):
    """A piece of a text: a word, or what stands between words."""

    start: int  # in the text that was given
    text: str  # normalized, where the text was
    word: AddedToken | None


# Whether a word that stands from the first to the second place of a text may be found there.
Allows = Callable[[AddedToken, int, int], bool]

_WORD = r"[\p{Alphabetic}\p{M}\p{Nd}\p{Pc}\p{Join_Control}]"
_WORD_BEFORE = regex.compile(rf"(?<={_WORD})")
_WORD_AFTER = regex.compile(_WORD)
_SPACE_BEFORE = regex.compile(r"(?r)\p{White_Space}*")
_SPACE_AFTER = regex.compile(r"\p{White_Space}*")


class AddedWords:
    """A set of added words that are looked for together; falsy where it is empty.

    `normalize` is what is done to a text before normalized words are looked for in it: it may put
    characters before the text, and otherwise keeps every character's place.
    """

    def __init__(
        self, words: Iterable[AddedToken], normalize: Callable[[str], str] | None = None
    ) -> None:
        every = [word for word in words if word.content]
        self._normalize = normalize or str
        late = {self._normalize(word.content): word for word in every if word.normalized}
        self._stages = [
            (stage, one_of(stage))
            for stage in ({word.content: word for word in every if not word.normalized}, late)
        ]
        self._empty = not every

    def __bool__(self) -> bool:
        return not self._empty

    def split(self, text: str, allows: Allows | None = None) -> Iterator[Part]:
        """The words of a text and what stands between them, in order, and none of it empty."""
        for part in self._found(text, 0, 0, allows):
            if part.word is not None:
                yield part
                continue
            whole = self._normalize(part.text)
            yield from self._found(whole, 1, part.start - len(whole) + len(part.text), allows)

    def _found(self, text: str, stage: int, base: int, allows: Allows | None) -> Iterator[Part]:
        """`split` for the words of one stage; `base` is where `text` stands in the whole."""
        done = 0
        for word, start, stop in self._matches(text, stage, base, allows):
            within = _WORD_BEFORE.match(text, start) or _WORD_AFTER.match(text, stop)
            if word.single_word and within:
                continue
            if word.lstrip:
                start = max(done, _SPACE_BEFORE.match(text, 0, start).start())
            if word.rstrip:
                stop = _SPACE_AFTER.match(text, stop).end()
            if done < start:
                yield Part(max(0, base + done), text[done:start], None)
            if start < stop:
                yield Part(base + start, text[start:stop], word)
            done = stop
        if done < len(text):
            yield Part(max(0, base + done), text[done:], None)

    def _matches(
        self, text: str, stage: int, base: int, allows: Allows | None
    ) -> Iterator[tuple[AddedToken, int, int]]:
        words, pattern = self._stages[stage]
        at = 0
        while pattern is not None and (found := pattern.search(text, at)) is not None:
            start = at = found.start()
            at += 1
            for stop in range(found.end(), start, -1):  # a longest word that may not stand here
                word = words.get(text[start:stop])  # leaves the place to a shorter one
                if word is not None and (allows is None or allows(word, base + start, base + stop)):
                    yield word, start, stop
                    at = stop
                    break


class HasAddedWords:
    """What a tokenizer knows of its added words, and of what stands before and after a text."""

    added: tuple[AddedToken, ...]  # special ones and others, by id
    special_tokens: dict[str, int]  # the special ones
    names: dict[str, str]  # bos_token, eos_token, pad_token, ...: what templates call tokens
    prefix: tuple[int, ...]  # ids before a text
    suffix: tuple[int, ...]  # ids after a text; the end of a text may be asked for where it is none
    n_words: int
    rows: int  # of the model's embedding, where that is known: ids below it may be decoded
    stated: bool = False  # whether the files say which added word has which id
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

    stop_tokens: set[int]

    def _words(
        self, allowed: AbstractSet[str], barred: AbstractSet[str] = frozenset()
    ) -> AddedWords:
        """What is looked for in a text: words that are not special and not barred, and allowed
        ones."""
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

    def encode_rendered(self, s: str, control: AbstractSet[str], allows: Allows) -> list[int]:
        """Ids of what a template wrote: of the `control` words those that `allows` takes are found,
        and every other added word that is not special."""
        return self._check_rows(self._mixed(s, control, control, allows))

    def _mixed(
        self,
        s: str,
        allowed: AbstractSet[str],
        barred: AbstractSet[str],
        allows: Allows | None = None,
    ) -> list[int]:
        raise NotImplementedError

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


def check_disallowed(
    s: str, special_tokens: Collection[str], allowed: AbstractSet[str],
    disallowed: Literal["all"] | Collection[str],
) -> None:  # fmt: skip
    """ValueError where a text has a special token that is disallowed in it."""
    names = set(special_tokens) - allowed if disallowed == "all" else set(disallowed)
    for name in names:
        if name in s:
            raise ValueError(f"the text has the special token {name!r}, which is disallowed")


def one_of(texts: Iterable[str]) -> re.Pattern[str] | None:
    """A pattern of these texts, of several that begin at one place the longest; None for none.

    It is a tree of their beginnings, so that thousands of texts are looked for as fast as a few.
    """
    tree: dict[str, dict] = {}  # type: ignore[type-arg]
    for text in texts:
        node = tree
        for letter in text:
            node = node.setdefault(letter, {})
        node[""] = {}  # a text ends here
    return re.compile(_branches(tree)) if tree else None


def _branches(tree: dict[str, dict]) -> str:  # type: ignore[type-arg]
    rest = []
    for letter, node in tree.items():
        if letter:
            run = letter
            while len(node) == 1 and "" not in node:
                letter, node = next(iter(node.items()))
                run += letter
            rest.append(re.escape(run) + _branches(node))
    if not rest:
        return ""
    inner = rest[0] if len(rest) == 1 and "" not in tree else f"(?:{'|'.join(rest)})"
    return f"{inner}?" if "" in tree else inner
