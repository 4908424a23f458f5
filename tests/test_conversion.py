"""convert there and back between the formats: the tokenizer, its ends, its added words and the
template stay what transformers makes of them, or what a format cannot say is refused or named."""

import importlib.util
import io
import json
import logging

import pytest
from conftest import tiny_args
from transformers import AutoTokenizer

from llama import Llama
from llama.checkpoint import (
    convert,
    open_checkpoint,
    random_checkpoint,
    write_hf,
    write_meta,
    write_quantized,
)
from llama.demo import __file__ as demo_file
from llama.text.choose import open_tokenizer
from llama.text.sentencepiece import SentencePieceTokenizer
from llama.text.tokenizer_json import tokenizer_json

DEMO = demo_file.removesuffix("__init__.py")
FIRST = 1536  # the first id after the demo's vocabulary
DIALOG = [{"role": "user", "content": "Hi there"}, {"role": "assistant", "content": "Well"},
          {"role": "user", "content": "so"}]  # fmt: skip
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{{ '<|im_start|>assistant\n' }}"
)
NAMING = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token }}"
    "{% endfor %}"
)
TEXTS = ("Hello world", " two  spaces\n\n and 12345", "Zürich, 東京 🙂")


def added(content, id, special=False, **flags):
    return {"id": id, "content": content, "single_word": False, "lstrip": False, "rstrip": False,
            "normalized": not special, "special": special} | flags  # fmt: skip


def around(*before, after=()):
    """A post_processor that puts tokens, given as text and id, before and after a text."""
    step = lambda pair: {"SpecialToken": {"id": pair[0], "type_id": 0}}  # noqa: E731
    every = (*before, *after)
    return {
        "type": "TemplateProcessing",
        "single": [*map(step, before), {"Sequence": {"id": "A", "type_id": 0}}, *map(step, after)],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {text: {"id": text, "ids": [i], "tokens": [text]} for text, i in every},
    }


BEGIN, END = ("<|begin_of_text|>", 1280), ("<|end_of_text|>", 1281)
BARE = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}
# What each layout has besides the demo's vocabulary: added words, settings, the post_processor,
# ids that end an answer, rows of the model, tokens that are called otherwise.
LAYOUTS = {
    "Llama 3": dict(),
    "Llama 3 Instruct": dict(config={"eos_token": "<|eot_id|>"}, stops=[1281, 1288, 1289]),
    "ChatML without BOS": dict(
        words=[added("<|im_start|>", 1536, True), added("<|im_end|>", 1537, True)], post=BARE,
        config={"eos_token": "<|im_end|>", "pad_token": "<|im_end|>", "bos_token": None,
                "chat_template": CHATML}, stops=[1537]),
    "plain words": dict(
        words=[added("section5a", 1536), added("<think>", 1537), added(" two", 1538)],
        config={"chat_template": NAMING}),
    "words with flags": dict(
        words=[added("<l>", 1536, lstrip=True), added("<r>", 1537, True, rstrip=True),
               added("cat", 1538, single_word=True)]),
    "other names": dict(
        words=[added("<pad>", 1536, True), added("<unk>", 1537, True), added("<sep>", 1538, True)],
        config={"pad_token": "<pad>", "unk_token": "<unk>", "sep_token": "<sep>"}),
    "reserved ones renamed": dict(
        renamed={"<|reserved_special_token_5|>": "<tool>", "<|reserved_special_token_6|>": "<x>"},
        config={"eos_token": "<tool>"}),
    "an end after every text": dict(post=around(BEGIN, after=[END])),
    "several ends": dict(stops=[1281, 1300, 1301]),
    "too many ends": dict(stops=[1281, 1300, 1301, 1302]),
    "padded rows": dict(words=[added("<new>", 1536, True)], rows=1600),
    "a word of the vocabulary": dict(words=[added("the", None), added("and", None, True)]),
}  # fmt: skip


def layout(path, words=(), config=None, post=None, stops=None, rows=None, renamed=None):
    """A folder of random weights with a tokenizer.json of the demo's vocabulary, and more."""
    spec = tokenizer_json(open_tokenizer(f"{DEMO}tokenizer.model"))
    vocab = spec["model"]["vocab"]
    spec["added_tokens"] += [word | {"id": word["id"] or vocab[word["content"]]} for word in words]
    for token in spec["added_tokens"]:
        token["content"] = (renamed or {}).get(token["content"], token["content"])
    spec["post_processor"] = post or spec["post_processor"]
    top = 1 + max(word["id"] for word in spec["added_tokens"])
    write_hf(random_checkpoint(tiny_args(vocab_size=rows or top)), path)
    (path / "tokenizer.json").write_text(json.dumps(spec, ensure_ascii=False), encoding="utf-8")
    said = {"bos_token": BEGIN[0], "eos_token": END[0],
            "tokenizer_class": "PreTrainedTokenizerFast"} | (config or {})  # fmt: skip
    said = {key: value for key, value in said.items() if value is not None}
    (path / "tokenizer_config.json").write_text(json.dumps(said))
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": stops or 1281}))
    return path


