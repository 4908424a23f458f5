"""Both examples and the README's Python: the same text however started, one sentence on errors."""

import re
import runpy
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import outcome

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "llama" / "demo"
README = (ROOT / "README.md").read_text(encoding="utf-8")
GUIDE = (ROOT / "llama" / "README.md").read_text(encoding="utf-8")
EXAMPLES = ("example_chat_completion.py", "example_text_completion.py")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node")
STARTS = {"python": (), "one rank": (*TORCHRUN, "1"), "two ranks": (*TORCHRUN, "2")}


def start(script, way):
    command = [sys.executable, *STARTS[way], script, "--ckpt_dir", str(DEMO)]
    return subprocess.run(
        command, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def runs():
    """What each example printed, by how it was started; two at a time."""
    keys = [(script, way) for script in EXAMPLES for way in STARTS]
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(keys, pool.map(lambda key: start(*key), keys), strict=True))


def test_the_readme_shows_what_the_first_command_prints(runs):
    """All but the haiku, which another processor's roundings may turn into another one."""
    shown = README.split("```text\n")[1].split("```")[0]
    printed, shown = (
        text.strip().partition("haiku about the sea.")
        for text in (runs[EXAMPLES[0], "one rank"].stdout, shown)
    )
    assert printed[:2] == shown[:2]
    assert printed[2].count("\n") == shown[2].count("\n")


def test_the_python_of_the_readme_runs(monkeypatch, capsys):
    """And that of llama/README.md, which goes on with it."""
    monkeypatch.chdir(ROOT)
    first, second = (
        re.findall(r"^```python\n(.*?)^```$", page, re.M | re.S) for page in (README, GUIDE)
    )
    assert len(first) > 6
    assert len(second) > 3
    blocks = first + second
    names = {}
    for block in blocks:
        exec(block, names)
        assert capsys.readouterr().out or "print" not in block


@pytest.mark.parametrize("script", EXAMPLES)
def test_the_text_is_the_same_with_python_torchrun_and_two_ranks(runs, script):
    texts = {}
    for way in STARTS:
        done = runs[script, way]
        assert done.returncode == 0, (way, done.stderr)
        texts[way] = done.stdout
    assert runs[script, "python"].stderr == ""
    assert texts["python"] == texts["one rank"] == texts["two ranks"]


def test_the_chat_is_printed_as_a_dialogue(runs):
    said = runs[EXAMPLES[0], "python"].stdout
    dialogues = [block for block in said.split("\n\n") if block]
    assert len(dialogues) == 6
    for dialogue in dialogues:
        roles = re.findall(r"^(system|user|assistant): ", dialogue, re.M)
        assert roles[-1] == "assistant"
        assert roles.count("user") == roles.count("assistant")
    assert "assistant: The capital of Japan is Tokyo." in said
    assert "assistant: Your name is Ada." in said


def test_the_texts_are_printed_with_their_continuations(runs):
    said = runs[EXAMPLES[1], "python"].stdout
    assert re.search(r"^The capital of Italy is\n> Rome", said, re.M)
    assert re.search(r"^Monday, Tuesday, Wednesday,\n> Thursday", said, re.M)


@pytest.fixture
def example(monkeypatch, capfd):
    """A function that runs an example in this process: its exit status, stdout and stderr."""

    def run(script, *arguments):
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        return outcome(capfd, runpy.run_path, str(ROOT / script), None, "__main__")

    return run


@pytest.mark.parametrize("script", EXAMPLES)
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--ckpt_dir", "nowhere"], "nowhere: there is no such folder"),
        (["--ckpt_dir", "1,2"], "1,2: there is no such folder"),
        (["--ckpt_dir", DEMO, "--tokenizer_path", "None"], "no tokenizer file at None"),
        (["--ckpt_dir", DEMO, "--temperature", "-1"], "temperature is -1; it must be a number >= "),
        (["--ckpt_dir", DEMO, "--top_p", "most"], "--top_p is 'most'; it must be a number"),
        (["--ckpt_dir", DEMO, "--max_batch_size", "0"], "max_batch_size=0: must be a positive "),
        (["--ckpt_dir", DEMO, "--max_seq_len", "5"], "prompt 0: the prompt has "),
        (["--ckpt_dir", DEMO, "--max_seq_len", "10000"], "max_seq_len=10000: the model's context"),
    ],
)
def test_what_cannot_work_is_one_sentence_and_a_status(example, script, flags, message):
    status, out, error = example(script, *map(str, flags))
    assert (status, out) == (1, "")
    assert error.startswith(message)
    assert error.count("\n") == 1


@pytest.mark.parametrize("script", EXAMPLES)
def test_an_unknown_flag_runs_nothing(example, script):
    status, out, error = example(script, "--ckpt_dir", str(DEMO), "--temprature", "0")
    assert (status, out) == (2, "")
    assert "--temprature" in error


@pytest.mark.parametrize("script", EXAMPLES)
def test_flags_reach_the_model(example, script):
    base = ["--ckpt_dir", str(DEMO), "--max_gen_len", "8"]
    text = example(script, *base)[1]
    assert example(script, *base)[1] == text
    for flag in (["--max_gen_len", "2"], ["--temperature", "50"], ["--temperature=50", "--seed=2"]):
        assert example(script, *base, "--top_p", "1", *flag)[1] != text
    hot = [*base, "--temperature", "50", "--top_p"]
    assert example(script, *hot, "1")[1] != example(script, *hot, "0.01")[1]
    assert example(script, *hot, "1")[1] != example(script, *hot, "1", "--seed", "2")[1]
