"""What several commands share: the demo, their options in words, and the text that they are given.

Imports no torch, and no command does through it. Refuses to know what is done with any of it.
"""

import os
from collections.abc import Mapping
from pathlib import Path

from llama.terminal.arguments import as_typed, read_text

DEMO = str(Path(__file__).parent.parent / "demo")

# What options mean wherever they are taken; a command's own docstring goes before it.
OPTIONS = {
    "ckpt_dir": "folder of weights, Meta's or Hugging Face's, or a .gguf file.",
    "tokenizer_path": "tokenizer.model or tokenizer.json; by default what lies in ckpt_dir.",
    "device": "cuda, cuda:N, mps or cpu; by default the first of them there is.",
    "dtype": "float32, bfloat16 or float16; the checkpoint's own by default.",
    "quantize": "int8, fp8, int4, mixed, or formats by part of the model, as JSON; as stored by "
    "default.",
    "max_seq_len": "tokens of a sequence, prompt and answer; by default the model's context, at "
    "most 8192 of it.",
    "max_batch_size": "sequences that run at one time.",
    "max_gen_len": "new tokens at most; None: all that there is room for.",
    "temperature": "0 takes the most probable token, more is more varied.",
    "top_p": "the share of probability that tokens are sampled from.",
    "seed": "another number gives another answer.",
    "json": "print one JSON object, for a program.",
    "text_file": "the text, in UTF-8.",
    "window": "tokens that the model sees at one time, begin-of-text among them; by default 2048, "
    "or the model's context where that is shorter.",
    "stride": "tokens by which the window moves on; by default half a window. Each token is scored "
    "once, after at least window - 1 - stride others (but for the first window's).",
    "dst": "a new folder; nothing of that name stands there before everything is whole.",
    "shards": "how many files.",
}


def is_first_process() -> bool:
    """Whether this is the one process that acts where several of torchrun have no use."""
    rank = os.environ.get("RANK", "0")
    if not rank.isdecimal():
        raise ValueError(f"the environment says RANK={rank!r:.40}, no whole number: unset it")
    return int(rank) == 0


def say(rows: Mapping[str, str]) -> None:
    """Print rows by their titles."""
    for title, words in rows.items():
        print(f"{title:15}  {words}")


def positive(number: int | None, name: str) -> int | None:
    """ValueError below 0; 0 means None, as in Meta's code."""
    if number is not None and number < 0:
        raise ValueError(f"--{name} is {number}; it must be a whole number above 0, or None")
    return number or None


def given_text(text: str | None, file: str | None) -> str:
    """The text as it was typed, or that of the file, or of standard input."""
    if text is not None and file is not None:
        raise ValueError("give either a text or --file")
    if text is None or text == "-":
        return read_text(file)
    return as_typed(text, "the text")
