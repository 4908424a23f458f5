"""Laws of the engine: slots, chunks, rows and ends; ids in, ids out."""

import gc
import math
import random
import re
import weakref
from collections import Counter

import pytest
import torch
from conftest import says

from llama.engine import Engine, Request
from llama.engine.runner import PlainRunner
from llama.sampling import SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=12)


def prompts_of(lengths, vocab=96, seed=0):
    rng = random.Random(seed)
    return [[rng.randrange(vocab) for _ in range(n)] for n in lengths]


def run(engine, prompts, params=GREEDY):
    params = params if isinstance(params, list) else [params] * len(prompts)
    requests = [engine.submit(*pair) for pair in zip(prompts, params, strict=True)]
    events = []
    while not engine.idle:
        events += engine.step()
    return requests, events


def engine_of(model, slots=4, room=64, n_words=None, **options):
    return Engine(PlainRunner(model, model.new_cache(slots, room), n_words), **options)


def alone(model, prompt, params=GREEDY, **options):
    requests, events = run(engine_of(model, 1, **options), [prompt], params)
    return requests[0].tokens, [e.logprob for e in events]


def same_row(model, prompt, ours, reference, ours_scores, reference_scores):
    """The law of rows: equal ids, but for a tie of the two best within 1e-4; logprobs to 1e-5."""
    for i, (a, b) in enumerate(zip(ours, reference, strict=True)):
        if a != b:
            logits = model(torch.tensor([prompt + reference[:i]]), 0)[0, -1]
            best = logits.topk(2).values
            assert best[0] - best[1] < 1e-4, (i, a, b)
            return
        assert ours_scores[i] == pytest.approx(reference_scores[i], abs=1e-5)


@pytest.mark.parametrize("temperature", [0, 0.9])
@pytest.mark.parametrize("chunk", [3, 16, 2048])
def test_a_row_of_a_ragged_batch_is_the_row_alone_and_chunks_are_one_pass(tiny, chunk, temperature):
    model = tiny()
    prompts = prompts_of([1, 2, 17, 40, 5, 30])
    params = [SamplingParams(temperature=temperature, max_tokens=12, seed=i) for i in range(6)]
    requests, events = run(engine_of(model, 3, chunk=chunk), prompts, params)
    for request, prompt, one in zip(requests, prompts, params, strict=True):
        scores = [e.logprob for e in events if e.request is request]
        reference, reference_scores = alone(model, prompt, one, chunk=2048)
        assert len(request.tokens) == 12
        same_row(model, prompt, request.tokens, reference, scores, reference_scores)


def test_more_requests_than_slots_is_one_by_one_in_order_of_arrival(tiny):
    model = tiny()
    prompts = prompts_of([4, 9, 3, 20, 7, 2, 11])
    queued, events = run(engine_of(model, 2), prompts)
    assert [r.tokens for r in queued] == [alone(model, p)[0] for p in prompts]
    firsts = list(dict.fromkeys(queued.index(e.request) for e in events))
    assert firsts == list(range(7))


def test_long_and_short_prompts_together_take_one_pass_each_not_one_token_steps(scripted):
    llama = scripted(lambda token, position: 65, max_seq_len=2100)
    prompts = prompts_of([10, 2000], 256)
    run(llama.engine, prompts, SamplingParams(temperature=0, max_tokens=4))
    batches = llama.model.batches
    assert sum(map(sum, batches)) == 2010 + 3 + 3  # every token runs once
    assert len(batches) <= math.ceil(2010 / 512) + 4


def test_a_long_prompt_does_not_stall_those_who_are_answering(scripted):
    llama = scripted(lambda token, position: 65, max_seq_len=4000)
    engine = llama.engine
    short = engine.submit([1, 2, 3], SamplingParams(temperature=0, max_tokens=50))
    engine.step()
    engine.submit([1] * 3000, GREEDY)
    while short.finish_reason is None:
        before = len(short.tokens)
        engine.step()
        assert len(short.tokens) == before + 1
        assert sum(llama.model.batches[-1]) <= 512


