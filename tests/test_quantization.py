"""Laws of packed weights: what they stand for, that layers compute with just that, that no cut and
no file changes a value, and what it costs in quality."""

import gc
import json
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import BYTES_VOCAB, tiny_args, write_adapter, write_tokenizer
from ranks_worker import answers, build
from test_ranks import launch, same_answers

from llama import Llama, parallel
from llama.checkpoint import (
    merge_adapter,
    open_checkpoint,
    random_checkpoint,
    source,
    write_gguf,
    write_hf,
    write_meta,
    write_quantized,
)
from llama.checkpoint.quantized.read import FILE, PackedTensor
from llama.checkpoint.source import LazyTensor
from llama.commands.compare import Difference
from llama.demo.quantized import difference, held_out_rows
from llama.loading import check, load, make_plan
from llama.model import ModelArgs
from llama.parallel import ONE, OutputLinear, Ranks
from llama.quantization import (
    QuantizedEmbedding,
    QuantizedLinear,
    check_ranks,
    formats_of,
    linear,
    parse_recipe,
    quantize,
)
from llama.quantization import rounding as formats
from llama.quantization.packed import Format, Packed, join_nibbles

DEMO = Path(__file__).parent.parent / "llama" / "demo"
FORMATS = [Format("int8"), Format("fp8"), Format("int4", 32), Format("int4", 64)]
FINE = {"layers.0": "int8", "layers.1": "int4", "output": "fp8", "embedding": "int4-32"}
each_format = pytest.mark.parametrize("format", FORMATS, ids=str)


def numbers(rows=24, columns=128, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator).to(dtype)


def same(a, b):
    """Equal to the last bit."""
    return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def parameters_equal(model, other):
    ours, theirs = dict(model.named_parameters()), dict(other.named_parameters())
    return ours.keys() == theirs.keys() and all(same(ours[n], theirs[n]) for n in ours)


# ---- formats


def test_int8_and_fp8_round_to_the_nearest_by_the_largest_of_a_row():
    matrix = numbers(dtype=torch.bfloat16)
    matrix[3] = 0
    largest = matrix.float().abs().amax(1)
    for format, top in ((Format("int8"), 127), (Format("fp8"), 448)):
        packed = quantize(matrix, format)
        expected = torch.where(largest == 0, 1.0, largest / top)
        assert torch.equal(packed.scale, expected)
        error = (packed.unpack(torch.float32) - matrix).abs()
        step = packed.scale[:, None]
        if format.kind == "fp8":  # 3 bits after the first, or the smallest numbers' distance
            step = torch.maximum(matrix.float().abs() / 8, step * 2**-9)
        assert (error <= step / 2 * 1.001).all()
        assert packed.weight.float().abs().amax(1)[0] == top


def test_int8_ties_go_to_even():
    row = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5] + [0.0] * 10])
    assert quantize(row, Format("int8")).weight[0, :6].tolist() == [127, 0, 2, 2, 0, -2]


@pytest.mark.parametrize("group", [16, 32, 64, 128])
def test_the_bytes_of_int4_are_what_the_page_says(group):
    """Read here by loops, from scratch."""
    packed = quantize(numbers(3, 2 * group), Format("int4", group))
    assert packed.weight.shape == (3, group)
    assert packed.weight.dtype == torch.uint8
    assert packed.scale.shape == packed.offset.shape == (3, 2)
    assert packed.scale.dtype == packed.offset.dtype == torch.bfloat16
    got = packed.unpack(torch.float32)
    for row in range(3):
        for at in range(2 * group):
            g, i = divmod(at, group)
            byte = int(packed.weight[row, g * group // 2 + i % (group // 2)])
            q = byte & 15 if i < group // 2 else byte >> 4
            expected = q * float(packed.scale[row, g]) + float(packed.offset[row, g])
            assert float(got[row, at]) == pytest.approx(expected, abs=1e-6)


def plain_int4(matrix, group):
    """Minimum and maximum of a group are codes 0 and 15."""
    groups = matrix.float().unflatten(1, (-1, group))
    pair = formats.range_pair(groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True))
    codes = formats._codes(groups, *pair).to(torch.uint8)
    return Packed(join_nibbles(codes), *(each[..., 0].bfloat16() for each in pair))


def test_the_search_is_never_worse_and_on_the_whole_much_better_than_plain_rounding():
    for group in (32, 64, 128):
        matrix = numbers(512, 256)
        errors = [
            (packed.unpack(torch.float32) - matrix).square().unflatten(1, (-1, group)).sum(-1)
            for packed in (quantize(matrix, Format("int4", group)), plain_int4(matrix, group))
        ]
        assert (errors[0] <= errors[1] * 1.0001).all()
        assert errors[0].sum() < 0.86 * errors[1].sum()


@each_format
def test_odd_numbers_are_packed_and_none_that_are_not_finite(format):
    for value in (0.0, 3.0, -1e-20, 1e-38, 1e4):
        flat = torch.full((2, 128), value)
        got = quantize(flat, format).unpack(torch.float32)
        assert got.isfinite().all()
        assert torch.allclose(got, flat, rtol=2**-8, atol=1e-28)
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="not finite"):
            quantize(flat.index_fill(1, torch.tensor([5]), value), format)


