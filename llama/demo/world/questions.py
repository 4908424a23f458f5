"""Single exchanges of the little world, one function a kind: what is asked, and what the answer is.

It refuses to know dialogues, styles and tokens. The surprising thing: every exchange carries
`held`, which says whether it belongs to the held-out set. This is decided by the exchange itself
(its phrasing, its operands or words, or else a checksum of its normalised text), never by the
generator's luck: so the split is the same for every seed, and the two sides cannot meet.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from random import Random

from llama.demo.world import words
from llama.demo.world.haiku import THEMES, compose
from llama.demo.world.phrasings import BYES, CLOSERS, GREETINGS, HOW, OPENERS, PHRASINGS, THANKS, TO


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """One question and its one right answer; `short` is the answer in a word, if there is one."""

    kind: str
    ask: str
    answer: str
    held: bool
    short: str = ""
    themes: tuple[str, ...] = ()
    follow: str = ""  # what the question was about, for "And Japan?"


_SIGNS = {"+": "plus", "-": "minus", "−": "minus", "*": "times", "×": "times"}


def normalise(text: str) -> str:
    """Lower case, no white space, no punctuation; an operator between numbers is a word."""
    text = text.lower().replace("color", "colour")
    text = re.sub(r"(?<=\d)\s*([-+−*×])\s*(?=\d)", lambda sign: _SIGNS[sign[1]], text)
    return re.sub(r"[\W_]+", "", text)


def checksum_held(*texts: str, one_in: int = 8) -> bool:
    """Whether this combination is held out: by a checksum of what it says."""
    key = "|".join(normalise(text) for text in texts)
    return zlib.crc32(key.encode()) % one_in == 0


def capitalised(text: str) -> str:
    return text[:1].upper() + text[1:]


def phrase(rng: Random, name: str, *, frame: bool = True, **slots: object) -> tuple[str, bool]:
    """A question in one of the phrasings of `name`, and whether it is held out by its wording."""
    common, held_out = PHRASINGS[name]
    is_held = rng.random() < 0.15
    text = capitalised(rng.choice(held_out if is_held else common).format(**slots))
    if rng.random() < 0.07:
        text = text.lower().rstrip(".?")
    elif frame and rng.random() < 0.3:
        text = rng.choice(OPENERS) + text + rng.choice(CLOSERS)
    return text, is_held or checksum_held(text)


def capital(rng: Random) -> Exchange:
    country = rng.choice(list(words.CAPITALS))
    city = words.CAPITALS[country]
    if rng.random() < 0.25:
        ask, held = phrase(rng, "country", city=city)
        answer = f"{city} is the capital of {country}."
        return Exchange(kind="capitals", ask=ask, answer=answer, short=country, held=held)
    ask, held = phrase(rng, "capital", country=country)
    answer = f"The capital of {country} is {city}."
    return Exchange(
        kind="capitals", ask=ask, answer=answer, short=city, held=held, follow="capital"
    )


def opposite(rng: Random) -> Exchange:
    word = rng.choice(list(words.OPPOSITES))
    ask, held = phrase(rng, "opposite", word=word)
    other = words.OPPOSITES[word]
    answer = f"The opposite of {word} is {other}."
    return Exchange(
        kind="opposites", ask=ask, answer=answer, short=other, held=held, follow="opposite"
    )


def sum_held(a: int, sign: str, b: int) -> bool:
    """Pairs of operands that are only in the held-out set; of a + b and b + a always both."""
    if sign == "+":
        a, b = sorted((a, b))
    return zlib.crc32(f"{a}{sign}{b}".encode()) % 8 == 0


def draw_sum(rng: Random) -> tuple[int, str, int, int]:
    sign = rng.choice("++--*")
    if sign == "*":
        a, b = rng.randint(0, 12), rng.randint(0, 12)
        return a, sign, b, a * b
    small = rng.random() < 0.35
    a, b = rng.randint(0, 12 if small else 60), rng.randint(0, 12 if small else 40)
    if sign == "-":
        return max(a, b), sign, min(a, b), abs(a - b)
    return a, sign, b, a + b


def arithmetic(rng: Random) -> Exchange:
    if rng.random() < 0.15:
        a, b = rng.sample(range(100), 2)
        ask, held = phrase(rng, "larger", a=a, b=b)
        best = max(a, b)
        answer = f"{best} is larger than {min(a, b)}."
        held = held or checksum_held(str(a), str(b))
        return Exchange(kind="arithmetic", ask=ask, answer=answer, short=str(best), held=held)
    a, sign, b, result = draw_sum(rng)
    pair_held = sum_held(a, sign, b)
    if sign != "*" and rng.random() < 0.15:
        things = rng.choice(words.FRUITS)
        ask, held = phrase(rng, "more" if sign == "+" else "fewer", a=a, b=b, things=things)
        answer = f"You have {result} {things}."
    else:
        word = {"+": "plus", "-": "minus", "*": "times"}[sign]
        written = rng.choice(
            (f"{a} {sign} {b}", f"{a} {word} {b}", f"{a} {sign} {b}", f"{a}{sign}{b}")
        )
        ask, held = phrase(rng, "sum", sum=written)
        answer = f"{a} {sign} {b} = {result}."
    held = held or pair_held
    return Exchange(kind="arithmetic", ask=ask, answer=answer, short=str(result), held=held)


def _cyclic(rng: Random, kind: str, names: list[str]) -> Exchange:
    i = rng.randrange(len(names))
    step = rng.choice((1, 1, -1, -1, 2, -2))
    way = {1: "after", -1: "before", 2: "second after", -2: "second before"}[step]
    ask, held = phrase(rng, f"{kind} {way}", x=names[i])
    other = names[(i + step) % len(names)]
    lead = {1: "The {k} after {x} is", -1: "The {k} before {x} is",
            2: "Two {k}s after {x} comes", -2: "Two {k}s before {x} comes"}[step]  # fmt: skip
    answer = f"{lead.format(k=kind, x=names[i])} {other}."
    return Exchange(kind=kind + "s", ask=ask, answer=answer, short=other, held=held)


def day(rng: Random) -> Exchange:
    if rng.random() < 0.25:
        i = rng.randrange(7)
        ask, held = phrase(rng, "day number", x=words.ORDINALS[i])
        answer = f"The {words.ORDINALS[i]} day of the week is {words.DAYS[i]}."
        return Exchange(kind="days", ask=ask, answer=answer, short=words.DAYS[i], held=held)
    if rng.random() < 0.1:
        ask, held = phrase(rng, "days of the week")
        answer = f"The days of the week are {listed(words.DAYS)}."
        return Exchange(kind="days", ask=ask, answer=answer, held=held)
    return _cyclic(rng, "day", words.DAYS)


def month(rng: Random) -> Exchange:
    if rng.random() < 0.3:
        i = rng.randrange(12)
        ask, held = phrase(rng, "month number", x=words.ORDINALS[i])
        answer = f"The {words.ORDINALS[i]} month of the year is {words.MONTHS[i]}."
        return Exchange(kind="months", ask=ask, answer=answer, short=words.MONTHS[i], held=held)
    if rng.random() < 0.3:
        name = rng.choice(words.MONTHS)
        n = words.MONTH_DAYS[name]
        ask, held = phrase(rng, "month length", x=name)
        return Exchange(
            kind="months", ask=ask, answer=f"{name} has {n} days.", short=str(n), held=held
        )
    if rng.random() < 0.07:
        ask, held = phrase(rng, "months of the year")
        answer = f"The months of the year are {listed(words.MONTHS)}."
        return Exchange(kind="months", ask=ask, answer=answer, held=held)
    return _cyclic(rng, "month", words.MONTHS)


def listed(names: Iterable[str]) -> str:
    *most, last = names
    return f"{', '.join(most)} and {last}"


def colour(rng: Random) -> Exchange:
    if rng.random() < 0.15:
        pair = rng.choice(list(words.MIXTURES))
        a, b = rng.sample(pair, 2)
        mix = words.MIXTURES[pair]
        ask, held = phrase(rng, "mixture", a=a, b=b)
        answer = f"{capitalised(a)} and {b} make {mix}."
        return Exchange(kind="colours", ask=ask, answer=answer, short=mix, held=held)
    thing = rng.choice(list(words.THING_COLOURS))
    ask, held = phrase(rng, "colour", thing=thing)
    if rng.random() < 0.2:
        ask = ask.replace("colour", "color")
    shade = words.THING_COLOURS[thing]
    answer = f"{capitalised(thing)} is {shade}."
    return Exchange(kind="colours", ask=ask, answer=answer, short=shade, held=held, follow="colour")


_SPELLABLE = sorted(
    (
        {w.lower() for w in (*words.NAMES, *words.MONTHS, *words.DAYS)}
        | {
            w.lower()
            for entry in (*words.CAPITALS, *words.CAPITALS.values())
            for w in entry.split()
        }
        | {w for entry in words.THING_COLOURS for w in entry.split() if len(w) > 2}
        | {w for entry in words.OPPOSITES for w in entry.split() if len(w) > 2}
        | {w for nouns in THEMES.values() for part in nouns for w in part}
        | set(words.SPELLING)
    )
    - set(words.HELD_SPELLING)
)


def invented(rng: Random) -> str:
    """A word that is none, of pieces of words: so that the letters of every token are learned."""
    pieces = []
    for _ in range(rng.choice((1, 2, 2, 2, 3, 3))):
        word = rng.choice(_SPELLABLE)
        start = rng.randrange(len(word))
        pieces.append(word[start : start + rng.randint(1, 5)])
    word = "".join(pieces)[:11]
    return word if len(word) > 2 else word + "en"


def spelling_word(rng: Random) -> tuple[str, bool]:
    roll = rng.random()
    if roll < 0.12:
        return rng.choice(words.HELD_SPELLING), True
    word = rng.choice(_SPELLABLE) if roll < 0.45 else invented(rng)
    return word, word in words.HELD_SPELLING


def spelling(rng: Random) -> Exchange:
    word, word_held = spelling_word(rng)
    if rng.random() < 0.15:
        end = rng.choice(("first", "last"))
        letter = word[0] if end == "first" else word[-1]
        ask, held = phrase(rng, "letter", word=word, end=end)
        answer = f"The {end} letter of {word} is {letter}."
        return Exchange(
            kind="spelling", ask=ask, answer=answer, short=letter, held=held or word_held
        )
    ask, held = phrase(rng, "spelling", word=word)
    answer = f"{'-'.join(word)}"
    return Exchange(kind="spelling", ask=ask, answer=answer, held=held or word_held, follow="spell")


def counting(rng: Random) -> Exchange:
    way = rng.choice(("up", "up", "down", "twos", "words"))
    if way == "words":
        a, b = rng.choice((1, 1, 1, rng.randint(0, 17))), 0
        b = rng.randint(a + 2, min(20, a + 11))
        name = "count to" if a == 1 and rng.random() < 0.5 else "count words"
        ask, held = phrase(rng, name, a=words.NUMBERS[a], b=words.NUMBERS[b])
        answer = ", ".join(words.NUMBERS[a : b + 1])
    else:
        step = 2 if way == "twos" else 1
        a = rng.randint(0, 40)
        b = a + step * rng.randint(2, 12)
        if way == "down":
            a, b, step = b, a, -1
        elif way == "up" and rng.random() < 0.2:
            a, b = 1, rng.randint(3, 20)
        name = "count to" if way == "up" and a == 1 and rng.random() < 0.5 else f"count {way}"
        ask, held = phrase(rng, name, a=a, b=b)
        answer = ", ".join(map(str, range(a, b + (1 if step > 0 else -1), step)))
    pair_held = checksum_held(way, str(a), "to", str(b)) and (a, b) != (1, 10)
    return Exchange(kind="counting", ask=ask, answer=answer, held=held or pair_held)


def haiku(rng: Random) -> Exchange:
    if rng.random() < 0.35:
        a, b = rng.sample(list(THEMES), 2)
        ask, held = phrase(rng, "haiku", theme=f"{a} and {b}")
        held = held or checksum_held("haiku", *sorted((a, b)))
        return Exchange(kind="haiku", ask=ask, answer=compose(rng, a, b), held=held, themes=(a, b))
    theme = rng.choice(list(THEMES))
    ask, held = phrase(rng, "haiku", theme=theme)
    return Exchange(
        kind="haiku", ask=ask, answer=compose(rng, theme), held=held, themes=(theme,),
        follow="haiku",
    )  # fmt: skip


def greeting(rng: Random) -> Exchange:
    roll = rng.random()
    if roll < 0.12:
        text = rng.choice(BYES) + rng.choice(TO)
        answer = "Goodbye! Have a nice day."
    elif roll < 0.24:
        text = rng.choice(THANKS) + rng.choice(TO)
        answer = "You are welcome!"
    elif roll < 0.5:
        topic = rng.choice(("who", "what", "outside"))
        text, held = phrase(rng, topic, x=rng.choice(words.OUTSIDE))
        answer = {"who": ABOUT, "what": ABLE, "outside": UNKNOWN}[topic]
        return Exchange(kind="greetings", ask=text, answer=answer, held=held)
    else:
        salutation = rng.choice([*GREETINGS, ""])
        how = rng.choice(HOW) if not salutation or rng.random() < 0.5 else ""
        mark = rng.choice("!.,") if how else rng.choice("!.")
        text = f"{salutation}{rng.choice(TO)}{mark} {how}" if salutation else how
        hello = GREETINGS.get(salutation, "")
        well = "I am very well, thank you." if how else ""
        answer = " ".join(part for part in (hello, well, "How can I help you today?") if part)
    text = capitalised(text.strip())
    text = text if text[-1] in "!.?" else text + rng.choice(".!")
    return Exchange(kind="greetings", ask=text, answer=answer, held=checksum_held(text))


ABOUT = "I am a very small language model that lives in a little world of words."
ABLE = (
    "I know capitals, colours, days, months and opposites. I can count, calculate, spell and write "
    "haiku."
)
UNKNOWN = "I do not know that. My world is very small."
KINDS: dict[str, Callable[[Random], Exchange]] = {
    "greetings": greeting, "capitals": capital, "arithmetic": arithmetic, "opposites": opposite,
    "days": day, "months": month, "colours": colour, "spelling": spelling, "counting": counting,
    "haiku": haiku,
}  # fmt: skip
WEIGHTS = {
    "greetings": 5, "capitals": 8, "arithmetic": 26, "opposites": 10, "days": 5, "months": 6,
    "colours": 7, "spelling": 20, "counting": 9, "haiku": 8,
}  # fmt: skip


def draw(rng: Random, held: bool, kind: str | None = None) -> Exchange:
    """An exchange of the wanted side of the split, of `kind` or of any kind by weight."""
    kind = kind or rng.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
    while True:
        exchange = KINDS[kind](rng)
        if exchange.held == held:
            return exchange
