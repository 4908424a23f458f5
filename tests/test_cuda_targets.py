"""Kernels on GPUs that are not here: they fit what the chip has, and use nothing that it lacks.

What is launched is written down by benchmarks/targets.py, from the code that launches it, in a
process of its own, since kernels here may be the interpreter's."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

import cubins
from conftest import BYTES_VOCAB, unit_scale

from llama.cuda import launch, supported
from llama.cuda.launch import multiprocessors_and_memory, use_less
from llama.cuda.products.dispatch import Products
from llama.cuda.tuning import (
    MOST_ROWS,
    DecodeAttention,
    Gemm,
    Tiling,
    decode_attention_blocks,
    fitted_attention,
    fitted_gemm,
    fitted_tiling,
    gemm_blocks,
    gemm_sm90_blocks,
)
from llama.engine import Engine
from llama.loading.runners import runner_for
from llama.model import ModelArgs, Transformer
from llama.sampling import SamplingParams

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
H200 = dict(capability=(9, 0), shared=232448)
SMALL = dict(capability=(8, 6), shared=101376)  # RTX 3090
TARGETS = ("8.0", "8.6", "8.9", "9.0", "10.0", "12.0")


def run(*command, timeout=None):
    env = cubins.environment(str(BENCHMARKS), str(BENCHMARKS.parent))
    command = [sys.executable, *map(str, command)]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout)


RECKON = """
import json, sys
import targets as t
found = {}
for name, target in t.TARGETS.items():
    for shape, kind in json.loads(sys.argv[1]):
        if t.can(target, kind):
            for some in t.launches(target, shape, kind, (1, 2, 8, 32, 128)).values():
                for one in some:
                    key = f"{name} {one.name}"
                    size = t.reckoned(target, one)
                    found[key] = max(found.get(key, 0), (size or 0) - target.shared)
                    if one.name == "gemm_sm90.gemm_sm90":
                        assert target.capability == (9, 0), name
                    if target.capability < (9, 0):
                        assert not one.named.get("OVERLAP") and not one.named.get("tma"), one
