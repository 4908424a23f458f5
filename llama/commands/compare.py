"""`compare`: what quantization costs. A text scored by two models at one time, and how they differ.

Sums over their logits; refuses to know how weights are quantized. The surprising thing: the error
of a difference is small where that of each perplexity is large, since both models find the
same words hard; so differences are summed token by token.

Letters: M tokens of a slice, V vocabulary.
"""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from llama.cache import Batch
from llama.commands.scoring import (
    Score,
    Task,
    begin_of,
    check_window,
    score,
    task,
    windows,
)
from llama.generation import Llama
from llama.quantization import formats_of
from llama.sampling import SamplingParams
from llama.terminal.arguments import SEVERAL
from llama.terminal.progress import progress

_ROWS = 256  # tokens whose logits exist at one time
_DECODED = 32  # tokens by which the speed is measured


def compare(
    ckpt_dir: str,
    text_file: str,
    *,
    tokenizer_path: str | None = None,
    window: int | None = None,
    stride: int | None = None,
    device: str | None = None,
    dtype: str | None = None,
    quantize: SEVERAL = (),
    against: str | None = None,
    plot: str | None = None,
) -> None:
    """Say what quantization costs: models beside each other, on one text.

    Prints a table with a row for each --quantize, or for ckpt_dir as it is stored:

        weights        how they are quantized, or the folder
        bytes          of the weights in memory, on this rank
        perplexity     of the text, lower is better
        tokens/s       of one sequence that decodes

    and where --against names a model to compare them with, whose row then comes first:

        more           by how much the perplexity is larger than that model's, with the standard
                       error of this difference, token by token
        KL divergence  of that model's probabilities from these, in nats a token; 0: the same
        same top       tokens for which both find the same next one the most probable
        largest        difference of two logits

        python -m llama compare llama/demo FILE --quantize int8 --quantize int4 --against llama/demo

    Args:
        quantize: int8, fp8, int4, mixed, or formats by part of the model, as JSON; may be given
            several times, for a row each.
        against: folder of weights that each row is compared with: ckpt_dir itself, or another.
        plot: file to draw quality against size to, .png, .pdf or .svg.
    """
    if not quantize and against is None:
        raise ValueError("there is nothing to compare: give --quantize, or --against, or both")
    work = task(
        ckpt_dir,
        text_file,
        tokenizer_path=tokenizer_path,
        window=window,
        stride=stride,
        device=device,
        dtype=dtype,
        against=against,
    )
    show_table(work, ckpt_dir, quantize, against, plot)


def show_table(
    work: Task, ckpt_dir: str, quantize: SEVERAL, against: str | None, plot_file: str | None
) -> None:
    """Score a text with each model, print the table and draw the plot; arguments as of `compare`,
    of which all may be None."""
    for recipe in quantize:
        formats_of(recipe, work.args)  # says what is wrong before much is done
    if plot_file is not None:
        check_plot(plot_file)
    makers = {recipe: partial(work.build, ckpt_dir, quantize=recipe) for recipe in quantize}
    makers = makers or {ckpt_dir: partial(work.build, ckpt_dir)}
    base = None if against is None else partial(work.build, against)
    rows, is_main = compare_all(
        makers, against, base, work.text, window=work.window, stride=work.stride
    )
    if is_main:
        print("\n".join(table(rows)))
    if is_main and plot_file is not None:
        plot(rows, plot_file)