def test_limits_are_per_row_and_nobody_is_cut_or_runs_on(tiny):
    model = tiny()
    prompts = prompts_of([3, 50, 10])
    params = [SamplingParams(temperature=0, max_tokens=n) for n in (5, None, 30)]
    requests, _ = run(engine_of(model), prompts, params)
    assert [len(r.tokens) for r in requests] == [5, 14, 30]
    assert {r.finish_reason for r in requests} == {"length"}


@pytest.mark.parametrize("stop", [256 + 1, 256 + 8, 256 + 9, 77])
def test_a_stop_token_ends_its_row_only_and_is_no_output(scripted, stop):
    def script(token, position):
        return stop if token == 66 and position >= 6 else 66 if token != 70 else 70

    llama = scripted(script)
    params = SamplingParams(temperature=0, max_tokens=9, stop_token_ids=(77,))
    requests, events = run(llama.engine, [[66, 66], [70, 70, 70]], params)
    assert requests[0].tokens == [66] * 5
    assert requests[0].finish_reason == "stop"
    assert requests[1].tokens == [70] * 9
    assert requests[1].finish_reason == "length"
    last = [e for e in events if e.request is requests[0]][-1]
    assert (last.token, last.finish_reason) == (stop, "stop")
    assert all(e.token != stop for e in events if e.finish_reason != "stop")


def test_logprobs_are_those_of_the_model_whatever_the_temperature(tiny):
    model = tiny()
    prompt = prompts_of([12])[0]
    for temperature, top_p in ((0, 1.0), (1.7, 0.5)):
        params = SamplingParams(
            temperature=temperature, top_p=top_p, max_tokens=10, seed=3, logprobs=4
        )
        requests, events = run(engine_of(model), [prompt], params)
        ids = prompt + requests[0].tokens
        expected = model(torch.tensor([ids]), 0)[0].log_softmax(-1)
        for i, event in enumerate(events):
            row = expected[len(prompt) - 1 + i]
            assert event.logprob == pytest.approx(row[event.token].item(), abs=1e-5)
            assert [t for t, _ in event.top_logprobs] == row.topk(4).indices.tolist()
            values = [p for _, p in event.top_logprobs]
            assert values == pytest.approx(row.topk(4).values.tolist(), abs=1e-5)


@pytest.mark.parametrize("chunk", [5, 2048])
@pytest.mark.parametrize("max_tokens", [0, 7])
def test_prompt_logprobs_score_target_t_by_the_logits_before_it(tiny, chunk, max_tokens):
    model = tiny()
    prompts = prompts_of([1, 2, 33, 57])
    params = SamplingParams(temperature=0, max_tokens=max_tokens, prompt_logprobs=0)
    requests, _ = run(engine_of(model, 2, chunk=chunk), prompts, params)
    for prompt, request in zip(prompts, requests, strict=True):
        scores = model(torch.tensor([prompt]), 0)[0].log_softmax(-1)
        expected = [0.0] + [scores[t - 1, prompt[t]].item() for t in range(1, len(prompt))]
        assert request.prompt_logprobs == pytest.approx(expected, abs=1e-5)
        assert len(request.tokens) == max_tokens


def test_a_prompt_that_fills_the_context_can_still_be_scored(tiny):
    model = tiny()
    params = SamplingParams(max_tokens=0, prompt_logprobs=0)
    requests, events = run(engine_of(model), prompts_of([64]), params)
    assert len(requests[0].prompt_logprobs) == 64
    assert [e.finish_reason for e in events] == ["length"]


def test_the_output_layer_runs_only_where_a_logit_is_wanted(tiny):
    model = tiny()
    rows = []
    model.output.register_forward_hook(lambda module, args, out: rows.append(len(out)))
    run(engine_of(model, chunk=16), prompts_of([40, 40]), SamplingParams(max_tokens=3))
    assert max(rows) <= 2
    assert sum(rows) == 6


def test_prompt_logprobs_come_in_slices(tiny):
    model = tiny(max_seq_len=2048)
    rows = []
    model.output.register_forward_hook(lambda module, args, out: rows.append(len(out)))
    params = SamplingParams(max_tokens=0, prompt_logprobs=0)
    run(engine_of(model, 1, 2048, chunk=2048), prompts_of([1500]), params)
    assert max(rows) <= 256


