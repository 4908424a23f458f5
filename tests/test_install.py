"""What `pip install -e .` brings, and that nothing else is needed; Meta's calls, as they stand."""

import importlib
import os
import re
import runpy
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import ModuleType

import pytest
from conftest import outcome

import llama
from llama.commands import main

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "llama" / "demo"
FIVE = {"torch", "fairscale", "fire", "tiktoken", "blobfile"}


def name_of(requirement):
    return re.match(r"[\w.-]+", requirement)[0].lower().replace("_", "-")


def brought_along():
    """The five packages, and by their metadata all that pip installs with them here."""
    requirements = pytest.importorskip("packaging.requirements")
    found, rest = set(), set(FIVE)
    while rest:
        name = rest.pop()
        found.add(name)
        for text in metadata.requires(name) or []:
            one = requirements.Requirement(text)
            if one.marker is None or one.marker.evaluate({"extra": ""}):
                rest |= {name_of(one.name)} - found
    return found


def test_pip_installs_the_five_packages_and_what_they_need(monkeypatch):
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").split()
    assert {name_of(line) for line in lines} == FIVE
    assert all(re.fullmatch(r"[a-z]+>=[\d.]+", line) for line in lines), "no upper bounds"
    given = {}
    stand_in = ModuleType("setuptools")
    stand_in.find_packages = lambda **options: []
    stand_in.setup = given.update
    monkeypatch.setitem(sys.modules, "setuptools", stand_in)
    runpy.run_path(str(ROOT / "setup.py"))
    assert given["install_requires"] == lines
    assert given["version"] == llama.__version__
    (script,) = given["entry_points"]["console_scripts"]
    name, module, function = re.fullmatch(r"(\w+) = ([\w.]+):(\w+)", script).groups()
    assert name == "llama"
    assert getattr(importlib.import_module(module), function) is main
    optional = {name_of(each) for extra in given["extras_require"].values() for each in extra}
    assert not optional & FIVE


def test_no_sentence_sends_people_to_a_package_of_somebody_else():
    """The index has another `llama`; extras are those of this folder."""
    files = [ROOT / "README.md", *(ROOT / "llama").rglob("*.py"), *(ROOT / "tests").glob("*.py")]
    for file in files:
        text = file.read_text(encoding="utf-8")
        assert not re.search(r"pip install (-U )?['\"]?llama\b", text), file
    assert "pip install -e '.[cli]'" in files[0].read_text(encoding="utf-8")


# Refuses every module of an installed package that pip would not have installed with the five.
BLOCKED = """
import importlib.abc, sys
from importlib import metadata

allowed = set(sys.argv[2].split())
tops = metadata.packages_distributions()
tried = set()

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        owners = {each.lower().replace("_", "-") for each in tops.get(top, [])}
        if owners and not owners & allowed and top not in ("llama", *sys.stdlib_module_names):
            tried.add(top)
            raise ModuleNotFoundError(f"{top} would not be installed", name=name)
        return None

for name in [name for name in sys.modules if "." not in name]:  # what .pth files imported
    if name in tops and name not in sys.stdlib_module_names:
        del sys.modules[name]
sys.meta_path.insert(0, Refuse())
try:
    import pytest
except ModuleNotFoundError:
    pass
assert "pytest" in tried, "nothing is refused"

from llama import Llama
from llama.commands import main
llama = Llama.build(sys.argv[1], max_seq_len=64, device="cpu")
print(llama.text_completion(["The capital of Italy is"], 0, max_gen_len=4)[0]["generation"])
dialog = [{"role": "user", "content": "What is 17 + 25?"}]
print(llama.chat_completion([dialog], 0)[0]["generation"]["content"])
sys.argv = ["llama", "tokenize", "hello"]
main()
"""


def test_nothing_but_the_five_and_what_they_bring_is_needed():
    allowed = brought_along()
    assert allowed > FIVE
    assert not allowed & {"pytest", "transformers", "sentencepiece", "gguf", "rich"}
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED, str(DEMO), " ".join(allowed)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    completed, answered, *tokens = done.stdout.splitlines()
    assert completed.startswith(" Rome")
    assert answered == "17 + 25 = 42."
    assert tokens
    assert done.stderr == ""


