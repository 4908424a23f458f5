"""Causal attention of all sequences that bring more than one token, in one launch.

Flash attention (Dao et al. 2022, arXiv 2205.14135; online softmax by Milakov and Gimelshein 2018)
over the slots of the cache, where the new keys have been stored before. It knows neither the model
nor how the rows came about. The surprising thing: a tile's rows are not tokens but (token, query
head of one key head), so that grouped heads fill a tile of a short chunk, waste less above the
diagonal, and read a key once for all of them.

Letters: N rows of the flat batch, H query heads, K key/value heads, G = H/K, E head size (padded to
a power of two in registers), P slots, T positions, X tiles.
"""

# ruff: noqa: ANN001, ANN202 (arguments of kernels have no types in Python)

import torch
import triton
import triton.language as tl
from torch import Tensor

from llama.cache import Batch
from llama.cuda.launch import (
    INTERPRETED,
    allow,
    capability,
    launch,
    multiprocessors_and_memory,
    overlap,
    wait,
)
from llama.cuda.tuning import Tiling, fitted_tiling, power_of_two

LOG2_E = 1.4426950408889634


# By head size, padded. LARGE: 16-bit numbers and up to 227 KB of shared memory (compute capability
# 9.0 and 10.0). EXACT: float32, on plain multiply-add units. SMALL: all the rest, in 99 KB. With
# two stages the loads of a block would begin only when the block before is done.
LARGE = {
    16: Tiling(128, 64, 8, 3),
    32: Tiling(128, 64, 8, 3),
    64: Tiling(128, 64, 8, 3),
    128: Tiling(128, 128, 8, 3),
    256: Tiling(128, 32, 8, 3),
}
EXACT = {
    16: Tiling(32, 32, 4, 1),
    32: Tiling(32, 32, 4, 1),
    64: Tiling(32, 32, 4, 1),
    128: Tiling(32, 32, 8, 1),
    256: Tiling(32, 32, 16, 1),
}
SMALL = {
    16: Tiling(64, 32, 4, 3),
    32: Tiling(64, 32, 4, 3),
    64: Tiling(64, 32, 4, 3),
    128: Tiling(64, 32, 4, 3),
    256: Tiling(64, 16, 4, 3),
}


def tiling(head_dim: int, dtype: torch.dtype, device: torch.device) -> Tiling:
    """How attention over heads of this size is cut, in what the device has."""
    kind, (_, shared) = capability(device), multiprocessors_and_memory(device)
    table = EXACT if dtype == torch.float32 else LARGE if kind[0] in (9, 10) else SMALL
    return fitted_tiling(table[power_of_two(head_dim)], head_dim, dtype.itemsize, kind, shared)


def tile_table(batch: Batch, groups: int, rows: int) -> Tensor | None:
    """The tiles of all sequences of more than one token, (X, 5) int32, where the batch is.

    A tile is `rows` rows of a sequence's counts[i] * G. Its line: the sequence's first row of the
    flat batch, its count, its length, its slot, and the tile's first row. The longest come first,
    so that the last to run are short. None where there are no such sequences.
    """
    assert batch.slots is not None, "attention over a cache needs slots"
    lines = [
        (start, count, length, slot, first)
        for start, count, length, slot in zip(
            batch.starts, batch.counts, batch.lengths, batch.slots, strict=False
        )
        if count > 1
        for first in range(0, count * groups, rows)
    ]
    if not lines:
        return None
    lines.sort(key=lambda line: line[1] - line[2] - (line[4] + rows) // groups)
    return torch.tensor(lines, dtype=torch.int32).to(batch.slot_of_row.device)


@triton.jit
def _dot(a, b, acc, WIDE: tl.constexpr):  # type: ignore[no-untyped-def]
    """acc + a b, exact products of what is given. The interpreter takes bfloat16 for integers, so
    there (WIDE) float32 is multiplied."""
    if WIDE:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def _more_keys(  # type: ignore[no-untyped-def]
    state,
    queries,
    k,
    v,
    first,
    length,
    sees,
    scale,
    STRIDE: tl.constexpr,
    E: tl.constexpr,
    E_PAD: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WIDE: tl.constexpr,
    MASKED: tl.constexpr,
):
    """The online softmax (maximum, sum, weighted values) after BLOCK_N keys more, from `first`."""
    top, total, acc = state
    keys = first + tl.arange(0, BLOCK_N)
    at = keys[:, None] * STRIDE + tl.arange(0, E_PAD)[None, :]
    there = keys[:, None] < length if MASKED else None
    if E_PAD > E:
        inside = (tl.arange(0, E_PAD) < E)[None, :]
        there = inside & there if MASKED else inside
    key = tl.load(k + at, mask=there, other=0 if MASKED or E_PAD > E else None)
    nothing = tl.zeros((queries.shape[0], BLOCK_N), tl.float32)
    scores = _dot(queries, tl.trans(key), nothing, WIDE)  # (BLOCK_M, BLOCK_N)
    if MASKED:
        scores = tl.where(keys[None, :] <= sees[:, None], scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1) * scale)
    weights = tl.math.exp2(scores * scale - new_top[:, None])
    decay = tl.math.exp2(top - new_top)
    value = tl.load(v + at, mask=there, other=0 if MASKED or E_PAD > E else None)
    acc = acc * decay[:, None]
    acc = _dot(weights.to(value.dtype), value, acc, WIDE)
    return new_top, total * decay + tl.sum(weights, 1), acc


