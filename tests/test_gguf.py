"""Laws of GGUF: the same tensors, ids and logits as from Meta's files, in and out again."""

import dataclasses
import struct
import sys

import pytest
import torch
from conftest import write_tokenizer
from gguf_files import entries_for, keys_for, random_blocks, raw_gguf, tensor
from jinja2.sandbox import ImmutableSandboxedEnvironment

from llama import Llama
from llama.checkpoint import open_checkpoint, random_checkpoint, write_gguf, write_meta
from llama.checkpoint.gguf import read as module
from llama.checkpoint.gguf.blocks import GGML_TYPES, NUMBER_OF, PLAIN, dequantize, quantize
from llama.checkpoint.gguf.keys import rope_factors
from llama.loading import load
from llama.model import ModelArgs, RopeScaling, Transformer, rope_frequencies
from llama.names import shapes
from llama.parallel import ONE, Ranks
from llama.text.piece_tokenizer import PieceTokenizer
from llama.text.pieces import CONTROL, fields
from llama.text.sentencepiece import SentencePieceTokenizer
from llama.text.templates import LLAMA3_TEMPLATE
from llama.tokenizer import ChatFormat, Tokenizer

ARGS = ModelArgs(dim=64, n_layers=2, n_heads=8, n_kv_heads=2, vocab_size=520, multiple_of=16,
                 hidden_dim=96)  # fmt: skip
FACTORS = tuple(1 + 0.5 * n for n in range(4))
MODELS = {
    "plain": {},
    "tied": {"tied": True},
    "heads of their own size": {"head_dim": 32},
    "3.1": {"use_scaled_rope": True, "head_dim": 64},
    "3.2": {"use_scaled_rope": True, "rope_scaling": RopeScaling(factor=32.0), "head_dim": 64},
    "another context": {"use_scaled_rope": True, "head_dim": 64,
                        "rope_scaling": RopeScaling(factor=4.0, original_context=2048)},
    "factors": {"use_scaled_rope": True, "rope_scaling": RopeScaling(factors=FACTORS)},
    "Llama 1": {"rope_theta": 10000.0, "norm_eps": 1e-6, "n_kv_heads": 8, "context_length": 2048},
}  # fmt: skip
DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def args_of(name):
    return ModelArgs(**(dataclasses.asdict(ARGS) | {"head_dim": 0} | MODELS[name]))


def equal(one, other):
    assert set(one.tensors) == set(other.tensors)
    for name, source in one.tensors.items():
        there = other.tensors[name]
        assert source.shape == there.shape
        assert torch.equal(source.read().float(), there.read().float()), name


def logits(checkpoint, **options):
    model = load(checkpoint, ranks=ONE, device="cpu", **options)
    model.params.max_batch_size, model.params.max_seq_len = 1, 32
    return model(torch.arange(32)[None])


def gguf_of(path, checkpoint, kinds=None, **changes):
    """A file of random blocks where `kinds` says so, float32 elsewhere."""
    path.write_bytes(raw_gguf(keys_for(checkpoint.args, **changes), entries_for(checkpoint, kinds)))
    return path


# --- out and in again


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_out_and_in_again_is_the_same_model(tmp_path, name, dtype):
    checkpoint = random_checkpoint(args_of(name), dtype=dtype)
    write_gguf(checkpoint, tmp_path / "model.gguf")
    again = open_checkpoint(tmp_path / "model.gguf")
    equal(checkpoint, again)
    assert again.dtype == dtype
    derived = {"multiple_of": 256, "ffn_dim_multiplier": None}
    assert again.args == dataclasses.replace(checkpoint.args, **derived)
    assert DTYPES[dtype] in again.stored
    assert torch.equal(logits(checkpoint), logits(again))
    write_meta(again, tmp_path / "meta", dtype=torch.float32)
    equal(checkpoint, open_checkpoint(tmp_path / "meta"))
    assert open_checkpoint(tmp_path / "meta").args.rope_scaling == checkpoint.args.rope_scaling


def test_a_float32_file_stays_where_it_is(tmp_path):
    checkpoint = random_checkpoint(ARGS, dtype=torch.float32)
    write_gguf(checkpoint, tmp_path / "model.gguf")
    again = open_checkpoint(tmp_path / "model.gguf")
    for name, source in again.tensors.items():
        assert source.mapped() is source.mapped(), name
        assert source.mapped().data_ptr() == source.read().data_ptr()
    model = load(again, ranks=ONE, device="cpu")
    there = again.tensors["layers.0.attention.wq.weight"].mapped()
    assert model.layers[0].attention.wq.weight.data_ptr() == there.data_ptr()