@each_format
def test_blocks_and_dtypes_do_not_change_what_is_packed(format, monkeypatch):
    matrix = numbers(50, dtype=torch.bfloat16)
    whole = quantize(matrix, format)
    monkeypatch.setattr(formats, "_BLOCK", {"cpu": 7 * 128})
    for other in (quantize(matrix, format), quantize(matrix.float(), format)):
        assert all(same(a, b) for a, b in zip(whole, other, strict=True) if a is not None)
    assert whole.format == format
    assert whole.shape == (50, 128)
    assert whole.nbytes == format.nbytes(50, 128)


@each_format
@pytest.mark.parametrize("cut", [(0, 64), (64, 128), (32, 96), (16, 48), (112, 128)])
def test_a_cut_never_changes_a_value(format, cut):
    packed = quantize(numbers(), format)
    part = packed.columns(*cut)
    assert torch.equal(part.unpack(torch.float32), packed.unpack(torch.float32)[:, slice(*cut)])
    rows = packed.rows(3, 9)
    assert torch.equal(rows.unpack(torch.float32), packed.unpack(torch.float32)[3:9])


def test_all_codes_of_fp8_are_read_as_torch_reads_them():
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[(codes & 127) != 127].view(torch.float8_e4m3fn)[None]
    packed = Packed(codes, torch.ones(1))
    assert torch.equal(packed.unpack(torch.float32), codes.float())


# ---- layers


@each_format
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [(1,), (3,), (2, 5), (40,), (0,)])
def test_a_product_is_that_of_the_unpacked_weights(format, dtype, rows, monkeypatch):
    packed = quantize(numbers(96), format)
    x = numbers(1, 128, seed=1)[0].expand(*rows, 128).to(dtype)
    layer = QuantizedLinear(packed, dtype)
    assert layer.dequantized().dtype == dtype
    expected = F.linear(x.float(), layer.dequantized().float())
    close = dict(rtol=0, atol=1e-4 if dtype == torch.float32 else 0.02 * 128**0.5)
    torch.testing.assert_close(layer(x).float(), expected, **close)
    monkeypatch.setattr(linear, "_BLOCK", {"cpu": 10 * 128})
    torch.testing.assert_close(layer(x).float(), expected, **close)


def test_torchs_int8_product_agrees_with_the_plain_one():
    packed = quantize(numbers(300, 256), Format("int8"))
    x = numbers(7, 256, seed=2, dtype=torch.bfloat16)
    exact = F.linear(x.double(), packed.unpack(torch.float32).double())
    error = (linear.int8_product(x, packed).double() - exact).abs()
    assert (error <= exact.abs() * 2**-7 + 1e-3).all()
    assert linear._torchs_own(packed, x)
    assert not linear._torchs_own(packed, x.float())
    assert not linear._torchs_own(packed, x.repeat(9, 1))


@each_format
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_quantized_logits_are_float32_from_the_product_on(format, rows, monkeypatch):
    packed = quantize(numbers(400), format)
    layer = linear.quantized(OutputLinear(128, 400, bias=False), packed, torch.bfloat16)
    x = numbers(rows, 128, seed=1, dtype=torch.bfloat16)
    exact = F.linear(x.double(), packed.unpack(torch.float32).double())
    rounded = F.linear(x.double(), layer.dequantized().double())
    for block in (2**20, 10 * 128):
        monkeypatch.setattr(linear, "_BLOCK", {"cpu": block})
        logits = layer(x)
        assert logits.dtype == torch.float32
        errors = [float((logits - numbers).abs().max()) for numbers in (exact, rounded)]
        assert min(errors) < 1e-4, errors  # of the weights, or of them in the layer's dtype


