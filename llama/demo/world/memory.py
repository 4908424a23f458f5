"""What a user says about themselves and asks for later, and questions about what was said before.

It refuses to know what lies between the telling and the asking. The surprising thing: most names
are invented, so that remembering one means copying its letters from the dialogue.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from llama.demo.world import words
from llama.demo.world.questions import capitalised, checksum_held

# fact: ways to tell it, to ask for it, held-out ways to ask, answer to the telling, to the asking
_FACTS: dict[str, tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...], str, str]] = {
    "name": (
        ("My name is {x}.", "I am {x}.", "I am called {x}.", "Call me {x}.", "You can call me {x}.",
         "Hello, my name is {x}.", "Hi, I am {x}.", "Hello! I am {x}.", "My name's {x}.",
         "Hi! My name is {x}."),
        ("Please tell me my name.", "Which name do I have?", "What do you call me?",
         "Which name did I give you?", "Say what I am called.", "What is my name?",
         "What's my name?", "Do you remember my name?", "Who am I?",
         "Tell me my name.",
         "Do you know my name?", "What am I called?", "Can you tell me my name?", "Say my name."),
        ("How am I called?", "Please say my name.", "Which name did I tell you?"),
        "Nice to meet you, {x}!", "Your name is {x}.",
    ),
    "colour": (
        ("My favourite colour is {x}.", "I like {x} best of all colours.",
         "The colour I like best is {x}.",
         "{x} is my favourite colour.", "My favorite color is {x}."),
        ("Do you still know my favourite colour?", "Which colour do I love?",
         "Say my favourite colour.", "What is my favourite colour?", "Which colour do I like best?",
         "What colour do I like best?",
         "Do you remember my favourite colour?", "Tell me my favourite colour.",
         "What is my favorite color?"),
        ("Which colour is my favourite?", "Do you know my favourite colour?"),
        "{x} is a lovely colour.", "Your favourite colour is {x}.",
    ),
    "number": (
        ("My lucky number is {x}.", "My favourite number is {x}.", "Remember the number {x}.",
         "Please remember the number {x}.", "Keep the number {x} in mind."),
        ("What number was it?", "Which number was mine?", "Do you still know my number?",
         "Say my number.", "What is my number?", "Which number did I tell you?",
         "What number did I tell you?",
         "Do you remember my number?", "Tell me my number.", "What was my number?"),
        ("Which number was it?", "Do you know my number?"),
        "I will remember the number {x}.", "Your number is {x}.",
    ),
    "home": (
        ("I live in {x}.", "My home is {x}.", "I am from {x}.", "I come from {x}.",
         "My home town is {x}."),
        ("What is the name of my home town?", "Do you still know where I live?",
         "Say where I live.", "My home is where?", "Where do I live?", "Where am I from?",
         "Do you remember where I live?",
         "Which city do I live in?",
         "Tell me where I live.", "In which city do I live?"),
        ("Do you know where I live?", "What is my home town?"),
        "{x} is a nice place to live.", "You live in {x}.",
    ),
    "food": (
        ("My favourite food is {x}.", "I love to eat {x}.", "I like {x} best of all foods.",
         "The food I like best is {x}."),
        ("Which food do I love?", "Do you still know my favourite food?", "Say my favourite food.",
         "What is my favourite food?", "What do I love to eat?", "Which food do I like best?",
         "Do you remember my favourite food?", "Tell me my favourite food."),
        ("Which food is my favourite?", "Do you know my favourite food?"),
        "I hope that you can eat {x} today.", "Your favourite food is {x}.",
    ),
    "pet": (
        ("My {p} is called {x}.", "I have a {p} called {x}.", "I have a {p}. Its name is {x}.",
         "The name of my {p} is {x}."),
        ("Do you still know the name of my {p}?", "Say the name of my {p}.",
         "Which name did I give my {p}?", "What is my {p} called?", "What is the name of my {p}?",
         "Do you remember the name of my {p}?",
         "Tell me the name of my {p}.", "How is my {p} called?"),
        ("Do you know the name of my {p}?", "Which name does my {p} have?"),
        "{x} is a good name for a {p}.", "Your {p} is called {x}.",
    ),
}  # fmt: skip
_UNKNOWN = "You have not told me that yet."
_ONSETS = words.listing("b br d dr f g gr h j k kl l m n p pl r s st t tr v w z th sh ch")
_VOWELS = words.listing("a e i o u ai ea ia io")
_CODAS = ["", "", "", "n", "l", "r", "s", "t", "x", "m", "nd", "th", "ck"]


@dataclass(frozen=True)
class Memory:
    """A fact told and asked for: two messages of the user with their answers."""

    tell: str
    told: str
    ask: str
    answer: str
    held: bool
    topic: str
    value: str


def invented_name(rng: Random) -> str:
    parts = [
        rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_CODAS)
        for _ in range(rng.choice((1, 2, 2, 3)))
    ]
    return capitalised("".join(parts))


def draw_memory(rng: Random) -> Memory:
    topic = rng.choice(["name", "name", *_FACTS])
    tells, asks, held_asks, told, answer = _FACTS[topic]
    x = _value(rng, topic)
    held = False
    if topic in ("name", "pet") and rng.random() < 0.15:
        x, held = rng.choice(words.HELD_NAMES), True
    slots = {"x": x, "p": rng.choice(words.ANIMALS)}
    ask_held = rng.random() < 0.15
    tell = capitalised(rng.choice(tells).format(**slots))
    ask = rng.choice(held_asks if ask_held else asks).format(**slots)
    held = held or ask_held or checksum_held(tell, ask)
    told, answer = (capitalised(text.format(**slots)) for text in (told, answer))
    return Memory(tell, told, ask, answer, held, topic + (slots["p"] if topic == "pet" else ""), x)


def _value(rng: Random, topic: str) -> str:
    if topic in ("name", "pet"):
        name = rng.choice(words.NAMES) if rng.random() < 0.35 else invented_name(rng)
        return "Anna" if name in words.HELD_NAMES else name
    if topic == "colour":
        return rng.choice(words.COLOURS)
    if topic == "number":
        return str(rng.randint(1, 999 if rng.random() < 0.3 else 99))
    if topic == "food":
        return rng.choice(words.FOODS)
    return rng.choice(list(words.CAPITALS.values()))


def unknown(rng: Random) -> tuple[str, str]:
    """A question for something that was never told, and the honest answer."""
    topic = rng.choice(list(_FACTS))
    return rng.choice(_FACTS[topic][1]).format(p=rng.choice(words.ANIMALS)), _UNKNOWN
