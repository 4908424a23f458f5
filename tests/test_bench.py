"""`python -m llama bench`: its formulas by hand, its loop by what runs, its table."""

import importlib
import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from conftest import tiny_args

from llama.checkpoint import random_checkpoint
from llama.commands import bench
from llama.commands import machine as limits
from llama.commands.bench import (
    SHAPES,
    VOCAB,
    Work,
    choose,
    decode_seconds,
    lines,
    measure,
    work_for,
)
from llama.commands.common import DEMO
from llama.commands.machine import decode_bytes, prefill_operations
from llama.engine import Engine
from llama.engine.runner import PlainRunner
from llama.loading import load
from llama.model import ModelArgs
from llama.parallel import ONE

CPU = torch.device("cpu")
LITTLE = Work(rows=(1, 3), contexts=(8, 20), lengths=(16,), steps=5, buffer=2**20,
              product=(32, 64, 48))  # fmt: skip


@pytest.fixture(scope="module")
def tiny_checkpoint():
    return random_checkpoint(tiny_args(context_length=64), dtype=torch.float32)


@pytest.fixture(scope="module")
def report(tiny_checkpoint):
    return measure("tiny", tiny_checkpoint, LITTLE, device=CPU)


# ---- the formulas


def test_the_8b_reads_15_gigabytes_a_step():
    args = ModelArgs(**SHAPES["8B"], vocab_size=VOCAB)
    weights = decode_bytes(args, torch.bfloat16, 1, 0)
    layer = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336 + 2 * 4096
    assert weights == 2 * (32 * layer + 4096 + 128256 * 4096)
    assert weights / 1e9 == pytest.approx(15.01, abs=0.005)
    assert weights / 4.53e12 * 1e3 == pytest.approx(3.31, abs=0.005)
    cache = decode_bytes(args, torch.bfloat16, 32, 1024) - weights
    assert cache == 32 * 1024 * 131072  # 2 x 32 layers x 8 heads x 128 x 2 bytes a token
    operations = 2 * 32 * (layer - 2 * 4096) * 2048 + 32 * 4 * 32 * 128 * 2048**2 / 2
    assert prefill_operations(args, 2048) == operations


def test_the_output_matrix_counts_where_it_is_tied():
    untied = ModelArgs(**SHAPES["1B"] | {"tied": False}, vocab_size=VOCAB)
    tied = ModelArgs(**SHAPES["1B"], vocab_size=VOCAB)
    args = (torch.bfloat16, 1, 100.0)
    assert decode_bytes(tied, *args) == decode_bytes(untied, *args)
    assert prefill_operations(tied, 64) == prefill_operations(untied, 64)


def test_every_shape_is_a_model_of_about_its_name():
    for name, shape in SHAPES.items():
        args = ModelArgs(**shape, vocab_size=VOCAB)
        parameters = random_checkpoint(args).parameters / 1e9
        assert parameters == pytest.approx(float(name[:-1]), rel=0.3)


# ---- the limits


def test_the_machine_has_speeds():
    assert limits.read_bandwidth(CPU, 2**22) > 1e6
    assert limits.product_speed(CPU, torch.float32, (64, 64, 64)) > 1e6
    assert len(limits.times(lambda: None, CPU, 3)) == 3
    assert limits.process_age() is None or 0 < limits.process_age() < 1e6


@pytest.mark.parametrize(("block", "programs"), [(64, 1), (128, 3)])
def test_the_kernel_that_only_reads_reads_everything(block, programs):
    pytest.importorskip("triton")
    from llama.cuda.bandwidth import ROUNDS, read

    where = "cuda" if torch.cuda.is_available() else "cpu"
    numbers = torch.randint(-1000, 1000, (programs * block * ROUNDS,), dtype=torch.int32).to(where)
    sums = torch.full((programs,), 2**30, dtype=torch.int32, device=where)
    read(numbers, sums, block, 4)
    assert sums.tolist() == numbers.view(programs, -1).sum(1).tolist()
    with pytest.raises(AssertionError):
        read(numbers[1:], sums, block, 4)


