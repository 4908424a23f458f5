"""Which blocks a kernel gets, from a table that was measured: nothing is tried out at start.

This file knows numbers only. `benchmarks/NOTES.md` says how they were measured, on an H200. A GPU
whose programs share less memory than these blocks take gets fewer stages, then smaller blocks:
`fitted`. The surprising thing: what blocks take is reckoned here and not asked of a compiler, so
the tests hold it against what the compiler takes, for every kind of GPU.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeVar

# Rows up to which our products are used, by the kind of the weight, and with gemm_sm90.py: from
# there on torch's are as fast, or nothing was measured. Unpacking a weight for torch costs more
# than it saves.
MOST_ROWS = {"": 32, "int8": 128, "fp8": 128, "int4": 128}
MOST_ROWS_SM90 = 128
LEAST_ROWS_SM90 = {"": 33, "int8": 2, "fp8": 2, "int4": 2}  # from which on gemm_sm90.py is faster


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()


def largest_power_of_two(n: int) -> int:
    """The largest power of two that is at most n."""
    return 1 << (n.bit_length() - 1)


class Gemv(NamedTuple):
    """The blocks of gemv.py, for one row."""

    block_n: int  # outputs of a tile
    slices: int  # K slices that a warp multiplies in a K block
    warps: int
    stages: int  # K blocks that are in shared memory
    programs: int = 1  # of a multiprocessor
    split: int = 1  # programs that share a sum (split-K)
    padded: int = 1  # rows


class GemmSm90(NamedTuple):
    """The blocks of gemm_sm90.py, for several rows on Hopper."""

    padded: int  # rows as the tensor cores see them
    block_n: int  # outputs of a consumer, of which a program has two
    block_k: int  # inputs of a K block
    split: int  # programs that share a sum (split-K)
    stages: int  # K blocks that are in shared memory
    programs: int = 1  # of a multiprocessor


class Gemm(NamedTuple):
    """The blocks of gemm.py, for all other products."""

    padded: int  # rows as the tensor cores see them
    block_n: int  # outputs of a tile
    block_k: int  # inputs of a K block
    split: int  # programs that share a sum (split-K)
    stages: int  # of the pipeline that Triton makes
    warps: int

    def takes(self, kind: str, group: int, itemsize: int, direct: bool) -> int:
        """Bytes of shared memory that a program needs, for a packed weight of that kind or a plain
        one, and rows of numbers of `itemsize` bytes."""
        inputs = self.block_k * self.padded * itemsize
        weights = self.block_k * self.block_n * {"": 2 * itemsize, "int4": 1}.get(kind, 2) // 2
        each = 12 if group >= 64 else 40  # bytes of a scale and an offset, in all stages
        pairs = each * self.block_n * self.block_k // group if group else 0
        weights_held = self.stages - 1 + (direct and not kind)  # packed ones go by registers
        return weights_held * weights + (self.stages - 1 + direct) * inputs + pairs + 64

    def smaller(self, group: int) -> "Gemm":
        """The next smaller blocks: fewer inputs, of whole groups, then fewer outputs."""
        if self.block_k > max(32, group):
            return self._replace(block_k=self.block_k // 2)
        return self._replace(block_n=max(16, self.block_n // 2))


Blocks = Gemv | GemmSm90 | Gemm


def gemv_blocks(outputs: int, inputs: int, kind: str, multiprocessors: int) -> Gemv:
    """`kind` is that of a packed weight, "" of a plain one."""
    narrow, broad = (_share(-(-outputs // n), multiprocessors) for n in (16, 32))
    n, slices = (16, 4) if narrow > broad + 0.05 else (32, 2)
    stages = {"": 4, "fp8": 4, "int8": 3, "int4": 7 if outputs > 16384 else 4}[kind]
    k_slice = 32 if not kind else 64
    while slices > 1 and inputs % (8 * slices * k_slice):  # else the last K block is not whole
        slices, stages = slices // 2, stages * 2
    if inputs <= 8192:
        return Gemv(n, slices, 8, stages)
    split = power_of_two(-(-inputs // 16384))  # the inputs of a split take shared memory too
    return Gemv(n, slices, 8, 3) if split == 1 else Gemv(64, 1, 8, 3, split=split)


def _share(tiles: int, programs: int) -> float:
    """The share of the time in which a program has a tile."""
    return tiles / (programs * -(-tiles // programs))


def gemm_sm90_blocks(
    rows: int,
    outputs: int,
    inputs: int,
    kind: str,
    multiprocessors: int,
    gated: bool,
    shared: int = 227 * 1024,
) -> GemmSm90:
    """`gated`: a consumer of plain numbers then has 128 outputs, so that both of a pair are in one
    thread. `shared` bytes are those of a multiprocessor."""
    padded, many = max(8, power_of_two(rows)), outputs > 16384
    n = 128 if (gated if not kind else many and padded > 8) else 64
    k = 64 if not kind or (many and padded > 64) else 128
    programs = 2 if kind and many and padded == 8 else 1
    split, tiles = 1, -(-outputs // (2 * n))
    while 2 * split * tiles <= multiprocessors and inputs % (8 * split * k) == 0:
        split *= 2  # each has four K blocks at least
    stage = n * k * {"": 4, "int4": 1}.get(kind, 2) + 2 * padded * k
    return GemmSm90(padded, n, k, split, min(12, (shared - 27_448) // programs // stage), programs)


def gemm_blocks(rows: int, outputs: int, inputs: int, kind: str) -> Gemm:
    padded, block_k = max(16, power_of_two(rows)), min(128, power_of_two(inputs))
    if kind:
        if 16384 < outputs <= 65536:
            return Gemm(padded, 128, block_k, 1, 3, 8)
        return Gemm(padded, 64, block_k, 4 if outputs < 12800 and inputs >= 2048 else 1, 3, 4)
    tiles = -(-outputs // 64)
    split = 1 if tiles >= 200 or inputs < 2048 else 2 if tiles >= 64 else 4
    stages = 4 if tiles >= 200 else 6 if tiles <= 64 else 3
    return Gemm(padded, 64, block_k, split, min(stages, 384 // padded), 4)


class DecodeAttention(NamedTuple):
    """The blocks of attention/decode.py."""

    programs: int  # of a key head, which share the keys
    block: int  # keys of a block
    stages: int
    warps: int
    ahead: int = 128  # keys that are on their way before the queries are there

    def takes(self, groups: int, size: int, itemsize: int) -> int:
        """Bytes of shared memory that a program needs, for `groups` query heads a key head: for
        keys and values, and for queries and scores on their way to the tensor cores."""
        size, groups = power_of_two(size), max(16, power_of_two(groups))
        keys = 2 * self.block * size * itemsize
        return (self.stages - 1) * keys + groups * (self.block + size) * itemsize + 64

    def smaller(self) -> "DecodeAttention":
        return self._replace(block=max(16, self.block // 2))


class Tiling(NamedTuple):
    """The blocks of attention/prefill.py."""

    rows: int  # of a tile
    keys: int  # of a tile
    warps: int
    stages: int  # of the pipeline of keys

    def takes(self, size: int, itemsize: int, direct: bool) -> int:
        """Bytes of shared memory that a program needs: for queries, keys and values, and scores.
        Keys in one stage are there without values."""
        queries, keys = (n * power_of_two(size) * itemsize for n in (self.rows, self.keys))
        held = self.stages - 1 + direct if self.stages > 1 else 0.5
        scores = 1024 if direct else self.rows * self.keys * itemsize + 128
        return queries + int(2 * held * keys) + scores

    def smaller(self) -> "Tiling":
        """The next smaller blocks: fewer keys, then fewer rows."""
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

# The major compute capability of the GPU that was measured. float32 is not multiplied
# by tensor cores, and for others, or large heads, compilers find no registers for as much of it.
MEASURED = 9

Staged = TypeVar("Staged", Gemm, DecodeAttention, Tiling)


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
    """Return `blocks`, if they take no more than `shared` bytes; else with fewer stages, of which
    three keep loads under way while something is multiplied, then smaller ones; then with two
    stages. The smallest are returned where nothing fits."""
    every = [blocks]
    while (less := smaller(every[-1])) != every[-1]:
        every.append(less)
    few = min(3, blocks.stages)
    tried = [some._replace(stages=n) for some in every for n in range(blocks.stages, few - 1, -1)]
    tried += [some._replace(stages=min(2, few)) for some in every]
    return next((some for some in tried if takes(some) <= shared), tried[-1])


def fitted_gemm(
    blocks: Gemm,
    kind: str,
    group: int,
    itemsize: int,
    capability: tuple[int, int],
    shared: int,
) -> Gemm:
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
