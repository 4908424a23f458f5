"""A conversation as token ids: what was said, what of it the model still sees, and its file.

Knows the chat format and refuses to know models, slots and terminals. The surprising thing: an
answer is kept as the ids that the model generated and never encoded again. Text may have several
encodings, and another one than the model's own would neither find its keys in the cache nor be what
the model has said.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama.tokenizer import ChatFormat, DialogFormat, Message


def _without_ids(message: Any) -> Any:  # noqa: ANN401
    """A message as it was said, without the ids that `save` wrote."""
    if not isinstance(message, Mapping):
        return message
    return {key: value for key, value in message.items() if key != "ids"}


@dataclass
class Turn:
    """A message of the user, as ids from its header to its end, and the ids that answered it."""

    text: str
    message: list[int]
    answer: list[int] | None = None  # None: not answered yet


class Conversation:
    """A system prompt and turns. The first `forgotten` turns are kept, but no model sees them."""

    def __init__(self, formatter: DialogFormat, system: str | None = None) -> None:
        self.formatter = formatter
        self.turns: list[Turn] = []
        self.forgotten = 0
        self.set_system(system)

    def set_system(self, text: str | None) -> None:
        self.system = text
        self._start = [*self.formatter.tokenizer.prefix]
        if text is None:
            return
        if isinstance(self.formatter, ChatFormat):
            self._start += self.formatter.encode_message({"role": "system", "content": text})
        else:
            self._start += self.formatter.encode_content(text)

    @property
    def system_tokens(self) -> int:
        """How many ids stand before the first turn."""
        return len(self._start)

    def add(self, text: str) -> None:
        """A message of the user. It replaces one that was never answered."""
        if self.turns and self.turns[-1].answer is None:
            self.turns.pop()
        said = Message(role="user", content=text)
        form = self.formatter
        self.turns.append(
            Turn(text, form.encode_message(said) if isinstance(form, ChatFormat) else [])
        )
        self.forgotten = min(self.forgotten, len(self.turns) - 1)

    def reset(self) -> None:
        """Without turns, as at the beginning; the system prompt stays."""
        self.turns.clear()
        self.forgotten = 0

    def ids(self, forgotten: int | None = None) -> list[int]:
        """All that the model sees: where the last turn waits for its answer, with its open header.

        `forgotten` turns are left out, by default as many as are.
        """
        turns = self.turns[self.forgotten if forgotten is None else forgotten :]
        if not isinstance(self.formatter, ChatFormat):
            return self._rendered(turns)
        header = self.formatter.encode_header({"role": "assistant", "content": ""})
        ids = list(self._start)
        for turn in turns:
            ids += turn.message + header
            if turn.answer is not None:
                ids += [*turn.answer, self.formatter.tokenizer.special_tokens["<|eot_id|>"]]
        return ids

    def _rendered(self, turns: Sequence[Turn]) -> list[int]:
        """The same by a template: the ids of the last answer as they are, earlier ones as text."""
        if not turns:
            return list(self._start)
        dialog = [] if self.system is None else [Message(role="system", content=self.system)]
        for turn in turns:
            dialog.append(Message(role="user", content=turn.text))
            if turn.answer is not None:
                said = self.formatter.tokenizer.decode(turn.answer)
                dialog.append(Message(role="assistant", content=said))
        answered = turns[-1].answer
        waiting = dialog if answered is None else dialog[:-1]
        return self.formatter.encode_dialog_prompt(waiting) + (answered or [])

    def forget(self, length: int) -> int:
        """Forget the oldest turns, but never the last, until `length` ids hold the rest.

        Returns how many turns were forgotten now.
        """
        before = self.forgotten
        while self.forgotten < len(self.turns) - 1 and len(self.ids()) > length:
            self.forgotten += 1
        return self.forgotten - before

    # ---- files

    def save(self, path: Path) -> None:
        """Write messages as JSON, answers with their ids: a file that was there stays or is
        replaced as a whole."""
        messages: list[dict[str, Any]] = []
        if self.system is not None:
            messages.append({"role": "system", "content": self.system})
        for turn in self.turns:
            messages.append({"role": "user", "content": turn.text})
            if turn.answer is not None:
                content = self.formatter.tokenizer.decode(turn.answer)
                messages.append({"role": "assistant", "content": content, "ids": turn.answer})
        part = path.with_name(path.name + ".part")
        try:
            rows = ",\n".join(json.dumps(message, ensure_ascii=False) for message in messages)
            part.write_text(f'{{"messages": [\n{rows}\n]}}\n', encoding="utf-8", errors="replace")
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)

    def load(self, path: Path) -> None:
        """Read what `save` wrote, or any list of messages of that form.

        Raises OSError or ValueError, and changes nothing, where the file does not hold one. Ids
        that are not those of the text beside them (another tokenizer's) are made anew from it.
        """
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is not the JSON that /save writes: {error}") from None
        messages = data.get("messages") if isinstance(data, dict) else data
        if not isinstance(messages, list):
            raise ValueError(f"{path} holds no list of messages")
        try:
            loaded = self._parse(messages)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        self.set_system(loaded.system)
        self.turns, self.forgotten = loaded.turns, 0

    def _parse(self, messages: Sequence[Any]) -> "Conversation":
        out = Conversation(self.formatter)
        if messages:
            self.formatter.encode_dialog_prompt(
                [_without_ids(each) for each in messages]
            )  # its errors name the message
        if messages and messages[0]["role"] == "system":
            out.set_system(messages[0]["content"])
            messages = messages[1:]
        for index, message in enumerate(messages):
            wanted = ("user", "assistant")[index % 2]
            if message["role"] != wanted:
                raise ValueError(
                    f"message {index} after the system prompt is of {message['role']!r}, and user "
                    "and assistant must take turns"
                )
            if wanted == "user":
                out.add(message["content"])
            else:
                out.turns[-1].answer = self._answer(message)
        return out

    def _answer(self, message: Mapping[str, Any]) -> list[int]:
        tokenizer, ids, text = self.formatter.tokenizer, message.get("ids"), message["content"]

        def usable(i: object) -> bool:
            return type(i) is int and 0 <= i < tokenizer.n_words and i not in tokenizer.stop_tokens

        if isinstance(ids, list) and all(map(usable, ids)) and tokenizer.decode(ids) == text:
            return ids
        return self.formatter.encode_content(text.strip())