@dataclass
class Difference:
    """How a model differs from another on the same tokens; `add` tokens, then read."""

    tokens: int = 0
    same: int = 0  # tokens for which both have the same most probable next one
    divergence: float = 0.0
    largest: float = 0.0  # difference of two logits
    more: float = 0.0  # nats
    squares: float = 0.0
    totals: list[float] = field(default_factory=lambda: [0.0, 0.0])  # nats of either
    errors: list[float] = field(default_factory=lambda: [0.0, 0.0])  # squares of these

    def add(self, ours: Tensor, theirs: Tensor, targets: Tensor) -> None:
        """Logits (M, V) of both models in float32, and the tokens (M,) that came."""
        self.tokens += len(targets)
        self.largest = max(self.largest, float((ours - theirs).abs().max()))
        self.same += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
        both = [F.log_softmax(logits, -1) for logits in (ours, theirs)]
        self.divergence += float(F.kl_div(both[0], both[1], reduction="sum", log_target=True))
        nats = [-each.gather(1, targets[:, None])[:, 0].double() for each in both]
        self.more += float((nats[0] - nats[1]).sum())
        self.squares += float((nats[0] - nats[1]).square().sum())
        for at, some in enumerate(nats):
            self.totals[at] += float(some.sum())
            self.errors[at] += float(some.square().sum())

    @property
    def kl(self) -> float:
        """Mean Kullback-Leibler divergence, in nats a token, of this model from the other."""
        return max(0.0, self.divergence / self.tokens)

    @property
    def same_top(self) -> float:
        return self.same / self.tokens

    @property
    def ratio(self) -> float:
        """This perplexity as a part of the other's."""
        return math.exp(self.more / self.tokens)

    @property
    def ratio_error(self) -> float:
        """The paired standard error of `ratio`; not a number for a single token."""
        if self.tokens < 2:
            return math.nan
        mean = self.more / self.tokens
        variance = max(0.0, self.squares - self.tokens * mean**2) / (self.tokens - 1)
        return self.ratio * math.sqrt(variance / self.tokens)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One model in a comparison; `difference` is None for the one that others are compared with."""

    name: str
    size: int  # bytes of this rank's weights
    score: Score
    speed: float  # tokens a second, one sequence
    difference: Difference | None = None


def compare_two(
    llama: Llama,
    other: Llama,
    text: str,
    *,
    window: int,
    stride: int | None = None,
    show_progress: bool = False,
) -> tuple[Difference, Score, Score]:
    """Score `text` with both models, window by window: what differs, and the score of each.

    Never holds more than the logits of 256 tokens of each. Raises ValueError where the text is
    empty or the models do not read the same tokens.
    """
    stride = check_window(window, stride)
    ids, theirs = (each.tokenizer.encode(text, bos=False, eos=False) for each in (llama, other))
    sizes = [each.model.params.vocab_size for each in (llama, other)]
    if ids != theirs or sizes[0] != sizes[1]:
        raise ValueError("the two models have different tokenizers, so they cannot be compared")
    begin = begin_of(llama)
    count = len(ids) - (begin is None)
    if count < 1:
        raise ValueError("the text is empty: there is nothing to score")
    found = Difference()
    with progress("comparing", count, unit="tokens", enabled=show_progress) as advance:
        for some, new in windows(ids, begin, window, stride):
            _add(found, llama, other, some, new)
            advance(new)
    size = len(text.encode("utf-8", "replace"))
    scores = [Score(count, size, total, squares, window, stride)
              for total, squares in zip(found.totals, found.errors, strict=True)]  # fmt: skip
    return found, scores[0], scores[1]


@torch.inference_mode()
def _add(found: Difference, llama: Llama, other: Llama, ids: Sequence[int], new: int) -> None:
    """Add the last `new` tokens of a window."""
    device = llama.model.norm.weight.device
    tokens = torch.tensor(ids, device=device)
    with llama.model.ranks.together():
        states = [_states(each, tokens[:-1])[-new:] for each in (llama, other)]
        for low in range(0, new, _ROWS):
            logits = [
                each.model.logits(some[low : low + _ROWS])
                for each, some in zip((llama, other), states, strict=True)
            ]
            targets = tokens[len(ids) - new :][low : low + _ROWS]
            found.add(logits[0], logits[1].to(device), targets)


def _states(llama: Llama, tokens: Tensor) -> Tensor:
    tokens = tokens.to(llama.model.norm.weight.device)
    positions = torch.arange(len(tokens), device=tokens.device)
    return llama.model.hidden(tokens, positions, Batch([len(tokens)], device=tokens.device))


def weight_bytes(llama: Llama) -> int:
    """Of this rank's weights, what two names share counted once."""
    return sum(parameter.nbytes for parameter in llama.model.parameters())


def decode_speed(llama: Llama) -> float:
    """Tokens a second that one short sequence gets, greedily; not a number where none has room."""
    engine = llama.engine
    limit = min(_DECODED, engine.max_seq_len - 2)
    never = {token: -math.inf for token in engine.stop_token_ids
             if token < llama.model.params.vocab_size}  # fmt: skip
    params = SamplingParams(temperature=0, max_tokens=limit, logit_bias=never)
    if limit < 2:
        return math.nan
    seconds = []
    for _ in range(3):
        request = engine.submit([llama.tokenizer.bos_id], params)
        engine.step()
        began = time.perf_counter()
        while not engine.idle:
            engine.step()
        seconds.append(time.perf_counter() - began)
        if request.error is not None:
            raise request.error
        assert len(request.tokens) == limit, request
    return (limit - 1) / statistics.median(seconds)


