"""What `bench` measures, and how it is told: sizes, timings, and the table for people.

Refuses to know how anything is measured.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import torch

VOCAB = 128256  # Llama 3's
SHAPES: dict[str, dict[str, Any]] = {
    "1B": dict(dim=2048, n_layers=16, n_heads=32, n_kv_heads=8, multiple_of=256,
               ffn_dim_multiplier=1.5, tied=True, use_scaled_rope=True),
    "3B": dict(dim=3072, n_layers=28, n_heads=24, n_kv_heads=8, multiple_of=256,
               ffn_dim_multiplier=1.0, tied=True, use_scaled_rope=True),
    "8B": dict(dim=4096, n_layers=32, n_heads=32, n_kv_heads=8, multiple_of=1024,
               ffn_dim_multiplier=1.3),
    "70B": dict(dim=8192, n_layers=80, n_heads=64, n_kv_heads=8, multiple_of=4096,
                ffn_dim_multiplier=1.3),
}  # fmt: skip

PRODUCT = (2048, 4096, 14336)
GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Work:
    """What is measured: decode of each of `rows` at each of `contexts`, prefill of `lengths`.

    `buffer` bytes are read for the bandwidth, and the product has the sizes `product`.
    """

    rows: tuple[int, ...]
    contexts: tuple[int, ...]
    lengths: tuple[int, ...]
    steps: int = 64
    buffer: int = GIB
    product: tuple[int, int, int] = PRODUCT

    def __post_init__(self) -> None:
        for name in ("rows", "contexts", "lengths"):
            for number in getattr(self, name):
                if number < 1:
                    raise ValueError(f"--{name} has {number}; it must be whole numbers above 0")
        if self.steps < 1:
            raise ValueError(f"--steps is {self.steps}; it must be a whole number above 0")


def work_for(
    device: torch.device,
    rows: str | None = None,
    contexts: str | None = None,
    lengths: str | None = None,
    steps: int | None = None,
) -> Work:
    """The work of one run from numbers as they are typed, "1,8"; None is what suits the device."""
    if device.type == "cuda":
        usual = Work(rows=(1, 8, 32, 128), contexts=(128, 4096), lengths=(512, 2048, 8192),
                     buffer=4 * GIB)  # fmt: skip
    else:
        usual = Work(rows=(1, 8), contexts=(128,), lengths=(512,), steps=16)
    return replace(
        usual,
        rows=_numbers("rows", rows) or usual.rows,
        contexts=_numbers("contexts", contexts) or usual.contexts,
        lengths=_numbers("lengths", lengths) or usual.lengths,
        steps=usual.steps if steps is None else steps,
    )


def _numbers(name: str, text: str | None) -> tuple[int, ...]:
    if text is None:
        return ()
    words = [word.strip() for word in text.strip("()[], ").split(",")]
    if not all(word.isdecimal() and int(word) for word in words):
        raise ValueError(f"--{name} is {text!r}; it must be whole numbers above 0, as in 1,8,32")
    return tuple(map(int, words))


@dataclass(frozen=True, kw_only=True)
class Timing:
    """One line of the table. `seconds` are of a step in decode, of the prompt in prefill; `share`
    is of the limit; `memory` bytes are in use, `above` of them for neither weights nor cache."""

    name: str
    rows: int
    tokens: int  # context in decode, prompt in prefill
    temperature: float
    steps: int
    seconds: float
    tokens_per_second: float
    share: float
    memory: int | None
    above: int | None


@dataclass(frozen=True, kw_only=True)
class Report:
    model: str
    parameters: int
    device: str
    dtype: str
    bandwidth: float  # bytes per second
    operations: float  # per second, in matrix products
    buffer: int  # bytes that were read for the bandwidth
    product: tuple[int, int, int]
    start: float | None  # seconds to the 16th token
    loading: float | None  # seconds of them until the weights were in place
    decode: list[Timing] = field(default_factory=list)
    prefill: list[Timing] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)


# ---- the table


def lines(report: Report) -> list[str]:
    """The report for people, a line each."""
    n, k, m = report.product
    told = [
        f"model     {report.model}, {report.parameters:,} parameters, {report.dtype}",
        f"device    {report.device}",
        f"reading   {_short(report.bandwidth)}B/s, a buffer of {_short(report.buffer)}B",
        f"products  {_short(report.operations)}FLOP/s, {n} x {k} x {m}",
    ]
    if report.start is not None and report.loading is not None:
        told.append(
            f"start     {report.start:.2f} s to the 16th token, the weights were there after "
            f"{report.loading:.2f} s"
        )
    parts = (("decode", "ms a step", report.decode), ("prefill", "ms", report.prefill))
    width = max((len(t.name) for _, _, timings in parts for t in timings), default=0)
    for title, unit, timings in parts:
        if timings:
            head = (
                f"{'tokens/s':>10}  {unit:>10}  {'share':>7}  {'memory, GB':>10}  {'above, GB':>9}"
            )
            told += ["", f"{title:{width}}  {head}".rstrip()]
        for t in timings:
            memory, above = (
                "-" if size is None else f"{size / 1e9:.2f}" for size in (t.memory, t.above)
            )
            told.append(
                f"{t.name:{width}}  {t.tokens_per_second:10.1f}  {1000 * t.seconds:10.3f}  "
                f"{100 * t.share:5.1f} %  {memory:>10}  {above:>9}"
            )
    return told + ([""] if report.left_out else []) + [f"left out: {w}" for w in report.left_out]


def _short(number: float) -> str:
    """4.53 T, 802 M: with a prefix, before a unit."""
    for prefix in "", "k", "M", "G":
        if number < 999.5:
            return f"{number:.3g} {prefix}"
        number /= 1000
    return f"{number:.3g} T"