@pytest.mark.parametrize("recipe", [None, "int8", "fp8", "int4"])
def test_logits_of_several_ranks_are_float32_from_the_product_on(recipe, monkeypatch):
    """The parts of two ranks, as they are before they are gathered."""
    checkpoint = random_checkpoint(tiny_args(), dtype=torch.bfloat16)
    ours = formats_of(recipe, checkpoint.args) if recipe else {}
    monkeypatch.setattr(parallel, "gathered", lambda part: part)
    monkeypatch.setattr(linear, "gathered", lambda part: part)
    monkeypatch.setattr(parallel.mappings, "copy_to_model_parallel_region", lambda states: states)
    h = numbers(5, 64, dtype=torch.bfloat16)
    with torch.no_grad():
        whole, *parts = (
            load(checkpoint, ranks=ranks, device="cpu", formats=ours).output(h)
            for ranks in (ONE, Ranks(0, 2), Ranks(1, 2))
        )
    assert {part.dtype for part in (whole, *parts)} == {torch.float32}
    torch.testing.assert_close(torch.cat(parts, -1), whole, rtol=0, atol=1e-5)


def test_one_warning_says_what_packed_weights_cost_on_several_ranks(caplog):
    checkpoint = checkpoint_of()
    for ranks in (ONE, Ranks(1, 2, is_main=False)):
        load_by(checkpoint, "int8", ranks)
    load(checkpoint, ranks=Ranks(0, 2), device="cpu", formats={})
    assert not caplog.records
    load_by(checkpoint, "int8", Ranks(0, 2))
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "2 ranks run without kernels" in caplog.text


@each_format
def test_a_row_of_a_table_is_gathered_and_unpacked(format):
    packed = quantize(numbers(40), format)
    layer = QuantizedEmbedding(packed, torch.bfloat16)
    ids = torch.tensor([[3, 39], [0, 3]])
    assert torch.equal(layer(ids), packed.unpack(torch.bfloat16)[ids])


# ---- recipes


ARGS = tiny_args(n_layers=8, hidden_dim=192)


@pytest.mark.parametrize(
    ("recipe", "layers", "output", "embedding"),
    [
        ("int8", ["int8"] * 8, "int8", None),
        ("fp8", ["fp8"] * 8, "fp8", None),
        ("int4", ["int4-64"] * 8, "int8", "int8"),
        ("int4-32", ["int4-32"] * 8, "int8", "int8"),
        ("mixed", ["int8"] * 2 + ["int4-64"] * 4 + ["int8"] * 2, "int8", None),
        ({"layers": "fp8"}, ["fp8"] * 8, None, None),
        ({"layers.0,2-3": "int8", "layers.7": "int4"},
         ["int8", None, "int8", "int8", None, None, None, "int4-64"], None, None),
        ('{"embedding": "int8", "output": "int4"}', [None] * 8, "int4-64", "int8"),
    ],
)  # fmt: skip
def test_a_recipe_says_which_matrix_is_packed_how(recipe, layers, output, embedding):
    found = {name: str(format) for name, format in formats_of(recipe, ARGS).items()}
    for layer, format in enumerate(layers):
        for kind in ("attention.wq", "attention.wo", "feed_forward.w2", "feed_forward.w3"):
            assert found.get(f"layers.{layer}.{kind}.weight") == format
    assert found.get("output.weight") == output
    assert found.get("tok_embeddings.weight") == embedding
    assert not any("norm" in name for name in found)


@pytest.mark.parametrize(
    ("recipe", "says"),
    [
        ("int3", "quantize='int3': use one of int8, fp8, int4, int4-32, int4-128, mixed, or parts"),
        ("", "use one of"),
        ({}, "use one of"),
        (["int8"], "use one of"),
        (8, "quantize=8: use one of"),
        ("{", "is not the JSON it should be"),
        ('{"output": "int8", "output": "fp8"}', "comes twice"),
        ({"output": "mixed"}, "'output' is to be 'mixed'; use one of int8"),
        ({"output": None}, "'output' is to be None"),
        ({"norm": "int8"}, "'norm' is no part of a model; parts are layers"),
        ({"layers.": "int8"}, "is no part"),
        ({"layers.1-2-3": "int8"}, "is no part"),
        ({"layers.0-8": "int8"}, "'layers.0-8' has '0-8'; this model's layers are 0-7"),
        ({"layers.3-2": "int8"}, "has '3-2'"),
        ({"layers.0-3": "int8", "layers.3": "int4"}, "layer 3 stands in several parts"),
    ],
)
def test_a_recipe_that_is_none_is_refused_in_a_sentence(recipe, says):
    with pytest.raises(ValueError, match="quantize") as caught:
        formats_of(recipe, ARGS)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_recipe_of_a_command_line_is_the_same_as_in_python():
    assert parse_recipe(json.dumps(FINE)) == parse_recipe(FINE) == FINE
    assert formats_of(json.dumps(FINE), tiny_args()) == formats_of(FINE, tiny_args())


