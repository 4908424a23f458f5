"""What several tests share: tiny models with logits of about unit scale."""

import base64
import io
import json
import os
import sys
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():  # kernels then run in Triton's interpreter, on CPU tensors
    os.environ.setdefault("TRITON_INTERPRET", "1")

from safetensors.torch import save_file

from llama import __main__
from llama.checkpoint.hf.read import hf_name
from llama.generation import Llama
from llama.model import ModelArgs, RMSNorm, Transformer
from llama.names import shapes
from llama.terminal import arguments as cli
from llama.tokenizer import Tokenizer


def tiny_args(**changes) -> ModelArgs:
    shape = dict(dim=64, n_layers=2, n_heads=8, n_kv_heads=2, vocab_size=96, multiple_of=32)
    return ModelArgs(**{**shape, "max_batch_size": 4, "max_seq_len": 64, **changes})


def unit_scale(model: Transformer, seed: int = 0) -> Transformer:
    """Weights that keep activations and logits at about unit scale whatever the shape."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, RMSNorm):
                noise = torch.randn(module.weight.shape, generator=generator)
                module.weight.copy_(1 + 0.1 * noise)
            elif hasattr(module, "weight"):
                fan = 1 if isinstance(module, torch.nn.Embedding) else module.weight.shape[1]
                module.weight.copy_(
                    torch.randn(module.weight.shape, generator=generator) / fan**0.5
                )
    return model.eval()


@pytest.fixture
def tiny():
    """A function that makes a tiny Transformer in float32."""
    return lambda seed=0, **changes: unit_scale(Transformer(tiny_args(**changes)), seed)


def write_tokenizer(path, words=()):
    """A ranks file of the 256 bytes and a few words (each needs its beginnings to be ranks too)."""
    ranks = [bytes([b]) for b in range(256)] + [w.encode() for w in words]
    path.write_text("".join(f"{base64.b64encode(r).decode()} {i}\n" for i, r in enumerate(ranks)))
    return path


ADAPTER = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "bias": "none",
           "fan_in_fan_out": False, "use_rslora": False, "use_dora": False, "rank_pattern": {},
           "modules_to_save": None, "lora_dropout": 0.1, "init_lora_weights": True}  # fmt: skip


def write_adapter(path, args, modules=("q_proj", "v_proj"), seed=0, **changes):
    """A random LoRA adapter in PEFT's files; returns A and B by canonical names, rows as there."""
    path.mkdir(exist_ok=True)
    config = ADAPTER | {"target_modules": list(modules)} | changes
    (path / "adapter_config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(seed)
    tensors, pairs = {}, {}
    for name, shape in shapes(args).items():
        theirs = hf_name(name).removesuffix(".weight")
        if theirs.rsplit(".")[-1] in modules:
            b = torch.randn(shape[0], config["r"], generator=generator) / 4
            a = torch.randn(config["r"], shape[1], generator=generator) / 4
            pairs[name] = a, b
            tensors[f"base_model.model.{theirs}.lora_A.weight"] = a
            tensors[f"base_model.model.{theirs}.lora_B.weight"] = b
    save_file(tensors, path / "adapter_model.safetensors")
    return pairs


torch.set_num_threads(1)  # tiny products: more threads only wait for each other
os.environ.setdefault("OMP_NUM_THREADS", "1")  # and the same in the programs that tests start

MOST_WORKERS = 8  # each imports torch and collects the whole suite


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """Whole folders are tested by a worker for each core, where pytest-xdist is installed and
    nothing else is asked for (`-n 0` asks for this process alone). Files and tests that are named
    run in this process, where a debugger can be; so does everything where there is a GPU, whose
    memory and speed are measured."""
    option = config.option
    worker = "PYTEST_XDIST_WORKER" in os.environ
    if worker or getattr(option, "numprocesses", 0) is not None or torch.cuda.is_available():
        return
    alone = option.usepdb or option.trace or option.collectonly or option.capture == "no"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if cores > 1 and not alone and all(Path(argument).is_dir() for argument in config.args):
        option.numprocesses = min(cores, MOST_WORKERS)
        option.dist = "worksteal" if option.dist == "no" else option.dist


@pytest.fixture(autouse=True, scope="session")
def quick_interpreter():
    """Triton's interpreter makes its language ready for a file's functions at each call of one, for
    half of its time. Once a launch is enough: it is undone only at the launch's end."""
    interpreter = sys.modules.get("triton.runtime.interpreter")
    if interpreter is None:
        return
    patch, ready = interpreter._patch_lang, set()

    def once(function):
        file = id(function.__globals__)
        if file in ready:
            return interpreter._LangPatchScope()
        scope = patch(function)
        if not ready:  # a launch, not a call inside of one
            undo = scope.restore
            scope.restore = lambda: (ready.clear(), undo())
        ready.add(file)
        return scope

    interpreter._patch_lang = once


BYTES_VOCAB = 512  # the 256 bytes and the 256 special tokens


@pytest.fixture
def byte_tokenizer(tmp_path):
    return Tokenizer(str(write_tokenizer(tmp_path / "tokenizer.model")))


@pytest.fixture
def tiny_llama(tiny, byte_tokenizer):
    """A function that makes a Llama of a tiny random model over bytes; arguments: ModelArgs
    fields."""

    def make(seed=0, **changes):
        return Llama(tiny(seed, vocab_size=BYTES_VOCAB, **changes), byte_tokenizer)

    return make


class Scripted(Transformer):
    """A model that says what it is told: `script(token, position)` is the id after a token."""

    def __init__(self, script, **changes):
        super().__init__(tiny_args(vocab_size=BYTES_VOCAB, n_layers=1, **changes))
        self.script = script
        self.batches = []  # the counts of every forward

    def hidden(self, tokens, positions, batch, cache=None):
        self.batches.append(batch.counts)
        return torch.stack([tokens, positions], 1).float()

    def logits(self, h):
        wanted = [self.script(int(token), int(position)) for token, position in h]
        return 20.0 * torch.nn.functional.one_hot(torch.tensor(wanted), BYTES_VOCAB).float()


@pytest.fixture
def scripted(byte_tokenizer):
    """A function that makes a Llama whose answers follow a script."""
    return lambda script, **changes: Llama(Scripted(script, **changes), byte_tokenizer)


def says(text, start):
    """A script that answers with the bytes of `text` (or ids) and then ends the turn, whatever the
    prompt of `start` tokens was."""
    ids = [*(text.encode() if isinstance(text, str) else text), 256 + 9]
    return lambda token, position: ids[min(position - start + 1, len(ids) - 1)]


def outcome(capture, call, *given):
    """Exit status, stdout and stderr of a call that may end the process."""
    status = 0
    try:
        call(*given)
    except SystemExit as stop:
        status = stop.code or 0
        if isinstance(status, str):
            status, _ = 1, print(status, file=sys.stderr)
    said = capture.readouterr()
    return status, said.out, said.err


@pytest.fixture
def shell(monkeypatch, capsys):
    """A function that runs a command line in this process: exit status, stdout and stderr."""

    def run(*arguments, commands=__main__.COMMANDS, stdin=b""):
        monkeypatch.setattr(sys, "argv", ["llama", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
        return outcome(capsys, cli.run, commands, "python -m llama")

    return run
