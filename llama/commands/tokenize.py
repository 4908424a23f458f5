"""`tokenize`: a text as token ids and back, by a tokenizer alone; no weights are needed."""

import json as json_format
import re
from pathlib import Path

from llama.checkpoint import open_checkpoint
from llama.checkpoint.gguf.read import find_gguf, is_gguf
from llama.commands.common import DEMO, given_text
from llama.terminal.arguments import as_json
from llama.text.choose import open_tokenizer
from llama.tokenizer.protocols import TextTokenizer


def tokenize(
    ckpt_dir: str = DEMO,
    text: str | None = None,
    *,
    tokenizer_path: str | None = None,
    file: str | None = None,
    bos: bool = False,
    decode: str | None = None,
    json: bool = False,
) -> None:
    """Show the token ids of a text, or the text of token ids.

    One word by position is the text; of two, the first is the folder.

        python -m llama tokenize "The capital of Italy"
        python -m llama tokenize Meta-Llama-3-8B-Instruct "The capital of Italy" --bos
        python -m llama tokenize --decode "791 6864"

    Args:
        ckpt_dir: folder with tokenizer.model or tokenizer.json, or a .gguf file.
        text: as it is; without it, --file and --decode, or as -, standard input is read, to its
            last byte.
        file: read the text from here.
        bos: begin with the begin-of-text token.
        decode: ids, with blanks or commas between them, whose text is printed.
    """
    tokenizer = tokenizer_alone(ckpt_dir, tokenizer_path)
    if decode is not None:
        if text is not None or file is not None:
            raise ValueError("give either a text or --decode")
        ids = _ids(decode)
        whole = tokenizer.decode(ids)
    else:
        whole = given_text(text, file)
        ids = tokenizer.encode(whole, bos=bos, eos=False)
    special = {number: name for name, number in tokenizer.special_tokens.items()}
    pieces = [
        special.get(i) or tokenizer.token_bytes(i).decode("utf-8", "backslashreplace") for i in ids
    ]
    if json:
        found = {"text": whole, "count": len(ids), "ids": ids, "pieces": pieces}
        print(as_json(found))
    elif decode is not None:
        print(whole)
    else:
        for number, piece in zip(ids, pieces, strict=True):
            print(f"{number:7}  {json_format.dumps(piece, ensure_ascii=False)}")


def tokenizer_alone(ckpt_dir: str, tokenizer_path: str | None = None) -> TextTokenizer:
    """The tokenizer at the path, or that of a folder or a .gguf file, which need hold no weights.

    Raises FileNotFoundError where there is none.
    """
    if tokenizer_path is not None:
        return open_tokenizer(tokenizer_path)
    path = Path(ckpt_dir)
    names = ["tokenizer.json", "tokenizer.model", "original/tokenizer.model"]
    if any(path.glob("consolidated.*.pth")):
        names = [*names[1:], names[0]]
    if path.is_file():
        inside = is_gguf(path)
    else:
        inside = path.is_dir() and not any((path / name).is_file() for name in names)
        inside = inside and find_gguf(path) is not None
    if inside:
        found = open_checkpoint(ckpt_dir).open_tokenizer()
        if found is not None:
            return found
        raise FileNotFoundError(f"no tokenizer in {ckpt_dir}; give tokenizer_path")
    for name in names:
        if (Path(ckpt_dir) / name).is_file():
            return open_tokenizer(Path(ckpt_dir) / name)
    raise FileNotFoundError(f"no tokenizer.model in {ckpt_dir}; give tokenizer_path")


def _ids(text: str) -> list[int]:
    words = re.findall(r"[^\s,\[\]]+", text)
    wrong = [word for word in words if not word.isdecimal()]
    if wrong:
        raise ValueError(f"--decode has {wrong[0]!r}; it must be token ids, as in 1,2 or 1 2")
    return [int(word) for word in words]
