"""The text of the demo: what it learns from, and what is held out of that.

Everything is drawn from the grammars beside this file, seeded and repeatable, and was written for
this project. It refuses to know tokens and models. The surprising thing: facts are shared between
the two sides and questions are not. After normalisation (case, white space and punctuation gone) no
held-out question, dialogue or passage occurs in training, whatever the seed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from random import Random

from llama.demo.world import words
from llama.demo.world.haiku import THEMES, compose, is_haiku
from llama.demo.world.memory import Memory, draw_memory, unknown
from llama.demo.world.passages import completion, draw_passage, text_of
from llama.demo.world.questions import (
    KINDS,
    Exchange,
    capitalised,
    checksum_held,
    draw,
    invented,
    normalise,
    phrase,
)
from llama.demo.world.styles import PLAIN, Style, draw_style
from llama.tokenizer import Dialog, Message

_SHORT = ("capitals", "arithmetic", "opposites", "days", "months", "colours")
_STYLED = (*_SHORT, *_SHORT, "greetings", "counting", "spelling")
ALL_KINDS = (*KINDS, "styles", "references", "completions")


@dataclass(frozen=True, kw_only=True)
class Question:
    """A held-out question: a dialog that awaits an answer, or a text to be continued."""

    kind: str
    prompt: Dialog | str
    answer: str
    themes: tuple[str, ...] = ()

    def accepts(self, text: str) -> bool:
        """Dialogues: the answer to the letter, a haiku by rule; texts: begins with the answer."""
        if self.themes:
            return is_haiku(text, self.themes)
        if isinstance(self.prompt, str):
            return text.strip().startswith(self.answer.strip())
        return text.strip() == self.answer

    @property
    def key(self) -> str:
        return key_of(self.prompt)


def key_of(document: Dialog | str) -> str:
    """What must differ between training and held-out: all but the assistant's words, normalised."""
    if isinstance(document, str):
        return normalise(document)
    return normalise(" ".join(m["content"] for m in document if m["role"] != "assistant"))


def keys_of(document: Dialog | str) -> Iterator[str]:
    """Every key that a training document gives away: that of each message of the user alone, and
    that of all up to each."""
    yield key_of(document)
    if not isinstance(document, str):
        for i, message in enumerate(document):
            if message["role"] == "user":
                yield key_of([message])
                yield key_of(document[: i + 1])


def _messages(pairs: Sequence[tuple[str, str]], system: str = "") -> list[Message]:
    """A dialog of what the user says and the answer to it, each pair after the other."""
    dialog: list[Message] = [{"role": "system", "content": system}] if system else []
    for ask, answer in pairs:
        dialog.append({"role": "user", "content": ask})
        dialog.append({"role": "assistant", "content": answer})
    return dialog


def _follow(rng: Random, before: Exchange, held: bool) -> Exchange | None:
    """ "And Japan?" after a question of the same kind; None where this one cannot be followed."""
    while before.follow:
        if before.follow == "haiku":
            theme = rng.choice(list(THEMES))
            x, answer, short = theme, compose(rng, theme), ""
        elif before.follow == "spell":
            x = invented(rng) if rng.random() < 0.5 else rng.choice(words.SPELLING)
            answer, short = "-".join(x), ""
        else:
            table, form = {
                "capital": (words.CAPITALS, "The capital of {x} is {y}."),
                "opposite": (words.OPPOSITES, "The opposite of {x} is {y}."),
                "colour": (words.THING_COLOURS, "{x} is {y}."),
            }[before.follow]
            x = rng.choice(list(table))
            short = table[x]
            answer = capitalised(form.format(x=x, y=short))
        ask, is_held = phrase(rng, f"follow {before.follow}", frame=False, x=x)
        if (is_held or checksum_held(before.ask, ask)) == held:
            return replace(before, ask=ask, answer=answer, short=short, held=held)
    return None


def _styled(rng: Random, style: Style, held: bool) -> Exchange:
    """A question that can be answered in this style, the two together of the wanted side."""
    while True:
        exchange = draw(rng, held=False, kind=rng.choice(_STYLED))
        is_held = style.held or checksum_held(style.system, exchange.ask)
        if (exchange.short or not style.needs_short) and is_held == held:
            return exchange


def _style(rng: Random, held: bool) -> Style:
    while True:
        style = draw_style(rng)
        if held or not style.held:
            return style


def _memory(rng: Random, held: bool) -> Memory:
    while True:
        memory = draw_memory(rng)
        if memory.held == held:
            return memory


def _styled_dialogue(rng: Random, held: bool, length: int) -> list[Message]:
    """Exchanges under a system prompt that every answer obeys; now and then something to keep."""
    style = _style(rng, held)
    exchanges = [_styled(rng, style, held) for _ in range(length)]
    if length > 1 and rng.random() < 0.3:
        memory = _memory(rng, held)
        tell = Exchange(kind="", ask=memory.tell, answer=memory.told, held=held)
        ask = Exchange(kind="", ask=memory.ask, answer=memory.answer, held=held, short=memory.value)
        exchanges = [tell, *exchanges, ask]
    return _messages([(e.ask, style.apply(e)) for e in exchanges], style.system)