def test_the_package_reads_what_is_written(tmp_path, byte_tokenizer):
    gguf = pytest.importorskip("gguf")
    args = args_of("3.1")
    checkpoint = random_checkpoint(args, dtype=torch.float32)
    write_gguf(checkpoint, tmp_path / "model.gguf", tokenizer=byte_tokenizer)
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    fields = {key: field.contents() for key, field in reader.fields.items()}
    assert fields["general.architecture"] == "llama"
    assert fields["llama.attention.head_count_kv"] == 2
    assert fields["llama.rope.freq_base"] == 500000
    assert fields["tokenizer.ggml.tokens"][256:258] == ["<|begin_of_text|>", "<|end_of_text|>"]
    assert fields["tokenizer.ggml.tokens"][-1] == "[PAD519]"
    assert fields["tokenizer.chat_template"] == LLAMA3_TEMPLATE
    found = {each.name: each for each in reader.tensors}
    for name, source in checkpoint.tensors.items():
        data = found[module.gguf_name(name)].data
        assert torch.equal(torch.from_numpy(data.copy()), source.read()), name
    assert found["rope_freqs.weight"].data.shape == (32,)


@pytest.mark.parametrize("kind", ["q8_0", "q4_0"])
def test_quantized_files_come_near(tmp_path, kind, byte_tokenizer):
    checkpoint = random_checkpoint(ARGS, dtype=torch.float32)
    write_gguf(checkpoint, tmp_path / "model.gguf", type=kind)
    again = open_checkpoint(tmp_path / "model.gguf")
    assert again.dtype == torch.bfloat16
    assert (
        again.stored == {"q8_0": "Q8_0 (16), F32 (5)", "q4_0": "Q4_0 (14), F32 (5), Q8_0 (2)"}[kind]
    )
    error = (logits(checkpoint) - logits(again, dtype=torch.float32)).std()
    assert error < {"q8_0": 0.02, "q4_0": 0.3}[kind]


def test_rows_that_do_not_divide_into_blocks_stay_float16(tmp_path):
    args = dataclasses.replace(ARGS, hidden_dim=48)
    write_gguf(random_checkpoint(args), tmp_path / "model.gguf", type="q8_0")
    again = open_checkpoint(tmp_path / "model.gguf")
    assert again.tensors["layers.0.feed_forward.w2.weight"].tensor_type.name == "F16"
    assert "Q8_0 (14)" in again.stored


def test_an_interrupted_writer_leaves_nothing(tmp_path, monkeypatch):
    checkpoint = random_checkpoint(ARGS)
    broken = dict(checkpoint.tensors)

    class Broken(type(broken["norm.weight"])):
        def parts(self, *args):
            raise KeyboardInterrupt

    last = broken["output.weight"]
    last.__class__ = Broken
    with pytest.raises(KeyboardInterrupt):
        write_gguf(checkpoint, tmp_path / "new" / "model.gguf")
    assert not list((tmp_path / "new").iterdir())


def test_a_writer_says_no_before_it_writes(tmp_path, byte_tokenizer):
    checkpoint = random_checkpoint(ARGS)
    there = tmp_path / "there.gguf"
    there.write_bytes(b"mine")
    with pytest.raises(FileExistsError, match=r"there\.gguf is there already"):
        write_gguf(checkpoint, there)
    path = tmp_path / "model.gguf"
    with pytest.raises(ValueError, match="type='q4_k': use 'q8_0' or 'q4_0'"):
        write_gguf(checkpoint, path, type="q4_k")
    with pytest.raises(ValueError, match=r"dtype=torch\.float64"):
        write_gguf(checkpoint, path, dtype=torch.float64)
    small = random_checkpoint(dataclasses.replace(ARGS, vocab_size=300))
    with pytest.raises(ValueError, match="the tokenizer has 512 tokens and the model 300"):
        write_gguf(small, path, tokenizer=byte_tokenizer)
    assert [file.name for file in tmp_path.iterdir() if "model" in file.name] == ["tokenizer.model"]


def test_numbers_that_a_type_cannot_hold_are_refused(tmp_path):
    checkpoint = random_checkpoint(ARGS, dtype=torch.float32)
    checkpoint.tensors["norm.weight"].mean = 1e38  # a vector, which stays float32
    write_gguf(checkpoint, tmp_path / "fine.gguf", dtype=torch.float16)
    checkpoint.tensors["output.weight"].std = 1e9
    for name, options in (("F16", {"dtype": torch.float16}), ("Q8_0", {"type": "q8_0"})):
        with pytest.raises(ValueError, match=rf"output\.weight .* that {name} cannot hold"):
            write_gguf(checkpoint, tmp_path / "model.gguf", **options)
    assert not list(tmp_path.glob("model*"))


