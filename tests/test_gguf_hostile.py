"""Broken and hostile GGUF files: one sentence that names file and cause, at once, nothing taken."""

import dataclasses
import struct
import time

import pytest
import torch
from gguf_files import entries_for, keys_for, raw_gguf, tensor, text, value

from llama.checkpoint import open_checkpoint, random_checkpoint
from llama.checkpoint.gguf.header import ARRAY, BOOL, FLOAT32, INT32, STRING, UINT32, UINT64
from llama.model import ModelArgs

ARGS = ModelArgs(dim=32, n_layers=1, n_heads=4, n_kv_heads=2, vocab_size=40, hidden_dim=48,
                 context_length=128)  # fmt: skip
HUGE = 2**60


@pytest.fixture(scope="module")
def checkpoint():
    return random_checkpoint(ARGS, dtype=torch.float32)


def sound(checkpoint, *more, keys=None, without=(), **options):
    """A sound file: `more` entries come last, those named in `without` are left out."""
    entries = [entry for entry in entries_for(checkpoint) if entry[0] not in without]
    return raw_gguf(keys_for(ARGS) if keys is None else keys, [*entries, *more], **options)


def header(*parts, n_tensors=0, n_keys=1, version=3) -> bytes:
    """A header of parts that are packed already, with some room after it."""
    return b"GGUF" + struct.pack("<IQQ", version, n_tensors, n_keys) + b"".join(parts) + bytes(64)


def array(kind, count, data=b"") -> bytes:
    return struct.pack("<IIQ", ARRAY, kind, count) + data


def entry(name="x", dims=(32,), kind=0, offset=0, n_dims=None) -> bytes:
    n = len(dims) if n_dims is None else n_dims
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", n, *dims, kind, offset)


