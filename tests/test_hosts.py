"""Two hosts: network namespaces of this machine with a cable between them, gloo over it."""

import json
import os
import shutil
import subprocess
import sys
import time

import pytest
import torch
from conftest import BYTES_VOCAB, tiny_args, write_tokenizer
from ranks_worker import answers, build
from test_ranks import WORKER, launch, same_answers

from llama.checkpoint import random_checkpoint, write_meta

PAIR = tuple(f"llama-test-{end}-{os.getpid()}" for end in "ab")
HOSTS = dict(zip(PAIR, ("10.77.0.1", "10.77.0.2"), strict=True))


def ip(*words):
    return subprocess.run(["ip", *words], capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def cable():
    """Both namespaces, each with one end of a cable named `wire`."""
    if shutil.which("ip") is None:
        pytest.skip("needs the command ip (package iproute2)")
    made = [ip("netns", "add", name) for name in HOSTS]
    try:
        if any(done.returncode for done in made):
            pytest.skip(f"needs the right to make network namespaces: {made[0].stderr.strip()}")
        first, second = HOSTS
        ends = ("link", "add", "wire", "netns", first, "type", "veth")
        assert ip(*ends, "peer", "name", "wire", "netns", second).returncode == 0
        for name, address in HOSTS.items():
            ip("-n", name, "addr", "add", f"{address}/24", "dev", "wire")
            ip("-n", name, "link", "set", "wire", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield
    finally:
        for name in HOSTS:
            ip("netns", "del", name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("hosts")
    args = tiny_args(vocab_size=BYTES_VOCAB, dim=128, n_heads=16, n_kv_heads=8, context_length=8192)
    write_meta(random_checkpoint(args, seed=1, dtype=torch.float32), path / "model", shards=2)
    write_tokenizer(path / "model" / "tokenizer.model")
    return path / "model"


def start(host, *command, **variables):
    """A process on a host; gloo has to be told the interface, as on a cluster of such names."""
    return subprocess.Popen(
        ["ip", "netns", "exec", host, sys.executable, *map(str, command)],
        env={**os.environ, "GLOO_SOCKET_IFNAME": "wire", "TP_SOCKET_IFNAME": "wire", **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def stop(processes):
    for process in processes:
        process.kill()
        process.communicate()


def test_two_hosts_under_torchrun_answer_as_one_process_and_one_of_them_speaks(
    cable, folder, tmp_path
):
    tokenizer = folder / "tokenizer.model"
    common = ["-m", "torch.distributed.run", "--nnodes", 2, "--nproc_per_node", 1]
    common += ["--master_addr", HOSTS[PAIR[0]], "--master_port", 29517]
    work = [WORKER, "law", "cpu", tmp_path, tokenizer, folder]
    hosts = [start(host, *common, "--node_rank", rank, *work) for rank, host in enumerate(HOSTS)]
    try:
        for host in hosts:
            errors = host.communicate(timeout=120)[1]
            assert host.returncode == 0, errors[-2000:]
    finally:
        stop(hosts)
    reference = answers(build(folder, tokenizer))
    parts = [json.loads((tmp_path / f"rank{r}.json").read_text())[str(folder)] for r in (0, 1)]
    for rank, part in enumerate(parts):
        same_answers(part, reference)
        assert part["local_rank"] == 0
        assert part["main"] == (rank == 0)


@pytest.mark.parametrize("mode", ["endless", "waiting"])
def test_a_host_that_is_cut_off_ends_the_other_with_its_name(cable, folder, tmp_path, mode):
    work = [WORKER, mode, "cpu", tmp_path, folder / "tokenizer.model", folder]
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": HOSTS[PAIR[0]], "MASTER_PORT": "29518"}
    hosts = [
        start(host, *work, **common, RANK=str(rank), LOCAL_RANK="0")
        for rank, host in enumerate(HOSTS)
    ]
    try:
        deadline = time.monotonic() + 120
        while len(list(tmp_path.glob("begun*"))) < 2:
            assert time.monotonic() < deadline, "the hosts never began"
            assert all(host.poll() is None for host in hosts)
            time.sleep(0.05)
        time.sleep(2)
        assert all(host.poll() is None for host in hosts), "it goes on while the cable is there"
        cut = time.monotonic()
        ip("-n", PAIR[1], "link", "set", "wire", "down")
        errors = hosts[0].communicate(timeout=40)[1]
        seconds = time.monotonic() - cut
        print(f"{mode}: ended {seconds:.1f} s after the cut: {errors.strip().splitlines()[-1]}")
        assert hosts[0].returncode not in (0, None)
        assert "rank 0 of 2 lost another rank" in errors
        assert "Ranks 1" in errors
        assert seconds < 15
    finally:
        ip("-n", PAIR[1], "link", "set", "wire", "up")
        stop(hosts)


def test_sixteen_ranks_on_eight_kv_heads_answer_as_one(folder, tmp_path):
    tokenizer = folder / "tokenizer.model"
    reference = answers(build(folder, tokenizer))
    for result in launch(16, "law", tmp_path, tokenizer, folder):
        same_answers(result[str(folder)], reference)
