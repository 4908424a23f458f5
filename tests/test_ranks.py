"""Laws of several ranks: any number of shards on any number of ranks, and what happens to a rank
that dies, lags or is told something else. Every launch is real processes over gloo."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import BYTES_VOCAB, tiny_args, write_tokenizer
from ranks_worker import PROMPTS, answers, build, held

from llama.checkpoint import random_checkpoint, write_meta
from llama.names import local_shape, shapes

WORKER = str(Path(__file__).parent / "ranks_worker.py")
SHARDS = (1, 2, 4, 8)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Float32 checkpoints of one 8-kv-head model in 1, 2, 4, 8 shards and one 2-kv-head model in
    1, 2."""
    folder = tmp_path_factory.mktemp("ranks")
    tokenizer = write_tokenizer(folder / "tokenizer.model")
    folders = {}
    for kv_heads, counts in ((8, SHARDS), (2, (1, 2))):
        args = tiny_args(
            vocab_size=BYTES_VOCAB, dim=128, n_layers=2, n_kv_heads=kv_heads, context_length=8192
        )
        source = random_checkpoint(args, seed=1, dtype=torch.float32)
        for shards in counts:
            folders[kv_heads, shards] = folder / f"kv{kv_heads}_shards{shards}"
            write_meta(source, folders[kv_heads, shards], shards=shards)
    return tokenizer, folders


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def launch(ranks, mode, out, *args, device="cpu", torchrun=False):
    """What each rank has written. Without torchrun they are forks of one process, since each would
    otherwise spend seconds on the import of torch."""
    command = [sys.executable, WORKER, "forked", str(ranks), free_port()]
    if torchrun:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc_per_node", str(ranks), WORKER]
    command += [mode, device, str(out), *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(Path(out, f"rank{r}.json").read_text()) for r in range(ranks)]


