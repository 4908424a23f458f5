"""Laws of the memory plan: what it counts is what is held, and what it names as feasible is."""

import dataclasses
import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch
from conftest import tiny_args, unit_scale
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llama import Llama, sampling
from llama.checkpoint import open_checkpoint, random_checkpoint, write_meta
from llama.commands import machine as limits
from llama.commands.info import inspect
from llama.engine import Engine
from llama.engine.runner import PlainRunner
from llama.files.checklist import verify as find_problems
from llama.loading import check, check_memory, free_memory, load, make_plan
from llama.loading import memory as host
from llama.loading import plan as plan_module
from llama.model import ModelArgs, Transformer
from llama.parallel import ONE, Ranks
from llama.quantization.packed import Format
from llama.sampling import RowParams, SamplingParams, logprobs_of, sample

GIB = 2**30
EIGHT_B = ModelArgs(dim=4096, n_layers=32, n_heads=32, n_kv_heads=8, vocab_size=128256,
                    multiple_of=1024, ffn_dim_multiplier=1.3)  # fmt: skip
SEVENTY_B = ModelArgs(dim=8192, n_layers=80, n_heads=64, n_kv_heads=8, vocab_size=128256,
                      multiple_of=4096, ffn_dim_multiplier=1.3)  # fmt: skip
TINY = ModelArgs(dim=64, n_layers=2, n_heads=8, n_kv_heads=2, vocab_size=125, hidden_dim=96)


class Peak(TorchDispatchMode):
    """The most bytes that results of torch's functions held at one time, `held` left out."""

    def __init__(self, *held):
        super().__init__()
        self.live, self.bytes = {}, 0
        self.held = {tensor.untyped_storage().data_ptr() for tensor in held}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in self.held:
                    self.live[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.live = {key: each for key, each in self.live.items() if not each[0].expired()}
        self.bytes = max(self.bytes, sum(size for _, size in self.live.values()))
        return out


ASKED = {
    "greedy": SamplingParams(temperature=0),
    "top_p": SamplingParams(),
    "top_k": SamplingParams(top_k=40, top_p=1.0),
    "everything": SamplingParams(top_k=40, min_p=0.01, presence_penalty=0.1, frequency_penalty=0.1,
                                 logit_bias={1: 2.0}, logprobs=20),
}  # fmt: skip


@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.parametrize("rows", [1, 3, 16])
def test_the_choice_of_many_rows_takes_a_few_rows_at_a_time(monkeypatch, asked, rows):
    vocab = 20_000
    monkeypatch.setattr(sampling, "AT_ONCE", 2 * vocab)
    logits = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(0))
    params = RowParams.from_params([ASKED[asked]] * rows, [1] * rows, logits.device)
    counts, index = [[1, 5, 5]] * rows, torch.zeros(rows, dtype=torch.int64)
    with torch.no_grad(), Peak(logits) as peak:
        ids = sample(logits, params, index, counts, vocab - 8)
        logprobs_of(logits, ids, ASKED[asked].logprobs or 0)
    assert peak.bytes < sampling.BYTES_AT_ONCE * min(2, rows) * vocab + 10_000 * rows
    if asked == "everything":
        assert peak.bytes > 0.8 * sampling.BYTES_AT_ONCE * min(2, rows) * vocab


@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_of_many_rows_takes_what_the_plan_says(asked, dtype):
    args = tiny_args(vocab_size=20_000, max_batch_size=16, max_seq_len=32)
    model = unit_scale(Transformer(args)).to(dtype)
    cache = model.new_cache(16, 32)
    engine = Engine(PlainRunner(model, cache), chunk=64)
    plan = make_plan(args, dtype=dtype, max_batch_size=16, max_seq_len=32, chunk=64)
    params = dataclasses.replace(ASKED[asked], max_tokens=12, prompt_logprobs=0, seed=1)
    held = [*model.parameters(), cache.k, cache.v, model.freqs]
    for length in range(1, 17):
        engine.submit(list(range(length)), params)
    with Peak(*held) as peak:
        while not engine.idle:
            engine.step()
    assert peak.bytes <= plan.workspace
    if asked == "everything":
        assert peak.bytes > plan.workspace / 2


