"""Progress: seen on a terminal, with tqdm and without; nothing at all anywhere else."""

import io
import os
import pty
import sys
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from llama.terminal import progress as module
from llama.terminal.progress import progress


@contextmanager
def terminal(monkeypatch):
    """stderr becomes a pseudo-terminal; the value is a function that gives what it was sent."""
    ours, theirs = pty.openpty()
    stream = os.fdopen(theirs, "w", encoding="ascii")  # whatever is drawn must fit any terminal
    monkeypatch.setattr(sys, "stderr", stream)

    def seen():
        stream.close()
        text = b""
        while True:
            try:
                chunk = os.read(ours, 65536)
            except OSError:  # Linux: the other end is closed
                return text.decode()
            if not chunk:
                return text.decode()
            text += chunk

    try:
        yield seen
    finally:
        os.close(ours)


@pytest.fixture
def without_tqdm(monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)


def run(total=2_600_000_000, steps=4, **options):
    with progress("loading", total, unit="B", **options) as advance:
        for _ in range(steps):
            advance((total or 1000) // steps)


def test_a_terminal_without_tqdm_shows_a_line_that_redraws_itself(monkeypatch, without_tqdm):
    monkeypatch.setattr(module, "_REDRAW_SECONDS", 0.0)
    with terminal(monkeypatch) as seen:
        run()
        text = seen()
    drawn = text.split("\r")
    assert "loading: 0 %, 0 B of 2.6 GB, 0 s" in drawn[1]
    assert "loading: 50 %, 1.3 GB of 2.6 GB" in drawn[3]
    assert "loading: 100 %, 2.6 GB of 2.6 GB" in text
    assert text.endswith("\n")
    assert text.count("\n") == 1


def test_a_terminal_with_tqdm_shows_its_bar(monkeypatch):
    pytest.importorskip("tqdm")
    with terminal(monkeypatch) as seen:
        run()
        text = seen()
    assert "loading: 100%" in text
    assert "2.60G/2.60G" in text
    assert text.endswith("\n")


def test_redrawing_is_rare_and_the_end_is_always_drawn(monkeypatch, without_tqdm):
    monkeypatch.setattr(module, "_REDRAW_SECONDS", 1000.0)
    with terminal(monkeypatch) as seen:
        run(steps=1000)
        text = seen()
    assert text.count("loading") == 2
    assert "100 %" in text


def test_a_long_job_says_its_speed_and_what_is_left_of_it(monkeypatch, without_tqdm):
    """What an earlier run has done counts for the amount, and not for the speed."""
    now = iter([0.0, 0.0, 2.0, 2.0, 10.0, 10.0, 20.0])
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: next(now)))
    with terminal(monkeypatch) as seen:
        with progress("loading", 10_000_000_000, unit="B", done=4_000_000_000) as advance:
            for _ in range(2):
                advance(100_000_000)
        lines = [line.rstrip() for line in seen().strip().split("\r")]
    assert lines == [
        "loading: 40 %, 4.0 GB of 10.0 GB, 0 s",
        "loading: 41 %, 4.1 GB of 10.0 GB, 2 s",
        "loading: 42 %, 4.2 GB of 10.0 GB, 10 s, 20.0 MB/s, about 5 min left",
        "loading: 42 %, 4.2 GB of 10.0 GB, 20 s, 10.0 MB/s, about 10 min left",
    ]


def test_a_shorter_line_leaves_nothing_of_a_longer_one(monkeypatch, without_tqdm):
    monkeypatch.setattr(module, "_REDRAW_SECONDS", 0.0)
    monkeypatch.setattr(module, "amount_of", lambda n, unit: "m" * (30 - n))
    with terminal(monkeypatch) as seen:
        with progress("x") as advance:
            advance(20)
        text = seen()
    first, *_, last = text.rstrip("\r\n").split("\r")[1:]
    assert last.rstrip() == "x: mmmmmmmmmm, 0 s"
    assert len(first) > len(last.rstrip())
    assert f"\r{last.rstrip().ljust(len(first))}\r" in text


def test_a_long_description_is_cut_to_the_terminal(monkeypatch, without_tqdm):
    monkeypatch.setattr(module, "_columns", lambda stream: 20)
    with terminal(monkeypatch) as seen:
        with progress("d" * 100, 10):
            pass
        text = seen()
    assert max(len(line.rstrip("\n")) for line in text.split("\r")) == 19


@pytest.mark.parametrize("plain", [True, False])
def test_a_total_that_is_not_known_or_zero_is_fine(monkeypatch, plain):
    if plain:
        monkeypatch.setitem(sys.modules, "tqdm", None)
    for total in (None, 0):
        with terminal(monkeypatch) as seen:
            run(total)
            assert "loading" in seen()


@pytest.mark.parametrize("plain", [True, False])
def test_an_exception_passes_and_the_next_output_starts_a_line(monkeypatch, plain):
    if plain:
        monkeypatch.setitem(sys.modules, "tqdm", None)
    else:
        pytest.importorskip("tqdm")
    with terminal(monkeypatch) as seen:
        with pytest.raises(RuntimeError, match="broken"), progress("loading", 10):
            raise RuntimeError("broken")
        assert seen().endswith("\n")


@pytest.mark.parametrize("plain", [True, False])
def test_other_ranks_are_silent_on_a_terminal(monkeypatch, plain):
    if plain:
        monkeypatch.setitem(sys.modules, "tqdm", None)
    with terminal(monkeypatch) as seen:
        run(enabled=False)
        assert seen() == ""


@pytest.mark.parametrize("plain", [True, False])
def test_what_is_no_terminal_gets_nothing(monkeypatch, capfd, plain):
    if plain:
        monkeypatch.setitem(sys.modules, "tqdm", None)
    piped = io.StringIO()
    monkeypatch.setattr(sys, "stderr", piped)
    run()
    monkeypatch.setattr(sys, "stderr", None)  # as under pythonw
    run()
    assert piped.getvalue() == ""
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("n", "unit", "text"),
    [
        (0, "B", "0 B"),
        (999, "B", "999 B"),
        (1000, "B", "1.0 kB"),
        (999_949, "B", "999.9 kB"),
        (999_950, "B", "1.0 MB"),
        (16_060_522_496, "B", "16.1 GB"),
        (820_000_000_000_000, "B", "820.0 TB"),
        (123456, "tokens", "123456 tokens"),
    ],
)
def test_amounts_read_well(n, unit, text):
    assert module.amount_of(n, unit) == text