CUT = "is cut short or broken"
# What is wrong, the file, and what the message says besides the file's name.
HEADERS = {
    "nothing": (b"", "is empty; download it again"),
    "a web page": (b"<!DOCTYPE html><html>", "is a web page or XML, no weights"),
    "a pointer": (b"version https://git-lfs.github.com/spec/v1\noid", "is a git-lfs pointer"),
    "bad magic": (b"GGML" + bytes(40), "is no GGUF file: it begins with b'GGML'"),
    "magic alone": (b"GGUF", rf"{CUT}: the version of 4 bytes at byte 4"),
    "cut in the counts": (b"GGUF" + struct.pack("<IQ", 3, 0), rf"{CUT}: the number of keys"),
    "version 1": (header(version=1), "is GGUF version 1; versions 2 and 3 are read"),
    "a future version": (header(version=4), "is GGUF version 4"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "is a big-endian GGUF file"),
    "2^60 tensors": (header(n_tensors=HUGE, n_keys=0), f"claims {HUGE} tensors, which is more"),
    "2^64-1 keys": (header(n_keys=2**64 - 1), f"claims {2**64 - 1} keys, which is more"),
    "more keys than bytes": (header(n_keys=7), "claims 7 keys, which is more than its bytes"),
    "a key of 2^60 bytes": (header(struct.pack("<Q", HUGE)), f"{CUT}: a key of {HUGE} bytes"),
    "a key of 2^64-1 bytes": (header(struct.pack("<Q", 2**64 - 1)), f"a key of {2**64 - 1} bytes"),
    "a key that is no text": (header(text(b"\xff\xfe")), "a key at byte 32 is no UTF-8 text"),
    "a text of 2^60 bytes": (
        header(text("k"), struct.pack("<IQ", STRING, HUGE)),
        rf"{CUT}: the text of 'k' of {HUGE} bytes",
    ),
    "a text that is none": (
        header(text("k"), struct.pack("<I", STRING), text(b"\xc3\x28")),
        "the text of 'k' at byte .* is no UTF-8 text",
    ),
    "a type that is none": (
        header(text("k"), struct.pack("<I", 13)),
        "the key 'k' is of type 13, which GGUF does not have",
    ),
    "a boolean of 2": (
        header(text("k"), struct.pack("<IB", BOOL, 2)),
        r"the key 'k' is 2, and needs to be true \(1\) or false \(0\)",
    ),
    "an array of arrays": (
        header(text("k"), array(ARRAY, 1, struct.pack("<IQ", ARRAY, 1))),
        "the key 'k' is an array of arrays",
    ),
    "an array of nothing": (
        header(text("k"), array(99, 1)),
        "the key 'k' is an array of type 99, which GGUF does not have",
    ),
    "an array of 2^60 numbers": (
        header(text("k"), array(UINT32, HUGE)),
        rf"{CUT}: the array 'k' of {HUGE * 4} bytes",
    ),
    "an array whose size overflows": (
        header(text("k"), array(UINT64, 2**61)),
        rf"{CUT}: the array 'k' of {2**64} bytes",
    ),
    "an array of 2^60 texts": (
        header(text("k"), array(STRING, HUGE)),
        rf"{CUT}: the array 'k' of {HUGE * 8} bytes",
    ),
    "an array of texts, one of 2^60 bytes": (
        header(text("k"), array(STRING, 2, text("a") + struct.pack("<Q", HUGE))),
        f"{CUT}: the array 'k'",
    ),
    "a key that comes twice": (
        header(text("k"), value(UINT32, 1), text("k"), value(UINT32, 1), n_keys=2),
        "the key 'k' comes twice",
    ),
}
SIZES = {
    "no dimensions": (entry(dims=()), "the tensor 'x' has 0 dimensions; 1 to 4 are possible"),
    "2^32-1 dimensions": (entry(n_dims=2**32 - 1), f"has {2**32 - 1} dimensions"),
    "a dimension of 0": (entry(dims=(32, 0)), r"has the shape \(0, 32\), with an impossible size"),
    "a dimension of 2^60": (entry(dims=(32, HUGE)), "with an impossible size"),
    "a product beyond 2^64": (entry(dims=(2**30,) * 3), rf"{CUT}: the tensor 'x' of {2**92} bytes"),
    "a type that is none": (entry(kind=5), "the tensor 'x' is of type 5; these are read: F32"),
    "whole numbers": (entry(kind=26), "the tensor 'x' is of type 26; these are read"),
    "half a block": (
        entry(dims=(48,), kind=8),
        "rows of 48 numbers, and Q8_0 comes in blocks of 32",
    ),
    "an odd offset": (entry(offset=8), "the tensor 'x' lies at 8, no multiple of 32"),
    "an offset outside": (entry(offset=2**20), f"{CUT}: the tensor 'x' of 128 bytes at byte"),
    "an offset of 2^63": (
        entry(offset=2**63),
        f"{CUT}: the tensor 'x' of 128 bytes at byte {2**63 + 64}",
    ),
    "a name of 2^60 bytes": (struct.pack("<Q", HUGE), f"{CUT}: a tensor's name of {HUGE} bytes"),
    "a name that is no text": (text(b"\x80"), "a tensor's name at byte .* is no UTF-8 text"),
    "cut in the middle": (text("x") + struct.pack("<I", 4), f"{CUT}: the shape of 'x'"),
}
ALIGNED = "general.alignment is {}; it needs to be a power of two from 8"
KEYS = {
    "another architecture": ({"general.architecture": "qwen2"}, "is of the architecture 'qwen2'"),
    "no architecture": ({"general.architecture": None}, r"lacks the key general\.architecture"),
    "an architecture of 3": ({"general.architecture": 3}, "needs to be a text, is 3"),
    "no block_count": ({"block_count": None}, r"lacks the key llama\.block_count"),
    "absurd layers": ({"block_count": 2**31}, r"llama\.block_count is 2147483648"),
    "a million layers": (
        {"block_count": 10**6},
        r"holds 1 layers, and llama\.block_count is 1000000",
    ),
    "no heads": ({"attention.head_count": 0}, r"llama\.attention\.head_count is 0; it needs"),
    "heads that do not divide": (
        {"attention.head_count_kv": 3},
        "n_heads=4 is no multiple of n_kv",
    ),
    "heads as a list": (
        {"attention.head_count_kv": [2]},
        "needs to be a whole number, is an array",
    ),
    "another head size": (
        {"rope.dimension_count": 6},
        r"rope\.dimension_count is 6, and heads have 8",
    ),
    "a theta of nan": ({"rope.freq_base": float("nan")}, r"llama\.rope\.freq_base is nan"),
    "an epsilon of inf": ({"attention.layer_norm_rms_epsilon": float("inf")}, "epsilon is inf"),
    "an epsilon of text": (
        {"attention.layer_norm_rms_epsilon": "small"},
        "needs to be a number, is",
    ),
    "no context": ({"context_length": 0}, r"llama\.context_length is 0"),
    "another vocabulary": (
        {"vocab_size": 41},
        r"vocab_size is 41, and token_embd\.weight has 40 rows",
    ),
    "another hidden size": (
        {"feed_forward_length": 47},
        r"ffn_gate\.weight is \(48, 32\), and its keys",
    ),
    "experts": ({"expert_count": 8}, r"llama\.expert_count is 8, which this version does not read"),
    "an unknown key": (
        {"attention.sliding_window": 4096},
        "key 'llama.attention.sliding_window' is unk",
    ),
    "yarn": (
        {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0},
        "scaling of the kind 'yarn'",
    ),
    "a negative linear factor": (
        {"rope.scaling.type": "linear", "rope.scaling.factor": -1.0},
        "each must be a positive number",
    ),
    "an alignment of 0": ({"general.alignment": 0}, ALIGNED.format(0)),
    "an alignment of 24": ({"general.alignment": 24}, ALIGNED.format(24)),
    "an alignment of 2^31": ({"general.alignment": 2**31}, ALIGNED.format(2**31)),
    "an alignment of text": ({"general.alignment": "32"}, ALIGNED.format("'32'")),
    "an alignment of true": ({"general.alignment": True}, ALIGNED.format("True")),
    "splits": (
        {"split.no": 1, "split.count": 2},
        "says that it is file 2 of 2, and is 1 of 1 here",
    ),
}


