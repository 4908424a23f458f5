"""Laws of the engine's own message between ranks, and of what it asks of a runner: on runners that
compute nothing, with a thread for each rank."""

import json
import math
import random
import threading
from contextlib import nullcontext
from dataclasses import fields

import pytest

from llama.engine import Choice, Engine, Request
from llama.engine.control import Cancel, Close, decode, encode
from llama.engine.request import Outcome
from llama.sampling_params import SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=8)


class One:
    size, rank = 1, 0


class Counting:
    """A runner whose tokens count up from the last one of the sequence, `many` at a time."""

    n_slots, max_seq_len, vocab_size, n_words, dtype_name = 3, 64, 1000, 1000, "float32"

    def __init__(self, many=1, ranks=One):
        self.many, self.ranks, self.shares = many, ranks, []

    def surroundings(self):
        return nullcontext()

    def step(self, share):
        self.shares.append([(r.number, count) for r, count in share])
        return [self.outcome(request, count) for request, count in share]

    run = step

    def outcome(self, request, count):
        if count < request.pending or not request.limit:
            return Outcome(request, request.cached + count)
        first = (request.prompt + request.tokens)[-1] + 1
        choices = [Choice(first + i, -1.0, []) for i in range(self.many)]
        return Outcome(request, request.cached + count + self.many - 1, choices)

    def ran_out_of_memory(self, error):
        return False

    def moved(self):
        return None

    def is_finite(self, slot, length):
        return True

    def forget(self, slot):
        pass

    def drop(self):
        pass


def finish(engine, most=200):
    events = []
    for _ in range(most):
        if engine.idle:
            return events
        events += engine.step()
    raise AssertionError("it goes on for ever")


# ---- what a runner may answer


@pytest.mark.parametrize("many", [1, 2, 3, 7])
def test_a_step_may_bring_several_tokens_of_which_those_behind_an_end_are_none(many):
    engine = Engine(Counting(many), stop_token_ids=[105], chunk=4)
    stopped = engine.submit([100], SamplingParams(max_tokens=20))
    counted = engine.submit([1, 2, 3, 4, 5, 6, 7], SamplingParams(max_tokens=5))
    events = finish(engine)
    assert (stopped.tokens, stopped.finish_reason) == ([101, 102, 103, 104], "stop")
    assert (counted.tokens, counted.finish_reason) == ([8, 9, 10, 11, 12], "length")
    for request in (stopped, counted):
        own = [e for e in events if e.request is request]
        assert [e.token for e in own if e.finish_reason != "stop"] == request.tokens
        assert [e.finish_reason for e in own if e.finish_reason] == [request.finish_reason]


class Late(Counting):
    """Hands an outcome over a step later, and lets prompts in while others go on answering."""

    def __init__(self):
        super().__init__()
        self.kept = []

    def step(self, share):
        ahead = {outcome.request for outcome in self.kept}
        fresh = super().step([item for item in share if item[0] not in ahead])
        self.kept, out = fresh, self.kept
        return out

    def drop(self):
        self.kept = []


def test_outcomes_may_be_of_an_earlier_share_and_rows_join_and_leave():
    engine = Engine(Late())
    first = engine.submit([10], SamplingParams(max_tokens=9))
    assert engine.step() == []
    engine.step()
    late = engine.submit([20, 21], SamplingParams(max_tokens=3))
    engine.step()
    engine.cancel(late, "enough") if late.tokens else None
    finish(engine)
    assert first.tokens == list(range(11, 20))
    assert late.tokens == [22, 23, 24]


def test_an_engine_runs_without_torch():
    """The runner alone computes."""
    engine = Engine(Counting(), reuse=True)
    request = engine.submit([1], GREEDY)
    finish(engine)
    assert request.tokens == list(range(2, 10))
    again = engine.submit([1, *request.tokens, 5], GREEDY)
    finish(engine)
    assert again.reused == 8
    engine.configure(reuse=False, chunk=2)
    third = engine.submit([1, 2, 3, 4, 5], GREEDY)
    engine.step()
    assert (third.reused, engine.runner.shares[-1]) == (0, [(third.number, 2)])


# ---- the message


def test_a_message_carries_every_field_of_what_was_asked():
    asked = SamplingParams(
        temperature=0.1, top_p=1 / 3, top_k=7, min_p=0.25, presence_penalty=-1.5,
        frequency_penalty=2, logit_bias={5: -math.inf, 9: 1.25}, seed=2**70, max_tokens=3,
        stop_token_ids=(4, 5), logprobs=2, prompt_logprobs=0,
    )  # fmt: skip
    assert all(getattr(asked, f.name) != f.default for f in fields(asked))
    request = Request([1, 2, 3], asked, 3, seed=2**64 - 1, number=12)
    message = encode([request, Cancel(request, 'why "ü"'), Close()])
    submit, cancel, close = decode(message)
    assert submit == {"submit": [1, 2, 3], "params": asked, "seed": 2**64 - 1}
    assert cancel == {"cancel": 12, "reason": 'why "ü"'}
    assert close == {"close": True}
    assert json.loads(message)[0]["submit"] == [1, 2, 3]  # no pickle
    assert encode([]) == b""
    assert decode(b"") == []


