"""Packed weights in the kernels against the plain layers: in Triton's interpreter, or on a GPU
where there is one (the real shapes only there)."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_args

pytest.importorskip("triton", reason="triton is not installed")

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
from test_cuda_step import GREEDY, PROMPTS, answers, check, engine_of, small_blocks

from llama.cache import Batch
from llama.checkpoint import random_checkpoint
from llama.cuda import forward, layers, tuning
from llama.cuda.attention import decode as attention
from llama.cuda.forward import UNPACKED, FlatForward, joined, rows_at_once
from llama.cuda.products import dispatch
from llama.cuda.products.dispatch import ADD, GATE, ROTATE, STORE, Products, Rotation
from llama.cuda.products.unpack import Dequantizer, unpack
from llama.cuda.tuning import DecodeAttention, Gemm
from llama.cuda.weights import pairs_of
from llama.loading import load, make_plan
from llama.parallel import ONE
from llama.quantization import formats_of
from llama.quantization.linear import QuantizedLinear
from llama.quantization.packed import Format, Packed
from llama.quantization.rounding import quantize

KINDS = [Format("int8"), Format("fp8"), *(Format("int4", group) for group in (16, 32, 64, 128))]


def packed(outputs, inputs, format, seed=1):
    made = quantize(randn(outputs, inputs, seed=seed) / inputs**0.5, format)
    if made.offset is None:
        return made
    pairs = pairs_of(made)
    return Packed(made.weight, pairs[..., 0], pairs[..., 1])


def blocks_of(rows, format, inputs):
    """Tiles with an edge where the inputs have one."""
    run = max(32, format.group)
    return Gemm(max(16, rows), 32, run, 2 if inputs > run else 1, 2, 4)


@pytest.mark.parametrize("rows", [1, 5, 16])
@pytest.mark.parametrize(
    ("format", "inputs"),
    [*zip(KINDS, (160, 96, 160, 160, 192, 384), strict=True), (Format("int8"), 44)], ids=str,
)  # fmt: skip
def test_products_with_packed_weights(multiply, rows, format, inputs):  # noqa: F811
    weight, blocks = packed(72, inputs, format), blocks_of(rows, format, inputs)
    numbers = weight.unpack(torch.float32).double()
    for dtype in HALF:
        x = randn(rows, inputs, dtype=dtype)
        product = x.double() @ numbers.T
        out = torch.full((rows, 72), NAN, device=DEVICE)
        multiply(x, weight, out, STORE, blocks=blocks)
        close(out, product, dtype)
    residual = randn(rows, 72, seed=2)
    x = randn(rows, inputs)
    product = x.double() @ numbers.T
    expected = residual.double() + product
    close(multiply(x, weight, residual, ADD, blocks=blocks), expected, torch.float32)
    gate, up = product.chunk(2, 1)
    out = torch.full((rows, 36), NAN, device=DEVICE)
    close(multiply(x, weight, out, GATE, blocks=blocks), F.silu(gate) * up, torch.float32)


@pytest.mark.parametrize("format", [KINDS[0], KINDS[4]], ids=str)
def test_a_part_of_a_sum_may_have_no_inputs(multiply, format):  # noqa: F811
    """Three tiles of inputs in four parts: the last begins where the weight ends."""
    x, weight = randn(5, 3 * 64), packed(32, 3 * 64, format)
    out = torch.full((5, 32), NAN, device=DEVICE)
    multiply(x, weight, out, STORE, blocks=Gemm(16, 32, 64, 4, 2, 4))
    close(out, x.double() @ weight.unpack(torch.float32).double().T, torch.float32)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("format", [KINDS[0], KINDS[1], KINDS[3]], ids=str)
def test_packed_queries_are_rotated(multiply, rows, format):  # noqa: F811
    heads, kv, size = 4, 2, 8
    x, weight = randn(rows, 96), packed(64, 96, format)
    cos, sin = randn(rows, size // 2, seed=2), randn(rows, size // 2, seed=3)
    places = torch.arange(rows, dtype=torch.int32, device=DEVICE)
    k, v = (torch.zeros(rows, 4, kv, size, device=DEVICE) for _ in range(2))
    q = torch.full((rows, heads, size), NAN, device=DEVICE)
    where = Rotation(cos, sin, places, places, k, v)
    multiply(x, weight, q, ROTATE, rotation=where, blocks=blocks_of(rows, format, 96))
    y = (x @ weight.unpack(torch.float32).T).view(rows, -1, size)
    close(q, rotated(y[:, :heads], cos, sin), torch.float32)
    each = torch.arange(rows)
    close(k[each, each], rotated(y[:, heads : heads + kv], cos, sin), torch.float32)
    close(v[each, each], y[:, heads + kv :], torch.float32)


@pytest.mark.parametrize("format", KINDS, ids=str)
@pytest.mark.parametrize("dtype", HALF)
def test_unpacking_is_exact(format, dtype):
    weight = packed(9, 384, format)
    out = torch.full((9, 384), NAN, dtype=dtype, device=DEVICE)
    assert torch.equal(unpack(weight, out), weight.unpack(dtype))
    numbers = Dequantizer(9 * 384, dtype, DEVICE)
    assert torch.equal(numbers(weight.rows(2, 7)), weight.unpack(dtype)[2:7])
    assert numbers(out) is out


@pytest.mark.parametrize("format", [KINDS[1], KINDS[3]], ids=str)
def test_packed_layers_are_joined_once(format):
    whole = packed(24, 64, format)
    views = [QuantizedLinear(part, torch.float32) for part in whole.split([8, 16])]
    apart = [
        QuantizedLinear(part.each(torch.clone), torch.float32) for part in whole.split([8, 16])
    ]
    for modules, same in ((views, True), (apart, False)):
        found = joined(modules)
        assert isinstance(found, Packed)
        assert torch.equal(found.unpack(torch.float32), whole.unpack(torch.float32))
        assert (found.weight.data_ptr() == whole.weight.data_ptr()) is same
        assert found.scale.data_ptr() == modules[0].scale.data_ptr()
        assert joined(modules).weight.data_ptr() == modules[0].weight.data_ptr()


def test_a_tied_table_is_held_once():
    """Kernels read int4's scale and offset side by side, and both layers get these."""
    model = quantized_model({"layers": "int8", "output": "int4"}, tied=True)
    whole = model.tok_embeddings.dequantized()
    forward = FlatForward(model)
    for layer in (model.output, model.tok_embeddings):
        assert layer.scale.data_ptr() == forward.table.scale.data_ptr()
        assert layer.offset.data_ptr() == layer.scale.data_ptr() + 2
        assert torch.equal(layer.dequantized(), whole)


