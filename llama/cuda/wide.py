"""Products of packed weights with 2 to 128 rows, on Hopper's tensor cores.

A warp group takes packed weights from shared memory, makes them bfloat16 in registers, and hands
those to the wide matrix instruction, which reads the rows from shared memory by itself. What that
leaves idle, another program of the same multiprocessor uses. The surprising thing: the rows come
with their inputs in another order, in which eight bytes of a weight that lie side by side are what
one thread has to hand over; whoever makes the rows puts them so (epilogues.arranged_place).

Letters: N outputs, K inputs, W warps, RP rows as the tensor cores see them. The bits of an input's
number in sixty-four, from the last one on, are p of a pair, j, i, t which of four threads, h.
"""

# ruff: noqa: ANN001, ANN201, ANN202 (arguments of kernels have no types in Python)
# mypy: disable-error-code="no-untyped-def,no-untyped-call"

import triton.language as tl

from llama.cuda.epilogues import GATE, finish, numbered, output_row
from llama.cuda.gluon import (
    barrier,
    commit_group,
    constexpr_function,
    copy_numbers,
    fence_async_shared,
    gl,
    jit,
    powers,
    wait_group,
    warpgroup_mma,
)
from llama.cuda.launch import allow, wait
from llama.cuda.numbers import bfloats_of_bytes, bfloats_of_nibbles
from llama.cuda.weights import INT4

GROUP = tl.constexpr(64)  # inputs of a pair of int4


# ---- where numbers lie


