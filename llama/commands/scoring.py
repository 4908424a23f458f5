"""How well a model expects a text: negative log likelihood by sliding windows, and what follows.

What `perplexity` and `compare` share. Scores through the engine and keeps sums only, so memory does
not grow with the text. Refuses to know how several models compare. The surprising thing: every
window begins with the begin-of-text token, wherever in the text it lies, since a model has never
seen a beginning without it; unless its tokenizer has none.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import NamedTuple

from llama.args import ModelArgs
from llama.checkpoint import open_checkpoint
from llama.generation import Llama
from llama.loading.settings import CHUNK_ROWS
from llama.terminal.arguments import read_text
from llama.terminal.progress import progress


class Task(NamedTuple):
    """A text to score by one or several models, and how."""

    text: str
    args: ModelArgs  # of the model in ckpt_dir
    window: int
    stride: int
    build: Callable[..., Llama]  # of a folder, and quantize=


def task(
    ckpt_dir: str,
    text_file: str,
    *,
    tokenizer_path: str | None,
    window: int | None,
    stride: int | None,
    device: str | None,
    dtype: str | None,
    against: str | None = None,
) -> Task:
    """What the commands are asked for, checked before a model is built. `against` is the folder of
    another model, whose context may be the shorter one."""
    text = read_text(text_file)
    args = open_checkpoint(ckpt_dir).args
    context = args.context_length
    if against is not None:
        context = min(context, open_checkpoint(against).args.context_length)
    window = default_window(context) if window is None else window
    stride = check_window(window, stride)
    build = partial(
        Llama.build,
        tokenizer_path=tokenizer_path,
        max_seq_len=window,
        max_batch_size=max(1, CHUNK_ROWS // window),  # what fills a step
        device=device,
        dtype=dtype,
    )
    return Task(text, args, window, stride, build)


@dataclass(frozen=True)
class Score:
    """Of `tokens` tokens, which stand for `size` bytes of text: `total` nats, and of their squares.

    The standard errors take the tokens for independent, which neighbours in a text are not quite.
    """

    tokens: int
    size: int
    total: float
    squares: float
    window: int
    stride: int

    @property
    def mean(self) -> float:
        """Nats a token."""
        return self.total / self.tokens

    @property
    def error(self) -> float:
        """Standard error of the mean; not a number for a single token."""
        if self.tokens < 2:
            return math.nan
        variance = max(0.0, self.squares - self.tokens * self.mean**2) / (self.tokens - 1)
        return math.sqrt(variance / self.tokens)

    @property
    def perplexity(self) -> float:
        return math.exp(self.mean)

    @property
    def bits_per_byte(self) -> float:
        """Independent of the tokenizer, so it compares models with different ones."""
        return self.total / math.log(2) / self.size

    def words(self) -> dict[str, str]:
        """What to print of it, by title."""
        error = self.perplexity * self.error
        return {
            "text": f"{self.tokens} tokens, {self.size} bytes",
            "windows": f"of {self.window} tokens, moved on by {self.stride}",
            "mean": f"{self.mean:.6f} nats a token, standard error {self.error:.6f}",
            "perplexity": f"{self.perplexity:.4f}, standard error {error:.4f}",
            "bits per byte": f"{self.bits_per_byte:.6f}",
        }


def default_window(context: int) -> int:
    return min(context, 2048)


def check_window(window: int, stride: int | None) -> int:
    """The stride, half a window where it is None; ValueError where they make no sense."""
    if window < 2:
        raise ValueError(f"window is {window}; it must be at least 2 tokens")
    if stride is None:
        return max(1, window // 2)
    if not 1 <= stride < window:
        raise ValueError(f"stride is {stride}; it must be from 1 to {window - 1}, below the window")
    return stride


def windows(
    ids: list[int], bos: int | None, window: int, stride: int
) -> Iterator[tuple[list[int], int]]:
    """Windows over `ids`, and how many tokens at the end of each have not been in one before.

    Each is begin-of-text and up to window - 1 ids; the first scores all of its ids, the others
    `stride`, after window - 1 - stride ids that they only look at. Without begin-of-text (None)
    nothing stands before the first id, and it is not scored.
    """
    begin = [] if bos is None else [bos]
    room = window - len(begin)
    end = min(room, len(ids))
    yield [*begin, *ids[:end]], end if begin else end - 1
    while end < len(ids):
        new = min(stride, len(ids) - end)
        end += new
        yield [*begin, *ids[max(0, end - room) : end]], new


def begin_of(llama: Llama) -> int | None:
    """What windows begin with: begin-of-text, where the tokenizer puts it before texts."""
    return llama.tokenizer.bos_id if llama.tokenizer.prefix else None


def score(
    llama: Llama, text: str, *, window: int, stride: int | None = None, show_progress: bool = False
) -> Score:
    """The likelihood of every token of `text`, each counted once, in the window where it is new.

    Raises ValueError where the text is empty, or the window does not fit the engine's slots.
    """
    stride = check_window(window, stride)
    room, slots = llama.model.params.max_seq_len, llama.model.params.max_batch_size
    if window > room:
        raise ValueError(f"window is {window}; this model was built for {room} tokens")
    ids = llama.tokenizer.encode(text, bos=False, eos=False)
    begin = begin_of(llama)
    count = len(ids) - (begin is None)
    if count < 1:
        raise ValueError("the text is empty: there is nothing to score")
    total = squares = 0.0
    every = windows(ids, begin, window, stride)
    with progress("scoring", count, unit="tokens", enabled=show_progress) as advance:
        while some := list(islice(every, slots)):
            _, scores = llama.generate([w for w, _ in some], 0, logprobs=True, echo=True)
            assert scores is not None
            for (_, new), row in zip(some, scores, strict=True):
                total -= math.fsum(row[-new:])
                squares += math.fsum(x * x for x in row[-new:])
                advance(new)
    return Score(count, len(text.encode("utf-8", "replace")), total, squares, window, stride)
