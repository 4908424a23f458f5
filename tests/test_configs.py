"""What transformers makes of a folder's config.json and names, this library makes of it too: logits
past the original context, ties, prefixes; or it is refused by name."""

import json
import logging

import pytest
import torch
from conftest import tiny_args
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from llama.cache import Batch
from llama.checkpoint import (
    convert,
    open_checkpoint,
    random_checkpoint,
    write_gguf,
    write_hf,
    write_meta,
)
from llama.loading import load
from llama.loading.settings import with_limits
from llama.model import RopeScaling, rope_frequencies
from llama.parallel import ONE

SAFETENSORS = "model.safetensors"
FAR = torch.tensor([0, 1, 2, 3, 50, 51, 63, 64, 65, 100, 120, 127])
TOKENS = torch.tensor([3, 14, 15, 92, 65, 35, 89, 79, 32, 38, 46, 26])


@pytest.fixture
def folder(tmp_path):
    return hf_folder(tmp_path / "hf")


def hf_folder(path, tied=False):
    """A random model of unit scale whose context is 64 tokens."""
    args = tiny_args(tied=tied, context_length=64, head_dim=16, rope_theta=10000.0)
    write_hf(random_checkpoint(args, dtype=torch.float32), path)
    return path


def edit(folder, **keys):
    file = folder / "config.json"
    said = json.loads(file.read_text()) | keys
    file.write_text(json.dumps({key: value for key, value in said.items() if value is not ...}))


def rename(folder, change):
    held = load_file(folder / SAFETENSORS)
    held = {change(name): tensor for name, tensor in held.items()}
    save_file({k: v for k, v in held.items() if k}, folder / SAFETENSORS, metadata={"format": "pt"})


def far_logits(checkpoint, positions=FAR):
    with torch.inference_mode():
        model = load(checkpoint, ranks=ONE, device="cpu")
        return model.forward_flat(TOKENS, positions, Batch([len(TOKENS)]))


def their_logits(folder, positions=FAR):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        return model(TOKENS[None], position_ids=positions[None]).logits[0]


def assert_same(folder, positions=FAR):
    expected = their_logits(folder, positions)
    got = far_logits(open_checkpoint(folder), positions)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)
    return expected


# --- rotary scaling

KINDS = {
    "default": (dict(rope_type="default"), 64),
    "linear": (dict(rope_type="linear", factor=4.0), 256),
    "linear, a broken factor": (dict(type="linear", factor=1.5), 96),
    "yarn": (dict(rope_type="yarn", factor=4.0), 256),
    "yarn, its context said": (
        dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=32), 128),
    "yarn, its context alone": (
        dict(rope_type="yarn", factor=None, original_max_position_embeddings=16), 64),
    "yarn, every word": (
        dict(rope_type="yarn", factor=8.0, original_max_position_embeddings=64, beta_fast=16,
             beta_slow=2, attention_factor=1.25, truncate=False), 512),
    "yarn, mscale": (
        dict(rope_type="yarn", factor=8.0, mscale=0.7, mscale_all_dim=1.0,
             original_max_position_embeddings=64), 512),
    "llama3": (
        dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
             original_max_position_embeddings=16), 64),
    "llama3, its context not said": (
        dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0), 64),
    "longrope of one set": (
        dict(rope_type="longrope", factor=4.0, short_factor=[1 + n / 3 for n in range(8)],
             long_factor=[1 + n / 3 for n in range(8)], original_max_position_embeddings=16), 64),
}  # fmt: skip


