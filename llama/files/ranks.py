"""The ranks file of Llama 3's tokenizer (tiktoken's format), read and checked.

Knows bytes and lines, and how other files look that people give instead; refuses to know what the
ranks are for. The surprising thing: the lines may come in any order, but not one may be missing,
for a gap would shift every special token.
"""

import base64
import binascii
import os

from tiktoken.load import read_file

from llama.files.plain import check_file

_LARGEST_FILE = 2**24  # bytes; Meta's has 2,183,982


def read_bytes(path: str) -> bytes:
    """Read a tokenizer file: a local path, an http(s) URL or a bucket that blobfile opens."""
    try:
        if "://" not in path:
            os.stat(path)  # raises where nothing is there, also behind a link
            if os.path.isdir(path):
                raise ValueError(
                    f"{path} is a directory: give the path of the tokenizer.model in it"
                )
            check_file(path, _LARGEST_FILE)
        return read_file(path)
    except ValueError:
        raise
    except Exception as error:  # blobfile's errors have no common class, and requests' are OSErrors
        # requests' error for a page that is not there is an OSError with the server's answer
        status = getattr(getattr(error, "response", None), "status_code", None)
        if isinstance(error, FileNotFoundError) or status == 404:
            raise FileNotFoundError(f"no tokenizer file at {path}") from None
        why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ValueError(f"{path}: cannot be read: {why:.200}") from error


def parse_ranks(data: bytes, path: str) -> dict[bytes, int]:
    """Read ranks by token from lines `base64 rank`; the ranks are 0 .. n - 1, in any order."""
    _check_not_another_format(data, path)
    ranks: dict[bytes, int] = {}
    line_of: dict[int, int] = {}  # by rank
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


def is_sentencepiece(data: bytes) -> bool:
    """Whether a tokenizer file is a SentencePiece model, by how it begins."""
    return data.startswith(b"\n") and b"<unk>" in data[:64]


def _check_not_another_format(data: bytes, path: str) -> None:
    head = data[:512].lstrip()
    cause = None
    if not data.strip():
        cause = "the file is empty"
    elif is_sentencepiece(data):
        cause = "this is a SentencePiece model, of Llama 1 and 2: open_tokenizer reads either kind"
    elif head.startswith(b"<"):
        cause = "this is an HTML page, perhaps of a login or an error: download the file again"
    elif head.startswith(b"version https://git-lfs"):
        cause = "this is a git-lfs pointer: fetch the file that it stands for (git lfs pull)"
    elif head.startswith(b"GGUF"):
        cause = "this is a GGUF file: give it as ckpt_dir, its tokenizer is inside"
    elif head.startswith(b"{"):
        cause = "this is JSON: give Meta's tokenizer.model, not a tokenizer.json"
    if cause is not None:
        raise ValueError(f"{path}, line 1: {cause}")
