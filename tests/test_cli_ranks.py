"""torchrun's variables where torchrun is not, and what is said of ranks that do not come."""

import contextlib
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from llama import meeting, parallel
from llama.meeting import Place, RankError, meet

ROOT = Path(__file__).parent.parent
UNSET = "unset it, or start with torchrun"
VARIABLES = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
COMPLETE = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29533"}


@pytest.fixture
def variables(monkeypatch):
    """A function that sets torchrun's variables, these and no others."""

    def put(**given):
        for name in (*VARIABLES, "TORCHELASTIC_USE_AGENT_STORE"):
            monkeypatch.delenv(name, raising=False)
        for name, text in given.items():
            monkeypatch.setenv(name, text)

    return put


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "given",
    [
        *({}, {"WORLD_SIZE": "1"}, {"WORLD_SIZE": ""}, {"RANK": "3"}, {"MASTER_PORT": "x"}),
        {**COMPLETE, "WORLD_SIZE": "1"},
    ],
)
def test_one_process_needs_no_variable_and_no_port(variables, given):
    variables(**given)
    assert parallel.join(None, CPU) is parallel.ONE


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"WORLD_SIZE": "x"}, "WORLD_SIZE is 'x' in the environment"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0' in the environment"),
        ({"WORLD_SIZE": "-2"}, "WORLD_SIZE is '-2' in the environment"),
        ({"WORLD_SIZE": "1.5"}, "WORLD_SIZE is '1.5' in the environment"),
        ({"WORLD_SIZE": "2"}, "also sets RANK and MASTER_ADDR and MASTER_PORT"),
        ({**COMPLETE, "RANK": ""}, "also sets RANK$"),
        ({**COMPLETE, "MASTER_ADDR": " "}, "also sets MASTER_ADDR$"),
        ({"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "a"}, "also sets MASTER_PORT$"),
        ({**COMPLETE, "RANK": "one"}, "RANK is 'one' in the environment"),
        ({**COMPLETE, "RANK": "-1"}, "RANK is '-1' in the environment"),
        ({**COMPLETE, "RANK": "2"}, "WORLD_SIZE=2 stands .*; RANK=2 cannot belong to it"),
        ({**COMPLETE, "MASTER_PORT": "0"}, "MASTER_PORT is '0' in the environment"),
        ({**COMPLETE, "MASTER_PORT": "99999"}, "WORLD_SIZE=2 stands .*; MASTER_PORT=99999 cannot"),
    ],
)
def test_a_variable_that_is_left_over_is_named_before_anybody_waits(variables, given, said):
    variables(**given)
    with pytest.raises(ValueError, match=said) as raised:
        parallel.join(None, CPU)
    assert UNSET in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize("text", ["x", "-1", "1.5"])
def test_a_local_rank_that_is_none_is_named(variables, monkeypatch, text):
    variables(LOCAL_RANK=text)
    with pytest.raises(ValueError, match=f"LOCAL_RANK is '{text}' in the environment.*{UNSET}"):
        parallel.local_device("cuda")
    variables(LOCAL_RANK="3")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match=r"cuda:3 is needed, .* shows 2 GPUs .LOCAL_RANK=3 stands"):
        parallel.local_device("cuda")
    with pytest.raises(ValueError, match="cuda:3 is needed, and this machine shows 2 GPUs: start"):
        parallel.local_device("cuda:3")


# ---- waiting


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(meeting, "QUIET", 0.2)
    monkeypatch.setattr(meeting, "ARRIVAL", 1.0)


def alone(rank, world, host, port, capfd):
    expected = rf"rank {rank} of {world} waited \d+ s at .*: a hint"
    with pytest.raises(RankError, match=expected) as raised:
        meet(Place(rank, world, host, port, "a hint"), torchrun_listens=False)
    return capfd.readouterr().err, str(raised.value)


def test_a_wait_is_said_with_those_who_are_missing(short, capfd):
    port = free_port()
    said, _ = alone(0, 3, "localhost", port, capfd)
    assert said == f"rank 0 of 3 waits at localhost:{port} for ranks 1, 2: a hint\n"
    said, _ = alone(1, 2, "localhost", free_port(), capfd)
    assert " for rank 0 (Connection refused): a hint\n" in said
    _, last = alone(1, 2, "no.such.host.invalid", port, capfd)
    assert f" at no.such.host.invalid:{port} for rank 0 (" in last
    _, last = alone(0, 2, "no.such.host.invalid", free_port(), capfd)
    assert " for itself (" in last


def test_ranks_that_have_come_are_not_named(short, capfd):
    port, errors = free_port(), []

    def come(rank):
        with contextlib.suppress(RankError):
            meet(Place(rank, 3, "127.0.0.1", port, "a hint"), torchrun_listens=False)
            errors.append(rank)

    other = threading.Thread(target=come, args=(2,))
    other.start()
    come(0)
    other.join()
    assert not errors
    lines = capfd.readouterr().err.splitlines()
    assert f"rank 0 of 3 waits at 127.0.0.1:{port} for rank 1: a hint" in lines


def test_a_port_that_is_taken_is_named(short):
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"MASTER_PORT={port} stands .* cannot listen there"):
            meet(Place(0, 2, "localhost", port, "a hint"), torchrun_listens=False)


def test_ranks_that_come_at_any_time_meet_and_nothing_is_said(capfd):
    port, met = free_port(), []

    def come(rank):
        met.append(meet(Place(rank, 3, "localhost", port, "a hint"), torchrun_listens=False))

    threads = [threading.Thread(target=come, args=(rank,)) for rank in (1, 2)]
    for thread in threads:
        thread.start()
    come(0)
    for thread in threads:
        thread.join()
    assert len(met) == 3
    assert capfd.readouterr().err == ""


def test_two_ranks_of_which_one_cannot_read_both_end_with_a_sentence():
    """Standard input is read by one rank; the others would wait for its text."""
    port = free_port()
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    common = {**os.environ, **COMPLETE, "MASTER_PORT": str(port), "PYTHONPATH": path}
    common |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    both = [
        subprocess.Popen(
            [sys.executable, "-m", "llama", "complete", "--max_gen_len", "2"],
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            **pipes,
        )
        for rank in range(2)
    ]
    for process in both:
        process.stdin.write(b"\xff")
        process.stdin.close()
    said = [process.stderr.read().decode() for process in both]
    assert [process.wait(120) for process in both] == [1, 1]
    assert "standard input is not UTF-8 text: byte 0 is 0xff\n" in said[0]
    assert "reading the text failed on rank 0, whose own output says why\n" in said[1]
    assert not any("Traceback" in text for text in said)
    assert not any(process.stdout.read() for process in both)


def test_what_one_process_does_for_all_is_done_by_the_first(variables, shell):
    variables(RANK="0", WORLD_SIZE="2")
    said = shell("verify")
    assert said[0] == 0
    assert said[1].endswith("all files are what the checklist says\n")
    variables(RANK="1", WORLD_SIZE="2")
    for words in (("verify",), ("tokenize", "hello"), ("info", "nowhere"), ("convert", *"abc")):
        assert shell(*words) == (0, "", "")
    variables(RANK="x")
    error = "the environment says RANK='x', no whole number: unset it\n"
    assert shell("verify") == (1, "", error)
