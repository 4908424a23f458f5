"""The kernels of few rows against plain torch: in Triton's interpreter, or on a GPU where there is
one (the real shapes only there)."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

cuda = pytest.importorskip("triton", reason="triton is not installed") and pytest.importorskip(
    "llama.cuda.products.dispatch"
)
import cubins  # noqa: E402

from llama.cuda.attention import decode as attention  # noqa: E402
from llama.cuda.attention.decode import DecodeAttention  # noqa: E402
from llama.cuda.norm_rope_gate import rms_norm  # noqa: E402
from llama.cuda.products.dispatch import ADD, GATE, ROTATE, STORE, Products, Rotation  # noqa: E402
from llama.cuda.tuning import DecodeAttention as AttentionBlocks  # noqa: E402
from llama.cuda.tuning import Gemm  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NAN = float("nan")
# The interpreter takes the bits of bfloat16 for integers in tl.dot.
HALF = [torch.float32, torch.bfloat16 if DEVICE.type == "cuda" else torch.float16]


def rotated(x, cos, sin):
    a, b, c, s = x[..., ::2], x[..., 1::2], cos[:, None], sin[:, None]
    return torch.stack([a * c - b * s, a * s + b * c], -1).flatten(-2)


def randn(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator).to(DEVICE, dtype)


def close(ours, expected, dtype):
    """Within what rounding to `dtype` explains, everywhere, and nothing left unwritten."""
    bound = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}[dtype]
    error = (ours.double() - expected.double()).abs() / (1 + expected.double().abs())
    assert error.max() < bound, error.max()  # NaN fails too


def arranged(x):
    """Rows as gemm_sm90.py reads them: the bits h t t i j p of an index in sixty-four as h i j t t
    p."""
    sixty_fours = x.unflatten(-1, (-1, 2, 4, 2, 2, 2))  # ..., h, t, i, j, p
    return sixty_fours.transpose(-4, -3).transpose(-3, -2).flatten(-6)


@pytest.fixture(scope="module")
def multiply():
    """A product by the kernels of its rows' dtype, with the scratch of products before it."""
    made = {dtype: Products(DEVICE, dtype) for dtype in (torch.float32, *HALF[1:])}
    return lambda x, *args, **options: made[x.dtype](x, *args, **options)


BLOCKS = [
    (1, None), (1, Gemm(16, 32, 32, 2, 2, 4)), (2, None), (5, Gemm(32, 16, 32, 2, 2, 4)),
    (17, Gemm(32, 32, 32, 3, 2, 4)), (64, Gemm(64, 32, 64, 1, 2, 4)),
]  # fmt: skip


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(("rows", "blocks"), BLOCKS)
@pytest.mark.parametrize("inputs", [64, 160])
def test_products_with_their_epilogues(multiply, rows, blocks, inputs, dtype):
    x, w = randn(rows, inputs, dtype=dtype), randn(72, inputs, dtype=dtype, seed=1) / 8
    product = x.double() @ w.double().T
    out = torch.full((rows, 72), NAN, device=DEVICE)
    close(multiply(x, w, out, STORE, blocks=blocks), product, dtype)
    residual = randn(rows, 72, dtype=dtype, seed=2)
    expected = residual.double() + product
    close(multiply(x, w, residual, ADD, blocks=blocks), expected, dtype)
    gate, up = product.chunk(2, 1)
    out = torch.full((rows, 36), NAN, device=DEVICE, dtype=dtype)
    close(multiply(x, w, out, GATE, blocks=blocks), F.silu(gate) * up, dtype)