def start_two(mode, out, *args, device="cpu"):
    """Two ranks without torchrun, which would itself end the second when the first dies."""
    common = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    common["MASTER_PORT"] = free_port()
    return [
        subprocess.Popen(
            [sys.executable, WORKER, mode, device, str(out), *map(str, args)],
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]


def same_answers(ours, reference):
    """Greedy and sampled ids equal; logprobs to 1e-5."""
    assert ours["greedy"][0] == reference["greedy"][0]
    assert ours["sampled"] == reference["sampled"]
    for row, expected in zip(ours["greedy"][1], reference["greedy"][1], strict=True):
        assert row == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_ids_from_any_number_of_shards_on_any_number_of_ranks_are_those_of_one(
    files, tmp_path, ranks
):
    tokenizer, folders = files
    results = launch(ranks, "law", tmp_path, tokenizer, *folders.values(), torchrun=ranks == 2)
    for (kv_heads, shards), folder in folders.items():
        alone = build(folders[kv_heads, 1], tokenizer)
        reference = answers(alone)
        whole, args = held(alone.model), alone.model.params
        parts = [result[str(folder)] for result in results]
        for part in parts:
            same_answers(part, reference)
        expected = sum(
            4 * torch.Size(local_shape(name, args, ranks)).numel() for name in shapes(args)
        )
        norms = 4 * args.dim * (2 * args.n_layers + 1)
        replicas = 4 * max(0, ranks - kv_heads) * 2 * args.n_layers * args.dim * args.head_dim
        assert {part["held"] for part in parts} == {expected}
        assert ranks * (expected - norms) == whole - norms + replicas
        memory = max(part["memory"] for part in parts) / 2**20
        print(
            f"kv heads {kv_heads}, shards {shards} on {ranks} ranks: ids equal, "
            f"{expected / whole:.3f} of {whole} bytes a rank, built in {memory:.1f} MB"
        )


def test_one_rank_reads_any_number_of_shards(files):
    tokenizer, folders = files
    for kv_heads in (8, 2):
        reference = answers(build(folders[kv_heads, 1], tokenizer))
        for (heads, _), folder in folders.items():
            if heads == kv_heads:
                same_answers(answers(build(folder, tokenizer)), reference)


def test_mistakes_raise_on_every_rank_and_the_next_call_works(files, tmp_path):
    tokenizer, folders = files
    first, second = launch(2, "mistakes", tmp_path, tokenizer, folders[8, 1])
    for seen in (first, second):
        assert "prompt 0: the prompt is empty" in seen[0]
        assert "the prompt has 200 tokens and max_seq_len is 128" in seen[1]
        assert "temperature is -1" in seen[2]
        assert "torchrun --nproc_per_node 3" in seen[3]
        assert "model_parallel_size=1: this process already runs a model cut into 2" in seen[4]
        assert "max_seq_len=1000000000: the model's context is 8192" in seen[5]
        assert len(seen[6][0]) == 4
        assert "the ranks disagree on prompts or tokens" in seen[7]
        assert len(seen) == 8


def watch_one_die(files, out, mode, device="cpu", dies=1):
    """Kill a rank of two at a random moment; seconds until the other has ended, and what it
    said."""
    tokenizer, folders = files
    ranks = start_two(mode, out, tokenizer, folders[8, 2], device=device)
    try:
        deadline = time.monotonic() + 120
        while len(list(out.glob("begun*"))) < 2:
            assert time.monotonic() < deadline, "the ranks never began"
            assert all(rank.poll() is None for rank in ranks)
            time.sleep(0.05)
        time.sleep(random.uniform(0.2, 3))
        assert all(rank.poll() is None for rank in ranks), "an idle or busy group goes on"
        died = time.monotonic()
        ranks[dies].send_signal(signal.SIGKILL)
        errors = ranks[1 - dies].communicate(timeout=30)[1]
        seconds = time.monotonic() - died
        print(f"{mode} on {device}: rank {1 - dies} ended {seconds:.1f} s after the other died")
        assert ranks[1 - dies].returncode not in (0, None)
        return seconds, errors
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()


@pytest.mark.parametrize("mode", ["endless", "waiting"])
def test_a_dead_rank_ends_the_others_within_ten_seconds(files, tmp_path, mode):
    seconds, errors = watch_one_die(files, tmp_path, mode)
    assert seconds < 10
    assert "rank 0 of 2 lost another rank" in errors


def test_a_rank_that_follows_waits_while_nothing_is_asked_and_ends_with_the_one_that_leads(
    files, tmp_path
):
    seconds, errors = watch_one_die(files, tmp_path, "led", dies=0)
    assert seconds < 10
    assert "rank 1 of 2 lost another rank" in errors
    tokenizer, folders = files
    alone = build(folders[8, 2], tokenizer).generate(PROMPTS[:1], 8, temperature=0)[0]
    assert json.loads(Path(tmp_path, "tokens.json").read_text()) == alone[0]


def test_an_error_that_one_rank_alone_sees_ends_the_others_with_a_sentence(files, tmp_path):
    """The other one waited for it for ever, in a sum that never came."""
    tokenizer, folders = files
    ranks = start_two("lone_error", tmp_path, tokenizer, folders[8, 2])
    try:
        deadline = time.monotonic() + 120
        while not Path(tmp_path, "rank1.json").exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        failed = time.monotonic()
        errors = ranks[0].communicate(timeout=30)[1]
        assert time.monotonic() - failed < 10
        assert ranks[0].returncode not in (0, None)
        assert "rank 0 of 2 lost another rank" in errors
        assert "rank 1 failed in a step" in errors
        first, second = json.loads(Path(tmp_path, "rank1.json").read_text())
        assert first == "OutOfMemoryError: rank 1 alone has no memory left"
        assert "this model's ranks no longer step together, since one failed (OutOfMem" in second
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["endless", "waiting"])
def test_a_dead_rank_ends_the_others_on_gpus_too(files, tmp_path, mode):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    seconds, errors = watch_one_die(files, tmp_path, mode, "cuda")
    assert seconds < 10
    assert "rank 0 of 2 lost another rank" in errors


@pytest.mark.gpu
def test_float32_ids_of_two_gpus_are_those_of_one(files, tmp_path):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    tokenizer, folders = files
    results = launch(2, "law", tmp_path, tokenizer, *folders.values(), device="cuda", torchrun=True)
    for (kv_heads, _), folder in folders.items():
        reference = answers(build(folders[kv_heads, 1], tokenizer, device="cuda:0"))
        for result in results:
            same_answers(result[str(folder)], reference)


def test_a_number_of_ranks_that_does_not_fit_is_refused_with_those_that_do(files):
    tokenizer, folders = files
    with pytest.raises(ValueError, match="torchrun --nproc_per_node 4 your_script"):
        build(folders[8, 1], tokenizer, model_parallel_size=4)
