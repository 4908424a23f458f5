"""How a program ends: closed, full and broken streams, and Ctrl-C, are a status and at most one
sentence, with Python's buffers and without."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DEMO = str(ROOT / "llama" / "demo")
PROGRAM = """
import sys, time
from llama.terminal import arguments as cli
def say(lines: int = 1, flush: bool = False) -> None:
    for number in range(lines):
        print("line", number, flush=flush)
def read() -> None:
    print(len(cli.read_text(None)))
def fail() -> None:
    print("said before")
    raise ValueError("a sentence")
def sleep() -> None:
    print("begun", flush=True)
    time.sleep(60)
cli.run({"say": say, "read": read, "fail": fail, "sleep": sleep}, "program")
"""
BUFFERS = ["", "1"]
full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="has no /dev/full")


def environment(unbuffered=""):
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": unbuffered}


def shell(line, unbuffered=""):
    """Status, stdout and stderr of a line for bash; P stands for the program above."""
    line = line.replace("P ", '"$PYTHON" -c "$PROGRAM" ')
    variables = {"PYTHON": sys.executable, "PROGRAM": PROGRAM, **environment(unbuffered)}
    command = ["bash", "-o", "pipefail", "-c", line]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("unbuffered", BUFFERS)
def test_closed_streams_are_one_sentence(unbuffered):
    closed = (1, "", "standard output: it is closed\n")
    assert shell("P say >&-", unbuffered) == closed
    assert shell("P --help >&-", unbuffered) == closed
    assert shell("P say --help >&-", unbuffered) == closed
    assert shell("P say >&- 2>&-", unbuffered) == (1, "", "")
    assert shell("P say 2>&-", unbuffered) == (0, "line 0\n", "")
    assert shell("P fail 2>&-", unbuffered) == (1, "said before\n", "")
    assert shell("P say --nope 2>&-", unbuffered) == (2, "", "")
    assert shell("P read <&-", unbuffered) == (
        1, "", "standard input is closed: give a text or a file\n"
    )  # fmt: skip
    assert shell("P say <&- >&- 2>&-", unbuffered) == (1, "", "")


@full
@pytest.mark.parametrize("unbuffered", BUFFERS)
def test_a_full_disk_is_one_sentence(unbuffered):
    for line in ("say", "say --flush", "say --lines 9999", "--help", "say --help"):
        status, _, error = shell(f"P {line} >/dev/full", unbuffered)
        assert status == 1
        assert error == "standard output: No space left on device\n"
    assert shell("P fail 2>/dev/full", unbuffered) == (1, "said before\n", "")
    assert shell("P say --nope 2>/dev/full", unbuffered) == (2, "", "")
    # the error of the command goes first
    assert shell("P fail >/dev/full", unbuffered)[0] == 1


@pytest.mark.parametrize("unbuffered", BUFFERS)
def test_a_reader_who_goes_away_is_a_status_without_words(unbuffered):
    for line in ("P say --lines 99999 | head -1", "P say --lines 99999 --flush | head -1"):
        assert shell(line, unbuffered) == (1, "line 0\n", "")
    assert shell("P fail 2>&1 | true; test ${PIPESTATUS[0]} = 1", unbuffered)[0] == 0
    assert shell("P --help | head -1", unbuffered)[2] == ""


def test_no_file_gets_the_number_of_a_stream_that_was_closed():
    program = (
        "import sys\nfrom llama.terminal import arguments as cli\n"
        "def numbers() -> None:\n    sys.stderr.write(str(open('/dev/null').fileno() > 2))\n"
        "cli.run(numbers)\n"
    )
    command = f"'{sys.executable}' -c \"$0\" <&- >&-"
    done = subprocess.run(
        ["bash", "-c", command, program], env=environment(), stderr=subprocess.PIPE, check=False
    )
    assert done.stderr.startswith(b"True")


def test_ctrl_c_ends_a_command_without_words():
    command = [sys.executable, "-c", PROGRAM, "sleep"]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment())
    with subprocess.Popen(command, **pipes) as process:
        assert process.stdout.readline() == "begun\n"
        process.send_signal(signal.SIGINT)
        assert process.stderr.read() == ""
        assert process.wait() == 130


# torch is imported for seconds: a module of that name whose import does not end stands for it
PROGRAMS = {
    "python -m llama": ["-m", "llama", "tokenize", "hello"],
    "example_chat_completion.py": ["example_chat_completion.py", "--ckpt_dir", DEMO],
    "example_text_completion.py": ["example_text_completion.py", "--ckpt_dir", DEMO],
}


@pytest.mark.skipif(os.name != "posix", reason="sends a signal")
@pytest.mark.parametrize("name", PROGRAMS)
def test_ctrl_c_while_torch_is_imported_ends_a_program_without_words(tmp_path, name):
    (tmp_path / "torch.py").write_text(
        "import sys, time\nsys.stderr.write('importing\\n')\n"
        "try:\n    time.sleep(60)\nexcept BaseException as error:\n    raise ImportError\n"
    )
    paths = os.pathsep.join([str(tmp_path), str(ROOT)])
    command = [sys.executable, *PROGRAMS[name]]
    variables = {**environment(), "PYTHONPATH": paths}
    with subprocess.Popen(
        command, cwd=ROOT, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr.readline() == "importing\n"
        time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        assert process.stderr.read() == ""
        assert process.wait() == -signal.SIGINT  # which shells call 130


def test_the_library_leaves_ctrl_c_alone():
    program = (
        "import signal\nimport llama\nfrom llama import Llama, __main__\n"
        "assert signal.getsignal(signal.SIGINT) is signal.default_int_handler\n"
    )
    done = subprocess.run([sys.executable, "-c", program], env=environment(), check=False)
    assert done.returncode == 0


# ---- the commands themselves


@full
def test_a_chat_through_a_pipe_says_what_went_wrong(tmp_path):
    llama = f"'{sys.executable}' -m llama chat --max_gen_len 4"
    lines = "'Hello\\n/nope\\n/load nowhere\\nHello\\n'"
    status, out, error = shell(f"printf {lines} | {llama}")
    places = out.split("\n")
    assert status == 1
    assert [bool(place) for place in places] == [True, False, False, True, False]
    assert "/nope is no command" in error
    assert "nowhere: No such file or directory" in error
    status, out, error = shell(f"printf {lines} | {llama} >/dev/full", "1")
    assert (status, error) == (1, "standard output: No space left on device\n")
    status, _, error = shell(f"{llama} <&-")
    assert (status, error) == (1, "standard input is closed: there is nothing to answer\n")