def refused(path, data, message):
    """The one sentence, in no time, without a byte more memory than the file has."""
    path.write_bytes(data)
    began = time.monotonic()
    with pytest.raises(ValueError, match=message) as caught:
        open_checkpoint(path).tokenizer()
    assert time.monotonic() - began < 1
    said = str(caught.value)
    assert said.startswith(str(path))
    assert len(said) < len(str(path)) + 400
    assert "\n" not in said


@pytest.mark.parametrize("name", HEADERS)
def test_a_broken_header(tmp_path, name):
    refused(tmp_path / "model.gguf", *HEADERS[name])


@pytest.mark.parametrize("name", SIZES)
def test_a_broken_tensor_entry(tmp_path, name):
    packed, message = SIZES[name]
    tail = 0 if name == "cut in the middle" else 64
    data = header(packed, n_tensors=1, n_keys=0)[: -64 or None] + bytes(max(tail, 18))
    refused(tmp_path / "model.gguf", data, message)


@pytest.mark.parametrize("name", KEYS)
def test_keys_that_make_no_model(tmp_path, checkpoint, name):
    changes, message = KEYS[name]
    refused(tmp_path / "model.gguf", sound(checkpoint, keys=keys_for(ARGS, **changes)), message)


def test_the_files_of_these_tests_are_sound_but_for_what_is_wrong(tmp_path, checkpoint):
    path = tmp_path / "model.gguf"
    for alignment in (32, 8, 4096):
        keys = keys_for(ARGS, **{"general.alignment": alignment, "general.name": "x"})
        path.write_bytes(sound(checkpoint, keys=keys, alignment=alignment))
        again = open_checkpoint(path)
        assert again.args.n_kv_heads == 2
        for name, source in checkpoint.tensors.items():
            assert torch.equal(again.tensors[name].read(), source.read())


ENTRIES = {
    "overlap": (tensor("blk.0.x.weight", (8,), bytes(32), offset=32), "overlap"),
    "twice": (
        tensor("output.weight", (40, 32), bytes(5120)),
        r"the tensor 'output\.weight' comes twice",
    ),
    "unknown": (
        tensor("blk.0.attn_q.bias", (32,), bytes(128)),
        r"'blk\.0\.attn_q\.bias' is no tensor",
    ),
    "a layer too many": (tensor("blk.1.attn_q.weight", (32, 32), bytes(4096)), "holds 2 layers"),
    "the same by another number": (
        tensor("blk.00.attn_q.weight", (32, 32), bytes(4096)),
        "no tensor",
    ),
    "an absurd layer": (tensor("blk.99999999.attn_q.weight", (8,), bytes(32)), "is no tensor that"),
    "factors of another size": (
        tensor("rope_freqs.weight", (3,), bytes(12)),
        r"is \(3,\), and there",
    ),
    "factors of 0": (
        tensor("rope_freqs.weight", (4,), bytes(16)),
        "factors that are no positive num",
    ),
    "quantized factors": (
        tensor("rope_freqs.weight", (32,), bytes(34), "Q8_0"),
        "vectors are read in",
    ),
}


@pytest.mark.parametrize("name", ENTRIES)
def test_tensors_that_do_not_belong(tmp_path, checkpoint, name):
    extra, message = ENTRIES[name]
    refused(tmp_path / "model.gguf", sound(checkpoint, extra), message)