@pytest.mark.parametrize("newer", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_scaled_positions_are_transformers_also_past_the_original_context(folder, kind, newer):
    said, context = KINDS[kind]
    plain = their_logits(folder)
    theta = {"rope_theta": 10000.0} if newer else {}
    if newer:
        edit(folder, rope_theta=..., rope_scaling=..., rope_parameters={**said, **theta})
    else:
        edit(folder, rope_scaling=dict(said))
    expected = assert_same(folder)
    assert (kind == "default") == bool((expected - plain).abs().max() < 1e-3)
    assert open_checkpoint(folder).args.context_length == context


@pytest.mark.parametrize("kind", KINDS)
def test_scaling_goes_through_every_format(folder, tmp_path, kind):
    edit(folder, rope_scaling=dict(KINDS[kind][0]))
    source = open_checkpoint(folder)
    expected = far_logits(source)
    for name in ("hf", "gguf", "meta"):
        path = tmp_path / ("out.gguf" if name == "gguf" else f"{name} out")
        convert(source, path, name)
        again = open_checkpoint(path)
        torch.testing.assert_close(far_logits(again), expected, rtol=0, atol=1e-4)
        assert again.args.context_length == source.args.context_length
        if name == "hf":
            torch.testing.assert_close(their_logits(path), expected, rtol=0, atol=1e-4)


def test_a_context_beside_the_object_holds_as_in_transformers(folder):
    edit(folder, original_max_position_embeddings=16,
         rope_scaling=dict(KINDS["yarn, its context said"][0]))  # fmt: skip
    assert_same(folder)


def test_dynamic_scaling_is_none_within_the_context_and_ends_there(folder, caplog):
    edit(folder, rope_scaling={"rope_type": "dynamic", "factor": 4.0})
    within = FAR.clamp(max=63)
    assert_same(folder, within)
    assert "dynamic rotary scaling" in caplog.text
    args = open_checkpoint(folder).args
    assert args.context_length == 64
    with pytest.raises(ValueError, match="the model's context is 64 tokens"):
        with_limits(args, 1, 65)


def test_a_factor_of_the_caller_stretches_the_context(folder):
    args = open_checkpoint(folder, rope_scaling=4).args
    assert args.rope_scaling == RopeScaling(factor=4.0, original_context=64)
    assert with_limits(args, 1, 256).max_seq_len == 256
    with pytest.raises(ValueError, match="the model's context is 256 tokens"):
        with_limits(args, 1, 257)
    edit(folder, rope_scaling=dict(rope_type="llama3", factor=4.0, low_freq_factor=1.0,
                                   high_freq_factor=4.0))  # fmt: skip
    stretched = open_checkpoint(folder)
    assert torch.equal(rope_frequencies(args), rope_frequencies(stretched.args))
    again = open_checkpoint(folder, rope_scaling=16).args
    assert (again.rope_scaling.original_context, again.context_length) == (64, 1024)
    own = RopeScaling(factor=3.0, original_context=100)
    assert open_checkpoint(folder, rope_scaling=own).args.context_length == 300
    none = open_checkpoint(folder, rope_scaling=1).args
    assert (none.rope_scaling, none.context_length) == (None, 64)


def test_llama_3_stretched_by_8_has_the_context_of_llama_3_1(tmp_path):
    write_meta(random_checkpoint(tiny_args(context_length=8192)), tmp_path)
    assert open_checkpoint(tmp_path, rope_scaling=8).args.context_length == 131072
    assert open_checkpoint(tmp_path, rope_scaling=2).args.context_length == 16384


@pytest.mark.parametrize("kind", ["linear", "yarn"])
def test_scaling_from_the_first_token_on_is_kept(folder, kind, caplog):
    edit(folder, rope_scaling=dict(KINDS[kind][0]))
    plain = open_checkpoint(folder)
    assert open_checkpoint(folder, rope_scaling=1).args == plain.args
    assert "rope_scaling=1 changes nothing" in caplog.text
    with pytest.raises(ValueError, match=r"rope_scaling=2: .*from the first token on"):
        open_checkpoint(folder, rope_scaling=2)


def test_the_attention_factor_of_yarn_is_needed_for_its_logits(folder):
    edit(folder, rope_scaling=dict(KINDS["yarn"][0]))
    checkpoint = open_checkpoint(folder)
    factors = checkpoint.args.rope_scaling.factors
    without = open_checkpoint(folder, rope_scaling=RopeScaling(factors=factors))
    assert (far_logits(checkpoint) - far_logits(without)).abs().max() > 1e-3


# --- names of tensors


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "change",
    [
        lambda name: name.removeprefix("model."),
        lambda name: f"model.{name}",
        lambda name: name if "lm_head" in name else f"model.{name}",
    ],
)
def test_one_model_more_or_less_before_the_names_is_found(tmp_path, change, tied):
    folder = hf_folder(tmp_path / "hf", tied)
    expected = far_logits(open_checkpoint(folder))
    rename(folder, change)
    assert torch.equal(far_logits(open_checkpoint(folder)), expected)
    torch.testing.assert_close(their_logits(folder), expected, rtol=0, atol=1e-4)


def test_a_llamamodel_saved_alone_loads_where_its_output_is_tied(tmp_path):
    folder = hf_folder(tmp_path / "tied", tied=True)
    expected = far_logits(open_checkpoint(folder))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).model
    model.save_pretrained(tmp_path / "alone")
    assert json.loads((tmp_path / "alone/config.json").read_text())["architectures"] == [
        "LlamaModel"
    ]
    assert torch.equal(far_logits(open_checkpoint(tmp_path / "alone")), expected)
    edit(tmp_path / "alone", tie_word_embeddings=False)
    with pytest.raises(ValueError, match=r"lacks lm_head\.weight"):
        open_checkpoint(tmp_path / "alone")


@pytest.mark.parametrize(
    "prefix", ["language_model.", "model.language_model.", "module.", "_orig_mod.", "base_model."]
)
def test_any_other_prefix_is_named(folder, prefix):
    rename(folder, lambda name: prefix + name)
    with pytest.raises(ValueError, match=rf"have '{prefix}.*embed_tokens.*transformers") as caught:
        open_checkpoint(folder)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model."])