# --- blocks


QUANTIZED = [each.name for each in GGML_TYPES.values() if each.name not in PLAIN]


def by_package(data: bytes, kind: str, columns: int):
    package = pytest.importorskip("gguf")
    packed = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    entry = GGML_TYPES[NUMBER_OF[kind]]
    rows = packed.view(-1, columns // entry.block * entry.size).numpy()
    return torch.from_numpy(package.dequantize(rows, package.GGMLQuantizationType[kind]))


def same_bits(one, other):
    """Equal to the sign of a zero; a number that is none is one, whatever its bits."""
    nan = one.isnan()
    assert torch.equal(nan, other.isnan())
    bits, others = (t.masked_fill(nan, 0).view(torch.int32) for t in (one, other))
    assert torch.equal(bits, others)


@pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning")
@pytest.mark.parametrize("kind", QUANTIZED)
def test_every_type_is_unpacked_as_the_package_does(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(module, "_BLOCK", 2048)
    args = dataclasses.replace(ARGS, dim=512, hidden_dim=256)
    checkpoint = random_checkpoint(args)
    name = "layers.1.feed_forward.w1.weight"  # (256, 512)
    path = gguf_of(tmp_path / "model.gguf", checkpoint, {name: kind})
    again = open_checkpoint(path)
    assert (again.dtype, again.stored) == (torch.float32, f"F32 (20), {kind} (1)")
    source = again.tensors[name]
    truth = by_package(random_blocks((256, 512), kind), kind, 512)
    same_bits(source.read(), truth)
    assert all(part.tensor.numel() <= 2048 for part in source.parts())
    for dim, size in enumerate(source.shape):
        for start, stop in ((0, size), (0, 1), (size // 3, size // 2 + 1), (5, 5), (255, 256)):
            expected = truth.narrow(dim, start, stop - start)
            same_bits(source.read(dim, start, stop).contiguous(), expected.contiguous())


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
def test_blocks_are_packed_as_the_package_does(kind):
    package = pytest.importorskip("gguf")
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(64, 256, generator=generator)
    rows[0] = 0
    rows[1] = torch.arange(256) / 2  # halves, to be rounded
    rows[2, :32] = 1e-7
    expected = package.quantize(rows.numpy(), package.GGMLQuantizationType[kind])
    packed = quantize(rows, GGML_TYPES[NUMBER_OF[kind]])
    assert torch.equal(packed, torch.from_numpy(expected))


def test_rare_types_need_the_package_and_say_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    args = dataclasses.replace(ARGS, dim=256, hidden_dim=256)
    kinds = {"layers.0.attention.wv.weight": "IQ3_S", "layers.0.attention.wk.weight": "Q4_K"}
    again = open_checkpoint(gguf_of(tmp_path / "model.gguf", random_checkpoint(args), kinds))
    again.tensors["layers.0.attention.wk.weight"].read()
    with pytest.raises(ImportError, match=r"IQ3_S .* pip install -e '\.\[gguf\]'"):
        again.tensors["layers.0.attention.wv.weight"].read()


def test_quantized_weights_are_bfloat16_unless_asked_otherwise(tmp_path, caplog):
    args = dataclasses.replace(ARGS, dim=256, hidden_dim=256)
    write_gguf(random_checkpoint(args), tmp_path / "model.gguf", type="q8_0")
    again = open_checkpoint(tmp_path / "model.gguf")
    truth = again.tensors["layers.0.feed_forward.w2.weight"].read()
    for dtype in (None, torch.float32, torch.float16):
        model = load(again, ranks=ONE, device="cpu", dtype=dtype)
        weight = model.layers[0].feed_forward.w2.weight
        assert weight.dtype == (dtype or torch.bfloat16)
        assert torch.equal(weight, truth.to(weight.dtype))
    assert not caplog.text


def test_each_rank_reads_its_part_of_the_blocks(tmp_path):
    args = dataclasses.replace(ARGS, dim=256, hidden_dim=512)
    write_gguf(random_checkpoint(args), tmp_path / "model.gguf", type="q4_0")
    again = open_checkpoint(tmp_path / "model.gguf")
    whole = load(again, ranks=ONE, device="cpu").layers[1]
    for rank in range(4):
        part = load(again, ranks=Ranks(rank=rank, size=4), device="cpu").layers[1]
        columns = slice(128 * rank, 128 * rank + 128)
        assert torch.equal(part.feed_forward.w2.weight, whole.feed_forward.w2.weight[:, columns])
        assert torch.equal(part.feed_forward.w1.weight, whole.feed_forward.w1.weight[columns])


def test_small_blocks_unpack_to_known_numbers():
    half = struct.pack("<e", 0.5)
    packed = half + bytes(range(16))  # low halves of the bytes come first
    row = torch.frombuffer(bytearray(packed), dtype=torch.uint8)[None]
    assert dequantize(row, GGML_TYPES[NUMBER_OF["Q4_0"]])[0].tolist() == [
        (n - 8) / 2 for n in [*range(16), *[0] * 16]
    ]


# --- several files


def split(tmp_path, count=3, **changes):
    """A model in several files, as llama.cpp's gguf-split cuts them: all keys in the first."""
    checkpoint = random_checkpoint(ARGS, dtype=torch.float32)
    entries = entries_for(checkpoint)
    each = -(-len(entries) // count)
    for n in range(count):
        keys = keys_for(ARGS) if n == 0 else {"general.architecture": "llama"}
        keys |= {"split.no": n, "split.count": count, "split.tensors.count": len(entries)}
        keys |= changes.get(f"file{n}", {})
        path = tmp_path / f"model-{n + 1:05}-of-{count:05}.gguf"
        path.write_bytes(raw_gguf(keys, entries[n * each : n * each + each]))
    return checkpoint


def test_several_files_are_one_model(tmp_path):
    checkpoint = split(tmp_path)
    for path in (tmp_path, *sorted(tmp_path.iterdir())):
        again = open_checkpoint(path)
        assert again.shards == 3
        equal(checkpoint, again)


def test_several_files_that_do_not_fit_together_are_refused(tmp_path):
    split(tmp_path, file1={"split.no": 2})
    with pytest.raises(ValueError, match=r"00002-of-00003\.gguf: says that it is file 3 of 3"):
        open_checkpoint(tmp_path)
    split(tmp_path, file0={"split.tensors.count": 7})
    with pytest.raises(ValueError, match="says that there are 7 tensors, and there are 21"):
        open_checkpoint(tmp_path)
    split(tmp_path)
    first, second, third = sorted(tmp_path.iterdir())
    alone = tmp_path / "alone.gguf"
    alone.write_bytes(first.read_bytes())
    with pytest.raises(ValueError, match=r"alone\.gguf: says that it is file 1 of 3"):
        open_checkpoint(alone)
    alone.unlink()
    third.unlink()
    with pytest.raises(FileNotFoundError, match=r"00003-of-00003\.gguf is missing, of 3 files"):
        open_checkpoint(second)


def test_a_tensor_in_two_files_is_refused(tmp_path):
    split(tmp_path, file0={"split.tensors.count": 9})
    entry = tensor("output_norm.weight", (64,), bytes(256))
    keys = {"split.no": 2, "split.count": 3}
    (tmp_path / "model-00003-of-00003.gguf").write_bytes(raw_gguf(keys, [entry]))
    second = tmp_path / "model-00002-of-00003.gguf"
    second.write_bytes(raw_gguf(keys | {"split.no": 1}, [entry]))
    with pytest.raises(ValueError, match=r"'output_norm\.weight' is in .*00002.* as well"):
        open_checkpoint(tmp_path)


def test_a_folder_of_two_models_is_refused(tmp_path):
    for name in "ab":
        write_gguf(random_checkpoint(ARGS), tmp_path / f"{name}.gguf")
    with pytest.raises(ValueError, match=r"holds several models, .*: a\.gguf, b\.gguf"):
        open_checkpoint(tmp_path)


# --- rotary frequencies


def with_factors(path, factors, **changes):
    checkpoint = random_checkpoint(dataclasses.replace(ARGS, head_dim=64), dtype=torch.float32)
    data = torch.tensor(factors, dtype=torch.float32).numpy().tobytes()
    entries = [*entries_for(checkpoint), tensor("rope_freqs.weight", (len(factors),), data)]
    path.write_bytes(raw_gguf(keys_for(checkpoint.args, **changes), entries))
    return path


def converted_factors(factor):
    """rope_freqs as converters compute it, in Python's own numbers."""
    out = []
    for pair in range(32):
        wavelength = 2 * torch.pi * 500000.0 ** (2 * pair / 64)
        smooth = (8192 / wavelength - 1) / (4 - 1)
        if wavelength < 8192 / 4:
            out.append(1.0)
        elif wavelength > 8192:
            out.append(factor)
        else:
            out.append(1 / ((1 - smooth) / factor + smooth))
    return out


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_rope_freqs_say_the_scaling_of_the_released_models(tmp_path, factor):
    path = with_factors(tmp_path / "model.gguf", converted_factors(factor))
    again = open_checkpoint(path)
    assert again.args.rope_scaling == RopeScaling(factor=factor)
    assert "rope_freqs.weight" in again.skipped
    released = ModelArgs(head_dim=64, rope_scaling=RopeScaling(factor=factor))
    assert torch.equal(rope_frequencies(again.args), rope_frequencies(released))


def test_factors_and_constants_give_the_same_logits():
    args = dataclasses.replace(ARGS, head_dim=64, rope_scaling=RopeScaling(factor=8.0))
    factors = tuple(rope_factors(args, args.rope_scaling).tolist())
    other = dataclasses.replace(args, rope_scaling=RopeScaling(factors=factors))
    plain = dataclasses.replace(args, rope_scaling=None)
    tokens, positions = torch.arange(8), torch.arange(0, 16000, 2000)

    def far(args):
        model = load(random_checkpoint(args, dtype=torch.float32), ranks=ONE, device="cpu")
        from llama.cache import Batch

        return model.forward_flat(tokens, positions, Batch([8], [8], [0], tokens.device))

    torch.testing.assert_close(far(args), far(other), atol=1e-4, rtol=0)
    assert (far(args) - far(plain)).abs().max() > 0.01


def test_other_factors_are_kept_one_for_each_pair(tmp_path):
    factors = [1 + n / 7 for n in range(32)]
    again = open_checkpoint(with_factors(tmp_path / "model.gguf", factors))
    exact = torch.tensor(factors)
    assert again.args.rope_scaling == RopeScaling(factors=tuple(exact.tolist()))
    plain = rope_frequencies(ModelArgs(head_dim=64))
    assert torch.equal(rope_frequencies(again.args), plain / exact)
    assert open_checkpoint(tmp_path / "model.gguf", rope_scaling=1).args.rope_scaling is None


def test_factors_of_one_and_linear_scaling(tmp_path):
    path = with_factors(tmp_path / "one.gguf", [1.0] * 32)
    assert open_checkpoint(path).args.rope_scaling is None
    checkpoint = random_checkpoint(ARGS)
    linear = {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}
    path = gguf_of(tmp_path / "linear.gguf", checkpoint, **linear)
    assert open_checkpoint(path).args.rope_scaling == RopeScaling(factors=(4.0,) * 4)


def test_a_model_with_other_factors_than_pairs_is_refused():
    with pytest.raises(ValueError, match="rope_scaling has 3 factors, and heads of 8 have 4"):
        dataclasses.replace(ARGS, rope_scaling=RopeScaling(factors=(1.0, 1.0, 2.0)))
    with pytest.raises(ValueError, match="each must be a positive number"):
        RopeScaling(factors=(1.0, 0.0))


# --- tokenizers


FACE = ("special_tokens", "n_words", "bos_id", "eos_id", "pad_id", "stop_tokens")
TEXTS = [
    "",
    "Hello, world!",
    "  two spaces",
    " leading",
    "trailing ",
    "tabs\tand\nnew\r\nlines\n\n",
    "naïve café",
    "日本語のテキスト",
    "emoji 😀👩‍👩‍👧 done",
    "<|eot_id|> and <s> </s> [INST]",
    "1234567 890",
    "x = [1, 2, {'a': b}]  # code",
    "\u0000\u0007 control",
    "ſ İ ß ﬁ",
    "the the them then",
    "▁",
    "a▁b",
]


def words():
    """Ranks beyond the bytes, each of two that were there before."""
    return ["th", "the", " t", " the", "in", "ing", "an", "and", "  ", "he", "er", "ca", "caf"]


@pytest.fixture
def word_tokenizer(tmp_path):
    return Tokenizer(write_tokenizer(tmp_path / "words.model", words()))


@pytest.mark.parametrize("version", ["3", "3.1"])
def test_a_byte_level_tokenizer_comes_back_the_same(tmp_path, version):
    tokenizer = Tokenizer(write_tokenizer(tmp_path / "words.model", words()), version=version)
    args = dataclasses.replace(ARGS, vocab_size=tokenizer.n_words + 3)
    write_gguf(random_checkpoint(args), tmp_path / "model.gguf", tokenizer=tokenizer)
    again = open_checkpoint(tmp_path / "model.gguf").tokenizer()
    for name in (
        "ranks",
        "special_tokens",
        "n_words",
        "bos_id",
        "eos_id",
        "stop_tokens",
        "version",
    ):
        assert getattr(again, name) == getattr(tokenizer, name), name
    for text in TEXTS:
        for allowed in (frozenset(), "all"):
            options = {"bos": True, "eos": True, "allowed_special": allowed}
            ids = tokenizer.encode(text, **options)
            assert again.encode(text, **options) == ids
            assert again.decode(ids) == tokenizer.decode(ids)


def vocabulary_keys(tokens, kinds, merges, **others):
    keys = {"model": "gpt2", "pre": "llama-bpe", "tokens": tokens, "token_type": kinds,
            "merges": merges, "bos_token_id": 256, "eos_token_id": 257} | others  # fmt: skip
    return {f"tokenizer.ggml.{k}": v for k, v in keys.items() if v is not None}


def byte_letters():
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return [bytes_to_unicode()[byte] for byte in range(256)]


def read(tmp_path, keys, size=262):
    args = dataclasses.replace(ARGS, vocab_size=size)
    path = gguf_of(tmp_path / "model.gguf", random_checkpoint(args), **keys)
    return open_checkpoint(path).tokenizer()


def test_a_vocabulary_that_another_program_wrote(tmp_path):
    """Special tokens where they like, an end of turn as the end of text, stops from the keys."""
    names = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|mine|>"]
    tokens = [*byte_letters(), *names, "ab", "abc"]
    kinds = [1] * 256 + [3, 3, 3, 4] + [1, 1]
    keys = vocabulary_keys(tokens, kinds, ["a b", "ab c"], eos_token_id=258, eom_token_id=259)
    tokenizer = read(tmp_path, keys)
    assert tokenizer.encode("abc ab<|mine|>", bos=True, eos=False)[:4] == [256, 261, 32, 260]
    assert tokenizer.encode("<|mine|>", bos=False, eos=False, allowed_special="all") == [259]
    assert (tokenizer.bos_id, tokenizer.eos_id) == (256, 257)
    assert tokenizer.stop_tokens == {257, 258, 259}
    keys = vocabulary_keys(tokens, kinds, ["a b", "ab c"], pre=None)
    assert read(tmp_path, keys).stop_tokens == {257, 258}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "bert"}, "its tokenizer is of the kind 'bert'"),
        ({"pre": "deepseek-llm"}, "cuts text by the rule 'deepseek-llm'; llama-bpe is known"),
        ({"tokens": None}, r"lacks the key tokenizer\.ggml\.tokens"),
        ({"tokens": []}, r"tokenizer\.ggml\.tokens is no list of texts"),
        ({"tokens": 5}, r"tokenizer\.ggml\.tokens needs to be an array, is 5"),
        ({"tokens": ["a"] * 258, "token_type": [1] * 258}, "the token 'a' comes twice"),
        ({"token_type": [1] * 9}, r"tokenizer\.ggml\.token_type is no list of 258 whole numbers"),
        ({"token_type": [1.0] * 258}, r"token_type is no list of 258 whole numbers"),
        ({"token_type": [1] * 258}, "is not spelled byte by byte|is none of its special tokens"),
        ({"bos_token_id": 258}, r"bos_token_id is 258, and there are 258 tokens"),
        ({"eos_token_id": -1}, r"eos_token_id needs to be a whole number|eos_token_id is"),
        ({"merges": None}, r"lacks the key tokenizer\.ggml\.merges"),
        ({"merges": ["ab"]}, "the merge 'ab' is no pair"),
        ({"merges": ["x y"]}, "the merge 'x y' is of tokens that are not in the vocabulary"),
        ({"token_type": [3] + [1] * 255 + [3, 3]}, "no token is the single byte 0x00"),
    ],
)  # fmt: skip
def test_a_broken_vocabulary_is_refused(tmp_path, changes, message):
    tokens = [*byte_letters(), "<|begin_of_text|>", "<|end_of_text|>"]
    base = {"tokens": tokens, "kinds": [1] * 256 + [3, 3], "merges": []}
    if changes.get("eos_token_id") == -1:
        changes = {"eos_token_id": struct.pack("<Ii", 5, -1)}
    changes = {"kinds" if key == "token_type" else key: each for key, each in changes.items()}
    keys = vocabulary_keys(**(base | changes))
    with pytest.raises(ValueError, match=rf"model\.gguf: .*({message})"):
        read(tmp_path, keys)


def test_merges_in_another_order_than_the_ids_are_refused(tmp_path):
    tokens = [*byte_letters(), "<|begin_of_text|>", "<|end_of_text|>", "ab", "cd"]
    keys = vocabulary_keys(tokens, [1] * 256 + [3, 3, 1, 1], ["c d", "a b"])
    with pytest.raises(ValueError, match="the merge 'a b' is not in the order of the ids"):
        read(tmp_path, keys)


@pytest.fixture(scope="module")
def sentencepiece_model(tmp_path_factory):
    sentencepiece = pytest.importorskip("sentencepiece")
    folder = tmp_path_factory.mktemp("sp")
    generator = torch.Generator().manual_seed(0)
    words = "the of and to in that is was he for it with as his on be at by ing ed er"
    parts = words.split()
    lines = []
    for _ in range(400):
        picks = torch.randint(len(parts), (30,), generator=generator).tolist()
        joins = torch.randint(3, (30,), generator=generator).tolist()
        lines.append(
            "".join(parts[p] + ("", " ", "  ")[j] for p, j in zip(picks, joins, strict=True))
        )
    (folder / "text.txt").write_text("\n".join(lines))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"), model_prefix=str(folder / "tokenizer"), vocab_size=420,
        model_type="bpe", byte_fallback=True, normalization_rule_name="identity",
        remove_extra_whitespaces=False, split_by_whitespace=False, character_coverage=1.0,
        user_defined_symbols=["▁<PRE>", "<FILL>"], minloglevel=2, pad_id=-1,
    )  # fmt: skip
    return SentencePieceTokenizer(folder / "tokenizer.model")