def test_tensors_that_are_missing_or_of_another_shape(tmp_path, checkpoint):
    path = tmp_path / "model.gguf"
    for name in ("token_embd.weight", "output_norm.weight", "blk.0.ffn_up.weight"):
        refused(path, sound(checkpoint, without=[name]), f"lacks {name}")
    turned = tensor("blk.0.ffn_up.weight", (32, 48), bytes(48 * 32 * 4))
    data = sound(checkpoint, turned, without=["blk.0.ffn_up.weight"])
    refused(path, data, r"blk\.0\.ffn_up\.weight is \(32, 48\), and its keys say \(48, 32\)")
    deep = tensor("blk.0.ffn_up.weight", (1, 48, 32), bytes(48 * 32 * 4))
    refused(path, sound(checkpoint, deep, without=["blk.0.ffn_up.weight"]), r"is \(1, 48, 32\)")
    packed = tensor("output_norm.weight", (32,), bytes(34), "Q8_0")
    data = sound(checkpoint, packed, without=["output_norm.weight"])
    refused(path, data, r"output_norm\.weight is Q8_0; vectors are read in F32, F16, BF16")


def test_a_file_cut_anywhere(tmp_path, checkpoint):
    path = tmp_path / "model.gguf"
    data = sound(checkpoint, keys=keys_for(ARGS, **{"general.tags": ["a", "b"]}))
    for size in [*range(4, 900, 7), len(data) // 2, len(data) - 1]:
        path.write_bytes(data[:size])
        with pytest.raises(ValueError, match=rf"model\.gguf: .*({CUT}|which is more than)"):
            open_checkpoint(path)


def test_a_header_without_end_in_a_file_of_a_terabyte(tmp_path):
    """A sparse file, so that lengths and counts are within it: still no loop, no memory."""
    path = tmp_path / "model.gguf"
    texts = header(text("k"), array(STRING, 2**36))
    long = header(text("k"), struct.pack("<IQ", STRING, 2**39))
    numbers = header(text("k"), array(FLOAT32, 2**37))
    many = header(n_keys=2**35)
    for data in (texts, long, numbers, many):
        path.write_bytes(data)
        with path.open("r+b") as file:
            file.truncate(2**40)
        began = time.monotonic()
        with pytest.raises(ValueError, match=r"model\.gguf: (the header is longer|claims)"):
            open_checkpoint(path)
        assert time.monotonic() - began < 1


def outcome(path) -> str:
    try:
        opened = open_checkpoint(path)
        if opened.tokenizer is not None:
            opened.tokenizer()
    except (ValueError, FileNotFoundError) as error:
        return str(error)
    return "opened"


def test_flipped_bytes_give_a_sentence_or_a_model(tmp_path, checkpoint):
    """Every byte of a small header changed in several ways: a ValueError or nothing, in seconds."""
    path = tmp_path / "model.gguf"
    letters = [chr(256 + n) for n in range(4)]
    vocabulary = {"model": "gpt2", "pre": "llama-bpe", "tokens": letters, "token_type": [1] * 4,
                  "merges": ["a b"], "bos_token_id": 1}  # fmt: skip
    keys = keys_for(ARGS, **{f"tokenizer.ggml.{key}": each for key, each in vocabulary.items()})
    data = sound(checkpoint, keys=keys)
    size = len(data) - sum(source.read().nbytes for source in checkpoint.tensors.values())
    generator = torch.Generator().manual_seed(0)
    began, outcomes = time.monotonic(), set()
    for at in range(size):
        broken = bytearray(data[: size + 512])
        for _ in range(1 + at % 3):
            place = at if at % 3 == 0 else int(torch.randint(size, (), generator=generator))
            broken[place] ^= 1 << int(torch.randint(8, (), generator=generator))
        path.write_bytes(bytes(broken) + bytes(len(data) - len(broken)))
        said = outcome(path)
        assert said.startswith(str(tmp_path)) or said == "opened", said
        outcomes.add(said == "opened")
    assert outcomes == {True, False}
    assert time.monotonic() - began < 60


def test_what_is_no_file_at_all(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no such folder"):
        open_checkpoint(tmp_path / "model.gguf")
    (tmp_path / "folder.gguf").mkdir()
    for folder in (tmp_path, tmp_path / "folder.gguf"):
        with pytest.raises(FileNotFoundError, match=r"neither params\.json nor .* in this folder"):
            open_checkpoint(folder)
    other = tmp_path / "model.bin"
    other.write_bytes(b"x")
    with pytest.raises(ValueError, match=r"model\.bin is a file; needed is a \.gguf file"):
        open_checkpoint(other)


def test_a_changed_shape_is_noticed(tmp_path, checkpoint):
    """The keys of another model before these tensors."""
    other = dataclasses.replace(ARGS, dim=64, head_dim=8, hidden_dim=48)
    refused(
        tmp_path / "model.gguf",
        sound(checkpoint, keys=keys_for(other, **{"x.list": value(ARRAY, (INT32, [1, 2]))})),
        r"token_embd\.weight is \(40, 32\), and its keys say \(40, 64\)",
    )