def test_cancel_frees_the_slot_at_any_time(tiny):
    model = tiny()
    prompts = prompts_of([5, 30, 6])
    for steps in range(6):
        engine = engine_of(model, 1, chunk=8)
        requests = [engine.submit(p, GREEDY) for p in prompts]
        for _ in range(steps):
            engine.step()
        engine.cancel(requests[0], "bored")
        engine.cancel(requests[0], "again")  # harmless
        engine.cancel(requests[2], "never began")
        while not engine.idle:
            assert all(e.request is requests[1] for e in engine.step())
        assert [r.finish_reason for r in requests] == ["bored", "length", "never began"]
        assert requests[1].tokens == alone(model, prompts[1])[0]


def test_penalties_bias_and_filters_reach_the_samples(tiny):
    model = tiny()
    prompt = prompts_of([8])[0]
    plain = dict(temperature=1.0, top_p=1.0, max_tokens=40, seed=5)
    base = alone(model, prompt, SamplingParams(**plain))[0]
    for change in (
        {"top_k": 2},
        {"min_p": 0.5},
        {"top_p": 0.3},
        {"temperature": 0.2},
        {"presence_penalty": 2.0},
        {"frequency_penalty": 2.0},
        {"logit_bias": {base[0]: -100.0}},
        {"seed": 6},
        {"max_tokens": 39},
        {"stop_token_ids": (base[3],)},
    ):
        assert alone(model, prompt, SamplingParams(**{**plain, **change}))[0] != base, change
    never = SamplingParams(**{**plain, "presence_penalty": 1e6})
    tokens = alone(model, prompt, never)[0]
    assert len(set(tokens)) == len(tokens)


def test_requests_without_a_seed_draw_different_ones_from_the_engines_stream(tiny):
    model = tiny()
    params = SamplingParams(temperature=1.5, max_tokens=10)
    prompts = prompts_of([5]) * 3

    def tokens(seed):
        return [r.tokens for r in run(engine_of(model, seed=seed), prompts, params)[0]]

    first = tokens(1)
    assert first == tokens(1)
    assert first != tokens(2)
    assert first[0] != first[1] != first[2]


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([], GREEDY, "the prompt is empty; it must have at least one token"),
        ([1] * 64, GREEDY, "the prompt has 64 tokens and max_seq_len is 64, which leaves no room"),
        ([1] * 65, SamplingParams(max_tokens=0), "the prompt has 65 tokens and max_seq_len is 64"),
        ([96], GREEDY, "the prompt has token id 96; ids go from 0 to 95"),
        ([-1], GREEDY, "the prompt has token id -1; ids go from 0 to 95"),
        ([1], SamplingParams(logprobs=97), "logprobs is 97; it must be at most 96"),
        ([1], SamplingParams(stop_token_ids=(96,)), "stop_token_ids has id 96"),
    ],
)
def test_a_request_that_cannot_be_run_is_refused_before_anything_is_queued(
    tiny, prompt, params, message
):
    engine = engine_of(tiny())
    with pytest.raises(ValueError, match=message):
        engine.submit(prompt, params)
    assert engine.idle


def test_logits_that_are_not_finite_name_the_row_and_harm_nobody_else(tiny):
    model = tiny()
    prompts = prompts_of([5, 6, 7])
    expected = [alone(model, p)[0] for p in prompts]
    engine = engine_of(model)
    requests = [engine.submit(p, GREEDY) for p in prompts]
    engine.step()
    table, sick = model.logits, requests[1]
    model.logits = lambda h: table(h).index_fill(0, torch.tensor([1]), math.nan)
    message = r"slot 1 at step 2 \(token 1 of its answer\) are not finite, .* torch.float32"
    engine.step()
    assert isinstance(sick.error, FloatingPointError)
    assert re.search(message, str(sick.error))
    model.logits = table
    while not engine.idle:
        engine.step()
    assert [r.finish_reason for r in requests] == ["length", "error", "length"]
    assert [requests[0].tokens, requests[2].tokens] == [expected[0], expected[2]]
    assert sick.tokens == expected[1][:1]
    again = run(engine, prompts)[0]  # and the slot serves again
    assert [r.tokens for r in again] == expected