def random_texts(alphabet="thewasingd  \n.é日😀▁<PRE>FILL", count=300):
    generator = torch.Generator().manual_seed(7)
    for _ in range(count):
        size = int(torch.randint(1, 40, (), generator=generator))
        picks = torch.randint(len(alphabet), (size,), generator=generator).tolist()
        yield "".join(alphabet[p] for p in picks)
    yield from ("the <PRE> of <FILL>and", " <PRE><PRE>", "<FILL>", "   the    that  ")


def test_pieces_and_scores_give_the_ids_of_sentencepiece(sentencepiece_model):
    model = sentencepiece_model.model
    pieces = PieceTokenizer.of_sentencepiece(sentencepiece_model)
    for text in [*TEXTS, *random_texts()]:
        text = text.replace("\0", "")
        ids = model.encode(text)
        assert pieces.encode(text, bos=False, eos=False) == ids, text
        assert pieces.decode(ids) == sentencepiece_model.decode(ids), text
        if "�" not in model.decode(ids):
            assert pieces.decode(ids) == model.decode(ids)
    for token in range(pieces.n_words + 3):
        assert pieces.token_bytes(token) == sentencepiece_model.token_bytes(token), token
        assert pieces.first_bytes(token) == sentencepiece_model.first_bytes(token), token


