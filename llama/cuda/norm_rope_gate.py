"""Small kernels over the rows of a flat batch: norm, rotation with storing, and the gate.

Each does in one pass over memory what model.py says in several steps, in float32 inside, rounded
once. They know a row's layout and nothing of sequences. The surprising thing: three of the results
may take the place of what they were made from (`out`), since a program reads all that it needs
before it writes.

Letters: N rows, D dim, H query heads and K key/value heads, E head size (padded to a power of two
in registers), F hidden size, P slots, T positions.
"""

# ruff: noqa: ANN001, ANN202 (arguments of kernels have no types in Python)

import torch
import triton
import triton.language as tl
from torch import Tensor

from llama.cuda.launch import allow, launch, overlap, wait
from llama.cuda.products.epilogues import arranged_place
from llama.cuda.tuning import power_of_two

GATE_BLOCK = 2048  # columns of a row that one program gates


@triton.jit
def _added(at, live, part, PARTS: tl.constexpr):  # type: ignore[no-untyped-def]
    """What is at `at` and, in float32, the parts behind it, `part` numbers from each other."""
    values = tl.load(at, mask=live, other=0).to(tl.float32)
    for i in tl.static_range(1, PARTS):
        values += tl.load(at + i * part, mask=live, other=0)
    return values


@triton.jit
def _rms_norm(  # type: ignore[no-untyped-def]
    x,
    weight,
    out,
    parts,
    x_row,
    out_row,
    part,
    eps,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    ARRANGED: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    allow(OVERLAP)
    columns = tl.arange(0, BLOCK)
    live = columns < D
    scale = tl.load(weight + columns, mask=live, other=0).to(tl.float32)
    wait(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    values = tl.load(x + row * x_row + columns, mask=live, other=0).to(tl.float32)
    if PARTS:
        values += _added(parts + row * D + columns, live, part, PARTS)
        rounded = values.to(x.dtype.element_ty)
        tl.store(x + row * x_row + columns, rounded, mask=live)
        values = rounded.to(tl.float32)
    root = tl.rsqrt(tl.sum(values * values) / D + eps)
    places = arranged_place(columns) if ARRANGED else columns
    tl.store(
        out + row * out_row + places,
        (values * root * scale).to(out.dtype.element_ty),
        mask=live,
    )


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    out: Tensor | None = None,
    *,
    parts: Tensor | None = None,
    arranged: bool = False,
) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight of each row: (N, D) -> (N, D) in x's dtype.

    `parts` (S, N, D) float32 are added to x before, in place. `out` may be x where there are none.
    `arranged`: its numbers lie as epilogues.arranged_place says; D is a multiple of 64 then.
    """
    rows, dim = x.shape
    out = torch.empty_like(x) if out is None else out
    assert x.stride(1) == out.stride(1) == weight.stride(0) == 1, (x.stride(), out.stride())
    block, count = power_of_two(dim), 0 if parts is None else len(parts)
    added = x if parts is None else parts
    launch(_rms_norm, (rows,))(
        x, weight, out, added, x.stride(0), out.stride(0), added.stride(0), eps, D=dim, BLOCK=block,
        PARTS=count, ARRANGED=arranged, num_warps=_warps(block, 1 + count), **overlap(x.device),
    )  # fmt: skip
    return out


@triton.jit
def _turned(  # type: ignore[no-untyped-def]
    x,
    cos,
    sin,
    part,
    PARTS: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    E: tl.constexpr,
    E_PAD: tl.constexpr,
):
    """The heads (BLOCK, E) at x, each pair (2i, 2i+1) turned by the angle of (1, E/2) i."""
    heads = tl.arange(0, BLOCK)[:, None]
    columns = tl.arange(0, E_PAD)[None, :]
    live = heads < HEADS
    if E_PAD > E:
        live = live & (columns < E)
    values = _added(x + (heads * E + columns), live, part, PARTS)
    even, odd = tl.split(tl.reshape(values, (BLOCK, E_PAD // 2, 2)))
    turned = tl.join(even * cos - odd * sin, even * sin + odd * cos)
    return tl.reshape(turned, (BLOCK, E_PAD))


@triton.jit
def _rotate_and_store(  # type: ignore[no-untyped-def]
    qkv,
    cos,
    sin,
    places,
    k_cache,
    v_cache,
    out,
    qkv_row,
    out_row,
    part,
    PARTS: tl.constexpr,
    H: tl.constexpr,
    K: tl.constexpr,
    E: tl.constexpr,
    E_PAD: tl.constexpr,
    H_BLOCK: tl.constexpr,
    K_BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    allow(OVERLAP)
    wait(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    pairs = tl.arange(0, E_PAD // 2)[None, :]
    turns = None
    if E_PAD > E:
        turns = pairs < E // 2
    c = tl.load(cos + row * (E // 2) + pairs, mask=turns)  # (1, E/2)
    s = tl.load(sin + row * (E // 2) + pairs, mask=turns)
    x = qkv + row * qkv_row
    columns = tl.arange(0, E_PAD)[None, :]
    heads = tl.arange(0, H_BLOCK)[:, None]
    queries = _turned(x, c, s, part, PARTS, H, H_BLOCK, E, E_PAD).to(out.dtype.element_ty)
    live = heads < H
    if E_PAD > E:
        live = live & (columns < E)
    tl.store(out + row * out_row + heads * E + columns, queries, mask=live)
    place = tl.load(places + row)
    kv_heads = tl.arange(0, K_BLOCK)[:, None]
    live = kv_heads < tl.where(place >= 0, K, 0)
    if E_PAD > E:
        live = live & (columns < E)
    at = kv_heads * E + columns
    keys = _turned(x + H * E, c, s, part, PARTS, K, K_BLOCK, E, E_PAD).to(k_cache.dtype.element_ty)
    tl.store(k_cache + place * (K * E) + at, keys, mask=live)
    values = _added(x + (H + K) * E + at, live, part, PARTS).to(v_cache.dtype.element_ty)
    tl.store(v_cache + place * (K * E) + at, values, mask=live)


def rotate_and_store(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    places: Tensor,
    k_layer: Tensor,
    v_layer: Tensor,
    heads: int,
    kv_heads: int,
    out: Tensor | None = None,
) -> Tensor:
    """Rotated queries (N, H, E) of the joined product `qkv` (N, (H + 2K) * E), or of parts of it
    that are still to be added, (S, N, (H + 2K) * E). Their keys, rotated, and values are stored in
    the cache of one layer, `k_layer` and `v_layer` (..., K, E).

    cos and sin (N, E/2) are float32; `places` (N,) int64 are those of KVCache.places, where -1
    stores nothing. Without `out` the queries stay where they are, and a view of `qkv`, not parts,
    comes back.
    """
    parts = qkv if qkv.dim() == 3 else qkv[None]
    (_, rows, width), head_dim = parts.shape, k_layer.shape[-1]
    assert width == (heads + 2 * kv_heads) * head_dim, qkv.shape
    assert parts.stride(2) == 1, qkv.stride()
    for tensor in (cos, sin, places, k_layer, v_layer):
        assert tensor.is_contiguous(), (tensor.shape, tensor.stride())
    if out is None:
        assert qkv.dim() == 2, qkv.shape
        out = qkv[:, : heads * head_dim].view(rows, heads, head_dim)
    assert out.stride()[1:] == (head_dim, 1), out.stride()
    block, padded = power_of_two(heads), power_of_two(head_dim)
    launch(_rotate_and_store, (rows,))(
        qkv, cos, sin, places, k_layer, v_layer, out, parts.stride(1), out.stride(0),
        parts.stride(0), PARTS=len(parts), H=heads, K=kv_heads, E=head_dim, E_PAD=padded,
        H_BLOCK=block, K_BLOCK=power_of_two(kv_heads), num_warps=_warps(block * padded, len(parts)),
        **overlap(qkv.device),
    )  # fmt: skip
    return out


@triton.jit
def _silu_multiply(  # type: ignore[no-untyped-def]
    joined,
    out,
    joined_row,
    out_row,
    F: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    allow(OVERLAP)
    wait(OVERLAP)
    blocks: tl.constexpr = (F + BLOCK - 1) // BLOCK
    row = (tl.program_id(0) // blocks).to(tl.int64)
    columns = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    live = columns < F
    at = joined + row * joined_row + columns
    gate = tl.load(at, mask=live, other=0).to(tl.float32)
    up = tl.load(at + F, mask=live, other=0).to(tl.float32)
    gated = gate * tl.sigmoid(gate) * up
    tl.store(out + row * out_row + columns, gated.to(out.dtype.element_ty), mask=live)


def silu_multiply(joined: Tensor, out: Tensor | None = None) -> Tensor:
    """silu(a) * b of rows a | b: (N, 2F) -> (N, F). `out` may be the view `joined[:, :F]`."""
    rows, hidden = len(joined), joined.shape[1] // 2
    out = joined.new_empty(rows, hidden) if out is None else out
    assert joined.stride(1) == out.stride(1) == 1, (joined.stride(), out.stride())
    block = min(GATE_BLOCK, power_of_two(hidden))
    launch(_silu_multiply, (rows * triton.cdiv(hidden, block),))(
        joined, out, joined.stride(0), out.stride(0),
        F=hidden, BLOCK=block, num_warps=_warps(block), **overlap(joined.device),
    )  # fmt: skip
    return out


def _warps(block: int, parts: int = 1) -> int:
    """Warps for a program of `block` numbers: about 32 of them a thread, or 16 where each is added
    up from several that are far away."""
    return min(16, max(1, block // (512 if parts > 1 else 1024)))
