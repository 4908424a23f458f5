"""Laws of Hugging Face folders: the tensors of Meta's files, bit for bit, both ways; the logits of
transformers, on folders that we wrote and on folders that it wrote."""

import dataclasses
import json
import random
import shutil

import pytest
import torch
from conftest import BYTES_VOCAB, tiny_args, write_tokenizer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_tokenizer import OFFICIAL
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Theirs
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from llama import Llama
from llama.checkpoint import open_checkpoint, random_checkpoint, write_hf, write_meta
from llama.checkpoint.hf.config import config_of, read_config
from llama.checkpoint.hf.read import hf_name
from llama.checkpoint.meta.params import params_of
from llama.commands.convert import convert
from llama.loading import load
from llama.model import ModelArgs, RopeScaling, rope_frequencies
from llama.names import local_slice
from llama.parallel import ONE, Ranks
from llama.text.tokenizer_folder import read_folder
from llama.text.tokenizer_json import ranks_file, tokenizer_json
from llama.tokenizer import Tokenizer

SCALED = dict(use_scaled_rope=True, context_length=512)
SHAPES = {
    "3": dict(),
    "3.1": SCALED | dict(rope_scaling=RopeScaling(factor=8.0, original_context=64)),
    "3.2": SCALED | dict(rope_scaling=RopeScaling(factor=32.0, original_context=64), tied=True),
    "head_dim": dict(head_dim=24, rope_theta=10000.0),
    "one query per key": dict(n_kv_heads=8, norm_eps=1e-6),
    "one key": dict(n_kv_heads=1),
}


def shape(name, **changes) -> ModelArgs:
    return tiny_args(
        **{
            "hidden_dim": 96,
            "multiple_of": 256,
            "max_seq_len": 2048,
            "max_batch_size": 32,
            **SHAPES[name],
            **changes,
        }
    )


def edit(file, **changes):
    said = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in said.items() if value != "absent"}))


def same_tensors(one, other):
    assert one.tensors.keys() == other.tensors.keys()
    for name, tensor in one.tensors.items():
        assert torch.equal(tensor.read(), other.tensors[name].read()), name
        assert tensor.dtype == other.tensors[name].dtype


def same_files(one, other):
    files = sorted(file.name for file in one.glob("*.safetensors"))
    assert files
    assert files == sorted(file.name for file in other.glob("*.safetensors"))
    for name in [*files, "config.json"]:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


# --- the same tensors


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", SHAPES)
def test_metas_files_and_hugging_faces_hold_the_same_tensors(tmp_path, name, dtype):
    source = random_checkpoint(shape(name), dtype=dtype)
    write_meta(source, tmp_path / "meta", shards=1)
    write_hf(source, tmp_path / "hf", max_shard_bytes=30_000)
    ours, theirs = open_checkpoint(tmp_path / "meta"), open_checkpoint(tmp_path / "hf")
    assert theirs.shards > 1
    same_tensors(source, ours)
    same_tensors(ours, theirs)
    assert (theirs.args, theirs.dtype) == (ours.args, dtype)


@pytest.mark.parametrize("name", SHAPES)
def test_out_and_in_again_is_identity(tmp_path, name):
    write_hf(random_checkpoint(shape(name)), tmp_path / "a")
    write_hf(open_checkpoint(tmp_path / "a"), tmp_path / "b")
    same_files(tmp_path / "a", tmp_path / "b")
    write_meta(open_checkpoint(tmp_path / "b"), tmp_path / "meta")
    write_hf(open_checkpoint(tmp_path / "meta"), tmp_path / "c")
    same_files(tmp_path / "a", tmp_path / "c")