def of_kinds(proto, kinds):
    """A serialized model whose pieces have other kinds: each says so once more, the last holds."""

    def varint(number):
        return (
            bytes([number]) if number < 128 else bytes([number & 127 | 128]) + varint(number >> 7)
        )

    out, left = b"", iter(kinds)
    for field, message in fields(proto):
        message += bytes([3 << 3, next(left)]) if field == 1 else b""
        out += varint(field << 3 | 2) + varint(len(message)) + message
    return out


def test_unused_pieces_come_out_as_their_halves(sentencepiece_model):
    pieces = PieceTokenizer.of_sentencepiece(sentencepiece_model)
    kinds = [
        5 if kind == 1 and len(piece) > 1 and token % 3 else kind
        for token, (piece, kind) in enumerate(zip(pieces.pieces, pieces.token_types, strict=True))
    ]
    assert kinds.count(5) > 20
    proto = of_kinds(sentencepiece_model.model.serialized_model_proto(), kinds)
    other = type(sentencepiece_model.model)(model_proto=proto)
    mine = PieceTokenizer(pieces.pieces, pieces.scores, kinds, bos_id=1, eos_id=2)
    for text in [*random_texts(), *random_texts("thewasingdofr  ")]:
        assert mine.encode(text, bos=False, eos=False) == other.encode(text), text


