"""Attention of sequences that bring one token each, split over the keys that each has cached.

Keys and values are read where they lie in the slots, each once for all the query heads that share
them. The surprising thing: how the work is split is decided on the device, from the lengths that
are there when the kernel runs: a launch has a fixed number of programs, and divides them so that
each gets about as many keys, one long sequence or many short ones. So a captured launch serves all
lengths, and costs what the rows have, not what is allocated. The kernel knows no requests.

Split-KV, as Flash-Decoding does it (Dao et al. 2023): program i of a row takes a range of its keys,
and by online softmax keeps of their scores s the maximum m_i, the sum l_i = sum exp(s - m_i), and
the weighted values acc_i = sum exp(s - m_i) v. Where a row has several programs, they store these
partials, and the one that comes last combines them: with m = max m_i, the row's attention is
sum_i exp(m_i - m) acc_i / sum_i exp(m_i - m) l_i. It adds them in the order of the keys, whichever
program it is, so that a result does not depend on who came last.

Letters: R rows, H query and K key/value heads, G = H/K, E head size (padded to a power of two in
registers), P slots, T positions.
"""

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from llama.cuda.launch import (
    allow,
    capability,
    launch,
    multiprocessors_and_memory,
    overlap,
    prefetch,
    wait,
)
from llama.cuda.products.epilogues import arranged_place
from llama.cuda.tuning import decode_attention_blocks, fitted_attention, power_of_two

LOG2_E = 1.4426950408889634  # times scores: they are exponents of 2, which is quicker than of e


class Cache(NamedTuple):
    """The keys and values of one layer, and which of them each row reads."""

    k: Tensor  # (P, T, K, E)
    v: Tensor
    slots: Tensor  # (R,)
    lengths: Tensor  # (R,) keys in the slot
    max_seq_len: int  # T


class Partials(NamedTuple):
    """What programs that share a row hand on to the last of them."""

    acc: Tensor  # (programs, H, E) float32
    softmax: Tensor  # (programs, K, 2, G) float32: m_i, then l_i
    arrived: Tensor  # (R, K) int32: how many programs have stored theirs


class Heads(NamedTuple):
    """How many heads there are of what size, as a constant of the kernel."""

    KV_HEADS: int
    G: int  # query heads of a key head
    E: int
    G_PAD: int  # powers of two
    E_PAD: int


@cache
def _heads(kv_heads: int, groups: int, size: int) -> Heads:
    return Heads(kv_heads, groups, size, max(16, power_of_two(groups)), power_of_two(size))


class Split(NamedTuple):
    """How the keys are divided, as a constant of the kernel."""

    R_PAD: int  # a power of two that is at least the number of rows
    PROGRAMS: int  # of a key head, to which the keys are divided
    BLOCK: int  # keys of a block
    STAGES: int  # of the pipeline of blocks
    AHEAD: int  # keys that are prefetched before the queries are there
    LINES: int  # bytes of a head, in whole cache lines


@triton.jit
def _split_keys(lengths, rows, SPLIT: tl.constexpr):
    """The row of this program, its index among the row's programs, the row's first program, how
    many the row has, the keys of each, and of the row. A program without work gets row `rows`."""
    i = tl.arange(0, SPLIT.R_PAD)
    has = tl.load(lengths + i, mask=i < rows, other=0).to(tl.int32)
    fair = tl.cdiv(tl.sum(has, 0), SPLIT.PROGRAMS)
    keys = tl.maximum(tl.cdiv(fair, SPLIT.BLOCK), 1) * SPLIT.BLOCK
    programs = tl.cdiv(has, keys)
    ends = tl.cumsum(programs, 0)
    me = tl.program_id(0)
    row = tl.sum((ends <= me).to(tl.int32), 0)
    mine = i == row
    count = tl.sum(tl.where(mine, programs, 0), 0)
    begin = tl.sum(tl.where(mine, ends - programs, 0), 0)
    length = tl.sum(tl.where(mine, has, 0), 0)
    return tl.minimum(row, rows), me - begin, begin, count, keys, length


@triton.jit
def _mask(rows, e, HEADS: tl.constexpr):
    """The mask (rows, E_PAD) of those `rows` that are true, and of the numbers that a head has."""
    if HEADS.E_PAD > HEADS.E:
        return rows[:, None] & (e < HEADS.E)[None, :]
    else:
        return rows[:, None]


@triton.jit
def _empty(HEADS: tl.constexpr):
    """m_i, l_i and acc of no keys."""
    G_PAD: tl.constexpr = HEADS.G_PAD  # Triton 3.6 takes no plain integer in a shape
    E_PAD: tl.constexpr = HEADS.E_PAD
    m_i = tl.full((G_PAD,), float("-inf"), tl.float32)
    return m_i, tl.zeros((G_PAD,), tl.float32), tl.zeros((G_PAD, E_PAD), tl.float32)


