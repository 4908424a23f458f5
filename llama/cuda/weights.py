"""How a product reads its weight: as plain numbers, or packed in one of the ways of packed.py.

Loops for a single row, and rows of a table; tiles.py has those of more rows, and products.py the
epilogues. The surprising thing: an
int4 is made a float without being converted. Its four bits become the first ones of a float's
fraction, which then says q + 16, or q + 256 one nibble lower, and the sum that begins at minus what
that adds is right again; so a word of eight numbers costs four shifts and eight masks.

Letters: N outputs, K inputs, G of a group; A runs of a row's bytes, of which a thread has one each.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from llama.checkpoint.packed import Packed
from llama.cuda import launch
from llama.cuda.launch import wait

Weight = Tensor | Packed
PLAIN, INT8, FP8, INT4 = (tl.constexpr(i) for i in range(4))
INTERPRETED = tl.constexpr(launch.INTERPRETED)  # which has no inline assembly
_KINDS = {"int8": INT8, "fp8": FP8, "int4": INT4}


class Source(NamedTuple):
    """A weight as kernels get it."""

    weight: Tensor
    scale: Tensor
    offset: Tensor
    kind: tl.constexpr
    group: int


def kind_of(weight: Weight) -> str:
    """Its name in the tables of tuning.py: "" of plain numbers."""
    return weight.format.kind if isinstance(weight, Packed) else ""


def source(weight: Weight) -> Source:
    if isinstance(weight, Tensor):
        return Source(weight, weight, weight, PLAIN, 0)
    format = weight.format
    offset = weight.scale if weight.offset is None else weight.offset
    return Source(weight.weight, weight.scale, offset, _KINDS[format.kind], format.group)


@triton.jit
def inside(c, start, K: tl.constexpr, BLOCK_K: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001,ANN201
    """Which columns of a tile that begins at `start` are in the row: one answer, or one each."""
    if K % BLOCK_K == 0:
        return start + tl.zeros_like(c) < K
    return start + c < K


@triton.jit
def there(real, c, start, K: tl.constexpr, BLOCK_K: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001,ANN201
    """The mask of a tile of weights: its rows and its columns."""
    return real & inside(c, start, K, BLOCK_K)[None, :]


# ---- one row


@triton.jit
def by_number(  # type: ignore[no-untyped-def]  # noqa: ANN201
    x, w, gain, row, real, K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,  # noqa: ANN001
    NORM: tl.constexpr, AHEAD: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Products (BLOCK_N,) of rows `row` of plain weights and x, and the sum of the squares of x."""
    c = tl.arange(0, BLOCK_K)
    at = w + row[:, None] * K + c[None, :]
    real = real[:, None]
    WIDE: tl.constexpr = 128 // w.dtype.element_ty.primitive_bitwidth  # what a thread loads at once
    tile = tl.load(at, mask=there(real, c, 0, K, BLOCK_K), other=0.0)
    second = tile
    if AHEAD > 1:
        second = tl.load(at + BLOCK_K, mask=there(real, c, BLOCK_K, K, BLOCK_K), other=0.0)
    wait(OVERLAP)
    total = tl.zeros((BLOCK_N, BLOCK_K // WIDE), tl.float32)
    squares = tl.zeros((BLOCK_K // WIDE,), tl.float32)
    for start in tl.range(0, K, BLOCK_K):
        later = start + AHEAD * BLOCK_K
        after = tl.load(at + later, mask=there(real, c, later, K, BLOCK_K), other=0.0)
        here = inside(c, start, K, BLOCK_K)
        xs = tl.load(x + start + c, mask=here, other=0.0).to(tl.float32)
        if NORM:
            squares += tl.sum(tl.reshape(xs * xs, (BLOCK_K // WIDE, WIDE)), 1)
            xs *= tl.load(gain + start + c, mask=here, other=0.0).to(tl.float32)
        terms = tl.reshape(tile.to(tl.float32) * xs[None, :], (BLOCK_N, BLOCK_K // WIDE, WIDE))
        total += tl.sum(terms, 2)
        if AHEAD > 1:
            tile, second = second, after
        else:
            tile = after
    return tl.sum(total, 1), tl.sum(squares, 0)


@triton.jit
def _eight(x, gain, c, squares, start, K: tl.constexpr, BLOCK_K: tl.constexpr, NORM: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001,ANN202
    """Inputs c (A, 8) of a tile, times the norm's weight, and the sums of their squares."""
    here = inside(c, start, K, BLOCK_K)
    xs = tl.load(x + start + c, mask=here, other=0.0).to(tl.float32)
    if NORM:
        squares += tl.sum(xs * xs, 1)
        xs *= tl.load(gain + start + c, mask=here, other=0.0).to(tl.float32)
    return xs, squares


@triton.jit
def _halves(x, A: tl.constexpr, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001,ANN202
    """The first and the second half of each row of x (A, SIZE)."""
    return tl.split(tl.permute(tl.reshape(x, (A, 2, SIZE // 2)), (0, 2, 1)))


@triton.jit
def masked(x, MASK: tl.constexpr, ONES: tl.constexpr, TABLE: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001,ANN201
    """The float with the bits `x & MASK | ONES`, or ^ by TABLE 0x6A, in one instruction: the
    compiler takes two."""
    if INTERPRETED:
        bits = (x & MASK) | ONES if TABLE == 0xEA else (x & MASK) ^ ONES
    else:
        bits = tl.inline_asm_elementwise(
            "lop3.b32 $0, $1, $2, $3, $4;", "=r,r,r,r,n", [x, MASK, ONES, TABLE],
            dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    return bits.to(tl.float32, bitcast=True)


# ---- one row: int8 and fp8


@triton.jit
def _sum8(sums, tile, xs, A: tl.constexpr, BLOCK_N: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001,ANN202
    """Add eight numbers of each run times xs (A, 8): fp8 (A, BLOCK_N, 8), or words of int8 (A,
    BLOCK_N, 2), which become floats as nibbles do."""
    if tile.dtype == tl.int32:
        sums -= (384.0 * tl.sum(xs, 1))[:, None]
        first, second = tl.split(tile)
        x0, x1 = _halves(xs, A, 8)
        sums = _bytes(_bytes(sums, first, x0, A), second, x1, A)
    else:
        sums += tl.sum(tile.to(tl.float32) * xs[:, None, :], 2)
    return sums


@triton.jit
def _bytes(sums, word, xs, A: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001,ANN202
    """Add the four int8 of each word (A, BLOCK_N) times xs (A, 4)."""
    x01, x23 = _halves(xs, A, 4)
    x0, x1 = tl.split(x01)
    x2, x3 = tl.split(x23)
    sums += masked(word << 15, 0x7F8000, 0x43C00000, 0x6A) * x0[:, None]  # 384 + the number
    sums += masked(word << 7, 0x7F8000, 0x43C00000, 0x6A) * x1[:, None]
    sums += masked(word >> 1, 0x7F8000, 0x43C00000, 0x6A) * x2[:, None]
    return sums + masked(word >> 9, 0x7F8000, 0x43C00000, 0x6A) * x3[:, None]


@triton.jit
def by_row(  # type: ignore[no-untyped-def]  # noqa: ANN201
    x, w, gain, row, real, K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,  # noqa: ANN001
    NORM: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """`by_number` of fp8 or of words of four int8, not scaled."""
    A: tl.constexpr = BLOCK_K // 16
    EACH: tl.constexpr = w.dtype.element_ty.primitive_bitwidth // 8  # numbers of an element of w
    RUN: tl.constexpr = 16 // EACH
    a = tl.arange(0, A)[:, None]
    c = (a * RUN + tl.arange(0, RUN)[None, :])[:, None, :]
    at = w + row[None, :, None] * (K // EACH) + c
    real = real[None, :, None]
    tile = tl.load(at, mask=real & inside(c, 0, K // EACH, BLOCK_K // EACH), other=0.0)
    wait(OVERLAP)
    total = tl.zeros((A, BLOCK_N), tl.float32)
    squares = tl.zeros((A,), tl.float32)
    i = a * 16 + tl.arange(0, 8)[None, :]
    for start in tl.range(0, K, BLOCK_K):
        later = (start + BLOCK_K) // EACH
        here = real & inside(c, later, K // EACH, BLOCK_K // EACH)
        after = tl.load(at + later, mask=here, other=0.0)
        halves = tl.permute(tl.reshape(tile, (A, BLOCK_N, 2, RUN // 2)), (0, 1, 3, 2))
        left, right = tl.split(halves)  # (A, BLOCK_N, RUN / 2) each
        xs, squares = _eight(x, gain, i, squares, start, K, BLOCK_K, NORM)
        total = _sum8(total, left, xs, A, BLOCK_N)
        xs, squares = _eight(x, gain, i + 8, squares, start, K, BLOCK_K, NORM)
        total = _sum8(total, right, xs, A, BLOCK_N)
        tile = after
    return tl.sum(total, 0), tl.sum(squares, 0)


# ---- one row: int4


@triton.jit
def _byte(sums, shifted, low, high):  # type: ignore[no-untyped-def]  # noqa: ANN001,ANN202
    """Add a byte's two numbers times their inputs; its bits are 15 to 22 of `shifted`."""
    sums += masked(shifted, 0x78000, 0x43800000, 0xEA) * low[:, None]  # 256 + its low half
    return sums + masked(shifted, 0x780000, 0x41800000, 0xEA) * high[:, None]  # 16 + its high half


@triton.jit
def _word(sums, word, low, high, A: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001,ANN202
    """Add the eight numbers of each word (A, BLOCK_N) times low and high (A, 4)."""
    low01, low23 = _halves(low, A, 4)
    high01, high23 = _halves(high, A, 4)
    low0, low1 = tl.split(low01)
    high0, high1 = tl.split(high01)
    sums = _byte(sums, word << 15, low0, high0)
    sums = _byte(sums, word << 7, low1, high1)
    low2, low3 = tl.split(low23)
    high2, high3 = tl.split(high23)
    sums = _byte(sums, word >> 1, low2, high2)
    return _byte(sums, word >> 9, low3, high3)


@triton.jit
def _words(  # type: ignore[no-untyped-def]  # noqa: ANN202
    x, gain, pair, c, sums, plain, squares, start,  # noqa: ANN001
    K: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, A: tl.constexpr, NORM: tl.constexpr
):  # fmt: skip
    """Add two words of each run, (A, BLOCK_N, 2), to `sums`, and their inputs to `plain` (A,)."""
    low, squares = _eight(x, gain, c, squares, start, K, BLOCK_K, NORM)
    high, squares = _eight(x, gain, c + GROUP // 2, squares, start, K, BLOCK_K, NORM)
    lows, highs = tl.sum(low, 1), tl.sum(high, 1)
    plain += lows + highs
    sums -= (256.0 * lows + 16.0 * highs)[:, None]
    first, second = tl.split(pair)
    low0, low1 = _halves(low, A, 8)
    high0, high1 = _halves(high, A, 8)
    sums = _word(sums, first, low0, high0, A)
    return _word(sums, second, low1, high1, A), plain, squares


@triton.jit
def by_group(  # type: ignore[no-untyped-def]  # noqa: ANN201
    x, w, scale, offset, gain, row, real, K: tl.constexpr, BLOCK_N: tl.constexpr,  # noqa: ANN001
    BLOCK_K: tl.constexpr, GROUP: tl.constexpr, NORM: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """`by_number` of int4; w holds words of four bytes. A run of bytes is in one group, so a
    thread's numbers share their scale, which comes one tile ahead as they do."""
    RUN: tl.constexpr = 16 if GROUP > 16 else 8
    A: tl.constexpr = BLOCK_K // (2 * RUN)
    a = tl.arange(0, A)
    words = (a[:, None] * (RUN // 4) + tl.arange(0, RUN // 4)[None, :])[:, None, :]
    at = w + row[None, :, None] * (K // 8) + words
    group = (a // (GROUP // 2 // RUN))[:, None] + row[None, :] * (K // GROUP)
    real3, real = real[None, :, None], real[None, :]
    run = a[:, None] * (2 * RUN)
    tile = tl.load(at, mask=real3 & inside(words, 0, K // 8, BLOCK_K // 8), other=0)
    here = real & inside(run, 0, K, BLOCK_K)
    s = tl.load(scale + group, mask=here, other=0.0)
    o = tl.load(offset + group, mask=here, other=0.0)
    wait(OVERLAP)
    total = tl.zeros((A, BLOCK_N), tl.float32)
    squares = tl.zeros((A,), tl.float32)
    byte = a[:, None] * RUN + tl.arange(0, 8)[None, :]
    c = byte // (GROUP // 2) * GROUP + byte % (GROUP // 2)  # the input of its low nibble
    for start in tl.range(0, K, BLOCK_K):
        later = start + BLOCK_K
        here = real3 & inside(words, later // 8, K // 8, BLOCK_K // 8)
        after = tl.load(at + later // 8, mask=here, other=0)
        here = real & inside(run, later, K, BLOCK_K)
        s_after = tl.load(scale + group + later // GROUP, mask=here, other=0.0)
        o_after = tl.load(offset + group + later // GROUP, mask=here, other=0.0)
        sums = tl.zeros((A, BLOCK_N), tl.float32)
        plain = tl.zeros((A,), tl.float32)
        if RUN == 8:
            sums, plain, squares = _words(
                x, gain, tile, c, sums, plain, squares, start, K, BLOCK_K, GROUP, A, NORM
            )
        else:
            pairs = tl.permute(tl.reshape(tile, (A, BLOCK_N, 2, 2)), (0, 1, 3, 2))
            left, right = tl.split(pairs)
            sums, plain, squares = _words(
                x, gain, left, c, sums, plain, squares, start, K, BLOCK_K, GROUP, A, NORM
            )
            sums, plain, squares = _words(
                x, gain, right, c + 8, sums, plain, squares, start, K, BLOCK_K, GROUP, A, NORM
            )
        total += sums * s.to(tl.float32) + plain[:, None] * o.to(tl.float32)
        tile, s, o = after, s_after, o_after
    return tl.sum(total, 0), tl.sum(squares, 0)


# ---- a table


@triton.jit
def table_row(  # type: ignore[no-untyped-def]  # noqa: ANN201
    table, scale, offset, row, d, D: tl.constexpr, KIND: tl.constexpr, GROUP: tl.constexpr  # noqa: ANN001
):  # fmt: skip
    """Numbers d of a table's row: plain ones in its dtype, packed ones in float32."""
    if KIND == PLAIN:
        return tl.load(table + row * D + d, mask=d < D)
    elif KIND == INT4:
        HALF: tl.constexpr = GROUP // 2
        bytes = tl.load(table + (row * D // 2 + d // GROUP * HALF + d % HALF), mask=d < D, other=0)
        q = (bytes >> (d % GROUP // HALF * 4).to(tl.uint8)) & 15
        group = row * (D // GROUP) + d // GROUP
        s = tl.load(scale + group, mask=d < D, other=0.0).to(tl.float32)
        return q.to(tl.float32) * s + tl.load(offset + group, mask=d < D, other=0.0).to(tl.float32)
    else:
        return tl.load(table + row * D + d, mask=d < D, other=0.0).to(tl.float32) * tl.load(
            scale + row
        )