def said_by_transformers(path):
    """What a folder's tokenizer is to transformers."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    words = [str(word) for word in tokenizer.added_tokens_decoder.values()]
    texts = [*TEXTS, *(f"a {w} b{w}c{w} {w}" for w in words if "reserved" not in w)]
    ids = [tokenizer(text).input_ids for text in texts]
    dialog = None
    if tokenizer.chat_template:
        dialog = tokenizer.apply_chat_template(DIALOG, return_dict=False)
    return {
        "ids": ids,
        "texts": [tokenizer.decode(each, skip_special_tokens=True) for each in ids],
        "words": {i: (str(w), w.special) for i, w in tokenizer.added_tokens_decoder.items()},
        "names": {key: str(v) for key, v in tokenizer.special_tokens_map.items() if v},
        "dialog": dialog,
    }


def said_here(path):
    """What a model's tokenizer and template are to this library."""
    checkpoint = open_checkpoint(path)
    tokenizer = checkpoint.open_tokenizer()
    words = [word for word in tokenizer.added if "reserved" not in word.content]
    texts = [*TEXTS, *(f"a {w.content} b{w.content}c" for w in words)]
    return {
        "ids": [tokenizer.encode(text, bos=True, eos=False) for text in texts],
        "words": [(word.id, word.content, word.special) for word in words],
        "names": tokenizer.names,
        "around": (tokenizer.prefix, tokenizer.suffix),
        "stops": {t for t in tokenizer.stop_tokens | {*checkpoint.stop_token_ids}
                  if t not in range(1282, 1288)},
        "template": checkpoint.chat_template,
    }  # fmt: skip


def converted(source, path, kind, caplog):
    """The path, and what was said of it; None where it was refused."""
    caplog.clear()
    try:
        convert(open_checkpoint(source), path, kind)
    except ValueError as error:
        assert not path.exists()
        return None, str(error)
    return path, " ".join(r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING)


def compare(before, after, warned):
    """Everything is as before, or a warning says what is not."""
    odd = [key for key in before if before[key] != after[key]]
    assert not odd or warned, (odd, [(before[key], after[key]) for key in odd])


@pytest.mark.parametrize("name", LAYOUTS)
def test_hf_to_hf_is_the_same_tokenizer_to_transformers(tmp_path, name, caplog):
    source = layout(tmp_path / "source", **LAYOUTS[name])
    path, warned = converted(source, tmp_path / "hf", "hf", caplog)
    assert not warned
    assert said_by_transformers(path) == said_by_transformers(source)
    assert said_here(path) == said_here(source)


