"""Products of a few rows on the tensor cores, of weights as they lie: plain, int8, fp8 or int4.

This kernel serves where neither gemv.py nor gemm_sm90.py does: a few rows with plain weights, any
rows in float32, other GPUs than Hopper. It leaves the pipeline of its loads to Triton. The
surprising thing: the halves of int4's bytes are two tiles, each multiplied by the inputs that are
its own, so no tile is put in order.

Letters: N outputs, K inputs, RP rows as the tensor cores see them, G inputs of a group of int4.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from llama.cuda.launch import allow, wait
from llama.cuda.products.epilogues import GATE, ROTATE, finish, output_row
from llama.cuda.weights import FP8, INT4, INT8, scale_and_offset


class _Tile(NamedTuple):
    """What a program multiplies."""

    n: Any  # (BLOCK_N,) rows of the weight
    real: Any  # (BLOCK_N, 1) whether there are such outputs
    r: Any  # (RP,) rows of the inputs
    rows: Any  # of which there are so many
    begin: Any  # the first one of its inputs
    end: Any  # and the one behind the last


@triton.jit
def _inside(c, start, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """Which columns of a tile that begins at `start` are in the row: one answer, or one each."""
    if K % BLOCK_K == 0:
        return start + tl.zeros_like(c) < K
    return start + c < K


@triton.jit
def _load_scales(pairs, tile, begin, K: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr):
    """Scales and offsets (BLOCK_N, BLOCK_K / G) of a K block of int4 that starts at `begin`."""
    g = tl.arange(0, BLOCK_K // GROUP)
    here = tile.real & _inside(g, begin // GROUP, K // GROUP, BLOCK_K // GROUP)[None, :]
    at = pairs + (tile.n[:, None] * (K // GROUP) + begin // GROUP + g[None, :])
    return scale_and_offset(tl.load(at, mask=here, other=0))


@triton.jit
def _spread(x, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr):
    """A number of each group, (BLOCK_N, BLOCK_K / G), for each byte, (BLOCK_N, BLOCK_K / 2)."""
    each = tl.broadcast_to(x[:, :, None], (BLOCK_N, BLOCK_K // GROUP, GROUP // 2))
    return tl.reshape(each, (BLOCK_N, BLOCK_K // 2))


@triton.jit
def _dequantize_nibbles(packed, s, o):
    """The numbers of the low and of the high halves of bytes, in float32."""
    bits = packed.to(tl.int32)
    o -= 16.0 * s  # a nibble as the first bits of a float's fraction says 16 + q
    low = ((bits << 19) & 0x780000 | 0x41800000).to(tl.float32, bitcast=True)
    high = ((bits << 15) & 0x780000 | 0x41800000).to(tl.float32, bitcast=True)
    return low * s + o, high * s + o


@triton.jit
def _load_inputs(x, tile, c, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """Inputs c of the tile's rows: (len(c), RP)."""
    here = (tile.r < tile.rows)[None, :]
    if K % BLOCK_K:
        here = here & (c < K)[:, None]
    return tl.load(x + tile.r[None, :] * K + c[:, None], mask=here, other=0.0)


@triton.jit
def _multiply(x, w, tile, K: tl.constexpr, BLOCKS: tl.constexpr, OVERLAP: tl.constexpr):
    """The product (BLOCK_N, RP) of a tile's inputs with plain weights, or with unscaled ones."""
    BLOCK_N: tl.constexpr = BLOCKS.block_n
    BLOCK_K: tl.constexpr = BLOCKS.block_k
    RP: tl.constexpr = BLOCKS.padded
    at = w + tile.n[:, None] * K
    wait(OVERLAP)
    acc = tl.zeros((BLOCK_N, RP), tl.float32)
    for start in tl.range(tile.begin, tile.end, BLOCK_K, num_stages=BLOCKS.stages):
        c = start + tl.arange(0, BLOCK_K)
        here = tile.real
        if K % BLOCK_K:
            here = here & (c < K)[None, :]
        a = tl.load(at + c[None, :], mask=here, other=0.0, eviction_policy="evict_first")
        b = _load_inputs(x, tile, c, K, BLOCK_K)
        if a.dtype == tl.float8e4nv:
            a = a.to(tl.float32)  # not by way of the slow unit for conversions
        acc = tl.dot(a.to(b.dtype), b, acc, input_precision="ieee")
    return acc


