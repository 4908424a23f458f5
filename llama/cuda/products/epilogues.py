"""What becomes of a tile of a product: it is stored, added, gated, or rotated and cached.

This file knows where results go, and not how they came about. The surprising thing: pairs (the two
of a rotary pair, or w1 beside w3) are neighbours in a tile, so that one function serves both;
`output_row` says which row of the weight an output is. Kernels of Triton and of Gluon use these
functions, and Gluon's say which thread holds what: so the indices of the outputs and rows of a tile
are arguments, and no ranges are made here.

Letters: R rows, N outputs; RP is R padded for the tensor cores.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

STORE, ADD, GATE, ROTATE = (tl.constexpr(i) for i in range(4))


class Rotation(NamedTuple):
    """Where the joined product of wq, wk and wv goes beside the queries."""

    cos: Tensor  # (R, E/2) float32
    sin: Tensor  # (R, E/2) float32
    slots: Tensor  # (R,) integers: the slot of each row's keys and values; -1: they are not kept
    positions: Tensor  # (R,) integers: their position in that slot
    k: Tensor  # a layer's keys (P, T, K, E)
    v: Tensor  # and values


class SplitK(NamedTuple):
    """The scratch of programs that share the sums of a tile."""

    partials: Tensor  # float32: what each has added up
    arrived: Tensor  # int32 of each tile: how many of them are done


class Destination(NamedTuple):
    """Where the outputs of a product go, as one argument of its kernel."""

    n_outputs: int
    out: Tensor
    split_k: SplitK
    rotation: Rotation  # read by ROTATE alone
    max_seq_len: int  # positions of a slot of the cache


class Epilogue(NamedTuple):
    """What a kernel does with its outputs, as one constant argument."""

    op: int  # STORE, ADD, GATE or ROTATE
    heads: int = 0  # ROTATE: the query heads,
    kv_heads: int = 0  # the key heads
    head_dim: int = 2  # and their size


@triton.jit
def output_row(j, n_outputs, PAIRED: tl.constexpr):
    """The weight rows of outputs `j`: those of two halves (w1 and w3) alternate where PAIRED."""
    if PAIRED:
        return (j % 2) * (n_outputs // 2) + j // 2
    return j


@triton.jit
def half_row(base, n, begin, n_outputs, BLOCK_N: tl.constexpr, H: tl.constexpr):
    """`base` and the weight rows of outputs n of a tile, which has as many of each of H halves of
    the weight, from row `begin` of a half on; the last row for outputs that do not exist."""
    j = tl.minimum(begin + n % (BLOCK_N // H), n_outputs // H - 1)
    return base + n // (BLOCK_N // H) * (n_outputs // H) + j


@triton.jit
def arranged_place(c):
    """The index in an arranged row of number c, as gemm_sm90.py reads rows beside packed weights:
    within each sixty-four, the bits h t t i j p of an index become h i j t t p."""
    return c // 64 * 64 + (c & 33) + (c & 6) * 4 + (c & 24) // 4


@triton.jit
def pairs(x, BLOCK_N: tl.constexpr, RP: tl.constexpr, HALVES: tl.constexpr):
    """Even and odd outputs of a tile, or its halves, (BLOCK_N / 2, RP) each."""
    if HALVES:
        pairs = tl.permute(tl.reshape(x, (2, BLOCK_N // 2, RP)), (1, 2, 0))
    else:
        pairs = tl.permute(tl.reshape(x, (BLOCK_N // 2, 2, RP)), (0, 2, 1))
    return tl.split(pairs)


@triton.jit
def output_indices(
    cell, first, OP: tl.constexpr, BLOCK_N: tl.constexpr, RP: tl.constexpr, HALVES: tl.constexpr
):
    """The n and r of `finish` for a tile that begins at output `first` and holds, for output i of
    row r, the number i RP + r in `cell`."""
    if OP == GATE or OP == ROTATE:
        cell, _ = pairs(cell, BLOCK_N, RP, HALVES)
        n = first // 2 + cell // ((1 if HALVES else 2) * RP)
    else:
        n = first + cell // RP
    return n, cell % RP


@triton.jit
def store(y, n, r, rows, n_outputs, out, ADDED: tl.constexpr):
    """Store outputs n of rows r to (R, N), ADDED to what is there if that is asked for."""
    at = out + r.to(tl.int64) * n_outputs + n
    there = (n < n_outputs) & (r < rows)
    if ADDED:
        y += tl.load(at, mask=there, other=0.0).to(tl.float32)
    tl.store(at, y.to(out.dtype.element_ty), mask=there)


@triton.jit
def gate(a, b, n, r, rows, n_outputs, out, ARRANGED: tl.constexpr):
    """Store silu(a) * b of pairs n of rows r to (R, N / 2), ARRANGED as `arranged_place` says."""
    gated = a / (1.0 + tl.exp(-a)) * b
    column = arranged_place(n) if ARRANGED else n
    at = out + r.to(tl.int64) * (n_outputs // 2) + column
    tl.store(at, gated.to(out.dtype.element_ty), mask=(n < n_outputs // 2) & (r < rows))


@triton.jit
def rotate(a, b, n, r, rows, to, EPILOGUE: tl.constexpr):
    """Rotate pairs n of rows r, and store them as queries and, with the values, in the cache."""
    HEADS: tl.constexpr = EPILOGUE.heads
    KV_HEADS: tl.constexpr = EPILOGUE.kv_heads
    E: tl.constexpr = EPILOGUE.head_dim
    out, cache = to.out, to.rotation
    there = (n < to.n_outputs // 2) & (r < rows)
    rotated = there & (n < (HEADS + KV_HEADS) * (E // 2))
    angle = r * (E // 2) + n % (E // 2)
    c = tl.load(cache.cos + angle, mask=rotated, other=1.0)
    s = tl.load(cache.sin + angle, mask=rotated, other=0.0)
    low, high = (a * c - b * s), (a * s + b * c)
    n *= 2
    is_q = there & (n < HEADS * E)
    at = out + r.to(tl.int64) * (HEADS * E) + n
    tl.store(at, low.to(out.dtype.element_ty), mask=is_q)
    tl.store(at + 1, high.to(out.dtype.element_ty), mask=is_q)
    slot = tl.load(cache.slots + r, mask=r < rows, other=-1)
    position = tl.load(cache.positions + r, mask=r < rows, other=0)
    kept = there & (slot >= 0) & (position < to.max_seq_len)
    base = (slot.to(tl.int64) * to.max_seq_len + position) * (KV_HEADS * E)
    is_k = kept & (n >= HEADS * E) & (n < (HEADS + KV_HEADS) * E)
    at = cache.k + base + (n - HEADS * E)
    tl.store(at, low.to(cache.k.dtype.element_ty), mask=is_k)
    tl.store(at + 1, high.to(cache.k.dtype.element_ty), mask=is_k)
    is_v = kept & (n >= (HEADS + KV_HEADS) * E)
    at = cache.v + base + (n - (HEADS + KV_HEADS) * E)
    tl.store(at, low.to(cache.v.dtype.element_ty), mask=is_v)
    tl.store(at + 1, high.to(cache.v.dtype.element_ty), mask=is_v)


@triton.jit
def finish(
    y, n, r, rows, to, EPILOGUE: tl.constexpr, BLOCK_N: tl.constexpr, RP: tl.constexpr,
    HALVES: tl.constexpr = False,
):  # fmt: skip
    """Do with a tile y (BLOCK_N, RP) what EPILOGUE says: n are its outputs and r its rows, or n its
    pairs, where GATE and ROTATE take pairs. HALVES: the pairs are its upper and lower half."""
    OP: tl.constexpr = EPILOGUE.op
    if OP == STORE or OP == ADD:
        store(y, n, r, rows, to.n_outputs, to.out, OP == ADD)
    else:
        a, b = pairs(y, BLOCK_N, RP, HALVES)
        if OP == GATE:
            gate(a, b, n, r, rows, to.n_outputs, to.out, False)
        else:
            rotate(a, b, n, r, rows, to, EPILOGUE)
