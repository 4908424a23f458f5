"""System prompts that change the style of an answer, and what each does to it.

It refuses to know questions. The surprising thing: a style is a plain function of the finished
answer, so that a styled answer can be judged to the letter.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from llama.demo.world import words
from llama.demo.world.questions import Exchange, invented


@dataclass(frozen=True)
class Style:
    """What the system prompt says, how it changes an answer, and whether its words are held out."""

    system: str
    apply: Callable[[Exchange], str]
    held: bool
    needs_short: bool = False


def pirate(answer: str) -> str:
    return "Arr! " + re.sub(r"\b(is|are|am)\b", "be", answer)


def _in_short(exchange: Exchange) -> str:
    return exchange.short or exchange.answer


PLAIN = (
    "You are a helpful assistant.", "You are a friendly assistant.", "Be helpful.",
    "Answer briefly.",
    "You are a small language model.", "Answer the questions of the user.", "You are kind.",
    "You are a teacher.", "Help the user.", "Answer well.",
)  # fmt: skip
# style: system prompts of training | held-out ones
_PROMPTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "capitals": (
        ("Always answer in capital letters.", "Answer in capital letters.",
         "Use only capital letters.",
         "Write everything in capital letters.", "ANSWER IN CAPITAL LETTERS.",
         "Answer in upper case.",
         "Always answer in upper case.", "You only speak in capital letters.",
         "Use capital letters only.",
         "Speak in capital letters.", "You must answer in capital letters.",
         "Please use capital letters."),
        ("Reply in capital letters.", "Always write in capital letters.",
         "Use upper case letters only."),
    ),
    "small": (
        ("Always answer in small letters.", "Answer in small letters.", "Use only small letters.",
         "Write everything in small letters.", "Answer in lower case.",
         "Always answer in lower case.",
         "You only speak in small letters.", "Speak in lower case."),
        ("Reply in small letters.", "Always write in lower case."),
    ),
    "pirate": (
        ("Answer like a pirate.", "Talk like a pirate.", "You are a pirate.",
         "Always answer like a pirate.",
         "Speak like a pirate.", "Always answer as a pirate would.",
         "You are a pirate. Answer like one.",
         "Be a pirate.", "Always talk like a pirate.", "You are an old pirate."),
        ("Reply like a pirate.", "You speak like a pirate.", "Answer as a pirate."),
    ),
    "word": (
        ("Answer in one word.", "Always answer in one word.", "Answer with one word only.",
         "Use one word.",
         "Give answers of one word.", "Answer with a single word.", "Only one word, please.",
         "Always answer with a single word.", "Answer in a single word.", "Just one word."),
        ("Reply in one word.", "Reply with a single word.", "Always use one word only."),
    ),
    "twice": (
        ("Say everything twice.", "Always say everything twice.", "Give every answer twice.",
         "Repeat every answer.", "Always repeat your answer.", "Answer everything twice."),
        ("Repeat your answers.", "Say each answer twice."),
    ),
    "end": (
        ('End every answer with "{x}"', 'Always end with "{x}"', 'End each answer with: {x}',
         'Always end your answer with "{x}"', 'Finish every answer with "{x}"',
         'Your answers end with "{x}"',
         'Close every answer with: {x}'),
        ('Finish each answer with "{x}"', 'Every answer must end with "{x}"'),
    ),
    "begin": (
        ('Begin every answer with "{x}"', 'Always begin with "{x}"', 'Begin each answer with: {x}',
         'Always begin your answer with "{x}"', 'Start every answer with "{x}"',
         'Your answers begin with "{x}"',
         'Open every answer with: {x}'),
        ('Start each answer with "{x}"', 'Every answer must begin with "{x}"'),
    ),
}  # fmt: skip
_PLAIN_EFFECT: dict[str, Callable[[Exchange], str]] = {
    "capitals": lambda e: e.answer.upper(),
    "small": lambda e: e.answer.lower(),
    "pirate": lambda e: pirate(e.answer),
    "word": _in_short,
    "twice": lambda e: f"{e.answer} {e.answer}",
}


def _coined(rng: Random) -> str:
    """A closing or opening that nobody wrote down: one to three words and a mark."""
    pool = words.FOODS + words.FRUITS + words.OBJECTS + words.COLOURS + words.ANIMALS + words.NAMES
    coined = [invented(rng) if rng.random() < 0.4 else rng.choice(pool) for _ in range(3)]
    return " ".join(coined[: rng.randint(1, 3)]).capitalize() + rng.choice(".!,:")


def draw_style(rng: Random) -> Style:
    name = rng.choice(list(_PROMPTS))
    common, held_out = _PROMPTS[name]
    held = rng.random() < 0.25
    system = rng.choice(held_out if held else common)
    if name not in ("end", "begin"):
        return Style(system, _PLAIN_EFFECT[name], held, name == "word")
    known, unseen = (
        (words.ENDINGS, words.HELD_ENDINGS)
        if name == "end"
        else (words.BEGINNINGS, words.HELD_BEGINNINGS)
    )
    words_held = rng.random() < 0.2
    mark = rng.choice(unseen if words_held else known)
    if not words_held and rng.random() < 0.75:
        mark = _coined(rng)
    system = system.format(x=mark)
    if name == "end":
        return Style(system, lambda e: f"{e.answer} {mark}", held or words_held)
    return Style(system, lambda e: f"{mark} {e.answer}", held or words_held)
