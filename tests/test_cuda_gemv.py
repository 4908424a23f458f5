"""The kernel of one row (gemv.py) and that of several on Hopper (gemm_sm90.py): in Triton's
interpreter, which has no Hopper but knows what is computed, or on a GPU where there is one."""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", reason="triton is not installed")

from test_cuda_packed import packed, quantized_model
from test_cuda_products import (  # noqa: F401
    DEVICE,
    HALF,
    NAN,
    arranged,
    close,
    multiply,
    randn,
    rotated,
)
from test_cuda_step import small

from llama.cuda import layers, tuning
from llama.cuda.norm_rope_gate import rotate_and_store
from llama.cuda.products import dispatch
from llama.cuda.products.dispatch import ADD, GATE, ROTATE, STORE, Products, Rotation
from llama.cuda.step import CapturedStep, Row
from llama.cuda.tuning import GemmSm90, Gemv, gemm_blocks, gemm_sm90_blocks, gemv_blocks
from llama.quantization.packed import Format
from llama.sampling import SamplingParams

HOPPER = DEVICE.type == "cpu" or torch.cuda.get_device_capability() == (9, 0)
DTYPE = HALF[1]

FORMATS = [None, Format("int8"), Format("fp8"), *(Format("int4", group) for group in (32, 64, 128))]
INPUTS = [320, 640, 640, 640, 768, 1536]  # the last K block has fewer
BLOCKS = [Gemv(16, 4, 2, 3), Gemv(32, 2, 4, 5), Gemv(32, 4, 2, 2, split=2)]


def weight_of(outputs, inputs, format, seed=1):
    """A weight as kernels get it, and its numbers in float64."""
    if format is None:
        plain = (randn(outputs, inputs, seed=seed) / inputs**0.5).to(DTYPE)
        return plain, plain.double()
    made = packed(outputs, inputs, format, seed)
    return made, made.unpack(torch.float32).double()


