"""Attention of sequences that bring one token each, split over what each has cached.

Reads keys and values where they lie in the slots, each once for all the query heads that share
them. The surprising thing: how the work is cut is decided on the device, from the lengths that are
there when the kernel runs: a launch has a fixed number of programs, and shares them out so that
each gets about as many keys, one long sequence or many short ones. So a captured launch serves all
lengths, and costs what the rows have, not what is allocated.

Letters: R rows, H query and K key/value heads, G = H/K, E head size (padded to a power of two in
registers), P slots, T positions.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from llama.cuda.launch import (
    allow,
    capability,
    fetch,
    launch,
    multiprocessors_and_memory,
    overlap,
    wait,
)
from llama.cuda.products.epilogues import arranged_place
from llama.cuda.tuning import decode_attention_blocks, fitted_attention, power_of_two


@triton.jit
def _share_out(lengths, rows, R_PAD: tl.constexpr, PROGRAMS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001,ANN202
    """The row of this program, its part of that row, the row's first program, how many parts the
    row has, the keys of a part and of the row. A program without work gets row `rows`."""
    i = tl.arange(0, R_PAD)
    has = tl.load(lengths + i, mask=i < rows, other=0).to(tl.int32)
    fair = tl.cdiv(tl.sum(has, 0), PROGRAMS)
    keys = tl.maximum(tl.cdiv(fair, BLOCK), 1) * BLOCK
    parts = tl.cdiv(has, keys)
    ends = tl.cumsum(parts, 0)
    me = tl.program_id(0)
    row = tl.sum((ends <= me).to(tl.int32), 0)
    mine = i == row
    count = tl.sum(tl.where(mine, parts, 0), 0)
    begin = tl.sum(tl.where(mine, ends - parts, 0), 0)
    length = tl.sum(tl.where(mine, has, 0), 0)
    return tl.minimum(row, rows), me - begin, begin, count, keys, length


@triton.jit
def _within(some, e, E: tl.constexpr, E_PAD: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001,ANN202
    """Of (rows, heads' numbers): `some` rows, and of E_PAD numbers those that a head has."""
    if E_PAD > E:
        return some[:, None] & (e < E)[None, :]
    else:
        return some[:, None]


@triton.jit(do_not_specialize=["rows"])
def _attend(  # type: ignore[no-untyped-def]  # noqa: ANN202
    q, q_row, k, v, slots, lengths, out, sums, tops, arrived, rows, T, scale,  # noqa: ANN001
    KV_HEADS: tl.constexpr, G: tl.constexpr, E: tl.constexpr, G_PAD: tl.constexpr,
    E_PAD: tl.constexpr, R_PAD: tl.constexpr, PROGRAMS: tl.constexpr, BLOCK: tl.constexpr,
    STAGES: tl.constexpr, AHEAD: tl.constexpr, LINES: tl.constexpr, ARRANGED: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """One key head of one part of one row; the last part to come joins them, in their order."""
    allow(OVERLAP)
    row, part, begin, parts, keys, length = _share_out(lengths, rows, R_PAD, PROGRAMS, BLOCK)
    head = tl.program_id(1)
    g, e = tl.arange(0, G_PAD), tl.arange(0, E_PAD)
    slot = tl.load(slots + tl.minimum(row, rows - 1)).to(tl.int64)
    base = (tl.maximum(slot, 0) * T * KV_HEADS + head) * E
    first = part * keys
    if row < rows:  # what earlier steps cached is there already; the newest key is not
        soon = tl.minimum(first + tl.arange(0, AHEAD), length - 1).to(tl.int64)
        fetch(k + base + soon[:, None] * (KV_HEADS * E), E, LINES, OVERLAP)
        fetch(v + base + soon[:, None] * (KV_HEADS * E), E, LINES, OVERLAP)
    wait(OVERLAP)
    if row == rows:
        return
    mine = q + row.to(tl.int64) * q_row + head * (G * E)
    asked = tl.load(mine + g[:, None] * E + e[None, :], mask=_within(g < G, e, E, E_PAD), other=0.0)
    top = tl.full((G_PAD,), float("-inf"), tl.float32)
    weight = tl.zeros((G_PAD,), tl.float32)
    mixed = tl.zeros((G_PAD, E_PAD), tl.float32)
    for start in tl.range(first, tl.minimum(first + keys, length), BLOCK, num_stages=STAGES):
        t = start + tl.arange(0, BLOCK)
        at = base + t.to(tl.int64)[:, None] * (KV_HEADS * E) + e[None, :]
        known = tl.load(k + at, mask=_within(t < length, e, E, E_PAD), other=0.0)  # (BLOCK, E)
        score = tl.dot(asked, tl.trans(known), input_precision="ieee") * scale  # in log2
        score = tl.where((t < length)[None, :], score, float("-inf"))
        higher = tl.maximum(top, tl.max(score, 1))
        share = tl.exp2(score - higher[:, None])
        fade = tl.exp2(top - higher)
        value = tl.load(v + at, mask=_within(t < length, e, E, E_PAD), other=0.0)
        weight = weight * fade + tl.sum(share, 1)
        mixed = tl.dot(share.to(value.dtype), value, mixed * fade[:, None], input_precision="ieee")
        top = higher
    if parts > 1:
        cell = g[:, None] * E + e[None, :]
        own = (begin + part) * KV_HEADS + head
        tl.store(sums + own.to(tl.int64) * (G * E) + cell, mixed, mask=_within(g < G, e, E, E_PAD))
        tl.store(tops + own * (2 * G) + g, top, mask=g < G)
        tl.store(tops + own * (2 * G) + G + g, weight, mask=g < G)
        tl.debug_barrier()
        counter = arrived + row * KV_HEADS + head
        if tl.atomic_add(counter, 1, sem="acq_rel") < parts - 1:
            return
        tl.store(counter, 0)
        top = tl.full((G_PAD,), float("-inf"), tl.float32)
        weight = tl.zeros((G_PAD,), tl.float32)
        mixed = tl.zeros((G_PAD, E_PAD), tl.float32)
        for i in tl.range(0, parts, num_stages=STAGES):
            other = (begin + i) * KV_HEADS + head
            its_top = tl.load(tops + other * (2 * G) + g, mask=g < G, other=0.0,
                              cache_modifier=".cg")  # fmt: skip
            its_weight = tl.load(tops + other * (2 * G) + G + g, mask=g < G, other=1.0,
                                 cache_modifier=".cg")  # fmt: skip
            its_sum = tl.load(sums + other.to(tl.int64) * (G * E) + cell,
                              mask=_within(g < G, e, E, E_PAD), other=0.0,
                              cache_modifier=".cg")  # fmt: skip
            higher = tl.maximum(top, its_top)
            fade, gain = tl.exp2(top - higher), tl.exp2(its_top - higher)
            weight = weight * fade + its_weight * gain
            mixed = mixed * fade[:, None] + its_sum * gain[:, None]
            top = higher
    result = (mixed / weight[:, None]).to(out.dtype.element_ty)
    place = head * (G * E) + g[:, None] * E + e[None, :]
    if ARRANGED:
        place = arranged_place(place)
    tl.store(
        out + row.to(tl.int64) * (KV_HEADS * G * E) + place,
        result,
        mask=_within(g < G, e, E, E_PAD),
    )


class DecodeAttention:
    """Launches the kernel for up to `max_rows` rows, and holds the scratch of split rows."""

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
        self.sums = torch.empty(most * heads * head_dim, device=device)
        self.tops = torch.empty(most * heads * 2, device=device)
        self.arrived = torch.zeros(max_rows * kv_heads, dtype=torch.int32, device=device)

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
        """q (R, H, E) over the first lengths[r] keys of slots[r] in k and v, a layer's (P, T, K,
        E), into out (R, H, E), which is returned. slots and lengths (R,) are integers, and were not
        written by the kernel launched before this one; a row of length 0 reads nothing, and its
        output is left as it was. `long` says whether to be quick with many keys or with few;
        `arranged`, that the numbers of a row lie as epilogues.arranged_place says, of which there
        must be a multiple of 64."""
        rows, heads, size = q.shape
        assert q.stride()[1:] == (size, 1), q.stride()
        assert out.is_contiguous(), out.stride()
        longest, kv_heads = k.shape[1:3]
        groups, itemsize = heads // kv_heads, k.element_size()
        programs, block, stages, warps, ahead = fitted_attention(
            decode_attention_blocks(rows, kv_heads, long), groups, size, itemsize, *self.limits
        )
        launch(_attend, (programs + rows, kv_heads))(
            q, q.stride(0), k, v, slots, lengths, out,
            self.sums, self.tops, self.arrived, rows, longest,
            size**-0.5 * 1.4426950408889634,  # times log2(e): scores are exponents of 2
            KV_HEADS=kv_heads, G=groups, E=size, G_PAD=max(16, power_of_two(groups)),
            E_PAD=power_of_two(size), R_PAD=self.most_rows, PROGRAMS=programs, BLOCK=block,
            STAGES=stages, AHEAD=ahead, LINES=-(-size * itemsize // 128) * 128, ARRANGED=arranged,
            num_warps=warps, **self.extra,
        )  # fmt: skip
        return out