def test_every_range_of_a_tensor_is_that_range(tmp_path):
    source = random_checkpoint(shape("head_dim"))
    write_hf(source, tmp_path)
    theirs = open_checkpoint(tmp_path)
    for name, tensor in theirs.tensors.items():
        whole = source.tensors[name].read()
        for dim, size in enumerate(tensor.shape):
            for start, stop in ((0, size), (0, 1), (size // 3, size // 2 + 1), (5, 5), (7, size)):
                part = tensor.read(dim, start, stop)
                assert torch.equal(part, whole.narrow(dim, start, stop - start)), (name, dim, start)


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_every_rank_gets_its_own_rows(tmp_path, size):
    source = random_checkpoint(shape("3"))
    write_hf(source, tmp_path)
    for rank in range(size):
        model = load(open_checkpoint(tmp_path), ranks=Ranks(rank, size), device="cpu")
        for name, tensor in source.tensors.items():
            cut = local_slice(name, source.args, rank, size)
            assert torch.equal(model.get_parameter(name), tensor.read(*(cut or ()))), name


def test_on_a_cpu_what_is_not_reordered_is_the_mapped_file(tmp_path):
    write_hf(random_checkpoint(shape("3")), tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    for name, tensor in checkpoint.tensors.items():
        reordered = name.endswith(("wq.weight", "wk.weight"))
        assert (tensor.mapped() is None) == reordered
    model = load(checkpoint, ranks=ONE, device="cpu")
    mapped = checkpoint.tensors["layers.0.feed_forward.w2.weight"].mapped()
    assert model.layers[0].feed_forward.w2.weight.data_ptr() == mapped.data_ptr()


def test_a_file_whose_tensors_lie_at_odd_places_is_read(tmp_path):
    source = random_checkpoint(shape("3"))
    write_hf(source, tmp_path)
    file = tmp_path / "model.safetensors"
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    file.write_bytes(
        (length + 1).to_bytes(8, "little") + raw[8 : 8 + length] + b" " + raw[8 + length :]
    )
    theirs = open_checkpoint(tmp_path)
    assert theirs.tensors["norm.weight"].mapped() is None
    same_tensors(source, theirs)
    for dim in (0, 1):
        part = theirs.tensors["layers.0.feed_forward.w2.weight"].read(dim, 3, 40)
        whole = source.tensors["layers.0.feed_forward.w2.weight"].read(dim, 3, 40)
        assert torch.equal(part, whole)


def test_what_the_package_reads_is_what_was_written(tmp_path):
    write_hf(random_checkpoint(shape("3")), tmp_path, dtype=torch.float16)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert file.get_tensor("model.norm.weight").dtype == torch.float16
    tensors = load_file(tmp_path / "model.safetensors")
    source = random_checkpoint(shape("3"))
    assert set(tensors) == {hf_name(name) for name in source.tensors}
    norm = source.tensors["norm.weight"].read().half()
    assert torch.equal(tensors["model.norm.weight"], norm)


# --- the same logits as transformers


def logits_agree(folder, seed=0):
    ids = torch.randint(0, 96, (2, 300), generator=torch.Generator().manual_seed(seed))
    theirs = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ours = load(open_checkpoint(folder), ranks=ONE, device="cpu", dtype=torch.float32)
    with torch.inference_mode():
        expected = theirs(ids).logits
        got = ours(ids, 0)
    assert expected.std() > 0.01
    torch.testing.assert_close(got, expected, rtol=0, atol=3e-5)


@pytest.mark.parametrize("name", SHAPES)
def test_logits_equal_transformers_on_what_we_wrote(tmp_path, name):
    write_hf(random_checkpoint(shape(name), dtype=torch.float32), tmp_path)
    logits_agree(tmp_path)


LLAMA3 = dict(rope_type="llama3", low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=64)  # fmt: skip


@pytest.mark.parametrize(
    "changes",
    [
        dict(),
        dict(rope_parameters=LLAMA3 | dict(factor=8.0, rope_theta=500000.0)),
        dict(rope_parameters=LLAMA3 | dict(factor=32.0, rope_theta=500000.0),
             tie_word_embeddings=True),
        dict(head_dim=24, num_key_value_heads=8),
    ],
)  # fmt: skip
def test_logits_equal_transformers_on_what_it_wrote(tmp_path, changes):
    torch.manual_seed(0)
    given = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=8,
                 num_key_value_heads=2, vocab_size=96, max_position_embeddings=512,
                 initializer_range=0.15)  # fmt: skip
    LlamaForCausalLM(LlamaConfig(**given | changes)).save_pretrained(
        tmp_path, max_shard_size="100KB"
    )
    assert (tmp_path / "model.safetensors.index.json").exists()
    logits_agree(tmp_path)
    write_hf(open_checkpoint(tmp_path), tmp_path / "again")
    logits_agree(tmp_path / "again")


def test_the_law_fails_when_rows_are_not_put_back(tmp_path, monkeypatch):
    write_hf(random_checkpoint(shape("3"), dtype=torch.float32), tmp_path)
    monkeypatch.setattr("llama.checkpoint.hf.read.rotary_heads", lambda name, args: 0)
    with pytest.raises(AssertionError, match="not close"):
        logits_agree(tmp_path)


# --- config.json


def test_older_and_newer_spellings_say_the_same(tmp_path):
    args = shape("3.1")
    write_hf(random_checkpoint(args), tmp_path)
    file = tmp_path / "config.json"
    older = json.loads(file.read_text())
    plain = open_checkpoint(tmp_path).args
    scaling = older.pop("rope_scaling")
    theta = older.pop("rope_theta")
    file.write_text(json.dumps(older | {"rope_parameters": scaling | {"rope_theta": theta}}))
    assert open_checkpoint(tmp_path).args == plain
    scaling["type"] = scaling.pop("rope_type")
    file.write_text(json.dumps(older | {"rope_scaling": scaling, "rope_theta": theta}))
    assert open_checkpoint(tmp_path).args == plain
    assert rope_frequencies(plain).equal(rope_frequencies(args))


def test_absent_keys_have_the_defaults_of_the_class(tmp_path):
    write_hf(random_checkpoint(shape("one query per key")), tmp_path)
    lacking = ("num_key_value_heads", "head_dim", "rms_norm_eps", "rope_theta", "rope_scaling",
               "max_position_embeddings", "tie_word_embeddings", "torch_dtype")  # fmt: skip
    edit(tmp_path / "config.json", **dict.fromkeys(lacking, "absent"))
    args = open_checkpoint(tmp_path).args
    assert (args.n_kv_heads, args.head_dim, args.norm_eps) == (8, 8, 1e-6)
    assert (args.rope_theta, args.context_length, args.tied) == (10000.0, 2048, False)


def test_released_shapes_come_back_in_metas_terms(tmp_path):
    for meta in (
        dict(dim=4096, n_layers=32, n_heads=32, n_kv_heads=8, multiple_of=1024,
             ffn_dim_multiplier=1.3),
        dict(dim=8192, n_layers=80, n_heads=64, n_kv_heads=8, multiple_of=4096,
             ffn_dim_multiplier=1.3),
        dict(dim=16384, n_layers=126, n_heads=128, n_kv_heads=8, multiple_of=4096,
             ffn_dim_multiplier=1.2),
        dict(dim=2048, n_layers=16, n_heads=32, n_kv_heads=8, ffn_dim_multiplier=1.5, tied=True),
    ):  # fmt: skip
        args = ModelArgs(vocab_size=128256, use_scaled_rope=True, **meta)
        again = read_back(tmp_path / "config.json", config_of(args, "bfloat16", {}))
        assert dataclasses.replace(again, multiple_of=args.multiple_of) == args
        meta = {key: value for key, value in params_of(again).items() if key != "multiple_of"}
        assert not meta.keys() & {"hidden_dim", "head_dim", "context_length"}


def read_back(file, config):
    file.write_text(json.dumps(config))
    return read_config(file, {})[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_scaling": {"type": "linear"}}, "scaling lacks factor"),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "factor 0.5; .* at least 1"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": "4"}}, "factor needs to be a number"),
        ({"rope_scaling": {"rope_type": "su", "factor": 4.0}}, "type 'su'; default, linear"),
        ({"rope_scaling": {"rope_type": "proportional"}}, "type 'proportional'; default, linear"),
        (
            {
                "rope_scaling": {
                    "rope_type": "longrope",
                    "factor": 4.0,
                    "short_factor": [1.0] * 4,
                    "long_factor": [1.0] * 3 + [2.0],
                }
            },
            "'longrope' with other factors",
        ),
        ({"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0]}}, "list of 4 numbers"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "lacks low_freq_factor"),
        ({"rope_parameters": {"rope_theta": 1e6}}, "rope_theta two values: 500000 and 1e"),
        ({"rope_scaling": [1]}, r"needs to be an object, is \[1\]"),
        ({"rope_theta": "many"}, "rope_theta needs to be a number"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; 'silu' is computed"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"hidden_size": 64.0}, "hidden_size needs to be a whole number"),
        ({"vocab_size": True}, "vocab_size needs to be a whole number"),
        ({"num_hidden_layers": "absent"}, "lacks num_hidden_layers"),
        ({"num_hidden_layers": 3}, "2 layers, and config.json says num_hidden_layers 3"),
        ({"rms_norm_eps": -1e-5}, "rms_norm_eps needs to be above 0"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1"),
        ({"eos_token_id": [7, 96]}, r"eos_token_id is 96, and ids are below 96"),
        ({"quantization_config": {"quant_method": "fp8"}}, "says FP8, which is not read"),
        ({"quantization_config": {"quant_method": "awq"}}, "says AWQ, .* unquantized version"),
        ({"quantization_config": {"quant_method": "gptq"}}, "says GPTQ"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "says bitsandbytes"),
        ({"architectures": ["MistralForCausalLM"], "model_type": "mistral"}, "type 'mistral'"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(tmp_path, changes, message):
    write_hf(random_checkpoint(shape("3")), tmp_path)
    edit(tmp_path / "config.json", **changes)
    with pytest.raises(ValueError, match=message) as caught:
        open_checkpoint(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_constants_of_the_caller_hold_whatever_the_file_says(tmp_path):
    write_hf(random_checkpoint(shape("3")), tmp_path)
    edit(tmp_path / "config.json", rope_scaling={"type": "nobody's"})
    own = RopeScaling(factor=4.0)
    assert open_checkpoint(tmp_path, rope_scaling=own).args.rope_scaling == own
    with pytest.raises(ValueError, match='type "nobody\'s"'):
        open_checkpoint(tmp_path, rope_scaling=4)


def test_keys_that_nobody_heeds_are_named_and_a_dtype_that_is_not_that_of_the_weights(
    tmp_path, caplog
):
    write_hf(random_checkpoint(shape("3")), tmp_path)
    edit(tmp_path / "config.json", sliding_window=4096, use_cache=False, torch_dtype="float32")
    assert open_checkpoint(tmp_path).dtype == torch.bfloat16
    said = " ".join(record.getMessage() for record in caplog.records)
    assert "sliding_window" in said
    assert "use_cache" not in said
    assert "says float32, and the weights are torch.bfloat16" in said


# --- every tensor is accounted for


def change_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_known_extras_are_skipped_by_name_with_a_reason(tmp_path):
    write_hf(random_checkpoint(shape("3.2")), tmp_path)

    def change(tensors):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    change_tensors(tmp_path, change)
    skipped = open_checkpoint(tmp_path).skipped
    assert skipped["model.layers.0.self_attn.rotary_emb.inv_freq"] == "derived from rope_theta"
    assert "tied" in skipped["lm_head.weight"]
    change_tensors(tmp_path, lambda tensors: tensors["lm_head.weight"].add_(1))
    assert "lm_head.weight" not in open_checkpoint(tmp_path).skipped


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), r"lacks model\.norm\.weight"),
        (lambda t: t.pop("lm_head.weight"), r"lacks lm_head.* does not say tie_word_embeddings"),
        (lambda t: t.update({"model.layers.1.self_attn.q_proj.bias": torch.ones(64)}),
         r"does not have: model\.layers\.1\.self_attn\.q_proj\.bias"),
        (lambda t: t.update({"model.layers.2.mlp.up_proj.weight": torch.ones(2)}), "3 layers"),
        (lambda t: t.update({"model.norm.weight": torch.ones(63).bfloat16()}),
         r"model\.norm\.weight is \(63,\), and should be \(64,\)"),
        (lambda t: t.update({"model.norm.weight": torch.ones(64, dtype=torch.int64)}),
         r"model\.norm\.weight is I64; these are read: BF16, F16, F32"),
        (lambda t: t.update({"model.norm.weight": torch.ones(64).to(torch.float8_e4m3fn)}),
         r"is F8_E4M3.*unquantized"),
    ],
)  # fmt: skip
def test_missing_unknown_and_wrong_tensors_are_named(tmp_path, change, message):
    write_hf(random_checkpoint(shape("3")), tmp_path)
    change_tensors(tmp_path, change)
    with pytest.raises(ValueError, match=message):
        open_checkpoint(tmp_path)


# --- the tokenizer


def texts(count, seed=0):
    words = ["hello", " ", "\n", "  ", "123", "12345", "é", "漢字", "🙂", "x = f(y)\n\treturn",
             "'S", "'ll", "<|eot", "_id|>", "<|eot_id|>", "\r\n", "\t", "ſ", "…", "٣", "\u3000",
             "\x00", "a\u0301", "ﬁ", "The quick brown fox", "👩‍👩‍👧", "don't", "\u200b", "½",
             ".", "!!", " ,"]  # fmt: skip
    rng = random.Random(seed)
    return ["".join(rng.choices(words, k=rng.randint(0, 24))) for _ in range(count)]


@pytest.fixture
def word_tokenizer():
    words = ["he", "ll", "hell", "hello", " t", " th", " the", "th", "  ", "12", "123", "ow", "el"]
    ranks = [bytes([b]) for b in range(256)] + [word.encode() for word in words]
    ranks += ["漢".encode()[:2], "漢".encode()]
    special = tokenizer_special(len(ranks))
    return Tokenizer.from_ranks({token: i for i, token in enumerate(ranks)}, special)


def tokenizer_special(start):
    path_less = Tokenizer.from_ranks(
        {bytes([b]): b for b in range(256)}, {"<|begin_of_text|>": 256, "<|end_of_text|>": 257}
    )
    assert path_less.stop_tokens == {257}
    names = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
             "<|eom_id|>", "<|eot_id|>", "<think>"]  # fmt: skip
    return {name: start + i for i, name in enumerate(names)}


def test_transformers_gives_the_same_ids_on_the_exported_tokenizer(tmp_path, word_tokenizer):
    args = shape("3", vocab_size=word_tokenizer.n_words)
    write_hf(random_checkpoint(args), tmp_path / "hf", tokenizer=word_tokenizer)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "hf")
    again = read_folder(tmp_path / "hf/tokenizer.json")
    assert (again.ranks, again.special_tokens) == (
        word_tokenizer.ranks,
        word_tokenizer.special_tokens,
    )
    assert (again.bos_id, again.eos_id) == (word_tokenizer.bos_id, word_tokenizer.eos_id)
    assert again.stop_tokens == word_tokenizer.stop_tokens
    for text in texts(300):
        ids = word_tokenizer.encode(text, bos=True, eos=False, allowed_special="all")
        assert again.encode(text, bos=True, eos=False, allowed_special="all") == ids
        assert theirs(text)["input_ids"] == ids
        assert theirs.decode(ids[1:]) == word_tokenizer.decode(ids[1:])
    turns = [("user", " Hello\n"), ("assistant", "hello the"), ("user", "12345")]
    dialog = [{"role": role, "content": content} for role, content in turns]
    model = Llama(load(open_checkpoint(tmp_path / "hf"), ranks=ONE, device="cpu"), word_tokenizer)
    rendered = theirs.apply_chat_template(dialog, add_generation_prompt=True, return_dict=False)
    assert rendered == model.formatter.encode_dialog_prompt(dialog)


