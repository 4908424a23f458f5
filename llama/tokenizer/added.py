"""Words added to a vocabulary: which they are, and where they stand in a text.

Finds them as Hugging Face's tokenizers do: first the words as they are, then, in what is left, the
normalized ones; of several that begin at one position, the longest. Knows no vocabulary and no
file. The surprising thing: an added word is no special token. A special one never comes out of text
unless the caller allows it; any other added word is its own token wherever it stands.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import regex


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
    word: AddedToken | None  # None: what stands between words


# Whether a word may be found from the first to the second position of a text.
Allows = Callable[[AddedToken, int, int], bool]

_WORD = r"[\p{Alphabetic}\p{M}\p{Nd}\p{Pc}\p{Join_Control}]"
_WORD_BEFORE = regex.compile(rf"(?<={_WORD})")
_WORD_AFTER = regex.compile(_WORD)
_SPACE_BEFORE = regex.compile(r"(?r)\p{White_Space}*")
_SPACE_AFTER = regex.compile(r"\p{White_Space}*")


class AddedWords:
    """A set of added words that are looked for together; falsy where it is empty.

    `normalize` is what is done to a text before normalized words are looked for in it: it may put
    characters before the text, and otherwise keeps every character's position.
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
        """Yield the words of a text and what stands between them, in order, and none of it
        empty."""
        for part in self._found(text, 0, 0, allows):
            if part.word is not None:
                yield part
                continue
            whole = self._normalize(part.text)
            yield from self._found(whole, 1, part.start - len(whole) + len(part.text), allows)

    def _found(self, text: str, stage: int, base: int, allows: Allows | None) -> Iterator[Part]:
        """Split by the words of one stage; `base` is the position of `text` in the whole."""
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
                word = words.get(text[start:stop])  # gives way to a shorter one
                if word is not None and (allows is None or allows(word, base + start, base + stop)):
                    yield word, start, stop
                    at = stop
                    break


def one_of(texts: Iterable[str]) -> re.Pattern[str] | None:
    """A pattern of these texts, which finds the longest of several that begin at one position; None
    where there are none.

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
    """The pattern of a tree: letters with one way on are joined, others become alternatives."""
    rest = []
    for letter, node in tree.items():
        if letter:
            prefix = letter
            while len(node) == 1 and "" not in node:
                letter, node = next(iter(node.items()))
                prefix += letter
            rest.append(re.escape(prefix) + _branches(node))
    if not rest:
        return ""
    inner = rest[0] if len(rest) == 1 and "" not in tree else f"(?:{'|'.join(rest)})"
    return f"{inner}?" if "" in tree else inner
