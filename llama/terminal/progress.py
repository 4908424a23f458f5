"""Progress of a long job on a terminal: tqdm where installed, else a line that redraws itself.

Knows stderr and how to count; refuses to know what is counted and which rank it is on (`enabled`).
It runs on Python 3.9, for downloads before anything is installed.

The surprising thing: where stderr is not a terminal nothing at all is written, so logs stay clean.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

Advance = Callable[[int], object]

_REDRAW_SECONDS = 0.1
_LONG_SECONDS = 5.0  # from here on the speed tells how long it will take


@contextmanager
def progress(
    desc: str,
    total: int | None = None,
    *,
    unit: str = "it",
    done: int = 0,
    enabled: bool = True,
) -> Iterator[Advance]:
    """Count up to `total` (None where it is not known): the value is a function, advance(n).

    unit "B" shows bytes in kB, MB, GB (powers of 1000); any other is shown as it is. `done` is what
    an earlier run has left: it counts for the amount, and not for the speed. With enabled=False
    (other ranks, a caller who wants quiet) or without a terminal nothing is written.
    """
    stream = sys.stderr
    if not enabled or stream is None or not stream.isatty():
        yield lambda n: None
        return
    try:
        from tqdm import tqdm
    except ImportError:
        line = _Line(stream, desc, total, unit, done)
        try:
            yield line.advance
        finally:
            line.close()
    else:
        # its own guess on a terminal that says 0 by 0, as in some containers, is to draw nothing
        with tqdm(
            desc=desc,
            total=total,
            initial=done,
            unit=unit,
            unit_scale=unit == "B",
            file=stream,
            ncols=_columns(stream),
            nrows=24,
        ) as bar:
            yield bar.update


class _Line:
    """`loading: 45 %, 1.2 GB of 2.6 GB, 3 s`, redrawn in place and left as it is at the end.

    Bytes that take long get `, 0.4 GB/s, about 2 min left` as well.
    """

    def __init__(
        self, stream: TextIO, desc: str, total: int | None, unit: str, done: int = 0
    ) -> None:
        self._stream, self._desc, self._total, self._unit = stream, desc, total, unit
        self._first = self._done = done
        self._width = 0  # of what stands on the line now
        self._started = time.monotonic()
        self._draw()

    def advance(self, n: int) -> None:
        self._done += n
        if time.monotonic() - self._drawn >= _REDRAW_SECONDS:
            self._draw()

    def close(self) -> None:
        self._draw()
        self._stream.write("\n")
        self._stream.flush()

    def _draw(self) -> None:
        self._drawn = time.monotonic()
        text = self._text()[: _columns(self._stream) - 1]  # a full row would wrap and not redraw
        self._stream.write("\r" + text.ljust(self._width))
        self._stream.flush()
        self._width = len(text)

    def _text(self) -> str:
        amount = amount_of(self._done, self._unit)
        if self._total is not None:
            percent = 100 * self._done // self._total if self._total else 100
            amount = f"{percent} %, {amount} of {amount_of(self._total, self._unit)}"
        seconds = self._drawn - self._started
        return f"{self._desc}: {amount}, {seconds:.0f} s{self._speed(seconds)}"

    def _speed(self, seconds: float) -> str:
        if self._unit != "B" or self._total is None or seconds < _LONG_SECONDS:
            return ""
        rate = (self._done - self._first) / seconds
        left = (self._total - self._done) / rate if rate > 0 else 0.0
        if left < 60:
            return ""
        return f", {amount_of(round(rate), 'B')}/s, about {left / 60:.0f} min left"


def amount_of(n: int, unit: str = "B") -> str:
    """A number with its unit, as people read it: bytes in powers of 1000."""
    if unit != "B" or n < 1000:
        return f"{n} {unit}"
    value, prefixes = n / 1000, iter("kMGTP")
    prefix = next(prefixes)
    while value >= 999.95:  # would be shown as 1000.0
        value, prefix = value / 1000, next(prefixes)
    return f"{value:.1f} {prefix}B"


def _columns(stream: TextIO) -> int:
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80
    except OSError:
        return 80
