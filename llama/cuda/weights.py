"""How a product reads its weight: as plain numbers, or packed in one of the ways of packed.py.

Loops for a single row, and rows of a table; words.py and tiles.py have those of more rows, and
products.py the epilogues. The surprising thing: an int8 is made a float without being converted.
Its bits become the last of a float's fraction, which then says 384 more, and the sum that begins at
minus what that adds is right again.

Letters: N outputs, K inputs, G of a group; A runs of a row's bytes, of which a thread has one each.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from llama.checkpoint.packed import Packed
from llama.cuda.launch import INTERPRETED as _INTERPRETED
from llama.cuda.launch import wait

Weight = Tensor | Packed
INTERPRETED = tl.constexpr(_INTERPRETED)  # which has no inline assembly
PLAIN, INT8, FP8, INT4 = (tl.constexpr(i) for i in range(4))
_KINDS = {"int8": INT8, "fp8": FP8, "int4": INT4}


class Source(NamedTuple):
    """A weight as kernels get it; scale: of each row, or the pairs of groups as words."""

    weight: Tensor
    scale: Tensor
    kind: tl.constexpr
    group: int


def kind_of(weight: Weight) -> str:
    """Its name in the tables of tuning.py: "" of plain numbers."""
    return weight.format.kind if isinstance(weight, Packed) else ""


def source(weight: Weight) -> Source:
    if isinstance(weight, Tensor):
        return Source(weight, weight, PLAIN, 0)
    scale, format = weight.scale, weight.format
    if weight.offset is not None:
        scale = pairs_of(weight).view(torch.int32)
        assert scale.data_ptr() == weight.scale.data_ptr(), "scale and offset lie apart"
    return Source(weight.weight, scale, _KINDS[format.kind], format.group)


def pairs_of(weight: Packed) -> Tensor:
    """Scale and offset of each group of int4, side by side: (N, K/G, 2), a view if they lie so."""
    scale, offset = weight.scale.detach(), weight.offset
    assert offset is not None, weight.format
    rows, groups = scale.shape
    beside = offset.data_ptr() == scale.data_ptr() + scale.itemsize
    if beside and scale.stride() == offset.stride() == (2 * groups, 2):
        return scale.as_strided((rows, groups, 2), (2 * groups, 2, 1))
    return torch.stack((scale, offset), -1)


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


@triton.jit
def output_row(j, n_outputs, PAIRED: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001,ANN201
    """The weight rows of outputs `j`: two halves (w1 and w3) take turns where they are PAIRED."""
    if PAIRED:
        return (j % 2) * (n_outputs // 2) + j // 2
    return j


@triton.jit
def scale_and_offset(pair):  # type: ignore[no-untyped-def]  # noqa: ANN001,ANN201
    """Of a group, in float32."""
    return (pair << 16).to(tl.float32, bitcast=True), (pair & -65536).to(tl.float32, bitcast=True)


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


# ---- one row: int8 and fp8


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
    """The same of fp8 or of words of four int8, not scaled."""
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


# ---- a table


@triton.jit
def table_row(  # type: ignore[no-untyped-def]  # noqa: ANN201
    table, scale, row, d, D: tl.constexpr, KIND: tl.constexpr, GROUP: tl.constexpr  # noqa: ANN001
):  # fmt: skip
    """Numbers d of a table's row: plain ones in its dtype, packed ones in float32."""
    if KIND == PLAIN:
        return tl.load(table + row * D + d, mask=d < D)
    elif KIND == INT4:
        HALF: tl.constexpr = GROUP // 2
        bytes = tl.load(table + (row * D // 2 + d // GROUP * HALF + d % HALF), mask=d < D, other=0)
        q = (bytes >> (d % GROUP // HALF * 4).to(tl.uint8)) & 15
        group = row * (D // GROUP) + d // GROUP
        s, o = scale_and_offset(tl.load(scale + group, mask=d < D, other=0))
        return q.to(tl.float32) * s + o
    else:
        return tl.load(table + row * D + d, mask=d < D, other=0.0).to(tl.float32) * tl.load(
            scale + row
        )
