"""Products of some rows on the tensor cores, from weights as they lie: plain, int8, fp8 or int4.

Loops of products.py's `_some_rows`: of plain weights, and of packed ones for more than 32 rows, up
to which words.py is faster. The surprising thing: the halves of int4's bytes are two
tiles, each multiplied by the inputs that are its own, so no tile is ever put in order.

Letters: N outputs, K inputs, RP rows as the tensor cores see them, G of a group.
"""

import triton
import triton.language as tl

from llama.cuda.launch import wait
from llama.cuda.weights import inside, scale_and_offset


@triton.jit
def _of_groups(  # type: ignore[no-untyped-def]  # noqa: ANN202
    at, row, real, begin, K: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr  # noqa: ANN001
):  # fmt: skip
    """Scales and offsets (BLOCK_N, BLOCK_K / G) of a tile of int4."""
    g = tl.arange(0, BLOCK_K // GROUP)
    here = real & inside(g, begin // GROUP, K // GROUP, BLOCK_K // GROUP)[None, :]
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
def tile_by_row(  # type: ignore[no-untyped-def]  # noqa: ANN201
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
def tile_by_group(  # type: ignore[no-untyped-def]  # noqa: ANN201
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