@pytest.mark.parametrize(("rows", "blocks"), BLOCKS)
@pytest.mark.parametrize("size", [8, 18])
def test_queries_and_keys_are_rotated_and_stored(multiply, rows, blocks, size):
    heads, kv, slots, longest = 4, 2, 70, 5
    x, w = randn(rows, 96), randn(8 * size, 96, seed=1) / 8
    cos, sin = randn(rows, size // 2, seed=2), randn(rows, size // 2, seed=3)
    slot = torch.randperm(slots, generator=torch.Generator().manual_seed(4))[:rows].int()
    if rows > 1:
        slot[rows // 2] = -1
    position = torch.arange(rows).int() % (longest + 1)  # one past the end is stored nowhere
    k, v = (torch.zeros(slots, longest, kv, size, device=DEVICE) for _ in range(2))
    q = torch.full((rows, heads, size), NAN, device=DEVICE)
    where = Rotation(cos, sin, slot.to(DEVICE), position.to(DEVICE), k, v)
    multiply(x, w, q, ROTATE, rotation=where, blocks=blocks)
    y = (x @ w.T).view(rows, heads + 2 * kv, size)
    close(q, rotated(y[:, :heads], cos, sin), torch.float32)
    expected_k, expected_v = torch.zeros_like(k), torch.zeros_like(v)
    for r in range(rows):
        if slot[r] >= 0 and position[r] < longest:
            keys = rotated(y[r : r + 1, heads : heads + kv], cos[r : r + 1], sin[r : r + 1])
            expected_k[slot[r], position[r]] = keys[0]
            expected_v[slot[r], position[r]] = y[r, heads + kv :]
    close(k, expected_k, torch.float32)
    close(v, expected_v, torch.float32)


def test_rows_are_normed_and_arranged():
    x, gain = randn(3, 192), 1 + randn(192, seed=2) / 8
    normed = rms_norm(x, gain, 1e-5, arranged=True)
    close(normed, arranged(F.rms_norm(x, (192,), gain, 1e-5)), torch.float32)


def attended(q, k, v, slots, lengths):
    """Attention of each row in float64."""
    rows = []
    for r, (slot, length) in enumerate(zip(slots.tolist(), lengths.tolist(), strict=True)):
        keys, values = (
            t[slot, :length].double().repeat_interleave(q.shape[1] // k.shape[2], 1) for t in (k, v)
        )
        scores = torch.einsum("he,lhe->hl", q[r].double(), keys) * q.shape[-1] ** -0.5
        rows.append(torch.einsum("hl,lhe->he", scores.softmax(-1), values))
    return torch.stack(rows)


def ragged(rows, heads, kv, size, longest, dtype=torch.float32):
    """Random rows in slots out of order, NaN behind what each has."""
    q = randn(rows, heads, size, dtype=dtype)
    k, v = (randn(rows + 2, longest, kv, size, dtype=dtype, seed=s) for s in (1, 2))
    generator = torch.Generator().manual_seed(rows)
    slots = torch.randperm(rows + 2, generator=generator)[:rows].int().to(DEVICE)
    lengths = torch.randint(1, longest + 1, (rows,), generator=generator).int().to(DEVICE)
    lengths[-1] = longest
    for slot, length in zip(slots.tolist(), lengths.tolist(), strict=True):
        k[slot, length:] = v[slot, length:] = NAN
    return q, k, v, slots, lengths


@pytest.mark.parametrize(
    ("rows", "heads", "kv", "size", "longest", "programs", "block"),
    [(1, 4, 2, 16, 90, 4, 16), (3, 8, 2, 32, 70, 5, 16), (5, 2, 2, 16, 150, 8, 32),
     (2, 6, 2, 64, 40, 3, 16), (20, 2, 1, 16, 40, 24, 16), (1, 4, 4, 16, 1, 4, 16),
     (3, 4, 2, 96, 50, 5, 16), (2, 4, 4, 100, 40, 4, 16), (2, 6, 3, 18, 40, 4, 16)],
)  # fmt: skip
def test_attention_split_over_ragged_rows(
    monkeypatch, rows, heads, kv, size, longest, programs, block
):
    monkeypatch.setattr(
        attention, "decode_attention_blocks", lambda *_: AttentionBlocks(programs, block, 2, 4)
    )
    q, k, v, slots, lengths = ragged(rows, heads, kv, size, longest)
    kernel = DecodeAttention(rows, heads, kv, size, DEVICE)
    kernel.partials.acc.fill_(NAN)
    for _ in range(2):  # the second time with the counters that the first one left
        out = torch.full_like(q, NAN)
        kernel(q, k, v, slots, lengths, out)
        close(out, attended(q, k, v, slots, lengths), torch.float32)
    if heads * size % 64 == 0:
        mixed = out.flatten(1)
        kernel(q, k, v, slots, lengths, out := torch.full_like(q, NAN), arranged=True)
        assert torch.equal(out.flatten(1), arranged(mixed))
    if rows > 1:
        lengths[1] = 0
        out.fill_(7)
        kernel(q, k, v, slots, lengths, out)
        assert (out[1] == 7).all()
        assert out[0].ne(7).all()


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 2, 8, 16, 32, 64, 100, 128])
@pytest.mark.parametrize(("outputs", "inputs"), [(6144, 4096), (4096, 14336), (4096, 4096)])
def test_real_products(multiply, rows, outputs, inputs):
    x = randn(rows, inputs, dtype=torch.bfloat16)
    w = (randn(outputs, inputs, seed=1) / inputs**0.5).bfloat16()
    product = x.double() @ w.double().T
    plain = (x @ w.T).double()
    for _ in range(3):
        out = torch.full((rows, outputs), NAN, device=DEVICE)
        multiply(x, w, out, STORE)
        ours = (out.double() - product).norm() / product.norm()
        assert ours <= 1.1 * (plain - product).norm() / product.norm()
    residual = torch.zeros((rows, outputs), device=DEVICE, dtype=torch.bfloat16)
    close(multiply(x, w, residual, ADD), product, torch.bfloat16)
    gated = torch.full((rows, outputs // 2), NAN, device=DEVICE, dtype=torch.bfloat16)
    gate, up = product.chunk(2, 1)
    close(multiply(x, w, gated, GATE), F.silu(gate) * up, torch.bfloat16)
    products = Products(DEVICE, torch.bfloat16)
    if products.can_use_sm90(w):
        for _ in range(3):
            ours = (products.partials(x, w).sum(0).double() - product).norm() / product.norm()
            assert ours <= 1.1 * (plain - product).norm() / product.norm()
            gated.fill_(NAN)
            multiply(x, w, gated, GATE, sm90=True)
            close(gated, F.silu(gate) * up, torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("rows", "longest"), [(1, 8000), (1, 100), (7, 3000), (32, 1024), (128, 700)]
)
@pytest.mark.parametrize(
    ("heads", "kv", "size"),
    [(32, 8, 128), (32, 8, 64), (24, 8, 128), (32, 8, 96), (16, 4, 100), (16, 4, 256)],
)
def test_real_attention(rows, longest, heads, kv, size):
    attention_is_exact(rows, longest, heads, kv, size, torch.bfloat16, 5e-3, 20)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 3, 32])
@pytest.mark.parametrize(
    ("heads", "kv", "size"),
    [(32, 32, 128), (40, 40, 128), (32, 8, 64), (8, 2, 96), (8, 2, 100), (8, 2, 256)],
)
def test_real_attention_in_float32(rows, heads, kv, size):
    """Also of Llama 2, whose key heads are as many as its query heads."""
    attention_is_exact(rows, 700, heads, kv, size, torch.float32, 1e-5, 3)


def attention_is_exact(rows, longest, heads, kv, size, dtype, bound, times):
    q, k, v, slots, lengths = ragged(rows, heads, kv, size, longest, dtype)
    kernel = DecodeAttention(rows, heads, kv, size, DEVICE)
    expected = attended(q, k, v, slots, lengths)
    for _ in range(times):
        for long in (False, True):
            out = torch.full_like(q, NAN)
            kernel(q, k, v, slots, lengths, out, long)
            assert (out.double() - expected).norm() / expected.norm() < bound


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 3, 8, 32])
def test_real_products_in_float32(multiply, rows):
    x, w = randn(rows, 4096), randn(4096, 4096, seed=1) / 64
    product = x.double() @ w.double().T
    out = torch.full((rows, 4096), NAN, device=DEVICE)
    multiply(x, w, out, STORE)
    assert (out.double() - product).norm() / product.norm() < 1e-5