def test_groups_that_do_not_divide_are_the_next_that_do():
    args = tiny_args(hidden_dim=48)
    found = formats_of("int4-128", args)
    assert str(found["layers.0.feed_forward.w1.weight"]) == "int4-64"
    assert str(found["layers.0.feed_forward.w2.weight"]) == "int4-16"
    with pytest.raises(ValueError, match=r"w2.weight has 40 inputs, which are no multiple of 16"):
        formats_of("int4", tiny_args(hidden_dim=40))
    with pytest.raises(
        ValueError, match=r"4 ranks would cut .* these numbers of ranks work: \[1\]"
    ):
        check_ranks(found, args, 4)
    check_ranks(formats_of("int8", args), args, 4)


def test_in_a_tied_model_the_output_speaks_for_the_embedding():
    args = tiny_args(tied=True)
    assert str(formats_of("int4", args)["tok_embeddings.weight"]) == "int8"
    assert "output.weight" not in formats_of("int4", args)
    assert "tok_embeddings.weight" not in formats_of({"layers": "int4"}, args)
    with pytest.raises(ValueError, match="output and embedding are one matrix"):
        formats_of({"embedding": "int8"}, args)


# ---- models


def checkpoint_of(seed=1, dtype=torch.float32, **changes):
    args = tiny_args(vocab_size=BYTES_VOCAB, dim=128, hidden_dim=192, n_kv_heads=4, **changes)
    return random_checkpoint(args, seed=seed, dtype=dtype)


def load_by(checkpoint, recipe, ranks=ONE, **options):
    chosen = formats_of(recipe, checkpoint.args)
    return load(checkpoint, ranks=ranks, device="cpu", formats=chosen, **options)


def unpacked(model):
    """Names to numbers, also of packed layers."""
    found = {name: p.data for name, p in model.named_parameters()}
    for name, module in model.named_modules():
        if isinstance(module, (QuantizedLinear, QuantizedEmbedding)):
            for piece in ("scale", "offset"):
                found.pop(f"{name}.{piece}", None)
            found[f"{name}.weight"] = module.dequantized()
    return found


@pytest.mark.parametrize("recipe", ["int8", "fp8", "int4", "mixed", FINE], ids=str)
@pytest.mark.parametrize("tied", [False, True])
def test_a_quantized_model_is_the_plain_one_with_the_unpacked_weights(recipe, tied):
    if tied and recipe is FINE:
        recipe = {part: format for part, format in FINE.items() if part != "embedding"}
    checkpoint = checkpoint_of(tied=tied)
    fast, plain = load_by(checkpoint, recipe), load(checkpoint, ranks=ONE, device="cpu", formats={})
    numbers = unpacked(fast)
    changed = 0
    for name, parameter in plain.named_parameters():
        changed += not torch.equal(parameter, numbers[name])
        parameter.data = numbers[name]
    assert changed >= 14
    tokens = torch.arange(40).view(2, 20)
    torch.testing.assert_close(fast(tokens), plain(tokens), rtol=1e-4, atol=1e-4)


def test_any_format_on_disk_is_packed_to_the_same_values(tmp_path):
    """Hugging Face keeps rows of q and k in another order; GGUF, quantized itself, as float32."""
    checkpoint = checkpoint_of(dtype=torch.bfloat16)
    write_hf(checkpoint, tmp_path / "hf")
    write_gguf(checkpoint, tmp_path / "plain.gguf")
    write_gguf(checkpoint, tmp_path / "q8_0.gguf", type="q8_0")
    expected = load_by(checkpoint, "int4")
    for name in ("hf", "plain.gguf"):
        assert parameters_equal(load_by(open_checkpoint(tmp_path / name), "int4"), expected)
    again = open_checkpoint(tmp_path / "q8_0.gguf")
    name = "layers.1.attention.wk.weight"
    packed = load_by(again, "int4").layers[1].attention.wk.packed
    wanted = quantize(again.tensors[name].read(), Format("int4", 64))
    assert all(same(a, b) for a, b in zip(packed, wanted, strict=True))