def test_the_official_ranks_give_the_official_ids_as_tokenizer_json(tmp_path):
    if not OFFICIAL.exists():
        pytest.skip(f"the official tokenizer file is not at {OFFICIAL}")
    ranks = Tokenizer(OFFICIAL, version="3.1")
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(tokenizer_json(ranks), ensure_ascii=False))
    ours = read_folder(file)
    assert (ours.ranks, ours.special_tokens) == (ranks.ranks, ranks.special_tokens)
    assert ours.stop_tokens == {128001, 128008, 128009}
    assert ranks_file(ours) == OFFICIAL.read_bytes()
    theirs = Theirs.from_file(str(file))
    for text in texts(500, seed=1):
        ids = ours.encode(text, bos=True, eos=False, allowed_special="all")
        assert theirs.encode(text).ids == ids


def test_merges_as_pairs_and_as_a_trained_tokenizer_has_them(tmp_path):
    theirs = Theirs(models.BPE())
    pattern = pre_tokenizers.Split(Regex(Tokenizer.pat_str), "isolated")
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    theirs.pre_tokenizer = pre_tokenizers.Sequence([pattern, level])
    theirs.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    theirs.train_from_iterator(texts(400, seed=2), trainer)
    theirs.save(str(tmp_path / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": {"content": "</s>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(names))
    assert isinstance(
        json.loads((tmp_path / "tokenizer.json").read_text())["model"]["merges"][0], list
    )
    ours = read_folder(tmp_path / "tokenizer.json")
    assert (ours.bos_id, ours.eos_id, ours.stop_tokens) == (0, 1, {1})
    for text in texts(300, seed=3):
        assert ours.encode(text, bos=False, eos=False) == theirs.encode(text).ids
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json names no bos_token"):
        read_folder(tmp_path / "tokenizer.json")


def set_in(path, value):
    def change(spec):
        *above, last = path
        for key in above:
            spec = spec[key]
        if value == "absent":
            del spec[last]
        else:
            spec[last] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_in(["model", "byte_fallback"], True), "SentencePiece kind.*tokenizer.model"),
        (set_in(["model", "type"], "Unigram"), "of the kind 'Unigram'"),
        (set_in(["model", "dropout"], 0.1), "has dropout 0.1"),
        (set_in(["normalizer"], {"type": "NFC"}), "a normalizer \\('NFC'\\)"),
        (set_in(["pre_tokenizer"], {"type": "ByteLevel"}), "pre_tokenizer is 'ByteLevel'"),
        (set_in(["pre_tokenizer", "pretokenizers", 0, "pattern", "Regex"], r"\s+"),
         "another pattern than Llama 3's"),
        (set_in(["pre_tokenizer", "pretokenizers", 1, "add_prefix_space"], True), "adds a space"),
        (set_in(["model", "vocab", "he"], 3), "do not have the ids 0 to"),
        (set_in(["model", "vocab", "he"], "x"), "has the id 'x'"),
        (set_in(["model", "vocab", "漢"], 271), "not written byte by byte"),
        (set_in(["model", "vocab", "A"], "absent"), "do not have the ids|single byte"),
        (set_in(["model", "merges", 0], "z z"), "not in the vocabulary"),
        (set_in(["model", "merges", 0], 7), "is no pair"),
        (set_in(["added_tokens", 0, "id"], None), "without content or id"),
        (set_in(["added_tokens", 0, "content"], "<|end_of_text|>"), "comes twice"),
        (set_in(["added_tokens"], None), "has no list added_tokens"),
        (lambda spec: spec["model"]["merges"].reverse(), "not in the order of the ids"),
        (lambda spec: spec["model"].update(merges=[], ignore_merges=False), "none of its merges"),
    ],
)  # fmt: skip
def test_a_tokenizer_json_of_another_kind_is_refused(tmp_path, word_tokenizer, change, message):
    spec = tokenizer_json(word_tokenizer)
    change(spec)
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(spec))
    with pytest.raises(ValueError, match=message) as caught:
        read_folder(file)
    assert str(caught.value).startswith(str(file))
    assert "\n" not in str(caught.value)