COMPILE = """
import torch
from cubins import spilled
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

class NoGpu:
    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)
    def get_current_device(self):
        return 0
    def get_current_stream(self, device=None):
        return 0

driver.set_active(NoGpu())
run = JITFunction.run
def only(self, *args, grid, warmup, **options):
    kernel = run(self, *args, grid=grid, warmup=True, **options)
    ptx = kernel.asm["ptx"]
    counts = [ptx.count(word) for word in ("griddepcontrol.wait", "mma", "cp.async.bulk.tensor")]
    print(self.__name__, len(kernel.asm["cubin"]), kernel.metadata.shared, *counts, spilled(kernel))
JITFunction.run = only
from llama.cuda.attention import decode as attention
from llama.cuda.products import dispatch as room
from llama.quantization.packed import Format, Packed
from llama.cuda.attention.decode import DecodeAttention
from llama.cuda.products.dispatch import ADD, GATE, ROTATE, STORE, Products, Rotation
from llama.cuda.products.gemv_layouts import shared_memory
from llama.cuda.tuning import LEAST_ROWS_SM90, GemmSm90
from llama.cuda.weights import pairs_of, source
room.overlap = attention.overlap = lambda device: {"OVERLAP": True, "launch_pdl": True}
room.capability = lambda device: (9, 0)
def new(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype)
def weight(kind):
    if not kind:
        return new(1024, 1024)
    format = Format(kind, 64 if kind == "int4" else 0)
    made = Packed(*(new(*s, dtype=d) for s, d in format.layout(1024, 1024).values()))
    pairs = pairs_of(made) if made.offset is not None else None
    return made if pairs is None else Packed(made.weight, pairs[..., 0], pairs[..., 1])
device = torch.device("cpu")
products = Products(device, torch.bfloat16)
cache = new(2, 32, 2, 128)
for rows in (1, 8, 128):
    turns, where = new(rows, 64, dtype=torch.float32), new(rows, dtype=torch.int64)
    rotation = Rotation(turns, turns, where, where, cache, cache)
    for kind in ("", "int8", "fp8", "int4"):
        w = weight(kind)
        norm = (new(1024), 1e-5) if products.fuses_norm(rows, w) else None
        sm90 = products.can_use_sm90(w) and rows >= LEAST_ROWS_SM90[kind]
        blocks = products.blocks(rows, w, sm90, True)
        print("expected", shared_memory(source(w), 1024, blocks) if rows == 1 else 0)
        products(new(rows, 1024), w, new(rows, 512), GATE, norm=norm, sm90=sm90)
        if sm90:
            small, large = GemmSm90(rows, 64, 128, 1, 5, 2), GemmSm90(rows, 128, 64, 1, 4)
            blocks = small if rows == 8 else large
            products(new(rows, 1024), w, new(rows, 512), GATE, blocks=blocks)
        if rows == 8:
            x = new(rows, 1024)
            if sm90:
                products.partials(x, w)
            else:
                products(x, w, new(rows, 4, 128), ROTATE, rotation=rotation)
    attend = DecodeAttention(rows, 4, 2, 128, device)
    attend(new(rows, 4, 128), cache, cache, where, where, new(rows, 4, 128), arranged=rows > 1)
products.capability = (8, 0)  # but with the instructions of 9.0: stages filled without TMA
for kind in ("", "int4"):
    products(new(1, 1024), weight(kind), new(1, 512), GATE, norm=(new(1024), 1e-5))
"""


