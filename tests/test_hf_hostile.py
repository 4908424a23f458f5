"""Broken and hostile files of Hugging Face's formats: one sentence that names the file, at once,
and nothing large is allocated."""

import json
import os
import struct
import time
import tracemalloc

import pytest
import torch
from conftest import tiny_args, write_adapter

from llama.checkpoint import merge_adapter, open_checkpoint, random_checkpoint, write_hf
from llama.text.tokenizer_folder import read_folder

ARGS = dict(hidden_dim=96, max_seq_len=512)


def refused(action, message, file, kind=ValueError):
    tracemalloc.start()
    start = time.monotonic()
    try:
        with pytest.raises(kind, match=message) as caught:
            action()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert time.monotonic() - start < 5
    assert peak < 64e6
    said = str(caught.value)
    assert str(file) in said
    assert "\n" not in said
    assert len(said) < 500


def header_of(file):
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def with_header(file, header, data, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


NORM, EMBED = "model.norm.weight", "model.embed_tokens.weight"


def edit(**changes):
    """A change of the header: of the fields of model.norm.weight."""

    def change(file):
        header, data = header_of(file)
        header[NORM] |= changes
        with_header(file, header, data)

    return change


def overlap(file):
    header, data = header_of(file)
    start = header[EMBED]["data_offsets"][0]
    header[NORM]["data_offsets"] = [start, start + 128]
    with_header(file, header, data)


def gap(file):
    header, data = header_of(file)
    del header[NORM]
    with_header(file, header, data)


def raw(text, data=b""):
    return lambda file: with_header(file, text, data)


def whole(data):
    return lambda file: file.write_bytes(data)


def twice(file):
    header, data = header_of(file)
    text = json.dumps(header)
    with_header(
        file, (text[:-1] + ', "' + NORM + '": ' + json.dumps(header[NORM]) + "}").encode(), data
    )


def key_twice(file):
    header, data = header_of(file)
    text = json.dumps(header).replace('"shape": [64]', '"shape": [1], "shape": [64]', 1)
    with_header(file, text.encode(), data)


def cut(size):
    return lambda file: file.write_bytes(file.read_bytes()[:size])


def more(file):
    file.write_bytes(file.read_bytes() + bytes(64))


def sparse(file):
    """A header of 2^40 bytes in a file that has them, without taking room on the disk."""
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", 2**40))
        stream.truncate(2**40 + 16)


FILES = {
    "overlapping": (overlap, r"overlaps|leaves a gap"),
    "a gap": (gap, "leaves a gap after|tensors end at byte"),
    "overlong": (edit(data_offsets=[0, 2**40]), r"norm\.weight has 1099511627776 bytes"),
    "past the end": (edit(data_offsets=[2**40, 2**40 + 128]), "leaves a gap after"),
    "negative": (edit(data_offsets=[-128, 0]), r"has the offsets \[-128, 0\]"),
    "backwards": (edit(data_offsets=[128, 0]), r"has the offsets \[128, 0\]"),
    "three offsets": (edit(data_offsets=[0, 64, 128]), "has the offsets"),
    "offsets that are no numbers": (edit(data_offsets=["0", "128"]), "has the offsets"),
    "a float offset": (edit(data_offsets=[0.0, 128.0]), "has the offsets"),
    "true as an offset": (edit(data_offsets=[True, 128]), "has the offsets"),
    "a huge offset": (edit(data_offsets=[0, 10**400]), "has the offsets"),
    "a negative shape": (edit(shape=[-64]), r"has the shape \[-64\]"),
    "a shape that overflows": (edit(shape=[2**32, 2**32]), r"has 128 bytes, and BF16.*needs"),
    "many dimensions": (edit(shape=[1] * 1000 + [64]), "has the shape"),
    "a wrong dtype": (edit(dtype="F32"), r"has 128 bytes, and F32 \[64\] needs 256"),
    "an unknown dtype": (edit(dtype="Q4_0"), "unknown dtype 'Q4_0'"),
    "a dtype that is a list": (edit(dtype=["BF16"]), "unknown dtype"),
    "integers": (edit(dtype="I16"), r"is I16; these are read"),
    "an unknown field": (edit(extra=1), "not given as dtype, shape and data_offsets"),
    "a tensor that is a list": (raw(b'{"a": [1]}'), "not given as dtype"),
    "a tensor twice": (twice, r"the key 'model\.norm\.weight' comes twice"),
    "a key twice": (key_twice, "the key 'shape' comes twice"),
    "a header of 2^63 bytes": (whole(struct.pack("<Q", 2**63) + b"{}"), "is cut short or no saf"),
    "a header longer than the file": (
        raw(b"{}" + b" " * 64, b"") and cut(40),
        "is cut short or no",
    ),
    "a header of a terabyte": (sparse, "more than 8388608 are not read"),
    "nested lists": (raw(b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"), "header is broken"),
    "no JSON": (raw(b"{" + b"\xff" * 64), "header is broken"),
    "a list": (raw(b"[1, 2]"), r"does not begin with \{"),
    "spaces before": (raw(b"  {}"), r"does not begin with \{"),
    "no tensors": (raw(b"{}"), "0 layers"),
    "nothing": (whole(b""), "is cut short: 0 bytes"),
    "five bytes": (cut(5), "is cut short: 5 bytes"),
    "half of it": (cut(20_000), "tensors end at byte|is cut short"),
    "more behind it": (more, "tensors end at byte"),
    "a web page": (whole(b"<!DOCTYPE html><html>" + b" " * 99), "is a web page"),
    "a git-lfs pointer": (
        whole(b"version https://git-lfs.github.com/spec/v1\n"),
        "git-lfs pointer",
    ),
    "a zip archive": (whole(b"PK\x03\x04" + bytes(999)), "header|cut short"),
    "names of a megabyte": (
        raw(json.dumps({"x" * 2**20: {"dtype": "BF16"}}).encode()),
        "not given",
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_a_hostile_safetensors_file_is_refused(tmp_path, name):
    change, message = FILES[name]
    write_hf(random_checkpoint(tiny_args(**ARGS)), tmp_path)
    file = tmp_path / "model.safetensors"
    change(file)
    refused(lambda: open_checkpoint(tmp_path), message, file)


def test_something_else_than_a_file_is_refused(tmp_path):
    write_hf(random_checkpoint(tiny_args(**ARGS)), tmp_path)
    file = tmp_path / "model.safetensors"
    file.unlink()
    file.mkdir()
    refused(lambda: open_checkpoint(tmp_path), "is not a file", file)
    file.rmdir()
    os.mkfifo(file)
    refused(lambda: open_checkpoint(tmp_path), "is not a file", file)
    file.unlink()
    refused(lambda: open_checkpoint(tmp_path), "is missing", file, FileNotFoundError)
    (tmp_path / "pytorch_model.bin").touch()
    refused(lambda: open_checkpoint(tmp_path), r"pickles .* not read", file, FileNotFoundError)


# --- the index


@pytest.fixture
def sharded(tmp_path):
    folder = tmp_path / "model"
    write_hf(random_checkpoint(tiny_args(**ARGS)), folder, max_shard_bytes=60_000)
    return folder


INDEX = "model.safetensors.index.json"


def place(name, value):
    def change(folder):
        index = json.loads((folder / INDEX).read_text())
        index["weight_map"][name] = value
        (folder / INDEX).write_text(json.dumps(index))

    return change


def outside(folder):
    """The first shard lies outside and the index is told so by `..`."""
    index = (folder / INDEX).read_text()
    (folder / "model-00001-of-00003.safetensors").rename(folder.parent / "x.safetensors")
    (folder / INDEX).write_text(index.replace("model-00001-of-00003", "../x"))


def link(folder):
    file = folder / "model-00001-of-00003.safetensors"
    file.unlink()
    file.symlink_to(folder.parent / "gone.safetensors")


def missing(folder):
    (folder / "model-00002-of-00003.safetensors").unlink()


INDICES = {
    "a parent folder": (outside, r"'\.\./x\.safetensors', which is no name"),
    "an absolute path": (place(NORM, "/etc/passwd"), "'/etc/passwd', which is no name"),
    "an absolute path of weights": (place(NORM, "/weights/x.safetensors"), "which is no name"),
    "another drive": (place(NORM, "C:\\x.safetensors"), "which is no name"),
    "a hidden file": (place(NORM, "..safetensors"), "which is no name"),
    "a null byte": (place(NORM, "a\0.safetensors"), "which is no name"),
    "a link to nothing": (link, r"is a link to .*gone\.safetensors, which is missing"),
    "a missing file": (missing, r"model-00002-of-00003\.safetensors is missing"),
    "a file that never was": (place(NORM, "no.safetensors"), r"no\.safetensors is missing"),
    "no file name": (place(NORM, 7), "lies in 7"),
    "another file's tensor": (place(NORM, "model-00001-of-00003.safetensors"),
                              "differ in model.norm.weight, which is in the index only"),
    "a tensor that is nowhere": (place("model.layers.9.x", "model-00001-of-00003.safetensors"),
                                 "model.layers.9.x, which is in the index only"),
    "no map": (lambda folder: (folder / INDEX).write_text("{}"), "has no weight_map"),
    "a list": (lambda folder: (folder / INDEX).write_text("[]"), "needs to be an object"),
    "no JSON": (lambda folder: (folder / INDEX).write_text("weights"), "is not the JSON"),
    "a tensor twice": (
        lambda folder: (folder / INDEX).write_text('{"weight_map": {"a": "b", "a": "c"}}'),
        "the key 'a' comes twice",
    ),
    "nine megabytes": (
        lambda folder: (folder / INDEX).write_text("[" * 9 * 2**20), "larger than 8 MiB"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", INDICES)
def test_a_hostile_index_is_refused(sharded, name):
    change, message = INDICES[name]
    assert open_checkpoint(sharded).shards == 3
    change(sharded)
    kind = FileNotFoundError if message.endswith("safetensors is missing") else ValueError
    refused(lambda: open_checkpoint(sharded), message, sharded, kind)


@pytest.mark.parametrize("moved", [False, True])
def test_links_of_the_hubs_cache_are_followed_wherever_its_blobs_lie(sharded, tmp_path, moved):
    blobs, snapshot = tmp_path / "hub/blobs", tmp_path / "hub/snapshots/abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (tmp_path / "disk").mkdir()
    for number, file in enumerate(sorted(sharded.iterdir())):
        file.rename((tmp_path / "disk" if moved else blobs) / str(number))
        if moved:
            (blobs / str(number)).symlink_to(tmp_path / f"disk/{number}")
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    assert open_checkpoint(snapshot).shards == 3
    (tmp_path / "elsewhere").symlink_to(snapshot, target_is_directory=True)
    assert open_checkpoint(tmp_path / "elsewhere").shards == 3


def test_links_out_of_a_folder_are_followed(sharded, tmp_path):
    (tmp_path / "links").mkdir()
    for file in sharded.iterdir():
        (tmp_path / "links" / file.name).symlink_to(file)
    assert open_checkpoint(tmp_path / "links").shards == 3


def test_a_tensor_that_the_index_does_not_name_is_refused(sharded):
    index = json.loads((sharded / INDEX).read_text())
    del index["weight_map"][NORM]
    (sharded / INDEX).write_text(json.dumps(index))
    refused(lambda: open_checkpoint(sharded), "is in the file only", sharded)


# --- config.json and the rest


CONFIGS = {
    "another architecture": ({"architectures": ["QwenForCausalLM"]}, "QwenForCausalLM"),
    "another model_type": ({"model_type": "gemma2"}, "model_type 'gemma2'"),
    "a model_type that is a list": ({"model_type": ["llama"]}, "model_type"),
    "layers without end": ({"num_hidden_layers": 2**31 - 1}, "2 layers, and config.json says"),
    "more layers than that": ({"num_hidden_layers": 10**30}, "needs to be a whole number"),
    "a huge vocabulary": ({"vocab_size": 2**30}, r"should be \(1073741824, 64\)"),
    "no heads": ({"num_attention_heads": 0}, "needs to be a whole number above 0"),
    "heads that do not fit": ({"num_attention_heads": 7, "head_dim": None}, "no multiple of"),
    "a head of odd size": ({"head_dim": 7}, "rotary pairs need an even"),
    "a number that is none": ({"rms_norm_eps": float("nan")}, "rms_norm_eps needs to be above 0"),
    "an infinite base": ({"rope_theta": float("inf")}, "rope_theta needs to be above 0"),
    "scaling by zero": (
        {"rope_scaling": {"rope_type": "llama3", "factor": 0, "low_freq_factor": 1,
                          "high_freq_factor": 4, "original_max_position_embeddings": 8192}},
        "factor needs to be above 0",
    ),
    "its kind is a list": ({"rope_scaling": {"rope_type": ["llama3"]}}, r"type \['llama3'\]"),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_a_hostile_config_is_refused(tmp_path, name):
    changes, message = CONFIGS[name]
    write_hf(random_checkpoint(tiny_args(**ARGS)), tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    refused(lambda: open_checkpoint(tmp_path), message, tmp_path)


@pytest.mark.parametrize("file", ["config.json", "generation_config.json", "tokenizer_config.json"])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not the JSON it should be"),
        ("[]", "needs to be an object"),
        ('{"a": 1, "a": 2}', "the key 'a' comes twice"),
        ('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}", "is not the JSON it should be"),
        ('{"a": "\ud800"}', "is not the JSON it should be"),
        ("{" + " " * 2**24 + "}", "is larger than"),
    ],
)
def test_hostile_json_is_refused(tmp_path, file, text, message):
    write_hf(random_checkpoint(tiny_args(**ARGS)), tmp_path)
    (tmp_path / file).write_bytes(text.encode(errors="surrogatepass"))
    refused(lambda: open_checkpoint(tmp_path), message, tmp_path / file)


def test_a_chat_template_that_is_no_text_is_refused(tmp_path):
    write_hf(random_checkpoint(tiny_args(**ARGS)), tmp_path)
    file = tmp_path / "tokenizer_config.json"
    file.write_text('{"chat_template": 7}')
    refused(lambda: open_checkpoint(tmp_path), "chat_template is 7, which is no text", file)
    file = tmp_path / "chat_template.jinja"
    file.write_bytes(b"\xff" * 100)
    refused(lambda: open_checkpoint(tmp_path), "is not UTF-8", file)
    file.write_bytes(b"x" * 2**21)
    refused(lambda: open_checkpoint(tmp_path), "is larger than 1 MiB", file)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "has no list added_tokens"),
        ('{"added_tokens": [], "model": []}', "has no model"),
        ('{"added_tokens": [{"id": 10000000000, "content": "x"}], "model": {}}', "pre_tokenizer"),
        ('{"added_tokens": [7], "model": {}}', "an added token is 7"),
        ('{"added_tokens": [], "model": {"vocab": {}, "vocab": {}}}', "comes twice"),
    ],
)
def test_a_hostile_tokenizer_is_refused(tmp_path, text, message):
    file = tmp_path / "tokenizer.json"
    file.write_text(text)
    refused(lambda: read_folder(file), message, file)


# --- adapters


ADAPTERS = {
    "another shape": ({}, dict(dim=128), r"lora_A\.weight is \(4, 128\).* \(4, 64\)"),
    "more layers": ({}, dict(n_layers=3), "layers.2.self_attn.q_proj.lora_A.weight is nothing"),
    "more heads": ({}, dict(n_kv_heads=8), r"v_proj\.lora_B\.weight is \(64, 4\).* \(16, 4\)"),
    "another rank": ({"r": 2**15}, {}, r"r 32768 it should be \(32768, 64\)"),
    "a rank without end": ({"r": 10**30}, {}, "r needs to be a whole number above 0"),
    "an infinite scale": ({"lora_alpha": float("inf")}, {}, "lora_alpha needs to be a number"),
    "targets that are numbers": ({"target_modules": [7]}, {}, "changes 7"),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_hostile_adapter_is_refused(tmp_path, name):
    config, shape, message = ADAPTERS[name]
    base = random_checkpoint(tiny_args(**ARGS))
    write_adapter(tmp_path, tiny_args(**{**ARGS, **shape}))
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    refused(lambda: merge_adapter(base, tmp_path), message, tmp_path)


def test_an_adapter_in_a_broken_file_is_refused(tmp_path):
    base = random_checkpoint(tiny_args(**ARGS))
    write_adapter(tmp_path, base.args)
    file = tmp_path / "adapter_model.safetensors"
    cut(200)(file)
    refused(lambda: merge_adapter(base, tmp_path), "is cut short", file)


def test_there_are_more_than_fifteen_of_them():
    assert len(FILES) + len(INDICES) + len(CONFIGS) + len(ADAPTERS) > 60
    assert torch.get_default_dtype() == torch.float32