# --- built, asked, converted


@pytest.fixture
def folders(tmp_path, byte_tokenizer):
    """One model as Meta's files and as a Hugging Face folder with its tokenizer."""
    source = random_checkpoint(shape("3", vocab_size=BYTES_VOCAB), dtype=torch.float32)
    write_meta(source, tmp_path / "meta")
    shutil.copy(tmp_path / "tokenizer.model", tmp_path / "meta")
    write_hf(source, tmp_path / "hf", tokenizer=byte_tokenizer)
    return tmp_path


def test_a_hugging_face_folder_answers_as_metas_does(folders):
    dialog = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    answers = []
    for name in ("meta", "hf"):
        llama = Llama.build(folders / name, max_seq_len=128)
        answers.append(llama.chat_completion([dialog], temperature=0, logprobs=True))
        assert type(llama.formatter).__name__ == "ChatFormat"
    assert answers[0] == answers[1]


def test_a_tokenizer_model_of_other_ranks_beside_tokenizer_json_is_refused(folders):
    write_tokenizer(folders / "hf/tokenizer.model", ["el"])
    with pytest.raises(ValueError, match="the tokenizer has 513 tokens"):
        Llama.build(folders / "hf")


def test_eos_ids_of_the_files_stop_the_answer(folders):
    llama = Llama.build(folders / "hf", max_seq_len=64)
    ids = llama.generate([[65, 66]], 20, 0)[0][0]
    edit(folders / "hf/generation_config.json", eos_token_id=[300, ids[3]])
    assert open_checkpoint(folders / "hf").stop_token_ids == (300, ids[3])
    again = Llama.build(folders / "hf", max_seq_len=64)
    assert again.generate([[65, 66]], 20, 0)[0][0] == ids[: ids.index(ids[3])]
    assert again.engine.stop_token_ids == llama.tokenizer.stop_tokens | {300, ids[3]}
    (folders / "hf/generation_config.json").unlink()
    edit(folders / "hf/config.json", eos_token_id=77)
    assert open_checkpoint(folders / "hf").stop_token_ids == (77,)