def stored_and_gated(multiply, x, weight, product, shuffled=lambda y: y, **options):  # noqa: F811
    """Products are what they should be."""
    rows, outputs = product.shape
    out = torch.full((rows, outputs), NAN, device=DEVICE)
    close(multiply(x, weight, out, STORE, **options), product, DTYPE)
    gated = torch.full((rows, outputs // 2), NAN, device=DEVICE, dtype=DTYPE)
    gate, up = product.chunk(2, 1)
    multiply(x, weight, gated, GATE, **options)
    close(gated, shuffled(F.silu(gate) * up), DTYPE)


def epilogues(multiply, x, weight, product, **options):  # noqa: F811
    """The same, and added ones."""
    stored_and_gated(multiply, x, weight, product, **options)
    residual = randn(*product.shape, dtype=DTYPE, seed=2)
    expected = residual.double() + product
    close(multiply(x, weight, residual, ADD, **options), expected, DTYPE)


@pytest.mark.parametrize("blocks", BLOCKS, ids=str)
@pytest.mark.parametrize(
    ("format", "inputs"), [*zip(FORMATS, INPUTS, strict=True)], ids=[str(f) for f in FORMATS]
)
def test_a_row(multiply, format, inputs, blocks):  # noqa: F811
    weight, numbers = weight_of(72, inputs, format)
    x, gain = randn(1, inputs, dtype=DTYPE), (1 + randn(inputs, seed=2) / 8).to(DTYPE)
    x[0, 5] = 30.0
    epilogues(multiply, x, weight, x.double() @ numbers.T, blocks=blocks)
    if blocks.split == 1:
        h = F.rms_norm(x.double(), (inputs,), gain.double(), 1e-5)
        epilogues(multiply, x, weight, h @ numbers.T, blocks=blocks, norm=(gain, 1e-5))


@pytest.mark.parametrize("format", [None, *FORMATS[1:3], FORMATS[4]], ids=str)
def test_a_row_loses_less_than_its_dtype(multiply, format):  # noqa: F811
    """Whole numbers have 22 bits of the row's largest number, e4m3 is multiplied as float16."""
    weight, numbers = weight_of(72, 768, format)
    x = randn(1, 768, dtype=DTYPE)
    out = torch.full((1, 72), NAN, device=DEVICE)
    multiply(x, weight, out, STORE, blocks=BLOCKS[0])
    product = x.double() @ numbers.T
    error = (out.double() - product).norm() / product.norm()
    assert error < (5e-4 if format == Format("fp8") else 5e-6), error


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_a_row_that_is_not_finite_stays_so(multiply, format, bad):  # noqa: F811
    weight, _ = weight_of(16, 1536, format)
    x = randn(1, 1536, dtype=DTYPE)
    x[0, 7] = bad
    out = torch.zeros(1, 16, device=DEVICE)
    multiply(x, weight, out, STORE, blocks=BLOCKS[0])
    assert not out.isfinite().any()


@pytest.mark.parametrize("format", [None, *FORMATS[1:3], FORMATS[4]], ids=str)
def test_a_row_of_zeros_gives_zeros(multiply, format):  # noqa: F811
    weight, _ = weight_of(16, 768, format)
    out = torch.full((1, 16), NAN, device=DEVICE)
    multiply(torch.zeros(1, 768, dtype=DTYPE, device=DEVICE), weight, out, STORE, blocks=BLOCKS[0])
    assert (out == 0).all()


SM90_BLOCKS = [
    (5, GemmSm90(8, 64, 128, 3, 4, 2)), (16, GemmSm90(16, 64, 128, 1, 2)),
    (33, GemmSm90(64, 128, 128, 1, 3)), (70, GemmSm90(128, 64, 64, 2, 4)),
    (128, GemmSm90(128, 128, 64, 6, 3)),
]  # fmt: skip


def left_as_partials(x, weight, numbers, given, blocks):
    """Partials of the product are what they should be."""
    partials = Products(DEVICE, DTYPE).partials(given, weight, blocks)
    assert partials.shape == (blocks.split, len(x), len(numbers))
    each = x.shape[1] // blocks.split
    for part, a, b in zip(partials, x.split(each, 1), numbers.split(each, 1), strict=True):
        close(part, a.double() @ b.T, DTYPE)


@pytest.mark.skipif(not HOPPER, reason="gemm_sm90.py is for compute capability 9.0")
@pytest.mark.parametrize(("rows", "blocks"), SM90_BLOCKS, ids=str)
@pytest.mark.parametrize("format", [*FORMATS[1:3], FORMATS[4]], ids=str)
def test_arranged_rows(multiply, format, rows, blocks):  # noqa: F811
    """Of 384 outputs pairs of tiles, of 272 tiles are not whole."""
    x = randn(rows, 384, dtype=DTYPE)
    weight, numbers = weight_of(384, 384, format)
    product = x.double() @ numbers.T
    stored_and_gated(multiply, arranged(x), weight, product, arranged, blocks=blocks)
    left_as_partials(x, *weight_of(272, 384, format), arranged(x), blocks)


@pytest.mark.skipif(not HOPPER, reason="gemm_sm90.py is for compute capability 9.0")
@pytest.mark.parametrize("rows", [3, 40, 128])
def test_many_rows_of_plain_weights(multiply, rows):  # noqa: F811
    padded = max(8, 1 << (rows - 1).bit_length())
    x = randn(rows, 384, dtype=DTYPE)
    weight, numbers = weight_of(384, 384, None)
    stored_and_gated(
        multiply, x, weight, x.double() @ numbers.T, blocks=GemmSm90(padded, 128, 64, 1, 3)
    )
    left_as_partials(x, *weight_of(272, 384, None), x, GemmSm90(padded, 64, 64, 3, 4))


KERNELS = [(1, BLOCKS[0]), *([(5, SM90_BLOCKS[0][1])] if HOPPER else [])]


@pytest.mark.parametrize(("rows", "blocks"), KERNELS, ids=str)
@pytest.mark.parametrize("format", [Format("int8"), Format("int4", 64)], ids=str)
def test_queries_and_keys_are_rotated_and_stored(multiply, rows, blocks, format):  # noqa: F811
    heads, kv, size, slots, longest = 4, 2, 8, 6, 5
    weight, numbers = weight_of(64, 768, format)
    x = randn(rows, 768, dtype=DTYPE)
    cos, sin = randn(rows, size // 2, seed=2), randn(rows, size // 2, seed=3)
    slot = torch.tensor([3, 1, -1, 0, 5][:rows], dtype=torch.int32, device=DEVICE)
    position = torch.tensor([2, 5, 0, 4, 1][:rows], device=DEVICE)  # the second has no place
    k, v = (torch.zeros(slots, longest, kv, size, device=DEVICE) for _ in range(2))
    q = torch.full((rows, heads, size), NAN, device=DEVICE)
    if rows == 1:
        where = Rotation(cos, sin, slot, position, k, v)
        multiply(x, weight, q, ROTATE, rotation=where, blocks=blocks)
    else:
        partials = Products(DEVICE, DTYPE).partials(arranged(x), weight, blocks)
        there = (slot >= 0) & (position < longest)
        places = torch.where(there, slot * longest + position, -1)
        rotate_and_store(partials, cos, sin, places, k, v, heads, kv, q)
    y = (x.double() @ numbers.T).view(rows, heads + 2 * kv, size)
    close(q, rotated(y[:, :heads], cos, sin), DTYPE)
    expected_k, expected_v = torch.zeros_like(k), torch.zeros_like(v)
    keys = rotated(y[:, heads : heads + kv], cos, sin).float()
    for r in range(rows):
        if slot[r] >= 0 and position[r] < longest:
            expected_k[slot[r], position[r]] = keys[r]
            expected_v[slot[r], position[r]] = y[r, heads + kv :].float()
    close(k, expected_k, DTYPE)
    close(v, expected_v, DTYPE)


# ---- in the step


def logits_of(model, rows, monkeypatch, **changes):
    """Of a step of so many rows, and the keys that it stored, with other choices of kernels."""
    for name, value in changes.items():
        monkeypatch.setattr(dispatch if hasattr(dispatch, name) else Products, name, value)
    cache = model.new_cache(rows, 8)
    for part, seed in ((cache.k, 1), (cache.v, 2)):
        part.copy_(randn(*part.shape, seed=seed))
    step = CapturedStep(model, cache, rows)
    greedy = SamplingParams(temperature=0)
    step.load([Row(5 + r, 1 + r % 3, r, (), 9, 0, greedy, ()) for r in range(rows)])
    step.launch()
    step.read()
    return step.scratch.logits[:rows].clone(), cache.k.clone()


RECIPES = [None, "int8", "fp8", "int4"]


@pytest.mark.parametrize(
    ("recipe", "heads", "size"), [*((r, 2, 64) for r in RECIPES), ("int8", 4, 96)]
)
def test_a_step_of_one_row_by_gemv_is_the_one_without(recipe, heads, size, monkeypatch):
    shape = dict(dim=128, n_heads=heads, n_kv_heads=1, head_dim=size, hidden_dim=256, n_layers=2)
    model = quantized_model(recipe, DTYPE, **shape) if recipe else small(**shape).to(DTYPE)
    plain = logits_of(model, 1, monkeypatch, LEAST=10**9)
    ours = logits_of(model, 1, monkeypatch, LEAST=0, gemv_blocks=lambda *_: Gemv(32, 1, 8, 2))
    for mine, theirs in zip(ours, plain, strict=True):
        close(mine, theirs, DTYPE)


@pytest.mark.skipif(not HOPPER, reason="gemm_sm90.py is for compute capability 9.0")
@pytest.mark.parametrize(
    ("recipe", "heads", "size", "rows"),
    [
        *((recipe, 2, 64, 4) for recipe in RECIPES),
        *((recipe, 2, 64, 2) for recipe in (None, "int4")),
        ("int8", 4, 96, 4),
        # two rows are padded to eight as four are, and these weights unpacked as with four
        *(pytest.param(r, 2, 64, 2, marks=pytest.mark.slow) for r in ("int8", "fp8")),
        pytest.param("int8", 4, 96, 2, marks=pytest.mark.slow),
    ],
)
def test_a_step_of_several_rows_by_gemm_sm90_is_the_one_without(
    recipe, heads, size, rows, monkeypatch
):
    shape = dict(dim=128, n_heads=heads, n_kv_heads=1, head_dim=size, hidden_dim=256, n_layers=2)
    model = quantized_model(recipe, DTYPE, **shape) if recipe else small(**shape).to(DTYPE)
    monkeypatch.setattr(tuning, "LEAST_ROWS_SM90", dict.fromkeys(tuning.LEAST_ROWS_SM90, 2))
    monkeypatch.setattr(layers, "LEAST_ROWS_SM90", tuning.LEAST_ROWS_SM90)
    if DEVICE.type == "cuda":  # a tile for a multiprocessor
        monkeypatch.setattr(dispatch, "multiprocessors_and_memory", lambda _: (1, 227 * 1024))
    ours = logits_of(model, rows, monkeypatch)
    assert CapturedStep(model, model.new_cache(rows, 8), rows).layers.sm90 == [True, True]
    plain = logits_of(model, rows, monkeypatch, can_use_sm90=lambda *_: False)
    for mine, theirs in zip(ours, plain, strict=True):
        close(mine, theirs, DTYPE)


@pytest.mark.parametrize("least", [2, 3])
@pytest.mark.parametrize("recipe", [None, "int4"])
def test_scratch_of_captured_products_stays_where_it_is(recipe, least, monkeypatch):
    """A graph knows its address, so no number of rows may need more."""
    shape = dict(dim=128, n_heads=2, n_kv_heads=1, head_dim=64, hidden_dim=256, n_layers=1)
    model = quantized_model(recipe, DTYPE, **shape) if recipe else small(**shape).to(DTYPE)
    monkeypatch.setattr(layers, "LEAST_ROWS_SM90", dict.fromkeys(layers.LEAST_ROWS_SM90, least))
    some = dispatch.gemm_blocks
    split = lambda *given: some(*given)._replace(split=2, block_k=64)  # noqa: E731
    monkeypatch.setattr(dispatch, "gemm_blocks", split)
    made = CapturedStep(model, model.new_cache(4, 8), 4)
    scratch = [(t.data_ptr(), t.numel()) for t in made.products.split_k]
    for rows in (1, 2, 3, 4):
        greedy = SamplingParams(temperature=0)
        made.load([Row(5 + r, 1, r, (), 9, 0, greedy, ()) for r in range(rows)])
        made.launch()
        made.read()
    now = [(t.data_ptr(), t.numel()) for t in made.products.split_k]
    assert now == scratch


# ---- the tables

SHAPES = {
    "1B": (2048, 3072, 16384, 8192), "3B": (3072, 5120, 16384, 8192),
    "8B": (4096, 6144, 28672, 14336), "70B": (8192, 10240, 57344, 28672),
    "405B": (16384, 18432, 106496, 53248),
}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["", "int8", "fp8", "int4"])
def test_tables_have_blocks_for_every_released_shape(shape, kind):
    """K blocks are whole, splits not empty, and there are tiles for every multiprocessor."""
    dim, qkv, both, hidden = SHAPES[shape]
    for outputs, inputs in ((qkv, dim), (dim, dim), (both, dim), (dim, hidden), (128256, dim)):
        blocks = gemv_blocks(outputs, inputs, kind, 132)
        block_k = (64 if kind else 32) * blocks.slices * blocks.warps
        assert inputs % block_k == 0 or blocks.slices == 1
        assert -(-inputs // (block_k * blocks.split)) * block_k <= 16384
        for rows in (2, 8, 16, 32, 64, 128):
            blocks = gemm_sm90_blocks(rows, outputs, inputs, kind, 132, outputs == both)
            assert blocks.padded >= rows
            assert inputs % (blocks.block_k * blocks.split) == 0
            bits = {"": 16, "int4": 4}.get(kind, 8)
            weights = 2 * blocks.block_n * blocks.block_k * bits // 8
            stages = blocks.stages * (weights + 2 * blocks.padded * blocks.block_k)
            assert blocks.stages >= 3
            assert kind or outputs != both or blocks.block_n == 128
            assert blocks.programs * (stages + 3072) <= 227 * 1024
            assert gemm_blocks(rows, outputs, inputs, kind).padded >= rows


def test_a_gpu_with_less_memory_gets_fewer_stages():
    few = Products(DEVICE, DTYPE)
    few.shared = 99 * 1024
    for format in FORMATS:
        if format != Format("fp8"):
            weight, _ = weight_of(16, 14336, format)
            blocks = few.blocks(1, weight)
            assert dispatch.shared_memory(dispatch.source(weight), 14336, blocks) < 99 * 1024
