"""Meta's own example scripts, byte for byte, on the demo: what drop-in means.

The scripts are not ours to hand on. Put the two files of Meta's llama3 repository into `.meta/` at
the top of this one, and run `pytest -m peer tests/test_meta_scripts.py`.
"""

import hashlib
import inspect
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from llama import Llama

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "llama" / "demo"
CHAT = "605af05afe636e886e709b408e030e873f1cd6a6fe7ac0b36108f540bb9d335e"  # sha256
TEXT = "c9356f5fe7bfcff196f731901dfc490fb26aaebf1af3ea577d28da34f70b1b5d"
SCRIPTS = {  # and how many answers each prints
    "example_chat_completion.py": (CHAT, 4),
    "example_text_completion.py": (TEXT, 4),
}


@pytest.mark.peer
@pytest.mark.parametrize("script", SCRIPTS)
def test_metas_script_runs_unchanged(script, tmp_path):
    sha256, answers = SCRIPTS[script]
    source = ROOT / ".meta" / script
    if not source.exists():
        pytest.skip(f"{source} is not there: it is Meta's, and comes with their llama3 repository")
    assert hashlib.sha256(source.read_bytes()).hexdigest() == sha256
    shutil.copy(source, tmp_path)  # beside no other file of ours
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1"),
        *(tmp_path / script, "--ckpt_dir", DEMO, "--tokenizer_path", DEMO / "tokenizer.model"),
    ]
    done = subprocess.run(
        command, cwd=tmp_path, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n==================================\n") == answers


def test_build_begins_with_metas_parameters():
    names = list(inspect.signature(Llama.build).parameters)
    assert names[:6] == [
        "ckpt_dir",
        "tokenizer_path",
        "max_seq_len",
        "max_batch_size",
        "model_parallel_size",
        "seed",
    ]


@pytest.mark.parametrize(
    ("method", "names"),
    [
        ("generate", "prompt_tokens max_gen_len temperature top_p logprobs echo"),
        ("text_completion", "prompts temperature top_p max_gen_len logprobs echo"),
        ("chat_completion", "dialogs temperature top_p max_gen_len logprobs"),
    ],
)
def test_methods_begin_with_metas_parameters(method, names):
    parameters = list(inspect.signature(getattr(Llama, method)).parameters.values())[1:]
    own = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert own == names.split()
