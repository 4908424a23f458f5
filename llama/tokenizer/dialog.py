"""Dialogs: what a message is, who may speak, and which dialogs are none.

Knows neither ids nor templates. A key of a message that no format could say, such as tool_calls, is
refused by name, and a key that means nothing to a model is let pass.
"""

from collections.abc import Mapping, Sequence
from typing import Literal, TypedDict

Role = Literal["system", "user", "assistant", "ipython", "tool"]


class Message(TypedDict):
    """What one side of a dialog says."""

    role: Role
    content: str


Dialog = Sequence[Message]

# Who may speak. "ipython" is how Llama 3.1 writes what a tool answers; "tool" is written so too.
ROLES: dict[Literal["3", "3.1"], tuple[Role, ...]] = {
    "3": ("system", "user", "assistant"),
    "3.1": ("system", "user", "assistant", "ipython", "tool"),
}

# Keys of a message that say something to a model; other keys are notes of whoever keeps the dialog.
_MEANT = (
    "tool_calls", "tool_call_id", "function_call", "name", "tools", "documents",
    "reasoning_content", "reasoning", "thinking",
)  # fmt: skip


def has_more(dialog: object) -> bool:
    """Whether a message has more than a role and a text, so that only a template can say it."""
    messages = dialog if isinstance(dialog, Sequence) else ()
    return any(
        isinstance(message, Mapping)
        and (
            any(value is not None for key, value in message.items() if key not in _TEXT)
            or not isinstance(message.get("content"), str)
        )
        for message in messages
    )


_TEXT = ("role", "content")


def check_messages(dialog: object) -> None:
    """ValueError where `dialog` is not a list, or an empty one."""
    if isinstance(dialog, (str, Mapping)) or not isinstance(dialog, Sequence):
        raise ValueError(f"a dialog is a list of messages, got {type(dialog).__name__}")
    if not dialog:
        raise ValueError("the dialog is empty: it needs at least one message")


def check_dialog(dialog: object, roles: Sequence[Role], first: int = 0) -> None:
    """ValueError where `dialog` is not a list of messages of text alone, naming the index of a
    wrong one, counted from `first`."""
    check_messages(dialog)
    assert isinstance(dialog, Sequence)
    for index, message in enumerate(dialog, start=first):
        at = f"message {index} of the dialog: "
        check_message(message, roles, "role", "content", at=at)
        for key in _MEANT:
            if message.get(key):
                raise ValueError(
                    f"{at}this model's chat format has no place for its key {key!r}: leave it "
                    "out, or say it in the content"
                )


def check_message(message: object, roles: Sequence[Role], *keys: str, at: str = "") -> None:
    """Raise ValueError where `message` lacks one of `keys`, or its role or content is wrong; `at`
    says which message it is."""
    if not isinstance(message, Mapping):
        raise ValueError(f"{at}a message is a dict, got {type(message).__name__}")
    for key in keys:
        if key not in message:
            raise ValueError(f"{at}no {key!r} among its keys {list(message)}")
    check_role(message, roles, at)
    if "content" in keys and not isinstance(message["content"], str):
        raise ValueError(f"{at}content is a str, got {type(message['content']).__name__}")


def check_role(message: Mapping[str, object], roles: Sequence[Role], at: str) -> None:
    """Raise ValueError where the role of a message is unknown."""
    if "role" not in message:
        raise ValueError(f"{at}no 'role' among its keys {list(message)}")
    if message["role"] not in roles:
        known = ", ".join(roles)
        raise ValueError(f"{at}unknown role {message['role']!r}: the roles are {known}")
