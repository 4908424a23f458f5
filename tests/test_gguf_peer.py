"""The demo in llama.cpp: what is written here runs there, what is quantized there runs here.

Needs the package llama-cpp-python, which is compiled when it is installed: pytest -m peer.
"""

import ctypes
from itertools import islice
from pathlib import Path

import pytest
import torch
from conftest import write_tokenizer

from llama import Llama, ModelArgs, Tokenizer
from llama.checkpoint import open_checkpoint, random_checkpoint, write_gguf
from llama.loading import load
from llama.model import RopeScaling
from llama.parallel import ONE
from llama.text.sentencepiece import SentencePieceTokenizer

pytestmark = pytest.mark.peer

DEMO = Path(__file__).parent.parent / "llama" / "demo"
LENGTH = 24
SURE = 0.3  # llama.cpp rounds activations to 8 bits: what that may change between two logits
TYPES = {"Q4_K_M": 15, "Q5_K_M": 17, "Q6_K": 18, "Q3_K_M": 12, "Q2_K": 10, "IQ4_XS": 30,
         "IQ3_S": 26, "Q4_0": 2, "Q5_1": 9, "IQ4_NL": 25, "Q4_1": 3, "Q5_0": 8}  # fmt: skip
SUBJECTS = [
    "France",
    "Japan",
    "Italy",
    "Spain",
    "Kenya",
    "Peru",
    "Norway",
    "Egypt",
    "Chile",
    "Cuba",
]
PROMPTS = [
    begin.format(subject)
    for subject in SUBJECTS
    for begin in (
        "The capital of {} is",
        "{}: a",
        "Question: where is {}?",
        "In {}, 1, 2,",
        "{} and",
    )
]
TEXTS = [
    *PROMPTS,
    "naïve café",
    "日本語",
    "emoji 😀",
    "<|eot_id|>",
    "x = [1, 2]  # code\n\n\ty",
    "  two",
]


@pytest.fixture(scope="module")
def llama_cpp():
    return pytest.importorskip("llama_cpp")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    path = tmp_path_factory.mktemp("peer") / "demo.gguf"
    checkpoint = open_checkpoint(DEMO)
    write_gguf(checkpoint, path, dtype=torch.float32, tokenizer=checkpoint.open_tokenizer())
    return path


def opened(llama_cpp, path):
    return llama_cpp.Llama(str(path), n_ctx=256, n_threads=1, verbose=False)


def continued(there, ids):
    """Greedy ids of llama.cpp, up to LENGTH of them."""
    there.reset()
    return list(islice(there.generate(ids, temp=0.0, top_k=1), LENGTH))


def partings(here, there, prompts):
    """Where greedy answers part: by how much each token leads the other's in our logits."""
    leads = []
    for prompt in prompts:
        ids = here.tokenizer.encode(prompt, bos=True, eos=False)
        theirs = continued(there, ids)
        mine = here.generate([ids], LENGTH, 0.0)[0][0]
        stop = next((n for n, t in enumerate(theirs) if t in here.tokenizer.stop_tokens), LENGTH)
        at = next((n for n in range(LENGTH) if mine[n : n + 1] != theirs[:stop][n : n + 1]), None)
        if at is not None:
            scores = here.model(torch.tensor([ids + mine[:at]]))[0, -1]
            own = mine[at] if at < len(mine) else int(scores.argmax())
            leads.append(float(scores[own] - scores[theirs[at]]))
    return leads


def test_the_demo_runs_in_llama_cpp_with_the_same_ids(llama_cpp, exported):
    here, there = Llama.build(exported, max_seq_len=256), opened(llama_cpp, exported)
    for text in TEXTS:
        ids = here.tokenizer.encode(text, bos=True, eos=False)
        assert there.tokenize(text.encode(), add_bos=True, special=False) == ids, text
    assert not [lead for lead in partings(here, there, PROMPTS) if lead > 1e-3]


def test_a_chat_in_llama_cpp_by_the_template_in_the_file(llama_cpp, exported):
    here, there = Llama.build(exported, max_seq_len=256), opened(llama_cpp, exported)
    for question in ("What is the capital of France?", "What is 17 + 25?", "Spell umbrella."):
        dialog = [{"role": "user", "content": question}]
        answer = there.create_chat_completion(dialog, temperature=0.0, max_tokens=LENGTH)
        mine = here.chat_completion([dialog], temperature=0, max_gen_len=LENGTH)[0]
        assert answer["choices"][0]["message"]["content"] == mine["generation"]["content"]


