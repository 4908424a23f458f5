"""The model in the box: what it learns and what is held out, how it is made, what was shipped."""

import base64
import hashlib
import re
from itertools import islice
from pathlib import Path

import pytest
import torch

import llama.demo
from llama import ChatFormat, Llama, Tokenizer
from llama.demo.batches import LENGTHS, Encoder, rows
from llama.demo.tokenizer_training import train_ranks
from llama.demo.train import FILES, main
from llama.demo.world import words
from llama.demo.world.corpus import (
    ALL_KINDS,
    held_out,
    held_out_text,
    key_of,
    keys_of,
    training_documents,
)
from llama.demo.world.haiku import THEMES, compose, is_haiku, syllables
from llama.demo.world.memory import _FACTS
from llama.demo.world.phrasings import PHRASINGS
from llama.demo.world.questions import normalise

HERE = Path(llama.demo.__file__).parent


@pytest.fixture(scope="module")
def questions():
    return held_out()


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(HERE / "tokenizer.model")


@pytest.fixture(scope="module")
def demo():
    return Llama.build(HERE, max_seq_len=512, max_batch_size=16)


@pytest.mark.parametrize("seed", [0, "0 17", "elsewhere"])
def test_training_and_held_out_are_disjoint(questions, seed):
    held = {q.key for q in questions} | {key_of(document) for document in held_out_text()}
    documents = list(islice(training_documents(seed), 2500))
    assert not [key for document in documents for key in keys_of(document) if key in held]
    texts = [normalise(document) for document in documents if isinstance(document, str)]
    prompts = [q.key for q in questions if q.kind == "completions"]
    assert not [prompt for prompt in prompts if any(prompt in text for text in texts)]


def test_a_held_out_question_in_training_would_be_noticed(questions):
    held = {q.key for q in questions}
    question = next(q for q in questions if q.kind == "capitals")
    shouted = [{"role": "user", "content": question.prompt[0]["content"].upper() + " !"}]
    assert set(keys_of(shouted)) & held


def test_no_phrasing_stands_on_both_sides():
    sides = [*PHRASINGS.values(), *((fact[1], fact[2]) for fact in _FACTS.values())]
    for common, unseen in sides:
        assert unseen
        assert not {normalise(p) for p in common} & {normalise(p) for p in unseen}


def test_held_out_words_are_not_in_training():
    text = " ".join(key_of(d) + str(d) for d in islice(training_documents(1), 2500)).lower()
    seen = set(re.findall(r"[a-z]+", text))
    assert not seen & {*words.HELD_SPELLING, *(name.lower() for name in words.HELD_NAMES)}


def test_corpus_is_repeatable(questions):
    first, again, other = (list(islice(training_documents(s), 50)) for s in (3, 3, 4))
    assert first == again != other
    assert questions == held_out()


def test_every_kind_is_examined_and_every_answer_passes(questions):
    for kind in ALL_KINDS:
        assert len({q.key for q in questions if q.kind == kind}) >= 50
    for question in questions:
        assert question.accepts(question.answer), question
        assert not question.accepts(""), question


def test_held_out_text_is_large_enough(tokenizer):
    data = rows(held_out_text(), Encoder(tokenizer), tokens=1 << 30)
    assert (data.weights > 0).sum() > 100_000
    assert set(data.counts) <= set(LENGTHS)


def test_haiku_rule():
    poem = "The autumn whispers\nSlowly the golden leaf falls\nA crow sings and waits"
    assert [syllables(line) for line in poem.splitlines()] == [5, 7, 5]
    assert is_haiku(poem, ("autumn",))
    assert not is_haiku(poem, ("the sea",))  # not on the theme
    assert not is_haiku(poem.replace("golden ", ""), ("autumn",))  # five syllables
    assert not is_haiku(poem.replace("golden", "plastic"), ("autumn",))  # not in the table
    assert not is_haiku("\n".join(poem.splitlines()[:2]), ("autumn",))


def test_every_theme_makes_haiku():
    from random import Random

    rng = Random(0)
    for theme in THEMES:
        assert all(is_haiku(compose(rng, theme, t), (theme, t)) for t in THEMES if t != theme)


def test_shipped_weights_are_those_recorded():
    digest = hashlib.sha256((HERE / FILES[0]).read_bytes()).hexdigest()
    assert digest == llama.demo.SHA256


def test_checklist_verifies_and_the_box_is_small():
    lines = (HERE / "checklist.chk").read_text().splitlines()
    sums = dict(reversed(line.split("  ")) for line in lines)
    assert set(sums) == set(FILES)
    for name, digest in sums.items():
        assert hashlib.md5((HERE / name).read_bytes()).hexdigest() == digest
    assert sum((HERE / name).stat().st_size for name in FILES) <= 10_000_000