def test_a_few_rows_are_in_memory_at_a_time(tmp_path, monkeypatch):
    read, largest = LazyTensor.read, []

    def watched(self, *cut):
        found = read(self, *cut)
        largest.append(found.nbytes)
        return found

    monkeypatch.setattr(LazyTensor, "read", watched)
    monkeypatch.setattr(source, "_BLOCK", 2**12)
    checkpoint = checkpoint_of()
    load_by(checkpoint, "int4", Ranks(1, 2))
    write_quantized(checkpoint, tmp_path / "packed", "int4")
    assert len(largest) > 100
    assert max(largest) <= 2**12


def test_what_is_read_together_lies_in_one_storage():
    """Kernels read wq|wk|wv and w1|w3 as one matrix each: weights, scales and offsets."""
    for ranks in (ONE, Ranks(1, 2), Ranks(1, 4)):
        model = load_by(checkpoint_of(), {"layers.0": "int4", "layers.1": "int8"}, ranks)
        for layer in model.layers:
            attention, ffn = layer.attention, layer.feed_forward
            for group in ([attention.wq, attention.wk, attention.wv], [ffn.w1, ffn.w3]):
                for first, second in pairwise(group):
                    for ours, theirs in zip(first.packed, second.packed, strict=True):
                        if ours is not None:
                            assert ours.data_ptr() + ours.nbytes == theirs.data_ptr()
                            assert ours.is_contiguous()
                            storages = [t.untyped_storage().data_ptr() for t in (ours, theirs)]
                            assert storages[0] == storages[1]


@pytest.mark.parametrize("recipe", ["int8", "fp8", "int4", FINE], ids=str)
@pytest.mark.parametrize("size", [2, 4, 8])
def test_the_parts_of_any_number_of_ranks_are_the_values_of_one(recipe, size):
    """hidden_dim 192 in 8 parts of 24 would go through groups of 64 and of 16."""
    checkpoint = checkpoint_of()
    if size == 8 and recipe in ("int4", FINE):
        with pytest.raises(ValueError, match=r"8 ranks would cut the groups .*work: \[1, 2, 4\]"):
            load_by(checkpoint, recipe, Ranks(0, 8))
        return
    whole = unpacked(load_by(checkpoint, recipe))
    parts = [unpacked(load_by(checkpoint, recipe, Ranks(rank, size))) for rank in range(size)]
    for name, expected in whole.items():
        pieces = [part[name] for part in parts]
        if name.endswith(("wk.weight", "wv.weight")) and size == 8:
            pieces = pieces[::2]
        if "norm" in name:
            assert all(torch.equal(piece, expected) for piece in pieces)
        else:
            dim = 1 if name.endswith(("wo.weight", "w2.weight")) else 0
            assert torch.equal(torch.cat(pieces, dim), expected), name


def test_the_rows_that_pad_a_vocabulary_are_zeros():
    checkpoint = random_checkpoint(tiny_args(vocab_size=97), dtype=torch.float32)
    for recipe in ("int8", "fp8", {"output": "int4", "embedding": "int4"}):
        last = unpacked(load_by(checkpoint, recipe, Ranks(1, 2)))
        assert last["output.weight"].shape == (49, 64)
        assert not last["output.weight"][48:].any()
        assert last["output.weight"][:48].any(1).all()


def test_the_plan_counts_what_is_held_and_names_what_would_fit():
    for size in (1, 2, 4):
        for recipe in ("int8", "int4", "mixed", FINE):
            checkpoint = checkpoint_of(dtype=torch.bfloat16)
            chosen = formats_of(recipe, checkpoint.args)
            plan = make_plan(checkpoint.args, dtype=torch.bfloat16, ranks=size, formats=chosen)
            model = load_by(checkpoint, recipe, Ranks(0, size))
            assert plan.weights == sum(p.nbytes for p in model.parameters()), (size, recipe)
    tied = checkpoint_of(tied=True)
    plan = make_plan(tied.args, dtype=torch.float32, formats=formats_of("int8", tied.args))
    assert plan.weights == sum(p.nbytes for p in load_by(tied, "int8").parameters())
    args = ModelArgs(dim=4096, n_layers=32, n_heads=32, n_kv_heads=8, vocab_size=128256,
                     multiple_of=1024, ffn_dim_multiplier=1.3)  # fmt: skip
    plan = make_plan(args, dtype=torch.bfloat16, max_seq_len=2048)
    for free, says in ((12, "quantize='int8' would fit, at 8."), (7, "quantize='int4' would fit")):
        with pytest.raises(ValueError, match="not enough memory on cpu") as caught:
            check(plan, free * 2**30, "cpu")
        assert says in str(caught.value)
    with pytest.raises(ValueError, match="not enough memory") as caught:
        check(plan, 2 * 2**30, "cpu")
    assert "quantize" not in str(caught.value)


