"""Threads on one `Llama` on a GPU: what each call gets alone, but for what rounding can part."""

import random
from dataclasses import dataclass

import pytest
import torch
from test_cuda import DEMO
from test_threads import on_threads

from llama import Llama
from llama.cache import Batch

pytestmark = pytest.mark.gpu

THREADS, CALLS = 4, 200
TEXTS = ["What", "The capital of", "Spell", "One day a", "A haiku about", "Count from", "Red"]


@dataclass
class Answer:
    prompt: list[int]
    tokens: list[int]
    greedy: bool


def call(rng):
    """A call of some kind, which returns its Answer, or "refused"."""
    text, length, seed = (
        f"{rng.choice(TEXTS)} {rng.randrange(90)}",
        rng.choice([3, 9, 24]),
        rng.random(),
    )
    heat, kind = rng.choice([0, 0, 0.8]), rng.randrange(5)
    options = dict(temperature=heat, seed=int(seed * 10**6))

    def ids(llama):
        prompt = llama.tokenizer.encode(text, bos=True, eos=False)
        return Answer(prompt, llama.generate([prompt], length, **options)[0][0], not heat)

    def chat(llama):
        dialog = [{"role": "user", "content": text}]
        pieces = llama.stream_chat_completion([dialog], max_gen_len=length, **options)
        tokens = [piece.token for piece in pieces if piece.token is not None]
        return Answer(llama.formatter.encode_dialog_prompt(dialog), tokens, not heat)

    def left_early(llama):
        tokens = []
        for piece in llama.stream_text_completion([text], max_gen_len=24, **options):
            tokens += [] if piece.token is None else [piece.token]
            if len(tokens) == length:
                break
        return Answer(llama.tokenizer.encode(text, bos=True, eos=False), tokens, not heat)

    def refused(llama):
        try:
            return llama.generate([[5], [0.5]], length)
        except ValueError:
            return "refused"

    return [ids, ids, chat, left_early, refused][kind]


def side_by_side(llama, seed):
    """Pairs of answers, together and alone."""
    rng = random.Random(seed)
    jobs = [[call(rng) for _ in range(CALLS)] for _ in range(THREADS)]
    alone = [[job(llama) for job in own] for own in jobs]
    got = on_threads(llama, jobs, 120)
    assert [len(out) for out in got] == [CALLS] * THREADS
    assert llama.engine.idle
    return [
        pair
        for ours, theirs in zip(got, alone, strict=True)
        for pair in zip(ours, theirs, strict=True)
    ]


def logits_after(model, ids):
    tokens, positions = torch.tensor(ids).cuda(), torch.arange(len(ids)).cuda()
    with torch.no_grad():
        return model.forward_flat(tokens, positions, Batch([len(ids)], device="cuda"))[-1].double()


def parted(pairs):
    """Where answers differ: the ids before, the prompt included, and whether it was greedy."""
    for ours, theirs in pairs:
        if isinstance(ours, str) or isinstance(theirs, str):
            assert ours == theirs
        elif ours.tokens != theirs.tokens:
            both = zip(ours.tokens, theirs.tokens, strict=False)
            same = next((i for i, (a, b) in enumerate(both) if a != b), None)
            assert same is not None, "one is a beginning of the other"
            yield ours.prompt + ours.tokens[:same], ours.greedy


def test_float32_answers_of_four_threads_are_those_of_each_call_alone():
    llama = Llama.build(DEMO, device="cuda", dtype="float32", max_seq_len=256, max_batch_size=8)
    assert llama.engine.runner.captured is not None
    for seed in range(3):
        pairs = side_by_side(llama, seed)
        found = list(parted(pairs))
        for ids, greedy in found:
            best = logits_after(llama.model, ids).topk(2).values
            assert not greedy or best[0] - best[1] < 1e-4
        print(f"round {seed}: {len(found)} of {len(pairs)} calls part")
        assert len(found) <= 2


def test_bf16_answers_of_four_threads_part_only_where_roundings_can_part():
    llama = Llama.build(DEMO, device="cuda", max_seq_len=256, max_batch_size=8)
    exact = Llama.build(DEMO, device="cuda", dtype="float32", kernels=False).model
    pairs = side_by_side(llama, 7)
    found = list(parted(pairs))
    worst = 0.0
    for ids, greedy in found:
        usual, truth = logits_after(llama.model, ids), logits_after(exact, ids)
        best = usual.topk(2).values
        bound = 4 * (usual - truth).abs().max()  # two ways, each with an error of about this size
        if greedy:
            worst = max(worst, float((best[0] - best[1]) / bound))
            assert best[0] - best[1] <= bound
    print(
        f"{len(found)} of {len(pairs)} calls part; the largest margin is {worst:.2f} of the bound"
    )


def test_steps_of_threads_with_streams_of_their_own_follow_each_other(monkeypatch):
    """A side stream waits for no other one, so that a step there would overlap the one before."""
    llama = Llama.build(DEMO, max_batch_size=2, dtype="float32", device="cuda")
    prompt = llama.tokenizer.encode("What is", bos=True, eos=False)
    expected = llama.generate([prompt], 24, 0)
    used = []
    launch = llama.engine.runner.captured.launch

    def watched():
        used.append(torch.cuda.current_stream())
        launch()

    monkeypatch.setattr(llama.engine.runner.captured, "launch", watched)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        assert llama.generate([prompt], 24, 0) == expected
        assert torch.cuda.current_stream() == side
    assert set(used) == {torch.cuda.default_stream()}