def quantized_model(recipe, dtype=torch.float32, **changes):
    """A model whose products are few in the interpreter."""
    shape = dict(dim=64, n_layers=1, n_heads=4, n_kv_heads=2, head_dim=16, hidden_dim=64)
    checkpoint = random_checkpoint(tiny_args(**{**shape, **changes}), seed=1, dtype=dtype)
    formats = formats_of(recipe, checkpoint.args)
    return load(checkpoint, ranks=ONE, device=DEVICE, formats=formats).eval()


def test_parts_of_a_packed_weight_begin_where_torch_is_fast():
    """2340 rows of w2 of the 8B were unpacked at a time, so that most parts of the result did not
    begin at a multiple of 16 bytes: prompts took 1.5 times as long as with plain weights."""
    for shape in ((4096, 14336), (28672, 4096), (128256, 4096), (8192, 28672)):
        parts = Format("int8").layout(*shape).items()
        packed = {n: torch.empty(s, dtype=d, device="meta") for n, (s, d) in parts}
        rows = rows_at_once(Packed(**packed))
        assert rows % 1024 == 0
        assert UNPACKED // 2 < rows * shape[1] <= UNPACKED


MIXED = {"layers.0": "int4", "layers.1": "int8", "output": "fp8", "embedding": "int4"}


SHORT = replace(GREEDY, max_tokens=3)