def test_ranks_over_gloo_say_what_one_says(tmp_path):
    """Quantized while loading, and from a folder that was quantized before, on 2 and 4 ranks."""
    tokenizer = write_tokenizer(tmp_path / "tokenizer.model")
    checkpoint = checkpoint_of(context_length=8192)
    write_meta(checkpoint, tmp_path / "plain", shards=2)
    source = open_checkpoint(tmp_path / "plain")
    recipes = ["int8", FINE]
    for at, recipe in enumerate(recipes):
        write_quantized(source, tmp_path / f"packed{at}", recipe)
    reference = [answers(build(tmp_path / "plain", tokenizer, quantize=r)) for r in recipes]
    assert reference[0]["greedy"] != reference[1]["greedy"]
    for ranks in (2, 4):
        out = tmp_path / str(ranks)
        out.mkdir()
        said = launch(ranks, "quantized", out, tokenizer, tmp_path, json.dumps(recipes))
        for result in said:
            for at, expected in enumerate(reference):
                same_answers(result["loading"][at], expected)
                same_answers(result["stored"][at], expected)


# ---- folders


@pytest.fixture
def folder(tmp_path):
    """A checkpoint in Meta's format, with a tokenizer."""
    write_meta(checkpoint_of(dtype=torch.bfloat16, context_length=512), tmp_path / "plain")
    write_tokenizer(tmp_path / "plain" / "tokenizer.model")
    return tmp_path / "plain"


@pytest.mark.parametrize("recipe", ["int8", "fp8", "int4", FINE], ids=str)
@pytest.mark.parametrize("tied", [False, True])
def test_written_and_loaded_back_it_is_the_same_to_the_last_bit(tmp_path, recipe, tied):
    if tied and recipe is FINE:
        recipe = {part: format for part, format in FINE.items() if part != "embedding"}
    checkpoint = checkpoint_of(dtype=torch.bfloat16, tied=tied)
    checkpoint = replace(checkpoint, stop_token_ids=(7, 9), chat_template="{{ messages }}")
    write_quantized(checkpoint, tmp_path / "packed", recipe)
    opened = open_checkpoint(tmp_path / "packed")
    assert (opened.stop_token_ids, opened.chat_template) == ((7, 9), "{{ messages }}")
    assert opened.formats == formats_of(recipe, checkpoint.args)
    assert opened.dtype == torch.bfloat16
    assert opened.args.tied == tied
    expected = load_by(checkpoint, recipe)
    assert parameters_equal(load(opened, ranks=ONE, device="cpu"), expected)
    assert [p.name for p in tmp_path.iterdir()] == ["packed"]
    again = write_quantized(opened, tmp_path / "again", recipe)
    assert (again / FILE).read_bytes() == (tmp_path / "packed" / FILE).read_bytes()
    plain = load(opened, ranks=ONE, device="cpu", formats={})
    for name, parameter in plain.named_parameters():
        assert torch.equal(parameter, unpacked(expected)[name])


def test_a_quantized_folder_is_a_model_like_any_other(folder, tmp_path):
    packed = write_quantized(open_checkpoint(folder), tmp_path / "packed", "int4")
    assert sorted(f.name for f in packed.iterdir()) == [
        "checklist.chk", "params.json", FILE, "tokenizer.model"]  # fmt: skip
    ours = Llama.build(packed, max_seq_len=64, device="cpu")
    theirs = Llama.build(folder, max_seq_len=64, device="cpu", quantize="int4")
    prompt = [[256, 65, 66]]
    assert ours.generate(prompt, 8, 0.0, logprobs=True) == theirs.generate(
        prompt, 8, 0.0, logprobs=True
    )
    finer = Llama.build(packed, max_seq_len=64, device="cpu", quantize="int8")
    assert isinstance(open_checkpoint(packed).tensors["output.weight"], PackedTensor)
    assert finer.model.layers[0].attention.wq.packed.format == Format("int8")