def test_a_sentencepiece_tokenizer_comes_back_the_same(tmp_path, sentencepiece_model):
    args = dataclasses.replace(ARGS, vocab_size=424)
    path = tmp_path / "model.gguf"
    write_gguf(random_checkpoint(args), path, tokenizer=sentencepiece_model)
    again = open_checkpoint(path).tokenizer()
    assert isinstance(again, PieceTokenizer)
    for name in FACE:
        assert getattr(again, name) == getattr(sentencepiece_model, name), name
    for text in TEXTS:
        for allowed in (frozenset(), "all"):
            options = {"bos": True, "eos": True, "allowed_special": allowed}
            assert again.encode(text, **options) == sentencepiece_model.encode(text, **options)
    copy = tmp_path / "copy.gguf"
    write_gguf(open_checkpoint(path), copy)
    assert copy.read_bytes() == path.read_bytes()
    with pytest.raises(ValueError, match="has the special token '</s>', which is disallowed"):
        again.encode("a</s>", bos=False, eos=False, disallowed_special="all")


def test_a_long_text_of_pieces_takes_no_time(sentencepiece_model):
    pieces = PieceTokenizer.of_sentencepiece(sentencepiece_model)
    text = "the was " * 5000 + "t" * 20000
    assert pieces.encode(text, bos=False, eos=False) == sentencepiece_model.model.encode(text)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pieces": 3}, "its vocabulary has not the 256 bytes as pieces, such as <0x05>"),
        ({"bos_id": 300}, "the token of a text's begin, 300, is not in the vocabulary"),
        ({"score": float("nan")}, "a score of the vocabulary is no number"),
    ],
)
def test_pieces_that_make_no_tokenizer_are_refused(changes, message):
    pieces = ["<unk>", "<s>", "</s>", *[f"<0x{byte:02X}>" for byte in range(256)], "a"]
    if "pieces" in changes:
        pieces[8] = "b"
    scores = [0.0] * 259 + [changes.get("score", -1.0)]
    kinds = [2, CONTROL, CONTROL, *[6] * 256, 1]
    kinds[8] = 6 if pieces[8] != "b" else 1
    with pytest.raises(ValueError, match=message):
        PieceTokenizer(pieces, scores, kinds, bos_id=changes.get("bos_id", 1), eos_id=2)