def test_many_rows_of_a_large_vocabulary_are_counted():
    """128 rows of Llama 3's: logits, counts and biases that stay, and what choosing holds."""
    plans = [
        make_plan(EIGHT_B, dtype=torch.bfloat16, max_batch_size=rows, max_seq_len=2048, chunk=2048,
                  device="cuda", kernels=kernels)
        for kernels in (True, False) for rows in (1, 128)
    ]  # fmt: skip
    logits = 128 * 128256 * 4
    assert plans[1].kept > 3 * logits
    assert plans[3].kept == plans[2].kept == 0
    assert plans[3].choosing > logits
    assert plans[3].workspace >= plans[3].choosing
    assert plans[1].workspace >= plans[1].choosing + plans[1].kept
    assert plans[0].workspace < plans[0].choosing + plans[0].kept + 2**30


def test_attention_without_kernels_is_counted_where_torch_has_none():
    def per_key(**changes):
        asked = {"dtype": torch.bfloat16, "device": "cuda", "max_seq_len": 131072, "chunk": 2048}
        args = dataclasses.replace(EIGHT_B, **changes.pop("args", {}))
        return make_plan(args, **{**asked, **changes}).workspace_per_key

    repeated, mask = 2 * 4096 * 2, 2048 * 3
    assert per_key() == per_key(kernels=False) == per_key(ranks=8) == 0
    assert per_key(flash=False, kernels=False) == repeated + mask
    assert per_key(args={"head_dim": 512}, kernels=False) == 4 * repeated + mask
    assert per_key(args={"head_dim": 36}, kernels=False) > 0
    assert per_key(dtype=torch.float32, kernels=False) == 2 * repeated + 2048 * 5
    assert per_key(dtype=torch.float32, ranks=8) == 2 * repeated // 8 + 2048 * 5
    assert per_key(device="cpu") == repeated + mask