@triton.jit
def _attend(  # type: ignore[no-untyped-def]
    q,
    k,
    v,
    tiles,
    out,
    q_row,
    out_row,
    slot_stride,
    scale,
    G: tl.constexpr,
    K: tl.constexpr,
    E: tl.constexpr,
    E_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WIDE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    allow(OVERLAP)
    wait(OVERLAP)
    tile = tiles + (tl.program_id(0) // K) * 5
    head = tl.program_id(0) % K
    start, count, length = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    slot, first = tl.load(tile + 3), tl.load(tile + 4)
    rows = first + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, E_PAD)[None, :]
    before = length - count  # keys of earlier calls
    live = rows[:, None] < count * G
    if E_PAD > E:
        live = live & (columns < E)
    row = (start + rows // G).to(tl.int64)[:, None]
    member = (head * G + rows % G)[:, None]
    queries = tl.load(q + row * q_row + member * E + columns, mask=live, other=0)
    k += slot.to(tl.int64) * slot_stride + head * E
    v += slot.to(tl.int64) * slot_stride + head * E
    sees = before + rows // G  # the last key that a row sees
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    state = (top, tl.zeros((BLOCK_M,), tl.float32), tl.zeros((BLOCK_M, E_PAD), tl.float32))
    whole = (before + first // G + 1) // BLOCK_N * BLOCK_N  # all rows see the keys before it
    end = tl.minimum(length, before + (first + BLOCK_M - 1) // G + 1)
    for key in tl.range(0, whole, BLOCK_N):
        state = _more_keys(
            state, queries, k, v, key, length, sees, scale, K * E, E, E_PAD, BLOCK_N, WIDE, False
        )
    for key in tl.range(whole, end, BLOCK_N):
        state = _more_keys(
            state, queries, k, v, key, length, sees, scale, K * E, E, E_PAD, BLOCK_N, WIDE, True
        )
    top, total, acc = state
    result = (acc / total[:, None]).to(out.dtype.element_ty)
    tl.store(out + row * out_row + member * E + columns, result, mask=live)


def attend_runs(
    q: Tensor,
    k_layer: Tensor,
    v_layer: Tensor,
    tiles: Tensor,
    out: Tensor,
    cut: Tiling | None = None,
) -> Tensor:
    """Attention of the rows that `tiles` (X, 5) names, q (N, H, E) -> out (N, H, E); other rows of
    `out` stay as they are.

    k_layer and v_layer (P, T, K, E) are the cache of one layer. `tiles` is tile_table's, made with
    the rows of the same `cut` (None: `tiling`'s). `out` may be q.
    """
    heads, head_dim = q.shape[1:]
    kv_heads = k_layer.shape[2]
    cut = cut or tiling(head_dim, q.dtype, q.device)
    assert q.stride()[1:] == out.stride()[1:] == (head_dim, 1), (q.stride(), out.stride())
    for layer in (k_layer, v_layer):
        assert layer.is_contiguous(), layer.stride()
        assert layer.dtype == q.dtype, (layer.dtype, q.dtype)
    launch(_attend, (len(tiles) * kv_heads,))(
        q, k_layer, v_layer, tiles, out, q.stride(0), out.stride(0), k_layer.stride(0),
        head_dim**-0.5 * LOG2_E, G=heads // kv_heads, K=kv_heads, E=head_dim,
        E_PAD=power_of_two(head_dim), BLOCK_M=cut.rows, BLOCK_N=cut.keys, WIDE=INTERPRETED,
        num_warps=cut.warps, num_stages=cut.stages, **overlap(q.device),
    )  # fmt: skip
    return out
