"""The forward of many rows by kernels is the plain one: here in Triton's interpreter on a CPU, and
on a GPU where the shapes are real."""

import copy
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_args, unit_scale

from llama.cache import Batch, KVCache
from llama.model import ModelArgs, RopeScaling, Transformer, attend_decode, rotate

pytest.importorskip("triton", reason="needs triton: pip install -e '.[test]'")

import cubins

from llama import cuda
from llama.cuda.attention.prefill import Tiling, attend_prefill, tile_table, tiling
from llama.cuda.forward import FlatForward, joined
from llama.cuda.norm_rope_gate import rms_norm, rotate_and_store, silu_multiply

HALF = torch.bfloat16
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BOUNDS = {torch.float32: 2e-6, HALF: 1.6e-2, torch.float16: 2e-3}  # two roundings of a result


def normal(*shape, dtype=torch.float32, seed=0, device=DEVICE):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(device, dtype)


def close(mine, plain, dtype):
    bound = BOUNDS[dtype]
    torch.testing.assert_close(mine.float(), plain.float(), rtol=bound, atol=bound)


# ---- rows


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize("dim", [64, 96])
def test_rms_norm(dtype, dim):
    x, weight = normal(5, dim, dtype=dtype), normal(dim, dtype=dtype, seed=1)
    expected = F.rms_norm(x, (dim,), weight, 1e-5)
    out = torch.full_like(x, torch.nan)
    assert rms_norm(x, weight, 1e-5, out=out) is out
    close(out, expected, dtype)
    close(rms_norm(x, weight, 1e-5), expected, dtype)
    close(rms_norm(x, weight, 1e-5, out=x), expected, dtype)


