"""Products of a few rows with a weight, at the speed at which the weight can be read.

Two kernels, one template: `_one_row` multiplies and adds in float32, each program a few outputs;
`_some_rows` gives tiles of the weight to the tensor cores, whose smallest tile has room for 8
or 16 rows. Both read each weight once, and share what comes before and after the product: the norm
of the input, and an epilogue that adds a residual, gates by SiLU, or rotates queries and keys and
stores them. Knows no layers. The surprising thing: pairs (rotary, or w1 beside w3) are neighbours
in a tile, so that one epilogue serves both; `output_row` says which weight row that is.

Letters: R rows, N outputs, K inputs; RP is R padded for the tensor cores.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from llama.cuda.launch import allow, overlap
from llama.cuda.tiles import tile_by_group, tile_by_row
from llama.cuda.tuning import Blocks, ByWords, OneRow, SomeRows, product_blocks
from llama.cuda.weights import (
    FP8,
    INT4,
    INT8,
    PLAIN,
    Weight,
    by_number,
    by_row,
    kind_of,
    output_row,
    source,
)
from llama.cuda.words import tile_of_words

STORE, ADD, GATE, ROTATE = (tl.constexpr(i) for i in range(4))


@dataclass(frozen=True)
class Rotation:
    """Where the joined product of wq, wk and wv goes: `q` (R, H, E), and a layer of the cache.

    cos and sin (R, E/2) float32; slots and positions (R,), integers, say where keys and values of
    each row belong, slot -1: nowhere. k and v are a layer's (P, T, K, E).
    """

    cos: Tensor
    sin: Tensor
    slots: Tensor
    positions: Tensor
    k: Tensor
    v: Tensor


@triton.jit
def _finish(  # type: ignore[no-untyped-def]  # noqa: ANN202
    y, first, r, rows, n_outputs, out, cos, sin, slots, positions, k, v,  # noqa: ANN001
    EPILOGUE: tl.constexpr, BLOCK_N: tl.constexpr, RP: tl.constexpr,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, E: tl.constexpr, T,  # noqa: ANN001
):  # fmt: skip
    """What becomes of a tile y (BLOCK_N, RP) of outputs `first` and on, of rows r (RP,)."""
    if EPILOGUE == STORE or EPILOGUE == ADD:  # noqa: SIM109 (Triton)
        n = first + tl.arange(0, BLOCK_N)
        at = out + r[None, :].to(tl.int64) * n_outputs + n[:, None]
        there = (n < n_outputs)[:, None] & (r < rows)[None, :]
        if EPILOGUE == ADD:
            y += tl.load(at, mask=there, other=0.0).to(tl.float32)
        tl.store(at, y.to(out.dtype.element_ty), mask=there)
    else:
        pairs = tl.permute(tl.reshape(y, (BLOCK_N // 2, 2, RP)), (0, 2, 1))
        a, b = tl.split(pairs)  # (BLOCK_N / 2, RP) each
        p = first // 2 + tl.arange(0, BLOCK_N // 2)
        there = (p < n_outputs // 2)[:, None] & (r < rows)[None, :]
        if EPILOGUE == GATE:
            gated = a / (1.0 + tl.exp(-a)) * b
            at = out + r[None, :].to(tl.int64) * (n_outputs // 2) + p[:, None]
            tl.store(at, gated.to(out.dtype.element_ty), mask=there)
        else:
            turned = there & (p < (HEADS + KV_HEADS) * (E // 2))[:, None]
            angle = r[None, :] * (E // 2) + (p % (E // 2))[:, None]
            c = tl.load(cos + angle, mask=turned, other=1.0)
            s = tl.load(sin + angle, mask=turned, other=0.0)
            low, high = (a * c - b * s), (a * s + b * c)
            n = 2 * p[:, None]
            is_q = there & (n < HEADS * E)
            at = out + r[None, :].to(tl.int64) * (HEADS * E) + n
            tl.store(at, low.to(out.dtype.element_ty), mask=is_q)
            tl.store(at + 1, high.to(out.dtype.element_ty), mask=is_q)
            slot = tl.load(slots + r, mask=r < rows, other=-1)
            position = tl.load(positions + r, mask=r < rows, other=0)
            kept = there & ((slot >= 0) & (position < T))[None, :]
            base = (slot.to(tl.int64) * T + position) * (KV_HEADS * E)
            is_k = kept & (n >= HEADS * E) & (n < (HEADS + KV_HEADS) * E)
            at = k + base[None, :] + (n - HEADS * E)
            tl.store(at, low.to(k.dtype.element_ty), mask=is_k)
            tl.store(at + 1, high.to(k.dtype.element_ty), mask=is_k)
            is_v = kept & (n >= (HEADS + KV_HEADS) * E)
            at = v + base[None, :] + (n - (HEADS + KV_HEADS) * E)
            tl.store(at, low.to(v.dtype.element_ty), mask=is_v)
            tl.store(at + 1, high.to(v.dtype.element_ty), mask=is_v)


@triton.jit
def _one_row(  # type: ignore[no-untyped-def]  # noqa: ANN202
    x, w, scale, gain, eps, n_outputs, out, cos, sin, slots, positions, k, v, T,  # noqa: ANN001
    K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, NORM: tl.constexpr,
    KIND: tl.constexpr, EPILOGUE: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr,
    E: tl.constexpr, AHEAD: tl.constexpr, LATE: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """BLOCK_N outputs of one row: small programs, as many as the chip can hold at a time, each with
    the next tiles of its weights on their way; one sum across its threads, at the end.

    The norm needs no pass of its own: its factor is a number, found beside the product. The loop is
    not unrolled: code is read from memory too, and the kernels of a layer drive it out of caches.
    """
    if not LATE:
        allow(OVERLAP)
    j = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    n, real = output_row(j, n_outputs, EPILOGUE == GATE).to(tl.int64), j < n_outputs
    if KIND == PLAIN:
        y, squares = by_number(x, w, gain, n, real, K, BLOCK_N, BLOCK_K, NORM, AHEAD, OVERLAP)
    else:
        y, squares = by_row(x, w, gain, n, real, K, BLOCK_N, BLOCK_K, NORM, OVERLAP)
    if LATE:
        allow(OVERLAP)
    if KIND != PLAIN:
        y *= tl.load(scale + n, mask=real, other=0.0)
    if NORM:
        y *= tl.rsqrt(squares / K + eps)
    _finish(
        y[:, None], tl.program_id(0) * BLOCK_N, tl.arange(0, 1), 1, n_outputs, out, cos, sin, slots,
        positions, k, v, EPILOGUE, BLOCK_N, 1, HEADS, KV_HEADS, E, T,
    )  # fmt: skip


@triton.jit
def _some_rows(  # type: ignore[no-untyped-def]  # noqa: ANN202
    x, w, scale, rows, n_outputs, out, partial, arrived, cos, sin, slots, positions, k, v, T,  # noqa: ANN001
    K: tl.constexpr, RP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    WORDS: tl.constexpr, KIND: tl.constexpr, GROUP: tl.constexpr, SINGLE: tl.constexpr,
    SPLIT: tl.constexpr, STAGES: tl.constexpr, WARPS: tl.constexpr, APART: tl.constexpr,
    LATE: tl.constexpr, EPILOGUE: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr,
    E: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """BLOCK_N outputs of RP rows over a SPLIT-th of the inputs; the last one to come adds up.

    The sum over splits is made in their order, whoever comes last, so it is always the same.
    """
    if not LATE:
        allow(OVERLAP)
    first, part = tl.program_id(0) * BLOCK_N, tl.program_id(1)
    j = first + tl.arange(0, BLOCK_N)
    r = tl.arange(0, RP)
    n = output_row(j, n_outputs, EPILOGUE == GATE).to(tl.int64)
    SPAN: tl.constexpr = (K + BLOCK_K * SPLIT - 1) // (BLOCK_K * SPLIT) * BLOCK_K
    begin = part * SPAN
    end = min(begin + SPAN, K)
    if WORDS:
        y = tile_of_words(
            x, w, scale, rows, n_outputs, first, begin, end, K, RP, BLOCK_N, BLOCK_K, KIND, GROUP,
            EPILOGUE == GATE, SINGLE, WARPS, APART, OVERLAP,
        )  # fmt: skip
    elif KIND == INT4:
        y = tile_by_group(
            x, w, scale, r, rows, n, (j < n_outputs)[:, None], begin, end, K, RP, BLOCK_N, BLOCK_K,
            GROUP, STAGES, OVERLAP,
        )  # fmt: skip
    else:
        y = tile_by_row(
            x, w, r, rows, n, (j < n_outputs)[:, None], begin, end, K, RP, BLOCK_N, BLOCK_K, STAGES,
            OVERLAP,
        )  # fmt: skip
    if LATE:
        allow(OVERLAP)
    last = True
    if SPLIT > 1:
        cell = tl.arange(0, BLOCK_N)[:, None] * RP + r[None, :]
        mine = partial + (tl.program_id(0) * SPLIT + part).to(tl.int64) * (BLOCK_N * RP)
        tl.store(mine + cell, y)
        tl.debug_barrier()
        last = tl.atomic_add(arrived + tl.program_id(0), 1, sem="acq_rel") == SPLIT - 1
        if last:
            tl.store(arrived + tl.program_id(0), 0)
            y = tl.zeros((BLOCK_N, RP), tl.float32)
            theirs = partial + (tl.program_id(0) * SPLIT).to(tl.int64) * (BLOCK_N * RP)
            for i in tl.static_range(SPLIT):
                y += tl.load(theirs + i * (BLOCK_N * RP) + cell, cache_modifier=".cg")
    if last:
        if KIND == INT8 or KIND == FP8:  # noqa: SIM109 (Triton)
            y *= tl.load(scale + n, mask=j < n_outputs, other=0.0)[:, None]
        _finish(
            y, first, r, rows, n_outputs, out, cos, sin, slots, positions, k, v,
            EPILOGUE, BLOCK_N, RP, HEADS, KV_HEADS, E, T,
        )  # fmt: skip


class Products:
    """Launches the products of one device, and holds the scratch of those that are split."""

    def __init__(self, device: torch.device) -> None:
        self.extra = overlap(device)
        self.partial = torch.empty(0, device=device)
        self.arrived = torch.zeros(0, dtype=torch.int32, device=device)

    def __call__(
        self,
        x: Tensor,
        weight: Weight,
        out: Tensor,
        epilogue: tl.constexpr = STORE,
        *,
        norm: tuple[Tensor, float] | None = None,
        rotation: Rotation | None = None,
        blocks: Blocks | None = None,
    ) -> Tensor:
        """x (R, K) times weight (N, K), and the epilogue, into `out`, which is returned.

        STORE: out (R, N), of any float dtype. ADD: added to out (R, N). GATE: the weight is w1 over
        w3, out (R, N / 2) is silu(w1 x) * w3 x. ROTATE: the weight is wq over wk over wv, out (R,
        H, E) are the rotated queries, and `rotation` says where keys and values go. `norm` (weight,
        eps) is that of x, for a single row. Packed weights are read as they are. `blocks` overrules
        the table of tuning.py.
        """
        rows, inputs = x.shape
        outputs = weight.shape[0]
        heads, kv_heads, size, longest = 0, 0, 2, 0
        where = (x,) * 6
        if rotation is not None:
            longest, kv_heads, size = rotation.k.shape[1:]
            heads = outputs // size - 2 * kv_heads
            where = (rotation.cos, rotation.sin, rotation.slots, rotation.positions, rotation.k,
                     rotation.v)  # fmt: skip
        read, kind = source(weight), kind_of(weight)
        shape = dict(EPILOGUE=epilogue, HEADS=heads, KV_HEADS=kv_heads, E=size, **self.extra)
        blocks = blocks or product_blocks(rows, outputs, inputs, kind)
        if isinstance(blocks, OneRow):
            assert rows == 1, rows
            assert not kind or (kind != "int4" and blocks.ahead == 1), (kind, blocks)
            words = kind == "int8" and inputs % 8 == 0
            gain, eps = norm or (x, 0.0)
            _one_row[(triton.cdiv(outputs, blocks.block_n),)](
                x, read.weight.view(torch.int32) if words else read.weight, read.scale, gain, eps,
                outputs, out, *where, longest,
                K=inputs, BLOCK_N=blocks.block_n, BLOCK_K=blocks.block_k, AHEAD=blocks.ahead,
                NORM=norm is not None, KIND=read.kind, LATE=blocks.late, num_warps=blocks.warps,
                **shape,
            )  # fmt: skip
            return out
        assert norm is None, "only the float32 product of a single row norms it"
        words = isinstance(blocks, ByWords)
        tiles = self.reserve(outputs, blocks)
        _some_rows[(tiles, blocks.split)](
            x, read.weight.view(torch.int32) if words else read.weight, read.scale, rows, outputs,
            out, self.partial, self.arrived, *where, longest,
            K=inputs, RP=blocks.padded, BLOCK_N=blocks.block_n, BLOCK_K=blocks.block_k, WORDS=words,
            KIND=read.kind, GROUP=read.group, SINGLE=rows == 1, SPLIT=blocks.split,
            STAGES=0 if isinstance(blocks, ByWords) else blocks.stages, WARPS=blocks.warps,
            APART=isinstance(blocks, ByWords) and blocks.apart, LATE=blocks.late,
            num_warps=blocks.warps, **shape,
        )  # fmt: skip
        return out

    def reserve(self, outputs: int, blocks: SomeRows | ByWords) -> int:
        """Have scratch for such a product; the tiles that it has. A captured product keeps the
        addresses it was given, so what is captured must be reserved before."""
        tiles = -(-outputs // blocks.block_n)
        numbers = tiles * blocks.split * blocks.block_n * blocks.padded if blocks.split > 1 else 0
        if self.partial.numel() < numbers:
            self.partial = self.partial.new_empty(numbers)
        if self.arrived.numel() < tiles:
            self.arrived = self.arrived.new_zeros(tiles)
        return tiles