def test_convert_there_and_back(folders, capsys):
    convert(str(folders / "meta"), str(folders / "a"), "hf")
    convert(str(folders / "a"), str(folders / "b"), "meta", shards=2)
    convert(str(folders / "b"), str(folders / "c"), "hf", dtype="f32")
    same_files(folders / "a", folders / "hf")
    same_files(folders / "a", folders / "c")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (folders / "a" / name).read_bytes() == (folders / "c" / name).read_bytes()
    assert (folders / "b/tokenizer.model").read_bytes() == (
        folders / "tokenizer.model"
    ).read_bytes()
    assert "parameters" in capsys.readouterr().out
    for options, message in (
        (dict(to="onnx"), "format 'onnx': use one of meta, hf"),
        (dict(to="hf", shards=2), "shards=2: only Meta's format"),
        (dict(to="hf", dtype="int3"), "dtype='int3': use one of float32"),
    ):
        with pytest.raises(ValueError, match=message):
            convert(str(folders / "meta"), str(folders / "d"), **options)
    assert not (folders / "d").exists()


def test_commands_take_a_hugging_face_folder(folders, shell):
    def run(*arguments):
        status, out, error = shell(*arguments)
        assert (status, error) == (0, "")
        return out

    assert "1 shard, float32" in run("info", folders / "hf")
    assert "parameters, bfloat16" in run(
        "convert", folders / "hf", folders / "out", "--format", "meta", "--dtype", "bf16"
    )
    assert open_checkpoint(folders / "out").dtype == torch.bfloat16
    (folders / "out/tokenizer.model").rename(folders / "tokenizer")
    ids = run("tokenize", "Hi", "--ckpt_dir", folders / "hf")
    assert [line.split()[0] for line in ids.splitlines()] == ["72", "105"]
    text = ("complete", "Hi", "--max_gen_len", "5", "--temperature", "0", "--ckpt_dir")
    assert run(*text, folders / "hf") == run(*text, folders / "meta")


