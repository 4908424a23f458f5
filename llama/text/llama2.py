"""The chat format of Llama 2: [INST] around what the user says, <<SYS>> around the system prompt.

Refuses to know models, tensors and files. The surprising thing: the format writes its tags as plain
text, so that a message could forge another one; a dialog that has a tag in it is answered with a
refusal, as in Meta's code.
"""

from llama.tokenizer.dialog import Dialog, check_dialog, has_more
from llama.tokenizer.protocols import DialogFormat, TextTokenizer, control_words

# Text that has one of these could forge a message, for the format writes them as plain text.
TAGS = ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>")
REFUSAL = "Error: special tags are not allowed as part of the prompt."


class RefusedDialog(ValueError):
    """A dialog that is not run; the message is its answer."""


class Llama2ChatFormat:
    """Dialogs to ids, as Llama 2 Chat was trained on them.

    An optional system message comes first and is folded into the user's first one; user and
    assistant alternate; the user has the last word.
    """

    def __init__(self, tokenizer: TextTokenizer, template: DialogFormat | None = None) -> None:
        self.tokenizer = tokenizer
        self.template = template
        self._control = control_words(tokenizer)

    def encode_content(self, text: str) -> list[int]:
        """Ids of the text of a message, or of a part of it."""
        return self.tokenizer.encode_plain(text, self._control)

    def encode_dialog_prompt(self, dialog: Dialog) -> list[int]:
        """Ids of the whole dialog, up to where the assistant's answer begins.

        Raises ValueError naming the index of the message that is wrong, and RefusedDialog where a
        message has one of the tags.
        """
        if self.template is not None and has_more(dialog):
            return self.template.encode_dialog_prompt(dialog)
        check_dialog(dialog, ("system", "user", "assistant"))
        system = dialog[0]["role"] == "system"
        for index, message in enumerate(dialog[system:]):
            wanted = ("user", "assistant")[index % 2]
            if message["role"] != wanted:
                raise ValueError(
                    f"message {index + system} of the dialog: {message['role']!r} where {wanted!r} "
                    "belongs: after an optional system message, user and assistant alternate"
                )
        if dialog[-1]["role"] != "user":
            raise ValueError(
                f"the dialog ends with {dialog[-1]['role']!r}: the last message is the user's"
            )
        if any(tag in message["content"] for message in dialog for tag in TAGS):
            raise RefusedDialog(REFUSAL)
        texts = [message["content"] for message in dialog[system:]]
        if system:
            texts[0] = f"<<SYS>>\n{dialog[0]['content']}\n<</SYS>>\n\n{texts[0]}"
        texts = [text.strip() for text in texts]
        begin = self.tokenizer.prefix
        ids = []
        for asked, answered in zip(texts[::2], texts[1::2], strict=False):
            text = f"[INST] {asked} [/INST] {answered} "
            ids += [*begin, *self.encode_content(text), self.tokenizer.eos_id]
        return [*ids, *begin, *self.encode_content(f"[INST] {texts[-1]} [/INST]")]