@pytest.mark.gpu
def test_the_kernel_that_only_reads_is_not_optimised_away():
    from llama.cuda.bandwidth import read_bandwidth

    buffer = 4 * 2**30
    fast, slow = (read_bandwidth(size, torch.device("cuda", 0)) for size in (buffer, buffer // 2))
    assert fast == pytest.approx(slow, rel=0.2)
    assert 1e11 < fast < 2e13


# ---- the loop


@pytest.mark.parametrize("steps", [1, 3, 10])
def test_decode_times_so_many_steps_in_which_all_rows_have_as_many_keys(tiny_checkpoint, steps):
    model = load(tiny_checkpoint, ranks=ONE, device=CPU)
    engine = Engine(PlainRunner(model, model.new_cache(3, 48)), reuse=True)
    batches = []
    plain = model.hidden

    def hidden(tokens, positions, batch, cache):
        batches.append((batch.counts, batch.lengths))
        return plain(tokens, positions, batch, cache)

    model.hidden = hidden
    seconds, keys = decode_seconds(engine, 3, 12, steps)
    assert seconds > 0
    assert engine.idle
    assert batches[0] == ([12] * 3, [12] * 3)
    decodes = batches[1:]
    assert decodes == [([1] * 3, [12 + i] * 3) for i in range(bench.WARM + steps)]
    timed = [lengths[0] for _, lengths in decodes[bench.WARM :]]
    assert keys == sum(timed) / len(timed)


def test_a_run_has_all_keys_and_a_line_for_each(report, tiny_checkpoint):
    found = json.loads(json.dumps(asdict(report)))
    assert set(found) == {
        "model", "parameters", "device", "dtype", "bandwidth", "operations", "buffer", "product",
        "start", "loading", "decode", "prefill", "left_out",
    }  # fmt: skip
    assert [(t["rows"], t["tokens"], t["temperature"]) for t in found["decode"]] == [
        (1, 8, 0), (3, 8, 0), (1, 8, 0.6), (1, 20, 0), (3, 20, 0),
    ]  # fmt: skip
    assert [t["tokens"] for t in found["prefill"]] == [16]
    for timing in report.decode + report.prefill:
        assert timing.seconds > 0
        assert timing.share > 0
        amount = timing.rows if timing in report.decode else timing.tokens
        assert timing.tokens_per_second == pytest.approx(amount / timing.seconds)
    keys = 20 + bench.WARM + 2
    size = decode_bytes(tiny_checkpoint.args, torch.float32, 3, keys)
    last = report.decode[-1]
    assert last.share == pytest.approx(size / report.bandwidth / last.seconds)
    assert last.steps == 5
    assert report.left_out == []
    table = lines(report)
    assert len({len(line) for line in table if line[:1].isdigit()}) == 1
    assert any(line.startswith("3 sequences, context 20 ") for line in table)
    assert any(line.startswith("16 tokens ") for line in table)


def test_what_does_not_fit_is_left_out_with_a_line(tiny_checkpoint):
    work = replace(LITTLE, rows=(1, 10**9), contexts=(8,), lengths=(16, 65))
    report = measure("tiny", tiny_checkpoint, work, device=CPU)
    assert [t.rows for t in report.decode] == [1, 1]
    assert [t.tokens for t in report.prefill] == [16]
    first, second = lines(report)[-2:]
    assert first.startswith("left out: decode, 1000000000 sequences, context 8: needs ")
    assert first.endswith(" are free")
    assert second == "left out: prefill, 65 tokens: the model's context is 64 tokens"


def test_memory_that_is_not_there_is_a_line(tiny_checkpoint, monkeypatch):
    def fails(*_):
        raise torch.OutOfMemoryError("no more")

    monkeypatch.setattr(bench, "prefill_seconds", fails)
    work = replace(LITTLE, rows=(1,), contexts=(8,))
    report = measure("tiny", tiny_checkpoint, work, device=CPU)
    assert report.left_out == ["prefill, 16 tokens: ran out of memory"]


def test_a_shape_is_random_weights_as_long_as_the_work_asks():
    name, checkpoint = choose(None, "1B", replace(LITTLE, lengths=(9000,)), CPU, None)
    assert name == "1B of random weights"
    assert (checkpoint.dtype, checkpoint.args.context_length) == (torch.bfloat16, 9000)
    assert choose(None, "8B", LITTLE, CPU, "float32")[1].dtype == torch.float32


# ---- the command


def test_numbers_as_typed():
    work = work_for(CPU, "1,2, 3", "(4, 5)", "[6]", 7)
    assert (work.rows, work.contexts, work.lengths, work.steps) == ((1, 2, 3), (4, 5), (6,), 7)
    assert work_for(CPU).rows[0] == 1
    assert len(work_for(torch.device("cuda")).rows) == 4
    for text in ("", "x", "0", "1,-2", "1.5", "1,,2"):
        with pytest.raises(ValueError, match=r"--rows is .*; it must be whole numbers above 0"):
            work_for(CPU, rows=text)
    with pytest.raises(ValueError, match="--steps is 0; it must be"):
        work_for(CPU, steps=0)
    for both in ((None, None), ("x", "8B")):
        with pytest.raises(ValueError, match="give either a folder of weights or --shape"):
            choose(*both, LITTLE, CPU, None)


@pytest.mark.parametrize("json_flag", [[], ["--json"]])
def test_the_command_prints_the_table_or_one_object(monkeypatch, shell, json_flag):
    demo = Path(DEMO)
    if not (demo / "consolidated.00.pth").exists():
        pytest.skip("the demo has not been trained")
    usual = bench.work_for
    small = dict(buffer=2**20, product=(64, 64, 64))
    monkeypatch.setattr(bench, "work_for", lambda *given: replace(usual(*given), **small))
    given = ["--rows=1", "--contexts=16", "--lengths", "16", "--steps=2", "--device=cpu"]
    status, said, error = shell("bench", demo, *given, *json_flag)
    assert (status, error) == (0, "")
    if json_flag:
        found = json.loads(said)
        assert said.count("\n") == 1
        assert found["model"] == str(demo)
        assert [t["steps"] for t in found["decode"]] == [2, 2]
    else:
        assert said.startswith(f"model     {demo}, 3,934,464 parameters, bfloat16\n")
        assert "\n1 sequence, context 16  " in said


# ---- side by side


@pytest.fixture
def compare(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    return importlib.import_module("compare")


def test_a_system_that_does_not_end_is_stopped_and_keeps_what_it_had(compare):
    endless = "import time; print('{\"a\": 1}', flush=True); time.sleep(99)"
    assert compare.run(["-c", endless], [], 1) == ({"a": 1}, "did not finish in 1 s")
    failed = compare.run(["-c", "import sys; sys.exit('no such thing')"], [], 20)
    assert failed == ({}, "ended with status 1: no such thing")
    assert compare.run(["-c", "print('x')"], [], 20) == ({}, "printed no result")


def test_the_table_of_several_systems_has_ratios(compare, report):
    found = asdict(report)
    found["decode"] = [timing for timing in found["decode"] if timing["tokens"] == 8]
    ours = compare.from_bench(found, 8)
    named = {"decode 1 at 8, ms a step", "decode 3 at 8, ms a step", "prefill 16, ms"}
    assert named <= set(ours) <= named | {"start to 16th token, s"}
    theirs = {name: 2 * number for name, number in ours.items()} | {"compiling, s": 5.0}
    head, *rows = compare.table({"llama": ours, "other": theirs})
    assert head.split() == ["llama", "other"]
    assert all(row.endswith("(2.00x)") for row in rows[:-1])
    assert rows[-1].split() == ["compiling,", "s", "-", "5.00"]


def test_our_own_part_runs_on_something_tiny(compare, monkeypatch, capsys):
    ran = []
    plain = compare.run
    monkeypatch.setattr(compare, "run", lambda *given: ran.append(plain(*given)) or ran[-1])
    args = '{"dim": 64, "n_layers": 1, "n_heads": 4, "n_kv_heads": 2, "multiple_of": 32}'
    compare.main(args=args, vocab_size=300, device="cpu", dtype="float32", rows="1", context=4,
                 lengths="8", steps=2, longest=12, new_tokens=3, limit=120)  # fmt: skip
    assert [problem for _, problem in ran] == [None]
    assert "8 ragged prompts, 3 new tokens each, s" in capsys.readouterr().out