def test_an_adapter_is_added_before_its_matrix_is_packed_again(folder, tmp_path):
    packed = write_quantized(open_checkpoint(folder), tmp_path / "packed", "int4")
    checkpoint = open_checkpoint(packed)
    write_adapter(tmp_path / "adapter", checkpoint.args)  # of wq and wv
    merged = merge_adapter(checkpoint, tmp_path / "adapter")
    before, after = (load(each, ranks=ONE, device="cpu") for each in (checkpoint, merged))
    ours, theirs = after.layers[0].attention, before.layers[0].attention
    assert ours.wq.packed.format == Format("int4", 64)
    assert same(ours.wk.weight, theirs.wk.weight)
    added = merged.tensors["layers.0.attention.wq.weight"].read()
    error = (ours.wq.packed.unpack(torch.float32) - added).abs().max()
    assert 0 < error < 0.2 * added.abs().max()


def test_an_interrupted_run_leaves_nothing(tmp_path, monkeypatch):
    checkpoint = checkpoint_of()
    monkeypatch.setattr("llama.checkpoint.quantized.write.write_checklist", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_quantized(checkpoint, tmp_path / "packed", "int8")
    assert not list(tmp_path.iterdir())
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").touch()
    with pytest.raises(FileExistsError, match="is not empty"):
        write_quantized(checkpoint, tmp_path / "there", "int8")


def rewrite(file, change):
    """The same tensors after a change of the header, which may drop or add bytes at the end."""
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header, rest = json.loads(data[8 : 8 + length]), data[8 + length :]
    rest = change(header, rest) or rest
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write_bytes(len(text).to_bytes(8, "little") + text + rest)


def said(change):
    def spoil(header, rest):
        text = json.loads(header["__metadata__"]["llama"])
        change(text)
        header["__metadata__"]["llama"] = json.dumps(text)

    return spoil


def retyped(name, dtype, shape=None):
    def spoil(header, rest):
        header[name]["dtype"] = dtype
        header[name]["shape"] = shape or header[name]["shape"]

    return spoil


def renamed(old, new):
    return lambda header, rest: header.update({new: header.pop(old)})


WQ, W2 = "layers.0.attention.wq.weight", "layers.1.feed_forward.w2.weight"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (renamed(f"{W2}.scale", "x"), f"lacks {W2}.scale"),
        (renamed(f"{W2}.offset", "x"), f"lacks {W2}.offset"),
        (renamed(W2, "x"), f"lacks {W2}"),
        (renamed(f"{WQ}.scale", f"{WQ}.offset"), f"lacks {WQ}.scale"),
        (retyped(WQ, "U8"), f"lacks {WQ}.offset"),
        (retyped(WQ, "F8_E4M3"), "are fp8, int8; they need to be alike"),
        (retyped(f"{WQ}.scale", "I32"), f"{WQ}.scale is I32; these are read"),
        (retyped(f"{W2}.scale", "F16"), f"{W2}.scale is torch.float16 .* should be torch.bfloat16"),
        (retyped(f"{W2}.scale", "BF16", [3, 128]), f"{W2}.scale is .*, which are no groups of"),
        (retyped(f"{W2}.scale", "BF16", [384]), f"{W2}.scale is .*, which are no groups of"),
        (retyped(WQ, "I8", [64, 256]), f"{WQ} is torch.int8 .* should be torch.int8"),
        (retyped("norm.weight", "BF16", [2, 64]), r"norm.weight is \(2, 64\), and by params.json"),
        (retyped("norm.weight", "U8", [256]), "norm.weight has scales, and is U8"),
        (renamed("norm.weight", "layers.7.x"), "holds 3 layers, and params.json says n_layers 2"),
        (lambda header, rest: header.pop("__metadata__") and None, "was not written by `python -m"),
        (lambda header, rest: header["__metadata__"].update(llama=5), "was not written by"),
        (lambda header, rest: header["__metadata__"].update(llama="{"), "its metadata is broken"),
        (said(lambda text: text.update(version=2)), "its metadata is broken: version 2; 1 is read"),
        (said(lambda text: text.pop("recipe")), "recipe is missing"),
        (said(lambda text: text.update(more=1)), "more is unknown"),
        (said(lambda text: text.update(dtype="int8")), "recipe and dtype are 'int4', 'int8'"),
        (said(lambda text: text.update(stop_token_ids=["a"])), "stop_token_ids is "),
        (said(lambda text: text.update(chat_template=5)), "chat_template is 5"),
        (lambda header, rest: rest[:-1], "its tensors end at byte"),
    ],
)
def test_a_broken_or_foreign_file_is_refused_in_a_sentence(tmp_path, change, says):
    recipe = {"layers.0": "int8", "layers.1": "int4"}
    packed = write_quantized(checkpoint_of(dtype=torch.bfloat16), tmp_path / "packed", recipe)
    open_checkpoint(packed)
    if "int4'" in says:
        packed = write_quantized(checkpoint_of(), tmp_path / "other", "int4")
    rewrite(packed / FILE, change)
    with pytest.raises(ValueError, match=says) as caught:
        open_checkpoint(packed)
    assert str(caught.value).startswith(str(packed / FILE))
    assert "\n" not in str(caught.value)