def test_kernels_compile_for_compute_capability_9_without_a_gpu():
    """What the interpreter cannot show: each waits for what was launched before it, has products on
    the tensor cores, and of a row, stages that the copy engine fills, of the size that is known."""
    cubins.need_tools()
    command = [sys.executable, "-c", COMPILE]
    done = subprocess.run(command, env=cubins.environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line.split() for line in done.stdout.splitlines()]
    found = [(name, *map(int, numbers)) for name, *numbers in lines if name != "expected"]
    some = ["gemm"] * 2 + ["gemm_sm90"] * 9
    expected = ["gemv"] * 4 + ["_attend"] + some + ["_attend"] + ["gemm_sm90"] * 8 + ["_attend"]
    assert [name for name, *_ in found] == [*expected, "gemv", "gemv"]
    assert all(size > 1000 and waits >= 1 and mma >= 1 for _, size, _, waits, mma, *_ in found)
    assert all(spilled <= 128 for name, *_, spilled in found if name == "gemm_sm90"), found
    sizes = [int(numbers[0]) for name, *numbers in lines if name == "expected"][:4]
    for (_, _, memory, _, _, copies, _), size in zip(found[:4], sizes, strict=True):
        assert copies >= 2
        assert size <= memory <= size + 1024
    assert all(copies == 0 for *_, copies, _ in found[-2:])