def test_rms_norm_does_not_overflow_float16():
    x = torch.full((1, 8), 300.0, dtype=torch.float16, device=DEVICE)
    assert torch.equal(rms_norm(x, torch.ones_like(x[0]), 1e-5), torch.ones_like(x))


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_silu_multiply(dtype):
    both = normal(3, 2 * 2080, dtype=dtype)
    expected = F.silu(both[:, :2080].float()) * both[:, 2080:].float()
    close(silu_multiply(both), expected, dtype)
    inside = both[:, :2080]
    assert silu_multiply(both, out=inside) is inside
    close(both[:, :2080], expected, dtype)
    assert torch.equal(both[:, 2080:], normal(3, 2 * 2080, dtype=dtype)[:, 2080:])


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "size"), [(6, 2, 16), (4, 4, 32), (8, 1, 64), (3, 1, 96), (4, 2, 100)]
)
def test_rotate_and_store(dtype, heads, kv_heads, size):
    rows = 4
    qkv = normal(rows, (heads + 2 * kv_heads) * size, dtype=dtype)
    angles = torch.tensor([0.0, 3, 70_000, 1], device=DEVICE)[:, None] * normal(1, size // 2).abs()
    freqs_cis = torch.polar(torch.ones_like(angles), angles)
    cos, sin = freqs_cis.real.contiguous(), freqs_cis.imag.contiguous()
    cache_index = torch.tensor([5, -1, 11, 0], device=DEVICE)
    k, v = (normal(3, 4, kv_heads, size, dtype=dtype, seed=s) for s in (1, 2))
    parts = torch.split(qkv.clone(), [heads * size, kv_heads * size, kv_heads * size], dim=1)
    q_plain, k_plain, v_plain = (part.view(rows, -1, size) for part in parts)
    expected_k, expected_v = k.clone().flatten(0, 1), v.clone().flatten(0, 1)
    kept = cache_index >= 0
    expected_k[cache_index[kept]] = rotate(k_plain, freqs_cis[:, None])[kept]
    expected_v[cache_index[kept]] = v_plain[kept]
    out = torch.full((rows, heads, size), torch.nan, dtype=dtype, device=DEVICE)
    for target in (out, None):
        q = rotate_and_store(qkv, cos, sin, cache_index, k, v, heads, kv_heads, target)
        close(q, rotate(q_plain, freqs_cis[:, None]), dtype)
        close(k.flatten(0, 1), expected_k, dtype)
        assert torch.equal(v.flatten(0, 1), expected_v)
    assert q.data_ptr() == qkv.data_ptr()


def test_partials_are_added_up():
    heads, kv_heads, size, rows = 4, 2, 16, 3
    partials = normal(2, rows, (heads + 2 * kv_heads) * size)
    whole = partials[0] + partials[1]
    cos, sin = normal(rows, size // 2, seed=2), normal(rows, size // 2, seed=3)
    cache_index = torch.tensor([5, -1, 0], device=DEVICE)
    results = []
    for qkv in (partials, whole):
        out = torch.full((rows, heads, size), torch.nan, device=DEVICE)
        k, v = (torch.zeros(3, 4, kv_heads, size, device=DEVICE) for _ in range(2))
        rotate_and_store(qkv, cos, sin, cache_index, k, v, heads, kv_heads, out)
        results.append((out, k, v))
    for mine, theirs in zip(*results, strict=True):
        assert torch.equal(mine, theirs)

    x, weight, left = normal(rows, 96, dtype=HALF), normal(96, dtype=HALF), normal(2, rows, 96)
    sums = x.float() + left[0] + left[1]
    normed = rms_norm(x, weight, 1e-5, torch.empty_like(x), partials=left)
    close(x, sums, HALF)
    assert torch.equal(normed, rms_norm(x, weight, 1e-5))


# ---- attention


def exact(q, k, v, batch):
    """Attention of the flat rows q (N, H, E) in float64, a sequence at a time."""
    out = torch.full(q.shape, torch.nan, dtype=torch.float64, device=q.device)
    sequences = zip(batch.starts, batch.counts, batch.lengths, batch.slots, strict=False)
    for start, count, length, slot in sequences:
        if count > 1:
            queries = q[start : start + count].double().transpose(0, 1)
            groups = q.shape[1] // k.shape[2]
            keys, values = (
                t[slot, :length].double().transpose(0, 1).repeat_interleave(groups, 0)
                for t in (k, v)
            )
            sees = torch.ones(count, length, dtype=torch.bool, device=q.device)
            mask = sees.tril(length - count)
            result = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
            out[start : start + count] = result.transpose(0, 1)
    return out


def poisoned(batch, slots, room, kv_heads, size, dtype):
    """Keys and values of a cache that is NaN beyond the lengths, and in the other slots."""
    both = []
    for seed in (1, 2):
        cache = torch.full((slots, room, kv_heads, size), torch.nan)
        for length, slot in zip(batch.lengths, batch.slots, strict=True):
            cache[slot, :length] = normal(length, kv_heads, size, seed=seed + slot, device="cpu")
        both.append(cache.to(DEVICE, dtype))
    return both


RAGGED = {
    "beside decodes": ([1, 1, 2, 9], [7, 1, 2, 9], [2, 0, 3, 1]),
    "chunks that continue": ([3, 17, 2], [50, 18, 64], [3, 0, 1]),
    "beyond a tile": ([70, 5], [90, 5], [0, 2]),
}


@pytest.mark.parametrize("name", RAGGED)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "size"), [(6, 2, 16), (2, 2, 128), (4, 1, 64), (2, 2, 96), (4, 2, 100)]
)
def test_attention_of_ragged_prompts(name, heads, kv_heads, size):
    counts, lengths, slots = RAGGED[name]
    batch = Batch(counts, lengths, slots, DEVICE)
    dtypes = (torch.float32, HALF) if size == 16 else (HALF,)
    for dtype in dtypes:
        k, v = poisoned(batch, 4, 96, kv_heads, size, dtype)
        joint = normal(sum(counts), (heads + 2 * kv_heads) * size, dtype=dtype)
        q = joint[:, : heads * size].view(-1, heads, size)
        cut = tiling(size, dtype, DEVICE)
        tiles = tile_table(batch, heads // kv_heads, cut.rows)
        out = torch.full((len(q), heads, size), torch.nan, dtype=dtype, device=DEVICE)
        assert attend_prefill(q, k, v, tiles, out) is out
        expected = exact(q, k, v, batch)
        close(out[batch.ones :], expected[batch.ones :], dtype)
        assert out[: batch.ones].isnan().all()
        attend_prefill(q, k, v, tiles, q, cut)
        assert torch.equal(q[batch.ones :], out[batch.ones :])


@pytest.mark.parametrize("cut", [Tiling(16, 16, 4, 1), Tiling(16, 64, 4, 1), Tiling(64, 16, 4, 1)])
def test_attention_does_not_depend_on_how_it_is_cut(cut):
    batch = Batch([21, 30], [33, 30], [1, 0], DEVICE)  # a tile ends just after a block of keys
    k, v = poisoned(batch, 2, 40, 2, 16, torch.float32)
    q = normal(51, 6, 16)
    tiles = tile_table(batch, 3, cut.rows)
    out = attend_prefill(q, k, v, tiles, torch.full_like(q, torch.nan), cut)
    close(out, exact(q, k, v, batch), torch.float32)


def test_attention_survives_large_scores():
    batch = Batch([20], [20], [0], DEVICE)
    k, v = poisoned(batch, 1, 24, 1, 16, torch.float32)
    q = 300 * normal(20, 1, 16)
    tiles = tile_table(batch, 1, tiling(16, q.dtype, DEVICE).rows)
    out = attend_prefill(q, k, v, tiles, torch.empty_like(q))
    torch.testing.assert_close(out.double(), exact(q, k, v, batch), rtol=1e-4, atol=1e-4)


def test_the_tile_table_covers_each_row_once_and_begins_with_the_longest():
    batch = Batch([1, 1, 130, 2, 64], [9, 8, 140, 200, 64], [4, 3, 0, 2, 1])
    tiles = tile_table(batch, 4, 64).tolist()
    rows = sorted(
        (start, row)
        for start, count, _, _, first in tiles
        for row in range(first, min(first + 64, 4 * count))
    )
    assert rows == sorted(
        (start, row) for start, count in ((2, 130), (132, 2), (134, 64)) for row in range(4 * count)
    )
    work = [length - count + (first + 64) // 4 for _, count, length, _, first in tiles]
    assert work == sorted(work, reverse=True)
    assert all((length, slot) in {(140, 0), (200, 2), (64, 1)} for _, _, length, slot, _ in tiles)
    assert tile_table(Batch([1, 1], [4, 5], [0, 1]), 4, 64) is None


# ---- the forward


MIXED = "decodes beside prompts"
STEPS = {
    "prompts": [([12, 2, 5], [12, 2, 5], [2, 0, 3])],
    "chunks": [([7], [7], [1]), ([5], [12], [1]), ([2], [14], [1])],
    MIXED: [
        ([3, 8], [3, 8], [0, 3]),
        ([1, 1, 6], [4, 9, 6], [0, 3, 1]),
        ([1, 1, 1], [5, 7, 10], [0, 1, 3]),
    ],
}


SHAPES = [{"n_kv_heads": 8}, {"n_heads": 6, "n_kv_heads": 2}, {"head_dim": 20}]


@pytest.mark.parametrize(
    ("name", "shape"), [(name, {}) for name in STEPS] + [(MIXED, shape) for shape in SHAPES]
)
def test_the_forward_is_the_plain_one(tiny, name, shape):
    """Weights that lie apart are joined, so the plain model runs on their views."""
    dtypes = (torch.float32, HALF) if name == MIXED and not shape else (torch.float32,)
    for dtype in dtypes:
        model = tiny(**{"head_dim": 16, "use_scaled_rope": True, **shape}).to(DEVICE, dtype)
        forward = FlatForward(model)
        mine, plain = model.new_cache(4, 32), model.new_cache(4, 32)
        for counts, lengths, slots in STEPS[name]:
            batch = Batch(counts, lengths, slots, DEVICE)
            ends = zip(counts, lengths, strict=True)
            positions = torch.cat([torch.arange(n - c, n) for c, n in ends]).to(DEVICE)
            tokens = (positions * 7 + batch.slot_of_row * 5) % 96
            with torch.no_grad():
                expected = model.hidden(tokens, positions, batch, plain)
                expected_logits = model.logits(expected)
            h = forward.hidden(tokens, positions, batch, mine)
            logits = forward.logits(h)
            assert logits.dtype == torch.float32
            assert logits.shape == (len(tokens), 96)
            bound = 2e-5 if dtype == torch.float32 else 0.15
            for a, b in ((h, expected), (logits, expected_logits)):
                torch.testing.assert_close(a.float(), b.float(), rtol=0, atol=bound)
            for a, b in ((mine.k, plain.k), (mine.v, plain.v)):
                torch.testing.assert_close(a.float(), b.float(), rtol=0, atol=bound)


def test_one_token_sequences_go_to_the_function_that_was_given(tiny):
    model = tiny(head_dim=16).to(DEVICE)
    seen = []

    def attend_ones(q, k, v, slots, lengths, out):
        seen.append((q.shape, k.shape, slots.tolist(), lengths.tolist(), out.shape))
        cache = SimpleNamespace(read=KVCache.read.__get__(SimpleNamespace(k=k[None], v=v[None])))
        out.copy_(attend_decode(q, cache, 0, batch))

    batch = Batch([1, 1, 3], [4, 9, 3], [2, 0, 1], DEVICE)
    positions = torch.tensor([3, 8, 0, 1, 2], device=DEVICE)
    results = []
    for function in (None, attend_ones):
        cache = model.new_cache(3, 16)
        results.append(FlatForward(model, function).hidden(positions, positions, batch, cache))
    assert torch.equal(*results)
    assert seen[0] == ((2, 8, 16), (3, 16, 2, 16), [2, 0], [4, 9], (2, 8, 16))
    assert len(seen) == 2 + (DEVICE.type == "cuda")  # where kernels are compiled before a layer


def test_joined_weights_are_held_once(tiny):
    attention = tiny().layers[0].attention
    parts = [attention.wq, attention.wk, attention.wv]
    before = [part.weight.detach().clone() for part in parts]
    whole = joined(parts)
    assert torch.equal(whole, torch.cat(before))
    for part, weight in zip(parts, before, strict=True):
        assert torch.equal(part.weight, weight)
        assert part.weight.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
    again = joined(parts)
    assert again.data_ptr() == whole.data_ptr()
    assert again.shape == whole.shape
    assert torch.equal(joined(parts[::-1]), torch.cat(before[::-1]))  # not in this order


def test_what_is_not_supported_is_said(monkeypatch):
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    assert cuda.supported(tiny_args(head_dim=64), HALF, gpu) is None
    for size in (16, 18, 96, 100, 256):
        assert cuda.supported(tiny_args(head_dim=size), HALF, gpu) is None
    assert cuda.supported(tiny_args(), HALF, gpu) == "the head size is 8, not between 16 and 256"
    assert "head size is 258," in cuda.supported(tiny_args(head_dim=258), HALF, gpu)
    warm = RopeScaling(factors=(1.0,) * 32, attention_factor=1.5)
    scaled = cuda.supported(tiny_args(head_dim=64, rope_scaling=warm), HALF, gpu)
    assert scaled == "its rotary scaling has attention_factor 1.5"
    assert "torch.float64" in cuda.supported(tiny_args(head_dim=64), torch.float64, gpu)
    assert cuda.supported(tiny_args(), HALF, torch.device("cpu")) == "cpu is no NVIDIA GPU"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    assert cuda.supported(tiny_args(head_dim=64), HALF, gpu) == (
        "the GPU's compute capability is 7.5, below 8.0"
    )


# ---- compiled for the GPU, without one


COMPILE = """
import triton
from cubins import spilled
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from llama.cuda import norm_rope_gate as rows
from llama.cuda.attention import prefill

ALIGNED = [["tt.divisibility", 16]]

def build(kernel, types, constants, **options):
    every = dict(zip(kernel.arg_names, types + ("constexpr",) * len(constants), strict=True))
    aligned = {(at,): ALIGNED for at, name in enumerate(types) if name != "fp32"}
    values = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, every, values, aligned)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)

for dtype in ("bf16", "fp32"):
    x = "*" + dtype
    cut = (prefill.EXACT if dtype == "fp32" else prefill.LARGE)[128]
    attend = build(
        prefill._attend, (x, x, x, "*i32", x, *["i32"] * 3, "fp32"),
        dict(SHAPE=prefill.Shape(4, 8, 128, 128, cut.rows, cut.keys, False), OVERLAP=True),
        num_warps=cut.warps, num_stages=cut.stages,
    )
    for split in (0, 4):
        build(
            rows._rms_norm, (x, x, x, "*fp32", *["i32"] * 3, "fp32"),
            dict(D=4096, BLOCK=4096, SPLIT=split, ARRANGED=split > 0, OVERLAP=True),
        )
        qkv = "*fp32" if split else x
        build(
            rows._rotate_and_store,
            (qkv, "*fp32", "*fp32", "*i64", x, x, x, *["i32"] * 3),
            dict(SPLIT=max(1, split), HEADS=rows.Heads(32, 8, 128, 32, 8, 128), OVERLAP=True),
        )
    build(rows._silu_multiply, (x, x, "i32", "i32"), dict(F=14336, BLOCK=2048, OVERLAP=True))
    assert spilled(attend) == 0
    assert dtype == "fp32" or "wgmma.mma_async" in attend.asm["ptx"]
    assert "griddepcontrol.wait" in attend.asm["ptx"]
print("compiled")
"""


def test_the_kernels_compile_for_compute_capability_9(tmp_path):
    cubins.need_tools()
    file = tmp_path / "compiling.py"  # kernels are read from a file
    file.write_text(COMPILE)
    root = os.path.dirname(os.path.dirname(cuda.__path__[0]))
    env = cubins.environment(root) | {"TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, str(file)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "compiled\n"), done.stderr


# ---- on a GPU

SHAPE = dict(dim=4096, n_layers=2, n_heads=32, n_kv_heads=8, vocab_size=1000, hidden_dim=14336)


def milliseconds(function, repeats=5):
    """The median time of a call on the GPU, which is warm then."""
    times = []
    for _ in range(repeats + 2):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        function()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return sorted(times[2:])[repeats // 2]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [HALF, torch.float16, torch.float32])
@pytest.mark.parametrize("size", [64, 96, 100, 128, 256])
@pytest.mark.parametrize(
    ("counts", "lengths", "slots"),
    [
        ([2048], [2048], [1]),
        ([8192], [8192], [0]),
        ([1024], [8192], [2]),
        ([1, 1, 300, 2, 777, 64, 2048], [50, 9, 300, 900, 4000, 64, 2048], [6, 3, 5, 0, 2, 1, 4]),
    ],
)
def test_attention_on_a_gpu_is_as_exact_as_torch(dtype, size, counts, lengths, slots):
    batch = Batch(counts, lengths, slots, DEVICE)
    k, v = poisoned(batch, 7, 8192, 8, size, dtype)
    q = normal(sum(counts), 32, size, dtype=dtype)
    tiles = tile_table(batch, 4, tiling(size, dtype, DEVICE).rows)
    out = torch.full_like(q, torch.nan)
    attend_prefill(q, k, v, tiles, out)
    flops = sum(
        4 * 32 * size * (c * n - c * (c - 1) / 2)
        for c, n in zip(counts, lengths, strict=True)
        if c > 1
    )
    time = milliseconds(lambda: attend_prefill(q, k, v, tiles, out))
    print(f"{dtype} {size} {counts}: {time:.3f} ms, {flops / time / 1e9:.0f} TFLOP/s")
    assert not out[batch.ones :].isnan().any()
    sequences = zip(batch.starts, counts, lengths, slots, strict=False)
    for start, count, length, slot in sequences:
        if count > 1:  # a head at a time: the float64 scores of 8192 x 8192 are half a gigabyte
            mask = torch.ones(count, length, dtype=torch.bool, device=DEVICE).tril(length - count)
            for head in (0, 13, 31):
                rows = q[start : start + count, head], k[slot, :length, head // 4]
                rows = [*rows, v[slot, :length, head // 4]]
                truth, torchs = (
                    F.scaled_dot_product_attention(*(t[None].to(d) for t in rows), attn_mask=mask)
                    for d in (torch.float64, dtype)
                )
                mine = out[start : start + count, head].double()
                error = (mine - truth[0]).square().mean().sqrt()
                theirs = (torchs[0].double() - truth[0]).square().mean().sqrt()
                assert error <= 1.5 * theirs + 1e-7, (count, head, error, theirs)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [HALF, torch.float32])
def test_the_forward_of_a_real_shape_on_a_gpu(dtype):
    model = unit_scale(Transformer(ModelArgs(**SHAPE))).to(DEVICE, dtype).requires_grad_(False)
    exacts = copy.deepcopy(model).double()
    forward = FlatForward(model)
    counts, lengths, slots = [1, 1, 300, 700], [200, 90, 300, 900], [3, 0, 1, 2]
    batch = Batch(counts, lengths, slots, DEVICE)
    ends = zip(counts, lengths, strict=True)
    positions = torch.cat([torch.arange(n - c, n) for c, n in ends]).to(DEVICE)
    tokens = (positions * 7) % 1000
    results = []
    for run in (model, forward, exacts):
        cache = exacts.new_cache(4, 1024) if run is exacts else model.new_cache(4, 1024)
        cache.k.copy_(normal(*cache.k.shape, dtype=dtype))
        cache.v.copy_(normal(*cache.v.shape, dtype=dtype, seed=1))
        results.append(run.hidden(tokens, positions, batch, cache).double())
    plain, mine, truth = results
    error, theirs = ((r - truth).square().mean().sqrt().item() for r in (mine, plain))
    print(f"{dtype}: error {error:.2e}, of the plain model {theirs:.2e}")
    assert error <= 1.5 * theirs


@pytest.mark.gpu
def test_the_time_and_memory_of_a_prefill():
    args = ModelArgs(**SHAPE)
    with torch.device(DEVICE):
        model = Transformer(args)
    model = model.to(DEVICE, HALF).requires_grad_(False)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    forward, cache = FlatForward(model), model.new_cache(1, 8192)
    for count in (2048, 8192):
        tokens = torch.zeros(count, dtype=torch.int64, device=DEVICE)
        positions = torch.arange(count, device=DEVICE)
        batch = Batch([count], [count], [0], DEVICE)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        time = milliseconds(lambda: forward.hidden(tokens, positions, batch, cache))  # noqa: B023
        peak = torch.cuda.max_memory_allocated() - before
        weights = sum(w.numel() for block in forward.blocks for w in block if w.dim() == 2)
        flops = 2 * weights * count + args.n_layers * 4 * 4096 * count * (count + 1) / 2
        print(
            f"{count} tokens, {args.n_layers} layers: {time:.2f} ms, {flops / time / 1e9:.0f} "
            f"TFLOP/s, {peak / 2**20:.0f} MB"
        )
        assert peak < count * 2 * (2 * 14336 + 4 * 4096) + 2**26  # and cuBLAS's workspace
