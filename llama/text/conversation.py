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

from llama.files.new_folder import new_files
from llama.tokenizer import ChatFormat, Message
from llama.tokenizer.protocols import DialogFormat


def _without_ids(message: Any) -> Any:
    """A message as it was said, without the ids that `save` wrote."""
    if not isinstance(message, Mapping):
        return message
    return {key: value for key, value in message.items() if key != "ids"}


@dataclass
class Exchange:
    """A message of the user, and the answer to it."""

    text: str
    message: list[int]  # the ids of the text, from its header to its end
    answer: list[int] | None = None  # ids; None: not answered yet


class Conversation:
    """A system prompt and exchanges, of which the first `forgotten` are kept, but no model sees
    them."""

    def __init__(self, formatter: DialogFormat, system: str | None = None) -> None:
        self.formatter = formatter
        self.exchanges: list[Exchange] = []
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
        """How many ids stand before the first exchange."""
        return len(self._start)

    def add(self, text: str) -> None:
        """A message of the user. It replaces one that was never answered."""
        if self.exchanges and self.exchanges[-1].answer is None:
            self.exchanges.pop()
        said = Message(role="user", content=text)
        form = self.formatter
        self.exchanges.append(
            Exchange(text, form.encode_message(said) if isinstance(form, ChatFormat) else [])
        )
        self.forgotten = min(self.forgotten, len(self.exchanges) - 1)

    def reset(self) -> None:
        """Forget everything that was said; the system prompt stays."""
        self.exchanges.clear()
        self.forgotten = 0

    def ids(self, forgotten: int | None = None) -> list[int]:
        """All that the model sees, with the open header of the last answer where it is awaited.

        `forgotten` exchanges are left out, by default as many as are.
        """
        exchanges = self.exchanges[self.forgotten if forgotten is None else forgotten :]
        if not isinstance(self.formatter, ChatFormat):
            return self._rendered(exchanges)
        header = self.formatter.encode_header({"role": "assistant", "content": ""})
        ids = list(self._start)
        for exchange in exchanges:
            ids += exchange.message + header
            if exchange.answer is not None:
                ids += [*exchange.answer, self.formatter.tokenizer.special_tokens["<|eot_id|>"]]
        return ids

    def _rendered(self, exchanges: Sequence[Exchange]) -> list[int]:
        """Like `ids` by a template: the ids of the last answer as they are, earlier ones as
        text."""
        if not exchanges:
            return list(self._start)
        dialog = [] if self.system is None else [Message(role="system", content=self.system)]
        for exchange in exchanges:
            dialog.append(Message(role="user", content=exchange.text))
            if exchange.answer is not None:
                said = self.formatter.tokenizer.decode(exchange.answer)
                dialog.append(Message(role="assistant", content=said))
        answered = exchanges[-1].answer
        waiting = dialog if answered is None else dialog[:-1]
        return self.formatter.encode_dialog_prompt(waiting) + (answered or [])

    def forget(self, length: int) -> int:
        """Forget the oldest exchanges, but never the last, until `length` ids hold the rest.

        Returns how many exchanges were forgotten now.
        """
        before = self.forgotten
        while self.forgotten < len(self.exchanges) - 1 and len(self.ids()) > length:
            self.forgotten += 1
        return self.forgotten - before

    # ---- files

    def save(self, path: Path) -> None:
        """Write messages as JSON, answers with their ids: a file that was there stays or is
        replaced as a whole."""
        messages: list[dict[str, Any]] = []
        if self.system is not None:
            messages.append({"role": "system", "content": self.system})
        for exchange in self.exchanges:
            messages.append({"role": "user", "content": exchange.text})
            if exchange.answer is not None:
                content = self.formatter.tokenizer.decode(exchange.answer)
                messages.append({"role": "assistant", "content": content, "ids": exchange.answer})
        rows = ",\n".join(json.dumps(message, ensure_ascii=False) for message in messages)
        text = f'{{"messages": [\n{rows}\n]}}\n'
        with new_files(path.parent) as part:
            part(path.name).write_text(text, encoding="utf-8", errors="replace")

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
        self.exchanges, self.forgotten = loaded.exchanges, 0

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
                out.exchanges[-1].answer = self._answer(message)
        return out

    def _answer(self, message: Mapping[str, Any]) -> list[int]:
        tokenizer, ids, text = self.formatter.tokenizer, message.get("ids"), message["content"]

        def usable(i: object) -> bool:
            return type(i) is int and 0 <= i < tokenizer.n_words and i not in tokenizer.stop_tokens

        if isinstance(ids, list) and all(map(usable, ids)) and tokenizer.decode(ids) == text:
            return ids
        return self.formatter.encode_content(text.strip())