def test_a_tokenizer_that_metas_format_cannot_say_is_refused(tmp_path, word_tokenizer):
    args = shape("3", vocab_size=word_tokenizer.n_words)
    write_hf(random_checkpoint(args), tmp_path / "hf", tokenizer=word_tokenizer)
    with pytest.raises(ValueError, match=r"tokenizer\.model cannot say the special tokens"):
        convert(str(tmp_path / "hf"), str(tmp_path / "meta"), "meta")
    assert not (tmp_path / "meta").exists()


def test_an_interrupted_export_leaves_nothing(tmp_path, monkeypatch):
    source = random_checkpoint(shape("3"))

    def fail(name, block, dtype):
        if "norm" in name:
            raise KeyboardInterrupt
        return block.view(torch.uint8)

    for write, module in ((write_hf, "safetensors"), (write_meta, "meta.pth_write")):
        with monkeypatch.context() as patch:
            patch.setattr(f"llama.checkpoint.{module}.cast", fail)
            with pytest.raises(KeyboardInterrupt):
                write(source, tmp_path / module)
        assert list((tmp_path / module).iterdir()) == []
        write(source, tmp_path / module)
        with pytest.raises(FileExistsError, match="is there already; write to an empty folder"):
            write(source, tmp_path / module)


def test_numbers_that_float16_cannot_say_are_refused(tmp_path):
    write_hf(random_checkpoint(shape("3")), tmp_path / "a")
    change_tensors(tmp_path / "a", lambda tensors: tensors["model.norm.weight"].fill_(1e5))
    for write in (write_hf, write_meta):
        with pytest.raises(ValueError, match=r"norm\.weight has numbers above 65504"):
            write(open_checkpoint(tmp_path / "a"), tmp_path / "b", dtype=torch.float16)