def test_the_console_script_is_called_by_its_own_name(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["/usr/bin/llama", "verify", "--help"])
    main()
    assert capsys.readouterr().out.startswith("llama verify [CKPT_DIR] ")
    monkeypatch.setattr(sys, "argv", [str(ROOT / "llama" / "__main__.py")])
    main()
    assert capsys.readouterr().out.startswith("python -m llama COMMAND ")


# The calls that the scripts of Meta's repository make, with their names and keywords.
CHAT = """
from typing import List, Optional
import fire
from llama import Dialog, Llama

def main(
    ckpt_dir: str, tokenizer_path: str, temperature: float = 0.6, top_p: float = 0.9,
    max_seq_len: int = 512, max_batch_size: int = 4, max_gen_len: Optional[int] = None,
):
    generator = Llama.build(
        ckpt_dir=ckpt_dir, tokenizer_path=tokenizer_path,
        max_seq_len=max_seq_len, max_batch_size=max_batch_size,
    )
    dialogs: List[Dialog] = [
        [{"role": "user", "content": "What is 17 + 25?"}],
        [{"role": "system", "content": "Answer in one word."},
         {"role": "user", "content": "What is the opposite of hot?"}],
    ]
    results = generator.chat_completion(
        dialogs, max_gen_len=max_gen_len, temperature=temperature, top_p=top_p,
    )
    for dialog, result in zip(dialogs, results):
        for message in dialog:
            print(message["role"].capitalize() + ": " + message["content"])
        answer = result["generation"]
        print("> " + answer["role"].capitalize() + ": " + answer["content"])

if __name__ == "__main__":
    fire.Fire(main)
"""
TEXT = """
from typing import List
import fire
from llama import Llama

def main(
    ckpt_dir: str, tokenizer_path: str, temperature: float = 0.6, top_p: float = 0.9,
    max_seq_len: int = 128, max_gen_len: int = 64, max_batch_size: int = 4,
):
    generator = Llama.build(
        ckpt_dir=ckpt_dir, tokenizer_path=tokenizer_path,
        max_seq_len=max_seq_len, max_batch_size=max_batch_size,
    )
    prompts: List[str] = ["The capital of Italy is", "Monday, Tuesday, Wednesday,"]
    results = generator.text_completion(
        prompts, max_gen_len=max_gen_len, temperature=temperature, top_p=top_p,
    )
    for prompt, result in zip(prompts, results):
        print(prompt + "|" + result["generation"].split(chr(10))[0])

if __name__ == "__main__":
    fire.Fire(main)
"""
WAYS = {"python": [], "torchrun": ["-m", "torch.distributed.run", "--standalone",
                                   "--nproc_per_node", "1"]}  # fmt: skip
EXPECTED = {
    CHAT: "User: What is 17 + 25?\n> Assistant: 17 + 25 = 42.\nSystem: Answer in one word.\n"
    "User: What is the opposite of hot?\n> Assistant: cold",
    TEXT: "The capital of Italy is| Rome",
}


# Each script and each way once; test_examples.py starts our own scripts in every way.
STARTED = [
    pytest.param(CHAT, "torchrun", id="chat-torchrun"),
    pytest.param(TEXT, "python", id="text-python"),
    pytest.param(CHAT, "python", id="chat-python", marks=pytest.mark.slow),
    pytest.param(TEXT, "torchrun", id="text-torchrun", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("script", "way"), STARTED)
def test_a_script_with_the_calls_of_metas_own_runs_on_the_demo(tmp_path, script, way):
    file = tmp_path / "script.py"
    file.write_text(script)
    flags = ["--ckpt_dir", DEMO, "--tokenizer_path", DEMO / "tokenizer.model", "--temperature", "0"]
    done = subprocess.run(
        [sys.executable, *WAYS[way], file, *flags, "--max_batch_size=2"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(EXPECTED[script])


@pytest.mark.parametrize("name", ["chat", "text"])
def test_our_examples_take_the_arguments_of_metas_in_their_order(name, monkeypatch, capfd):
    """`torchrun ... example_chat_completion.py DIR TOKENIZER 0` works with fire as well."""
    file = str(ROOT / f"example_{name}_completion.py")
    given = [file, str(DEMO), str(DEMO / "tokenizer.model"), "0", "--max_gen_len", "4"]
    monkeypatch.setattr(sys, "argv", given)
    status, out, error = outcome(capfd, runpy.run_path, file, None, "__main__")
    assert (status, error) == (0, "")
    assert out