class Lines:
    """What ranks that are threads say to each other; whoever waits for long fails."""

    def __init__(self, size):
        self.size, self.barrier = size, threading.Barrier(size, timeout=20)
        self.said = [None] * size

    def at(self, rank):
        return Line(self, rank)

    def all(self, rank, value):
        self.said[rank] = value
        self.barrier.wait()
        heard = list(self.said)
        self.barrier.wait()
        return heard


class Line:
    def __init__(self, lines, rank):
        self.lines, self.rank, self.size = lines, rank, lines.size
        self.failed = False

    def exchange(self, values):
        return self.lines.all(self.rank, list(map(int, values)))

    def spread(self, message, size):
        heard = self.lines.all(self.rank, message)[0]
        assert len(heard) == size
        return heard

    def fail(self):
        self.failed = True
        self.lines.barrier.abort()


def on_ranks(size, work, **options):
    """`work(engine, rank)` on a thread for each rank; what each returns or raises."""
    lines, found = Lines(size), [None] * size

    def run(rank):
        runner = Counting(ranks=lines.at(rank))
        engine = Engine(runner, chunk=4, **options)
        try:
            found[rank] = work(engine, rank)
        except Exception as error:
            found[rank] = error

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    return found


def test_ranks_that_make_the_same_calls_need_no_message():
    def work(engine, rank):
        requests = [engine.submit([10 * i, 1 + i], GREEDY) for i in range(7)]
        engine.step()
        engine.cancel(requests[1], "enough")
        engine.cancel(requests[6], "never began")
        assert requests[1].finish_reason is None  # not before all of them end it
        finish(engine)
        return [(r.number, r.seed, r.tokens, r.finish_reason) for r in requests]

    first, *others = on_ranks(3, work)
    assert all(other == first for other in others)
    assert [ends[3] for ends in first] == ["length", "enough", *["length"] * 4, "never began"]
    assert first[1][2] == [3]


@pytest.mark.parametrize("differs", ["prompt", "params", "seed", "cancel", "nothing"])
def test_ranks_that_are_told_different_things_stop_before_they_run_them(differs):
    def work(engine, rank):
        other = rank if differs != "nothing" else 0
        prompt = [1, 2 + other] if differs == "prompt" else [1, 2]
        params = SamplingParams(
            max_tokens=3 + other * (differs == "params"), seed=other if differs == "seed" else 0
        )
        request = engine.submit(prompt, params)
        if differs == "cancel" and rank:
            engine.cancel(request, "I alone")
        engine.step()
        finish(engine)
        return request.tokens

    for found in on_ranks(2, work):
        if differs == "nothing":
            assert found == [3, 4, 5]
        else:
            assert isinstance(found, RuntimeError)
            assert "the ranks disagree on prompts or tokens (checksums [" in str(found)


class Server:
    """Three threads that submit and cancel while rank 0 steps, as those of a server do."""

    def __init__(self, seed):
        self.seeds, self.told, self.busy = random.Random(seed), [], 3

    def client(self, engine, seed):
        rng = random.Random(seed)
        for _ in range(10):
            prompt = [rng.randrange(900) for _ in range(rng.choice([1, 3, 9]))]
            params = SamplingParams(max_tokens=rng.choice([0, 1, 5, 20]))
            self.told.append(engine.submit(prompt, params))
            if rng.random() < 0.4:
                engine.cancel(rng.choice(self.told), "gone")
        self.busy -= 1

    def work(self, engine, rank):
        if rank:
            engine.follow()
            return engine
        for _ in range(self.busy):
            given = (engine, self.seeds.random())
            threading.Thread(target=self.client, args=given, daemon=True).start()
        while self.busy or not engine.idle:
            engine.step()
        engine.close()
        return engine


@pytest.mark.parametrize("seed", range(6))
def test_the_others_follow_whatever_one_is_told_by_any_thread_at_any_moment(seed):
    server = Server(seed)
    engines = on_ranks(3, server.work, reuse=seed % 2 == 1)
    assert all(isinstance(engine, Engine) for engine in engines), engines
    shares = [engine.runner.shares for engine in engines]
    assert len(shares[0]) > 10
    assert shares[0] == shares[1] == shares[2]
    assert not any(engine._live for engine in engines)
    for request in server.told:
        begin = request.prompt[-1] + 1
        assert request.tokens == list(range(begin, begin + len(request.tokens)))
        if request.finish_reason != "gone":
            assert request.finish_reason == "length"
            assert len(request.tokens) == request.limit


def test_who_follows_where_nobody_leads_goes_on():
    def work(engine, rank):
        engine.follow()
        return "left"

    assert on_ranks(2, work) == ["left", "left"]
    Engine(Counting()).follow()  # nor does one that is alone
    alone = Engine(Counting())
    request = alone.submit([1], GREEDY)
    alone.close()
    assert request.finish_reason == "cancelled"


def test_a_rank_that_fails_takes_no_further_step():
    def work(engine, rank):
        request = engine.submit([1], GREEDY)
        if rank:
            engine.runner.step = lambda share: 1 / 0
        seen = []
        for _ in range(2):
            try:
                finish(engine)
            except (ZeroDivisionError, RuntimeError) as error:
                seen.append(f"{type(error).__name__}: {error}")
        return seen, engine.runner.ranks.failed, request.error

    _, second = on_ranks(2, work)
    assert second[0][0].startswith("ZeroDivisionError")
    assert "no longer step together, since one failed (ZeroDivisionError" in second[0][1]
    assert second[1:] == (True, None)
