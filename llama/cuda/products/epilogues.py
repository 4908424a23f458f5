"""What becomes of a tile of a product: stored, added, gated, or rotated and cached.

Knows where results go, and not how they came about. The surprising thing: pairs (rotary, or w1
beside w3) are neighbours in a tile, so that one function serves both; `output_row` says which row
of the weight that is. It serves kernels of Triton and of Gluon, which say where numbers lie: so
which outputs and rows a tile has comes with it, and not from ranges made here.

Letters: R rows, N outputs; RP is R padded for the tensor cores.
"""

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

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
def output_row(j, n_outputs, PAIRED: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001,ANN201
    """The weight rows of outputs `j`: two halves (w1 and w3) take turns where they are PAIRED."""
    if PAIRED:
        return (j % 2) * (n_outputs // 2) + j // 2
    return j


@triton.jit
def half_row(base, n, begin, n_outputs, BLOCK_N: tl.constexpr, H: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001,ANN201
    """`base` and the weight rows of outputs n of a tile, which has as many of each of H halves of
    the weight, from row `begin` of a half on; the last row for outputs that there are not."""
    j = tl.minimum(begin + n % (BLOCK_N // H), n_outputs // H - 1)
    return base + n // (BLOCK_N // H) * (n_outputs // H) + j


@triton.jit
def arranged_place(c):  # type: ignore[no-untyped-def]  # noqa: ANN001,ANN201
    """Where number c of a row goes that wide.py will read: within its sixty-four, bits h t t i j p
    become h i j t t p."""
    return c // 64 * 64 + (c & 33) + (c & 6) * 4 + (c & 24) // 4


@triton.jit
def pairs(x, BLOCK_N: tl.constexpr, RP: tl.constexpr, HALVES: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001,ANN201
    """Even and odd outputs of a tile, or its halves, (BLOCK_N / 2, RP) each."""
    if HALVES:
        pairs = tl.permute(tl.reshape(x, (2, BLOCK_N // 2, RP)), (1, 2, 0))
    else:
        pairs = tl.permute(tl.reshape(x, (BLOCK_N // 2, 2, RP)), (0, 2, 1))
    return tl.split(pairs)


@triton.jit
def numbered(  # type: ignore[no-untyped-def]  # noqa: ANN201
    cell, first, EPILOGUE: tl.constexpr, BLOCK_N: tl.constexpr, RP: tl.constexpr,  # noqa: ANN001
    HALVES: tl.constexpr,
):  # fmt: skip
    """n and r of `finish`, of a tile in which a number that is output i of row r says i RP + r."""
    if EPILOGUE == GATE or EPILOGUE == ROTATE:  # noqa: SIM109 (Triton)
        cell, _ = pairs(cell, BLOCK_N, RP, HALVES)
        n = first // 2 + cell // ((1 if HALVES else 2) * RP)
    else:
        n = first + cell // RP
    return n, cell % RP


@triton.jit
def store(y, n, r, rows, n_outputs, out, ADDED: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001,ANN201
    """Outputs n of rows r, to (R, N); ADDED to what is there."""
    at = out + r.to(tl.int64) * n_outputs + n
    there = (n < n_outputs) & (r < rows)
    if ADDED:
        y += tl.load(at, mask=there, other=0.0).to(tl.float32)
    tl.store(at, y.to(out.dtype.element_ty), mask=there)


@triton.jit
def gate(a, b, n, r, rows, n_outputs, out, ARRANGED: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001,ANN201
    """silu(a) * b of pairs n of rows r, to (R, N / 2); ARRANGED: where `arranged_place` says."""
    gated = a / (1.0 + tl.exp(-a)) * b
    place = arranged_place(n) if ARRANGED else n
    at = out + r.to(tl.int64) * (n_outputs // 2) + place
    tl.store(at, gated.to(out.dtype.element_ty), mask=(n < n_outputs // 2) & (r < rows))


@triton.jit
def finish(  # type: ignore[no-untyped-def]  # noqa: ANN201
    y, n, r, rows, n_outputs, out, cos, sin, slots, positions, k, v, T,  # noqa: ANN001
    EPILOGUE: tl.constexpr, BLOCK_N: tl.constexpr, RP: tl.constexpr, HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr, E: tl.constexpr, HALVES: tl.constexpr = False,
):  # fmt: skip
    """What becomes of a tile y (BLOCK_N, RP) of outputs n of rows r, where GATE and ROTATE take
    pairs: of pairs n. HALVES: the pairs are its upper and its lower half."""
    if EPILOGUE == STORE or EPILOGUE == ADD:  # noqa: SIM109 (Triton)
        store(y, n, r, rows, n_outputs, out, EPILOGUE == ADD)
    else:
        a, b = pairs(y, BLOCK_N, RP, HALVES)
        if EPILOGUE == GATE:
            gate(a, b, n, r, rows, n_outputs, out, False)
        else:
            there = (n < n_outputs // 2) & (r < rows)
            turned = there & (n < (HEADS + KV_HEADS) * (E // 2))
            angle = r * (E // 2) + n % (E // 2)
            c = tl.load(cos + angle, mask=turned, other=1.0)
            s = tl.load(sin + angle, mask=turned, other=0.0)
            low, high = (a * c - b * s), (a * s + b * c)
            n *= 2
            is_q = there & (n < HEADS * E)
            at = out + r.to(tl.int64) * (HEADS * E) + n
            tl.store(at, low.to(out.dtype.element_ty), mask=is_q)
            tl.store(at + 1, high.to(out.dtype.element_ty), mask=is_q)
            slot = tl.load(slots + r, mask=r < rows, other=-1)
            position = tl.load(positions + r, mask=r < rows, other=0)
            kept = there & (slot >= 0) & (position < T)
            base = (slot.to(tl.int64) * T + position) * (KV_HEADS * E)
            is_k = kept & (n >= HEADS * E) & (n < (HEADS + KV_HEADS) * E)
            at = k + base + (n - HEADS * E)
            tl.store(at, low.to(k.dtype.element_ty), mask=is_k)
            tl.store(at + 1, high.to(k.dtype.element_ty), mask=is_k)
            is_v = kept & (n >= (HEADS + KV_HEADS) * E)
            at = v + base + (n - (HEADS + KV_HEADS) * E)
            tl.store(at, low.to(v.dtype.element_ty), mask=is_v)
            tl.store(at + 1, high.to(v.dtype.element_ty), mask=is_v)
