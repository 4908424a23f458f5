"""Haiku of the little world: their words, how lines are made, and the rule that judges them.

A haiku is three lines of 5, 7 and 5 syllables by the table in this file, and on every theme that
was asked for. It refuses to know English beyond its table: a word that is not in it makes a line
unmeasurable, and the poem fails. The surprising thing: the table says what a slot holds and how
long it is at once (N1 is a noun of one syllable), so a pattern's length can be read off its slots.
"""

from __future__ import annotations

import re
from random import Random

from llama.demo.world.words import listing

# theme: nouns of one syllable | nouns of two syllables
_THEMES = {
    "autumn": "leaf wind crow mist branch | autumn maple harvest acorn ember",
    "spring": "bud bloom rain lamb breeze | springtime petal blossom robin tulip",
    "summer": "sun heat field bee shade | summer meadow cricket poppy barley",
    "winter": "frost snow ice pine hearth | winter snowfall blanket candle",
    "the sea": "sea wave tide foam gull | ocean harbour dolphin seashell island",
    "the rain": "rain drop roof cloud pool | raindrop puddle thunder gutter window",
    "the snow": "snow flake sled white drift | snowflake snowfall mitten winter silence",
    "the moon": "moon glow night cloud pond | moonlight silver shadow lantern owlet",
    "a mountain": "peak rock cliff stone path | mountain summit eagle glacier valley",
    "a river": "stream bank reed fish stone | river ripple heron current willow",
    "the night": "night dark star owl dream | midnight shadow darkness lantern",
    "the morning": "dawn dew sun lark light | morning sunrise rooster daybreak birdsong",
    "the wind": "wind breeze gust leaf kite | whisper feather windmill weather ribbon",
    "the forest": "oak fern moss deer trunk | forest thicket squirrel woodland badger",
    "a garden": "rose bee vine gate bud | garden flower tulip hedgerow",
    "a cat": "cat paw purr tail nap | kitten whisker cushion window shadow",
    "a bird": "bird wing nest song lark | sparrow feather robin swallow birdsong",
    "the stars": "star sky spark night light | starlight heaven comet planet darkness",
    "a fire": "flame spark smoke ash log | ember fireplace candle kindling",
    "a lake": "lake swan reed pond mist | water ripple lily rowboat mirror",
    "the desert": "sand dune sun heat stone | desert camel cactus lizard mirage",
    "a train": "train track bell steam bridge | engine whistle station railway tunnel",
    "tea": "tea cup steam leaf pot | teapot kettle honey saucer evening",
    "a frog": "frog pond leap reed splash | lily puddle tadpole water croaking",
}  # fmt: skip


def _nouns(row: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    one, two = (tuple(part.split()) for part in row.split("|"))
    return one, two


THEMES = {theme: _nouns(row) for theme, row in _THEMES.items()}
_SLOTS = {
    "A1": listing("old cold bright soft dark pale still small white deep warm gold"),
    "A2": listing("silent golden gentle lonely distant sleepy silver hidden quiet early"),
    "V1": listing("falls sleeps waits drifts turns glows fades sings rests gleams calls moves"),
    "V2": listing("whispers lingers listens wanders trembles shimmers passes remains awakes"),
    "D1": listing("now here still low there soon"),
    "D2": listing("slowly softly gently sweetly lightly calmly"),
    "T2": ["at dusk", "at dawn", "tonight", "alone", "again", "in peace", "at last"],
    "P2": listing("over under beside behind across beyond above beneath"),
}
FIVE = (
    "{A1} {N1}, {A2} {N1}", "the {A2} {N1} {V1}", "the {N2} {V2}", "{A2} {N2} {V1}",
    "a {N1} {V1} and {V1}", "the {N1} {V2} {D1}", "{N2} and {A1} {N1}", "a {A1} {N1} {T2}",
)  # fmt: skip
SEVEN = (
    "the {A1} {N1} {V1} in the {N1}", "{A2} {N1} {P2} the {N1}", "a {N2} {V2} {T2}",
    "{P2} the {N2}, a {N1}", "{D2} the {A2} {N1} {V1}", "the {N2} {V1} and {V2}",
    "a {N1} {V2} by the {N1}", "the {A1} {N2} {V1} {T2}",
)  # fmt: skip


def _table() -> dict[str, int]:
    table = dict.fromkeys(listing("the a an and in by at peace dusk dawn last"), 1)
    table |= {"tonight": 2, "alone": 2, "again": 2}
    for slot, words in _SLOTS.items():
        if slot != "T2":
            table |= dict.fromkeys(words, int(slot[1]))
    for one, two in THEMES.values():
        table |= dict.fromkeys(one, 1) | dict.fromkeys(two, 2)
    return table


SYLLABLES = _table()


def _line(rng: Random, patterns: tuple[str, ...], theme: str, used: set[str]) -> str:
    """One line; a word comes twice in a poem only where a theme has no other left."""
    one, two = THEMES[theme]

    def fill(match: re.Match[str]) -> str:
        slot = match.group(1)
        words = one if slot == "N1" else two if slot == "N2" else _SLOTS[slot]
        word = rng.choice([w for w in words if w not in used] or words)
        used.add(word)
        return word

    return re.sub(r"\{(\w\d)\}", fill, rng.choice(patterns))


def compose(rng: Random, *themes: str) -> str:
    """Three lines, 5-7-5; with two themes the first and the last line keep to one each."""
    used: set[str] = set()
    plan = ((FIVE, themes[0]), (SEVEN, rng.choice(themes)), (FIVE, themes[-1]))
    lines = [_line(rng, patterns, theme, used) for patterns, theme in plan]
    return "\n".join(line[0].upper() + line[1:] for line in lines)


def syllables(line: str) -> int | None:
    """Syllables of a line by the table; None where it does not know a word."""
    counts = [SYLLABLES.get(word) for word in re.findall(r"[a-z']+", line.lower())]
    return None if None in counts else sum(count or 0 for count in counts)


def is_haiku(text: str, themes: tuple[str, ...]) -> bool:
    """Three lines of 5, 7, 5 syllables, and for each theme at least one of its nouns."""
    lines = text.strip().splitlines()
    words = set(re.findall(r"[a-z]+", text.lower()))
    on_theme = all(words & {noun for part in THEMES[theme] for noun in part} for theme in themes)
    return [syllables(line) for line in lines] == [5, 7, 5] and on_theme