SHAPES = {
    "factors for each pair": {"rope_scaling": RopeScaling(factors=tuple(range(1, 33)))},
    "constants": {"rope_scaling": RopeScaling(factor=8.0, original_context=64)},
    "tied": {"tied": True},
    "heads of their own size": {"head_dim": 32},
    "Llama 2": {"rope_theta": 10000.0, "norm_eps": 1e-6, "n_kv_heads": 4},
}


@pytest.mark.parametrize("name", SHAPES)
def test_random_models_have_the_same_logits_there(llama_cpp, tmp_path, name):
    shape = {"dim": 256, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 512}
    args = ModelArgs(**(shape | SHAPES[name]))
    checkpoint = random_checkpoint(args, dtype=torch.float32)
    tokenizer = Tokenizer(write_tokenizer(tmp_path / "tokenizer.model"))
    write_gguf(checkpoint, tmp_path / "model.gguf", tokenizer=tokenizer)
    there = llama_cpp.Llama(
        str(tmp_path / "model.gguf"), n_ctx=256, n_threads=1, verbose=False, logits_all=True,
        type_k=0, type_v=0,
    )  # fmt: skip
    ids = torch.randint(256, (1, 200), generator=torch.Generator().manual_seed(0))
    there.eval(ids[0].tolist())
    here = load(checkpoint, ranks=ONE, device="cpu")(ids)[0]
    error = (torch.from_numpy(there.scores[:200].copy()) - here).abs().max()
    assert error < 2e-3


def test_pieces_and_scores_are_the_same_tokenizer_there(llama_cpp, tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    (tmp_path / "text.txt").write_text("\n".join([*PROMPTS, *TEXTS] * 20))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text.txt"), model_prefix=str(tmp_path / "tokenizer"), vocab_size=400,
        model_type="bpe", byte_fallback=True, normalization_rule_name="identity",
        remove_extra_whitespaces=False, minloglevel=2, hard_vocab_limit=False,
    )  # fmt: skip
    tokenizer = SentencePieceTokenizer(tmp_path / "tokenizer.model")
    args = ModelArgs(dim=32, n_layers=1, n_heads=4, vocab_size=tokenizer.n_words)
    write_gguf(random_checkpoint(args), tmp_path / "model.gguf", tokenizer=tokenizer)
    there = opened(llama_cpp, tmp_path / "model.gguf")
    for text in TEXTS:
        ids = tokenizer.encode(text, bos=True, eos=False)
        assert there.tokenize(text.encode(), add_bos=True, special=False) == ids, text


@pytest.mark.parametrize("kind", ["q8_0", "q4_0"])
def test_what_is_quantized_here_runs_there(llama_cpp, tmp_path, kind):
    checkpoint = open_checkpoint(DEMO)
    path = tmp_path / "model.gguf"
    write_gguf(checkpoint, path, type=kind, tokenizer=checkpoint.open_tokenizer())
    here = Llama.build(path, dtype="float32", max_seq_len=256)
    leads = partings(here, opened(llama_cpp, path), PROMPTS[:10])
    print(kind, leads)
    assert all(lead < SURE for lead in leads)


def quantized(llama_cpp, source, target, number):
    """`source` as llama.cpp writes it in another type; quantized ones too."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread, params.allow_requantize = number, 1, True
    paths = str(source).encode(), str(target).encode()
    assert llama_cpp.llama_model_quantize(*paths, ctypes.byref(params)) == 0
    return target


@pytest.mark.parametrize("kind", TYPES)
def test_what_is_quantized_there_runs_here(llama_cpp, exported, tmp_path, kind):
    """Its numbers are those that llama.cpp itself unpacks; answers differ by its rounding alone."""
    path = quantized(llama_cpp, exported, tmp_path / "model.gguf", TYPES[kind])
    unpacked = open_checkpoint(quantized(llama_cpp, path, tmp_path / "plain.gguf", 0))
    checkpoint = open_checkpoint(path)
    assert "F32 (39)" in unpacked.stored
    assert "F32 (39)" not in checkpoint.stored
    for name, source in checkpoint.tensors.items():
        assert torch.equal(source.read(), unpacked.tensors[name].read()), name
    here = Llama.build(path, dtype="float32", max_seq_len=256)
    leads = partings(here, opened(llama_cpp, path), PROMPTS[:10])
    print(kind, checkpoint.stored, leads)
    assert all(lead < SURE for lead in leads)