@constexpr_function
def copy_layout(columns, vector, warps):
    """(rows, columns), up to `vector` numbers of a row a thread."""
    vector = min(vector, columns)
    across = min(32, columns // vector)
    return gl.BlockedLayout([1, vector], [32 // across, across], [warps, 1], [1, 0])


@constexpr_function
def ring_memory(columns):
    """(N, columns) bytes, words of 16 bytes changing places by the row."""
    wide = min(128, columns)
    return gl.SwizzledSharedLayout(16, 128 // wide, wide // 16, [1, 0])


@constexpr_function
def rows_layout(shape, mine, threads, warps):
    """(N, ...): sixteen rows a warp, eight of them in its fours of threads; behind a row, bits that
    say a number of a thread, `mine`, and those that say which thread of four."""
    none = [0] * (len(shape) - 1)
    regs = [[0, *bit] for bit in mine] + [[8, *none]]
    regs += [[n, *none] for n in powers(16 * warps, shape[0] // (16 * warps))]
    lanes = [[0, *bit] for bit in threads] + [[n, *none] for n in (4, 2, 1)]
    parts = [[n, *none] for n in powers(16, warps)]
    return gl.DistributedLinearLayout(regs, lanes, parts, [], shape)


@constexpr_function
def weights_layout(block_n, columns, warps):
    """(N, columns) bytes, eight side by side a thread."""
    mine = [[1], [2], [4]] + [[n] for n in powers(32, columns // 32)]
    return rows_layout([block_n, columns], mine, [[8], [16]], warps)


@constexpr_function
def words_layout(block_n, groups, warps):
    """The same of int4 as (N, groups, 4 threads, 8 bytes)."""
    mine = [[0, 0, n] for n in (1, 2, 4)] + [[n, 0, 0] for n in powers(1, groups)]
    return rows_layout([block_n, groups, 4, 8], mine, [[0, 1, 0], [0, 2, 0]], warps)


@constexpr_function
def pairs_layout(block_n, groups, warps):
    """(N, groups), in all four threads."""
    return rows_layout([block_n, groups], [[n] for n in powers(1, groups)], [[0], [0]], warps)


@jit
def _output_of(s):
    """Which output of a tile lies in row s of shared memory: the pairs 2n, 2n + 1 are rows 8 apart,
    which the tensor cores have in one thread."""
    return s // 16 * 16 + s % 8 * 2 + s // 8 % 2


@jit
def _natural(y, BLOCK_N: tl.constexpr, RP: tl.constexpr):
    """A tile (N, RP), rows as the tensor cores number them, in the order of its outputs."""
    y = gl.permute(gl.reshape(y, [BLOCK_N // 16, 2, 2, 2, 2, RP]), [0, 4, 3, 2, 1, 5])
    return gl.reshape(y, [BLOCK_N, RP])


# ---- the product


@jit
def _source(
    base, first, begin, n_outputs, ROW: tl.constexpr, COLUMNS: tl.constexpr, VECTOR: tl.constexpr,
    BLOCK_N: tl.constexpr, PAIRED: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """Where a tile's rows of ROW numbers are read, its columns `begin` and on: (N, COLUMNS)."""
    COPY: tl.constexpr = copy_layout(COLUMNS, VECTOR, W)
    s = gl.arange(0, BLOCK_N, gl.SliceLayout(1, COPY))
    n = output_row(gl.minimum(first + _output_of(s), n_outputs - 1), n_outputs, PAIRED)
    column = begin + gl.arange(0, COLUMNS, gl.SliceLayout(0, COPY))
    return base + n.to(gl.int64)[:, None] * ROW + column[None, :]


@jit
def _fill(ring, of_pairs, slot, at, at_pairs, turn, turns, KIND: tl.constexpr):
    """Begin to copy a turn's weights to a slot; zeros where there is no such turn."""
    COLUMNS: tl.constexpr = at.shape[1]
    GROUPS: tl.constexpr = at_pairs.shape[1]
    copy_numbers(ring.index(slot), at + turn * COLUMNS, turn < turns)
    if KIND == INT4:
        copy_numbers(of_pairs.index(slot), at_pairs + turn * GROUPS, turn < turns)


@jit
def _weights(
    ring, of_pairs, slot, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, KIND: tl.constexpr,
    MMA: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """A turn's weights as the tensor cores want them: (BLOCK_N, BLOCK_K)."""
    GROUPS: tl.constexpr = BLOCK_K // GROUP
    COLUMNS: tl.constexpr = BLOCK_K // 2 if KIND == INT4 else BLOCK_K
    a = ring.index(slot).load(weights_layout(BLOCK_N, COLUMNS, W))
    if KIND == INT4:
        WORDS: tl.constexpr = words_layout(BLOCK_N, GROUPS, W)
        pair = of_pairs.index(slot).load(pairs_layout(BLOCK_N, GROUPS, W))
        pair = gl.reshape(pair, [BLOCK_N, GROUPS, 1, 1])
        pair = gl.convert_layout(pair, WORDS, assert_trivial=True)
        pair, _ = gl.broadcast(pair, gl.full([BLOCK_N, GROUPS, 4, 8], 0, gl.int32, WORDS))
        a = gl.convert_layout(gl.reshape(a, [BLOCK_N, GROUPS, 4, 8]), WORDS, assert_trivial=True)
        a = bfloats_of_nibbles(a, pair)  # (N, groups, t, i j p, h)
        a = gl.reshape(a, [BLOCK_N // 8, 2, 2, 2, GROUPS, 4, 2, 2, 2, 2])
        a = gl.permute(a, [0, 3, 2, 1, 4, 9, 6, 7, 5, 8])
    else:
        a = bfloats_of_bytes(a, KIND)  # (N, groups of h t i j p)
        a = gl.reshape(a, [BLOCK_N // 8, 2, 2, 2, GROUPS, 2, 4, 2, 2, 2])
        a = gl.permute(a, [0, 3, 2, 1, 4, 5, 7, 8, 6, 9])
    a = gl.reshape(a, [BLOCK_N, BLOCK_K])  # of groups of h i j t p
    return gl.convert_layout(a, gl.DotOperandLayout(0, MMA, 2), assert_trivial=True)


@jit
def wide(
    x, w, scale, rows, n_outputs, out, partial, arrived, cos, sin, slots, positions, k, v, T,
    K: tl.constexpr, RP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr, STAGES: tl.constexpr, KIND: tl.constexpr, W: tl.constexpr,
    EPILOGUE: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, E: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """BLOCK_N outputs of RP rows over a SPLIT-th of the inputs; the last one to come adds up, in
    their order. `w` holds bytes, `scale` those of rows or the pairs of int4; x (rows, K) is
    arranged."""
    EACH: tl.constexpr = 2 if KIND == INT4 else 1
    COLUMNS: tl.constexpr = BLOCK_K // EACH
    GROUPS: tl.constexpr = BLOCK_K // GROUP
    PAIRED: tl.constexpr = EPILOGUE == GATE
    MMA: tl.constexpr = gl.NVMMADistributedLayout([3, 0], [W, 1], [16, RP, 16])
    COPY: tl.constexpr = copy_layout(BLOCK_K, 8, W)
    TURNS: tl.constexpr = (K // BLOCK_K + SPLIT - 1) // SPLIT
    tile, part = gl.program_id(0), gl.program_id(1)
    first, begin = tile * BLOCK_N, part * TURNS
    turns = gl.minimum(TURNS, K // BLOCK_K - begin)
    ring = gl.allocate_shared_memory(
        w.dtype.element_ty, [STAGES, BLOCK_N, COLUMNS], ring_memory(COLUMNS)
    )
    of_rows = gl.allocate_shared_memory(
        x.dtype.element_ty, [STAGES, RP, BLOCK_K], gl.NVMMASharedLayout(128, 16, 2)
    )
    at = _source(w, first, begin * COLUMNS, n_outputs, K // EACH, COLUMNS, 16, BLOCK_N, PAIRED, W)
    of_pairs, at_pairs = ring, at
    if KIND == INT4:
        of_pairs = gl.allocate_shared_memory(
            gl.int32, [STAGES, BLOCK_N, GROUPS], gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
        )
        at_pairs = _source(
            scale, first, begin * GROUPS, n_outputs, K // GROUP, GROUPS, 4, BLOCK_N, PAIRED, W
        )
    for i in gl.static_range(STAGES - 1):
        _fill(ring, of_pairs, i, at, at_pairs, i, turns, KIND)
    commit_group()
    r = gl.minimum(gl.arange(0, RP, gl.SliceLayout(1, COPY)), rows - 1)
    column = begin * BLOCK_K + gl.arange(0, BLOCK_K, gl.SliceLayout(0, COPY))
    at_rows = x + r[:, None] * K + column[None, :]
    wait(OVERLAP)
    for i in gl.static_range(STAGES - 1):
        copy_numbers(of_rows.index(i), at_rows + i * BLOCK_K, i < turns)
        commit_group()
    z = gl.full([BLOCK_N, RP], 0.0, gl.float32, MMA)
    slot = 0
    for turn in range(turns):
        wait_group(STAGES - 2)
        fence_async_shared()
        barrier()  # all are done with the turn before this one, whose slot is free
        free = gl.where(slot == 0, STAGES - 1, slot - 1)
        soon = turn + STAGES - 1
        _fill(ring, of_pairs, free, at, at_pairs, soon, turns, KIND)
        copy_numbers(of_rows.index(free), at_rows + soon * BLOCK_K, soon < turns)
        commit_group()
        a = _weights(ring, of_pairs, slot, BLOCK_N, BLOCK_K, KIND, MMA, W)
        z = warpgroup_mma(a, of_rows.index(slot).permute([1, 0]), z)
        slot = gl.where(slot == STAGES - 1, 0, slot + 1)
    allow(OVERLAP)
    m = gl.arange(0, BLOCK_N, gl.SliceLayout(1, MMA))
    n = _output_of(m // 8 * 8 + (m & 1) * 4 + (m & 2) + (m & 4) // 4)
    cell = n[:, None] * RP + gl.arange(0, RP, gl.SliceLayout(0, MMA))[None, :]
    last = True
    if SPLIT > 1:
        mine = partial + (tile * SPLIT + part) * (BLOCK_N * RP)
        gl.store(mine + cell, z)
        barrier()
        last = gl.atomic_add(arrived + tile, 1, sem="acq_rel") == SPLIT - 1
        if last:
            gl.store(arrived + tile, 0)
            z = gl.full([BLOCK_N, RP], 0.0, gl.float32, MMA)
            for i in gl.static_range(SPLIT):
                theirs = partial + (tile * SPLIT + i) * (BLOCK_N * RP)
                z += gl.load(theirs + cell, cache_modifier=".cg")
    if last:
        if KIND != INT4:
            row = output_row(gl.minimum(first + n, n_outputs - 1), n_outputs, PAIRED)
            z *= gl.load(scale + row)[:, None]
        outputs, of = numbered(_natural(cell, BLOCK_N, RP), first, EPILOGUE, BLOCK_N, RP, False)
        finish(
            _natural(z, BLOCK_N, RP), outputs, of, rows, n_outputs, out, cos, sin, slots, positions,
            k, v, T, EPILOGUE, BLOCK_N, RP, HEADS, KV_HEADS, E, False, True,
        )  # fmt: skip