print(json.dumps(found))
"""


def test_no_kernel_is_asked_to_share_more_than_there_is():
    """For every number of rows, on every kind of GPU, as reckoned; `slow` compiles them.
    gemm_sm90.py is for 9.0 alone; overlapped launches and bulk copies from 9.0 on."""
    some = [("8B", "bf16"), ("7B", "fp32"), ("heads of 256", "fp32"), ("heads of 100", "int4")]
    done = run("-c", RECKON, json.dumps(some))
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    kernels = {name.split()[1] for name in found}
    assert {"decode._attend", "prefill._attend", "gemm.gemm", "gemv.gemv"} <= kernels
    assert "9.0 gemm_sm90.gemm_sm90" in found
    assert {name.split()[0] for name in found} == set(TARGETS)
    assert all(over <= 0 for over in found.values()), found


SPREAD = [("8.6", "8B", "bf16", 8), ("12.0", "heads of 96", "int4", 1)]


@pytest.mark.timeout(900)  # a busy machine compiles slowly
@pytest.mark.parametrize(("target", "shape", "kind", "rows"), SPREAD)
def test_kernels_of_a_step_compile_for_other_gpus(target, shape, kind, rows):
    """Shared memory, registers and instructions are what the chip has and what was reckoned. The
    first is the first command of the README with six rows, on a card with 99 KB."""
    cubins.need_tools()
    compile_and_compare(target, "--shapes", shape, "--kinds", kind, "--rows", rows)


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_compiles_for(target):
    cubins.need_tools()
    print(compile_and_compare(target))


def compile_and_compare(target, *options):
    done = run(BENCHMARKS / "targets.py", "--targets", target, *options)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    assert " kernels in " in done.stdout
    return done.stdout


# ---- the choice of blocks

WEIGHTS = {
    "1B": (2048, 3072, 16384, 8192, 128256), "3B": (3072, 5120, 16384, 8192, 128256),
    "8B": (4096, 6144, 28672, 14336, 128256), "70B": (8192, 10240, 57344, 28672, 128256),
}  # fmt: skip


def products_of(shape):
    dim, qkv, both, hidden, vocab = WEIGHTS[shape]
    return (qkv, dim), (dim, dim), (both, dim), (dim, hidden), (vocab, dim)


@pytest.mark.parametrize("shape", WEIGHTS)
def test_an_h200_keeps_the_blocks_that_were_measured_on_it(shape):
    for rows in (1, 2, 3, 5, 8, 16, 32, 64, 128):
        for kind, most in MOST_ROWS.items():
            for outputs, inputs in products_of(shape) if rows <= most else ():
                blocks = gemm_blocks(rows, outputs, inputs, kind)
                for group in (16, 32, 64, 128) if kind == "int4" else (0,):
                    assert fitted_gemm(blocks, kind, group, 2, **H200) == blocks
        size = 64 if shape == "1B" else 128
        for long in (False, True):
            blocks = decode_attention_blocks(rows, 8, long)
            assert fitted_attention(blocks, 8, size, 2, **H200) == blocks


def test_the_blocks_that_were_measured():
    """Of the 8B shape on an H200; whoever changes one has measured it (benchmarks/NOTES.md)."""
    assert [decode_attention_blocks(r, 8, True) for r in (1, 8, 32, 128)] == [
        (16, 128, 3, 4, 128), (16, 128, 3, 4, 128), (32, 64, 4, 4, 64), (32, 64, 2, 4, 64),
    ]  # fmt: skip
    some = [gemm_blocks(8, *weight, "") for weight in products_of("8B")]
    assert some == [
        (16, 64, 128, 2, 3, 4), (16, 64, 128, 2, 6, 4), (16, 64, 128, 1, 4, 4),
        (16, 64, 128, 2, 6, 4), (16, 64, 128, 1, 4, 4),
    ]  # fmt: skip
    gated = [outputs == 28672 for outputs, _ in products_of("8B")]
    for kind, rows, expected in [
        ("", 64, [(64, 2, 8, 1), (64, 4, 8, 1), (128, 1, 5, 1), (64, 4, 8, 1), (64, 1, 8, 1)]),
        ("int8", 8, [(64, 2, 11, 1), (64, 4, 11, 1), (64, 1, 5, 2), (64, 4, 11, 1), (64, 1, 5, 2)]),
        ("int4", 8, [(64, 2, 12, 1), (64, 4, 12, 1), (64, 1, 10, 2), (64, 4, 12, 1),
                     (64, 1, 10, 2)]),
    ]:  # fmt: skip
        for weight, pairs, (n, split, stages, programs) in zip(
            products_of("8B"), gated, expected, strict=True
        ):
            blocks = gemm_sm90_blocks(rows, *weight, kind, 132, pairs)
            assert blocks == (rows, n, 128 if kind else 64, split, stages, programs)


def test_less_memory_means_fewer_stages_and_then_smaller_blocks():
    blocks = Gemm(16, 64, 128, 1, 6, 4)  # 20 KB a stage, one fewer in memory
    assert fitted_gemm(blocks, "", 0, 2, **SMALL).stages == 5
    assert fitted_gemm(blocks, "", 0, 4, **SMALL) == blocks._replace(block_k=64, stages=5)
    tight = Gemm(128, 64, 128, 1, 3, 4)
    assert fitted_gemm(tight, "", 0, 4, **SMALL) == tight._replace(block_k=64, stages=3)
    assert fitted_gemm(blocks, "", 0, 4, **H200) == blocks
    assert fitted_gemm(tight, "", 0, 4, (9, 0), 99 * 1024) == tight._replace(block_k=64)
    grouped = fitted_gemm(tight, "int4", 128, 4, **SMALL)  # a K block has whole groups
    assert grouped == tight._replace(stages=2)
    eight = decode_attention_blocks(8, 8, True)
    assert eight.takes(4, 128, 2) > SMALL["shared"]
    assert fitted_attention(eight, 4, 128, 2, **SMALL) == eight._replace(block=64)
    three = decode_attention_blocks(3, 32, True)
    assert fitted_attention(three, 1, 128, 4, **H200) == three._replace(block=64)
    for size in range(16, 258, 2):
        for itemsize in (2, 4):
            for shared in (99 * 1024, 163 * 1024, 227 * 1024):
                fits = fitted_attention(eight, 4, size, itemsize, (9, 0), shared)
                assert fits.takes(4, size, itemsize) <= shared
                cut = Tiling(128, 128, 8, 3)
                fits = fitted_tiling(cut, size, itemsize, (9, 0), shared)
                assert fits.takes(size, itemsize, itemsize == 2) <= shared


def test_what_fits_nowhere_is_as_small_as_it_can_be():
    assert fitted_attention(DecodeAttention(8, 128, 3, 4), 4, 256, 4, (8, 0), 0).block == 16
    small = fitted_gemm(Gemm(128, 64, 128, 1, 6, 4), "int4", 64, 2, (8, 0), 0)
    assert (small.block_n, small.block_k, small.stages) == (16, 64, 2)


def test_a_gpu_that_could_not_load_a_kernel_gets_smaller_ones(monkeypatch):
    monkeypatch.setattr(launch, "_less", {})
    device = torch.device("cpu")
    weight = torch.zeros(64, 14336, dtype=torch.float16)
    blocks, shared = [], multiprocessors_and_memory(device)[1]
    while use_less(device):
        made = Products(device, torch.float16)
        assert made.shared == shared // 2
        shared = made.shared
        blocks += [(made.blocks(1, weight), made.blocks(8, weight))]
    assert len(blocks) == 2
    assert blocks[0] != blocks[1]
    assert multiprocessors_and_memory(device)[1] == shared >= launch.LEAST_SHARED


# ---- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize(
    "shape",
    [
        dict(dim=4096, n_heads=32, n_kv_heads=32, hidden_dim=11008),  # Llama 2 7B's
        dict(dim=5120, n_heads=40, n_kv_heads=40, hidden_dim=13824),  # and 13B's
        *(dict(dim=1024, n_heads=8, n_kv_heads=2, head_dim=size) for size in (18, 96, 100, 256)),
    ],
    ids=str,
)
@pytest.mark.parametrize("slots", [1, 3, 32])
def test_every_shape_says_the_same_with_kernels_and_without_in_float32(shape, slots):
    """None of its kernels asks for more memory than programs share here."""
    args = ModelArgs(n_layers=2, vocab_size=BYTES_VOCAB, **shape)
    model = unit_scale(Transformer(args)).to("cuda").requires_grad_(False)
    assert supported(args, torch.float32, torch.device("cuda")) is None
    prompts = [[(7 * i + j * j) % BYTES_VOCAB for j in range(3 + 11 * i)] for i in range(4)]
    answers = []
    for kernels in (False, True):
        runner = runner_for(model, max_batch_size=slots, max_seq_len=128, kernels=kernels)
        engine = Engine(runner)
        params = SamplingParams(temperature=0, max_tokens=20)
        requests = [engine.submit(prompt, params) for prompt in prompts * -(-slots // 4)]
        while not engine.idle:
            engine.step()
        answers.append([request.tokens for request in requests])
    assert answers[0] == answers[1]