def test_a_prefix_in_metas_files_is_named(tmp_path, prefix):
    write_meta(random_checkpoint(tiny_args()), tmp_path)
    file = tmp_path / "consolidated.00.pth"
    state = {prefix + k: v.clone() for k, v in torch.load(file, weights_only=True).items()}
    torch.save(state, file)
    with pytest.raises(ValueError, match=rf"tensors have '{prefix}' before .* {prefix}layers"):
        open_checkpoint(tmp_path)


def test_two_names_of_one_tensor_are_refused(folder):
    held = load_file(folder / SAFETENSORS)
    held["norm.weight"] = held["model.norm.weight"].clone()
    save_file(held, folder / SAFETENSORS, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"holds model\.norm\.weight under two names"):
        open_checkpoint(folder)


def test_the_format_of_torch_before_1_6_is_called_that(tmp_path):
    write_meta(random_checkpoint(tiny_args()), tmp_path)
    file = tmp_path / "consolidated.00.pth"
    state = torch.load(file, weights_only=True)
    torch.save(state, file, _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match=r"wrote before torch 1\.6.* torch\.save it again"):
        open_checkpoint(tmp_path)


# --- ties


def head(folder, change):
    held = load_file(folder / SAFETENSORS)
    save_file(change(held), folder / SAFETENSORS, metadata={"format": "pt"})


@pytest.mark.parametrize("half", [None, torch.bfloat16, torch.float16])
def test_an_output_of_the_same_numbers_in_other_bytes_is_tied(tmp_path, half, caplog):
    folder = hf_folder(tmp_path / "hf", tied=True)

    def change(held):
        table = held["model.embed_tokens.weight"].to(half or torch.float32)
        return held | {"model.embed_tokens.weight": table.float(), "lm_head.weight": table.clone()}

    head(folder, change)
    assert_same(folder)
    assert open_checkpoint(folder).args.tied
    assert "differs" not in caplog.text


def test_an_output_of_other_numbers_is_its_own_as_in_transformers(tmp_path, caplog):
    folder = hf_folder(tmp_path / "hf", tied=True)
    head(folder, lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"] + 0.1})
    assert_same(folder)
    assert not open_checkpoint(folder).args.tied
    assert any("differs" in r.getMessage() for r in caplog.records if r.levelno == logging.WARNING)


def test_an_index_may_name_an_output_that_is_tied_and_nowhere(tmp_path):
    folder = tmp_path / "hf"
    args = tiny_args(tied=True)
    write_hf(random_checkpoint(args), folder, max_shard_bytes=2**16)
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"]["lm_head.weight"] = min(index["weight_map"].values())
    file.write_text(json.dumps(index))
    assert open_checkpoint(folder).args.tied
    edit(folder, tie_word_embeddings=False)
    with pytest.raises(ValueError, match=r"lm_head\.weight, which is in the index only"):
        open_checkpoint(folder)


def test_metas_output_of_the_same_numbers_is_tied_where_params_json_says_so(tmp_path):
    write_meta(random_checkpoint(tiny_args()), tmp_path)
    file = tmp_path / "consolidated.00.pth"
    state = {k: v.clone() for k, v in torch.load(file, weights_only=True).items()}
    params = json.loads((tmp_path / "params.json").read_text())
    (tmp_path / "params.json").write_text(json.dumps(params | {"tied": True}))
    with pytest.raises(ValueError, match=r"output\.weight is a tensor of its own"):
        open_checkpoint(tmp_path)
    torch.save(state | {"output.weight": state["tok_embeddings.weight"].clone()}, file)
    assert open_checkpoint(tmp_path).args.tied


# --- where files lie


@pytest.mark.parametrize("name", ["sha256-0123456789abcdef", "MODEL.GGUF", "model.bin", "m.Q8_0"])
def test_a_gguf_file_is_known_by_how_it_begins(tmp_path, name):
    write_gguf(random_checkpoint(tiny_args()), tmp_path / "model.gguf")
    (tmp_path / "folder").mkdir()
    (tmp_path / "model.gguf").rename(tmp_path / "folder" / name)
    (tmp_path / "folder/LICENSE").write_text("words")
    assert open_checkpoint(tmp_path / "folder" / name).args.n_layers == tiny_args().n_layers
    assert open_checkpoint(tmp_path / "folder").path == tmp_path / "folder" / name


def test_a_file_that_is_no_gguf_is_called_that(tmp_path):
    (tmp_path / "words").write_text("words")
    with pytest.raises(ValueError, match=r"is a file; needed is a \.gguf file.*by how it begins"):
        open_checkpoint(tmp_path / "words")