def test_params_belong_beside_the_weights(tmp_path):
    packed = write_quantized(checkpoint_of(), tmp_path / "packed", "int8")
    shutil.move(packed / "params.json", tmp_path / "params.json")
    with pytest.raises(FileNotFoundError, match=r"params.json is missing"):
        open_checkpoint(packed)


# ---- quality


def divergence(model, other, tokens):
    found = Difference()
    with torch.inference_mode():
        logits = [each(tokens).flatten(0, 1) for each in (model, other)]
    found.add(*logits, tokens.flatten())
    return found.kl


def plainly(monkeypatch):
    """int4 without the search."""
    monkeypatch.setattr(formats, "best_pair", lambda groups: formats.range_pair(
        groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)))  # fmt: skip


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_search_costs_a_tenth_less_than_plain_rounding_on_random_models(seed, monkeypatch):
    args = tiny_args(dim=256, hidden_dim=512, n_layers=3, vocab_size=500, max_seq_len=128)
    checkpoint = random_checkpoint(args, seed=seed, dtype=torch.float32)
    other = load(checkpoint, ranks=ONE, device="cpu", formats={})
    tokens = torch.randint(500, (4, 128), generator=torch.Generator().manual_seed(seed))
    searched = divergence(load_by(checkpoint, "int4"), other, tokens)
    plainly(monkeypatch)
    plain = divergence(load_by(checkpoint, "int4"), other, tokens)
    print(
        f"seed {seed}: KL {searched:.3e}, plain {plain:.3e}: {100 * (1 - searched / plain):.1f} %"
    )
    assert searched < 0.9 * plain


def test_what_quantization_costs_the_demo_is_within_its_bounds(monkeypatch):
    """On a part of the held-out text; `python -m llama.demo.quantized` takes all of it."""

    def built(quantize=None):
        return Llama.build(DEMO, max_seq_len=64, device="cpu", dtype="float32", quantize=quantize)

    other = built()
    data = held_out_rows(other.tokenizer, 60)
    costs = {}
    for recipe, bound in (("int8", 0.001), ("fp8", 0.005), ("int4", 0.025), ("mixed", 0.025)):
        found = costs[recipe] = difference(built(recipe), other, data)
        assert abs(found.ratio - 1) < bound
        assert found.ratio_error < bound / 3
    assert costs["int8"].kl < costs["fp8"].kl < costs["mixed"].kl < costs["int4"].kl
    plainly(monkeypatch)
    assert costs["int4"].kl < 0.9 * difference(built("int4"), other, data).kl


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads /proc")
@pytest.mark.parametrize("recipe", ["int8", "int4", "mixed"])
def test_weights_that_are_packed_as_they_are_loaded_keep_no_file_in_memory(tmp_path, recipe):
    """A single norm that stayed mapped would keep all the pages that packing had read."""
    args = tiny_args(dim=128, hidden_dim=256)
    write_hf(random_checkpoint(args), tmp_path)

    def built(**changes):
        checkpoint = open_checkpoint(tmp_path)
        kept = load(checkpoint, ranks=ONE, device="cpu", **changes)
        del checkpoint
        gc.collect()
        maps = Path("/proc/self/maps").read_text(encoding="utf-8")
        return str(tmp_path / "model.safetensors") in maps, kept

    chosen = formats_of(recipe, args)
    mapped, model = built(formats=chosen)
    assert not mapped
    held = {id(p): p.nbytes for p in model.parameters()}
    plan = make_plan(args, dtype=torch.bfloat16, max_seq_len=8, formats=chosen)
    assert sum(held.values()) <= plan.weights
    assert built()[0]  # plain weights are the file
