"""The command line: arguments as typed, errors in one sentence, and what `info` says and leaves."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import BYTES_VOCAB, tiny_args

from llama import loading
from llama.checkpoint import random_checkpoint, write_meta
from llama.commands import COMMANDS, main
from llama.commands.info import info
from llama.model import ModelArgs

ODD = ("1,2", "None", "{a: b}", '"x"', "[1]", "1e3", "True", "a b", "0x10")


@pytest.mark.parametrize("text", ODD)
def test_text_arrives_as_typed_and_numbers_as_numbers(shell, text):
    got = []

    def command(first: str, second: str | None = None, number: float = 0, either=None) -> None:
        got.append((first, second, number, either))

    flags = ("--second", text, "--number", 1.5, "--either", "None")
    assert shell(text, *flags, commands=command)[0] == 0
    assert shell("do", f"--first={text}", "--number", 7, commands={"do": command})[0] == 0
    assert got == [(text, text, 1.5, None), (text, None, 7, None)]


def test_nothing_runs_until_the_whole_command_line_fits(shell):
    ran = []

    def command(path: str, size: int = 1) -> None:
        """Does it."""
        ran.append(path)

    status, _, error = shell("here", "--sise", 3, commands=command)
    assert status == 2
    assert "--sise" in error
    assert shell(commands=command)[0] == 2
    assert shell("dont", commands={"do": command})[0] == 2
    assert shell("--help", commands=command)[0] == 0
    assert not ran


def test_an_option_that_is_none_is_told_in_a_sentence_with_those_that_are(shell):
    def command(path: str, size: int = 1, fast: bool = True) -> None:
        """Does it."""

    takes = "do takes --path, --size, --fast, --debug\n"
    told = shell("do", "here", "--sise=3", commands={"do": command})
    assert told == (2, "", f"there is no option --sise: did you mean --size? {takes}")
    told = shell("do", "here", "--elsewhere", commands={"do": command})
    assert told == (2, "", f"there is no option --elsewhere: {takes}")
    assert shell("do", "here", "--nofast", "--size", -1, commands={"do": command})[0] == 0
    told = shell("do", "--", "--trace", "--size", commands={"do": command})
    assert told == (1, "", "--size is '--size'; it must be a whole number\n")


@pytest.mark.parametrize("error", [ValueError("size is 0"), FileNotFoundError("no such folder: x")])
def test_an_error_for_people_is_one_sentence_and_status_1(shell, error):
    def command() -> None:
        raise error

    assert shell(commands=command) == (1, "", f"{error}\n")


def test_an_error_of_ours_keeps_its_traceback(shell):
    def command() -> None:
        raise AssertionError("ours")

    with pytest.raises(AssertionError, match="ours"):
        shell(commands=command)


@pytest.mark.parametrize(
    ("flag", "value", "works"),
    [
        ("--size", "two", "a whole number"),
        ("--size", "1.5", "a whole number"),
        ("--size", "True", "a whole number"),
        ("--share", "1,2", "a number or None"),
        ("--share", "half", "a number or None"),
        ("--loud", "1", "True or False"),
    ],
)
def test_a_value_of_the_wrong_kind_is_refused_before_anything_runs(shell, flag, value, works):
    ran = []

    def command(size: int = 1, share: float | None = None, loud: bool = False) -> None:
        ran.append((size, share, loud))

    status, _, error = shell(flag, value, commands=command)
    assert status == 1
    assert error.endswith(f"; it must be {works}\n")
    assert not ran
    assert shell("--size=-3", "--share=2", "--loud", commands=command)[0] == 0
    assert ran == [(-3, 2, True)]


# ---- python -m llama


def table(text):
    return dict(re.split(r"  +", line.strip(), maxsplit=1) for line in text.splitlines())


def written(folder, shards=1, dtype=torch.bfloat16, **changes):
    args = tiny_args(vocab_size=BYTES_VOCAB, context_length=2048, **changes)
    write_meta(random_checkpoint(args, dtype=dtype), folder, shards=shards)
    return args


def test_no_command_lists_the_commands(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["llama"])
    main()
    said = capsys.readouterr().out
    for name, command in COMMANDS.items():
        assert re.search(rf"^  {name} +{command.__doc__.splitlines()[0]}$", said, re.M)


def test_info_says_what_lies_there_and_what_it_takes(tmp_path, capsys):
    written(tmp_path, shards=2)
    info(str(tmp_path), max_batch_size=2, max_seq_len=1000, model_parallel_size=2)
    said = table(capsys.readouterr().out)
    assert said["family"] == "a Llama of its own shape"
    assert said["parameters"] == "160,064"
    assert said["on disk"] == "2 shards, bfloat16"
    assert said["context"] == "2048 tokens"
    assert said["rope scaling"] == "none"
    assert said["ranks that work"] == "1, 2, 4, 8"
    assert said["each rank"] == "bfloat16, max_batch_size 2, max_seq_len 1000, ranks 2"
    for device in ("on a GPU", "on a CPU"):
        assert re.fullmatch(r"(\S+ MiB [a-z() ]+ [+=] ){3}\S+ MiB", said[device])
    assert re.fullmatch(r"[\d.]+ GiB free for each rank: fits", said["main memory"])


def test_info_names_rope_scaling_dtype_and_mapped_weights(tmp_path, capsys):
    written(tmp_path, use_scaled_rope=True)
    info(str(tmp_path))
    said = table(capsys.readouterr().out)
    assert said["rope scaling"] == "factor 8, low 1, high 4, original context 8192"
    assert "mapped" in said["on a CPU"]
    info(str(tmp_path), dtype="float32")
    said = table(capsys.readouterr().out)
    assert said["each rank"].startswith("float32, ")
    assert "mapped" not in said["on a CPU"]


def test_info_says_what_would_fit_where_the_limits_do_not(tmp_path, capsys):
    written(tmp_path)
    with pytest.raises(SystemExit) as ended:
        info(str(tmp_path), max_batch_size=2**30)
    assert ended.value.code == 1
    assert re.search(
        r"not enough memory on cpu: .*what fits: max_batch_size=", capsys.readouterr().out
    )


def test_info_knows_the_released_models(monkeypatch, capsys):
    shape = dict(dim=2048, n_layers=16, n_heads=32, n_kv_heads=8, vocab_size=128256)
    args = ModelArgs(**shape, ffn_dim_multiplier=1.5, use_scaled_rope=True, tied=True)
    monkeypatch.setattr(loading, "open_checkpoint", lambda folder, **_: random_checkpoint(args))
    info("anywhere", max_batch_size=4)
    said = table(capsys.readouterr().out)
    assert said["family"] == "Llama 3.2 1B"
    assert said["parameters"] == "1,235,814,400"
    assert said["rope scaling"].startswith("factor 32, ")
    assert said["on a GPU"].startswith("2.30 GiB weights + 1.00 GiB cache + ")  # 32 KiB a token


@pytest.mark.parametrize("name", ODD)
def test_info_takes_a_path_as_typed(tmp_path, monkeypatch, shell, name):
    monkeypatch.chdir(tmp_path)
    assert shell("info", name) == (1, "", f"{name}: there is no such folder\n")
    written(Path(name))
    assert shell("info", name)[0] == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--max_seq_len", "4096"], "max_seq_len=4096: the model's context is 2048 tokens"),
        (["--max_batch_size", "many"], "--max_batch_size is 'many'; it must be a whole number\n"),
        (["--dtype", "int8"], "dtype='int8': use one of float32, bfloat16, float16"),
        (
            ["--model_parallel_size", "3"],
            "model_parallel_size=3: these numbers of ranks can ",
        ),
        (["--max_batch_size", "0"], "max_batch_size=0: must be a positive whole number"),
        (["--max_seq_len", "1,2"], "--max_seq_len is (1, 2); it must be a whole number or None\n"),
    ],
)
def test_info_refuses_limits_that_do_not_work(tmp_path, shell, flags, message):
    written(tmp_path)
    status, out, error = shell("info", tmp_path, *flags)
    assert (status, out) == (1, "")
    assert error.startswith(message)
    assert error.count("\n") == 1


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads its memory from /proc")
def test_info_reads_no_weights_and_touches_no_gpu(tmp_path):
    args = tiny_args(dim=1024, n_layers=4, multiple_of=4096, vocab_size=BYTES_VOCAB)
    write_meta(random_checkpoint(args), tmp_path, shards=1)
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) > 100 << 20
    script = (
        "import sys, torch\n"
        "from llama.commands.info import info\n"
        "def resident(): return int(open('/proc/self/statm').read().split()[1]) * 4096\n"
        "before = resident()\n"
        "info(sys.argv[1])\n"
        "assert resident() - before < 30 << 20, (before, resident())\n"
        "assert not torch.cuda.is_initialized()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "family" in done.stdout
