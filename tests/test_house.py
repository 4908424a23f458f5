"""Laws of the house: who imports whom, what stays as it was, and that every option matters."""

import ast
import hashlib
import inspect
import re
import subprocess
import sys
from dataclasses import fields
from graphlib import TopologicalSorter
from itertools import groupby
from unittest import mock

import house
import pytest
import torch
from conftest import BYTES_VOCAB, tiny_args, write_adapter, write_tokenizer

import llama as package
from llama import Llama, SamplingParams
from llama.__main__ import COMMANDS
from llama.checkpoint import random_checkpoint, write_meta
from llama.loading import runners

SOURCES = house.sources()
TREES = {name: ast.parse(file.read_text(encoding="utf-8")) for name, file in SOURCES.items()}

# Rooms from the ground up. A room imports from lower floors only, or from itself.
FLOORS = (
    {"terminal", "meeting", "sampling_params", "args"},
    {"cache", "parallel", "sampling", "files"},
    {"model", "tokenizer"},
    {"names", "text", "engine", "options"},
    {"quantization", "download"},
    {"checkpoint", "cpu", "cuda"},  # side by side: none knows another
    {"loading"},
    {"generation"},
    {"server", ""},  # "" is llama/__init__.py
    {"commands"},
    {"__main__", "demo"},
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
ONLY = {  # of our own rooms
    "args": set(),
    "cache": set(),
    "sampling": {"sampling_params"},
    "model": {"args", "cache", "parallel"},
    "files": {"terminal"},
    "download": {"files", "terminal"},
    "engine": {"model", "cache", "sampling", "sampling_params"},
    "generation": {"args", "engine", "loading", "model", "options", "sampling_params"}
    | {"text", "tokenizer"},
    "__main__": {"commands", "terminal"},
}
COMMANDS_OF_DEVICES = ("llama.commands.info", "llama.commands.common")
LAZY = {"loading", "commands"}  # may reach for llama.cuda inside a function
NO_TORCH = (
    *("llama.args", "llama.sampling_params", "llama.tokenizer", "llama.text", "llama.files"),
    *("llama.terminal", "llama.__main__", "llama.engine.engine", "llama.engine.request"),
    *("llama.commands.download", "llama.download"),
)
REQUIRED = {"torch", "fairscale", "fire", "tiktoken", "blobfile"}
WITH_THEM = {"numpy", "jinja2", "requests", "regex", "typing_extensions"}  # come with these
PROGRAMS = ("llama.__main__", "llama.commands", "llama.demo")  # what people run: may print


def strings(tree):
    """Every string of the code that is no docstring, with the node that it stands in."""
    parent = {id(child): node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            around = parent[id(node)]
            if not isinstance(around, ast.Expr):
                yield node.value, around


@pytest.mark.parametrize("module", SOURCES)
def test_imports_go_down(module):
    room = house.room_of(module)
    for target, _ in house.imports(TREES[module], SOURCES):
        if target.split(".")[0] == "llama" and house.room_of(target) != room:
            below = FLOOR_OF[house.room_of(target)] < FLOOR_OF[room]
            assert below, f"{module} imports {target}, which is not below it"
            assert house.room_of(target) in ONLY.get(room, {house.room_of(target)}), (
                module,
                target,
            )


def test_imports_make_no_cycle():
    graph = {
        module: {target for target, _ in house.imports(tree, SOURCES) if target in SOURCES}
        - {module}
        for module, tree in TREES.items()
    }
    list(TopologicalSorter(graph).static_order())


@pytest.mark.parametrize("module", SOURCES)
def test_imports_stand_at_the_top_and_are_of_required_packages(module):
    for target, inside in house.imports(TREES[module], SOURCES):
        top = target.split(".")[0]
        if top in sys.stdlib_module_names or top == "llama" or top in REQUIRED | WITH_THEM:
            lazy_room = house.room_of(module) in LAZY and target.startswith("llama.cuda")
            assert not inside or lazy_room, f"{module} imports {target} inside a function"
        elif not (top == "triton" and house.room_of(module) == "cuda"):
            assert inside, f"{module} imports {target}, which is not required, at its top"
        if top == "fairscale":
            assert module == "llama.parallel"
        if top == "torch":
            assert not module.startswith(NO_TORCH)


def test_the_model_page_imports_little():
    allowed = {"torch", "llama.args", "llama.cache", "llama.parallel"}
    for target, _ in house.imports(TREES["llama.model"], SOURCES):
        top = target.split(".")[0]
        assert top in sys.stdlib_module_names or top in allowed or target in allowed, target


@pytest.mark.parametrize("module", sorted(set(SOURCES) - {"llama.parallel"}))
def test_only_parallel_reads_the_environment(module):
    # torch is deterministic on a GPU only with this variable, which training therefore sets
    allowed = {"CUBLAS_WORKSPACE_CONFIG"} if module == "llama.demo.train" else set()
    if module == "llama.commands.common":
        allowed = {"RANK"}  # which process acts for all, without waiting for torch
    if module == "llama.commands.download":
        allowed = {"PRESIGNED_URL"}  # a secret, which a command line would show to everybody
    for node in ast.walk(TREES[module]):
        name = node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", None)
        if name in ("environ", "environb", "getenv", "putenv"):
            words = {value for value, _ in strings(TREES[module])}
            assert allowed & words, f"{module}, line {node.lineno}: {name}"


@pytest.mark.parametrize("module", sorted(set(SOURCES) - {"llama.parallel"}))
def test_no_device_is_written_into_the_code(module):
    """`device.type == "cuda"` asks, and is allowed; anything else would run on NVIDIA only."""
    if house.room_of(module) == "cuda" or module in (
        "llama.commands.info",
        "llama.commands.common",
    ):  # which adds up what a GPU would need
        return
    for value, around in strings(TREES[module]):
        asks = isinstance(around, ast.Compare) and ast.unparse(around.left).endswith(
            (".type", "device")
        )
        assert "cuda" not in value or asks, f"{module}, line {around.lineno}: {value!r}"


@pytest.mark.parametrize("module", [m for m in SOURCES if not m.startswith(PROGRAMS)])
def test_the_library_does_not_print(module):
    for node in ast.walk(TREES[module]):
        assert getattr(getattr(node, "func", None), "id", "") != "print", (module, node.lineno)


@pytest.mark.parametrize("module", SOURCES)
def test_every_file_says_what_it_does(module):
    assert ast.get_docstring(TREES[module])


def test_scripts_for_metas_repository_find_their_imports():
    exec(
        "from llama import ChatFormat, Dialog, Llama, Message, ModelArgs, Tokenizer, Transformer\n"
        "from llama.generation import ChatPrediction, CompletionPrediction, Llama\n"
        "from llama.model import ModelArgs, RMSNorm, Transformer\n"
        "from llama.tokenizer import ChatFormat, Dialog, Message, Role, Tokenizer\n",
        {},
    )
    for name in package.__all__:
        assert hasattr(package, name)


# ---- the README, and llama/README.md, where the map is

README = (house.ROOT / "README.md").read_text(encoding="utf-8")
GUIDE = (house.ROOT / "llama" / "README.md").read_text(encoding="utf-8")
LONGEST = 230  # lines of the README: what a newcomer reads


def section(page, heading):
    """What stands under a heading of the second level."""
    return page.split(f"\n## {heading}\n")[1].split("\n## ")[0]


def rows(page, heading):
    """The first column of the tables under a heading, where it is code."""
    return re.findall(r"^\| `(.+?)` \|", section(page, heading), re.M)


def has_code(module):
    """Whether a file has more than the docstring of a folder."""
    return [type(node) for node in TREES[module].body] != [ast.Expr]


def test_the_readme_is_short():
    assert len(README.splitlines()) <= LONGEST


def test_the_map_names_every_file_in_an_order_to_read_them():
    """Every file that has code once; rooms from the ground up, each of them in one piece; in a
    room a file after those that it imports."""
    modules = {
        file.relative_to(house.ROOT / "llama").as_posix(): module
        for module, file in SOURCES.items()
        if has_code(module)
    }
    files = rows(GUIDE, "The map")
    assert sorted(files) == sorted(set(files)), "a file is named twice"
    unnamed, gone = sorted(set(modules) - set(files)), sorted(set(files) - set(modules))
    assert not unnamed, f"llama/README.md does not name {unnamed}"
    assert not gone, f"llama/README.md names {gone}, which are not there"
    named = [modules[file] for file in files]
    rooms = [room for room, _ in groupby(named, key=house.room_of)]
    assert len(rooms) == len(set(rooms)), rooms
    assert sorted(rooms, key=FLOOR_OF.__getitem__) == rooms, "rooms are not from the ground up"
    for at, module in enumerate(named):
        room = house.room_of(module)
        used = {t for t, _ in house.imports(TREES[module], SOURCES) if house.room_of(t) == room}
        missing = {target for target in used & set(SOURCES) if has_code(target)} - {*named[:at]}
        assert missing <= {module}, f"{module} stands above {missing}"


def test_the_lines_of_who_imports_whom_are_those_of_the_test():
    drawn = section(GUIDE, "Who imports whom").split("```text\n")[1].split("```")[0]
    rooms = {house.room_of(module) for module in SOURCES}
    floors = [{room or "__init__" for room in floor & rooms} for floor in reversed(FLOORS)]
    assert [set(line.split()) for line in drawn.splitlines()] == [f for f in floors if f]


def test_the_readme_has_every_command():
    named = {row.split()[0] for row in rows(README, "Commands")}
    assert not set(COMMANDS) - named


def test_the_messages_of_the_readme_are_those_of_the_code():
    spoken = []
    for tree in TREES.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                parts = [v.value if isinstance(v, ast.Constant) else "\0" for v in node.values]
                spoken.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                spoken.append(node.value)
    messages = rows(GUIDE, "When it says no")
    assert len(messages) > 10
    for message in messages:
        pattern = re.escape(message).replace(r"\.\.\.", ".+")
        assert any(re.search(pattern, text) for text in spoken), message


def test_the_numbers_of_the_readme_are_of_the_weights_in_the_box():
    """Other weights: run the evaluation again, put its table and this sum into llama/README.md, and
    what all questions together come to into the README."""
    weights = (house.ROOT / "llama" / "demo" / "consolidated.00.pth").read_bytes()
    assert f"`{hashlib.sha256(weights).hexdigest()}`" in GUIDE
    questions, model, nearest = re.search(r"^all +(\d+) +(\S+)% +(\S+)%$", GUIDE, re.M).groups()
    said = section(README, "The demo")
    for number in (f"{model} % of {questions} ", f"{nearest} %"):
        assert number in " ".join(said.split())


# ---- nothing global changes


SESSION = """
import contextlib, io, logging, os, random, signal, sys, threading, warnings
import numpy, torch

def state():
    return {
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "torch's random numbers": torch.get_rng_state().tolist(),
        "python's random numbers": random.getstate(),
        "numpy's random numbers": repr(numpy.random.get_state()),
        "stdout, stderr": (sys.stdout, sys.stderr),
        "environment": dict(os.environ),
        "working folder": os.getcwd(),
        "threads of torch": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "grad mode": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "determinism": torch.are_deterministic_algorithms_enabled(),
        "precision": torch.get_float32_matmul_precision(),
        "attention": torch.backends.cuda.flash_sdp_enabled(),
        "logging": (logging.root.level, list(logging.root.handlers)),
        "warnings": list(warnings.filters),
        "signals": [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)],
        "process group": torch.distributed.is_initialized(),
        "threads": threading.active_count(),
    }

def unchanged(before, what):
    after = state()
    changed = [name for name in before if before[name] != after[name]]
    assert not changed, (what, [(before[n], after[n]) for n in changed])

torch.set_num_threads(3)
before = state()
from llama import Llama
unchanged(before, "import")

folder = sys.argv[1]
said = io.StringIO()
with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
    inside = state()
    one = Llama.build(folder, max_seq_len=256, max_batch_size=2)
    unchanged(inside, "build")
dialog = [{"role": "user", "content": "Hello!"}]
answer = one.chat_completion([dialog] * 3, max_gen_len=8, seed=5)
unchanged(before, "chat_completion")

stream = one.stream_text_completion(["One, two,"], max_gen_len=8)
next(stream)
unchanged(before, "a stream half-way")
two = Llama.build(folder, folder + "/tokenizer.model", 128, 1, dtype="float32")
assert two.chat_completion([dialog], max_gen_len=8) and one.chat_completion([dialog], max_gen_len=8)
assert one.chat_completion([dialog] * 3, max_gen_len=8, seed=5) == answer, "the other model matters"
list(stream)
unchanged(before, "two models side by side")
assert not said.getvalue(), said.getvalue()
print("done")
"""


def test_it_runs_with_an_empty_environment_twice_at_once_and_changes_nothing_global(tmp_path):
    """Two processes at one time: no port, no file and no variable is shared."""
    args = tiny_args(vocab_size=BYTES_VOCAB, context_length=512)
    write_meta(random_checkpoint(args), tmp_path)
    write_tokenizer(tmp_path / "tokenizer.model")
    command = [sys.executable, "-c", SESSION, str(tmp_path)]
    pipes = dict(stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    both = [subprocess.Popen(command, env={}, cwd=house.ROOT, text=True, **pipes) for _ in range(2)]
    for process in both:
        out, error = process.communicate(timeout=120)
        assert (process.returncode, out) == (0, "done\n"), error


# ---- every option changes something


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tiny checkpoint with its tokenizer, `a`, and one with others of both, `b`."""
    both = {}
    for seed, name in enumerate("ab"):
        folder = both[name] = tmp_path_factory.mktemp(name)
        args = tiny_args(vocab_size=BYTES_VOCAB + 1, context_length=512)
        write_meta(random_checkpoint(args, seed=seed, dtype=torch.bfloat16), folder)
        write_tokenizer(folder / "tokenizer.model", ["el"] if name == "b" else [])
        write_adapter(folder / "adapter", args)
    return both


BUILD = {
    "ckpt_dir": {"ckpt_dir": "b", "tokenizer_path": "a/tokenizer.model"},
    "tokenizer_path": {"tokenizer_path": "b/tokenizer.model"},
    "max_seq_len": {"max_seq_len": 40},
    "max_batch_size": {"max_batch_size": 2},
    "model_parallel_size": {"model_parallel_size": 2},
    "seed": {"seed": 2},
    "device": {"device": "cuda:99"},
    "dtype": {"dtype": "float32"},
    "rope_scaling": {"rope_scaling": 4.0},
    "adapter": {"adapter": "a/adapter"},
    "quantize": {"quantize": "int8"},
    "reuse": {"reuse": True},
    "kernels": {"kernels": False},
}


def build_outcome(folders, changes):
    """What a build can be told from: its answers, its limits, its dtype, whether it went for the
    kernels (which find no GPU here), or its error."""
    names = {"ckpt_dir": "a"} | changes
    for key in {"ckpt_dir", "tokenizer_path", "adapter"} & set(names):
        name, _, file = names[key].partition("/")
        names[key] = folders[name] / file
    try:
        with mock.patch.object(runners, "captured_runner", return_value=None) as use_kernels:
            built = Llama.build(**names)
    except ValueError as error:
        return str(error)
    ids = built.tokenizer.encode("Hello", bos=True, eos=False)
    scores = built.generate([ids], 0, logprobs=True, echo=True)
    sampled = built.generate([ids], 8, 1.0, 1.0)
    dtype = built.model.norm.weight.dtype
    built.generate([ids], 1)
    again = built.engine.submit(ids, SamplingParams(max_tokens=1))
    built.engine.step()
    shape = built.engine.runner.cache.k.shape
    return scores, sampled, shape, dtype, use_kernels.called, again.reused


@pytest.mark.parametrize("name", inspect.signature(Llama.build).parameters)
def test_every_option_of_build_changes_something(folders, name):
    assert build_outcome(folders, {}) == build_outcome(folders, {})
    assert build_outcome(folders, BUILD[name]) != build_outcome(folders, {})


# For each option: what is changed, and against what (a base in which it can matter).
FEW = {"logit_bias": {65: 60.0, 66: 60.0, 67: 60.0}}  # three tokens come up: penalties bite
SAMPLING = {
    "temperature": ({"temperature": 0.1}, {}),
    "top_p": ({"top_p": 0.2}, {}),
    "seed": ({"seed": 4}, {}),
    "top_k": ({"top_k": 2}, {}),
    "min_p": ({"min_p": 0.5}, {}),
    "presence_penalty": ({"presence_penalty": 5.0}, FEW),
    "frequency_penalty": ({"frequency_penalty": 5.0}, FEW),
    "logit_bias": (FEW, {}),
}
METHOD = SAMPLING | {
    "max_gen_len": ({"max_gen_len": 3}, {}),
    "logprobs": ({"logprobs": True}, {}),
}
GENERATE = METHOD | {
    "prompt_tokens": ({"prompt_tokens": [[256, 66], [256, 67]]}, {}),
    "echo": ({"echo": True}, {}),
    "stop_token_ids": ({"stop_token_ids": [65, 66, 67]}, FEW),
}
TEXT = METHOD | {
    "prompts": ({"prompts": ["b", "c"]}, {}),
    "echo": ({"echo": True}, {}),
    "stop": ({"stop": ["A", "B", "C"]}, FEW),
}
CHAT = METHOD | {
    "dialogs": ({"dialogs": [[{"role": "user", "content": "Bye"}]]}, {}),
    "stop": ({"stop": ["A", "B", "C"]}, FEW),
}
INPUTS = {
    "generate": {"prompt_tokens": [[256, 65], [256, 66]]},
    "text_completion": {"prompts": ["a", "b"]},
    "chat_completion": {"dialogs": [[{"role": "user", "content": "Hi"}]]},
}
METHODS = {
    "generate": GENERATE,
    "text_completion": TEXT,
    "stream_text_completion": TEXT,
    "chat_completion": CHAT,
    "stream_chat_completion": CHAT,
}


def method_outcome(model, method, changes):
    base = {"temperature": 1.0, "top_p": 1.0, "seed": 3, "max_gen_len": 24}
    out = getattr(model, method)(**INPUTS[method.removeprefix("stream_")] | base | changes)
    return list(out) if method.startswith("stream_") else out


@pytest.mark.parametrize(
    ("method", "name"),
    [
        (method, name)
        for method in METHODS
        for name in list(inspect.signature(getattr(Llama, method)).parameters)[1:]
    ],
)
def test_every_option_of_a_method_changes_something(tiny_llama, method, name):
    model = tiny_llama(max_seq_len=128)
    changes, base = METHODS[method][name]
    assert method_outcome(model, method, base | changes) != method_outcome(model, method, base)


PARAMS = SAMPLING | {
    "max_tokens": ({"max_tokens": 3}, {}),
    "stop_token_ids": ({"stop_token_ids": (65, 66, 67)}, FEW),
    "logprobs": ({"logprobs": 2}, {}),
    "prompt_logprobs": ({"prompt_logprobs": True}, {}),
}


@pytest.mark.parametrize("name", [field.name for field in fields(SamplingParams)])
def test_every_sampling_parameter_changes_something(tiny_llama, name):
    def outcome(changes):
        base = {"temperature": 1.0, "top_p": 1.0, "seed": 3, "max_tokens": 24}
        engine = tiny_llama().engine
        request = engine.submit([256, 65], SamplingParams(**base | changes))
        events = []
        while not engine.idle:
            events += [(e.token, e.top_logprobs, e.finish_reason) for e in engine.step()]
        return events, request.prompt_logprobs

    changes, base = PARAMS[name]
    assert outcome(base | changes) != outcome(base)


def test_a_public_method_without_demonstrations_would_be_noticed():
    calls = {"generate", "build"} | {
        name for name in vars(Llama) if name.endswith("completion") and not name.startswith("_")
    }
    assert calls == {*METHODS, "build"}
