"""Text to token ids and back for Llama 3 and later, and the chat format around them.

Knows ranks files, special tokens and the turns of a dialog; refuses to know models, tensors and
sampling.

The surprising thing: a special token never comes out of text unless the caller allows it by name.
`<|eot_id|>` in a user's message is encoded as the ten characters it is: no text can forge a turn.
"""

import base64
import binascii
import codecs
import operator
import os
import re
import stat
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from itertools import count
from typing import Literal, TypedDict, get_args

import tiktoken
from tiktoken.load import read_file

Role = Literal["system", "user", "assistant"]


class Message(TypedDict):
    role: Role
    content: str


Dialog = Sequence[Message]

Version = Literal["3", "3.1"]

# Offsets after the last rank. The other places of the 256 are reserved tokens, counted from 0.
_NAMED_SPECIAL_TOKENS: dict[Version, dict[int, str]] = {
    "3": {
        0: "<|begin_of_text|>",
        1: "<|end_of_text|>",
        6: "<|start_header_id|>",
        7: "<|end_header_id|>",
        9: "<|eot_id|>",
    },
    "3.1": {
        0: "<|begin_of_text|>",
        1: "<|end_of_text|>",
        4: "<|finetune_right_pad_id|>",
        6: "<|start_header_id|>",
        7: "<|end_header_id|>",
        8: "<|eom_id|>",
        9: "<|eot_id|>",
        10: "<|python_tag|>",
    },
}
_STOP_OFFSETS = (1, 8, 9)  # end_of_text, eom, eot: by place, since Llama 3 has no name for eom

# The BPE of one piece is superlinear in its length, and the pattern backtracks over runs of spaces.
# The cuts are part of the encoding (ids differ without them): they are those of Meta's code.
_MAX_CHARS = 400_000
_MAX_RUN = 25_000

_LARGEST_FILE = 2**24  # bytes; Meta's has 2,183,982

_PATTERN = "|".join(
    (
        r"(?i:'(?:[sdmt]|ll|ve|re))",  # contractions, in either case
        r"[^\r\n\p{L}\p{N}]?\p{L}+",  # letters, with one space or sign before them
        r"\p{N}{1,3}",  # digits, by up to three
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",  # punctuation, with a space before and line ends after
        r"\s*[\r\n]+",  # line ends, with the white space before them
        r"\s+(?!\S)",  # white space, but for its last character where a word follows
        r"\s+",
    )
)