def test_a_step_that_fails_has_not_happened(tiny):
    model = tiny()
    prompt = prompts_of([40])[0]
    params = SamplingParams(temperature=0, max_tokens=12, prompt_logprobs=0)
    engine = engine_of(model, chunk=16)
    request = engine.submit(prompt, params)
    hidden, turn = model.hidden, iter(range(100))

    def flaky(*args):
        out = hidden(*args)
        if next(turn) % 2:
            raise KeyboardInterrupt
        return out

    model.hidden = flaky
    while not engine.idle:
        try:
            engine.step()
        except KeyboardInterrupt:
            continue
    model.hidden = hidden
    reference = run(engine_of(model), [prompt], params)[0][0]
    assert request.tokens == reference.tokens
    assert request.prompt_logprobs == pytest.approx(reference.prompt_logprobs, abs=1e-5)


def test_scripts_say_what_they_are_told(scripted):
    llama = scripted(says("Hi", 3))
    requests, _ = run(llama.engine, [[1, 2, 3]], SamplingParams(temperature=0))
    assert bytes(requests[0].tokens) == b"Hi"


def test_a_conversation_runs_only_its_new_tokens_and_says_what_a_fresh_run_says(tiny):
    model = tiny()
    batches, hidden = [], model.hidden

    def counted(tokens, *rest):
        batches.append(len(tokens))
        return hidden(tokens, *rest)

    model.hidden = counted
    engine = engine_of(model, 2, reuse=True)
    history = prompts_of([10])[0]
    for turn in range(3):
        batches.clear()
        other = engine.submit([50 + turn] * 5, GREEDY)  # somebody else takes the other slot
        request = run(engine, [history], SamplingParams(temperature=0, max_tokens=6))[0][0]
        assert request.tokens == alone(model, history, request.params)[0]
        assert other.finish_reason == "length"
        new = 10 if turn == 0 else 1 + 5  # the last answer's last token has no keys yet
        assert sum(batches[:1]) == new + 5
        history = history + request.tokens + [turn] * 5
    assert engine_of(model).reuse is False


def test_without_reuse_the_same_call_runs_the_same_way_twice(tiny):
    engine = engine_of(tiny())
    for _ in range(2):
        run(engine, prompts_of([10]))
        assert not engine._kept.tokens


def test_prompts_go_on_however_many_are_answering(tiny):
    """From a quarter of a chunk of answering rows on, a new prompt got one token a step."""
    engine = engine_of(tiny(max_seq_len=80), 41, 80, chunk=64)
    for i in range(40):
        engine.submit([i + 1], SamplingParams(temperature=0, max_tokens=70))
    engine.step()
    late = engine.submit([5] * 32, SamplingParams(temperature=0, max_tokens=1))
    for _ in range(4):
        engine.step()
    assert late.finish_reason == "length"


def test_reuse_keeps_conversations_and_gives_away_the_slot_that_was_used_least_recently(tiny):
    engine = engine_of(tiny(), 3, reuse=True)

    def ask(prompt):
        return run(engine, [prompt], SamplingParams(temperature=0, max_tokens=4))[0][0]

    talk = ask([1] * 30)
    others = [ask([1, 50 + i, 51, 52]) for i in range(3)]  # they begin alike, as with a BOS
    slots = [r.slot for r in others]
    assert talk.slot not in slots[:2]  # nobody had used these
    assert slots[2] == talk.slot  # then the one that was used least recently
    talk = ask([1] * 30)
    for i in range(6):
        other = ask([1, 60 + i, 61])
        before, talk = talk, ask(talk.prompt + talk.tokens + [8])
        assert talk.slot == before.slot != other.slot
        assert talk.reused == len(before.prompt) + len(before.tokens) - 1