def compare_all(
    makers: Mapping[str, Callable[[], Llama]],
    name: str | None,
    make_other: Callable[[], Llama] | None,
    text: str,
    *,
    window: int,
    stride: int | None = None,
) -> tuple[list[Row], bool]:
    """A row for each of several models, made one after the other, and whether this rank prints.

    Where `make_other` makes one to compare them with, that one stays beside them, and its own row,
    called `name`, comes first. Raises ValueError as `compare_two` and `score` do.
    """
    rows: list[Row] = []
    other = None if make_other is None else make_other()
    is_main = False
    for title, make in makers.items():
        llama = make()
        is_main = llama.is_main
        if other is None:
            alone = score(llama, text, window=window, stride=stride, show_progress=is_main)
            rows.append(_row(title, llama, alone))
            continue
        difference, result, base = compare_two(
            llama, other, text, window=window, stride=stride, show_progress=is_main
        )
        if not rows:
            rows.append(_row(name or "", other, base))
        rows.append(_row(title, llama, result, difference))
        del llama  # before the next one is made
    return rows, is_main


def _row(name: str, llama: Llama, found: Score, difference: Difference | None = None) -> Row:
    return Row(
        name=name,
        size=weight_bytes(llama),
        score=found,
        speed=decode_speed(llama),
        difference=difference,
    )


def table(rows: Sequence[Row]) -> list[str]:
    """The lines of a table, columns of differences only where there are any."""
    compared = any(row.difference for row in rows)
    titles = ["weights", "bytes", "perplexity", "tokens/s"]
    titles[3:3] = ["more", "KL divergence", "same top", "largest"] if compared else []
    lines = [titles] + [_cells(row, compared) for row in rows]
    widths = [max(len(line[at]) for line in lines) for at in range(len(titles))]
    return ["  ".join([line[0].ljust(widths[0]),
                       *(cell.rjust(n) for cell, n in zip(line[1:], widths[1:], strict=True))])
            for line in lines]  # fmt: skip


def _cells(row: Row, compared: bool) -> list[str]:
    found = row.difference
    cells = [row.name, f"{row.size:,}", f"{row.score.perplexity:.4f}"]
    if found is not None:
        more = f"{100 * (found.ratio - 1):+.3f} +- {100 * found.ratio_error:.3f} %"
        cells += [more, f"{found.kl:.2e}", f"{100 * found.same_top:.2f} %", f"{found.largest:.3f}"]
    elif compared:
        cells += [""] * 4
    return [*cells, f"{row.speed:.1f}"]


# ---- the plot


def check_plot(file: str | Path) -> None:
    """Raise where `plot` could not write this file: before anything long is done for it.

    FileNotFoundError or ValueError, and ImportError where matplotlib is not installed.
    """
    path = Path(file)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent}: there is no such folder")
    if path.suffix not in (".png", ".pdf", ".svg"):
        raise ValueError(f"{path}: a plot is written as .png, .pdf or .svg")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ImportError(
            "a plot needs a package that is not installed: pip install -e '.[plot]'"
        ) from None


def plot(rows: Sequence[Row], file: str | Path) -> None:
    """Draw quality against size: the divergence of each row that has one, else its perplexity."""
    check_plot(file)
    from matplotlib.figure import Figure

    compared = [row for row in rows if row.difference is not None]
    figure = Figure(figsize=(6.4, 4.8), layout="constrained")
    axes = figure.subplots()
    for row in compared or rows:
        quality = row.difference.kl if row.difference else row.score.perplexity
        axes.plot(row.size / 1e6, quality, "o", color="C0")
        axes.annotate(row.name, (row.size / 1e6, quality), xytext=(5, 5),
                      textcoords="offset points")  # fmt: skip
    axes.set_xlabel("weights, MB")
    axes.set_ylabel("mean KL divergence, nats a token" if compared else "perplexity")
    if compared:
        axes.set_yscale("log")
    figure.savefig(file)
