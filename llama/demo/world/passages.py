"""Plain passages, for completion: facts in rows, lists after a pattern, and small stories.

It refuses to know dialogues. A passage is a list of units, each a lead and the tail that follows
from it ("The capital of France is", " Paris."). The surprising thing: what is held out is not a
fact but a neighbourhood. Two units that stand side by side in held-out text, chosen by checksum,
never stand side by side in training.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from random import Random
from typing import NamedTuple

from llama.demo.world import words
from llama.demo.world.haiku import THEMES, compose
from llama.demo.world.questions import (
    capitalised,
    checksum_held,
    draw_sum,
    invented,
    listed,
    sum_held,
)


class Unit(NamedTuple):
    lead: str
    tail: str  # what can be said for sure after the lead; "" where nothing can

    @property
    def text(self) -> str:
        return self.lead + self.tail


def _capital(rng: Random) -> Unit:
    country = rng.choice(list(words.CAPITALS))
    city = words.CAPITALS[country]
    lead, tail = rng.choice((
        ("The capital of {country} is", " {city}."), ("{city} is the capital of", " {country}."),
        ("The capital city of {country} is", " {city}."), ("In {country}, the capital is",
         " {city}."),
    ))  # fmt: skip
    return Unit(lead.format(country=country, city=city), tail.format(country=country, city=city))


def _opposite(rng: Random) -> Unit:
    word = rng.choice(list(words.OPPOSITES))
    lead, tail = rng.choice((
        ("The opposite of {a} is", " {b}."), ("{A} is the opposite of", " {b}."),
        ("What is not {a} is", " {b}."), ("{A} and", " {b} are opposites."),
    ))  # fmt: skip
    slots = {"a": word, "A": capitalised(word), "b": words.OPPOSITES[word]}
    return Unit(lead.format(**slots), tail.format(**slots))


def _calendar(rng: Random) -> Unit:
    names, kind = rng.choice(((words.DAYS, "day"), (words.MONTHS, "month")))
    i = rng.randrange(len(names))
    step = rng.choice((1, 1, -1))
    way = "after" if step == 1 else "before"
    slots = {"x": names[i], "y": names[(i + step) % len(names)], "way": way, "kind": kind}
    lead, tail = rng.choice((
        ("The {kind} {way} {x} is", " {y}."), ("{y} comes {way}",
         " {x}."),
    ))  # fmt: skip
    if kind == "month" and rng.random() < 0.25:
        return Unit(f"{names[i]} has", f" {words.MONTH_DAYS[names[i]]} days.")
    return Unit(lead.format(**slots), tail.format(**slots))


def _colour(rng: Random) -> Unit:
    thing = rng.choice(list(words.THING_COLOURS))
    shade = words.THING_COLOURS[thing]
    lead = rng.choice(("{Thing} is", "The colour of {thing} is", "{Thing} has the colour"))
    return Unit(lead.format(thing=thing, Thing=capitalised(thing)), f" {shade}.")


def _sum(rng: Random) -> Unit:
    while True:
        a, sign, b, result = draw_sum(rng)
        if not sum_held(a, sign, b):
            break
    word = {"+": "plus", "-": "minus", "*": "times"}[sign]
    return rng.choice(
        (Unit(f"{a} {word} {b} is", f" {result}."), Unit(f"{a} {sign} {b} =", f" {result}."))
    )


def _spelled(rng: Random) -> Unit:
    while (word := invented(rng)) in words.HELD_SPELLING:
        pass
    return Unit(f"{capitalised(word)} is spelled", f" {'-'.join(word)}.")


_FACTS: tuple[Callable[[Random], Unit], ...] = (
    _capital, _capital, _opposite, _opposite, _calendar, _colour, _sum, _spelled,
)  # fmt: skip


def facts(rng: Random, length: int) -> list[Unit]:
    """Sentences of one kind or of all kinds, one after the other."""
    kinds = _FACTS if rng.random() < 0.5 else (rng.choice(_FACTS),)
    units = [rng.choice(kinds)(rng) for _ in range(length)]
    return [units[0], *(Unit(" " + unit.lead, unit.tail) for unit in units[1:])]


def _following(names: list[str]) -> dict[str, str]:
    return dict(pairwise(names))


_TABLES: tuple[dict[str, str], ...] = (
    words.OPPOSITES, words.OPPOSITES, words.OPPOSITES, words.CAPITALS, words.CAPITALS,
    words.THING_COLOURS, _following([*words.DAYS, words.DAYS[0]]),
    _following([*words.MONTHS, words.MONTHS[0]]), _following(words.NUMBERS),
    _following([str(n) for n in range(100)]), {w: w.upper() for w in words.SPELLING},
    {w: w for w in words.SPELLING}, {w: w[0] for w in words.SPELLING},
    {w: "-".join(w) for w in words.SPELLING},
    {city: country for country, city in words.CAPITALS.items()},
)  # fmt: skip
_SUCCESSORS = {*words.DAYS, *words.MONTHS, *words.NUMBERS, *map(str, range(101))}
_ARROWS = (" => ", " -> ", ": ", " = ", " => ")


def pattern(rng: Random, length: int) -> list[Unit]:
    """Lines such as `hot => cold`: what to do has to be read from the lines above."""
    table, arrow = rng.choice(_TABLES), rng.choice(_ARROWS)
    keys = rng.sample(list(table), min(length, len(table)))
    return [
        Unit(("\n" if i else "") + key + arrow.rstrip(), f" {table[key]}")
        for i, key in enumerate(keys)
    ]


def series(rng: Random, length: int) -> list[Unit]:
    """Days, months and numbers in their order."""
    roll = rng.random()
    if roll < 0.15:
        return [Unit("The days of the week are", f" {listed(words.DAYS)}.")]
    if roll < 0.3:
        return [Unit("The months of the year are", f" {listed(words.MONTHS)}.")]
    if roll < 0.6:
        a, b = (
            (1, rng.randint(4, 20))
            if rng.random() < 0.7
            else (rng.randint(0, 10), rng.randint(14, 20))
        )
        lead = (
            f"Counting to {words.NUMBERS[b]}:"
            if a == 1
            else f"Counting from {words.NUMBERS[a]} to {words.NUMBERS[b]}:"
        )
        return [Unit(lead, f" {', '.join(words.NUMBERS[a : b + 1])}.")]
    a = 1 if rng.random() < 0.3 else rng.randint(0, 60)
    b = a + rng.randint(3, 3 + length)
    numbers = [str(n) for n in range(a, b + 1)]
    if rng.random() < 0.3:
        return [Unit(f"Counting down from {b} to {a}:", f" {', '.join(reversed(numbers))}.")]
    return [Unit(f"Counting from {a} to {b}:", f" {', '.join(numbers)}.")]


def story(rng: Random, length: int) -> list[Unit]:
    """A small story; who, where, what and how many are told once and asked of the reader later."""
    units: list[Unit] = []
    while len(units) < length:
        name, friend = rng.sample(words.NAMES, 2)
        country = rng.choice(list(words.CAPITALS))
        thing, shade = rng.choice(words.OBJECTS), rng.choice(words.COLOURS)
        fruit = rng.choice(words.FRUITS)
        a, b = rng.randint(2, 12), rng.randint(1, 9)
        i = rng.randrange(7)
        animal = rng.choice(words.ANIMALS)
        mood = rng.choice(("happy", "sad", "calm", "nervous", "brave", "afraid"))
        middle = [
            [Unit(f" On {words.DAYS[i]}, {name} buys {a} {fruit}.", ""),
             Unit(f" {friend} brings {b} more {fruit}, so {name} has", f" {a + b} {fruit}.")],
            [Unit(f" {name} has {'an' if shade[0] in 'aeiou' else 'a'} {shade} {thing}.", ""),
             Unit(f" {friend} asks for the {thing}. The {thing} is", f" {shade}.")],
            [Unit(f" {name} is {mood}, but {friend} is not {mood}: {friend} is",
                  f" {words.OPPOSITES[mood]}.")],
            [Unit(f" {name} has a {animal} called {friend}.", ""),
             Unit(f" The {animal} comes when {name} calls:", f" {friend}!")],
            [Unit(f" Today is {words.DAYS[i]}. Tomorrow is", f" {words.DAYS[(i + 1) % 7]}.")],
        ]  # fmt: skip
        rng.shuffle(middle)
        lead = f"{' ' if units else ''}{name} lives in {words.CAPITALS[country]}, the capital of"
        units += [
            Unit(lead, f" {country}."),
            *(u for part in middle[: rng.randint(2, 4)] for u in part),
        ]
    return units


def poem(rng: Random, length: int) -> list[Unit]:
    theme = rng.choice(list(THEMES))
    lead = rng.choice(("A haiku about {}:\n\n", "{}, a haiku\n\n", "A short poem about {}:\n\n"))
    lines = compose(rng, theme)
    return [Unit(capitalised(lead.format(theme)), lines)]


_FORMS: tuple[Callable[[Random, int], list[Unit]], ...] = (facts, pattern, series, story, poem)


_ALWAYS_TAUGHT = ("The days of", "The months of", "Counting to")


def _is_held(units: list[Unit]) -> bool:
    """By neighbours; a passage of one unit by itself."""
    if len(units) == 1:
        return checksum_held(units[0].text) and not units[0].lead.startswith(_ALWAYS_TAUGHT)
    pairs = pairwise(units)
    return any(checksum_held(left.text, right.text, one_in=16) for left, right in pairs)


def draw_passage(rng: Random, held: bool, length: int) -> list[Unit]:
    """A passage of about `length` units from the wanted side of the split."""
    form = rng.choices(_FORMS, (5, 4, 2, 3, 1))[0]
    while True:
        units = form(rng, length)
        if _is_held(units) == held:
            return units


def text_of(units: list[Unit]) -> str:
    return "".join(unit.text for unit in units)


def completion(rng: Random) -> tuple[str, str]:
    """A held-out prompt and the tail that has to follow: the second unit of a held-out pair."""
    while True:
        units = rng.choice((facts, pattern, story))(rng, rng.randint(3, 6))
        for i in range(2, len(units)):
            left, right = units[i - 1 : i + 1]
            if right.tail.strip() in _SUCCESSORS:  # "1 => 2" and "3 => 4" also lie in "1, 2, 3, 4"
                continue
            if right.tail and checksum_held(left.text, right.text, one_in=16):
                return text_of(units[:i]) + right.lead, right.tail
