"""Which blocks a kernel gets, from a table that was measured: nothing is tried out at start.

Knows numbers only. `benchmarks/NOTES.md` says how they were measured, on an H200. A GPU whose
programs share less memory than these blocks take gets fewer stages, then smaller blocks: `fitted`.
The surprising thing: what blocks take is reckoned here and not asked of a compiler, so the tests
hold it against what the compiler takes, for every kind of GPU.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeVar

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

    def takes(self, kind: str, group: int, itemsize: int, direct: bool) -> int:
        """Bytes that a program shares, of a packed weight of that kind or a plain one, and rows of
        numbers of `itemsize` bytes."""
        inputs = self.block_k * self.padded * itemsize
        weights = self.block_k * self.block_n * {"": 2 * itemsize, "int4": 1}.get(kind, 2) // 2
        each = 12 if group >= 64 else 40  # bytes of a scale and an offset, in all stages
        pairs = each * self.block_n * self.block_k // group if group else 0
        weights_held = self.stages - 1 + (direct and not kind)  # packed ones go by registers
        return weights_held * weights + (self.stages - 1 + direct) * inputs + pairs + 64

    def smaller(self, group: int) -> "SomeRows":
        """Turns of fewer inputs, of whole groups, then fewer outputs."""
        if self.block_k > max(32, group):
            return self._replace(block_k=self.block_k // 2)
        return self._replace(block_n=max(16, self.block_n // 2))


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
    rows: int,
    outputs: int,
    inputs: int,
    kind: str,
    multiprocessors: int,
    gated: bool,
    shared: int = 227 * 1024,
) -> Wide:
    """`gated`: a tile of plain numbers then has 128 outputs, so that both of a pair are in one
    thread. `shared` bytes are those of a multiprocessor."""
    padded, many = max(8, power_of_two(rows)), outputs > 16384
    n = 128 if (gated if not kind else many and padded > 8) else 64
    k = 64 if not kind or (many and padded > 64) else 128
    programs = 2 if kind and many and padded == 8 else 1
    split, tiles = 1, -(-outputs // (2 * n))
    while 2 * split * tiles <= multiprocessors and inputs % (8 * split * k) == 0:
        split *= 2  # each has four turns at least
    stage = n * k * {"": 4, "int4": 1}.get(kind, 2) + 2 * padded * k
    return Wide(padded, n, k, split, min(12, (shared - 27_448) // programs // stage), programs)


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

    def takes(self, groups: int, size: int, itemsize: int) -> int:
        """Bytes that a program shares, of `groups` query heads a key head: keys and values, and
        queries and scores on their way to the tensor cores."""
        size, groups = power_of_two(size), max(16, power_of_two(groups))
        keys = 2 * self.block * size * itemsize
        return (self.stages - 1) * keys + groups * (self.block + size) * itemsize + 64

    def smaller(self) -> "DecodeAttention":
        return self._replace(block=max(16, self.block // 2))


class Tiling(NamedTuple):
    """How attention of prompts is cut: rows and keys of a tile, warps, stages of the pipeline of
    keys."""

    rows: int
    keys: int
    warps: int
    stages: int

    def takes(self, size: int, itemsize: int, direct: bool) -> int:
        """Bytes that a program shares: queries, keys and values, and scores. Keys in one stage are
        there without values."""
        queries, keys = (n * power_of_two(size) * itemsize for n in (self.rows, self.keys))
        held = self.stages - 1 + direct if self.stages > 1 else 0.5
        scores = 1024 if direct else self.rows * self.keys * itemsize + 128
        return queries + int(2 * held * keys) + scores

    def smaller(self) -> "Tiling":
        """Fewer keys, then fewer rows."""
        if self.keys > 16:
            return self._replace(keys=self.keys // 2)
        return self._replace(rows=max(16, self.rows // 2))


LONG = 1024  # keys from which on a row counts as long


def decode_attention_blocks(rows: int, kv_heads: int, long: bool) -> DecodeAttention:
    eighth = max(1, 8 // kv_heads) if kv_heads < 8 else 1
    if rows <= 2 and not long:
        return DecodeAttention(16 * eighth, 64, 2, 4)
    if rows <= 16:
        return DecodeAttention(16 * eighth, 128, 3, 4)
    return DecodeAttention(32 * eighth, 64, 4 if rows <= 64 else 2, 4, 64)


# ---- on a GPU with less memory

# Of compute capabilities, the first number of the one that was measured. float32 is not multiplied
# by tensor cores, and for others, or large heads, compilers find no registers for as much of it.
MEASURED = 9

Staged = TypeVar("Staged", SomeRows, DecodeAttention, Tiling)


def direct(capability: tuple[int, int], itemsize: int) -> bool:
    """Whether tensor cores read what they multiply from shared memory by themselves: a stage is
    theirs until they are done with it, so that Triton holds one more."""
    return capability[0] in (9, 10) and itemsize == 2


def fitted(
    blocks: Staged,
    smaller: Callable[[Staged], Staged],
    takes: Callable[[Staged], int],
    shared: int,
) -> Staged:
    """`blocks`, if they take no more than `shared` bytes; else with fewer stages, of which three
    keep loads under way while something is multiplied, then smaller ones; then with two stages.
    The smallest where nothing fits."""
    every = [blocks]
    while (less := smaller(every[-1])) != every[-1]:
        every.append(less)
    few = min(3, blocks.stages)
    tried = [some._replace(stages=n) for some in every for n in range(blocks.stages, few - 1, -1)]
    tried += [some._replace(stages=min(2, few)) for some in every]
    return next((some for some in tried if takes(some) <= shared), tried[-1])


def fitted_some_rows(
    blocks: SomeRows,
    kind: str,
    group: int,
    itemsize: int,
    capability: tuple[int, int],
    shared: int,
) -> SomeRows:
    by_itself = direct(capability, itemsize)
    if itemsize == 4 and capability[0] != MEASURED:
        blocks = blocks._replace(block_k=min(blocks.block_k, max(64, group)))
    return fitted(
        blocks,
        lambda some: some.smaller(group),
        lambda some: some.takes(kind, group, itemsize, by_itself),
        shared,
    )


def fitted_attention(
    blocks: DecodeAttention,
    groups: int,
    size: int,
    itemsize: int,
    capability: tuple[int, int],
    shared: int,
) -> DecodeAttention:
    if itemsize == 4:
        numbers = 8192 if capability[0] == MEASURED and size <= 128 else 4096
        most = max(16, numbers // power_of_two(size))
        blocks = blocks._replace(block=min(blocks.block, most))
    return fitted(
        blocks, DecodeAttention.smaller, lambda some: some.takes(groups, size, itemsize), shared
    )


def fitted_tiling(
    cut: Tiling, size: int, itemsize: int, capability: tuple[int, int], shared: int
) -> Tiling:
    by_itself = direct(capability, itemsize)
    return fitted(cut, Tiling.smaller, lambda some: some.takes(size, itemsize, by_itself), shared)