# What GGUF has no words for, by layout: a part of the warning.
WARNED = {
    "words with flags": "loses what it says of lstrip",
    "too many ends": "no longer end an answer: 1302",
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_by_way_of_gguf_it_stays_the_same(tmp_path, name, caplog):
    source = layout(tmp_path / "source", **LAYOUTS[name])
    path, warned = converted(source, tmp_path / "model.gguf", "gguf", caplog)
    assert (name in WARNED) == bool(warned)
    assert WARNED.get(name, "") in warned
    compare(said_here(source), said_here(path), warned)
    again, more = converted(path, tmp_path / "hf", "hf", caplog)
    assert not more
    compare(said_here(source), said_here(again), warned)
    compare(said_by_transformers(source), said_by_transformers(again), warned)
    third, more = converted(again, tmp_path / "again.gguf", "gguf", caplog)
    assert not more
    assert said_here(third) == said_here(path)


REFUSED = {
    "ChatML without BOS": "before every text",
    "plain words": r"'section5a' is the token 1536",
    "words with flags": r"'<l>' is the token 1536",
    "other names": r"'<pad>' is the token 1536",
    "reserved ones renamed": r"'<tool>' is the token 1290",
    "an end after every text": "nothing after it",
    "padded rows": r"'<new>' is the token 1536",
    "a word of the vocabulary": "is the token",
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_metas_files_say_the_same_or_the_word_that_they_cannot_say_is_named(tmp_path, name, caplog):
    source = layout(tmp_path / "source", **LAYOUTS[name])
    path, said = converted(source, tmp_path / "meta", "meta", caplog)
    assert (name in REFUSED) == (path is None), said
    if path is None:
        assert REFUSED[name] in said
        assert not (tmp_path / "meta").exists()
        return
    ours, theirs = said_here(source), said_here(path)
    assert bool(said) == (ours["stops"] != theirs["stops"] or ours["names"] != theirs["names"])
    again, _ = converted(path, tmp_path / "hf", "hf", caplog)
    back = said_by_transformers(again)
    assert back["ids"][:3] == said_by_transformers(source)["ids"][:3]


@pytest.mark.parametrize("name", ["ChatML without BOS", "plain words", "several ends"])
@pytest.mark.parametrize("by", ["hf", "gguf"])
def test_quantized_folders_keep_the_tokenizer(tmp_path, name, by):
    source = layout(tmp_path / "source", **LAYOUTS[name])
    before = said_here(source)
    if by == "gguf":
        convert(open_checkpoint(source), tmp_path / "model.gguf", "gguf")
        source = tmp_path / "model.gguf"
    write_quantized(open_checkpoint(source), tmp_path / "int8", "int8")
    assert said_here(tmp_path / "int8") == before
    convert(open_checkpoint(tmp_path / "int8"), tmp_path / "hf", "hf")
    assert said_here(tmp_path / "hf") == before


def test_the_named_end_stops_in_every_format(tmp_path):
    source = layout(tmp_path / "source", **LAYOUTS["ChatML without BOS"])
    convert(open_checkpoint(source), tmp_path / "model", "gguf")  # also without .gguf
    for path in (source, tmp_path / "model"):
        assert 1537 in Llama.build(path, device="cpu").engine.stop_token_ids


# --- commands take what they wrote, and one process of several writes it


@pytest.mark.parametrize("kind", ["hf", "meta", "gguf", "int8"])
def test_every_command_takes_what_was_written(tmp_path, shell, kind):
    source = layout(tmp_path / "source")
    dst = tmp_path / "written"  # without .gguf, as well
    how = ["convert", source, dst, "--format", kind]
    if kind == "int8":
        how = ["quantize", source, dst, "--quantize", "int8", "--device", "cpu"]
    assert shell(*how)[0] == 0
    assert shell("info", dst)[0] == 0
    assert shell("tokenize", "the", "--ckpt_dir", dst)[0] == 0
    assert shell("complete", "the", "--ckpt_dir", dst, "--max_gen_len", 1)[0] == 0
    assert shell("convert", dst, tmp_path / "again", "--format", "hf")[0] == 0
    status, out, error = shell("verify", dst)
    if kind == "gguf":
        assert (status, out) == (1, "")
        assert "is not a folder; a checklist lists files beside it" in error
        return
    assert (status, error) == (0, "")
    assert "all files are what the checklist says" in out
    largest = max(dst.iterdir(), key=lambda file: file.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-1] + b"?")
    status, _, error = shell("verify", dst)
    assert status == 1
    assert f"{largest} does not match" in error
    if kind == "hf":
        (dst / "other.safetensors").write_bytes(b"")
        assert "other.safetensors is in no checklist" in shell("verify", dst)[2]


@pytest.mark.parametrize("kind", ["hf", "meta"])
@pytest.mark.parametrize("written", [write_meta, write_hf])
def test_nothing_is_written_into_a_folder_that_holds_a_model(tmp_path, shell, kind, written):
    """In whatever format: two models in one folder are none, and a checklist would be lost."""
    written(random_checkpoint(tiny_args()), tmp_path / "a")
    (tmp_path / "a" / "checklist.chk").write_text("as it came\n")
    before = {file.name: file.read_bytes() for file in (tmp_path / "a").iterdir()}
    status, out, error = shell("convert", tmp_path / "a", tmp_path / "a", kind)
    assert (status, out) == (1, "")
    assert "empty folder" in error.splitlines()[-1]
    assert {file.name: file.read_bytes() for file in (tmp_path / "a").iterdir()} == before


def test_a_folder_without_a_checklist_is_told_who_writes_one(tmp_path, shell):
    status, _, error = shell("verify", layout(tmp_path / "source"))
    assert status == 1
    assert "convert, reshard and quantize write" in error


def test_one_process_of_several_writes_and_speaks(tmp_path, shell, monkeypatch):
    source = layout(tmp_path / "source")
    commands = {
        "info": [source],
        "tokenize": ["the"],
        "verify": [],
        "convert": [source, tmp_path / "hf", "--format", "hf"],
        "quantize": [source, tmp_path / "int8", "--quantize", "int8", "--device", "cpu"],
        "reshard": [DEMO, tmp_path / "two", "--shards", "2"],
    }
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        for name, arguments in commands.items():
            status, out, _ = shell(name, *arguments)
            assert (status, bool(out)) == (0, rank == "0"), name
        assert {file.name for file in tmp_path.iterdir()} == (
            {"source"} if rank == "1" else {"source", "hf", "int8", "two"}
        )
    monkeypatch.setenv("RANK", "one")
    status, _, error = shell("info", source)
    assert status == 1
    assert "RANK='one', no whole number" in error


# --- SentencePiece


@pytest.fixture(scope="module")
def pieces():
    sentencepiece = pytest.importorskip("sentencepiece")
    out = io.BytesIO()
    corpus = ["the cat sat on the mat and the dog ran to the cat " * 3, "a b c d e f g h i j k"] * 9
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus), model_writer=out, vocab_size=300, model_type="bpe",
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        minloglevel=2,
    )  # fmt: skip
    return out.getvalue()


