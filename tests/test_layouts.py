"""Folders as fine-tunes leave them: ids, texts, chat prompts, stops and logits are those of the
folder's own library, transformers or gguf, whatever was added to the tokenizer and how."""

import base64
import json
import os
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from llama import Llama
from llama.text.byte_level import CHAR_OF, merges_of
from llama.text.metaspace import merges_of_pieces
from llama.text.tokenizer_json import tokenizer_json
from llama.tokenizer import Tokenizer

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

ROWS = 640  # of the tiny model's embedding
LETTERS = [b"he", b"ll", b"hell", b"hello", b" t", b" th", b" the", b"us", b"er", b"user", b"  "]
NAMES = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|reserved_0|>",
    "<|reserved_1|>",
]
RANKS = {token: i for i, token in enumerate([*(bytes([b]) for b in range(256)), *LETTERS])}
FIRST = len(RANKS)  # id of the first special token; the first free one is FIRST + 8
FREE = FIRST + len(NAMES)
BASE = Tokenizer.from_ranks(RANKS, {name: FIRST + i for i, name in enumerate(NAMES)})

PIECES = [
    "<unk>",
    "<s>",
    "</s>",
    *(f"<0x{b:02X}>" for b in range(256)),
    "▁▁",
    "▁t",
    "he",
    "ll",
    "▁the",
    "hell",
    "hello",
    "▁hello",
    "us",
    "er",
    "user",
    *"▁theloruswaid.:,",
]
VOCAB = {piece: i for i, piece in enumerate(PIECES)}
PIECE = len(PIECES)  # the first free id of the other kind

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ENDED = (
    "{{ bos_token }}{% for m in messages %}{{ '### ' + m.role + ':\n' + m.content | trim "
    "+ eos_token + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '### assistant:\n' }}"
    "{% endif %}"
)
PADDED = "{% for m in messages %}{{ m.content + pad_token + unk_token }}{% endfor %}"
ROLES = "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}{% endfor %}<|assistant|>"
TOOLS = (
    "{{ bos_token }}{% for m in messages %}{{ '[' + m.role + ('' if m.name is not defined else ' '"
    " + m.name) + ']' }}{% if m.tool_calls %}{% for c in m.tool_calls %}{{ c.function.name + "
    "(c.function.arguments | tojson(sort_keys=true, separators=(',', ':'))) }}{% endfor %}"
    "{% elif m.role == 'tool' %}{{ m.tool_call_id + '=' + m.content }}{% else %}{{ m.content }}"
    "{% endif %}{% if loop.index > 9 %}{% break %}{% endif %}{% endfor %}"
    "{% generation %}{{ '[assistant]' }}{% endgeneration %}"
)
CALLED = [
    {"role": "user", "content": "the weather?", "name": "anna"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {
                "type": "function",
                "function": {"name": "look", "arguments": {"town": "Köln", "at": 3}},
            }
        ],
    },
    {"role": "tool", "content": "sunny", "tool_call_id": "c1"},
]
TALK = [
    {"role": "user", "content": " hello the user "},
    {"role": "assistant", "content": "hello <tool> section5a größe"},
    {"role": "user", "content": "the\n"},
]
TEXTS = [
    "hello the user: See section5a of it.",
    "x <tool> y<tool>  z",
    "größe section5ab 日本語 🙂",
    "  <word> a<word>b <word>",
    "",
    " hello",
    "the\n\n user  ",
    "<|im_start|>user hello<|im_end|>",
    "<pad>hello<pad> the",
]


def word(content, number, special=False, **flags):
    """An entry of tokenizer.json's added_tokens."""
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
    return {
        "id": number,
        "content": content,
        **plain,
        "normalized": not special,
        "special": special,
        **flags,
    }


def words(*contents, at=FREE, **flags):
    return [word(text, at + n, **flags) for n, text in enumerate(contents)]


def byte_level(added=(), change=None):
    """tokenizer.json of Llama 3's kind."""
    spec = tokenizer_json(BASE)
    spec["added_tokens"] += added
    if change:
        change(spec)
    return spec


