"""Small kernels over the rows of a flat batch: norm, rotation with storing, and the gate.

Each does in one pass over memory what model.py says in several steps, in float32 inside, rounded
once. They know a row's layout and nothing of sequences. A product that was split along its inputs
(split-K) may leave `partials`, which the norm or the rotation after it adds up. The surprising
thing: three of the results may overwrite what they were made from (`out`), since a program reads
all that it needs before it writes. Tensors and strides are loose arguments: prompts launch these
kernels five times a layer, and a group costs the host a microsecond in each launch.

Letters: N rows, D dim, H query heads and K key/value heads, E head size (padded to a power of two
in registers), F hidden size, P slots, T positions, S partials of a product.
"""

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from llama.cuda.launch import allow, launch, overlap, wait
from llama.cuda.products.epilogues import arranged_place
from llama.cuda.tuning import power_of_two

GATE_BLOCK = 2048  # columns of a row that one program gates


class Heads(NamedTuple):
    """How many heads there are of what size, as a constant of a kernel."""

    H: int
    K: int
    E: int
    H_PAD: int  # powers of two
    K_PAD: int
    E_PAD: int


@cache
def _heads(heads: int, kv_heads: int, head_dim: int) -> Heads:
    padded = (power_of_two(n) for n in (heads, kv_heads, head_dim))
    return Heads(heads, kv_heads, head_dim, *padded)


@triton.jit
def _sum_partials(at, live, stride, SPLIT: tl.constexpr):
    """The sum, in float32, of what is at `at` and of the partials behind it."""
    total = tl.load(at, mask=live, other=0).to(tl.float32)
    for i in tl.static_range(1, SPLIT):
        total += tl.load(at + i * stride, mask=live, other=0)
    return total


