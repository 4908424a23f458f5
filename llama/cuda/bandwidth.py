"""How fast a GPU reads its memory: the limit that decode is held against.

It knows nothing of models. The surprising thing: the kernel must make something of what it reads,
or the compiler would leave the reads out; it stores one sum a program, a thousandth of a percent of
the traffic.
"""

import statistics
from itertools import pairwise

import torch
import triton
import triton.language as tl
from torch import Tensor

from llama.cuda.launch import INTERPRETED

ROUNDS = 8  # blocks of a program, all under way at once
WAYS = ((2048, 4), (4096, 8), (8192, 8), (8192, 16))  # block, warps: the best depends on the GPU


@triton.jit
def _sums(numbers, sums, BLOCK: tl.constexpr, ROUNDS: tl.constexpr):
    """Store in sums[p] the sum, modulo 2^32, of the p-th BLOCK * ROUNDS of int32 `numbers`."""
    program = tl.program_id(0)
    first = numbers + program.to(tl.int64) * (BLOCK * ROUNDS) + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.int32)
    for block in tl.static_range(ROUNDS):
        total += tl.load(first + block * BLOCK, eviction_policy="evict_first")
    tl.store(sums + program, tl.sum(total, 0))


def read(numbers: Tensor, sums: Tensor, block: int, warps: int) -> None:
    """Read int32 `numbers` once, into as many int32 `sums` as cut it into whole programs."""
    assert numbers.numel() == sums.numel() * block * ROUNDS, (numbers.shape, sums.shape, block)
    _sums[(sums.numel(),)](numbers, sums, BLOCK=block, ROUNDS=ROUNDS, num_warps=warps)


def read_bandwidth(size: int, device: torch.device, repeats: int = 7) -> float:
    """Bytes per second at which a kernel that only reads goes through a buffer of about `size`
    bytes: the best of several ways to cut it, each the median of `repeats`."""
    assert not INTERPRETED, "the interpreter has no speed"
    largest = max(block for block, _ in WAYS) * ROUNDS
    numbers = torch.ones(max(1, size // (4 * largest)) * largest, dtype=torch.int32, device=device)
    best = 0.0
    with torch.cuda.device(device):
        for block, warps in WAYS:
            sums = numbers.new_empty(numbers.numel() // (block * ROUNDS))
            read(numbers, sums, block, warps)  # compiles it
            marks = [torch.Event(device, enable_timing=True) for _ in range(repeats + 1)]
            marks[0].record()
            for mark in marks[1:]:
                read(numbers, sums, block, warps)
                mark.record()
            torch.cuda.synchronize()
            took = [a.elapsed_time(b) / 1000 for a, b in pairwise(marks)]
            best = max(best, numbers.nbytes / statistics.median(took))
    return best