def metaspace(added=(), pre="first", normalizer=None, change=None, bos=True):
    """tokenizer.json of Llama 2's kind; `pre` None: a normalizer writes the spaces."""
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    if pre is None:
        normalizer = {
            "type": "Sequence",
            "normalizers": [{"type": "Prepend", "prepend": "▁"}, replace],
        }
    else:
        pre = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": pre, "split": False}
    begin = [{"SpecialToken": {"id": "<s>", "type_id": 0}}] * bos
    text, second = ({"Sequence": {"id": which, "type_id": 0}} for which in "AB")
    named = {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}
    back = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    special = [word(text, n, True) for n, text in enumerate(PIECES[:3])]
    spec = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [*special, *added],
        "normalizer": normalizer,
        "pre_tokenizer": pre,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [*begin, text],
            "pair": [*begin, text, second],
            "special_tokens": named,
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}, strip],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "fuse_unk": True,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": VOCAB,
            "merges": [f"{a} {b}" for a, b in merges_of_pieces(VOCAB)],
        },
    }
    if change:
        change(spec)
    return spec


def renamed(spec):
    for token in spec["added_tokens"]:
        old = {"<|reserved_0|>": "<|im_start|>", "<|reserved_1|>": "<|im_end|>"}
        token["content"] = old.get(token["content"], token["content"])


def without_bos(spec):
    spec["post_processor"] = {
        "type": "ByteLevel",
        "add_prefix_space": True,
        "trim_offsets": False,
        "use_regex": True,
    }


def without_any(spec):
    spec["post_processor"] = None


def with_eos(spec):
    post = spec["post_processor"]
    post["single"].append({"SpecialToken": {"id": "<|end_of_text|>", "type_id": 0}})
    post["special_tokens"]["<|end_of_text|>"] = {
        "id": "<|end_of_text|>",
        "ids": [FIRST + 1],
        "tokens": ["<|end_of_text|>"],
    }


def sequence(spec):
    level = {
        "type": "ByteLevel",
        "add_prefix_space": True,
        "trim_offsets": False,
        "use_regex": True,
    }
    spec["post_processor"] = {"type": "Sequence", "processors": [level, spec["post_processor"]]}


def in_vocabulary(spec):
    for token in spec["added_tokens"]:
        spec["model"]["vocab"].setdefault(token["content"], len(spec["model"]["vocab"]))


def ranks_file():
    lines = (f"{base64.b64encode(token).decode()} {rank}" for token, rank in RANKS.items())
    return ("\n".join(lines) + "\n").encode()


LLAMA3 = {
    "bos_token": "<|begin_of_text|>",
    "eos_token": "<|end_of_text|>",
    "tokenizer_class": "PreTrainedTokenizerFast",
}
LLAMA2 = {
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "tokenizer_class": "LlamaTokenizer",
}
PLAIN = words("section5a", "<tool>", "größe")
TURNS = words("<|im_start|>", "<|im_end|>", special=True)


def layout(spec=None, said=LLAMA3, template=None, dialog=None, files=None, **config):
    return {
        "spec": spec,
        "config": {**said, **config},
        "template": template,
        "dialog": dialog,
        "files": files or {},
    }


def decoder(*entries, at=FREE):
    return {
        str(at + n): {k: v for k, v in entry.items() if k != "id"}
        for n, entry in enumerate(entries)
    }