@triton.jit
def _rms_norm(
    x, weight, out, partials, x_stride, out_stride, partial_stride, eps, D: tl.constexpr,
    BLOCK: tl.constexpr, SPLIT: tl.constexpr, ARRANGED: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """The norm of one row, to which SPLIT partials are added before, in place."""
    allow(OVERLAP)
    columns = tl.arange(0, BLOCK)
    live = columns < D
    scale = tl.load(weight + columns, mask=live, other=0).to(tl.float32)
    wait(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    states = tl.load(x + row * x_stride + columns, mask=live, other=0).to(tl.float32)
    if SPLIT:
        states += _sum_partials(partials + row * D + columns, live, partial_stride, SPLIT)
        rounded = states.to(x.dtype.element_ty)
        tl.store(x + row * x_stride + columns, rounded, mask=live)
        states = rounded.to(tl.float32)
    root = tl.rsqrt(tl.sum(states * states) / D + eps)
    to = arranged_place(columns) if ARRANGED else columns
    normed = (states * root * scale).to(out.dtype.element_ty)
    tl.store(out + row * out_stride + to, normed, mask=live)


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    out: Tensor | None = None,
    *,
    partials: Tensor | None = None,
    arranged: bool = False,
) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight of each row: (N, D) -> (N, D) in x's dtype.

    `partials` (S, N, D) float32 are added to x before, in place. `out` may be x where there are
    none. If `arranged`, the numbers of a row of `out` lie as epilogues.arranged_place says, and D
    is a multiple of 64.
    """
    rows, dim = x.shape
    out = torch.empty_like(x) if out is None else out
    assert x.stride(1) == out.stride(1) == weight.stride(0) == 1, (x.stride(), out.stride())
    assert partials is None or partials.stride()[1:] == (dim, 1), partials.stride()
    block, split = power_of_two(dim), 0 if partials is None else len(partials)
    added = x if partials is None else partials
    launch(_rms_norm, (rows,))(
        x, weight, out, added, x.stride(0), out.stride(0), added.stride(0), eps, D=dim, BLOCK=block,
        SPLIT=split, ARRANGED=arranged, num_warps=_warps(block, 1 + split), **overlap(x.device),
    )  # fmt: skip
    return out


@triton.jit
def _rotate_heads(
    at, cos, sin, stride, SPLIT: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
    E: tl.constexpr, E_PAD: tl.constexpr,
):  # fmt: skip
    """The heads (BLOCK, E) at `at`, each pair (2i, 2i+1) rotated by the angle i of (1, E/2)."""
    heads = tl.arange(0, BLOCK)[:, None]
    columns = tl.arange(0, E_PAD)[None, :]
    live = heads < HEADS
    if E_PAD > E:
        live = live & (columns < E)
    x = _sum_partials(at + (heads * E + columns), live, stride, SPLIT)
    even, odd = tl.split(tl.reshape(x, (BLOCK, E_PAD // 2, 2)))
    rotated = tl.join(even * cos - odd * sin, even * sin + odd * cos)
    return tl.reshape(rotated, (BLOCK, E_PAD))


@triton.jit
def _store_keys_and_values(
    x, cos, sin, cache_index, k, v, stride, SPLIT: tl.constexpr, HEADS: tl.constexpr
):  # fmt: skip
    """Store the keys at `x`, rotated, and the values behind them in the cache of a layer."""
    K: tl.constexpr = HEADS.K
    E: tl.constexpr = HEADS.E
    E_PAD: tl.constexpr = HEADS.E_PAD
    columns = tl.arange(0, E_PAD)[None, :]
    heads = tl.arange(0, HEADS.K_PAD)[:, None]
    live = heads < tl.where(cache_index >= 0, K, 0)
    if E_PAD > E:
        live = live & (columns < E)
    at = heads * E + columns
    keys = _rotate_heads(x, cos, sin, stride, SPLIT, K, HEADS.K_PAD, E, E_PAD)
    tl.store(k + cache_index * (K * E) + at, keys.to(k.dtype.element_ty), mask=live)
    values = _sum_partials(x + K * E + at, live, stride, SPLIT)
    tl.store(v + cache_index * (K * E) + at, values.to(v.dtype.element_ty), mask=live)


@triton.jit
def _rotate_and_store(
    qkv, cos, sin, cache_index, k, v, out, qkv_stride, out_stride, partial_stride,
    SPLIT: tl.constexpr, HEADS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One row's queries, rotated, to `out`; its keys, rotated, and its values to the cache."""
    H: tl.constexpr = HEADS.H
    E: tl.constexpr = HEADS.E
    E_PAD: tl.constexpr = HEADS.E_PAD
    allow(OVERLAP)
    wait(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    pairs = tl.arange(0, E_PAD // 2)[None, :]
    real = None
    if E_PAD > E:
        real = pairs < E // 2
    c = tl.load(cos + row * (E // 2) + pairs, mask=real)  # (1, E/2)
    s = tl.load(sin + row * (E // 2) + pairs, mask=real)
    x = qkv + row * qkv_stride
    columns = tl.arange(0, E_PAD)[None, :]
    heads = tl.arange(0, HEADS.H_PAD)[:, None]
    queries = _rotate_heads(x, c, s, partial_stride, SPLIT, H, HEADS.H_PAD, E, E_PAD)
    live = heads < H
    if E_PAD > E:
        live = live & (columns < E)
    at = out + row * out_stride + heads * E + columns
    tl.store(at, queries.to(out.dtype.element_ty), mask=live)
    index = tl.load(cache_index + row)
    _store_keys_and_values(x + H * E, c, s, index, k, v, partial_stride, SPLIT, HEADS)


def rotate_and_store(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    cache_index: Tensor,
    k_layer: Tensor,
    v_layer: Tensor,
    heads: int,
    kv_heads: int,
    out: Tensor | None = None,
) -> Tensor:
    """Rotated queries (N, H, E) of the joined product `qkv` (N, (H + 2K) * E), or of its partials,
    which are added up here, (S, N, (H + 2K) * E). The keys, rotated, and the values are stored in
    the cache of one layer, `k_layer` and `v_layer` (..., K, E).

    cos and sin (N, E/2) are float32; `cache_index` (N,) int64 is where each row's keys and values
    belong among all P * T of the layer, and -1 stores nothing. Without `out` the queries stay where
    they are, and a view of `qkv`, which are no partials then, comes back.
    """
    partials = qkv if qkv.dim() == 3 else qkv[None]
    (split, rows, width), head_dim = partials.shape, k_layer.shape[-1]
    assert width == (heads + 2 * kv_heads) * head_dim, qkv.shape
    assert partials.stride(2) == 1, qkv.stride()
    for tensor in (cos, sin, cache_index, k_layer, v_layer):
        assert tensor.is_contiguous(), (tensor.shape, tensor.stride())
    if out is None:
        assert qkv.dim() == 2, qkv.shape
        out = qkv[:, : heads * head_dim].view(rows, heads, head_dim)
    assert out.stride()[1:] == (head_dim, 1), out.stride()
    sizes = _heads(heads, kv_heads, head_dim)
    launch(_rotate_and_store, (rows,))(
        qkv, cos, sin, cache_index, k_layer, v_layer, out, partials.stride(1), out.stride(0),
        partials.stride(0), SPLIT=split, HEADS=sizes,
        num_warps=_warps(sizes.H_PAD * sizes.E_PAD, split), **overlap(qkv.device),
    )  # fmt: skip
    return out


@triton.jit
def _silu_multiply(
    joined, out, joined_stride, out_stride, F: tl.constexpr, BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """BLOCK columns of one row: silu of its first half, times its second."""
    allow(OVERLAP)
    wait(OVERLAP)
    blocks: tl.constexpr = (F + BLOCK - 1) // BLOCK
    row = (tl.program_id(0) // blocks).to(tl.int64)
    columns = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    live = columns < F
    at = joined + row * joined_stride + columns
    gate = tl.load(at, mask=live, other=0).to(tl.float32)
    up = tl.load(at + F, mask=live, other=0).to(tl.float32)
    gated = gate * tl.sigmoid(gate) * up
    tl.store(out + row * out_stride + columns, gated.to(out.dtype.element_ty), mask=live)


def silu_multiply(joined: Tensor, out: Tensor | None = None) -> Tensor:
    """silu(a) * b of rows a | b: (N, 2F) -> (N, F). `out` may be the view `joined[:, :F]`."""
    rows, hidden = len(joined), joined.shape[1] // 2
    out = joined.new_empty(rows, hidden) if out is None else out
    assert joined.stride(1) == out.stride(1) == 1, (joined.stride(), out.stride())
    block = min(GATE_BLOCK, power_of_two(hidden))
    launch(_silu_multiply, (rows * triton.cdiv(hidden, block),))(
        joined, out, joined.stride(0), out.stride(0), F=hidden, BLOCK=block,
        num_warps=_warps(block), **overlap(joined.device),
    )  # fmt: skip
    return out


def _warps(block: int, terms: int = 1) -> int:
    """Warps for a program of `block` numbers: about 32 of them a thread, or 16 where each is the
    sum of several `terms` that are far away."""
    return min(16, max(1, block // (512 if terms > 1 else 1024)))
