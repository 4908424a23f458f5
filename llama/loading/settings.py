"""What somebody asks a model to run with, checked: limits, dtype, and a tokenizer that fits.

Refuses to know how a model is read or run: from options to values, or to a ValueError that says
what would work. The surprising thing: nothing is allocated here, so programs can check first.
"""

from dataclasses import replace

import torch

from llama.args import ModelArgs
from llama.sampling import plain_number
from llama.tokenizer.protocols import TextTokenizer, spare_rows

CHUNK_ROWS = 2048  # tokens of a step at most: they fill a GPU, and take little memory
DEFAULT_SEQ_LEN = 8192
FEW_ROWS = 256  # of a vocabulary that no token has, however many there are


def with_limits(args: ModelArgs, max_batch_size: int, max_seq_len: int | None) -> ModelArgs:
    """`args` with the limits of a run; ValueError where they do not fit the model."""
    max_batch_size, max_seq_len = plain_number(max_batch_size), plain_number(max_seq_len)
    for name, value in (("max_batch_size", max_batch_size), ("max_seq_len", max_seq_len)):
        if value is not None and (
            isinstance(value, bool) or not isinstance(value, int) or value < 1
        ):
            raise ValueError(f"{name}={value!r}: must be a positive whole number")
    if max_seq_len is None:
        max_seq_len = min(args.context_length, DEFAULT_SEQ_LEN)
    if max_seq_len > args.context_length:
        raise ValueError(
            f"max_seq_len={max_seq_len}: the model's context is {args.context_length} tokens"
        )
    return replace(args, max_batch_size=max_batch_size, max_seq_len=max_seq_len)


def check_vocabulary(tokenizer: TextTokenizer, args: ModelArgs, path: object) -> None:
    """ValueError where tokenizer and model cannot belong together.

    A model may have more rows than its tokenizer has tokens, since none of them is ever chosen: a
    few, or as many as `spare_rows` says where they, or all rows, are a multiple of 8. A file of
    ranks that was cut short leaves any number, and other ids to the special tokens behind them.
    Where the files say which special token has which id, there may be any number of rows more; and
    the tokenizer may have added words without a row, which then cannot be used.
    """
    words, spare = tokenizer.n_words, args.vocab_size - tokenizer.n_words
    padded = spare % 8 == 0 or args.vocab_size % 8 == 0
    most = spare_rows(words) if padded else min(FEW_ROWS, words // 64)
    over = {*range(args.vocab_size, words)}
    if tokenizer.stated:
        most = max(16384, words)
        over -= {word.id for word in tokenizer.added}
    if over or spare > most:
        raise ValueError(
            f"{path}: the tokenizer has {tokenizer.n_words} tokens and the model "
            f"{args.vocab_size}: they belong to different models"
        )


def as_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """A dtype from its name, also from the short ones f32, bf16 and f16; ValueError for one that
    models are not run in."""
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    short = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
    if dtype is None or dtype in known.values():
        return dtype  # type: ignore[return-value]
    if str(dtype) not in known | short:
        raise ValueError(f"dtype={dtype!r}: use one of {', '.join(known)}")
    return (known | short)[str(dtype)]


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype, such as "bfloat16", which `as_dtype` turns back into it."""
    return str(dtype).removeprefix("torch.")