_AGAIN = ("Now in capital letters.", "In capital letters, please.", "Say that in capital letters.",
          "Can you say that in capital letters?", "Again, in capital letters.")  # fmt: skip
_SAID = ("Say that again.", "Please repeat that.", "Can you repeat that?", "Once more, please.")


def _plain_dialogue(rng: Random, held: bool, length: int) -> list[Message]:
    """Exchanges of all kinds, with things told early and asked for later, and follow-ups."""
    pairs: list[tuple[str, str]] = []
    later: list[Memory] = []
    known: set[str] = set()
    while len(pairs) < length or later:
        roll = rng.random()
        if later and (len(pairs) >= length or roll < 0.25):
            memory = later.pop(rng.randrange(len(later)))
            pairs.append((memory.ask, memory.answer))
        elif length > 1 and roll < 0.42:
            memory = _memory(rng, held)
            if memory.topic not in known:
                known.add(memory.topic)
                pairs.append((memory.tell, memory.told))
                later.append(memory)
        elif pairs and roll < 0.45:
            said = pairs[-1][1]
            pairs.append(
                (rng.choice(_SAID), said)
                if rng.random() < 0.5
                else (rng.choice(_AGAIN), said.upper())
            )
        elif roll < 0.46 and not known and not held:
            pairs.append(unknown(rng))
        else:
            exchange: Exchange | None = draw(rng, held)
            while exchange:
                pairs.append((exchange.ask, exchange.answer))
                exchange = (
                    _follow(rng, exchange, held) if length > 1 and rng.random() < 0.35 else None
                )
    return _messages(pairs, rng.choice(PLAIN) if rng.random() < 0.25 else "")


def _length(rng: Random) -> int:
    """How many exchanges: mostly one, now and then so many that the context is full."""
    return rng.choices(
        (1, rng.randint(2, 4), rng.randint(5, 12), rng.randint(13, 60)), (50, 36, 11, 3)
    )[0]


def document(rng: Random, held: bool) -> Dialog | str:
    """One dialogue or passage of the wanted side of the split."""
    if rng.random() < 0.28:
        many = 1 if rng.random() < 0.85 else rng.randint(2, 12)
        return "\n\n".join(text_of(draw_passage(rng, held, rng.randint(2, 9))) for _ in range(many))
    length = _length(rng)
    if rng.random() < 0.3:
        return _styled_dialogue(rng, held, length)
    if length == 1 and rng.random() < 0.06:
        memory = _memory(rng, held)
        return _messages([(f"{memory.tell} {memory.ask}", memory.answer)])
    return _plain_dialogue(rng, held, length)


def training_documents(seed: int | str = 0) -> Iterator[Dialog | str]:
    """Dialogues and passages without end; the same for the same seed."""
    rng = Random(f"train {seed}")
    while True:
        yield document(rng, held=False)


def held_out_text(n: int = 1200) -> list[Dialog | str]:
    """Dialogues and passages of which every part is held out: for perplexity."""
    rng = Random("held-out text")
    return [document(rng, held=True) for _ in range(n)]


def _question(rng: Random, kind: str) -> Question:
    if kind == "completions":
        prompt, tail = completion(rng)
        return Question(kind=kind, prompt=prompt, answer=tail)
    if kind == "styles":
        style = _style(rng, held=True)
        exchange = _styled(rng, style, held=True)
        dialog = _messages([(exchange.ask, "")], style.system)
        return Question(kind=kind, prompt=dialog[:-1], answer=style.apply(exchange))
    if kind == "references":
        if rng.random() < 0.25:
            first = draw(rng, held=False, kind=rng.choice(("capitals", "opposites", "colours")))
            follow = _follow(rng, first, held=True)
            if follow:
                pairs = [(first.ask, first.answer), (follow.ask, "")]
                return Question(kind=kind, prompt=_messages(pairs)[:-1], answer=follow.answer)
        memory = _memory(rng, held=True)
        fillers = [draw(rng, held=False) for _ in range(rng.randint(0, 3))]
        pairs = [
            (memory.tell, memory.told),
            *((e.ask, e.answer) for e in fillers),
            (memory.ask, ""),
        ]
        return Question(kind=kind, prompt=_messages(pairs)[:-1], answer=memory.answer)
    exchange = draw(rng, held=True, kind=kind)
    return Question(
        kind=kind,
        prompt=_messages([(exchange.ask, "")])[:-1],
        answer=exchange.answer,
        themes=exchange.themes,
    )


def held_out(n_per_kind: int = 100) -> list[Question]:
    """The examination: n different questions of each kind, none of them in training."""
    questions: list[Question] = []
    for kind in ALL_KINDS:
        rng = Random(f"held-out {kind}")
        seen: dict[str, Question] = {}
        while len(seen) < n_per_kind:
            question = _question(rng, kind)
            seen.setdefault(question.key, question)
        questions += seen.values()
    return questions