P2 = words("section5a", "<tool>", "größe", at=PIECE)
LAYOUTS = {
    # Llama 3's kind: words
    "plain": layout(byte_level()),
    "words": layout(byte_level(PLAIN), template=ENDED),
    "raw words": layout(byte_level(words("section5a", "<tool>", normalized=False))),
    "special words": layout(byte_level(words("<tool>", special=True))),
    "lstrip": layout(byte_level(words("<word>", "<tool>", lstrip=True))),
    "rstrip": layout(byte_level(words("<word>", "<tool>", rstrip=True)), template=ENDED),
    "both": layout(byte_level(words("<word>", "<tool>", lstrip=True, rstrip=True, special=True))),
    "single": layout(byte_level(words("<word>", "section5a", "the", single_word=True))),
    "longest": layout(byte_level(words("<tool", "<tool>", "<tool> y", normalized=False))),
    "out of order": layout(byte_level(words("section5a", "<tool>", "<word>")[::-1])),
    "gaps": layout(byte_level([word("section5a", FREE + 5), word("<tool>", FREE + 90)])),
    "declared again": layout(byte_level([word("hello", RANKS[b"hello"]), word("user", 9)])),
    "spaces": layout(byte_level(words(" of", "  ", "\n\n", normalized=False))),
    "in the vocabulary": layout(byte_level(PLAIN, in_vocabulary)),
    "many": layout(byte_level(words(*(f"w{n}ö" for n in range(300)), "section5a"))),
    # what other files add
    "decoder": layout(byte_level(), added_tokens_decoder=decoder(*PLAIN)),
    "decoder's flags": layout(
        byte_level(words("<word>")), added_tokens_decoder=decoder(word("<word>", 0, lstrip=True))
    ),
    "added_tokens.json": layout(
        byte_level(), files={"added_tokens.json": {"<tool>": FREE, "section5a": FREE + 1}}
    ),
    "special map": layout(
        byte_level(PLAIN),
        files={
            "special_tokens_map.json": {
                "eos_token": {
                    "content": "<|eot_id|>",
                    "lstrip": False,
                    "rstrip": False,
                    "normalized": False,
                    "single_word": False,
                },
                "pad_token": "<pad>",
            }
        },
        template=ENDED,
    ),
    "further special": layout(byte_level(), additional_special_tokens=["<tool>", "section5a"]),
    "named special": layout(byte_level(), extra_special_tokens={"image_token": "<word>"}),
    "a model's file": layout(
        byte_level((), renamed),
        template=CHATML,
        eos_token="<|im_end|>",
        files={"tokenizer.model": ranks_file()},
    ),
    "ranks alone": layout(
        template=CHATML,
        files={"tokenizer.model": ranks_file()},
        eos_token="<|im_end|>",
        added_tokens_decoder=decoder(
            *words(*NAMES[:6], "<|im_start|>", "<|im_end|>", special=True), *PLAIN, at=FIRST
        ),
    ),
    "ranks with bos": layout(
        files={"tokenizer.model": ranks_file()},
        add_bos_token=True,
        added_tokens_decoder=decoder(*words(*NAMES, special=True), at=FIRST),
    ),
    # begins and ends
    "no bos": layout(byte_level(PLAIN, without_bos), add_bos_token=False, template=CHATML),
    "nothing around": layout(byte_level(PLAIN, without_any)),
    "an eos": layout(byte_level(PLAIN, with_eos)),
    "a sequence": layout(byte_level(PLAIN, sequence), tokenizer_class="LlamaTokenizer"),
    "no bos at all": layout(
        byte_level(TURNS, without_bos), bos_token=None, template=CHATML, eos_token="<|im_end|>"
    ),
    # templates
    "ChatML": layout(byte_level(TURNS), template=CHATML, eos_token="<|im_end|>"),
    "ChatML in words": layout(
        byte_level(words("<|im_start|>", "<|im_end|>", "<tool>")), template=CHATML
    ),
    "eot": layout(byte_level(PLAIN), template=ENDED, eos_token="<|eot_id|>"),
    "pad and unk": layout(
        byte_level(words("<pad>", special=True)),
        template=PADDED,
        pad_token="<pad>",
        unk_token="<|reserved_0|>",
    ),
    "roles in words": layout(
        byte_level(words("<|user|>", "<|assistant|>", "<tool>")), template=ROLES
    ),
    "tools": layout(byte_level(PLAIN), template=TOOLS, dialog=CALLED),
    "templates by name": layout(
        byte_level(PLAIN),
        template=[{"name": "default", "template": ENDED}, {"name": "tool_use", "template": TOOLS}],
    ),
    # Llama 2's kind
    "pieces": layout(metaspace(), LLAMA2),
    "pieces with words": layout(metaspace(P2), LLAMA2, template=ENDED),
    "pieces and turns": layout(
        metaspace([*words("<|im_start|>", "<|im_end|>", at=PIECE, special=True)]),
        LLAMA2,
        template=CHATML,
        eos_token="<|im_end|>",
        files={"tokenizer.model": b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02"},
    ),
    "legacy pieces": layout(metaspace(P2, None), LLAMA2, legacy=True),
    "pieces as written": layout(
        metaspace(P2, None), LLAMA2, tokenizer_class="PreTrainedTokenizerFast", template=ENDED
    ),
    "pieces always": layout(
        metaspace(P2, "always", bos=False), {**LLAMA2, "tokenizer_class": "PreTrainedTokenizerFast"}
    ),
    "pieces never": layout(metaspace(P2, "never"), LLAMA2, add_prefix_space=False),
    "Code Llama's pieces": layout(  # words of its own, a begin whatever the files say, no legacy
        metaspace(P2, bos=False),
        LLAMA2,
        tokenizer_class="CodeLlamaTokenizer",
        add_bos_token=False,
        legacy=True,
        template=ENDED,
    ),
    "Code Llama without a space": layout(
        metaspace(), LLAMA2, tokenizer_class="CodeLlamaTokenizer", add_prefix_space=False
    ),
    "pieces flagged": layout(
        metaspace(words("<tool>", "<word>", at=PIECE, lstrip=True, rstrip=True, normalized=False)),
        LLAMA2,
        added_tokens_decoder=decoder(
            *words(*PIECES[:3], special=True), word("<tool>", 0, rstrip=True), at=0
        ),
    ),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """One tiny model of transformers, and its folder without a tokenizer."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=ROWS,
        max_position_embeddings=256,
        rms_norm_eps=1e-5,
        bos_token_id=FIRST,
        eos_token_id=[FIRST + 1, FIRST + 4],
        initializer_range=0.2,
        tie_word_embeddings=False,
    )
    made = LlamaForCausalLM(config).eval()
    folder = tmp_path_factory.mktemp("layouts") / "model"
    made.save_pretrained(folder)
    return made, folder


def write(given, folder: Path, model_folder: Path | None = None):
    if model_folder is not None:
        shutil.copytree(model_folder, folder)
    else:
        folder.mkdir()
        (folder / "config.json").write_text('{"model_type": "llama"}')
    config = given["config"] | (
        {} if given["template"] is None else {"chat_template": given["template"]}
    )
    files = {"tokenizer_config.json": config, **given["files"]}
    if given["spec"] is not None:
        files["tokenizer.json"] = given["spec"]
    for name, said in files.items():
        data = said if isinstance(said, bytes) else json.dumps(said).encode()
        (folder / name).write_bytes(data)
    return folder


def built(given, tmp_path, model):
    folder = write(given, tmp_path / "folder", model[1])
    return Llama.build(folder, device="cpu", max_seq_len=256), AutoTokenizer.from_pretrained(folder)


def rendered(theirs, dialog):
    return theirs.apply_chat_template(dialog, add_generation_prompt=True, return_dict=False)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_folder_says_here_what_it_says_in_transformers(name, tmp_path, model):
    given = LAYOUTS[name]
    llama, theirs = built(given, tmp_path, model)
    ours = llama.tokenizer
    assert {each.content: each.id for each in ours.added} == theirs.get_added_vocab()
    assert ours.names == theirs.special_tokens_map
    pieces = theirs._tokenizer.to_str().count("<0x41>") > 0
    for text in TEXTS:
        ids = theirs(text).input_ids
        ends = bool(ours.suffix)
        assert ours.encode(text, bos=True, eos=ends, allowed_special="all") == ids, text
        if not any(special in text for special in ours.special_tokens):
            assert ours.encode(text, bos=True, eos=ends) == ids, text
        if "größe" not in text or pieces:  # there, the letters of an added word are bytes
            assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=pieces), text
    if given["template"] is not None:
        dialog = given["dialog"] or TALK
        assert llama.formatter.encode_dialog_prompt(dialog) == rendered(theirs, dialog)
    stops = {theirs.eos_token_id, FIRST + 1, FIRST + 4}
    assert {token for token in stops if token < ROWS} <= llama.engine.stop_token_ids


@pytest.mark.parametrize("name", ["words", "ChatML", "no bos", "pieces with words"])
def test_logits_are_those_of_transformers(name, tmp_path, model):
    llama, theirs = built(LAYOUTS[name], tmp_path, model)
    ids = rendered(theirs, TALK)
    with torch.inference_mode():
        wanted = model[0](torch.tensor([ids])).logits[0]
    scores = llama.model.forward(torch.tensor([ids]), 0)[0]
    assert torch.allclose(scores, wanted, atol=2e-5)


def test_there_are_forty_layouts():
    assert len(LAYOUTS) >= 40


# --- GGUF


def gguf_file(path, theirs, *, eos=None, template=None, keys=(), more=(), rows=0):
    """The folder's tokenizer in a GGUF file as llama.cpp's converter writes it, and a tiny model.

    `more` are tokens and their types after it; `keys` are calls of the writer.
    """
    added = theirs.added_tokens_decoder
    tokens = [
        added[n].content if n in added else theirs.convert_ids_to_tokens(n)
        for n in range(len(theirs))
    ]
    pieces = "<0x41>" in tokens
    kinds = [1 if n not in added else 3 if added[n].special else 4 for n in range(len(tokens))]
    for number in range(len(tokens)):
        if pieces and 3 <= number < 259:
            kinds[number] = 6
        if pieces and tokens[number] == "<unk>":
            kinds[number] = 2
    tokens, kinds = [*tokens, *(t for t, _ in more)], [*kinds, *(kind for _, kind in more)]
    for number in range(len(tokens), rows):
        tokens, kinds = [*tokens, f"[PAD{number}]"], [*kinds, 5]
    out = gguf.GGUFWriter(str(path), "llama")
    sizes = {
        "block_count": 1,
        "context_length": 256,
        "embedding_length": 32,
        "feed_forward_length": 64,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "rope.dimension_count": 8,
    }
    for key, value in sizes.items():
        out.add_uint32(f"llama.{key}", value)
    out.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    out.add_tokenizer_model("llama" if pieces else "gpt2")
    out.add_token_list(tokens)
    out.add_token_types(kinds)
    if pieces:
        out.add_token_scores([-float(n) for n in range(len(tokens))])
    else:
        out.add_tokenizer_pre("llama-bpe")
        spelled = {"".join(CHAR_OF[b] for b in token): rank for token, rank in RANKS.items()}
        out.add_token_merges(merges_of(spelled))
    if theirs.bos_token_id is not None:
        out.add_bos_token_id(theirs.bos_token_id)
    out.add_eos_token_id(theirs.eos_token_id if eos is None else eos)
    if theirs.pad_token_id is not None:
        out.add_pad_token_id(theirs.pad_token_id)
    if theirs.unk_token_id is not None:
        out.add_unk_token_id(theirs.unk_token_id)
    if template is not None:
        out.add_chat_template(template)
    for call, *arguments in keys:
        getattr(out, call)(*arguments)
    random = np.random.default_rng(0)
    shapes = {"token_embd": (len(tokens), 32), "output_norm": (32,), "output": (len(tokens), 32)}
    layer = {
        "attn_q": (32, 32),
        "attn_k": (16, 32),
        "attn_v": (16, 32),
        "attn_output": (32, 32),
        "ffn_gate": (64, 32),
        "ffn_up": (64, 32),
        "ffn_down": (32, 64),
        "attn_norm": (32,),
        "ffn_norm": (32,),
    }
    shapes |= {f"blk.0.{part}": shape for part, shape in layer.items()}
    for part, shape in shapes.items():
        out.add_tensor(f"{part}.weight", random.normal(0, 0.2, shape).astype(np.float32))
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return path


# Flags that GGUF cannot say are not among these, nor words beside pieces: SentencePiece and
# llama.cpp write other spaces around them than transformers.
IN_GGUF = (
    "plain",
    "words",
    "special words",
    "longest",
    "many",
    "decoder",
    "no bos",
    "declared again",
    "a model's file",
    "ChatML",
    "ChatML in words",
    "eot",
    "pad and unk",
    "roles in words",
    "pieces",
)


@pytest.mark.parametrize("name", IN_GGUF)
def test_a_gguf_file_says_what_the_folder_says_from_which_it_was_made(name, tmp_path):
    given = LAYOUTS[name]
    theirs = AutoTokenizer.from_pretrained(write(given, tmp_path / "folder"))
    bos = len(theirs("").input_ids) == 1
    template = given["template"]
    keys = [("add_add_bos_token", bos)]
    path = gguf_file(tmp_path / "m", theirs, template=template, keys=keys, rows=len(theirs) + 300)
    path = path.rename(tmp_path / "m.gguf")
    llama = Llama.build(path, device="cpu", max_seq_len=64)
    ours = llama.tokenizer
    fields = gguf.GGUFReader(path).fields
    told = [fields["tokenizer.ggml.tokens"].contents(n) for n in range(len(theirs))]
    assert ours.n_words == len(theirs) == len(told)
    assert {each.content: each.id for each in ours.added if told.count(each.content) == 1} == {
        text: token for text, token in theirs.get_added_vocab().items() if text != "<unk>"
    }
    for text in ("hello the user: See it.", "a größe section5ab 日本語 🙂", "x <tool> y<tool>z"):
        ids = theirs(text).input_ids
        if not any(special in text for special in ours.special_tokens):
            assert ours.encode(text, bos=True, eos=False) == ids, text
    if template is not None:
        plain = [{**message, "content": "hello the user"} for message in TALK]
        assert llama.formatter.encode_dialog_prompt(plain) == rendered(theirs, plain)
    assert theirs.eos_token_id in llama.engine.stop_token_ids
    assert ours.names["eos_token"] == theirs.eos_token
    assert ours.names.get("pad_token") == theirs.pad_token
    assert ours.decode([len(theirs), len(theirs) + 299]) == ""  # rows without a token


def test_every_kind_of_token_of_a_gguf_file(tmp_path):
    theirs = AutoTokenizer.from_pretrained(write(LAYOUTS["words"], tmp_path / "folder"))
    free = len(theirs)
    more = [("<|im_end|>", 3), ("ordinary", 1), ("<gone>", 5), ("mine", 4), ("<odd>", 2)]
    path = gguf_file(tmp_path / "m.gguf", theirs, more=more, keys=[("add_eot_token_id", free + 1)])
    ours = Llama.build(path, device="cpu", max_seq_len=64).tokenizer
    for text, (token, kind) in zip(
        ("<|im_end|>", "ordinary", "<gone>", "mine", "<odd>"), more, strict=True
    ):
        ids = ours.encode(f"a {text}.", bos=False, eos=False)
        number = free + [t for t, _ in more].index(token)
        assert (number in ids) == (kind == 4), (text, ids)
        assert ours.decode([number]) == text
    assert {free, FIRST + 1, FIRST + 5} <= ours.stop_tokens  # <|im_end|>, and Llama 3's


@pytest.mark.parametrize(("before", "after"), [(True, False), (False, False), (True, True)])
def test_a_gguf_file_says_what_stands_around_a_text(tmp_path, before, after):
    theirs = AutoTokenizer.from_pretrained(write(LAYOUTS["plain"], tmp_path / "folder"))
    keys = [("add_add_bos_token", before), ("add_add_eos_token", after)]
    path = gguf_file(tmp_path / "m.gguf", theirs, keys=keys)
    llama = Llama.build(path, device="cpu", max_seq_len=64)
    got = llama.text_completion(["hello"], max_gen_len=1, echo=True, logprobs=True, temperature=0)
    assert len(got[0]["tokens"]) in (1 + before + after, 2 + before + after)
    assert llama.tokenizer.encode("hello", bos=True, eos=after) == [
        *[FIRST] * before,
        RANKS[b"hello"],
        *[FIRST + 1] * after,
    ]


@pytest.mark.parametrize("kind", ["words", "pieces"])
def test_a_gguf_file_may_name_a_token_that_is_none_where_none_is_needed(tmp_path, caplog, kind):
    """As in llama.cpp, with a warning; not for the begin and the end of a text."""
    theirs = AutoTokenizer.from_pretrained(write(LAYOUTS[kind], tmp_path / "folder"))
    keys = [
        ("add_uint32", "tokenizer.ggml.seperator_token_id", 2**32 - 1),
        ("add_uint32", "tokenizer.ggml.mask_token_id", len(theirs)),
        ("add_eot_token_id", 99999),
    ]
    llama = Llama.build(gguf_file(tmp_path / "m.gguf", theirs, keys=keys), device="cpu")
    assert not {"sep_token", "mask_token"} & llama.tokenizer.names.keys()
    assert max(llama.engine.stop_token_ids) < len(theirs)
    assert caplog.text.count("it is not heeded") == 3
    broken = gguf_file(tmp_path / "n.gguf", theirs, eos=99999)
    with pytest.raises(ValueError, match="eos_token_id is 99999, and there are"):
        Llama.build(broken, device="cpu")