def piece_folder(path, data, words=()):
    """A folder as of a Llama 2 fine-tune: tokenizer.model, and words that other files add."""
    count = SentencePieceTokenizer("x", data=data).n_words
    write_hf(random_checkpoint(tiny_args(vocab_size=count + len(words))), path)
    (path / "tokenizer.model").write_bytes(data)
    said = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>",
            "unk_token": "<unk>", "add_bos_token": True, "legacy": False}  # fmt: skip
    (path / "tokenizer_config.json").write_text(json.dumps(said))
    if words:
        ids = {word: count + n for n, word in enumerate(words)}
        (path / "added_tokens.json").write_text(json.dumps(ids))
    return path


@pytest.mark.parametrize("words", [(), ("<extra>", "<pad>")])
def test_a_folder_of_pieces_goes_to_hf_and_gguf(tmp_path, pieces, words, caplog):
    source = piece_folder(tmp_path / "source", pieces, words)
    path, warned = converted(source, tmp_path / "hf", "hf", caplog)
    assert not warned
    assert said_here(path) == said_here(source)
    if importlib.util.find_spec("google") and importlib.util.find_spec("google.protobuf"):
        assert said_by_transformers(path) == said_by_transformers(source)
    path, warned = converted(source, tmp_path / "model.gguf", "gguf", caplog)
    compare(said_here(source), said_here(path), warned)
    again, more = converted(path, tmp_path / "again", "hf", caplog)
    compare(said_here(source), said_here(again), warned + more)


def test_pieces_go_to_metas_files_where_nothing_is_added_to_them(tmp_path, pieces, caplog):
    source = piece_folder(tmp_path / "source", pieces)
    path, _ = converted(source, tmp_path / "meta", "meta", caplog)
    assert (path / "tokenizer.model").read_bytes() == pieces
    tuned = piece_folder(tmp_path / "tuned", pieces, ["<extra>"])
    path, said = converted(tuned, tmp_path / "other", "meta", caplog)
    assert path is None
    assert "cannot say that '<extra>' is the token 300" in said


def test_pieces_inside_a_gguf_file_become_a_sentencepiece_model(tmp_path, pieces, caplog):
    (tmp_path / "meta").mkdir()
    write_meta(random_checkpoint(tiny_args(vocab_size=300)), tmp_path / "meta")
    (tmp_path / "meta/tokenizer.model").write_bytes(pieces)
    convert(open_checkpoint(tmp_path / "meta"), tmp_path / "model.gguf", "gguf")
    before = said_here(tmp_path / "meta")
    for kind in ("meta", "hf"):
        path, warned = converted(tmp_path / "model.gguf", tmp_path / f"{kind} out", kind, caplog)
        tokenizer = SentencePieceTokenizer(path / "tokenizer.model")
        assert [tokenizer.encode(t, bos=True, eos=False) for t in TEXTS] == before["ids"][:3]
        assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
        if kind == "meta":
            assert said_here(path) == before
            assert not warned


@pytest.mark.parametrize("kind", ["hf", "meta"])
def test_a_folder_that_holds_something_is_left_alone(tmp_path, kind):
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine").write_text("precious")
    with pytest.raises(FileExistsError, match="full is not empty; give a new or empty folder"):
        convert(open_checkpoint(DEMO), full, kind)
    assert [file.name for file in full.iterdir()] == ["mine"]
    assert [file.name for file in tmp_path.iterdir()] == ["full"]