def test_the_chat_template_renders_as_the_chat_format_encodes(word_tokenizer):
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(LLAMA3_TEMPLATE)
    dialog = [
        {"role": "system", "content": " Be the {{ best }}.\n"},
        {"role": "user", "content": "  Hi\n\nthere "},
        {"role": "assistant", "content": "'Hello'"},
        {"role": "user", "content": "and {% if %}"},
    ]
    text = template.render(
        messages=dialog, bos_token="<|begin_of_text|>", add_generation_prompt=True
    )
    ids = word_tokenizer.encode(text, bos=False, eos=False, allowed_special="all")
    assert ids == ChatFormat(word_tokenizer).encode_dialog_prompt(dialog)


# --- a file and nothing beside it


def test_a_file_alone_answers_as_metas_files_do(tmp_path, word_tokenizer):
    args = dataclasses.replace(ARGS, vocab_size=word_tokenizer.n_words, context_length=256)
    checkpoint = random_checkpoint(args, dtype=torch.float32)
    write_meta(checkpoint, tmp_path / "meta")
    write_gguf(checkpoint, tmp_path / "one" / "model.gguf", tokenizer=word_tokenizer)
    meta = Llama.build(tmp_path / "meta", tmp_path / "words.model")
    dialog = [{"role": "user", "content": "the thing and the other"}]
    for path in (tmp_path / "one", tmp_path / "one" / "model.gguf"):
        alone = Llama.build(path)
        assert isinstance(alone.model, Transformer)
        for temperature in (0, 1.0):
            options = {"temperature": temperature, "max_gen_len": 12, "seed": 1}
            assert alone.text_completion(["the"], **options) == meta.text_completion(
                ["the"], **options
            )
            answers = [each.chat_completion([dialog], **options) for each in (alone, meta)]
            assert answers[0] == answers[1]
    other = write_tokenizer(tmp_path / "other.model", ["zz", *words()[1:]])
    given = Llama.build(tmp_path / "one", other).tokenizer
    assert given.encode("zz", bos=False, eos=False) == [256]


def test_a_file_without_a_tokenizer_asks_for_one(tmp_path):
    write_gguf(random_checkpoint(ARGS), tmp_path / "model.gguf")
    assert open_checkpoint(tmp_path).tokenizer is None
    with pytest.raises(FileNotFoundError, match=r"no tokenizer\.model in .*; give tokenizer_path"):
        Llama.build(tmp_path)


def test_info_says_what_lies_in_a_file(tmp_path, shell):
    args = args_of("factors")
    write_gguf(random_checkpoint(args), tmp_path / "model.gguf", type="q8_0")
    said = shell("info", tmp_path / "model.gguf")[1]
    assert "1 shard, Q8_0 (16), F32 (5)" in said
    assert "a factor for each pair, 1 to 2.5" in said


def test_names_cover_every_tensor():
    from llama.checkpoint.gguf.keys import canonical_name, gguf_name

    names = list(shapes(ARGS))
    assert [canonical_name(gguf_name(name)) for name in names] == names
    assert canonical_name("blk.00.attn_q.weight") is None
    assert canonical_name("blk.0.output.weight") is None
    assert canonical_name("attn_q.weight") is None
    assert canonical_name("blk.0.attn_rot_embd.weight") == ""