@pytest.mark.parametrize("recipe", ["int8", MIXED], ids=str)
def test_the_captured_step_of_a_quantized_model_is_the_plain_one(recipe, monkeypatch):
    if DEVICE.type == "cpu":
        few = DecodeAttention(3, 16, 2, 4, ahead=16)
        monkeypatch.setattr(attention, "decode_attention_blocks", lambda *_: few)
        monkeypatch.setattr(dispatch, "gemm_blocks", small_blocks)
    model = quantized_model(recipe, n_layers=2 if recipe is MIXED else 1)
    plain = answers(engine_of(model, False), PROMPTS[:2], SHORT)
    check(answers(engine_of(model, True), PROMPTS[:2], SHORT), plain)


def test_more_rows_than_our_products_take(monkeypatch):
    few = DecodeAttention(3, 16, 2, 4, ahead=16)
    monkeypatch.setattr(attention, "decode_attention_blocks", lambda *_: few)
    monkeypatch.setattr(layers, "MOST_ROWS", dict.fromkeys(tuning.MOST_ROWS, 0))
    monkeypatch.setattr(forward, "UNPACKED", 40 * 64)  # 40 rows of 64 inputs
    model = quantized_model("int4")
    plain = answers(engine_of(model, False), PROMPTS[:2], SHORT)
    check(answers(engine_of(model, True), PROMPTS[:2], SHORT), plain)


@pytest.mark.parametrize("recipe", ["int4", MIXED], ids=str)
def test_the_forward_of_a_quantized_model_is_the_plain_one(recipe):
    model = quantized_model(recipe, n_layers=2 if recipe is MIXED else 1, tied=recipe == "int4")
    fast = FlatForward(model)
    batch = Batch([1, 5], [3, 5], [1, 0], DEVICE)
    positions = torch.tensor([2, 0, 1, 2, 3, 4], device=DEVICE)
    results = []
    for run in (model, fast):
        cache = model.new_cache(2, 16)
        cache.k.copy_(randn(*cache.k.shape))
        cache.v.copy_(randn(*cache.v.shape, seed=1))
        h = run.hidden(positions + 7, positions, batch, cache)
        results.append((h, run.logits(h), cache.k))
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    formats = formats_of(recipe, model.params)
    plan = make_plan(model.params, dtype=torch.float32, formats=formats, device="cuda")
    assert plan.unpacked == fast.numbers.scratch.nbytes


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 2, 8, 16, 32, 64, 100, 128])
@pytest.mark.parametrize(("outputs", "inputs"), [(6144, 4096), (4096, 14336), (4096, 4096)])
@pytest.mark.parametrize("format", KINDS, ids=str)
def test_real_packed_products(multiply, rows, outputs, inputs, format):  # noqa: F811
    x = randn(rows, inputs, dtype=torch.bfloat16)
    weight = packed(outputs, inputs, format)
    products = Products(DEVICE, torch.bfloat16)
    sm90 = rows > 1 and products.can_use_sm90(weight)
    given = arranged(x) if sm90 else x
    product = x.double() @ weight.unpack(torch.float32).double().T
    plain = (x @ weight.unpack(torch.bfloat16).T).double()
    theirs = (plain - product).norm() / product.norm()
    for _ in range(3):
        out = torch.full((rows, outputs), NAN, device=DEVICE, dtype=torch.bfloat16)
        multiply(given, weight, out, STORE, sm90=sm90)
        assert (out.double() - product).norm() / product.norm() <= 1.1 * theirs
    if sm90:
        added = products.partials(given, weight).sum(0)
        assert (added.double() - product).norm() / product.norm() <= 1.1 * theirs
    else:
        residual = torch.zeros((rows, outputs), device=DEVICE, dtype=torch.bfloat16)
        close(multiply(x, weight, residual, ADD), product, torch.bfloat16)
    gated = torch.full((rows, outputs // 2), NAN, device=DEVICE, dtype=torch.bfloat16)
    gate, up = product.chunk(2, 1)
    expected = F.silu(gate) * up
    multiply(given, weight, gated, GATE, sm90=sm90)
    close(gated, arranged(expected) if sm90 else expected, torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("format", KINDS, ids=str)
def test_real_unpacking_is_exact(format):
    weight = packed(4096, 14336, format)
    out = torch.empty(4096, 14336, dtype=torch.bfloat16, device=DEVICE)
    assert torch.equal(unpack(weight, out), weight.unpack(torch.bfloat16))
