"""Chat templates, programs in jinja that come with a model: which is used, and what it makes.

Ours, `ChatFormat`, is used wherever a template says the same; another is rendered. Knows dialogs
and tokenizers, no model. The surprising thing: nothing in a message can become a special token. In
what is rendered, a mark stands at every character of a message with which a special token could
begin, and what has a mark is plain text; only what the template itself writes is looked through.
"""

import re
from itertools import islice
from typing import Any

from llama.llama2 import chat_format
from llama.sandbox import BoundedTemplate
from llama.tokenizer import ROLES, Dialog, DialogFormat, TextTokenizer, Tokenizer, check_dialog

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
_PROBES: tuple[Dialog, ...] = tuple(
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


def choose_format(tokenizer: TextTokenizer, template: str | None) -> DialogFormat:
    """The family's own format where there is no template, or one that says the same; else the
    template.

    Raises ValueError where the template is no template.
    """
    turns = {"<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"}
    known = not isinstance(tokenizer, Tokenizer) or turns <= {*tokenizer.special_tokens}
    if template is None:
        return chat_format(tokenizer) if known else NoFormat(tokenizer)
    theirs = TemplateFormat(tokenizer, template)
    if not known:
        return theirs
    ours = chat_format(tokenizer)
    return ours if all(_same(ours, theirs, probe) for probe in _PROBES) else theirs


def _same(ours: DialogFormat, theirs: DialogFormat, dialog: Dialog) -> bool:
    try:
        return ours.encode_dialog_prompt(dialog) == theirs.encode_dialog_prompt(dialog)
    except ValueError:
        return False


class NoFormat:
    """What stands where a model has no chat template and its tokenizer not Llama 3's turns."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self.tokenizer = tokenizer

    def encode_dialog_prompt(self, dialog: Dialog) -> list[int]:
        raise ValueError("this model has no chat template; use text_completion")


class TemplateFormat:
    """Dialogs to ids by a chat template, as transformers' apply_chat_template renders it."""

    def __init__(self, tokenizer: TextTokenizer, template: str) -> None:
        self.tokenizer = tokenizer
        self.template = template
        try:
            self._program = BoundedTemplate(template)
        except ValueError as error:
            raise ValueError(f"chat template: {error}") from error
        names = sorted(tokenizer.special_tokens, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, names)))
        self._endings = {name[cut:] for name in names for cut in range(1, len(name))}
        self._longest = max(map(len, names))
        first = {name.lstrip()[:1] or name[:1] for name in names}
        # Tags such as </think>, which a template may look for in a message: they stay whole.
        self._tags = frozenset(re.findall(r"</?[a-z_]+>", template))
        places = [*sorted(self._tags), *sorted(first)]
        self._places = re.compile("|".join(map(re.escape, places)))

    def encode_dialog_prompt(self, dialog: Dialog) -> list[int]:
        """Ids of the whole dialog and what the template opens the answer with.

        Raises ValueError naming the index of the message that is wrong, or with what the template
        says against the dialog.
        """
        check_dialog(dialog, ROLES["3.1"])
        marks = self._marks(dialog)
        rendered = self._render(dialog, marks)
        ids: list[int] = []
        at = 0
        for found in self._special.finditer(rendered):
            begins = found[0] in self._tags and rendered.startswith(marks[0], found.start() - 1)
            if begins or (len(found[0]) == 1 and rendered.startswith(marks[1], found.end())):
                continue  # it stands in a message
            ids += self._plain(rendered[at : found.start()], marks)
            ids.append(self.tokenizer.special_tokens[found[0]])
            at = found.end()
        return ids + self._plain(rendered[at:], marks)

    def _plain(self, text: str, marks: str) -> list[int]:
        text = text.replace(marks[0], "").replace(marks[1], "")
        return self.tokenizer.encode(text, bos=False, eos=False)

    def _marks(self, dialog: Dialog) -> str:
        """Two characters for private use that occur nowhere: before a tag, within a name."""
        used = {*self.template, *"".join(self.tokenizer.special_tokens)}
        used.update(*(message["content"] for message in dialog))
        codes = (*range(0xE000, 0xF900), *range(0xF0000, 0xFFFFE))
        return "".join(islice((chr(code) for code in codes if chr(code) not in used), 2))

    def _marked(self, content: str, marks: str) -> str:
        """`content` with a mark wherever a special token could begin or, at its start, go on."""
        start = len(content) - len(content.lstrip())
        core = content[start : start + self._longest]
        ends = any(core[:size] in self._endings for size in range(1, len(core) + 1))
        if ends or (core and any(core.rstrip() in ending for ending in self._endings)):
            content = content[: start + 1] + marks[1] + content[start + 1 :]

        def put(found: re.Match[str]) -> str:
            return marks[0] + found[0] if found[0] in self._tags else found[0] + marks[1]

        return self._places.sub(put, content)

    def _render(self, dialog: Dialog, marks: str) -> str:
        messages: list[dict[str, Any]] = [
            {"role": m["role"], "content": self._marked(m["content"], marks)} for m in dialog
        ]
        names = {number: name for name, number in self.tokenizer.special_tokens.items()}
        values = {
            "messages": messages,
            "add_generation_prompt": True,
            "bos_token": names[self.tokenizer.bos_id],
            "eos_token": names[self.tokenizer.eos_id],
            "tools": None,
            "documents": None,
        }
        size = sum(len(message["content"]) for message in messages)
        try:
            return self._program.render(values, size=size, items=len(messages))
        except ValueError as error:
            raise ValueError(f"chat template: {error}") from error