@triton.jit
def _multiply_int4(
    x, w, pairs, tile, K: tl.constexpr, GROUP: tl.constexpr, BLOCKS: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """The product (BLOCK_N, RP) with int4: low halves of bytes and high halves, each with their
    inputs. Scales are too small to be loaded to shared memory while a K block is worked on; those
    of the next K block are loaded to registers."""
    BLOCK_N: tl.constexpr = BLOCKS.block_n
    BLOCK_K: tl.constexpr = BLOCKS.block_k
    RP: tl.constexpr = BLOCKS.padded
    HALF: tl.constexpr = GROUP // 2
    at = w + tile.n[:, None] * (K // 2)
    s, o = _load_scales(pairs, tile, tile.begin, K, BLOCK_K, GROUP)
    wait(OVERLAP)
    acc = tl.zeros((BLOCK_N, RP), tl.float32)
    byte = tl.arange(0, BLOCK_K // 2)
    low = byte // HALF * GROUP + byte % HALF  # the input of its low half
    for start in tl.range(tile.begin, tile.end, BLOCK_K, num_stages=BLOCKS.stages):
        b, c = start // 2 + byte, start + low
        here = tile.real
        if K % BLOCK_K:
            here = here & (b < K // 2)[None, :]
        packed = tl.load(at + b[None, :], mask=here, other=0, eviction_policy="evict_first")
        lows = _load_inputs(x, tile, c, K, BLOCK_K)
        highs = _load_inputs(x, tile, c + HALF, K, BLOCK_K)
        first, second = _dequantize_nibbles(
            packed, _spread(s, BLOCK_N, BLOCK_K, GROUP), _spread(o, BLOCK_N, BLOCK_K, GROUP)
        )
        acc = tl.dot(first.to(lows.dtype), lows, acc, input_precision="ieee")
        acc = tl.dot(second.to(highs.dtype), highs, acc, input_precision="ieee")
        s, o = _load_scales(pairs, tile, start + BLOCK_K, K, BLOCK_K, GROUP)
    return acc


@triton.jit
def _add_partials(acc, split_k, split, cell, SPLIT: tl.constexpr, SIZE: tl.constexpr):
    """Leave a program's sums (SIZE numbers) as partials; the last one to arrive gets the sum of
    all, in the order of the splits, and so always the same. Returns whether it is the last one, and
    its sum."""
    tile = tl.program_id(0)
    mine = split_k.partials + (tile * SPLIT + split).to(tl.int64) * SIZE
    tl.store(mine + cell, acc)
    tl.debug_barrier()
    last = tl.atomic_add(split_k.arrived + tile, 1, sem="acq_rel") == SPLIT - 1
    if last:
        tl.store(split_k.arrived + tile, 0)
        acc = tl.zeros_like(acc)
        theirs = split_k.partials + (tile * SPLIT).to(tl.int64) * SIZE
        for i in tl.static_range(SPLIT):
            acc += tl.load(theirs + i * SIZE + cell, cache_modifier=".cg")
    return last, acc


@triton.jit
def gemm(
    x, w, scale, rows, to, K: tl.constexpr, KIND: tl.constexpr, GROUP: tl.constexpr,
    BLOCKS: tl.constexpr, EPILOGUE: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Multiply RP rows with BLOCK_N outputs over a split of the inputs, and finish the outputs.

    x (rows, K) and w (N, K) are numbers or packed bytes, `scale` those of rows or the pairs of
    int4, `to` is a Destination; BLOCKS are tuning.Gemm, EPILOGUE is an Epilogue.
    """
    BLOCK_N: tl.constexpr = BLOCKS.block_n
    RP: tl.constexpr = BLOCKS.padded
    SPLIT: tl.constexpr = BLOCKS.split
    GATED: tl.constexpr = EPILOGUE.op == GATE
    first, split = tl.program_id(0) * BLOCK_N, tl.program_id(1)
    j = first + tl.arange(0, BLOCK_N)
    r = tl.arange(0, RP)
    n = output_row(j, to.n_outputs, GATED).to(tl.int64)
    SPAN: tl.constexpr = (K + BLOCKS.block_k * SPLIT - 1) // (BLOCKS.block_k * SPLIT)
    begin = split * (SPAN * BLOCKS.block_k)
    end = min(begin + SPAN * BLOCKS.block_k, K)
    tile = _Tile(n, (j < to.n_outputs)[:, None], r, rows, begin, end)
    if KIND == INT4:
        acc = _multiply_int4(x, w, scale, tile, K, GROUP, BLOCKS, OVERLAP)
    else:
        acc = _multiply(x, w, tile, K, BLOCKS, OVERLAP)
    allow(OVERLAP)
    last = True
    if SPLIT > 1:
        cell = tl.arange(0, BLOCK_N)[:, None] * RP + r[None, :]
        last, acc = _add_partials(acc, to.split_k, split, cell, SPLIT, BLOCK_N * RP)
    if last:
        if KIND == INT8 or KIND == FP8:
            acc *= tl.load(scale + n, mask=j < to.n_outputs, other=0.0)[:, None]
        EACH: tl.constexpr = 2 if GATED or EPILOGUE.op == ROTATE else 1
        finish(
            acc, first // EACH + tl.arange(0, BLOCK_N // EACH)[:, None], r[None, :], rows, to,
            EPILOGUE, BLOCK_N, RP,
        )  # fmt: skip
