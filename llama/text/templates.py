"""Chat templates, programs in jinja that come with a model, rendered and encoded.

Knows dialogs and tokenizers, no model. The surprising thing: nothing in a message can become a
control word, and there this library differs from transformers on purpose. Control words are special
tokens, and added words that the template writes or that end a message, special or not. In what is
rendered, a mark stands at every character of a message with which one could begin, and a control
word that has a mark in it is plain text. Other added words are their own tokens, in messages as
anywhere.
"""

import re
from bisect import bisect_left, bisect_right
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from llama.text.sandbox import MARKS, BoundedTemplate
from llama.tokenizer.added import AddedToken
from llama.tokenizer.dialog import ROLES, Dialog, check_dialog, check_messages, check_role, has_more
from llama.tokenizer.protocols import TextTokenizer, control_words

LLAMA3_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{{ message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    "{% endif %}"
)

# Whether two formats say the same is asked with these. White space around a text shows what is
# stripped, and each role comes first, in the middle and last.
_TEXTS = (" \n What is 2 + 2?\t\n", "Be brief.\n", "  4", "Und wörtlich?\n\n  »Vier« 🙂", "A" * 100)
PROBES: tuple[Dialog, ...] = tuple(
    [
        {"role": role, "content": _TEXTS[(index + shift) % len(_TEXTS)]}  # type: ignore[typeddict-item]
        for index, role in enumerate(roles)
    ]
    for shift, roles in enumerate(
        (
            ["user"],
            ["system", "user"],
            ["user", "assistant", "user"],
            ["system", "user", "assistant", "user", "assistant", "user"],
            ["user", "assistant"],
            ["user", "system", "user"],
            ["assistant", "user"],
        )
    )
)


class TemplateFormat:
    """Dialogs to ids by a chat template, as transformers' apply_chat_template renders it.

    Messages may have other keys than role and content, such as tool_calls, name and tool_call_id:
    all of them reach the template.
    """

    def __init__(
        self, tokenizer: TextTokenizer, template: str, stop_token_ids: Collection[int] = ()
    ) -> None:
        self.tokenizer = tokenizer
        self.template = template
        try:
            self._program = BoundedTemplate(template)
        except ValueError as error:
            raise ValueError(f"chat template: {error}") from error
        self.control = control_words(tokenizer) | {
            word.content
            for word in tokenizer.added
            if word.special or word.id in stop_token_ids or word.content in template
        }
        self._look_for(self.control)
        rest = frozenset(word.content for word in tokenizer.added) - self.control
        if rest:  # what the template puts together from parts, it shows where it is tried
            self.control |= self._written(rest)
            self._look_for(self.control)

    def _look_for(self, control: Collection[str]) -> None:
        """Learn where in a message a control word could begin or go on."""
        self._endings = {name[cut:] for name in control for cut in range(1, len(name))}
        self._longest = max(map(len, control), default=0)
        first = {name.lstrip()[:1] or name[:1] for name in control}
        # Tags such as </think>, which a template may look for in a message: they stay whole.
        self._tags = frozenset(re.findall(r"</?[a-z_]+>", self.template))
        # And names such as 'text', which it compares a message's values with.
        names = re.findall(r"""(['"])(\w+)\1""", self.template)
        self._names = frozenset(name for _, name in names) - {*control}
        marked = [*sorted(self._tags), *sorted(first)]
        self._to_mark = re.compile("|".join(map(re.escape, marked)) or r"(?!)")

    def _written(self, words: Collection[str]) -> set[str]:
        """Those of some words that the template writes for dialogs that have none of them."""
        found: set[str] = set()
        for probe in PROBES:
            try:
                rendered = self._render(probe, self._marks(probe))
            except ValueError:
                continue
            plain = _unmarked(rendered, self._marks(probe))[0]
            found.update(word for word in words if word in plain)
        return {word for word in found if not any(word in text for text in _TEXTS)}

    def encode_content(self, text: str) -> list[int]:
        """Ids of the text of a message."""
        return self.tokenizer.encode_plain(text, self.control)

    def encode_dialog_prompt(
        self,
        dialog: Dialog,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[int]:
        """Ids of the whole dialog and what the template opens the answer with.

        `tools` and `documents` are what the template calls so. Raises ValueError naming the index
        of the message that is wrong, or with what the template says against the dialog.
        """
        _check_messages(dialog)
        given = {"tools": tools, "documents": documents}
        marks = self._marks([dialog, given])
        text, before, after = _unmarked(self._render(dialog, marks, **given), marks)

        def allows(word: AddedToken, start: int, stop: int) -> bool:
            if word.content not in self.control:
                return True
            # a mark before the word, or between its letters, or after the last: it is a message's
            at = bisect_left(before, start), bisect_right(after, start)
            inside = before[at[0] : at[0] + 1], after[at[1] : at[1] + 1]
            return not (any(p < stop for p in inside[0]) or any(p <= stop for p in inside[1]))

        return self.tokenizer.encode_rendered(text, self.control, allows)

    def _marks(self, given: object) -> str:
        """Two characters that occur nowhere: before a tag, within a name."""
        used = {*self.template, *"".join(self.control)}.union(*_strings(given))
        return "".join(islice((c for c in map(chr, MARKS) if c not in used), 2))

    def _marked(self, content: str, marks: str) -> str:
        """`content` with a mark wherever a control word could begin or, at its start, go on."""
        start = len(content) - len(content.lstrip())
        core = content[start : start + self._longest]
        ends = any(core[:size] in self._endings for size in range(1, len(core) + 1))
        if ends or (core and any(core.rstrip() in ending for ending in self._endings)):
            content = content[: start + 1] + marks[1] + content[start + 1 :]

        def put(found: re.Match[str]) -> str:
            return marks[0] + found[0] if found[0] in self._tags else found[0] + marks[1]

        return self._to_mark.sub(put, content)

    def _all_marked(self, value: Any, marks: str, of: str = "") -> Any:
        """Plain values with marks in every text, but for names: keys, and what is `of` a key and
        written in the template, such as a type that it asks for."""
        if isinstance(value, str):
            named = value in self._names and of not in ("", "content", "text")
            return value if named else self._marked(str(value), marks)
        if isinstance(value, Mapping):
            return {
                key if key.isidentifier() else self._marked(key, marks): self._all_marked(
                    v, marks, key
                )
                for key, v in ((str(key), v) for key, v in value.items())
            }
        if isinstance(value, (list, tuple)):
            return [self._all_marked(each, marks, of) for each in value]
        return value

    def _render(
        self,
        dialog: Dialog,
        marks: str,
        *,
        tools: object = None,
        documents: object = None,
    ) -> str:
        messages = []
        for message in dialog:
            said = {key: v for key, v in _reasoned(message).items() if v is not None}
            role = said.pop("role")
            messages.append({"role": role, **self._all_marked(said, marks)})
        values = {
            **self.tokenizer.names,
            "messages": messages,
            "add_generation_prompt": True,
            "tools": self._all_marked(tools, marks),
            "documents": self._all_marked(documents, marks),
        }
        texts = [*_strings([messages, values["tools"], values["documents"]])]
        try:
            return self._program.render(values, size=sum(map(len, texts)), items=len(texts))
        except ValueError as error:
            raise ValueError(f"chat template: {error}") from error


def _check_messages(dialog: object) -> None:
    """ValueError where `dialog` is not a list of messages that a template may be given."""
    check_messages(dialog)
    assert isinstance(dialog, Sequence)
    for index, message in enumerate(dialog):
        at = f"message {index} of the dialog: "
        said = message.get("content", "") if isinstance(message, Mapping) else ""
        if has_more([message]) and (said is None or isinstance(said, (str, list))):
            check_role(message, ROLES["3.1"], at)
            odd = next((key for key in message if not _is_plain(message[key])), None)
            if odd is None and (said or {*message} - {"role", "content"}):
                continue
            if odd is not None:
                raise ValueError(f"{at}{odd!r} is {message[odd]!r:.60}, which JSON cannot say")
        check_dialog([message], ROLES["3.1"], first=index)


def _is_plain(value: object) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and _is_plain(each) for key, each in value.items())
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (str, int, float))


def _reasoned(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message whose reasoning has all the names under which templates read it, as transformers
    gives it to them."""
    names = ("reasoning_content", "thinking", "reasoning")
    said = next((message[name] for name in names if message.get(name) is not None), None)
    if said is None:
        return dict(message)
    return {"thinking": said, **message, "reasoning_content": said}


def _strings(value: object) -> Iterator[str]:
    """Every text in plain values, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, each in value.items():
            yield from _strings(key)
            yield from _strings(each)
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _strings(each)


def _unmarked(rendered: str, marks: str) -> tuple[str, list[int], list[int]]:
    """Take the marks out of a text: the text, and the positions in it of each of the two marks."""
    parts: list[str] = []
    positions: tuple[list[int], list[int]] = ([], [])
    at = size = 0
    for found in re.finditer(f"[{marks}]", rendered):
        parts.append(rendered[at : found.start()])
        size += found.start() - at
        positions[marks.index(found[0])].append(size)
        at = found.end()
    return "".join([*parts, rendered[at:]]), *positions