class Tokenizer:
    """A ranks file (tiktoken's format) and the 256 special tokens that follow its ranks.

    `version` says which names the special tokens have: "3.1" (Llama 3.1, 3.2, 3.3) adds
    finetune_right_pad_id, eom_id and python_tag and counts the reserved ones anew. Names only:
    ids, bos_id, eos_id and stop_tokens do not depend on it, for the file is the same.
    """

    special_tokens: dict[str, int]
    num_reserved_special_tokens = 256
    pat_str = _PATTERN

    def __init__(self, model_path: str | os.PathLike[str], *, version: Version = "3") -> None:
        """Read `model_path`: a local path, an http(s) URL or a bucket that blobfile opens.

        Raises FileNotFoundError naming the path, and ValueError naming file, line and cause where
        the file is not a ranks file.
        """
        if version not in _NAMED_SPECIAL_TOKENS:
            known = ", ".join(repr(name) for name in _NAMED_SPECIAL_TOKENS)
            raise ValueError(f"unknown tokenizer version {version!r}: use one of {known}")
        path = os.fspath(model_path)
        ranks = _parse_ranks(_read(path), path)
        self.special_tokens = _special_tokens(len(ranks), self.num_reserved_special_tokens, version)
        self.model = tiktoken.Encoding(
            name=os.path.basename(path),
            pat_str=self.pat_str,
            mergeable_ranks=ranks,
            special_tokens=self.special_tokens,
        )
        self.n_words: int = self.model.n_vocab
        self.bos_id: int = self.special_tokens["<|begin_of_text|>"]
        self.eos_id: int = self.special_tokens["<|end_of_text|>"]
        self.pad_id: int = -1
        self.stop_tokens: set[int] = {len(ranks) + offset for offset in _STOP_OFFSETS}

    def encode(
        self,
        s: str,
        *,
        bos: bool,
        eos: bool,
        allowed_special: Literal["all"] | AbstractSet[str] = frozenset(),
        disallowed_special: Literal["all"] | Collection[str] = (),
    ) -> list[int]:
        """Ids of `s`, with bos_id before and eos_id after it where asked for.

        Names in `allowed_special` ("all" for all) become special tokens where `s` has them; names
        in `disallowed_special` raise ValueError where `s` has them; any other is plain text.
        """
        if not isinstance(s, str):
            raise ValueError(f"encode takes one str, got {type(s).__name__}")
        allowed = self._allowed(allowed_special)
        if isinstance(disallowed_special, str) and disallowed_special != "all":
            raise ValueError(
                f"disallowed_special is 'all' or a collection of names, got {disallowed_special!r}"
            )
        ids = [self.bos_id] if bos else []
        for piece in _pieces(s):
            ids += self.model.encode(
                piece, allowed_special=allowed, disallowed_special=disallowed_special
            )
        if eos:
            ids.append(self.eos_id)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`: special tokens as their names, invalid UTF-8 as U+FFFD.

        Raises ValueError for an id outside 0 .. n_words - 1, pad_id among them.
        """
        return self.model.decode([self._check_id(token) for token in ids])

    def token_bytes(self, token: int) -> bytes:
        """The bytes that one id stands for; a character may need those of several ids."""
        return self.model.decode_single_token_bytes(self._check_id(token))

    def _check_id(self, token: int) -> int:
        try:
            index = operator.index(token)
        except TypeError:
            raise ValueError(
                f"a token id is an integer, got {token!r} of type {type(token).__name__}"
            ) from None
        if not 0 <= index < self.n_words:
            pad = " (-1 is padding and has no text)" if index == self.pad_id else ""
            raise ValueError(
                f"token id {index} is outside the vocabulary, 0 to {self.n_words - 1}{pad}"
            )
        return index

    def _allowed(self, names: Literal["all"] | AbstractSet[str]) -> AbstractSet[str]:
        if names == "all":
            return set(self.special_tokens)
        if isinstance(names, str):
            raise ValueError(f"allowed_special is 'all' or a set of names, got {names!r}")
        unknown = sorted(set(names) - self.special_tokens.keys())
        if unknown:
            raise ValueError(
                f"allowed_special names {unknown}, which this tokenizer does not have: "
                "the names that work are the keys of special_tokens"
            )
        return set(names)


class IncrementalDecoder:
    """Ids to text one at a time, without breaking a character.

    The pieces of `push` and the last `flush`, joined, are `tokenizer.decode` of all ids.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """What `token` completes; bytes of an unfinished character are held back."""
        return self._utf8.decode(self._tokenizer.token_bytes(token))

    def flush(self) -> str:
        """What is held back, as U+FFFD. The decoder is then as new."""
        return self._utf8.decode(b"", final=True)


class ChatFormat:
    """Dialogs to ids, as Llama 3 Instruct and later were trained on them."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    def encode_header(self, message: Message) -> list[int]:
        _check_message(message, "role")
        special = self.tokenizer.special_tokens
        return [
            special["<|start_header_id|>"],
            *self.tokenizer.encode(message["role"], bos=False, eos=False),
            special["<|end_header_id|>"],
            *self.tokenizer.encode("\n\n", bos=False, eos=False),
        ]

    def encode_message(self, message: Message) -> list[int]:
        _check_message(message, "role", "content")
        return [
            *self.encode_header(message),
            *self.tokenizer.encode(message["content"].strip(), bos=False, eos=False),
            self.tokenizer.special_tokens["<|eot_id|>"],
        ]

    def encode_dialog_prompt(self, dialog: Dialog) -> list[int]:
        """Ids of the whole dialog, then the open header of the assistant's answer.

        Raises ValueError naming the index of the message that is wrong, before anything is encoded.
        """
        if isinstance(dialog, (str, Mapping)) or not isinstance(dialog, Sequence):
            raise ValueError(f"a dialog is a list of messages, got {type(dialog).__name__}")
        if not dialog:
            raise ValueError("the dialog is empty: it needs at least one message")
        for index, message in enumerate(dialog):
            _check_message(message, "role", "content", where=f"message {index} of the dialog: ")
        ids = [self.tokenizer.bos_id]
        for message in dialog:
            ids += self.encode_message(message)
        return ids + self.encode_header({"role": "assistant", "content": ""})


def _check_message(message: object, *keys: str, where: str = "") -> None:
    if not isinstance(message, Mapping):
        raise ValueError(f"{where}a message is a dict, got {type(message).__name__}")
    for key in keys:
        if key not in message:
            raise ValueError(f"{where}no {key!r} among its keys {list(message)}")
    if message["role"] not in get_args(Role):
        roles = ", ".join(get_args(Role))
        raise ValueError(f"{where}unknown role {message['role']!r}: the roles are {roles}")
    if "content" in keys and not isinstance(message["content"], str):
        raise ValueError(f"{where}content is a str, got {type(message['content']).__name__}")


def _special_tokens(n_ranks: int, n_special: int, version: Version) -> dict[str, int]:
    named, reserved = _NAMED_SPECIAL_TOKENS[version], count()
    names = [
        named.get(offset) or f"<|reserved_special_token_{next(reserved)}|>"
        for offset in range(n_special)
    ]
    return {name: n_ranks + offset for offset, name in enumerate(names)}


def _pieces(s: str, max_chars: int = _MAX_CHARS, max_run: int = _MAX_RUN) -> Iterator[str]:
    """`s` in the parts that are encoded each on its own; joined they are `s` again.

    Parts end at every `max_chars` characters, and inside of those at every `max_run` characters of
    a run of white space, or of anything but white space.
    """
    for start in range(0, len(s), max_chars):
        block = s[start : start + max_chars]
        cut = 0
        if len(block) > max_run:
            for run in re.finditer(r"\s+|\S+", block):
                for end in range(run.start() + max_run, run.end(), max_run):
                    yield block[cut:end]
                    cut = end
        yield block[cut:]


def _read(path: str) -> bytes:
    try:
        if "://" not in path:
            _check_file(path)
        return read_file(path)
    except ValueError:
        raise
    except Exception as error:  # blobfile's errors are of no kind, and requests' are OSErrors
        # requests' error for a page that is not there is an OSError with the server's answer
        status = getattr(getattr(error, "response", None), "status_code", None)
        if isinstance(error, FileNotFoundError) or status == 404:
            raise FileNotFoundError(f"no tokenizer file at {path}") from None
        why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ValueError(f"{path}: cannot be read: {why:.200}") from error


def _check_file(path: str) -> None:
    """ValueError for what reading would wait for, or would fill the memory with."""
    status = os.stat(path)
    if stat.S_ISDIR(status.st_mode):
        raise ValueError(f"{path} is a directory: give the path of the tokenizer.model in it")
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{path} is not a file but a device or a pipe")
    if status.st_size > _LARGEST_FILE:
        raise ValueError(f"{path} has {status.st_size} bytes, which no tokenizer has")


def _parse_ranks(data: bytes, path: str) -> dict[bytes, int]:
    """Ranks by token from lines `base64 rank`; the ranks are 0 .. n - 1, in any order of lines."""
    _check_not_another_format(data, path)
    ranks: dict[bytes, int] = {}
    line_of: dict[int, int] = {}  # of a rank
    for number, line in enumerate(data.split(b"\n"), start=1):
        if not line.strip():
            continue
        words = line.split()
        if len(words) != 2 or not words[1].isdigit() or len(words[1]) > 9:
            raise ValueError(f"{path}, line {number}: not `base64 rank`: {_shown(line)}")
        try:
            token, rank = base64.b64decode(words[0], validate=True), int(words[1])
        except binascii.Error:
            raise ValueError(f"{path}, line {number}: bad base64: {_shown(line)}") from None
        if rank in line_of:
            raise ValueError(
                f"{path}, line {number}: duplicate rank {rank}, also on line {line_of[rank]}"
            )
        if token in ranks:
            raise ValueError(
                f"{path}, line {number}: duplicate token {token!r}, "
                f"also on line {line_of[ranks[token]]}"
            )
        ranks[token] = rank
        line_of[rank] = number
    _check_complete(ranks, line_of, path)
    return ranks


def _shown(line: bytes) -> str:
    return repr(line[:40])[1:] + ("..." if len(line) > 40 else "")


def _check_complete(ranks: dict[bytes, int], line_of: dict[int, int], path: str) -> None:
    for expected, rank in enumerate(sorted(line_of)):
        if rank != expected:
            raise ValueError(
                f"{path}, line {line_of[rank]}: gap in the ranks: rank {rank}, "
                f"but no line has rank {expected}"
            )
    for byte in range(256):
        if bytes([byte]) not in ranks:
            raise ValueError(
                f"{path}: none of its {len(ranks)} lines has the single byte 0x{byte:02x}, "
                "so not every text could be encoded: the file is cut short, or no ranks file"
            )


def _check_not_another_format(data: bytes, path: str) -> None:
    head = data[:512].lstrip()
    cause = None
    if not data.strip():
        cause = "the file is empty"
    elif data.startswith(b"\n") and b"<unk>" in data[:64]:
        cause = (
            "this is a SentencePiece model: tokenizers of Llama 1 and 2 are not supported "
            "by this class"
        )
    elif head.startswith(b"<"):
        cause = "this is an HTML page, perhaps of a login or an error: download the file again"
    elif head.startswith(b"version https://git-lfs"):
        cause = "this is a git-lfs pointer: fetch the file that it stands for (git lfs pull)"
    elif head.startswith(b"{"):
        cause = "this is JSON: give Meta's tokenizer.model, not a tokenizer.json"
    if cause is not None:
        raise ValueError(f"{path}, line 1: {cause}")