def test_packed_weights_are_unpacked_without_kernels_too():
    formats = {"layers.0.feed_forward.w1.weight": Format("int8")}
    for changes in ({"ranks": 8}, {"kernels": False}):
        plan = make_plan(EIGHT_B, dtype=torch.bfloat16, device="cuda", formats=formats, **changes)
        numbers = min(2**24, 4096 * 14336 // changes.get("ranks", 1))
        assert plan.unpacked >= 6 * numbers


def test_the_check_of_a_run_knows_its_kernels_and_its_gpu(tmp_path, monkeypatch):
    write_meta(random_checkpoint(dataclasses.replace(TINY, vocab_size=128)), tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    monkeypatch.setattr(plan_module, "free_memory", lambda *_: 64 * GIB)
    seen = []
    for capability in ((7, 5), (8, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        for kernels in (True, False):
            device = torch.device("cuda:1")
            plan = check_memory(checkpoint, ONE, device, torch.float16, chunk=16, kernels=kernels)
            seen.append((plan.kernels, plan.flash))
    assert seen == [(False, False), (False, False), (True, True), (False, True)]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("size", [1, 2, 4, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_weights_and_cache_are_counted_as_they_are_held(dtype, size, tied):
    args = dataclasses.replace(TINY, tied=tied)
    plan = make_plan(args, dtype=dtype, ranks=size, max_batch_size=3, max_seq_len=40)
    for rank in range(size):
        ranks = Ranks(rank=rank, size=size)
        model = load(random_checkpoint(args), ranks=ranks, device="cpu", dtype=dtype)
        assert plan.weights == sum(p.nbytes for p in model.parameters())
        cache = model.new_cache(3, 40)
        assert plan.cache == cache.k.nbytes + cache.v.nbytes
    assert plan.total == plan.weights + plan.cache + plan.workspace


def test_the_released_models_need_what_is_known():
    plan = make_plan(EIGHT_B, dtype=torch.bfloat16, max_seq_len=8192)
    assert plan.weights == 2 * 8_030_261_248
    assert plan.cache_per_token == 128 << 10
    assert plan.cache == GIB
    eighth = make_plan(SEVENTY_B, dtype=torch.bfloat16, ranks=8, max_seq_len=8192)
    norms = 2 * (2 * 80 + 1) * 8192
    assert eighth.weights == (2 * 70_553_706_496 - norms) // 8 + norms
    assert make_plan(SEVENTY_B, dtype=torch.bfloat16, ranks=16).cache_per_token == 2 * 80 * 128 * 2


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize(("batch", "length"), [(1, 8192), (4, 8192), (64, 2048)])
@pytest.mark.parametrize("free", [17, 20, 24, 40])
def test_what_is_named_as_the_largest_that_fits_is_just_that(device, batch, length, free):
    plan = make_plan(EIGHT_B, dtype=torch.bfloat16, max_batch_size=batch, max_seq_len=length,
                     chunk=512, device=device)  # fmt: skip

    def fits(**sizes) -> bool:
        return dataclasses.replace(plan, **sizes).needed <= free * GIB

    longest, widest = plan.longest(free * GIB), plan.widest(free * GIB)
    assert longest == 0 or fits(max_seq_len=longest)
    assert longest == EIGHT_B.context_length or not fits(max_seq_len=longest + 1)
    assert widest == 0 or fits(max_batch_size=widest)
    assert not fits(max_batch_size=widest + 1)


def test_a_million_tokens_are_refused_with_a_size_that_fits():
    plan = make_plan(EIGHT_B, dtype=torch.bfloat16, max_seq_len=10**6)
    with pytest.raises(ValueError, match="not enough memory on cpu") as caught:
        check(plan, 16 * GIB, "cpu")
    text = str(caught.value)
    assert "max_batch_size=1 x max_seq_len=1000000 needs 14.96 GiB weights + 122 GiB cache" in text
    assert "16.00 GiB are free" in text
    length = int(re.search(r"what fits: max_seq_len=(\d+) at this max_batch_size", text)[1])
    assert 1000 < length < 8192
    check(dataclasses.replace(plan, max_seq_len=length), 16 * GIB, "cpu")


def test_both_ways_out_are_named():
    plan = make_plan(EIGHT_B, dtype=torch.bfloat16, max_batch_size=32, max_seq_len=8192)
    with pytest.raises(ValueError, match=r"what fits: max_seq_len=\d+ .*, or max_batch_size=\d+ "):
        check(plan, 24 * GIB, "cpu")
    with pytest.raises(ValueError, match=r"fits: max_seq_len=\d at this max_batch_size$"):
        check(dataclasses.replace(plan, max_batch_size=1024), 16 * GIB, "cpu")


def test_weights_that_do_not_fit_name_the_ranks_that_would():
    plan = make_plan(SEVENTY_B, dtype=torch.bfloat16, max_seq_len=8192)
    with pytest.raises(ValueError, match="4 ranks with as much memory each would hold") as caught:
        check(plan, 40 * GIB, "cuda")
    assert "131 GiB weights" in str(caught.value)
    check(dataclasses.replace(plan, ranks=4, max_seq_len=512), 40 * GIB, "cpu")
    with pytest.raises(ValueError, match=r"no size fits: at least .* must be free"):
        check(plan, GIB // 4, "cpu")


def test_mapped_weights_need_not_fit_but_are_mentioned(caplog):
    plan = make_plan(EIGHT_B, dtype=torch.bfloat16, max_seq_len=8192, mapped=True)
    with caplog.at_level(logging.WARNING):
        check(plan, 20 * GIB, "cpu")
    assert not caplog.records
    check(plan, 8 * GIB, "cpu")
    assert "read from disk again and again" in caplog.text
    with pytest.raises(ValueError, match=r"14\.96 GiB weights \(mapped\)"):
        check(plan, GIB, "cpu")


def test_a_full_host_is_only_mentioned_where_the_model_is_elsewhere(caplog, monkeypatch):
    plan = make_plan(TINY, dtype=torch.bfloat16)
    monkeypatch.setattr(plan_module, "free_memory", lambda device: 2**20)
    check(plan, GIB, "cuda")
    assert "1.0 MiB of host memory are free" in caplog.text


def test_the_check_of_a_run_knows_its_limits_and_its_files(tmp_path, monkeypatch):
    write_meta(random_checkpoint(dataclasses.replace(TINY, vocab_size=128)), tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    args = dataclasses.replace(checkpoint.args, max_batch_size=2, max_seq_len=50)
    checkpoint = dataclasses.replace(checkpoint, args=args)
    device = torch.device("cpu")
    plan = check_memory(checkpoint, ONE, device, torch.bfloat16, chunk=16)
    assert (plan.mapped, plan.max_batch_size, plan.max_seq_len) == (True, 2, 50)
    assert plan.rows == 16
    assert not check_memory(checkpoint, ONE, device, torch.float32, chunk=16).mapped
    assert not check_memory(
        checkpoint, Ranks(rank=0, size=2), device, torch.bfloat16, chunk=16
    ).mapped
    monkeypatch.setattr(host, "_system_memory", lambda: 2 * plan.needed)
    check_memory(checkpoint, ONE, device, torch.bfloat16, chunk=16)
    with pytest.raises(ValueError, match="not enough memory"):
        check_memory(checkpoint, Ranks(rank=0, size=4), device, torch.float32, chunk=16)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"ranks": 3}, r"3 ranks cannot share .*\[1, 2, 4, 8\]"),
     ({"max_seq_len": 0}, "max_seq_len=0: needs"), ({"max_batch_size": -1}, "max_batch_size=-1")],
)  # fmt: skip
def test_impossible_plans_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        make_plan(TINY, dtype=torch.bfloat16, **wrong)


def test_free_memory_is_shared_and_bounded_by_control_groups(tmp_path, monkeypatch):
    assert 0 < free_memory("cpu") < 2**50
    monkeypatch.setattr(host, "_system_memory", lambda: 8 * GIB)
    monkeypatch.setattr(host, "_cgroup_memory", lambda: 4 * GIB)
    assert free_memory("cpu") == 4 * GIB
    assert free_memory("cpu", sharing=4) == GIB
    names = ("memory.max", "memory.current", "inactive_file")
    assert host._cgroup_left(tmp_path, *names) == 2**62
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 500\ninactive_file 200\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert host._cgroup_left(tmp_path, *names) == 2**62
    (tmp_path / "memory.max").write_text("1000\n")
    assert host._cgroup_left(tmp_path, *names) == 500


def without_linux(monkeypatch):
    """A Python as on Windows: no sysconf, and no files of the system."""
    real = Path.read_text

    def read_text(self, *args, **kwargs):
        if str(self).startswith(("/proc", "/sys")):
            raise FileNotFoundError(2, "No such file or directory", str(self))
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Path, "read_text", read_text)
    for name in ("sysconf", "sysconf_names", "sched_getaffinity", "tcgetpgrp", "get_terminal_size"):
        monkeypatch.delattr(os, name, raising=False)
    monkeypatch.delattr(time, "CLOCK_BOOTTIME", raising=False)
    monkeypatch.delattr(signal, "SIGALRM", raising=False)


def test_without_sysconf_and_proc_everything_fits_and_runs(monkeypatch):
    demo = Path(plan_module.__file__).parents[1] / "demo"
    without_linux(monkeypatch)
    assert host.free_memory("cpu") == host.UNKNOWN
    llama = Llama.build(demo, device="cpu", max_seq_len=64)
    assert llama.text_completion(["The"], 0, max_gen_len=2)[0]["generation"]
    assert (limits.process_age(), limits.memory_in_use(torch.device("cpu"))) == (None, None)
    assert find_problems(demo) == []
    assert "not known" in inspect(str(demo), 1, None, None, 1, None).rows["main memory"]


def test_windows_is_asked_for_what_is_available(monkeypatch):
    without_linux(monkeypatch)

    class Kernel:
        @staticmethod
        def GlobalMemoryStatusEx(pointer):
            assert pointer._obj.length == 64
            pointer._obj.available = 3 * GIB
            return 1

    windll = types.SimpleNamespace(kernel32=Kernel)
    monkeypatch.setattr(host.ctypes, "windll", windll, raising=False)
    assert host.free_memory("cpu", 3) == GIB


def test_a_system_that_says_only_how_much_there_is(monkeypatch):
    without_linux(monkeypatch)
    monkeypatch.setattr(os, "sysconf_names", {"SC_PHYS_PAGES": 1, "SC_PAGE_SIZE": 2}, raising=False)
    sizes = {"SC_PHYS_PAGES": 1000, "SC_PAGE_SIZE": 4096}
    monkeypatch.setattr(os, "sysconf", sizes.__getitem__, raising=False)
    assert host.free_memory("cpu") == 4096000


DEMO = Path(plan_module.__file__).parents[1] / "demo"
COMMAND_LINES = {
    "info": ["info", str(DEMO)],
    "complete": ["complete", "The", "--max_gen_len", "1"],
    "quantize": ["quantize", str(DEMO), "OUT", "--quantize", "int8", "--device", "cpu"],
    "chat": ["chat", "--max_gen_len", "1"],
}


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """Status, stdout and stderr of each command line on another system."""
    out = str(tmp_path_factory.mktemp("elsewhere") / "out")
    lines = [[out if word == "OUT" else word for word in line] for line in COMMAND_LINES.values()]
    script = Path(__file__).with_name("other_system.py")
    done = subprocess.run(
        [sys.executable, str(script), json.dumps(lines)],
        capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return dict(zip(COMMAND_LINES, json.loads(done.stdout), strict=True))


@pytest.mark.parametrize("command", COMMAND_LINES)
def test_commands_need_nothing_that_only_some_systems_have(elsewhere, command):
    status, out, error = elsewhere[command]
    assert status == 0, error
    assert out
