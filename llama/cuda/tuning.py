"""Which blocks a kernel gets, from a table that was measured: nothing is tried out at start.

Knows numbers only. `benchmarks/NOTES.md` says how they were measured.
"""

from typing import NamedTuple

# Rows up to which our products are used, by kind, and by wide.py of all: from there on torch's are
# as fast, or nothing was measured. Unpacking a weight for torch costs more than it saves.
MOST_ROWS = {"": 32, "wide": 128, "int8": 128, "fp8": 128, "int4": 128}
LEAST_WIDE = {"": 33, "int8": 2, "fp8": 2, "int4": 2}  # rows from which on wide.py is faster


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()


def largest_power_of_two(n: int) -> int:
    """The largest power of two that is at most n."""
    return 1 << (n.bit_length() - 1)


class Stream(NamedTuple):
    """Of one row (stream.py): outputs of a tile, runs of inputs that a warp multiplies in a turn,
    warps, stages of the ring, programs of a multiprocessor, programs that share a sum; the row."""

    block_n: int
    runs: int
    warps: int
    stages: int
    programs: int = 1
    split: int = 1
    padded: int = 1


class Wide(NamedTuple):
    """Of several rows on Hopper (wide.py): rows as the tensor cores see them, outputs and inputs
    that a group of warps multiplies in a turn, programs that share a sum, stages of the ring,
    programs of a multiprocessor."""

    padded: int
    block_n: int
    block_k: int
    split: int
    stages: int
    programs: int = 1


class SomeRows(NamedTuple):
    """Of tiles.py: the same, and warps."""

    padded: int
    block_n: int
    block_k: int
    split: int
    stages: int
    warps: int


Blocks = Stream | Wide | SomeRows


def stream_blocks(outputs: int, inputs: int, kind: str, multiprocessors: int) -> Stream:
    """`kind` is that of a packed weight, "" of a plain one."""
    narrow, broad = (_share(-(-outputs // n), multiprocessors) for n in (16, 32))
    n, runs = (16, 4) if narrow > broad + 0.05 else (32, 2)
    stages = {"": 4, "fp8": 4, "int8": 3, "int4": 7 if outputs > 16384 else 4}[kind]
    run = 32 if not kind else 64
    while runs > 1 and inputs % (8 * runs * run):  # else the last turn has inputs of none
        runs, stages = runs // 2, stages * 2
    if inputs <= 8192:
        return Stream(n, runs, 8, stages)
    split = power_of_two(-(-inputs // 16384))  # a part of the row takes shared memory too
    return Stream(n, runs, 8, 3) if split == 1 else Stream(64, 1, 8, 3, split=split)


def _share(tiles: int, programs: int) -> float:
    """Of the time in which a program has a tile."""
    return tiles / (programs * -(-tiles // programs))


def wide_blocks(
    rows: int, outputs: int, inputs: int, kind: str, multiprocessors: int, gated: bool
) -> Wide:
    """`gated`: a tile of plain numbers then has 128 outputs, so that both of a pair are in one
    thread."""
    padded, many = max(8, power_of_two(rows)), outputs > 16384
    n = 128 if (gated if not kind else many and padded > 8) else 64
    k = 64 if not kind or (many and padded > 64) else 128
    programs = 2 if kind and many and padded == 8 else 1
    split, tiles = 1, -(-outputs // (2 * n))
    while 2 * split * tiles <= multiprocessors and inputs % (8 * split * k) == 0:
        split *= 2  # each has four turns at least
    stage = n * k * {"": 4, "int4": 1}.get(kind, 2) + 2 * padded * k
    return Wide(padded, n, k, split, min(12, 205_000 // programs // stage), programs)


def some_rows_blocks(rows: int, outputs: int, inputs: int, kind: str) -> SomeRows:
    padded, block_k = max(16, power_of_two(rows)), min(128, power_of_two(inputs))
    if kind:
        if 16384 < outputs <= 65536:
            return SomeRows(padded, 128, block_k, 1, 3, 8)
        return SomeRows(padded, 64, block_k, 4 if outputs < 12800 and inputs >= 2048 else 1, 3, 4)
    tiles = -(-outputs // 64)
    split = 1 if tiles >= 200 or inputs < 2048 else 2 if tiles >= 64 else 4
    stages = 4 if tiles >= 200 else 6 if tiles <= 64 else 3
    return SomeRows(padded, 64, block_k, split, min(stages, 384 // padded), 4)


class DecodeAttention(NamedTuple):
    """Programs a key head that share the keys, keys of a block, stages, warps, keys that are on
    their way before the queries are there."""

    programs: int
    block: int
    stages: int
    warps: int
    ahead: int = 128


LONG = 1024  # keys from which on a row counts as long


def decode_attention_blocks(rows: int, kv_heads: int, long: bool) -> DecodeAttention:
    eighth = max(1, 8 // kv_heads) if kv_heads < 8 else 1
    if rows <= 2 and not long:
        return DecodeAttention(16 * eighth, 64, 2, 4)
    if rows <= 16:
        return DecodeAttention(16 * eighth, 128, 3, 4)
    return DecodeAttention(32 * eighth, 64, 4 if rows <= 64 else 2, 4, 64)