@triton.jit
def _prefetch_keys(
    cache, base, first, length, HEADS: tl.constexpr, SPLIT: tl.constexpr, OVERLAP: tl.constexpr
):  # fmt: skip
    """Prefetch the first keys and values of a program. What earlier steps cached is there already;
    the newest key is not."""
    soon = tl.minimum(first + tl.arange(0, SPLIT.AHEAD), length - 1).to(tl.int64)
    stride: tl.constexpr = HEADS.KV_HEADS * HEADS.E
    prefetch(cache.k + base + soon[:, None] * stride, HEADS.E, SPLIT.LINES, OVERLAP)
    prefetch(cache.v + base + soon[:, None] * stride, HEADS.E, SPLIT.LINES, OVERLAP)


@triton.jit
def _attend_block(
    state, query, cache, base, start, length, scale, HEADS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """m_i, l_i and acc after BLOCK keys more, from `start`."""
    m_i, l_i, acc = state
    e = tl.arange(0, HEADS.E_PAD)
    t = start + tl.arange(0, BLOCK)
    at = base + t.to(tl.int64)[:, None] * (HEADS.KV_HEADS * HEADS.E) + e[None, :]
    k = tl.load(cache.k + at, mask=_mask(t < length, e, HEADS), other=0.0)  # (BLOCK, E)
    scores = tl.dot(query, tl.trans(k), input_precision="ieee") * scale  # (G, BLOCK), in log2
    scores = tl.where((t < length)[None, :], scores, float("-inf"))
    m_new = tl.maximum(m_i, tl.max(scores, 1))
    p = tl.exp2(scores - m_new[:, None])
    alpha = tl.exp2(m_i - m_new)
    v = tl.load(cache.v + at, mask=_mask(t < length, e, HEADS), other=0.0)
    l_i = l_i * alpha + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee")
    return m_new, l_i, acc


@triton.jit
def _store_partial(state, partials, program, head, HEADS: tl.constexpr):
    """Store m_i, l_i and acc of one program of a key head."""
    G: tl.constexpr = HEADS.G
    m_i, l_i, acc = state
    g, e = tl.arange(0, HEADS.G_PAD), tl.arange(0, HEADS.E_PAD)
    cell = g[:, None] * HEADS.E + e[None, :]
    own = program * HEADS.KV_HEADS + head
    at = partials.acc + own.to(tl.int64) * (G * HEADS.E) + cell
    tl.store(at, acc, mask=_mask(g < G, e, HEADS))
    tl.store(partials.softmax + own * (2 * G) + g, m_i, mask=g < G)
    tl.store(partials.softmax + own * (2 * G) + G + g, l_i, mask=g < G)


@triton.jit
def _combine_partials(partials, begin, programs, head, HEADS: tl.constexpr, STAGES: tl.constexpr):
    """l_i and acc of all the programs of a row, the first of which is `begin`."""
    G: tl.constexpr = HEADS.G
    g, e = tl.arange(0, HEADS.G_PAD), tl.arange(0, HEADS.E_PAD)
    cell = g[:, None] * HEADS.E + e[None, :]
    m_row, l_row, acc_row = _empty(HEADS)
    for i in tl.range(0, programs, num_stages=STAGES):
        own = (begin + i) * HEADS.KV_HEADS + head
        m_i = tl.load(partials.softmax + own * (2 * G) + g, mask=g < G, other=0.0,
                      cache_modifier=".cg")  # fmt: skip
        l_i = tl.load(partials.softmax + own * (2 * G) + G + g, mask=g < G, other=1.0,
                      cache_modifier=".cg")  # fmt: skip
        acc = tl.load(partials.acc + own.to(tl.int64) * (G * HEADS.E) + cell,
                      mask=_mask(g < G, e, HEADS), other=0.0,
                      cache_modifier=".cg")  # fmt: skip
        m_new = tl.maximum(m_row, m_i)
        alpha, alpha_i = tl.exp2(m_row - m_new), tl.exp2(m_i - m_new)
        l_row = l_row * alpha + l_i * alpha_i
        acc_row = acc_row * alpha[:, None] + acc * alpha_i[:, None]
        m_row = m_new
    return l_row, acc_row


@triton.jit(do_not_specialize=["rows"])
def _attend(
    q, q_stride, cache, out, partials, rows, scale, HEADS: tl.constexpr, SPLIT: tl.constexpr,
    ARRANGED: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One key head of one row, or of a part of its keys; the last program combines the parts."""
    KV_HEADS: tl.constexpr = HEADS.KV_HEADS
    G: tl.constexpr = HEADS.G
    E: tl.constexpr = HEADS.E
    allow(OVERLAP)
    row, part, begin, parts, keys, length = _split_keys(cache.lengths, rows, SPLIT)
    head = tl.program_id(1)
    g, e = tl.arange(0, HEADS.G_PAD), tl.arange(0, HEADS.E_PAD)
    slot = tl.load(cache.slots + tl.minimum(row, rows - 1)).to(tl.int64)
    base = (tl.maximum(slot, 0) * cache.max_seq_len * KV_HEADS + head) * E
    first = part * keys
    if row < rows:
        _prefetch_keys(cache, base, first, length, HEADS, SPLIT, OVERLAP)
    wait(OVERLAP)
    if row == rows:
        return
    at = q + row.to(tl.int64) * q_stride + head * (G * E)
    query = tl.load(at + g[:, None] * E + e[None, :], mask=_mask(g < G, e, HEADS), other=0.0)
    state = _empty(HEADS)
    for start in tl.range(
        first, tl.minimum(first + keys, length), SPLIT.BLOCK, num_stages=SPLIT.STAGES
    ):
        state = _attend_block(state, query, cache, base, start, length, scale, HEADS, SPLIT.BLOCK)
    _, l_i, acc = state
    if parts > 1:
        _store_partial(state, partials, begin + part, head, HEADS)
        tl.debug_barrier()
        counter = partials.arrived + row * KV_HEADS + head
        if tl.atomic_add(counter, 1, sem="acq_rel") < parts - 1:
            return
        tl.store(counter, 0)
        l_i, acc = _combine_partials(partials, begin, parts, head, HEADS, SPLIT.STAGES)
    result = (acc / l_i[:, None]).to(out.dtype.element_ty)
    column = head * (G * E) + g[:, None] * E + e[None, :]
    if ARRANGED:
        column = arranged_place(column)
    at = out + row.to(tl.int64) * (KV_HEADS * G * E) + column
    tl.store(at, result, mask=_mask(g < G, e, HEADS))


class DecodeAttention:
    """Launches the kernel for up to `max_rows` rows, and holds the partials of split rows."""

    def __init__(
        self, max_rows: int, heads: int, kv_heads: int, head_dim: int, device: torch.device
    ) -> None:
        self.extra = overlap(device)
        self.limits = capability(device), multiprocessors_and_memory(device)[1]
        self.most_rows = max(2, power_of_two(max_rows))  # one kernel serves every number of rows
        most = max_rows + max(
            decode_attention_blocks(r, kv_heads, long).programs
            for r in range(1, max_rows + 1)
            for long in (False, True)
        )
        self.partials = Partials(
            acc=torch.empty(most * heads * head_dim, device=device),
            softmax=torch.empty(most * heads * 2, device=device),
            arrived=torch.zeros(max_rows * kv_heads, dtype=torch.int32, device=device),
        )

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        slots: Tensor,
        lengths: Tensor,
        out: Tensor,
        long: bool = True,
        arranged: bool = False,
    ) -> Tensor:
        """Attention of q (R, H, E) over the first lengths[r] keys of slots[r] in k and v, a layer's
        (P, T, K, E), into out (R, H, E), which is returned. slots and lengths (R,) are integers,
        and were not written by the kernel launched before this one; a row of length 0 reads
        nothing, and its output is left as it was. `long` says whether to be quick with many keys or
        with few. If `arranged`, the numbers of a row of `out` lie as epilogues.arranged_place says,
        and there must be a multiple of 64 of them."""
        rows, heads, size = q.shape
        assert q.stride()[1:] == (size, 1), q.stride()
        assert out.is_contiguous(), out.stride()
        longest, kv_heads = k.shape[1:3]
        groups, itemsize = heads // kv_heads, k.element_size()
        programs, block, stages, warps, ahead = fitted_attention(
            decode_attention_blocks(rows, kv_heads, long), groups, size, itemsize, *self.limits
        )
        lines = -(-size * itemsize // 128) * 128
        launch(_attend, (programs + rows, kv_heads))(
            q, q.stride(0), Cache(k, v, slots, lengths, longest), out, self.partials, rows,
            size**-0.5 * LOG2_E,
            HEADS=_heads(kv_heads, groups, size),
            SPLIT=Split(self.most_rows, programs, block, stages, ahead, lines),
            ARRANGED=arranged, num_warps=warps, **self.extra,
        )  # fmt: skip
        return out