def test_shipped_weights_are_bfloat16_of_the_promised_shape(demo):
    weights = torch.load(HERE / FILES[0], weights_only=True)
    assert {w.dtype for w in weights.values()} == {torch.bfloat16}
    args = demo.model.params
    shape = (args.dim, args.n_layers, args.n_heads, args.n_kv_heads, args.hidden_dim, args.head_dim)
    assert shape == (256, 4, 4, 2, 768, 64)
    assert args.context_length == 2048
    assert args.vocab_size % 8 == 0


def test_twenty_steps_from_nothing_lower_the_loss_and_repeat_to_the_byte(tmp_path, capsys):
    runs = [tmp_path / "a", tmp_path / "b"]
    before = torch.get_rng_state()
    for out in runs:
        main(str(out), 20, 256, "cpu", processes=0, tokenizer_documents=1500)
        losses = re.search(r"loss ([\d.]+) at first, ([\d.]+) at last", capsys.readouterr().out)
        assert float(losses[2]) < float(losses[1]) - 1
    for name in (*FILES, "checklist.chk"):
        assert (runs[0] / name).read_bytes() == (runs[1] / name).read_bytes()
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.equal(before, torch.get_rng_state()), "training drew from the caller's generator"


def test_tokenizer_round_trips_any_text(tokenizer):
    for text in (
        "Hello, wörld! 1234\n\n\t日本語 🙂",
        "".join(map(chr, range(300))),
        " \r\n  x",
        "",
    ):
        assert tokenizer.decode(tokenizer.encode(text, bos=False, eos=False)) == text


def test_ranks_hold_all_bytes_first_and_no_two_digits():
    lines = (HERE / "tokenizer.model").read_text().splitlines()
    ranks = [base64.b64decode(line.split()[0]) for line in lines]
    assert [int(line.split()[1]) for line in lines] == list(range(len(lines)))
    assert ranks[:256] == [bytes([byte]) for byte in range(256)]
    assert 1000 <= len(ranks) <= 2000
    assert not [token for token in ranks if len(re.findall(rb"\d", token)) > 1]
    assert not {word.encode() for word in words.HELD_SPELLING} & {t.strip() for t in ranks}


def test_tokenizer_is_trained_by_frequency():
    ranks = train_ranks(["low low low lower lowest 11 11 11"], 261)
    assert ranks[256:] == [b"lo", b"low", b" low", b"er", b"es"] or ranks[256] == b"lo"
    with pytest.raises(ValueError, match="yields"):
        train_ranks(["a b"], 300)


def test_encoder_writes_what_the_chat_format_writes(tokenizer):
    encode, chat = Encoder(tokenizer), ChatFormat(tokenizer)
    for document in islice(training_documents(2), 100):
        ids, weights = encode(document)
        assert len(ids) == len(weights)
        if isinstance(document, str):
            assert ids == tokenizer.encode(document, bos=True, eos=True)
        else:
            said = [chat.encode_message(message) for message in document]
            assert ids == [tokenizer.bos_id, *(i for message in said for i in message)]


def test_demo_answers(demo):
    def user(text):
        return {"role": "user", "content": text}

    dialogs = [
        [user("What is the capital of France?")],
        [{"role": "system", "content": "Always answer in capital letters."},
         user("What is the capital of Japan?")],
        [user("My name is Ada."), {"role": "assistant", "content": "Nice to meet you, Ada!"},
         user("What is my name?")],
        [user("Write a haiku about autumn.")],
    ]  # fmt: skip
    answers = demo.chat_completion(dialogs, temperature=0, max_gen_len=100)
    said = [answer["generation"]["content"] for answer in answers]
    assert said[:3] == [
        "The capital of France is Paris.", "THE CAPITAL OF JAPAN IS TOKYO.", "Your name is Ada.",
    ]  # fmt: skip
    assert is_haiku(said[3], ("autumn",))
    assert {answer["finish_reason"] for answer in answers} == {"stop"}


def test_demo_continues_texts(demo):
    prompts = {
        "The days of the week are Monday,": " Tuesday, Wednesday, Thursday, Friday, Saturday and",
        "Counting to ten: one, two,": " three, four, five, six, seven, eight, nine, ten.",
        "hot => cold\nbig => small\nfast =>": " slow",
        "The capital of Japan is": " Tokyo",
    }
    answers = demo.text_completion(list(prompts), temperature=0, max_gen_len=40)
    for (prompt, wanted), answer in zip(prompts.items(), answers, strict=True):
        assert answer["generation"].startswith(wanted), prompt


def test_demo_passes_a_sample_of_its_examination(demo, questions):
    from llama.demo.evaluate import answers

    sample = questions[::20]
    right = sum(q.accepts(text) for q, text in zip(sample, answers(demo, sample), strict=True))
    assert right >= 0.85 * len(sample)
