"""Products of a few rows on the tensor cores, of weights as they lie: plain, int8, fp8 or int4.

What there is where neither stream.py nor wide.py serves: a few rows with plain weights, any rows in
float32, other GPUs than Hopper. The surprising thing: the halves of int4's bytes are two tiles,
each multiplied by the inputs that are its own, so no tile is put in order.

Letters: N outputs, K inputs, RP rows as the tensor cores see them, G of a group.
"""

import triton
import triton.language as tl

from llama.cuda.launch import allow, wait
from llama.cuda.products.epilogues import GATE, ROTATE, finish, output_row
from llama.cuda.weights import FP8, INT4, INT8, scale_and_offset


@triton.jit
def _inside(c, start, K: tl.constexpr, BLOCK_K: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001,ANN202
    """Which columns of a tile that begins at `start` are in the row: one answer, or one each."""
    if K % BLOCK_K == 0:
        return start + tl.zeros_like(c) < K
    return start + c < K


@triton.jit
def _of_groups(  # type: ignore[no-untyped-def]  # noqa: ANN202
    at, row, real, begin, K: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr  # noqa: ANN001
):  # fmt: skip
    """Scales and offsets (BLOCK_N, BLOCK_K / G) of a tile of int4."""
    g = tl.arange(0, BLOCK_K // GROUP)
    here = real & _inside(g, begin // GROUP, K // GROUP, BLOCK_K // GROUP)[None, :]
    at += row[:, None] * (K // GROUP) + begin // GROUP + g[None, :]
    return scale_and_offset(tl.load(at, mask=here, other=0))


@triton.jit
def _spread(x, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001,ANN202
    """A number of each group, (BLOCK_N, BLOCK_K / G), for each byte, (BLOCK_N, BLOCK_K / 2)."""
    each = tl.broadcast_to(x[:, :, None], (BLOCK_N, BLOCK_K // GROUP, GROUP // 2))
    return tl.reshape(each, (BLOCK_N, BLOCK_K // 2))


@triton.jit
def _nibbles(tile, s, o):  # type: ignore[no-untyped-def]  # noqa: ANN001,ANN202
    """The numbers of the low and of the high halves of bytes, in float32."""
    bits = tile.to(tl.int32)
    o -= 16.0 * s  # a nibble as the first bits of a float's fraction says 16 + q
    low = ((bits << 19) & 0x780000 | 0x41800000).to(tl.float32, bitcast=True)
    high = ((bits << 15) & 0x780000 | 0x41800000).to(tl.float32, bitcast=True)
    return low * s + o, high * s + o


@triton.jit
def _inputs(x, r, rows, c, K: tl.constexpr, BLOCK_K: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001,ANN202
    """Inputs c of rows r: (len(c), RP)."""
    here = (r < rows)[None, :]
    if K % BLOCK_K:
        here = here & (c < K)[:, None]
    return tl.load(x + r[None, :] * K + c[:, None], mask=here, other=0.0)


@triton.jit
def _by_row(  # type: ignore[no-untyped-def]  # noqa: ANN202
    x, w, r, rows, row, real, begin, end, K: tl.constexpr, RP: tl.constexpr,  # noqa: ANN001
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Inputs begin to end of rows r times plain or unscaled weights: (BLOCK_N, RP)."""
    at = w + row[:, None] * K
    wait(OVERLAP)
    y = tl.zeros((BLOCK_N, RP), tl.float32)
    for start in tl.range(begin, end, BLOCK_K, num_stages=STAGES):
        c = start + tl.arange(0, BLOCK_K)
        here = real
        if K % BLOCK_K:
            here = here & (c < K)[None, :]
        tile = tl.load(at + c[None, :], mask=here, other=0.0, eviction_policy="evict_first")
        xs = _inputs(x, r, rows, c, K, BLOCK_K)
        if tile.dtype == tl.float8e4nv:
            tile = tile.to(tl.float32)  # not by way of the slow unit for conversions
        y = tl.dot(tile.to(xs.dtype), xs, y, input_precision="ieee")
    return y


@triton.jit
def _by_group(  # type: ignore[no-untyped-def]  # noqa: ANN202
    x, w, pairs, r, rows, row, real, begin, end, K: tl.constexpr, RP: tl.constexpr,  # noqa: ANN001
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, STAGES: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """The same of int4: low halves of bytes and high halves, each with their inputs. Scales, too
    small to be brought to shared memory while a tile is worked on, are loaded one tile ahead."""
    HALF: tl.constexpr = GROUP // 2
    at = w + row[:, None] * (K // 2)
    s, o = _of_groups(pairs, row, real, begin, K, BLOCK_K, GROUP)
    wait(OVERLAP)
    y = tl.zeros((BLOCK_N, RP), tl.float32)
    byte = tl.arange(0, BLOCK_K // 2)
    low = byte // HALF * GROUP + byte % HALF  # the input of its low half
    for start in tl.range(begin, end, BLOCK_K, num_stages=STAGES):
        b, c = start // 2 + byte, start + low
        here = real
        if K % BLOCK_K:
            here = here & (b < K // 2)[None, :]
        tile = tl.load(at + b[None, :], mask=here, other=0, eviction_policy="evict_first")
        lows = _inputs(x, r, rows, c, K, BLOCK_K)
        highs = _inputs(x, r, rows, c + HALF, K, BLOCK_K)
        first, second = _nibbles(
            tile, _spread(s, BLOCK_N, BLOCK_K, GROUP), _spread(o, BLOCK_N, BLOCK_K, GROUP)
        )
        y = tl.dot(first.to(lows.dtype), lows, y, input_precision="ieee")
        y = tl.dot(second.to(highs.dtype), highs, y, input_precision="ieee")
        s, o = _of_groups(pairs, row, real, start + BLOCK_K, K, BLOCK_K, GROUP)
    return y


@triton.jit
def some_rows(  # type: ignore[no-untyped-def]  # noqa: ANN201
    x, w, scale, rows, n_outputs, out, partial, arrived, cos, sin, slots, positions, k, v, T,  # noqa: ANN001
    K: tl.constexpr, RP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr, STAGES: tl.constexpr, KIND: tl.constexpr, GROUP: tl.constexpr,
    EPILOGUE: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, E: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """BLOCK_N outputs of RP rows over a SPLIT-th of the inputs; the last one to come adds up.

    The sum over splits is made in their order, whoever comes last, so it is always the same.
    """
    first, part = tl.program_id(0) * BLOCK_N, tl.program_id(1)
    j = first + tl.arange(0, BLOCK_N)
    r = tl.arange(0, RP)
    n = output_row(j, n_outputs, EPILOGUE == GATE).to(tl.int64)
    SPAN: tl.constexpr = (K + BLOCK_K * SPLIT - 1) // (BLOCK_K * SPLIT) * BLOCK_K
    begin = part * SPAN
    end = min(begin + SPAN, K)
    if KIND == INT4:
        y = _by_group(
            x, w, scale, r, rows, n, (j < n_outputs)[:, None], begin, end, K, RP, BLOCK_N, BLOCK_K,
            GROUP, STAGES, OVERLAP,
        )  # fmt: skip
    else:
        y = _by_row(
            x, w, r, rows, n, (j < n_outputs)[:, None], begin, end, K, RP, BLOCK_N, BLOCK_K, STAGES,
            OVERLAP,
        )  # fmt: skip
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
        each: tl.constexpr = 2 if EPILOGUE == GATE or EPILOGUE == ROTATE else 1  # noqa: SIM109
        finish(
            y, first // each + tl.arange(0, BLOCK_N // each)[:, None], r[None, :], rows, n_outputs,
            out, cos, sin, slots, positions, k, v, T, EPILOGUE, BLOCK_N, RP, HEADS, KV_HEADS, E,
        )  # fmt: skip