def test_those_who_go_on_choose_their_slots_before_those_who_come(tiny):
    engine = engine_of(tiny(), 2, reuse=True)
    first, second = run(engine, [[1] * 20, [2] * 20], SamplingParams(temperature=0, max_tokens=2))[
        0
    ]
    newcomer = engine.submit([3] * 5, GREEDY)
    back = engine.submit(first.prompt + first.tokens + [4], GREEDY)
    while not engine.idle:
        engine.step()
    assert (back.slot, newcomer.slot) == (first.slot, second.slot)
    assert back.reused == 21


def test_admission_looks_at_no_prompt_where_nothing_is_reused(tiny):
    """Every free slot copied every waiting prompt: a gigabyte for 128 prompts of 8000 tokens."""

    class Untouched(list):
        def __getitem__(self, at):
            raise AssertionError("read")

    engine = engine_of(tiny(), 4)
    requests = [engine.submit([5] * 9, GREEDY) for _ in range(4)]
    for request in requests:
        request.prompt = Untouched(request.prompt)
    engine._admit()
    assert sorted(r.slot for r in requests) == [0, 1, 2, 3]


@pytest.mark.parametrize("rows", [8, 256, 768])
def test_rows_of_the_vocabulary_that_no_token_has_are_never_chosen(tiny, rows):
    """The choice alone is cut: logprobs and alternatives are the model's own over all rows."""
    words = 64
    model = tiny(vocab_size=words + rows)
    with torch.no_grad():
        model.output.weight[words:] *= 3  # the most probable ones, nearly always
    for params in (
        GREEDY,
        SamplingParams(temperature=1.0, top_p=1.0, max_tokens=12, seed=1, logprobs=2),
        SamplingParams(temperature=1.0, top_k=3, max_tokens=12, seed=2),
        SamplingParams(temperature=0, max_tokens=12, logit_bias={words + 1: 1000.0}),
        SamplingParams(temperature=0.9, max_tokens=12, frequency_penalty=1.0, seed=3),
    ):
        engine = engine_of(model, n_words=words)
        (request,), events = run(engine, [[1, 2, 3]], params)
        assert max(request.tokens) < words
        logits = model(torch.tensor([[1, 2, 3, *request.tokens]]), 0)[0, 2:].log_softmax(-1)
        for event, row in zip(events, logits, strict=False):
            assert event.logprob == pytest.approx(row[event.token].item(), abs=1e-5)
            for token, logprob in event.top_logprobs or []:
                assert logprob == pytest.approx(row[token].item(), abs=1e-5)
    with pytest.raises(ValueError, match="bans all 64 tokens"):
        engine.submit([1], SamplingParams(logit_bias=dict.fromkeys(range(words), -math.inf)))


def test_a_model_that_was_moved_after_it_was_built_is_refused_with_what_to_do(tiny):
    model = tiny()
    engine = engine_of(model)
    model.to(torch.bfloat16)
    with pytest.raises(ValueError, match=r"moved to torch.bfloat16 on cpu .* torch.float32 on cpu"):
        engine.submit([1], GREEDY)
    model.float()
    assert run(engine, [[1]])[0][0].finish_reason == "length"


def test_an_engine_that_is_idle_keeps_no_request(tiny):
    engine = engine_of(tiny(), slots=2, reuse=True)
    request = engine.submit([5, 6], GREEDY)
    stays = weakref.ref(request)
    while not engine.idle:
        engine.step()
    del request
    gc.collect()
    assert stays() is None


def test_what_waits_costs_a_step_next_to_nothing(tiny):
    """No property of a request that waits is asked, however many do."""
    engine = engine_of(tiny(), slots=2)
    for _ in range(300):
        engine.submit([5], GREEDY)
    engine.step()
    asked = Counter()
    reason = Request.finish_reason.fget

    class Watched(Request):
        @property
        def finish_reason(self):
            asked["finish_reason"] += 1
            return reason(self)

    for request in engine._live:
        request.__class__ = Watched
    engine.step()
    assert 0 < asked["finish_reason"] < 50


def test_a_model_that_is_moved_under_a_request_says_so_too(tiny):
    model = tiny()
    engine = engine_of(model)
    request = engine.submit([5, 6], GREEDY)
    engine.step()
    model.to(torch.bfloat16)
    while not engine.idle:
        engine.step()
    assert "the model was moved to torch.bfloat16" in str(request.error)
